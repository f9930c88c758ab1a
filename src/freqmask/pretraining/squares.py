"""The middle squares of image files, for pictures of filters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from freqmask.data.decode import open_file
from freqmask.errors import BadImage, UserError


def read_squares(files: list[str], image_size: int | None) -> dict[str, Tensor]:
    """The middle squares of image files, all of one size.

    Args:
        files: their paths.
        image_size: side in pixels; None is 224, or the shortest side among the images where that is smaller.

    Returns:
        (C, size, size) in [0, 1] by the file's name, numbered where two files have the same.

    Raises:
        UserError: a file that cannot be read.
    """
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
