"""From a method's options to its filter, and from images to what the network sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float, Int64
from torch import Tensor

from freqmask.errors import UserError
from freqmask.filters import Filter, Filtered, build_filter
from freqmask.filters.fixed import exact_radius

Auto = Literal["auto"]
COM_FRACTIONS = (0.005, 0.01, 0.05)
# Options and their defaults, by the filter that has a use for them.
OPTIONS: dict[str, dict[str, Any]] = {
    "fixed": {"radius": "auto", "low_pass_share": "auto", "softness": 0.0},
    "com": {"com_fractions": COM_FRACTIONS, "com_share": 0.5, "magnitude": "luma"},
}


def masking_filter(filter: str | Filter, image_size: tuple[int, int], is_cnn: bool, **options: Any) -> Filter:
    """The filter that a method's options describe.

    Args:
        filter: ``"fixed"``: low-pass or high-pass, drawn per image; ``"com"``: Com or RCom; else a filter, or
            its name or import path with arguments.
        image_size: (height, width) in pixels.
        is_cnn: chooses ``low_pass_share="auto"``: 0.3 for a CNN, else 0.5 (docs/methods.md, MFM).
        **options: a value for every name in ``OPTIONS``.

    Raises:
        UserError: for an option that the filter has no use for, or a value out of range.
    """
    _refuse_unused(filter, options)
    if filter == "fixed":
        share = options["low_pass_share"]
        return build_filter(
            "fixed",
            image_size,
            radius=options["radius"],
            low_pass_share=default_low_pass_share(is_cnn) if share == "auto" else share,
            softness=options["softness"],
        )
    if filter == "com":
        return build_filter(
            "com",
            image_size,
            com_fractions=tuple(options["com_fractions"]),
            low_pass_share=_checked_share(options["com_share"]),  # Com is the low-pass side of its mixture
            magnitude=options["magnitude"],
        )
    return build_filter(filter, image_size)


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


def _refuse_unused(filter: str | Filter, options: dict[str, Any]) -> None:
    for home, defaults in OPTIONS.items():
        for name, default in defaults.items():
            if home != filter and not _same(options[name], default):
                shown = filter if isinstance(filter, str) else filter.describe()
                raise UserError(
                    f"{name} ({options[name]}) is not used by filter {shown}; it belongs to filter={home!r}; "
                    "or write it inside, as in 'lowpass(radius=8)'"
                )


def _same(value: Any, default: Any) -> bool:
    return (
        tuple(value) == default
        if isinstance(value, Sequence) and isinstance(default, tuple)
        else value == default
    )


def _checked_share(share: float) -> float:
    if not 0 <= share <= 1:
        raise UserError(f"com_share ({share}) must be in [0, 1]; 0.5 is the default")
    return share
