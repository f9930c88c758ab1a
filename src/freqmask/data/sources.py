"""How the text that a user types for DATA becomes a source; numpy files, and images that need no download."""

from __future__ import annotations

import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, get_args
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from freqmask.data.cache import hash_of
from freqmask.data.decode import read_suffixes
from freqmask.data.image_folder import is_image_file, locate_files, locate_folder
from freqmask.data.index import index_folder, index_listing
from freqmask.data.pixels import ArrayPicture, Pages, Picture
from freqmask.data.source import JoinedSource, Source, SourceSummary, Subset
from freqmask.data.splits import Located, are_classes, locate_labelled, number_classes, split_of
from freqmask.data.storage import (
    INDEX_NAME,
    MANIFEST,
    Files,
    LocalFiles,
    RemoteFiles,
    files_of,
    is_pattern,
    nearest_path,
    part_query,
    unpacker_of,
)
from freqmask.errors import BadImage, UserError, brief, name_of, nearest
from freqmask.imports import IMPORT_PATH, import_object
from freqmask.training.files import marked_in

__all__ = ["JoinedSource", "Pages", "Source", "SourceSummary", "Subset", "open_source", "splits_there"]

SAVED = ("dataset_dict.json", "state.json")  # what datasets.save_to_disk leaves, of several splits and of one
REMOTE = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
TABLE = ".parquet"
HUB = "hf://"
ON_HUB = (f"{HUB}datasets/", f"{HUB}buckets/")

IMAGE_KEYS = ("images", "image", "x", "data", "arr_0")
LABEL_KEYS = ("labels", "label", "y", "targets", "arr_1")
# The color photographs inside scikit-image's wheel, which would fetch its others; of the motorcycle pair one eye.
PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
    "retina.jpg", "rocket.jpg",
)  # fmt: skip


@contextmanager
def _permission_told() -> Iterator[None]:
    """A file, or a folder on the way to it, that may not be read is a sentence."""
    try:
        yield
    except PermissionError as error:
        words = "may not be read: no permission; check its access rights"
        raise UserError(f"DATA ({name_of(error)}) {words}") from error


@_permission_told()
def open_source(
    data: str | Path | Source | Sequence[str | Path | Source],
    pages: Pages = "channels",
    split: str = "auto",
    labels: str | Path | None = None,
) -> Source:
    """The images that DATA names.

    Args:
        data: a folder of images or of shards, a ``.tar`` or a pattern of them (``shards-{000..009}.tar``),
            ``.parquet`` tables alike, each here or behind a URL (``s3://``, ``gs://``, ``https://``,
            ``hf://datasets/NAME``); a ``.npy`` or ``.npz`` file; image files; ``hf:NAME`` of a Hugging Face
            dataset or a saved copy of one; ``builtin:photos``, ``builtin:digits``; an import path
            ``package.module:name`` of a `Source` (or of something that returns one when called); a `Source`; or
            several of these.
        pages: what the pages of a TIFF are: the channels of one image, or images of their own.
        split: ``auto`` takes ``train`` where there is one beside ``val`` or ``test``; ``all`` takes
            everything; or the name of a split.
        labels: a CSV table with the columns path and label, and optionally split and group.

    Raises:
        UserError: nothing readable there; the message names the way out.
    """
    if pages not in get_args(Pages):
        raise UserError(f"pages ({pages}) must be channels or images; {nearest(pages, get_args(Pages))}")
    if labels is not None:
        return locate_labelled(labels, lambda: open_source(data, pages, "all")).source(split)
    several: list[Any] = [data]
    if isinstance(data, Iterable) and not isinstance(data, (str, Source)):
        several = list(data)
    if not several:
        raise UserError("DATA must name at least one folder or file of images; try builtin:photos")
    if all(isinstance(part, (str, Path)) and is_image_file(part) for part in several):
        return locate_files([Path(str(part)).expanduser() for part in several], pages).source(split)
    opened = [part if isinstance(part, Source) else locate(part, pages).source(split) for part in several]
    return opened[0] if len(opened) == 1 else JoinedSource(opened)


