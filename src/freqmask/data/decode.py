"""From a file, or the bytes of one, to a picture; and what an error of the file system means in words."""

from __future__ import annotations

import errno
import importlib.util
import io
from pathlib import Path

import numpy as np

from freqmask.data.pictures import ArrayPicture, Picture
from freqmask.data.pillow import open_pillow
from freqmask.data.sources import Pages
from freqmask.data.tiff import count_tiff_images, open_tiff
from freqmask.errors import BadImage

PILLOW_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".avif",
)  # fmt: skip
TIFF_SUFFIXES = (".tif", ".tiff")
ARRAY_SUFFIXES = (".npy",)
HEIF_SUFFIXES = (".heic", ".heif")
ARRAY_BEGINNING = b"\x93NUMPY"
HEIF_MARK = b"ftyp"  # AVIF bears it, too, which Pillow reads by itself
TIFF_BEGINNINGS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
EXTRAS = {".heic": "freqmask[data]", ".heif": "freqmask[data]"}
"""Suffix -> what to install to have it read."""


def read_suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of files that can be read with what is installed."""
    heif = HEIF_SUFFIXES if importlib.util.find_spec("pillow_heif") else ()
    return frozenset((*PILLOW_SUFFIXES, *TIFF_SUFFIXES, *ARRAY_SUFFIXES, *heif))


def open_file(path: Path, pages: Pages = "channels", page: int = 0) -> Picture:
    """The image in a file.

    Args:
        path: the file.
        pages: what the pages of a TIFF are.
        page: which one, with ``images``.

    Raises:
        BadImage: it cannot be opened or is no image.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in ARRAY_SUFFIXES:
            return _open_array(path)
        if suffix in TIFF_SUFFIXES:
            _refuse_empty(path.stat().st_size)
            return open_tiff(path, pages, page)
        return open_bytes(path.read_bytes(), pages, page)
    except OSError as error:
        raise BadImage(_in_words(error, path)) from error


def open_bytes(data: bytes, pages: Pages = "channels", page: int = 0) -> Picture:
    """The image in the bytes of a file, its format told from its beginning.

    Args:
        data: the whole file.
        pages: what the pages of a TIFF are.
        page: which one, with ``images``.

    Raises:
        BadImage: no image.
    """
    _refuse_empty(len(data))
    if data.startswith(TIFF_BEGINNINGS):
        return open_tiff(data, pages, page)
    if data.startswith(ARRAY_BEGINNING):
        return ArrayPicture(_load_array(io.BytesIO(data)))
    if data[4:8] == HEIF_MARK and importlib.util.find_spec("pillow_heif"):
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]

        pillow_heif.register_heif_opener()
    return open_pillow(data)


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        BadImage: it cannot be read; the reason is in plain words.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(_in_words(error, path)) from error


def suffix_of(data: bytes, name: str) -> str:
    """The suffix of a file, by its name or else by how its bytes begin.

    Args:
        data: the whole file.
        name: what it is called, perhaps nothing.
    """
    suffix = Path(name).suffix.lower()
    if suffix in read_suffixes():
        return suffix
    known = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", ARRAY_BEGINNING: ".npy", b"GIF8": ".gif", b"BM": ".bmp"}
    known |= dict.fromkeys(TIFF_BEGINNINGS, ".tif")
    return next((suffix for mark, suffix in known.items() if data.startswith(mark)), ".webp")


def count_images(path: Path, pages: Pages) -> int:
    """How many images a file counts for: more than one only for a TIFF whose pages are images."""
    return count_tiff_images(path) if pages == "images" and path.suffix.lower() in TIFF_SUFFIXES else 1


def _open_array(path: Path) -> Picture:
    """An image from a ``.npy`` file, mapped so that a crop reads only its rows."""
    _refuse_empty(path.stat().st_size)
    return ArrayPicture(_load_array(path))


def _load_array(source: Path | io.BytesIO) -> np.ndarray:
    """The array in a file; objects, which would run code, are refused."""
    try:
        array: np.ndarray = np.load(
            source, mmap_mode="r" if isinstance(source, Path) else None, allow_pickle=False
        )
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python, and hands on whatever that raises
        raise BadImage(
            f"it is truncated or no plain numpy array ({' '.join(str(error).split())[:120]})"
        ) from error
    return array


def _refuse_empty(size: int) -> None:
    if size == 0:
        raise BadImage("the file is empty")


def _in_words(error: OSError, path: Path) -> str:
    """What an error of the file system means."""
    if isinstance(error, FileNotFoundError):
        return "it is a link to a file that is gone" if path.is_symlink() else "the file is gone"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, IsADirectoryError):
        return "it is a folder, not a file"
    if error.errno == errno.ELOOP:
        return "it is a link that leads to itself"
    return f"the file system cannot read it ({error.strerror or error})"
