"""MFM: hide frequencies of an image, predict them; how much of that is learned (docs/methods.md, MFM)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from freqmask.backbones import Backbone, height_and_width
from freqmask.errors import UserError
from freqmask.filters import Filter, OneOf, build_filter
from freqmask.filters.fixed import RINGS_AT_224, exact_radius
from freqmask.losses import SpectrumLoss, spectrum_distance
from freqmask.methods.method import Method
from freqmask.options import as_typed
from freqmask.options.of_methods import MaskingOptions, MFMOptions
from freqmask.rng import Keys, combine
from freqmask.spectrum import REFERENCE_SIDE, Images, bin_weights, constant, frequency_radius


class MFM(Method):
    """Masked frequency modeling.

    loss = sum(w d) / sum(w), with x~ = clamp(F^-1(F(x) keep)), d = |F(decoder(backbone(x~))) - F(x)|^gamma
    and w = masked_weight (1 - keep) + kept_weight keep; x~ and x are normalized after the filter.

    Its options are those of :class:`~freqmask.options.of_methods.MFMOptions`.
    """

    name = "mfm"
    Options: ClassVar[type[MFMOptions]] = MFMOptions
    backbone: Backbone
    about = "hides some frequencies of an image; the network predicts them"

    def build(self, options: MFMOptions) -> None:
        """Loss, filter and decoder."""
        self.loss = SpectrumLoss(
            options.masked_weight, options.kept_weight, options.reduce, options.gamma, options.focal
        )
        self.filter = masking_filter(options, self.settings, self.backbone.is_cnn)
        self.clamp = options.clamp
        self.decoder = self.make_decoder()

    def forward(
        self, views: Sequence[Images], keys: Keys | None = None, details: bool = False
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss of one view of each image, see :class:`Method`."""
        (images,), keys = self.checked(views, keys)
        keys = combine(keys, 0)
        filtered = self.filter(images, keys, clamp=self.clamp)
        prediction = self.predict(filtered.images)
        target = self.normalise(images)
        parts = {"loss": self.loss(prediction, target, filtered.keep)}
        if details:
            parts |= reconstruction_health(self.loss, prediction, target, filtered.keep, self.filter, keys)
        return parts


def masking_filter(options: MaskingOptions, settings: dict[str, Any], is_cnn: bool) -> Filter:
    """The filter that a method's options describe.

    Args:
        options: ``filter`` and those that it uses.
        settings: of the method, with its ``image_size``; the fixed filters' ``"auto"`` become numbers in them.
        is_cnn: chooses ``low_pass_share="auto"``: 0.3 for a CNN, else 0.5 (docs/methods.md, MFM).

    Raises:
        UserError: for an option that the filter has no use for, or a value out of range.
    """
    for field in dataclasses.fields(MaskingOptions):
        home, value = field.metadata.get("filter"), getattr(options, field.name)
        if home not in (None, options.filter) and as_typed(value) != as_typed(field.default):
            shown = options.filter if isinstance(options.filter, str) else options.filter.describe()
            raise UserError(
                f"{field.name} ({value}) is not used by filter {shown}; it belongs to filter={home!r}; "
                "or write it inside, as in 'lowpass(radius=8)'"
            )
    size = height_and_width(settings["image_size"])
    if options.filter == "fixed":
        share = options.low_pass_share
        if share == "auto":
            share = 0.3 if is_cnn else 0.5
        settings |= {"radius": float(exact_radius(options.radius, *size)), "low_pass_share": share}
        fixed = {"radius": options.radius, "low_pass_share": share, "softness": options.softness}
        return build_filter("fixed", size, **fixed)
    if options.filter == "com":
        com = {"com_fractions": tuple(options.com_fractions), "magnitude": options.magnitude}
        return build_filter("com", size, low_pass_share=options.com_share, **com)  # Com is the low-pass side
    return build_filter(options.filter, size)


@torch.no_grad()
def reconstruction_health(
    loss: SpectrumLoss,
    prediction: Images,
    target: Images,
    keep: Float[Tensor, "batch mask_channel height half_width"] | None,
    filter: Filter | None = None,
    keys: Keys | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """The loss over that of a zero prediction: overall, per filter drawn, per band of radii.

    1.00 means nothing learned (docs/methods.md, small pictures). Sums are this process's own: no collective, no wait
    for the device. A part that no image of the batch belongs to is NaN.

    Args:
        loss: whose weights, power and focal weight count.
        prediction: as the loss gets it.
        target: likewise; zero is its mean image.
        keep: likewise; None counts every frequency.
        filter: the filter that made keep; only of a mixture the parts are told apart.
        keys: the keys that it was given.

    Returns:
        ``relative_loss``, ``relative_loss/NAME`` and ``relative_loss/band_LOW_HIGH`` (radii in cycles per
        shorter side, LOW included).
    """
    height, width = target.shape[-2:]
    reached = spectrum_distance(prediction, target, loss.gamma, loss.focal)
    at_zero = spectrum_distance(torch.zeros_like(target), target, loss.gamma, loss.focal)
    pairs = bin_weights(height, width, target.device, at_zero.dtype)
    weight = pairs * loss.weights(pairs, keep)
    reached, at_zero = (weight * reached).sum(1), (weight * at_zero).sum(1)
    health = {"relative_loss": reached.sum() / at_zero.sum()}
    if isinstance(filter, OneOf) and keys is not None:
        drawn = filter.draw(keys)
        for number, name in enumerate(filter.names):
            chosen = (drawn == number)[:, None, None]
            health[f"relative_loss/{name}"] = (reached * chosen).sum() / (at_zero * chosen).sum()
    edges = band_edges(height, width)
    masks = _band_masks(height, width, edges, target.device)
    for low, high, mask in zip(edges[:-1], edges[1:], masks, strict=True):
        health[f"relative_loss/band_{low}_{high}"] = (reached * mask).sum() / (at_zero * mask).sum()
    return health


def band_edges(height: int, width: int) -> tuple[int, ...]:
    """Rising radii that cut a spectrum into octaves, at the same shares of it for every size, its corners included.

    >>> band_edges(224, 224)
    (0, 4, 8, 16, 32, 64, 112, 159)
    """
    side = min(height, width)
    corner = math.floor(side / math.sqrt(2)) + 1  # above every radius
    return tuple(sorted({round(edge * side / REFERENCE_SIDE) for edge in (0, *RINGS_AT_224)} | {corner}))


@constant
def _band_masks(height: int, width: int, edges: tuple[int, ...], device: torch.device) -> Tensor:
    radius = frequency_radius(height, width, device)
    return torch.stack([(low <= radius) & (radius < high) for low, high in pairwise(edges)])
