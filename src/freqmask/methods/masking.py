"""From a method's options to its filter, and from images to what the network sees of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor

from freqmask.errors import UserError
from freqmask.filters import Filter, Filtered, build_filter
from freqmask.filters.fixed import exact_radius
from freqmask.options import as_typed
from freqmask.options.of_methods import MaskingOptions


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