@_permission_told()
def splits_there(data: str | Path | Source, labels: str | Path | None = None) -> list[str]:
    """The names of the splits that ``open_source(data, split=...)`` takes, sorted; maybe none.

    Several DATA or a `Source` have no splits; a table of labels with a column split decides.
    """
    if labels is not None:
        located = locate_labelled(labels, lambda: open_source(data))
    elif isinstance(data, Source):
        return []
    else:
        located = locate(data, "channels")
    return sorted(located.splits or ()) if located.certain else []


def locate(data: str | Path, pages: Pages) -> Located:
    """What a text names, before any image is read; a UserError where it names nothing, or is no text or path."""
    if not isinstance(data, (str, Path)):
        raise UserError(
            f"DATA must be paths, words such as builtin:photos, or a Source, not {type(data).__name__}; numpy.save "
            "writes an array into a file that can be named"
        )
    # the second as 0.1.0 recorded it
    text = str(data).removeprefix("file://").replace("freqmask.data.builtin:", f"{__name__}:")
    far = bool(REMOTE.match(text))
    if text.startswith("builtin:"):
        return Located(text, lambda split, notes: open_builtin(text))
    if text.startswith("hf:") and not far:
        from freqmask.data.parquet import locate_dataset

        return locate_dataset(text)
    path = Path(text).expanduser()
    if path.is_dir():
        return _locate_folder(path, pages)
    program = unpacker_of([f".{part_query(text)[0].lower().rpartition('.')[2]}"])
    if program is not None:
        raise UserError(
            f"DATA ({text}) is compressed, and no single image can be read out of it; unpack it with {program} "
            "(a .tar is read as it is), then freqmask prepare makes large images fast to read"
        )
    if text.lower().endswith((".tar", ".parquet")) and (path.exists() or (is_pattern(text) and not far)):
        return _named_files(text, pages)
    if path.suffix.lower() in (".npy", ".npz") and path.exists():
        return locate_array(path)
    if is_image_file(path):
        return locate_files([path], pages)
    if path.exists():
        raise UserError(f"DATA ({path}) must be a folder, an image, a .tar, .npy, .npz or .parquet file")
    if far:
        return _locate_remote(text, pages)
    if IMPORT_PATH.fullmatch(text):
        return Located(text, lambda split, notes: import_source(text))
    raise UserError(f"DATA ({text}) does not exist; {nearest_path(path)}")


def _locate_folder(path: Path, pages: Pages) -> Located:
    files = LocalFiles(path)
    if files.index_file is not None:
        return _shards(files, None, str(path), pages)
    index = index_folder(path, read_suffixes())
    if not len(index) and files.names():
        return _shards(files, None, str(path), pages)
    if any((path / name).is_file() for name in SAVED):
        from freqmask.data.parquet import locate_dataset

        return locate_dataset(path)
    if not len(index) and TABLE in index.ignored:
        below = map(os.fsdecode, index_folder(path, frozenset({TABLE})).paths())
        tables = [name for name in below if PurePath(name).name not in marked_in((path / name).parent)]
        near = [name for name in tables if name.count("/") == name.startswith("data/")]
        if tables:  # and not only features that we wrote
            return _tables(files, near or tables, str(path))
    return locate_folder(path, index, pages)


