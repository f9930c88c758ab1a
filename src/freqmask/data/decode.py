"""From a file, or the bytes of one, to a picture; all formats but TIFF, whose reader is :mod:`freqmask.data.tiff`."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import io
import re
import struct
import threading
import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
from PIL import Image, UnidentifiedImageError

from freqmask.data.pixels import (
    EXIF_TAG,
    UPRIGHT,
    ArrayPicture,
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
from freqmask.data.tiff import TIFF_BEGINNINGS, count_tiff_images, open_tiff
from freqmask.errors import BadImage, brief

PILLOW_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".avif",
)  # fmt: skip
TIFF_SUFFIXES = (".tif", ".tiff")
ARRAY_SUFFIXES = (".npy",)
HEIF_SUFFIXES = (".heic", ".heif")
ARRAY_BEGINNING = b"\x93NUMPY"
PNG_BEGINNING = b"\x89PNG\r\n\x1a\n"
HEIF_MARK = b"ftyp"  # AVIF bears it, too, which Pillow reads by itself
CODESTREAM = b"\xff\x4f\xff\x51"  # JPEG 2000 begins with it, or holds it in a box of JP2
END_OF_JPEG = b"\xff\xd9"
EXTRAS = dict.fromkeys(HEIF_SUFFIXES, "freqmask[data]")
"""Suffix -> what to install to have it read."""

# Never all that Pillow knows: of an EPS, whatever its file is called, Pillow has Ghostscript run the program in it.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "PPM", "JPEG2000")
# Not in every Pillow from 11 on.
AVIF = ("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()
GRAY_MODES = ("1", "L", "LA", "La", "F")
# MCUs are 8, 16 or (rarely) 32 rows high, and smooth chroma upsampling looks one row further down.
JPEG_ROW_MULTIPLE = 32
# What libjpeg reads through imagecodecs and Pillow's own copy does not: lossless and arithmetic coding.
RARE_CODERS = (0xC3, 0xC9, 0xCA)


@functools.cache
def read_suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of files that can be read with what is installed."""
    heif = HEIF_SUFFIXES if importlib.util.find_spec("pillow_heif") else ()
    return frozenset((*PILLOW_SUFFIXES, *TIFF_SUFFIXES, *ARRAY_SUFFIXES, *heif))


def open_file(path: Path, pages: Pages = "channels", page: int = 0) -> Picture:
    """The image in a file; with ``pages="images"`` the one on that page of a TIFF. BadImage where there is none."""
    suffix = path.suffix.lower()
    try:
        if suffix in ARRAY_SUFFIXES:  # mapped, so that a crop reads only its rows
            _refuse_empty(path.stat().st_size)
            return ArrayPicture(_load_array(path))
        if suffix in TIFF_SUFFIXES:
            _refuse_empty(path.stat().st_size)
            return open_tiff(path, pages, page) or PillowPicture(path.read_bytes())
    except OSError as error:
        raise BadImage(_format_error(error, path)) from error
    return open_bytes(read_file(path), pages, page)


def open_bytes(data: bytes, pages: Pages = "channels", page: int = 0) -> Picture:
    """The image in the bytes of a file, its format told from its beginning; else as `open_file`.

    Transparent pixels are laid over white, as a viewer shows them: what lies beneath them is often garbage.
    Palettes, CMYK, YCbCr and Lab become RGB; 16 bits stay 16. Of an animation the first frame is taken.

    Raises:
        BadImage: no image, cut off in its header, of absurd size, or of a kind that nothing here reads rightly.
    """
    _refuse_empty(len(data))
    if data.startswith(TIFF_BEGINNINGS):
        return open_tiff(data, pages, page) or PillowPicture(data)
    if data.startswith(ARRAY_BEGINNING):
        return ArrayPicture(_load_array(io.BytesIO(data)))
    if data.startswith(PNG_BEGINNING):
        return PngPicture(data)
    if re.match(rb"P[2356][\s#]", data) and (deep := read_netpbm(data)) is not None:
        return ArrayPicture(deep, axis=2)
    if data.startswith(CODESTREAM) or data[4:8] == b"jP  ":
        components, bits = _jpeg2000_components(data)
        if components > 3 or bits > 8:
            return Jpeg2000Picture(data)
    if data[4:8] == HEIF_MARK and read_suffixes().issuperset(HEIF_SUFFIXES):
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]

        pillow_heif.register_heif_opener()
    return PillowPicture(data)


