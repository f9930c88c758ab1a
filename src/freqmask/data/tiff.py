"""Scientific TIFF: any number of bands and pages, any bit depth, through tifffile."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile
from jaxtyping import Shaped

from freqmask.data.orientation import EXIF_TAG, orientation_of
from freqmask.data.pictures import Box, Picture, as_kept_type, check_box, kept_type, refuse_all_nan
from freqmask.data.pillow import PillowPicture
from freqmask.data.sources import Pages
from freqmask.errors import BadImage

# What tifffile finds odd it logs; what stops it, it raises, and that becomes a reason in words.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)
# The limit on samples of one image: 30,000×10,000 RGB, or 8,600×8,600 with 12 bands.
MOST_SAMPLES = 900_000_000
NODATA_TAG = 42113  # GDAL's
PILLOW_COLOURS = ("PALETTE", "SEPARATED", "CIELAB", "ICCLAB", "YCBCR", "MINISWHITE")
"""The colour spaces of scanners and print, which Pillow turns into grey or RGB."""


@contextmanager
def _opened(source: Path | bytes) -> Iterator[tifffile.TiffFile]:
    """The file, closed afterwards; whatever the parser stumbles over becomes `BadImage`."""
    try:
        with tifffile.TiffFile(io.BytesIO(source) if isinstance(source, bytes) else source) as tiff:
            yield tiff
    except (BadImage, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # tifffile and its codecs raise many kinds on damaged files
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise BadImage(f"it is truncated, damaged or no TIFF ({reason})") from error


def count_tiff_images(source: Path | bytes) -> int:
    """How many images a TIFF holds when its pages are images; 1 for a file that cannot be read.

    Args:
        source: path or bytes of the file.
    """
    try:
        with _opened(source) as tiff:
            return max(1, _Layout(tiff).images)
    except (BadImage, OSError):
        return 1  # it is listed as unreadable when its turn comes


def open_tiff(source: Path | bytes, pages: Pages = "channels", page: int = 0) -> Picture:
    """One image of a TIFF.

    Args:
        source: path or bytes of the file.
        pages: ``channels`` stacks all pages into one image; ``images`` takes one of them.
        page: which one, from 0, with ``images``.

    Raises:
        BadImage: it cannot be read.
    """
    with _opened(source) as tiff:
        first = tiff.series[0].keyframe
        photometric = tifffile.PHOTOMETRIC(first.photometric).name
        single = len(tiff.series[0].pages) == 1 and photometric in PILLOW_COLOURS
        if not (single and first.bitspersample in (1, 2, 4, 8)):
            return TiffPicture(source, tiff, pages, page)
    return PillowPicture(source if isinstance(source, bytes) else source.read_bytes())


class _Layout:
    """Which axes of a file's first series are rows, columns, channels and images."""

    def __init__(self, tiff: tifffile.TiffFile) -> None:
        series = tiff.series[0]
        self.axes, self.shape = series.axes, series.shape
        if "Y" not in self.axes or "X" not in self.axes:
            raise BadImage(f"its axes are {self.axes or 'none'}, not those of an image")
        lengths = dict(zip(self.axes, self.shape, strict=True))
        self.size = (lengths["Y"], lengths["X"])
        # Everything but rows, columns, samples of a pixel and named channels tells images apart.
        self.image_axes = [k for k, axis in enumerate(self.axes) if axis not in "YXSC"]
        self.images = math.prod(self.shape[k] for k in self.image_axes)
        self.all_channels = math.prod(self.shape) // max(1, self.size[0] * self.size[1])

    def planes(self, array: np.ndarray) -> np.ndarray:
        """The whole series as (plane, height, width), planes in the order of the file."""
        y, x = self.axes.index("Y"), self.axes.index("X")
        rest = [k for k in range(len(self.axes)) if k not in (y, x)]
        return array.transpose(*rest, y, x).reshape(-1, *self.size)

    def image(self, array: np.ndarray, number: int) -> np.ndarray:
        """One image of the series as (channel, height, width)."""
        y, x = self.axes.index("Y"), self.axes.index("X")
        channels = [k for k in range(len(self.axes)) if k not in (*self.image_axes, y, x)]
        stacked = array.transpose(*self.image_axes, *channels, y, x)
        return stacked.reshape(self.images, -1, *self.size)[number]


class TiffPicture(Picture):
    """An image of a TIFF, its file opened anew to decode it.

    Args:
        source: path or bytes of the file.
        tiff: the same, open.
        pages: what its pages are.
        page: which one, with ``images``.
    """

    def __init__(self, source: Path | bytes, tiff: tifffile.TiffFile, pages: Pages, page: int) -> None:
        self._source, self._pages, self._page = source, pages, page
        layout, first = _Layout(tiff), tiff.series[0].keyframe
        self.dtype = kept_type(np.dtype(tiff.series[0].dtype))
        self._stored_size = layout.size
        tag = first.tags.get(EXIF_TAG)
        self._orientation = orientation_of(None if tag is None else int(tag.value))
        self.size = self._orientation.shown_size(layout.size)
        self.channels = layout.all_channels // (layout.images if pages == "images" else 1)
        # Alpha as a TIFF declares it; a fourth band of unnamed meaning (infrared) stays a band.
        self._transparent = self.channels == 4 and any(int(kind) in (1, 2) for kind in first.extrasamples)
        self.channels -= self._transparent
        self.nodata = _nodata(first)
        if 0 in (*self.size, self.channels):
            raise BadImage("it is zero pixels high or wide")
        if self.channels * self.size[0] * self.size[1] > MOST_SAMPLES:
            raise BadImage(
                f"it claims more than {MOST_SAMPLES // 10**6} million samples (a decompression bomb?)"
            )

    def decode(
        self, box: Box | None = None, at_least: tuple[int, int] | None = None
    ) -> Shaped[np.ndarray, "channel height width"]:
        top, left, height, width = self._orientation.stored_box(check_box(box, self.size), self.size)
        with _opened(self._source) as tiff:
            planes = self._planes(tiff)
        refuse_all_nan(planes)
        part = planes[:, top : top + height, left : left + width]
        if self._transparent:
            part = _over_white(part)
        return self._orientation.show(np.array(as_kept_type(part), order="K"))

    def _planes(self, tiff: tifffile.TiffFile) -> np.ndarray:
        """The image as stored, (channel, height, width)."""
        layout, series = _Layout(tiff), tiff.series[0]
        if self._pages == "channels":
            return layout.planes(series.asarray())
        if len(series.pages) == layout.images:  # one page, one image: the others need not be decoded
            array = tiff.asarray(key=self._page, series=0)
            return array[None] if array.ndim == 2 else np.moveaxis(array, series.keyframe.axes.index("S"), 0)
        return layout.image(series.asarray(), self._page)


def _nodata(page: tifffile.TiffPage) -> float | None:
    """The value that GDAL marks as not measured, or None."""
    tag = page.tags.get(NODATA_TAG)
    try:
        return None if tag is None else float(str(tag.value).strip("\x00 "))
    except ValueError:
        return None


def _over_white(planes: np.ndarray) -> np.ndarray:
    """Colour planes of RGB and alpha, laid over white; the type's full range is its white."""
    white = float(np.iinfo(planes.dtype).max) if planes.dtype.kind in "iu" else 1.0
    colour, alpha = planes[:3].astype(np.float32), planes[3:].astype(np.float32) / white
    return (colour * alpha + white * (1 - alpha)).round().astype(planes.dtype)
