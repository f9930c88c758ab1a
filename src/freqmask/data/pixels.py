"""An image before and after it is decoded: its size, channels and type; what its samples mean; gaps and emptiness."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Shaped

from freqmask.errors import BadImage, UserError, brief
from freqmask.spectrum import LUMA

Pages = Literal["channels", "images"]  # what the pages of a TIFF are: channels of one image, or images
Box = tuple[int, int, int, int]
"""(top, left, height, width) in full-resolution pixels, after EXIF rotation."""
Pixels = Shaped[np.ndarray, "channel height width"]

KEPT_TYPES = ("uint8", "uint16", "int16", "float32")
# The limit on samples of one image: 30,000×10,000 RGB, or 8,600×8,600 with 12 bands.
MOST_SAMPLES = 900_000_000
MOSTLY_MISSING = 0.9  # an image with less than a tenth of its pixels measured teaches how gaps are filled
_LUMA = np.array(LUMA, dtype=np.float32)


@contextmanager
def as_bad_image(what: str = "", passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever a decoder raises on a broken file is a bad image, with ``what`` as the reason: a run lists it."""
    try:
        yield
    except (BadImage, UserError) + passing:  # noqa: RUF005
        raise
    except Exception as error:  # parsers and codecs raise many kinds on damaged files
        raise BadImage(f"{what} ({brief(error)})" if what else f"{type(error).__name__}: {error}") from error


class Picture(ABC):
    """An image whose header has been read and whose pixels have not."""

    size: tuple[int, int]  # (height, width) in pixels, as shown (after EXIF rotation)
    channels: int  # of what ``decode`` returns
    dtype: str  # sample type that ``decode`` returns: ``uint8``, ``uint16``, ``int16`` or ``float32``
    nodata: float | None = None  # the value that stands for "not measured" in the file (GeoTIFF)

    @abstractmethod
    def decode(self, box: Box | None = None, at_least: tuple[int, int] | None = None) -> Pixels:
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
    """The box itself, or the whole image of (height, width).

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
    become uint8 (0 or 255). BadImage for complex numbers, text or objects.
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
    with np.errstate(over="ignore"):  # GDAL's nodata of float64 becomes infinite, which is missing, too
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
    """An image that is an array already: height and width, and channels first or last where it has any."""

    array: np.ndarray  # the pixels, any numeric type; a memory-mapped one is read box by box
    axis: int | None = None  # which of three axes counts channels, 0 or 2; None: the shorter one

    def __post_init__(self) -> None:
        if self.array.ndim not in (2, 3) or 0 in self.array.shape:
            shape = "×".join(map(str, self.array.shape)) or "a single number"
            raise BadImage(f"an array of {shape} is no image (height×width or height×width×channels)")
        self.dtype = kept_type(self.array.dtype)
        planes = self._planes()
        self.channels, self.size = planes.shape[0], (planes.shape[1], planes.shape[2])

    def _planes(self) -> np.ndarray:
        if self.array.ndim == 2:
            return self.array[None]
        axis = channel_axis(self.array.shape) if self.axis is None else self.axis
        return self.array if axis == 0 else self.array.transpose(2, 0, 1)

    def decode(self, box: Box | None = None, at_least: tuple[int, int] | None = None) -> Pixels:
        top, left, height, width = check_box(box, self.size)
        part = as_kept_type(self._planes()[:, top : top + height, left : left + width])
        if (height, width) == self.size:  # of a window alone nothing follows, and the rest need not be read
            refuse_all_nan(part)
        # A fresh array: a view would keep the file mapped, and torch warns of read-only memory.
        return np.array(part, order="K")


@dataclass(frozen=True)
class Orientation:
    """How the stored pixels are shown: first transposed, then mirrored in the frame that is shown."""

    transposed: bool = False  # True where rows and columns change places
    upside_down: bool = False  # True where rows run from below
    mirrored: bool = False  # True where columns run from the right

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


@dataclass(frozen=True)
class Color:
    """What the samples of a pixel mean in a file; one step makes gray, RGB or bands of them, for every format."""

    model: str  # gray, rgb, cmyk, palette or bands
    samples: int  # of a pixel, alpha and all
    top: float | None = None  # the largest value of a sample, which is white; None for signed numbers
    negative: bool = False  # True where 0 is white (MINISWHITE)
    alpha: str = "none"  # straight (laid over white), premultiplied, or mask (of bands; left out)
    palette: Shaped[np.ndarray, "3 count"] | None = None  # 8-bit colors by number
    stretch: bool = False  # True for samples of fewer than 8 bits, which become 0 to 255 as in a viewer

    def __post_init__(self) -> None:
        if self.top is None and (self.negative or self.model == "cmyk" or self.alpha not in ("none", "mask")):
            raise BadImage("its samples are signed, so that white or full alpha has no number")
        if self.alpha == "premultiplied" and (self.negative or self.model == "cmyk"):
            raise BadImage("it multiplies inks by alpha, which no reader agrees on; store it as RGB")

    @property
    def channels(self) -> int:
        """The channels of `apply`'s result."""
        if self.model == "bands":
            return self.samples - (self.alpha == "mask")
        return 1 if self.model == "gray" else 3

    def dtype(self, stored: np.dtype) -> str:
        """The sample type of `apply`'s result, as it is handed on."""
        return "uint8" if self.stretch or self.palette is not None else kept_type(stored)

    def nodata(self, value: float | None) -> float | None:
        """What becomes of the value that stands for "not measured"."""
        if value is None or self.model in ("cmyk", "palette"):
            return None
        value = (self.top or 0) - value if self.negative else value
        return value * 255 / (self.top or 255) if self.stretch else value

    def apply(self, samples: Shaped[np.ndarray, "sample height width"]) -> Pixels:
        """Samples as stored to gray, RGB or bands; of the same type, except that palettes and few bits give 8."""
        if self.model == "bands":
            return samples[: self.channels]
        colors, alpha = (samples, None) if self.alpha == "none" else (samples[:-1], samples[-1:])
        if self.palette is not None:
            colors = self.palette[:, colors[0].astype(np.intp)]
        elif colors.dtype.kind == "b":
            colors = colors.astype(np.uint8)
        if self.negative and self.top is not None:
            colors = (np.array(self.top, colors.dtype) - colors).astype(colors.dtype)
        if self.stretch:
            colors = np.rint(colors * (255 / (self.top or 1))).astype(np.uint8)
        white = 255.0 if self.stretch or self.palette is not None else float(self.top or 0)
        if self.model == "cmyk":
            inks, light = colors[:3].astype(np.float64), white - colors[3:].astype(np.float64)
            colors = np.rint(light - np.rint(inks * light / white)).astype(samples.dtype)
        if alpha is None or (alpha == self.top).all():
            return colors
        opacity = np.clip(alpha.astype(np.float64) / float(self.top or 1), 0, 1)
        lit = colors.astype(np.float64)
        mixed = (lit if self.alpha == "premultiplied" else lit * opacity) + white * (1 - opacity)
        if colors.dtype.kind == "f":
            return mixed.astype(colors.dtype)
        return np.rint(np.minimum(mixed, white)).astype(colors.dtype)