def read_file(path: Path) -> bytes:
    """The bytes of a file; BadImage with the reason in plain words where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(_format_error(error, path)) from error


def suffix_of(data: bytes, name: str) -> str:
    """The suffix of a file (its bytes) by its name, perhaps nothing, or else by how the bytes begin."""
    suffix = Path(name).suffix.lower()
    if suffix in read_suffixes():
        return suffix
    known = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", ARRAY_BEGINNING: ".npy", b"GIF8": ".gif", b"BM": ".bmp"}
    known |= dict.fromkeys(TIFF_BEGINNINGS, ".tif") | {b"P%d" % kind: ".pnm" for kind in range(1, 7)}
    known |= {CODESTREAM: ".jp2", b"\0\0\0\x0cjP  ": ".jp2"}
    if data[4:8] == HEIF_MARK:
        return ".avif" if data[8:12] in (b"avif", b"avis") else ".heic"
    return next((suffix for mark, suffix in known.items() if data.startswith(mark)), ".webp")


def count_images(path: Path, pages: Pages) -> int:
    """How many images a file counts for: more than one only for a TIFF whose pages are images."""
    return count_tiff_images(path) if pages == "images" and path.suffix.lower() in TIFF_SUFFIXES else 1


class _Quiet:
    """No warnings of Pillow's: of odd metadata, which costs nothing, and of more than 89 million pixels.

    A panorama may have those; from twice as many on Pillow refuses. Filters are the process's: of threads that decode
    at once, the first to enter sets and the last to leave restores them. Each for itself, they left all warnings off.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._before.__exit__(None, None, None)


quiet_pillow = _Quiet()


def _open(data: bytes) -> Image.Image:
    try:
        with quiet_pillow:
            heif = ["HEIF"] if "HEIF" in Image.OPEN else []  # once pillow_heif has been registered
            tiff = ["TIFF"] if data.startswith(TIFF_BEGINNINGS) else []
            return Image.open(io.BytesIO(data), formats=[*FORMATS, *AVIF, *heif, *tiff])
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise BadImage(f"it claims more than {limit:.0f} million pixels (a decompression bomb?)") from error
    except UnidentifiedImageError as error:
        frame = frame_header(data)
        if frame is not None and data[frame + 4] != 8:
            raise BadImage(
                f"it is a JPEG of {data[frame + 4]} bits a sample, which is not read; store it as PNG or TIFF"
            ) from error
        raise BadImage(_unread_format(data)) from error
    except Exception as error:
        # A damaged header leads Pillow's parsers to raise SyntaxError, struct.error, ValueError ...
        raise BadImage(f"its header is damaged ({brief(error)})") from error


def _unread_format(data: bytes) -> str:
    """What a file is that nothing here reads, with the way out where there is one."""
    if data.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")):
        return "it is JPEG XL, which is not read; convert it to PNG or TIFF"
    if data[4:12] in (b"ftypavif", b"ftypavis") and not AVIF:
        return "it is AVIF, which this Pillow lacks; pip install --upgrade pillow"
    heic = data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1")
    if heic and not read_suffixes().issuperset(HEIF_SUFFIXES):
        return "it is HEIC, which needs a reader; pip install 'freqmask[data]'"
    return "its content is not an image of any known format"


def _exif_orientation(image: Image.Image) -> Orientation:
    """How the image is to be turned; a damaged EXIF block counts as upright."""
    try:
        with quiet_pillow:
            return orientation_of(image.getexif().get(EXIF_TAG))
    except Exception:  # the parser of EXIF raises many kinds, and the pixels are good without it
        return UPRIGHT


