"""``freqmask spectra``: a picture of what every filter keeps and removes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from freqmask.commands.given import command
from freqmask.console import say
from freqmask.errors import UserError
from freqmask.options import Range, Seed

_MOST_IMAGES = 4  # side by side; more would be too small to see


@command(imports="freqmask.pretraining.figures")
def spectra(
    image: list[str],
    *,
    out: str = "spectra.png",
    image_size: Annotated[int | None, Range(least=8)] = None,
    filters: list[str] | None = None,
    seed: Seed = 0,
) -> Path:
    """Draws what every filter keeps of an image and what it removes, and prints the shares of energy.

    For each filter: the kept part, the removed part, the spectrum with the kept bins, and the shares of
    bins and energy. Parts too faint to see, and parts with negative values, are stretched; the picture
    says by how much. Energy is counted without the image's mean.

    Args:
        image: image files, at most four; each is cropped to its middle square.
        out: the PNG to write.
        image_size: side in pixels that the square is resized to; the default is 224, or the image's own
            shorter side where it is smaller.
        filters: a list of the filters to draw, for example '["lowpass(radius=8)", com, mylab.filters:Wedge]';
            the default is one of every kind.
        seed: decides what random filters draw.

    Returns:
        The path of the picture.

    Raises:
        UserError: no image, more than four, one that cannot be read, or an unknown filter.
    """
    import torch

    from freqmask.filters import build_filter
    from freqmask.pretraining.figures import apply_filter, draw_filters, filter_table, read_squares
    from freqmask.rng import identity_of, sample_key
    from freqmask.training.files import check_writable

    if not 1 <= len(image) <= _MOST_IMAGES:
        raise UserError(f"image ({len(image)} files) must be 1 to {_MOST_IMAGES} files; name fewer")
    if Path(out).suffix.lower() != ".png":
        raise UserError(f"out ({out}) must be a .png file; try --out {Path(out).with_suffix('.png')}")
    check_writable(out)
    squares = read_squares(image, image_size)
    size = next(iter(squares.values())).shape[-1]
    built = {text: build_filter(text, size) for text in filters or default_filters(size)}
    keys = {name: torch.tensor([sample_key(seed, 0, identity_of(name))]) for name in squares}
    filterings = [
        [apply_filter(text, one, square, keys[name]) for name, square in squares.items()]
        for text, one in built.items()
    ]
    say(filter_table(list(squares), filterings))
    path = draw_filters(out, squares, filterings)
    say(f"\n{path} shows them")
    return path


def default_filters(size: int) -> list[str]:
    """One filter of every kind, its radii scaled to a side in pixels from those meant for 224."""
    inner, outer = max(1, round(8 * size / 224)), max(2, round(32 * size / 224))
    return [
        "lowpass",
        "highpass",
        f"bandpass(low={inner}, high={outer})",
        f"bandstop(low={inner}, high={outer})",
        "rings",
        "com(fractions=[0.01])",
        "rcom(fractions=[0.01])",
        "energy(share=0.9)",
        "renergy(share=0.9)",
        "randombins(fraction=0.5)",
    ]