def _locate_remote(text: str, pages: Pages) -> Located:
    """What a URL names: shards, tables, or a folder of images."""
    if pages == "images":
        raise UserError(f"pages (images) is for files on this machine; copy {text} here first")
    if text.startswith(HUB) and not text.startswith(ON_HUB):
        raise UserError(
            f"DATA ({text}) is no data set; Hugging Face's are {HUB}datasets/NAME, read where they are, and hf:NAME, "
            "fetched first"
        )
    address, query = part_query(text)
    if address.endswith((".tar", ".parquet")):
        return _named_files(text, pages)
    if query:
        rule = "a .tar or .parquet, or several by braces, where it has a query, because it lists nothing"
        raise UserError(f"DATA ({text}) must be {rule}; copy it here first")
    of_prepare = PurePosixPath(urlsplit(text).path).name in (INDEX_NAME, MANIFEST)
    files = RemoteFiles(text.rpartition("/")[0] if of_prepare else text)
    if of_prepare or files.index_file is not None or files.names():
        return _shards(files, None, text, pages)
    listing = files.listing()
    if not listing:
        raise UserError(
            f"DATA ({text}) is empty, not there, no folder, or cannot be listed; name shards by a pattern such as "
            f"{text.rstrip('/')}/shards-{{000000..000009}}.tar, or serve the {INDEX_NAME} of freqmask prepare"
        )
    suffixes = {PurePosixPath(path).suffix.lower() for path in listing}
    if TABLE in suffixes and not suffixes & read_suffixes():
        return _tables(files, [name for name in listing if name.lower().endswith(TABLE)], text)
    return locate_folder(files, index_listing(files.root, listing, read_suffixes()))


def _named_files(text: str, pages: Pages) -> Located:
    """One or several tars or tables, here or behind a URL."""
    files, names = files_of(text)
    if part_query(text)[0].lower().endswith(".tar"):
        return _shards(files, names, text, pages)
    return _tables(files, names or [], text, named=True)


def _tables(files: Files, names: list[str], text: str, named: bool = False) -> Located:
    from freqmask.data.parquet import locate_tables  # pyarrow comes with it, which most data does not need

    return locate_tables(files, names, text, named)


def _shards(files: Files, names: list[str] | None, text: str, pages: Pages) -> Located:
    if pages == "images":
        raise UserError(
            f"pages (images) is for files, DATA ({text}) is shards; freqmask prepare --pages images makes "
            "an image of each page"
        )
    from freqmask.data.shards import locate_shards  # and with these

    return locate_shards(files, names, text)


def import_source(text: str) -> Source:
    """The source that an import path names: an object, or a class or function that returns one; else a UserError."""
    module_name, _, name = text.partition(":")
    try:
        found = import_object(text, "data")
    except ImportError as error:
        raise UserError(
            f"DATA ({text}) is neither a folder nor importable ({error}); check its spelling or PYTHONPATH"
        ) from error
    except AttributeError as error:
        known = [one for one in dir(sys.modules.get(module_name)) if not one.startswith("_")]
        raise UserError(f"DATA ({text}): {module_name} has no {name}; {nearest(name, known)}") from error
    source = found() if not isinstance(found, Source) and callable(found) else found
    if not isinstance(source, Source):
        raise UserError(f"DATA ({text}) must be a freqmask.data.sources.Source, or return one when called")
    return source


def locate_array(path: Path) -> Located:
    """The images of a ``.npy`` or ``.npz`` file.

    A ``.npy`` is (image, height, width[, channel]) or (image, channel, height, width). A ``.npz`` has such an array
    as ``images`` (or x, data) and labels as ``labels`` (or y), each also with the name of a split before or after it
    (``train_images``, ``x_test``). A UserError where it is damaged, needs code to be run, or holds no images.
    """
    if path.suffix.lower() == ".npy":
        return Located(str(path), lambda split, notes: ArraySource(path, [(None, None)]))
    axes = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    old = np.lib.format.read_magic(file) == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                    axes[member.removesuffix(".npy")] = len(read(file)[0])
    except PermissionError:
        raise
    except Exception as error:  # of zipfile, of the file system, of numpy's header
        raise UserError(f"DATA ({path}) is damaged or no numpy archive ({error}); write it again") from error
    pairs = _find_pairs(axes, path)

    def open_split(split: str | None, notes: list[str]) -> Source:
        return ArraySource(path, list(pairs.values()) if split is None else [pairs[split]], split, notes)

    return Located(str(path), open_split, [name for name in pairs if name])


