"""TIFF through tifffile: any number of bands and pages, any bit depth, and of a window only the tiles it touches."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from jaxtyping import Shaped

from freqmask.data.pixels import (
    EXIF_TAG,
    UPRIGHT,
    Box,
    Color,
    Orientation,
    Pages,
    Picture,
    Pixels,
    as_bad_image,
    as_kept_type,
    check_box,
    check_size,
    orientation_of,
    refuse_all_nan,
)
from freqmask.errors import BadImage

# What tifffile finds odd it logs; what stops it, it raises, and that becomes a reason in words.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)
TIFF_BEGINNINGS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
DAMAGED = "it is truncated, damaged or no TIFF"
NODATA_TAG = 42113  # GDAL's
INKS_TAG = 332  # 1: the four inks are CMYK
# The color spaces of scanners and print that Pillow alone converts, from single pages of 8 bits.
PILLOW_COLORS = ("YCBCR", "CIELAB", "ICCLAB")
OLD_JPEG, JPEG = 6, 7
JPEG_KINDS = (OLD_JPEG, JPEG, 34892, 33007)  # lossy in DNG, and Alternative JPEG


def open_tifffile(source: Path | bytes) -> tifffile.TiffFile:
    """The file alone: tifffile would follow the headers of OME and Micro-Manager into the files of a whole series."""
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    return tifffile.TiffFile(file, _multifile=False, is_mmstack=False, is_ndtiff=False)


def count_tiff_images(source: Path | bytes) -> int:
    """How many images a TIFF holds when its pages are images; 1 for a file that cannot be read."""
    with suppress(BadImage), as_bad_image(), open_tifffile(source) as tiff:
        return max(1, sum(_Layout(series).images for series in _image_series(tiff)))
    return 1  # it is listed as unreadable when its turn comes


def open_tiff(source: Path | bytes, pages: Pages = "channels", page: int = 0) -> Picture | None:
    """One image of a TIFF, by its path or bytes; None for one in a color space of `PILLOW_COLORS`.

    ``channels`` stacks all pages into one image; ``images`` takes the one numbered ``page``. BadImage where that
    cannot be read.
    """
    with as_bad_image(DAMAGED, passing=(FileNotFoundError, PermissionError)), open_tifffile(source) as tiff:
        series, several = tiff.series[0], _image_series(tiff)
        if pages == "images":
            for series in several:
                images = _Layout(series).images
                if page < images:
                    break
                page -= images
        elif any((s.dtype, s.shape[-2:]) == (series.dtype, series.shape[-2:]) for s in several[1:]):
            raise BadImage(
                "its pages are not stored alike (compression?); --pages images reads them one by one"
            )
        first = series.keyframe
        name = tifffile.PHOTOMETRIC(first.photometric).name
        if (name in PILLOW_COLORS and first.compression != JPEG) or first.compression == OLD_JPEG:
            if len(tiff.pages) == 1 and first.bitspersample == 8:
                return None
            raise BadImage(f"its colors are {name}, which is read from single pages of 8 bits only")
        return TiffPicture(tiff, series, page if pages == "images" else None)


def _image_series(tiff: tifffile.TiffFile) -> list[tifffile.TiffPageSeries]:
    """What counts with ``images``: pages of one size are a series, and scans of letters have pages of several sizes.

    Previews and masks are left out, and so is all but the first series of microscopes and slide scanners.
    """
    first, *others = tiff.series
    plain = first.kind in ("generic", "shaped")
    return [first, *(series for series in others if plain and not series.keyframe.subfiletype & 5)]


class _Layout:
    """Which axes of a series are rows, columns, samples of a pixel, channels and images."""

    def __init__(self, series: tifffile.TiffPageSeries) -> None:
        self.axes, self.shape = series.axes, series.shape
        if "Y" not in self.axes or "X" not in self.axes:
            raise BadImage(f"its axes are {self.axes or 'none'}, not those of an image")
        lengths = dict(zip(self.axes, self.shape, strict=True))
        self.size = (lengths["Y"], lengths["X"])
        self.samples = series.keyframe.samplesperpixel
        # Everything but rows, columns, samples of a pixel and named channels tells images apart.
        self.image_axes = [k for k, axis in enumerate(self.axes) if axis not in "YXSC"]
        self.images = math.prod(self.shape[k] for k in self.image_axes)
        self.by_page = self._leading_axes(series)

    def _leading_axes(self, series: tifffile.TiffPageSeries) -> int | None:
        """How many of the axes number pages; None where a page holds several images, or an image lies across."""
        pages, leading, stacked = len(series.pages), 0, 1
        while stacked < pages and leading < len(self.axes):
            stacked *= self.shape[leading]
            leading += 1
        own = self.axes[leading:]
        whole = stacked == pages and not any(axis in "YXS" for axis in self.axes[:leading])
        alone = math.prod(self.shape[leading:]) == self.samples * self.size[0] * self.size[1]
        plain = series.keyframe.imagedepth == 1 and all(page is not None for page in series.pages)
        if whole and alone and plain and not any(k >= leading for k in self.image_axes) and len(own) <= 3:
            return leading
        return None

    def page_numbers(self, image: int | None) -> list[int]:
        """The pages of an image, or of all of them in the order of the file."""
        leading = self.by_page or 0
        numbers = np.arange(math.prod(self.shape[:leading])).reshape(self.shape[:leading])
        if image is None:
            return numbers.ravel().tolist()
        channels = [k for k in range(leading) if k not in self.image_axes]
        return numbers.transpose(*self.image_axes, *channels).reshape(self.images, -1)[image].tolist()

    def stacked(self, array: np.ndarray, image: int | None) -> np.ndarray:
        """Of the whole series an image, or all in the order of the file, as (page, sample, height, width)."""
        y, x = self.axes.index("Y"), self.axes.index("X")
        own = [k for k in range(len(self.axes)) if self.axes[k] == "S"]
        rest = [k for k in range(len(self.axes)) if k not in (y, x, *own)]
        if image is not None:
            rest = [*self.image_axes, *(k for k in rest if k not in self.image_axes)]
        samples = math.prod(self.shape[k] for k in own)
        pages = array.transpose(*rest, *own, y, x).reshape(-1, samples, *self.size)
        return pages if image is None else pages.reshape(self.images, -1, samples, *self.size)[image]


class TiffPicture(Picture):
    """An image of a TIFF, one of a series or all of it as channels; its file is open while it is read only."""

    def __init__(self, tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries, image: int | None) -> None:
        self._tiff, self._series, self._image = tiff, series, image
        self._layout = layout = _Layout(series)
        self._pages: list[Any] = [series.keyframe]
        if layout.by_page is not None:
            self._pages = [series.pages[number] for number in layout.page_numbers(image)]
        self._colors = [_color(page, self._pages[0]) for page in self._pages]
        first = self._pages[0]
        turns = {turn_of(page) for page in self._pages}
        if len(turns) > 1:
            raise BadImage("its pages are turned differently; --pages images reads them one by one")
        self._orientation = turns.pop()
        self.size = self._orientation.shown_size(layout.size)
        self.dtype = self._colors[0].dtype(np.dtype(first.dtype))
        self.channels = sum(color.channels for color in self._colors)
        if layout.by_page is None:  # counted from the series: its pages are not those of the image
            pages = math.prod(layout.shape) // math.prod(layout.size) // self._colors[0].samples
            self.channels = pages * self.channels // (1 if image is None else layout.images)
        self.nodata = self._colors[0].nodata(_nodata(first))
        check_size(self.size, self.channels)

    def decode(self, box: Box | None = None, at_least: tuple[int, int] | None = None) -> Pixels:
        stored = self._orientation.stored_box(check_box(box, self.size), self.size)
        handle = self._tiff.filehandle
        with as_bad_image(DAMAGED, passing=(FileNotFoundError, PermissionError)), closing(handle):
            handle.open()
            colored = [color.apply(window) for color, window in zip(*self._windows(stored), strict=True)]
        planes = np.concatenate(colored) if len(colored) > 1 else colored[0]
        if stored[2:] == self._layout.size:  # of a window alone nothing follows
            refuse_all_nan(planes)
        return self._orientation.show(np.array(as_kept_type(planes), order="K"))

    def _windows(self, box: Box) -> tuple[list[Color], list[np.ndarray]]:
        """The box of every page, (sample, height, width), and what its samples mean."""
        if self._layout.by_page is not None:
            return self._colors, [_read_window(page, box) for page in self._pages]
        top, left, height, width = box
        # mapped where it lies in a file in one piece, so that a window reads only its rows
        mapped = self._series.keyframe.is_memmappable and self._series.dataoffset is not None
        series = self._series.asarray(out="memmap" if mapped else None)
        stacked = self._layout.stacked(series, self._image)
        part = stacked[..., top : top + height, left : left + width]
        return self._colors * len(part), list(part)


def turn_of(page: Any) -> Orientation:
    """How a page is shown; a frame as its key frame."""
    tag = getattr(page, "tags", page.keyframe.tags).get(EXIF_TAG)
    return UPRIGHT if tag is None else orientation_of(tag.value)


def _nodata(page: Any) -> float | None:
    """The value that GDAL marks as not measured, or None."""
    with suppress(ValueError):  # which "None" is, too
        return float(str(page.keyframe.tags.valueof(NODATA_TAG)).strip("\x00 "))
    return None


def _color(page: Any, first: Any) -> Color:
    """What the samples of a page mean, by its own palette or that of the first page; BadImage where unclear."""
    key, name = page.keyframe, tifffile.PHOTOMETRIC(page.keyframe.photometric).name
    kind = np.dtype(key.dtype).kind
    top = float(2**key.bitspersample - 1) if kind in "ub" else (1.0 if kind == "f" else None)
    extras = [int(extra) for extra in key.extrasamples]
    colors = key.samplesperpixel - len(extras)
    clear = [extra for extra in extras if extra in (1, 2)]
    alpha = {(): "none", (1,): "premultiplied", (2,): "straight"}.get(tuple(clear), "mask")
    stretch = key.bitspersample < 8 and kind in "ub" and name != "PALETTE"
    models = {"MINISBLACK": "gray", "MINISWHITE": "gray", "MASK": "gray", "RGB": "rgb", "LINEAR_RAW": "rgb"}
    models |= {"PALETTE": "palette", "SEPARATED": "cmyk", "YCBCR": "rgb", "DEPTH_MAP": "gray"}
    model = models.get(name)
    wanted = {"gray": 1, "rgb": 3, "palette": 1, "cmyk": 4}.get(model or "")
    if model is None or (model == "cmyk" and int(key.tags.valueof(INKS_TAG, 1)) != 1):
        raise BadImage(f"its colors are {name}, which is not read; store it as RGB or gray")
    if name == "MINISWHITE" and kind not in "ub":
        raise BadImage(
            f"0 is its white, which has no meaning for samples of {key.dtype}; store it as MINISBLACK"
        )
    if colors != wanted and model != "gray":
        raise BadImage(f"it has {colors} samples for the colors {name}, which has {wanted}")
    # bands beside the colors, and all of them stay
    if colors != wanted or len(extras) > len(clear) or len(clear) > 1:
        if model in ("cmyk", "palette") or name == "MINISWHITE":
            raise BadImage(f"it has bands beside the colors {name}, which is not read")
        last = bool(extras) and extras[-1] in (1, 2) and len(clear) == 1
        return Color("bands", key.samplesperpixel, alpha="mask" if last else "none")
    palette = None
    if model == "palette":  # 16 bits in 8, as Pillow and libtiff take it; some programs wrote 8 bits at once
        table = getattr(page, "colormap", None)
        table = getattr(first, "colormap", None) if table is None else table
        if table is None or kind not in "ub":
            raise BadImage("its colors are a palette, which is missing")
        palette = (table if table.max() < 256 else table // 256).astype(np.uint8)  # (3, count)
    return Color(model, key.samplesperpixel, top, name == "MINISWHITE", alpha, palette, stretch)


def _read_window(page: Any, box: Box) -> Shaped[np.ndarray, "sample height width"]:
    """A box of a page, of which only the tiles or strips that it touches are read and decoded.

    Of an image of 8192×8192×3 in tiles of 256 a window of 224 takes 4 milliseconds instead of a second.
    """
    key = page.keyframe
    planes, _, length, width, contiguous = key.shaped
    top, left, height, across = box
    if key.is_memmappable and page.dataoffsets[0] > 0:
        stored = np.dtype(key.dtype).newbyteorder(page.parent.byteorder)
        whole = page.parent.filehandle.memmap_array(stored, key.shaped, page.dataoffsets[0])
    elif (height, across) == (length, width) or len(page.dataoffsets) != math.prod(page.chunked):
        whole = page.asarray(squeeze=False)
    else:
        window = np.full((planes, height, across, contiguous), key.nodata, key.dtype)
        for (plane, y, x), segment in _segments(page, box):  # what a segment and the window have in common
            first, after = max(y, top), min(y + segment.shape[0], top + height)
            start, stop = max(x, left), min(x + segment.shape[1], left + across)
            part = segment[first - y : after - y, start - x : stop - x]
            window[plane, first - top : after - top, start - left : stop - left] = part
        return window.transpose(0, 3, 1, 2).reshape(-1, height, across)
    part = whole[:, 0, top : top + height, left : left + across]
    return part.transpose(0, 3, 1, 2).reshape(-1, height, across)


def _segments(page: Any, box: Box) -> Iterator[tuple[tuple[int, int, int], np.ndarray]]:
    """The decoded tiles or strips that a box touches: (plane, top, left), and (height, width, sample)."""
    key = page.keyframe
    planes, _, length, width, _ = key.shaped
    tall, wide = (key.tilelength, key.tilewidth) if key.is_tiled else (min(key.rowsperstrip, length), width)
    columns, rows = math.ceil(width / wide), math.ceil(length / tall)
    top, left, height, across = box
    touched = product(
        range(planes),
        range(top // tall, (top + height - 1) // tall + 1),
        range(left // wide, (left + across - 1) // wide + 1),
    )
    indices = [(plane * rows + row) * columns + column for plane, row, column in touched]
    offsets, counts = ([values[k] for k in indices] for values in (page.dataoffsets, page.databytecounts))
    jpeg = key.compression in JPEG_KINDS
    tables = {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader} if jpeg else {}
    for data, index in page.parent.filehandle.read_segments(offsets, counts, indices=indices):
        segment, (plane, _, y, x, _), _ = key.decode(data, index, **tables)
        if segment is not None:
            yield (plane, y, x), segment[0]