class CodedPicture(Picture):
    """An image that is decoded from the stored frame of a file's bytes, then turned as its EXIF says."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._orientation = UPRIGHT

    def decode(self, box: Box | None = None, at_least: tuple[int, int] | None = None) -> Pixels:
        stored = self._orientation.stored_box(check_box(box, self.size), self.size)
        wanted = self._orientation.shown_size(at_least) if at_least else None
        with as_bad_image("it is truncated or damaged"), quiet_pillow:
            try:
                pixels = self._decode_stored(stored, wanted)
            except OSError as error:
                if "truncated" not in str(error).lower():
                    raise
                raise BadImage("it is truncated: the file ends before the image does") from error
        return self._orientation.show(pixels.transpose(2, 0, 1))

    @abstractmethod
    def _decode_stored(self, box: Box, at_least: tuple[int, int] | None) -> np.ndarray:
        """The box of the stored pixels, (height, width, channel)."""


class PillowPicture(CodedPicture):
    """An image in a format of Pillow's, 8 bits a sample; JPEG faster than Pillow alone, and PFM's floats."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        image = _open(data)
        self._stored_size = (image.height, image.width)
        self._mode = image.mode
        # Pillow turns TIFFs itself
        self._orientation = UPRIGHT if image.format == "TIFF" else _exif_orientation(image)
        self.size = self._orientation.shown_size(self._stored_size)
        self.channels = 1 if image.mode in GRAY_MODES else 3
        self.dtype = "float32" if image.mode == "F" else "uint8"
        self._jpeg = image.format in ("JPEG", "MPO")
        self._plain_jpeg = self._jpeg and image.mode in ("L", "RGB") and data.endswith(END_OF_JPEG)
        if image.mode.startswith("I"):
            raise BadImage(f"its samples are of a kind ({image.mode}) that is only read from PNG and TIFF")
        check_size(self.size, self.channels)

    def _decode_stored(self, box: Box, at_least: tuple[int, int] | None) -> np.ndarray:
        if not self._jpeg:
            return self._by_pillow(box, 1)
        factor = jpeg_reduction(box, at_least)
        if self._plain_jpeg and factor == 1:
            data = shorten_jpeg(self._data, box[0] + box[2], self._stored_size[0])
            # Pillow's bits in 0.7 of its time; what it stumbles over is left to Pillow to explain.
            with contextlib.suppress(imagecodecs.Jpeg8Error):
                return _part(imagecodecs.jpeg8_decode(data), box)
        frame = frame_header(self._data)
        if frame is not None and self._data[frame + 1] in RARE_CODERS:
            return self._by_imagecodecs(box, factor)
        return self._by_pillow(box, factor)

    def _by_pillow(self, box: Box, factor: int) -> np.ndarray:
        image = _open(self._data)
        if factor > 1:
            image.draft(image.mode, (self._stored_size[1] // factor, self._stored_size[0] // factor))
            box = box[0] // factor, box[1] // factor, max(1, box[2] // factor), max(1, box[3] // factor)
        image.load()
        top, left, height, width = box
        part = image.crop((left, top, left + width, top + height))
        clear = image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info
        wanted = "F" if image.mode == "F" else ("L" if self.channels == 1 else "RGB") + "A" * clear
        part = part if part.mode == wanted else part.convert(wanted)
        pixels = as_kept_type(np.array(part)).reshape(height, width, -1)
        if clear:
            pixels = _flattened(pixels)
        if (height, width) == self._stored_size:
            refuse_all_nan(pixels)
        return pixels

    def _by_imagecodecs(self, box: Box, factor: int) -> np.ndarray:
        """A JPEG whose coder Pillow lacks: whole, then averaged where it may be smaller."""
        if END_OF_JPEG not in self._data:  # libjpeg would fill what is missing with gray
            raise BadImage("it is truncated: the file ends before the image does")
        if self._mode not in ("L", "RGB"):
            raise BadImage("it is a CMYK JPEG with arithmetic or lossless coding, which is not read")
        part = _part(imagecodecs.jpeg8_decode(self._data), box)
        height, width = (max(1, side // factor) for side in part.shape[:2])
        if factor == 1 or min(part.shape[:2]) < factor:
            return part
        blocks = part[: height * factor, : width * factor].reshape(height, factor, width, factor, -1)
        return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


def _flattened(pixels: np.ndarray) -> np.ndarray:
    """Gray or RGB with alpha (height, width, 2 or 4) over white."""
    model, samples = "rgb" if pixels.shape[2] == 4 else "gray", pixels.shape[2]
    color = Color(model, samples, np.iinfo(pixels.dtype).max, alpha="straight")
    return np.ascontiguousarray(color.apply(pixels.transpose(2, 0, 1)).transpose(1, 2, 0))


def _part(pixels: np.ndarray, box: Box) -> np.ndarray:
    """The box of pixels (height, width[, channel]), copied so that the rest can be freed."""
    top, left, height, width = box
    part = pixels[top : top + height, left : left + width]
    return np.ascontiguousarray(part).reshape(height, width, -1)


def jpeg_reduction(box: Box, at_least: tuple[int, int] | None) -> int:
    """By how much (1, 2, 4 or 8) a JPEG may be decoded smaller so that the box keeps ``at_least`` pixels.

    >>> jpeg_reduction((0, 0, 1000, 2000), (448, 448)), jpeg_reduction((0, 0, 447, 447), (448, 448))
    (2, 1)
    """
    if at_least is None:
        return 1
    return next((f for f in (8, 4, 2) if box[2] // f >= at_least[0] and box[3] // f >= at_least[1]), 1)


def shorten_jpeg(data: bytes, rows: int, height: int) -> bytes:
    """A baseline JPEG of ``height`` rows whose header claims fewer, so that decoders stop soon after ``rows``.

    Every row above the cut comes out as before: the cut lies one MCU row below what is wanted. A native
    224-pixel window of a 12-megapixel photograph costs half as much on average. Progressive files hold every
    row in every scan and are left alone.
    """
    kept = (rows // JPEG_ROW_MULTIPLE + 2) * JPEG_ROW_MULTIPLE
    position = frame_header(data)
    if kept > 0.9 * height or position is None or data[position + 1] not in (0xC0, 0xC1):
        return data
    return data[: position + 5] + struct.pack(">H", kept) + data[position + 7 :]


def frame_header(data: bytes) -> int | None:
    """Where the frame header of a JPEG (one of the markers SOF0 to SOF15) begins, or None."""
    position = 2
    while data[:2] == b"\xff\xd8" and position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return position
        if marker in (0xDA, 0xFF):  # picture data already; padding, which is rare
            return None
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return None


class PngPicture(CodedPicture):
    """A PNG of any depth: palettes, key colors and few bits are expanded by libpng, in half of Pillow's time."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        image = _open(data)  # for its checks
        # EXIF may stand behind the pixels, and to look there Pillow decodes them all
        marks = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
        if any(mark in data for mark in marks):
            self._orientation = _exif_orientation(image)
        self.size = self._orientation.shown_size((image.height, image.width))
        self.channels = 1 if data[25] in (0, 4) else 3
        self.dtype = "uint16" if data[24] == 16 else "uint8"
        check_size(self.size, self.channels)

    def _decode_stored(self, box: Box, at_least: tuple[int, int] | None) -> np.ndarray:
        pixels = _part(imagecodecs.png_decode(self._data), box)
        return _flattened(pixels) if pixels.shape[2] in (2, 4) else pixels


def read_netpbm(data: bytes, above: int = 255) -> np.ndarray | None:
    """A PGM or PPM whose header claims more as its largest value than ``above``, its values as stored; else None.

    Pillow stretches them to 255 or 65535, as is right for images of 8 bits and wrong for labels.
    """
    header = re.match(rb"P([2356])" + rb"(?:\s|#[^\n]*\n)+(\d+)" * 3, data)
    if header is None or int(header[4]) <= above:
        return None
    width, height, top = (int(header[k]) for k in (2, 3, 4))
    channels = 1 if header[1] in b"25" else 3
    check_size((height, width), channels)
    if top > 65535:
        raise BadImage(f"it claims {top} as its largest value; a PGM or PPM has 65535 at most")
    count = height * width * channels
    body = data[header.end() :]
    samples: np.ndarray
    if header[1] in b"23":
        words = re.sub(rb"#[^\n]*", b"", body).split(maxsplit=count)[:count]
        samples = np.array([int(word) for word in words if word.isdigit()], np.int64)
    else:
        word = np.dtype(">u2" if top > 255 else "u1")
        whole = len(body) > word.itemsize * count
        samples = np.frombuffer(body, word, count, offset=1) if whole else np.empty(0)
    if len(samples) < count:
        raise BadImage("it is truncated: the file ends before the image does")
    if samples.max() > top:
        raise BadImage(f"it holds values above {top}, which its header calls the largest")
    return samples.astype(np.uint16).reshape(height, width, channels)


def _jpeg2000_components(data: bytes) -> tuple[int, int]:
    """How many components a JPEG 2000 has, and of how many bits the deepest of them is; 0 where it is cut off."""
    start = data.find(CODESTREAM)
    if start < 0 or len(data) < start + 43:
        return 0, 0
    (count,) = struct.unpack_from(">H", data, start + 40)
    depths = data[start + 42 : start + 42 + 3 * count : 3]
    return count, max(((depth & 0x7F) + 1 for depth in depths), default=0)


class Jpeg2000Picture(CodedPicture):
    """A JPEG 2000 of more than 8 bits, which Pillow cuts or stretches, or of more than three components."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        start = data.find(CODESTREAM)
        width, height, left, top = struct.unpack_from(">4I", data, start + 8)
        count, bits = _jpeg2000_components(data)
        layout = [data[start + 42 + 3 * k : start + 45 + 3 * k] for k in range(count)]
        boxes = data[:start]
        self.size = (height - top, width - left)
        self.dtype = "uint8" if bits <= 8 else "uint16"
        definition = boxes.find(b"cdef")
        clear = definition >= 0 and _declares_alpha(boxes[definition + 4 :])
        space = boxes.find(b"colr\x01")
        kind = struct.unpack_from(">I", boxes, space + 7)[0] if 0 <= space <= len(boxes) - 11 else None
        if bits > 16 or len(set(layout)) > 1 or layout[0][0] & 0x80 or layout[0][1:] != b"\x01\x01":
            raise BadImage(
                "its components are signed, of more than 16 bits or unlike each other, which is not read"
            )
        if kind in (12, 18) or b"pclr" in boxes:
            raise BadImage(
                "it is a JPEG 2000 in CMYK, YCC or of a palette with more than 8 bits, which is not read"
            )
        colors = count - clear
        model = {1: "gray", 3: "rgb"}.get(colors, "bands")
        alpha = "none" if not clear else ("straight" if model != "bands" else "mask")
        self._color = Color(model, count, 2**bits - 1, alpha=alpha, stretch=bits < 8)
        self.channels = self._color.channels
        check_size(self.size, self.channels)

    def _decode_stored(self, box: Box, at_least: tuple[int, int] | None) -> np.ndarray:
        pixels = _part(imagecodecs.jpeg2k_decode(self._data), box)
        return np.ascontiguousarray(self._color.apply(pixels.transpose(2, 0, 1)).transpose(1, 2, 0))


def _declares_alpha(box: bytes) -> bool:
    """Whether the channel definitions of a JP2 (after the box's name) call the last component opacity."""
    (count,) = struct.unpack_from(">H", box)
    kinds = [struct.unpack_from(">3H", box, 2 + 6 * k) for k in range(min(count, (len(box) - 2) // 6))]
    return any(kind in (1, 2) for _, kind, _ in kinds)


def _load_array(source: Path | io.BytesIO) -> np.ndarray:
    """The array in a file; objects, which would run code, are refused."""
    mapped: Literal["r"] | None = "r" if isinstance(source, Path) else None
    with as_bad_image("it is truncated or no plain numpy array", passing=(OSError,)):
        array: np.ndarray = np.load(source, mmap_mode=mapped, allow_pickle=False)
    return array


def _refuse_empty(size: int) -> None:
    if size == 0:
        raise BadImage("the file is empty")


def _format_error(error: OSError, path: Path) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is a link to a file that is gone" if path.is_symlink() else "the file is gone"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, IsADirectoryError):
        return "it is a folder, not a file"
    if error.errno == errno.ELOOP:
        return "it is a link that leads to itself"
    return f"the file system cannot read it ({error.strerror or error})"
