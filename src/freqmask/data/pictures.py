"""One image before it is decoded: its size, channels and sample type, and a way to decode a part of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped

from freqmask.errors import BadImage

Box = tuple[int, int, int, int]
"""(top, left, height, width) in full-resolution pixels, after EXIF rotation."""

KEPT_TYPES = ("uint8", "uint16", "int16", "float32")
# The limit on samples of one image: 30,000×10,000 RGB, or 8,600×8,600 with 12 bands.
MOST_SAMPLES = 900_000_000


class Picture(ABC):
    """An image whose header has been read and whose pixels have not.

    Attributes:
        size: (height, width) in pixels, as shown (after EXIF rotation).
        channels: number of channels that ``decode`` returns.
        dtype: sample type that ``decode`` returns: ``uint8``, ``uint16``, ``int16`` or ``float32``.
        nodata: the value that stands for "not measured" in the file (GeoTIFF), or None.
    """

    size: tuple[int, int]
    channels: int
    dtype: str
    nodata: float | None = None

    @abstractmethod
    def decode(
        self, box: Box | None = None, at_least: tuple[int, int] | None = None
    ) -> Shaped[np.ndarray, "channel height width"]:
        """The pixels of a part of the image.

        Args:
            box: (top, left, height, width) in full-resolution pixels; None for the whole image.
            at_least: (height, width): the box may come back reduced by a whole factor as long as it keeps
                this many pixels a side. Only JPEG uses it. None: full resolution.

        Returns:
            The pixels, writable. Photographs lie channels-last in memory (a transposed view), which torch
            resamples fastest and which ``array.transpose(1, 2, 0)`` turns back for Pillow at no cost.

        Raises:
            BadImage: the pixels cannot be read; the reason is in plain words.
        """


def check_box(box: Box | None, size: tuple[int, int]) -> Box:
    """The box itself, or the whole image.

    Args:
        box: (top, left, height, width) or None.
        size: (height, width) of the image.

    Raises:
        ValueError: the box is empty or leaves the image (a mistake of the caller, not of the file).
    """
    if box is None:
        return 0, 0, *size
    top, left, height, width = box
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"box {box} must lie inside the image of {size[0]}×{size[1]} pixels")
    return box


def check_size(size: tuple[int, int], channels: int) -> None:
    """Refuse an image without pixels, or with more samples than a file in earnest has."""
    if 0 in (*size, channels):
        raise BadImage("it is zero pixels high or wide")
    if channels * size[0] * size[1] > MOST_SAMPLES:
        raise BadImage(f"it claims more than {MOST_SAMPLES // 10**6} million samples (a decompression bomb?)")


def kept_type(dtype: np.dtype) -> str:
    """The sample type that an image of the given numpy type is handed on in.

    Whole numbers that 16 bits cannot hold, half and double precision become float32; truth values
    become uint8 (0 or 255).

    Raises:
        BadImage: complex numbers, text or objects.
    """
    if dtype.name in KEPT_TYPES:
        return dtype.name
    if dtype.kind == "b":
        return "uint8"
    if dtype == np.int8:
        return "int16"
    if dtype.kind in "iuf":
        return "float32"
    raise BadImage(f"its samples are of the type {dtype}, not numbers of an image")


def as_kept_type(array: np.ndarray) -> np.ndarray:
    """The array in the type named by `kept_type`, in native byte order."""
    wanted = np.dtype(kept_type(array.dtype))
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * 255
    return array.astype(wanted, copy=False)


def refuse_all_nan(array: np.ndarray) -> None:
    """Raises `BadImage` where not one sample is a finite number."""
    if array.dtype.kind == "f" and not np.isfinite(array).any():
        raise BadImage("all its values are NaN or infinite")


def channel_axis(shape: tuple[int, ...]) -> int:
    """Which axis of a three-dimensional image counts channels: the shorter of the first and the last.

    >>> channel_axis((480, 640, 3)), channel_axis((12, 64, 64)), channel_axis((3, 3, 3))
    (2, 0, 2)
    """
    return 0 if shape[0] < shape[2] else 2


@dataclass
class ArrayPicture(Picture):
    """An image that is an array already: height and width, and channels first or last where it has any.

    Args:
        array: the pixels, any numeric type; a memory-mapped one is read box by box.
        axis: which of three axes counts channels, 0 or 2; None: the shorter one.
    """

    array: np.ndarray
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.array.ndim not in (2, 3) or 0 in self.array.shape:
            shape = "×".join(map(str, self.array.shape)) or "a single number"
            raise BadImage(f"an array of {shape} is no image (height×width or height×width×channels)")
        self.dtype = kept_type(self.array.dtype)
        planes = self._planes()
        self.channels, self.size = planes.shape[0], (planes.shape[1], planes.shape[2])

    def _planes(self) -> np.ndarray:
        """The array as a (channel, height, width) view."""
        if self.array.ndim == 2:
            return self.array[None]
        axis = channel_axis(self.array.shape) if self.axis is None else self.axis
        return self.array if axis == 0 else self.array.transpose(2, 0, 1)

    def decode(
        self, box: Box | None = None, at_least: tuple[int, int] | None = None
    ) -> Shaped[np.ndarray, "channel height width"]:
        top, left, height, width = check_box(box, self.size)
        part = as_kept_type(self._planes()[:, top : top + height, left : left + width])
        if (height, width) == self.size:  # of a window alone nothing follows, and the rest need not be read
            refuse_all_nan(part)
        # A fresh array: a view would keep the file mapped, and torch warns of read-only memory.
        return np.array(part, order="K")


@dataclass(frozen=True)
class Orientation:
    """How the stored pixels are shown: first transposed, then mirrored in the frame that is shown.

    Attributes:
        transposed: True where rows and columns change places.
        upside_down: True where rows run from below.
        mirrored: True where columns run from the right.
    """

    transposed: bool = False
    upside_down: bool = False
    mirrored: bool = False

    def shown_size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """(height, width) as shown, of (height, width) as stored; the other way round too."""
        return (stored[1], stored[0]) if self.transposed else stored

    def stored_box(self, box: Box, shown_size: tuple[int, int]) -> Box:
        """The box among the stored pixels that is shown as ``box`` in an image of ``shown_size``."""
        top, left, height, width = box
        if self.upside_down:
            top = shown_size[0] - top - height
        if self.mirrored:
            left = shown_size[1] - left - width
        return (left, top, width, height) if self.transposed else (top, left, height, width)

    def show(self, pixels: np.ndarray) -> np.ndarray:
        """Stored pixels (channel, height, width) as they are shown."""
        if self.transposed:
            pixels = pixels.transpose(0, 2, 1)
        if self.upside_down:
            pixels = pixels[:, ::-1]
        if self.mirrored:
            pixels = pixels[:, :, ::-1]
        if not (self.upside_down or self.mirrored):
            return pixels
        # torch refuses negative strides and resamples fastest what lies channels-last
        return np.ascontiguousarray(pixels.transpose(1, 2, 0)).transpose(2, 0, 1)


UPRIGHT = Orientation()
ORIENTATIONS = {
    1: UPRIGHT,
    2: Orientation(mirrored=True),
    3: Orientation(upside_down=True, mirrored=True),
    4: Orientation(upside_down=True),
    5: Orientation(transposed=True),
    6: Orientation(transposed=True, mirrored=True),
    7: Orientation(transposed=True, upside_down=True, mirrored=True),
    8: Orientation(transposed=True, upside_down=True),
}
"""By the number in EXIF tag 274; anything else counts as upright."""
EXIF_TAG = 274


def orientation_of(number: object) -> Orientation:
    """The orientation that an EXIF value names; upright for a missing or invalid one."""
    return ORIENTATIONS.get(number, UPRIGHT) if isinstance(number, int) else UPRIGHT
