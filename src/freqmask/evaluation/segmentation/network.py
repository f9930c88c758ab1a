"""UperNet: segmentation-models-pytorch's decoder on the pyramid of a backbone, and the auxiliary head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from freqmask.errors import UserError
from freqmask.evaluation.segmentation.labels import IGNORED
from freqmask.evaluation.segmentation.pyramid import FeaturePyramid
from freqmask.interop.models import OpenedModel

AUXILIARY_WEIGHT = 0.4  # of its loss, as in PSPNet and BEiT
AUXILIARY_CHANNELS = 256
DROPOUT = 0.1  # before each classifier
CNN_CHANNELS = 512  # of UperNet's decoder; with a plain ViT, BEiT takes the ViT's own width


class Logits(NamedTuple):
    """What the decoder says, and what the auxiliary head says in training; None elsewhere."""

    decoder: Float[Tensor, "batch classes rows columns"]
    auxiliary: Float[Tensor, "batch classes rows columns"] | None


class UperNet(nn.Module):
    """A backbone with UperNet's decoder.

    Args:
        opened: the backbone, with mean and standard deviation.
        classes: how many there are.
        decoder_channels: width of the decoder; None is the backbone's width for a plain ViT, else 512.

    Raises:
        UserError: segmentation-models-pytorch is missing, or the backbone has no pyramid.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, opened: OpenedModel, classes: int, decoder_channels: int | None = None) -> None:
        super().__init__()
        decoder = decoder_class()
        self.pyramid = FeaturePyramid(opened.backbone)
        channels = self.pyramid.channels
        width = decoder_channels or (channels[-1] if self.pyramid.is_plain else CNN_CHANNELS)
        self.decoder_channels = width
        # The decoder counts from the strides 1 and 2, which it does not use.
        self.decoder = decoder([0, 0, *channels], encoder_depth=len(channels) + 1, decoder_channels=width)
        self.classifier = nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(width, classes, kernel_size=1))
        self.auxiliary = _auxiliary_head(channels[-2], min(AUXILIARY_CHANNELS, width), classes)
        self.register_buffer("mean", torch.tensor(opened.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(opened.std)[:, None, None], persistent=False)

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Logits:
        """Logits of images in [0, 1], at about a quarter of their size."""
        maps = self.pyramid((images - self.mean) / self.std)
        decoded = self.classifier(self.decoder([None, None, *maps]))
        return Logits(decoded, self.auxiliary(maps[-2]) if self.training else None)


def _auxiliary_head(channels: int, width: int, classes: int) -> nn.Sequential:
    """FCN on the last map but one: it keeps the gradient short."""
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Dropout2d(DROPOUT),
        nn.Conv2d(width, classes, kernel_size=1),
    )


def segmentation_losses(logits: Logits, masks: Int64[Tensor, "batch height width"]) -> dict[str, Tensor]:
    """Cross-entropy of every pixel that counts: ``loss = decoder + 0.4 auxiliary``.

    Args:
        logits: in training mode.
        masks: classes, ``IGNORED`` where a pixel does not count; all of them may be.
    """
    parts = {"decoder": _cross_entropy(logits.decoder, masks)}
    if logits.auxiliary is not None:
        parts["auxiliary"] = _cross_entropy(logits.auxiliary, masks)
    loss = parts["decoder"] + AUXILIARY_WEIGHT * parts.get("auxiliary", 0.0)
    return {"loss": loss, **parts}


def _cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    enlarged = F.interpolate(logits.float(), size=masks.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(enlarged, masks, ignore_index=IGNORED, reduction="sum")
    return total / (masks != IGNORED).sum().clamp_min(1)  # the plain mean of nothing would be no number


def decoder_class() -> Any:
    """segmentation-models-pytorch's decoder.

    Raises:
        UserError: it is not installed.
    """
    try:
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ModuleNotFoundError as error:
        raise UserError(
            f"segmentation needs segmentation-models-pytorch, and {error.name} is missing; "
            "pip install 'freqmask[seg]'"
        ) from error
    return UPerNetDecoder