def check_channels(own: int, wanted: int, convert: bool = True) -> None:
    """Refuse, as a BadImage, an image whose channels cannot become the wanted ones.

    ``convert=False`` makes only gray and color into each other, and refuses four bands of which nobody said
    that the fourth is not to be used.
    """
    if own == wanted or {own, wanted} == {1, 3}:
        return
    if not convert:
        raise BadImage(f"it has {own} channels, the other images have {wanted}")
    if (own, wanted) not in {(1, 3), (3, 1), (4, 3), (4, 1)}:
        raise BadImage(f"it has {own} channels, which cannot be made into {wanted}")


def convert_channels(
    image: Shaped[np.ndarray, "found height width"], wanted: int
) -> Shaped[np.ndarray, "wanted height width"]:
    """Gray to color by repetition, color to gray by luma (ITU-R 601), four channels to three without alpha.

    Any type and range, which stay; a BadImage where there is no such conversion.
    """
    own = image.shape[0]
    check_channels(own, wanted)
    if own == wanted:
        return image
    if own == 1:
        return np.repeat(image, 3, axis=0)
    if wanted == 3:
        return image[:3]
    gray = np.tensordot(_LUMA, image[:3].astype(np.float32), axes=1)[None]
    return gray.astype(image.dtype) if image.dtype.kind == "f" else np.rint(gray).astype(image.dtype)


def missing_pixels(image: Pixels, nodata: float | None) -> Pixels | None:
    """Where nothing was measured: NaN, infinite, or the file's nodata value; None, at no cost, where nothing can be."""
    missing = ~np.isfinite(image) if image.dtype.kind == "f" else None
    if nodata is None or np.isnan(nodata):
        return missing
    with np.errstate(over="ignore"):  # of float64, as in `as_kept_type`
        marked: np.ndarray = image == nodata
    return marked if missing is None else missing | marked


def is_empty(image: Pixels, missing: np.ndarray | None) -> str | None:
    """Why an image holds nothing to learn from: more than nine tenths ``missing``, or one constant value; or None."""
    if missing is not None and missing.any():
        share = float(missing.mean())
        return f"{share:.0%} of its values are missing (NaN or nodata)" if share > MOSTLY_MISSING else None
    first = image[:, :1, :1]
    # A coarse grid settles it for nearly every image at a hundredth of the cost.
    if (image[:, ::8, ::8] == first).all() and (image == first).all():
        return "every pixel has the same value"
    return None


def fill_missing(image: Pixels, missing: np.ndarray | None) -> Pixels:
    """Put the channel's mean where values are ``missing``; a channel without any value gets the image's mean.

    The image itself where nothing is missing, else a filled copy of the same type; a BadImage where all is.
    """
    if missing is None or not missing.any():
        return image
    if missing.all():
        raise BadImage("all its values are missing (NaN or nodata)")
    present = np.where(missing, 0, image).astype(np.float64)
    counts = (~missing).sum(axis=(1, 2))
    overall = present.sum() / counts.sum()
    means = np.where(counts > 0, present.sum(axis=(1, 2)) / np.maximum(counts, 1), overall)
    return np.where(missing, means[:, None, None], image).astype(image.dtype)
