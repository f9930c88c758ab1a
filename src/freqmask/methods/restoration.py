"""Restoration tasks: undo a spatial corruption, judged on the whole spectrum (docs/methods.md, MFM)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from freqmask.backbones import Backbone, ImageSize, eval_no_grad
from freqmask.degradations import Blur, Downscale, Noise
from freqmask.heads import ReconstructionHead
from freqmask.losses import SpectrumLoss
from freqmask.methods.health import reconstruction_health
from freqmask.methods.masking import Auto
from freqmask.methods.method import Method, build_backbone, picture_keys, pictures, recorded
from freqmask.methods.normalisation import Normalisation
from freqmask.rng import combine


class Restoration(Method):
    """loss = mean(|F(decoder(backbone(degrade(x)))) - F(x)|^gamma), over the full spectrum.

    The three tasks differ in ``degrade`` alone; the rest is MFM's. Arguments as MFM's.
    """

    def __init__(
        self,
        degradation: nn.Module,
        settings: dict[str, Any],
        *,
        backbone: str | Backbone,
        image_size: ImageSize,
        channels: int,
        patch_size: int | None,
        gamma: float,
        focal: float | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        stage: int,
        model_args: Mapping[str, Any] | None,
        gradient_checkpointing: bool,
        initialisation: Literal["mfm", "timm"],
    ) -> None:
        super().__init__()
        self.settings = settings
        self.degradation = degradation
        self.loss = SpectrumLoss(gamma=gamma, focal=focal)
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
        self.decoder = ReconstructionHead(self.backbone.feature_dim, channels, self.backbone.stride)

    def forward(
        self,
        views: Sequence[Float[Tensor, "batch channel height width"]],
        keys: Int64[Tensor, " batch"] | None = None,
        details: bool = False,
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss of one view of each image, see :class:`Method`."""
        (images,), keys = self.checked(views, keys)
        prediction = self.predict(self.degradation(images, combine(keys, 0)))
        target = self.normalise(images)
        parts = {"loss": self.loss(prediction, target, None)}
        if details:
            parts |= reconstruction_health(self.loss, prediction, target, None)
        return parts

    def predict(
        self, degraded: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """The normalised image that the network makes of a degraded one."""
        features = self.backbone(self.normalise(degraded))
        return self.decoder(features.feature_map, degraded.shape[-2:])

    @torch.no_grad()
    def reconstruct(
        self, images: Float[Tensor, "batch channel height width"], keys: Int64[Tensor, " batch"] | None = None
    ) -> dict[str, Tensor]:
        """Original, degraded and prediction, see :class:`Method`; keep is 0: no frequency is given."""
        degraded = self.degradation(images, picture_keys(images) if keys is None else keys)
        with eval_no_grad(self):
            prediction = self.normalise.inverse(self.predict(degraded))
        batch, _, height, width = images.shape
        return pictures(images, degraded, prediction, images.new_zeros(batch, 1, height, width // 2 + 1))


class SuperResolution(Restoration):
    """Undo a bicubic reduction without antialiasing.

    Args:
        factor: how many pixels become one; ``"auto"`` is 8 at 224 pixels, scaled with the shorter side.
        others: as :class:`~freqmask.methods.MFM`'s.
    """

    name: ClassVar[str] = "sr"
    about: ClassVar[str] = "makes an image smaller; the network predicts the large one"

    def __init__(
        self,
        backbone: str | Backbone = "vit_small_patch16_224",
        image_size: ImageSize = 224,
        channels: int = 3,
        *,
        factor: float | Auto = "auto",
        patch_size: int | None = None,
        gamma: float = 1.0,
        focal: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        stage: int = -1,
        model_args: Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        initialisation: Literal["mfm", "timm"] = "mfm",
    ) -> None:
        given = dict(locals())
        super().__init__(Downscale(factor), recorded(given), **_shared(given))


class Deblur(Restoration):
    """Undo an isotropic Gaussian blur.

    Args:
        sigma: of the blur in pixels; ``"auto"`` is 5 at 224 pixels, scaled with the shorter side.
        kernel_sizes: odd, one drawn per image; ``"auto"`` is 7, 9, ..., 21 at 224 pixels, scaled alike.
        others: as :class:`~freqmask.methods.MFM`'s.
    """

    name: ClassVar[str] = "deblur"
    about: ClassVar[str] = "blurs an image; the network predicts the sharp one"

    def __init__(
        self,
        backbone: str | Backbone = "vit_small_patch16_224",
        image_size: ImageSize = 224,
        channels: int = 3,
        *,
        sigma: float | Auto = "auto",
        kernel_sizes: Sequence[int] | Auto = "auto",
        patch_size: int | None = None,
        gamma: float = 1.0,
        focal: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        stage: int = -1,
        model_args: Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        initialisation: Literal["mfm", "timm"] = "mfm",
    ) -> None:
        given = dict(locals())
        super().__init__(Blur(kernel_sizes, sigma), recorded(given), **_shared(given))


class Denoise(Restoration):
    """Undo Gaussian noise, drawn per pixel and channel and not clamped.

    Args:
        sigma: of the noise, images being in [0, 1]; ``"auto"`` is 75/255 at any size.
        others: as :class:`~freqmask.methods.MFM`'s.
    """

    name: ClassVar[str] = "denoise"
    about: ClassVar[str] = "adds noise to an image; the network predicts it without"

    def __init__(
        self,
        backbone: str | Backbone = "vit_small_patch16_224",
        image_size: ImageSize = 224,
        channels: int = 3,
        *,
        sigma: float | Auto = "auto",
        patch_size: int | None = None,
        gamma: float = 1.0,
        focal: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        stage: int = -1,
        model_args: Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        initialisation: Literal["mfm", "timm"] = "mfm",
    ) -> None:
        given = dict(locals())
        super().__init__(Noise() if sigma == "auto" else Noise(sigma), recorded(given), **_shared(given))


def _shared(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a task that are not its degradation's."""
    names = inspect.signature(Restoration).parameters
    return {name: value for name, value in given.items() if name in names}
