"""A picture as the bytes of a file: reduced where it is large, JPEG for 8-bit photographs, else every bit kept;
and what reducing does to the spectra that a training sees later.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import imagecodecs
import numpy as np
import tifffile
import torch
from jaxtyping import Shaped

from freqmask.data.pixels import Picture, fill_missing, missing_pixels
from freqmask.data.tiff import NODATA_TAG
from freqmask.data.transforms import OVERSAMPLING, resize
from freqmask.errors import BadImage

JPEG_QUALITY = 95
# Color at full resolution: halved, as is usual, its upper octave would be gone. A third more time and bytes.
JPEG_SUBSAMPLING = "444"
VIEW, SCALE = 224, (0.2, 1.0)  # MFM's usual view: its side in pixels, its share of the image's area
RIVAL = 256  # the side that images are often reduced to
MISSING_SHARE = 0.5  # a reduced pixel is missing where this much of what it came from was


@dataclass(frozen=True)
class EncodedImage:
    """An image as it goes into a shard."""

    data: bytes  # the file
    suffix: str  # of its name, with the dot
    size: tuple[int, int]  # (height, width) as shown
    channels: int  # as decoded
    bits: int  # of a sample
    reduction: float = 1.0  # its sides over those of the original, at most 1


def encode_picture(
    picture: Picture, original: tuple[bytes, str] | None, shorter_side: int | None
) -> EncodedImage:
    """Decode an image once, so that it is known to be whole, and put it into the form of a shard; or a BadImage.

    What needs no reduction to ``shorter_side`` pixels and has an ``original`` (its file, its suffix) stays that file,
    byte for byte. A reduced image of 8 bits becomes a JPEG; everything else keeps every bit, as PNG where that can
    be, as TIFF where not.
    """
    wanted = reduced_size(picture.size, shorter_side)
    if wanted == picture.size:
        pixels = picture.decode()
        data, suffix = original or _lossless(pixels, picture.nodata)
    else:
        at_least = (OVERSAMPLING * wanted[0], OVERSAMPLING * wanted[1])
        pixels = reduced(picture.decode(None, at_least), wanted, picture.nodata)
        jpeg = pixels.dtype == np.uint8 and len(pixels) in (1, 3)
        data, suffix = (_jpeg(pixels), ".jpg") if jpeg else _lossless(pixels, picture.nodata)
    reduction = min(wanted) / min(picture.size)
    return EncodedImage(data, suffix, wanted, len(pixels), 8 * pixels.dtype.itemsize, reduction)


def reduced_size(size: tuple[int, int], shorter_side: int | None) -> tuple[int, int]:
    """Height and width of an image whose shorter side is brought down to a limit.

    >>> reduced_size((3000, 4000), 448), reduced_size((300, 500), 448)
    ((448, 597), (300, 500))
    """
    if shorter_side is None or min(size) <= shorter_side:
        return size
    factor = shorter_side / min(size)
    height, width = (max(1, round(side * factor)) for side in size)
    return height, width


def reduced(
    pixels: Shaped[np.ndarray, "channel height width"], size: tuple[int, int], nodata: float | None
) -> Shaped[np.ndarray, "channel new_height new_width"]:
    """An image brought to (height, width) with our antialiased bicubic, in its own type and range.

    Bicubic overshoots; what leaves the range of the image's own values is clamped to it. What is mostly missing
    (NaN or ``nodata``) stays missing, and an image that is all missing is a BadImage.
    """
    if pixels.dtype == np.uint8 and nodata is None:
        return resize(torch.from_numpy(pixels), size).numpy()
    missing = missing_pixels(pixels, nodata)
    if missing is not None and missing.all():
        raise BadImage("all its values are missing (NaN or nodata)")
    values = fill_missing(pixels, missing).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    unit = torch.from_numpy(((values - low) / max(high - low, 1e-300)).astype(np.float32))
    scaled = resize(unit, size).numpy().astype(np.float64) * (high - low) + low
    small = (np.rint(scaled) if pixels.dtype.kind in "iu" else scaled).astype(pixels.dtype)
    if missing is not None and missing.any():
        gone = resize(torch.from_numpy(missing.astype(np.float32)), size).numpy() >= MISSING_SHARE
        small[gone] = np.nan if pixels.dtype.kind == "f" else nodata
    return small


def _jpeg(pixels: np.ndarray) -> bytes:
    layout = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    if len(pixels) == 1:
        return bytes(imagecodecs.jpeg8_encode(layout[..., 0], level=JPEG_QUALITY))
    return bytes(imagecodecs.jpeg8_encode(layout, level=JPEG_QUALITY, subsampling=JPEG_SUBSAMPLING))


def _lossless(pixels: np.ndarray, nodata: float | None) -> tuple[bytes, str]:
    """PNG for whole numbers in one or three channels, else TIFF (deflate); with its nodata value."""
    layout = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    if pixels.dtype in (np.uint8, np.uint16) and len(pixels) in (1, 3) and nodata is None:
        return bytes(imagecodecs.png_encode(layout[..., 0] if len(pixels) == 1 else layout)), ".png"
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        layout[..., 0] if len(pixels) == 1 else layout,
        photometric="minisblack",
        planarconfig="contig" if len(pixels) > 1 else None,
        compression="zlib",
        predictor=True,
        metadata=None,
        software=False,
        extratags=[] if nodata is None else [(NODATA_TAG, "s", 0, f"{nodata:.17g}", True)],
    )
    return file.getvalue(), ".tif"


def empty_octave_share(side: int) -> float:
    """How much of a crop's uppermost octave is empty, on average, because the crop had to be enlarged.

    A window of the share s (uniform in SCALE) of a square image of ``side`` pixels is enlarged by
    z = VIEW / (side sqrt(s)) where that is above 1. Its frequencies then end at 0.5 / z cycles a pixel instead of
    0.5, which takes 2 (1 - 1 / z) of the octave from 0.25 to 0.5.

    >>> round(empty_octave_share(448), 2), round(empty_octave_share(256), 2)
    (0.01, 0.31)
    """
    shares = np.linspace(*SCALE, 10_001)
    enlargement = np.maximum(VIEW / (side * np.sqrt(shares)), 1)
    return float(np.minimum(2 * (1 - 1 / enlargement), 1).mean())


def spectrum_words(reductions: Sequence[float], images: int, side: int | None) -> list[str]:
    """Sentences on what became of the frequencies of so many images, brought down to a shorter ``side``.

    ``reductions`` are sides over those of the original, of the images that were reduced.
    """
    if not len(reductions) or side is None:
        return ["untouched: no image was reduced, and every one keeps all its bits"]
    median = float(np.median(reductions))
    kept, rival = 1 - empty_octave_share(side), 1 - empty_octave_share(RIVAL)
    others = "" if len(reductions) == images else "; the others keep every bit"
    words = [
        f"{len(reductions):,} of {images:,} images ({len(reductions) / images:.0%}) were reduced, the median one to "
        f"{median:.2f} of its sides:",
        f"what lay above {0.5 * median:.2g} cycles a pixel of the original is gone from it{others}",
        f"a {VIEW}-pixel crop of {SCALE[0]:.0%} to {SCALE[1]:.0%} of such an image has {kept:.0%} of its upper octave",
    ]
    if side > RIVAL:
        words[-1] += f" (from {RIVAL} pixels: {rival:.0%})"
    return [*words, "--crop native sees the reduced pixels: for signals in single pixels take --resize none"]
