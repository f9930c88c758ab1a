"""Masks: files that hold one class number a pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int32, Shaped
from PIL import Image

from freqmask.data.decode import quiet_pillow
from freqmask.data.pictures import EXIF_TAG, Orientation, orientation_of
from freqmask.data.tiff import open_tifffile, turn_of
from freqmask.errors import BadImage

# Lossless ones only: JPEG and its like invent labels along every edge.
MASK_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".npy"})
MOST_LABEL = 65_535


def read_mask(path: Path) -> Int32[np.ndarray, "height width"]:
    """The labels of a mask as its file says them; a palette's numbers, not its colours.

    Args:
        path: a PNG, TIFF, BMP, GIF, PGM or ``.npy`` file.

    Raises:
        BadImage: it cannot be read, holds colours or fractions, or a label is out of 0 to 65,535.
    """
    try:
        found = _read(path)
    except BadImage:
        raise
    except Exception as error:  # decoders raise anything on broken files
        raise BadImage(f"it cannot be read ({' '.join(str(error).split())[:120]})") from error
    labels = _single_plane(found)
    if labels.dtype.kind not in "iub":
        raise BadImage(f"it holds numbers of the type {labels.dtype}; labels are whole numbers")
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) <= MOST_LABEL:
        raise BadImage(
            f"it holds labels from {labels.min()} to {labels.max()}; they go from 0 to {MOST_LABEL}"
        )
    return labels.astype(np.int32)


def _read(path: Path) -> np.ndarray:
    """The numbers in a file, turned as it says that it is shown, because its image is turned so, too."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        array: np.ndarray = np.load(path, allow_pickle=False)
        return array
    if suffix in (".tif", ".tiff"):
        with open_tifffile(path) as tiff:
            return _shown(np.squeeze(tiff.asarray()), turn_of(tiff.series[0].keyframe))
    # Labels are numbers as stored, so that neither palettes nor key colors are looked at
    with quiet_pillow(), Image.open(path, formats=["PNG", "BMP", "GIF", "PPM"]) as image:
        return _shown(np.asarray(image), orientation_of(image.getexif().get(EXIF_TAG)))


def _shown(array: np.ndarray, orientation: Orientation) -> np.ndarray:
    planes = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return array if array.ndim not in (2, 3) else np.moveaxis(orientation.show(planes), 0, -1)


def _single_plane(found: np.ndarray) -> Shaped[np.ndarray, "height width"]:
    """Grey that was saved as colour is grey; real colours are no labels."""
    array = found[..., 0] if found.ndim == 3 and found.shape[-1] == 1 else np.squeeze(found)
    if array.ndim == 3 and array.shape[-1] in (3, 4) and (array[..., :1] == array[..., :3]).all():
        array = array[..., 0]
    if array.ndim != 2:
        shape = "×".join(map(str, found.shape))
        raise BadImage(f"it holds {shape} values, which is more than one class number a pixel (colours?)")
    return array