def _find_pairs(axes: dict[str, int], path: Path) -> dict[str, tuple[str, str | None]]:
    """Split (or "") -> the names of its images and its labels."""
    images, labels = dict[str, str](), dict[str, str]()
    for key, count in axes.items():
        words = key.lower().split("_") if key.lower() not in (*IMAGE_KEYS, *LABEL_KEYS) else [key.lower()]
        split = next((word for word in words if split_of(word)), "")
        kind = "_".join(word for word in words if word != split)
        if kind in IMAGE_KEYS and count in (3, 4):
            images.setdefault(split, key)
        elif kind in LABEL_KEYS:
            labels.setdefault(split, key)
    if not images:
        held = ", ".join(f"{key} of {count}" for key, count in axes.items()) or "nothing"
        raise UserError(f"DATA ({path}) must hold images of 3 or 4 axes, named images or x; it holds {held}")
    return {split: (key, labels.get(split)) for split, key in images.items()}


class ArraySource(Source):
    """Images stacked along the first axis of one or several arrays of a file.

    A ``.npy`` is mapped, a ``.npz`` read whole, in each process at its first image. ``pairs`` are the names of
    the arrays of images and of labels, one pair of None for a ``.npy``; ``split`` goes into the images' names.
    """

    kind = "numpy array"

    def __init__(
        self,
        path: Path,
        pairs: Sequence[tuple[str | None, str | None]],
        split: str | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.file, self.pairs, self.split, self.notes = path, pairs, split, notes
        self._files = LocalFiles(path.parent)
        self._states = {path.name: self._files.state(path.name)}
        self._stacks: list[np.ndarray] | None = None
        stacks = self._load()
        self._starts = np.cumsum([0, *(len(stack) for stack in stacks)])
        if len(self) == 0:
            raise UserError(f"DATA ({path}) holds no images; its array has the shape {stacks[0].shape}")
        self._load_labels()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stacks": None}  # each process maps or reads the file itself

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _load(self) -> list[np.ndarray]:
        """The stacks of images, read once a process."""
        if self._stacks is None:
            self._stacks = [_read(self.file, images) for images, _ in self.pairs]
            for stack in self._stacks:
                if stack.ndim not in (3, 4) or stack.dtype.kind not in "biuf":
                    raise UserError(
                        f"DATA ({self.file}) must be numbers of the shape (image, height, width) or "
                        f"(image, height, width, channel), not {stack.dtype} of {stack.shape}; "
                        "a single image goes into a folder"
                    )
        return self._stacks

    def _load_labels(self) -> None:
        """All labels, -1 in an array without; none where all are missing, of several columns, or fractions."""
        if not any(labels for _, labels in self.pairs):
            return
        pairs = list(zip(self.pairs, np.diff(self._starts).tolist(), strict=True))
        parts = [_read(self.file, key) if key else np.full(count, -1) for (_, key), count in pairs]
        if not all(are_classes(part, count) for part, (_, count) in zip(parts, pairs, strict=True)):
            note = f"The labels in {self.file.name} are not one class an image and are left out."
            self.notes = [*self.notes, note]
            return
        cells = (cell for part in parts for cell in part.ravel().tolist())
        labels = [
            cell.decode("utf-8", "surrogateescape") if isinstance(cell, bytes) else cell for cell in cells
        ]
        self._labels, self.class_names = number_classes(labels)

    def open(self, index: int) -> Picture:
        self.check(index)
        self._files.refuse_changed(self.file.name, self._states[self.file.name])
        stack = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            image = self._load()[stack][index - int(self._starts[stack])]
        except OSError as error:
            raise BadImage(f"{self.file.name} can no longer be read ({error.strerror})") from error
        return ArrayPicture(image)

    def name(self, index: int) -> str:
        return f"{self.split}-{index}" if self.split else str(index)

    def fingerprint(self) -> str:
        """A hash of the first and last bytes of every array and their shapes."""
        parts: list[str | np.ndarray] = []
        for stack in self._load():
            parts += [f"{stack.shape}{stack.dtype}", stack[:1], stack[len(stack) // 2 :][:1], stack[-1:]]
        return hash_of(*parts)


def _read(path: Path, key: str | None) -> np.ndarray:
    """One array of a file; objects, which would run code, are refused."""
    try:
        if key is None:
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # np.memmap is slow to index
        with np.load(path, allow_pickle=False) as archive:
            return archive[key]
    except PermissionError:
        raise
    except Exception as error:  # numpy parses headers as Python, and hands on whatever that raises
        raise UserError(
            f"DATA ({path}) must be a plain numpy array ({brief(error, 100)}); write it again"
        ) from error


@cache
def _photograph(name: str) -> Image.Image:
    """One decoded photograph; all eight take 13 MB in each process that reads them."""
    import skimage

    with Image.open(Path(skimage.__file__).parent / "data" / name, formats=["PNG", "JPEG"]) as picture:
        return picture.convert("RGB")


class BuiltinPhotos(Source):
    """Square cut-outs of eight photographs: always the same ones for the same seed.

    A cut-out shows a window of ``size`` to ``2 size`` pixels, reduced to ``size`` with an antialiased bicubic
    filter, so that the small set has more than one scale. Photographs take turns.
    """

    kind = "built-in photographs"

    def __init__(self, count: int = 2048, size: int = 128, seed: int = 0) -> None:
        self.count, self.size, self.seed = count, size, seed
        self.notes = [
            f"{count:,} cut-outs of {len(PHOTOGRAPHS)} photographs that come with scikit-image: enough to see that "
            "training works, too few to learn a useful backbone from."
        ]
        self.windows = np.random.default_rng(seed).random((count, 3), dtype=np.float32)

    def __len__(self) -> int:
        return self.count

    def open(self, index: int) -> Picture:
        drawn, *place = self.windows[index].tolist()
        photograph = _photograph(PHOTOGRAPHS[index % len(PHOTOGRAPHS)])
        width, height = photograph.size
        side = min(int(self.size * 2**drawn), width, height)
        for down, right in (place, (0.5, 0.5)):
            top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
            box = (left, top, left + side, top + side)
            window = np.asarray(photograph.resize((self.size,) * 2, Image.Resampling.BICUBIC, box))
            if np.ptp(window, axis=(0, 1)).any():  # else the black round the retina: its middle is taken
                break
        return ArrayPicture(window)

    def name(self, index: int) -> str:
        return f"{self.group(index)}-{index:04d}"

    def group(self, index: int) -> str:
        return PHOTOGRAPHS[index % len(PHOTOGRAPHS)].rpartition(".")[0]

    def fingerprint(self) -> str:
        return hash_of(f"photos {self.count} {self.size} {self.seed}")


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) of float 0 to 16 and labels (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


class BuiltinDigits(Source):
    """1,797 handwritten digits of 8×8 pixels with labels, enlarged with a bicubic filter to ``size`` pixels.

    Frequencies beyond 4 cycles a side are empty.
    """

    kind = "built-in digits"

    def __init__(self, size: int = 32) -> None:
        self.size = size
        self.notes = [f"Digits of 8×8 pixels enlarged to {size}×{size}: their higher frequencies are empty."]
        self.class_names, self._labels = [str(digit) for digit in range(10)], _digits()[1]

    def __len__(self) -> int:
        return len(_digits()[1])

    def open(self, index: int) -> Picture:
        eight = Image.fromarray(np.rint(_digits()[0][index] * (255 / 16)).astype(np.uint8))
        return ArrayPicture(np.asarray(eight.resize((self.size,) * 2, Image.Resampling.BICUBIC)))

    def name(self, index: int) -> str:
        return f"digit-{index:04d}"

    def fingerprint(self) -> str:
        return hash_of(f"digits {self.size}")


BUILTINS: dict[str, Callable[[], Source]] = {"photos": BuiltinPhotos, "digits": BuiltinDigits}


def open_builtin(text: str) -> Source:
    """The set that ``builtin:NAME`` names; a UserError where there is none."""
    name = text.removeprefix("builtin:")
    if name not in BUILTINS:
        hint = nearest(text, [f"builtin:{known}" for known in BUILTINS])
        raise UserError(f"DATA ({text}) is no built-in set; {hint}")
    return BUILTINS[name]()
