"""MFM: hide frequencies of an image, predict them (docs/methods.md, MFM)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from freqmask.backbones import Backbone, ImageSize, eval_no_grad, height_and_width
from freqmask.errors import UserError
from freqmask.filters import Filter, Filtered, build_filter
from freqmask.filters.fixed import exact_radius
from freqmask.heads import ReconstructionHead
from freqmask.images import Normalization
from freqmask.losses import SpectrumLoss
from freqmask.methods.health import reconstruction_health
from freqmask.methods.method import Method, build_backbone, picture_keys, pictures, recorded
from freqmask.options import as_typed, read_group
from freqmask.options.of_methods import MaskingOptions, MFMOptions
from freqmask.rng import combine


class MFM(Method):
    """Masked frequency modeling.

    loss = sum(w d) / sum(w), with x~ = clamp(F^-1(F(x) keep)), d = |F(decoder(backbone(x~))) - F(x)|^gamma
    and w = masked_weight (1 - keep) + kept_weight keep; x~ and x are normalized after the filter.

    Args:
        backbone: a timm model's name, or a :class:`~freqmask.backbones.Backbone`, which then has its own
            patch_size, stage, model_args and initialisation.
        image_size: side in pixels, or (height, width).
        channels: channels of the images.
        **options: those of :class:`~freqmask.options.of_methods.MFMOptions`.

    Raises:
        UserError: for an option out of range, or one that the filter has no use for.
    """

    name = "mfm"
    Options: ClassVar[type[MFMOptions]] = MFMOptions
    about = "hides some frequencies of an image; the network predicts them"

    def __init__(
        self,
        backbone: str | Backbone = "vit_small_patch16_224",
        image_size: ImageSize = 224,
        channels: int = 3,
        **options: Any,
    ) -> None:
        first = {"backbone": backbone, "image_size": image_size, "channels": channels}
        given = read_group(self.Options, options)
        settings = recorded({**first, **vars(given)})
        super().__init__()
        self.loss = SpectrumLoss(
            given.masked_weight, given.kept_weight, given.reduce, given.gamma, given.focal
        )
        self.normalise = Normalization(channels, given.mean, given.std)
        self.backbone = build_backbone(backbone, image_size, channels, given)
        size = height_and_width(image_size)
        self.filter = masking_filter(given, size, self.backbone.is_cnn)
        self.settings = without_auto(settings, size, self.backbone.is_cnn)
        self.clamp = given.clamp
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
        """The normalized image that the network makes of a filtered one in [0, 1]."""
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


def masking_filter(options: MaskingOptions, image_size: tuple[int, int], is_cnn: bool) -> Filter:
    """The filter that a method's options describe.

    Args:
        options: ``filter`` and those that it uses.
        image_size: (height, width) in pixels.
        is_cnn: chooses ``low_pass_share="auto"``: 0.3 for a CNN, else 0.5 (docs/methods.md, MFM).

    Raises:
        UserError: for an option that the filter has no use for, or a value out of range.
    """
    _refuse_unused(options)
    if options.filter == "fixed":
        share = options.low_pass_share
        return build_filter(
            "fixed",
            image_size,
            radius=options.radius,
            low_pass_share=default_low_pass_share(is_cnn) if share == "auto" else share,
            softness=options.softness,
        )
    if options.filter == "com":
        return build_filter(
            "com",
            image_size,
            com_fractions=tuple(options.com_fractions),
            low_pass_share=options.com_share,  # Com is the low-pass side of its mixture
            magnitude=options.magnitude,
        )
    return build_filter(options.filter, image_size)


def without_auto(settings: dict[str, Any], image_size: tuple[int, int], is_cnn: bool) -> dict[str, Any]:
    """Settings in which the fixed filters' ``"auto"`` options have become numbers."""
    if settings["filter"] != "fixed":
        return settings
    share, radius = settings["low_pass_share"], exact_radius(settings["radius"], *image_size)
    return {
        **settings,
        "radius": float(radius),
        "low_pass_share": default_low_pass_share(is_cnn) if share == "auto" else share,
    }


def default_low_pass_share(is_cnn: bool) -> float:
    """The published chance that an image is low-passed (docs/methods.md, MFM)."""
    return 0.3 if is_cnn else 0.5


def corrupt(
    filter: Filter,
    images: Float[Tensor, "batch channel height width"],
    keys: Int64[Tensor, " batch"],
    clamp: bool,
) -> Filtered:
    """What the network sees, x~ = clamp(Re F^-1(F(x) keep), 0, 1), and keep (docs/methods.md, MFM)."""
    filtered: Filtered = filter(images, keys)
    return Filtered(filtered.images.clamp(0, 1), filtered.keep) if clamp else filtered


def _refuse_unused(options: MaskingOptions) -> None:
    """A UserError for an option that was changed though the filter does not use it."""
    for field in dataclasses.fields(MaskingOptions):
        home, value = field.metadata.get("filter"), getattr(options, field.name)
        given = as_typed(value) != as_typed(field.default)
        if home not in (None, options.filter) and given:
            shown = options.filter if isinstance(options.filter, str) else options.filter.describe()
            raise UserError(
                f"{field.name} ({value}) is not used by filter {shown}; it belongs to filter={home!r}; "
                "or write it inside, as in 'lowpass(radius=8)'"
            )
