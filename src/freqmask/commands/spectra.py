"""``freqmask spectra``: a picture of what every filter keeps and removes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from freqmask.console import say
from freqmask.errors import BadImage, UserError

if TYPE_CHECKING:
    from torch import Tensor

_MOST_IMAGES = 4  # side by side; more would be too small to see


def spectra(
    image: list[str],
    *,
    out: str = "spectra.png",
    image_size: int | None = None,
    filters: list[str] | None = None,
    seed: int = 0,
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

    from freqmask.draws import identity_of, sample_key
    from freqmask.filters import build_filter
    from freqmask.pretraining.filter_sheet import apply_filter, draw_filters, filter_table

    if isinstance(image, str):
        image = [image]
    if not 1 <= len(image) <= _MOST_IMAGES:
        raise UserError(f"image ({len(image)} files) must be 1 to {_MOST_IMAGES} files; name fewer")
    if image_size is not None and image_size < 8:
        raise UserError(f"image_size ({image_size}) must be at least 8 pixels; try --image_size 224")
    if Path(out).suffix.lower() != ".png":
        raise UserError(f"out ({out}) must be a .png file; try --out {Path(out).with_suffix('.png')}")
    squares = _read_squares(image, image_size)
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
    """One filter of every kind, its radii scaled from those meant for 224 pixels.

    Args:
        size: side of the images in pixels.
    """
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


def _read_squares(files: list[str], image_size: int | None) -> dict[str, Tensor]:
    """The middle squares ``(C, size, size)`` in [0, 1] by the files' names, all of one size."""
    from torch.nn.functional import interpolate

    squares = [_read_square(file) for file in files]
    size = image_size or min(224, *(square.shape[-1] for square in squares))
    names = [Path(file).name for file in files]
    unique = len(set(names)) == len(names)
    return {
        name if unique else f"{number} {name}": interpolate(
            square[None], size=(size, size), mode="bicubic", antialias=True
        )[0].clamp(0, 1)
        for number, (name, square) in enumerate(zip(names, squares, strict=True), start=1)
    }


def _read_square(file: str) -> Tensor:
    import numpy as np
    import torch

    from freqmask.data.decode import open_file

    try:
        picture = open_file(Path(file))
        height, width = picture.size
        side = min(height, width)
        pixels = picture.decode(box=((height - side) // 2, (width - side) // 2, side, side))
    except BadImage as error:
        raise UserError(f"image ({file}) cannot be read: {error.reason}; name another file") from error
    values = pixels.astype(np.float32)
    # 8 bits are shown as they are; other types rarely fill their range and are stretched between percentiles
    low, high = (0.0, 255.0) if pixels.dtype == np.uint8 else np.nanpercentile(values, (0.1, 99.9))
    values = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return torch.from_numpy(np.nan_to_num(values, nan=float(np.nanmean(values))))
