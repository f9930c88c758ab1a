"""UperNet: four maps of a backbone at strides 4 to 32, segmentation-models-pytorch's decoder, an auxiliary head."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from freqmask.backbones import Backbone
from freqmask.errors import UserError
from freqmask.evaluation.mask_files import IGNORED
from freqmask.interop.models import OpenedModel, stage_features
from freqmask.timm_models import parameters_behind, strides

STRIDES = (4, 8, 16, 32)


class Rescale(nn.Module):
    """A map made 2^steps times as large (BEiT's transposed convolutions), as it is, or pooled (negative steps)."""

    def __init__(self, channels: int, steps: int) -> None:
        super().__init__()
        self.halvings = max(-steps, 0)
        layers: list[nn.Module] = []
        for number in range(steps):
            if number:
                layers += [nn.BatchNorm2d(channels), nn.GELU()]
            layers.append(nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2))
        self.enlarge = nn.Sequential(*layers)

    def forward(self, feature_map: Float[Tensor, "batch dim rows columns"]) -> Tensor:
        """(B, D, rows 2^steps, columns 2^steps), odd sizes rounded up."""
        for _ in range(self.halvings):
            feature_map = F.max_pool2d(feature_map, kernel_size=2, ceil_mode=True)
        enlarged: Tensor = self.enlarge(feature_map)
        return enlarged


class FeaturePyramid(nn.Module):
    """The maps that a segmentation decoder takes, finest first.

    Of a plain ViT (one stride throughout) the blocks at 1/4, 1/2, 3/4 and the end, each brought to its stride
    as in BEiT (x4, x2, as it is, /2 for patches of 16). BEiT itself takes the blocks 4, 6, 8 and 12 of 12.
    Of other networks the last four stages as they are.

    All parameters of the backbone are trained from here on, but those that no map depends on.

    Raises:
        UserError: the network has a single stage that is no sequence of blocks.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        stage_strides = strides(backbone.timm_model)
        count = len(stage_strides)
        self.is_plain = len(set(stage_strides)) == 1
        if self.is_plain:
            self.stages = [math.ceil(count * share / 4) - 1 for share in (1, 2, 3, 4)]
        else:
            self.stages = list(range(max(count - 4, 0), count))
        if len(self.stages) < 2:
            raise UserError(f"model ({backbone.name}) has one stage only; segmentation needs two or more")
        self.channels = [one.shape[1] for one in self._probe()]
        self.rescale = nn.ModuleList()
        if self.is_plain:
            for channels, wanted in zip(self.channels, STRIDES, strict=True):
                self.rescale.append(Rescale(channels, round(math.log2(backbone.stride / wanted))))

    def forward(self, normalized: Float[Tensor, "batch channel height width"]) -> list[Tensor]:
        """The maps of normalized images."""
        maps = self._maps(normalized)
        return [scale(one) for scale, one in zip(self.rescale, maps, strict=True)] if self.is_plain else maps

    def _maps(self, normalized: Tensor) -> list[Tensor]:
        wanted = sorted(set(self.stages))  # a ViT of less than four blocks gives some of them twice
        features = stage_features(self.backbone, normalized, wanted)
        by_stage = {stage: one.feature_map for stage, one in zip(wanted, features, strict=True)}
        return [by_stage[stage] for stage in self.stages]

    def _probe(self) -> list[Tensor]:
        """The maps of an empty image; what they do not depend on is not trained: DDP refuses it."""
        backbone = self.backbone
        backbone.requires_grad_(True).eval()
        with torch.enable_grad():
            maps = self._maps(torch.zeros(1, backbone.channels, *backbone.image_size))
        reached = parameters_behind(maps)
        for parameter in backbone.parameters():
            parameter.requires_grad_(parameter in reached)
        return maps


AUXILIARY_WEIGHT = 0.4  # of its loss, as in PSPNet and BEiT
AUXILIARY_CHANNELS = 256
DROPOUT = 0.1  # before each classifier
CNN_CHANNELS = 512  # of UperNet's decoder; with a plain ViT, BEiT takes the ViT's own width


class Logits(NamedTuple):
    """Of the decoder, and in training of the auxiliary head; None elsewhere."""

    decoder: Float[Tensor, "batch classes rows columns"]
    auxiliary: Float[Tensor, "batch classes rows columns"] | None


class UperNet(nn.Module):
    """A backbone with UperNet's decoder, as wide as the backbone for a plain ViT, else 512, unless told otherwise.

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
