"""Photographs and drawings: everything that Pillow reads, and JPEG faster than Pillow alone."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import struct
import warnings
from collections.abc import Iterator

import imagecodecs
import numpy as np
from jaxtyping import Shaped
from PIL import Image, UnidentifiedImageError

from freqmask.data.orientation import EXIF_TAG, UPRIGHT, Orientation, orientation_of
from freqmask.data.pictures import Box, Picture, as_kept_type, check_box, kept_type, refuse_all_nan
from freqmask.errors import BadImage

GREY_MODES = ("1", "L", "LA", "La")
TRANSPARENT_MODES = ("LA", "La", "RGBA", "RGBa", "PA")
SAMPLE_TYPES = {"I": "float32", "F": "float32"}
# Never all that Pillow knows: of an EPS, whatever its file is called, Pillow has Ghostscript run the program in it.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "PPM", "JPEG2000")
# Not in every Pillow from 11 on.
AVIF = ("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()
END_OF_JPEG = b"\xff\xd9"
# MCUs are 8, 16 or (rarely) 32 rows high, and smooth chroma upsampling looks one row further down.
JPEG_ROW_MULTIPLE = 32


def open_pillow(data: bytes) -> Picture:
    """An image of any format that Pillow knows.

    Transparent pixels are laid over white, as a viewer shows them: what lies beneath them is often garbage.
    Palette, CMYK, YCbCr and Lab images become RGB; 16-bit PNGs keep their 16 bits. Of an animation the first
    frame is taken.

    Args:
        data: the file's bytes.

    Raises:
        BadImage: not an image, cut off in its header, or of absurd size.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10":
        return DeepPng(data)
    return PillowPicture(data)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of Pillow's: of odd metadata, which costs nothing, and of more than 89 million pixels.

    A panorama may have those; from twice as many on Pillow refuses.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(data: bytes) -> Image.Image:
    """Pillow's image, its header read."""
    try:
        with _quiet():
            heif = ["HEIF"] if "HEIF" in Image.OPEN else []  # once pillow_heif has been registered
            tiff = ["TIFF"] if data.startswith((b"II", b"MM")) else []
            return Image.open(io.BytesIO(data), formats=[*FORMATS, *AVIF, *heif, *tiff])
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise BadImage(f"it claims more than {limit:.0f} million pixels (a decompression bomb?)") from error
    except UnidentifiedImageError as error:
        raise BadImage("its content is not an image of any known format") from error
    except Exception as error:
        # A damaged header leads Pillow's parsers to raise SyntaxError, struct.error, ValueError ...
        raise BadImage(f"its header is damaged ({_in_words(error)})") from error


def _in_words(error: Exception) -> str:
    """A one-line reason of bounded length."""
    return " ".join(str(error).split())[:120] or type(error).__name__


