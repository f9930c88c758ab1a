"""MFM: hide frequencies of an image, predict them (docs/methods.md, MFM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from freqmask.backbones import Backbone, ImageSize, eval_no_grad, height_and_width
from freqmask.filters import Filter
from freqmask.heads import ReconstructionHead
from freqmask.losses import Reduce, SpectrumLoss
from freqmask.methods.health import reconstruction_health
from freqmask.methods.masking import COM_FRACTIONS, Auto, corrupt, masking_filter, without_auto
from freqmask.methods.method import Method, build_backbone, picture_keys, pictures, recorded
from freqmask.methods.normalisation import Normalisation
from freqmask.rng import combine


class MFM(Method):
    """Masked frequency modelling.

    loss = sum(w d) / sum(w), with x~ = clamp(F^-1(F(x) keep)), d = |F(decoder(backbone(x~))) - F(x)|^gamma
    and w = masked_weight (1 - keep) + kept_weight keep; x~ and x are normalised after the filter.

    Args:
        backbone: a timm model's name, or a :class:`~freqmask.backbones.Backbone`, which then has its own
            patch_size, stage, model_args and initialisation.
        image_size: side in pixels, or (height, width).
        channels: channels of the images.
        patch_size: side of a patch in pixels; None leaves the model's own.
        filter: ``"fixed"`` (low-pass or high-pass), ``"com"`` (Com or RCom), a filter, or one by name or
            import path with arguments.
        radius: of the fixed filters, in bins; ``"auto"`` is 16 at 224 pixels, scaled with the shorter side.
        low_pass_share: chance that an image is low-passed; ``"auto"`` is 0.3 for a CNN, else 0.5.
        com_fractions: shares of the bins that Com keeps, one drawn per image.
        com_share: chance of Com, else RCom.
        magnitude: what Com ranks: ``"luma"``, ``"mean"`` or ``"each"`` channel.
        softness: width of the fixed filters' edge in bins; 0 is hard.
        clamp: whether the filtered image is cut to [0, 1], as in the paper.
        masked_weight: weight of the hidden frequencies.
        kept_weight: weight of the visible ones.
        reduce: normalise the loss over the ``"batch"`` (the release's) or ``"image"`` by image.
        gamma: power of the distance.
        focal: exponent of the focal weight; None is off.
        mean: of each channel in [0, 1]; None: ImageNet's for three channels, else 0.5.
        std: of each channel; None: ImageNet's for three channels, else 0.25.
        stage: which stage of the backbone is decoded; -1 is the last.
        model_args: timm's further arguments.
        gradient_checkpointing: recompute activations in the backward pass.
        initialisation: ``"mfm"`` (the paper's, for a ViT) or ``"timm"``.

    Raises:
        UserError: for an option out of range, or one that the filter has no use for.
    """

    name = "mfm"
    about = "hides some frequencies of an image; the network predicts them"

    def __init__(
        self,
        backbone: str | Backbone = "vit_small_patch16_224",
        image_size: ImageSize = 224,
        channels: int = 3,
        *,
        patch_size: int | None = None,
        filter: str | Filter = "fixed",
        radius: float | Auto = "auto",
        low_pass_share: float | Auto = "auto",
        com_fractions: Sequence[float] = COM_FRACTIONS,
        com_share: float = 0.5,
        magnitude: Literal["luma", "mean", "each"] = "luma",
        softness: float = 0.0,
        clamp: bool = True,
        masked_weight: float = 1.0,
        kept_weight: float = 0.0,
        reduce: Reduce = "batch",
        gamma: float = 1.0,
        focal: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        stage: int = -1,
        model_args: Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        initialisation: Literal["mfm", "timm"] = "mfm",
    ) -> None:
        settings = recorded(locals())
        super().__init__()
        self.loss = SpectrumLoss(masked_weight, kept_weight, reduce, gamma, focal)
        self.normalise = Normalisation(channels, mean, std)
        self.backbone = build_backbone(
            backbone,
            image_size,
            channels,
            patch_size,
            stage,
            model_args,
            initialisation,
            gradient_checkpointing,
        )
        size = height_and_width(image_size)
        self.filter = masking_filter(
            filter,
            size,
            self.backbone.is_cnn,
            radius=radius,
            low_pass_share=low_pass_share,
            com_fractions=com_fractions,
            com_share=com_share,
            magnitude=magnitude,
            softness=softness,
        )
        self.settings = without_auto(settings, size, self.backbone.is_cnn)
        self.clamp = clamp
        self.decoder = ReconstructionHead(self.backbone.feature_dim, channels, self.backbone.stride)

    def forward(
        self,
        views: Sequence[Float[Tensor, "batch channel height width"]],
        keys: Int64[Tensor, " batch"] | None = None,
        details: bool = False,
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss of one view of each image, see :class:`Method`."""
        (images,), keys = self.checked(views, keys)
        keys = combine(keys, 0)
        filtered = corrupt(self.filter, images, keys, self.clamp)
        prediction = self.predict(filtered.images)
        target = self.normalise(images)
        loss = self.loss(prediction, target, filtered.keep)
        parts = {"loss": loss}
        if details:
            parts |= reconstruction_health(self.loss, prediction, target, filtered.keep, self.filter, keys)
        return parts

    def predict(
        self, filtered: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """The normalised image that the network makes of a filtered one in [0, 1]."""
        features = self.backbone(self.normalise(filtered))
        return self.decoder(features.feature_map, filtered.shape[-2:])

    @torch.no_grad()
    def reconstruct(
        self, images: Float[Tensor, "batch channel height width"], keys: Int64[Tensor, " batch"] | None = None
    ) -> dict[str, Tensor]:
        """Original, filtered, prediction and the missing part filled in, see :class:`Method`."""
        filtered = corrupt(self.filter, images, picture_keys(images) if keys is None else keys, self.clamp)
        with eval_no_grad(self):
            prediction = self.normalise.inverse(self.predict(filtered.images))
        return pictures(images, filtered.images, prediction, filtered.keep)