class PillowPicture(Picture):
    """An image in a format of Pillow's.

    Args:
        data: the file's bytes.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        image = _open(data)
        self._stored_size = (image.height, image.width)
        self._jpeg = image.format in ("JPEG", "MPO")
        # Pillow turns TIFFs itself
        self._orientation = UPRIGHT if image.format == "TIFF" else _exif_orientation(image)
        self.size = self._orientation.shown_size(self._stored_size)
        self.channels = 1 if image.mode in (*GREY_MODES, *SAMPLE_TYPES) or image.mode.startswith("I;") else 3
        self.dtype = "uint16" if image.mode.startswith("I;") else SAMPLE_TYPES.get(image.mode, "uint8")
        self._plain_jpeg = self._jpeg and image.mode in ("L", "RGB") and data.endswith(END_OF_JPEG)
        if 0 in self.size:
            raise BadImage("it is zero pixels high or wide")

    def decode(
        self, box: Box | None = None, at_least: tuple[int, int] | None = None
    ) -> Shaped[np.ndarray, "channel height width"]:
        shown = check_box(box, self.size)
        stored = self._orientation.stored_box(shown, self.size)
        wanted = self._orientation.shown_size(at_least) if at_least else None
        try:
            with _quiet():
                pixels = self._decode_stored(stored, wanted)
        except BadImage:
            raise
        except Exception as error:
            cut = isinstance(error, OSError) and "truncated" in str(error).lower()
            reason = "it is truncated: the file ends before the image does" if cut else "it is damaged"
            raise BadImage(reason if cut else f"{reason} ({_in_words(error)})") from error
        return self._orientation.show(pixels.transpose(2, 0, 1))

    def _decode_stored(self, box: Box, at_least: tuple[int, int] | None) -> np.ndarray:
        """The box of the stored pixels, (height, width, channel)."""
        factor = jpeg_reduction(box, at_least) if self._jpeg else 1
        data = self._data
        if self._plain_jpeg:
            data = shorten_jpeg(data, box[0] + box[2], self._stored_size[0])
            if factor == 1:
                # Pillow's bits in 0.7 of its time; what it stumbles over is left to Pillow to explain.
                with contextlib.suppress(imagecodecs.Jpeg8Error):
                    return _part(imagecodecs.jpeg8_decode(data), box)
                data = self._data
        image = _open(data)
        if factor > 1:
            image.draft(image.mode, (self._stored_size[1] // factor, self._stored_size[0] // factor))
            box = box[0] // factor, box[1] // factor, max(1, box[2] // factor), max(1, box[3] // factor)
        image.load()
        top, left, height, width = box
        pixels = as_kept_type(np.array(_flattened(image.crop((left, top, left + width, top + height)))))
        refuse_all_nan(pixels)
        return pixels.reshape(height, width, -1)


def _part(pixels: np.ndarray, box: Box) -> np.ndarray:
    """The box of pixels (height, width[, channel]), copied so that the rest can be freed."""
    top, left, height, width = box
    part = pixels[top : top + height, left : left + width]
    return np.ascontiguousarray(part).reshape(height, width, -1)


def _exif_orientation(image: Image.Image) -> Orientation:
    """How the image is to be turned; a damaged EXIF block counts as upright."""
    try:
        with _quiet():
            return orientation_of(image.getexif().get(EXIF_TAG))
    except Exception:  # the parser of EXIF raises many kinds, and the pixels are good without it
        return UPRIGHT


def _flattened(image: Image.Image) -> Image.Image:
    """The image in a mode that is plain numbers: L, RGB, I;16, I or F; transparent parts over white."""
    if image.mode in TRANSPARENT_MODES or (image.mode == "P" and "transparency" in image.info):
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert(
            "L" if image.mode in GREY_MODES else "RGB"
        )
    if image.mode == "1":
        return image.convert("L")
    return (
        image if image.mode in ("L", "RGB", "I", "F") or image.mode.startswith("I;") else image.convert("RGB")
    )


def jpeg_reduction(box: Box, at_least: tuple[int, int] | None) -> int:
    """By how much (1, 2, 4 or 8) a JPEG may be decoded smaller so that the box keeps ``at_least`` pixels.

    >>> jpeg_reduction((0, 0, 1000, 2000), (448, 448)), jpeg_reduction((0, 0, 447, 447), (448, 448))
    (2, 1)
    """
    if at_least is None:
        return 1
    return next((f for f in (8, 4, 2) if box[2] // f >= at_least[0] and box[3] // f >= at_least[1]), 1)


def shorten_jpeg(data: bytes, rows: int, height: int) -> bytes:
    """A baseline JPEG whose header claims fewer rows, so that decoders stop early.

    Every row above the cut comes out as before: the cut lies one MCU row below what is wanted. A native
    224-pixel window of a 12-megapixel photograph costs half as much on average. Progressive files hold every
    row in every scan and are left alone.

    Args:
        data: a complete JPEG file.
        rows: rows that are needed, from the top.
        height: rows of the image.
    """
    kept = (rows // JPEG_ROW_MULTIPLE + 2) * JPEG_ROW_MULTIPLE
    if kept > 0.9 * height:
        return data
    position = _baseline_frame_header(data)
    return data if position is None else data[: position + 5] + struct.pack(">H", kept) + data[position + 7 :]


def _baseline_frame_header(data: bytes) -> int | None:
    """Where the frame header (marker SOF0 or SOF1) begins, or None."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in (0xC0, 0xC1):
            return position
        if marker in (0xC2, 0xDA, 0xFF):  # progressive; picture data already; padding, which is rare
            return None
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return None


class DeepPng(Picture):
    """A PNG of 16 bits a sample, of which Pillow would keep 8 in colour.

    Args:
        data: the file's bytes.
    """

    def __init__(self, data: bytes) -> None:
        image = _open(data)  # for its checks and EXIF
        self._data = data
        self._transparent = data[25] in (4, 6)
        self._orientation = _exif_orientation(image)
        self.size = self._orientation.shown_size((image.height, image.width))
        self.channels = 1 if data[25] in (0, 4) else 3
        self.dtype = kept_type(np.dtype(np.uint16))

    def decode(
        self, box: Box | None = None, at_least: tuple[int, int] | None = None
    ) -> Shaped[np.ndarray, "channel height width"]:
        stored = self._orientation.stored_box(check_box(box, self.size), self.size)
        try:
            pixels = imagecodecs.png_decode(self._data)
        except Exception as error:
            raise BadImage(f"it is truncated or damaged ({_in_words(error)})") from error
        pixels = _part(pixels, stored)
        if self._transparent:
            colour, alpha = pixels[..., :-1].astype(np.float32), pixels[..., -1:].astype(np.float32) / 65535
            pixels = np.rint(colour * alpha + 65535 * (1 - alpha)).astype(np.uint16)
        return self._orientation.show(pixels.transpose(2, 0, 1))
