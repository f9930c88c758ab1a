"""Images in tar shards as WebDataset lays them out, each read by its place in the tar: any one, at any time."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

import numpy as np

from freqmask.console import say
from freqmask.data.cache import cache_file
from freqmask.data.decode import open_bytes
from freqmask.data.pictures import Picture
from freqmask.data.shard_index import (
    INDEX_NAME,
    VERSION,
    ShardIndex,
    join_indexes,
    load_index,
    make_index,
    with_folder_classes,
)
from freqmask.data.sources import Source, SourceSummary
from freqmask.data.splits import choose_split, split_note, split_of
from freqmask.data.subset import Subset
from freqmask.data.tar_headers import read_headers
from freqmask.errors import BadImage, UserError

if TYPE_CHECKING:
    from freqmask.data.blocks import BlockReader

PATTERN = re.compile(r"[*?{\[]")
SPOKEN_BYTES = 1_000_000_000  # reading the headers of more than this takes long enough to be told
HEADER_READERS = 8


class ShardFiles(Protocol):
    """Where shards lie: a folder here, or a place behind a URL.

    Attributes:
        where: the place in words.
        remote: True where a read costs a round trip.
    """

    where: str
    remote: bool

    def names(self) -> list[str]:
        """The tars there, and in folders named as splits, sorted; paths relative to the place."""

    def size(self, name: str) -> int:
        """Bytes of a file; raises FileNotFoundError."""

    def state(self, name: str) -> tuple[object, ...]:
        """What changes when the file does."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Some of its bytes; fewer where it ends before."""

    def stream(self, name: str) -> BinaryIO:
        """The file, to be read here and there."""

    def index_file(self) -> Path | None:
        """The index beside the shards, on this machine; None where there is none."""


class LocalFiles:
    """Shards in a folder of this machine.

    Args:
        root: the folder.
    """

    remote = False

    def __init__(self, root: Path) -> None:
        self.root, self.where = root, str(root)

    def names(self) -> list[str]:
        """The tars of the folder and of its train, val and test."""
        folders = [folder for folder in self.root.iterdir() if split_of(folder.name) and folder.is_dir()]
        found = [tar for folder in (self.root, *folders) for tar in folder.glob("*.tar")]
        return sorted(path.relative_to(self.root).as_posix() for path in found if path.name[0] != ".")

    def matching(self, pattern: str) -> list[str]:
        """The files whose names fit a pattern with ``*`` and ``?``."""
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.glob(pattern))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return (self.root / name).stat().st_size

    def state(self, name: str) -> tuple[object, ...]:
        """Size and time of the last change."""
        state = (self.root / name).stat()
        return state.st_size, state.st_mtime_ns

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Opened for every image: 15 microseconds, and no limit of open files to run into."""
        with (self.root / name).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), stop - start, start)

    def stream(self, name: str) -> BinaryIO:
        """The file, opened."""
        return (self.root / name).open("rb")

    def index_file(self) -> Path | None:
        """The index in the same folder."""
        file = self.root / INDEX_NAME
        return file if file.is_file() else None


class ShardSource(Source):
    """The images of some shards.

    Args:
        files: where they lie.
        index: what lies where in them.
    """

    def __init__(self, files: ShardFiles, index: ShardIndex) -> None:
        self.files, self.index = files, index
        self.class_names = index.class_names
        self._reader = _block_reader(files, index) if files.remote else None

    def __len__(self) -> int:
        return len(self.index)

    def _place(self, index: int) -> tuple[str, int, int]:
        """Shard, first byte and the byte after the last."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start = int(self.index.arrays["offsets"][index])
        return self._shard(index), start, start + int(self.index.arrays["sizes"][index])

    def _shard(self, index: int) -> str:
        return self.index.shards[self.index.shard_of(index)][0]

    def open(self, index: int) -> Picture:
        return open_bytes(self._bytes(index))

    def _bytes(self, index: int) -> bytes:
        """The image's file."""
        shard, start, stop = self._place(index)
        try:
            if self._reader is None:
                data = self.files.read(shard, start, stop)
            else:
                data = self._reader.read(index, shard, start, stop)
        except FileNotFoundError as error:
            raise BadImage(f"the shard {shard} is gone") from error
        except OSError as error:
            raise BadImage(f"the shard {shard} cannot be read ({error.strerror or error})") from error
        if len(data) < stop - start:
            raise BadImage(f"the shard {shard} is truncated")
        return data

    def blocks(self) -> np.ndarray | None:
        return None if self._reader is None else self._reader.numbers

    def encoded(self, index: int) -> tuple[bytes, str]:
        return self._bytes(index), PurePosixPath(self.index.text("members", index)).suffix.lower()

    def name(self, index: int) -> str:
        """What the image was called before it was packed, or the member behind its shard's name."""
        named = self.index.text("names", index)
        return named or f"{self._shard(index).removesuffix('.tar')}/{self.index.text('members', index)}"

    def identity(self, index: int) -> int:
        from freqmask.draws import identity_of

        shard = PurePosixPath(self._shard(index)).name
        return identity_of(f"{shard}/{self.index.text('members', index)}".encode(errors="surrogateescape"))

    def label(self, index: int) -> int | None:
        label = int(self.index.arrays["labels"][index])
        return None if label < 0 else label

    def all_labels(self) -> np.ndarray:
        return self.index.arrays["labels"].astype(np.int64)

    def group(self, index: int) -> str | None:
        number = int(self.index.arrays["groups"][index])
        return None if number < 0 or self.index.group_names is None else self.index.group_names[number]

    def fingerprint(self) -> str:
        return self.index.fingerprint()

    def summary(self) -> SourceSummary:
        count = len(self.index.shards)
        kind = f"{count:,} shard{'s' if count > 1 else ''}"
        notes = list(self.index.notes)
        if self.files.remote:
            kind += f" at {self.files.where}"
            notes.append(
                "Shards are read over the network in pieces of 4 MB, mixed within windows of 16 pieces; the order "
                "depends on the number of processes and workers."
            )
        return SourceSummary(kind, len(self), len(self), dict(self.index.ignored), notes)


def _block_reader(files: ShardFiles, index: ShardIndex) -> BlockReader:
    from freqmask.data.blocks import BlockReader

    return BlockReader(files, index)


def has_shards(folder: Path) -> bool:
    """Whether a folder is one of shards: it has their index, or tars and no images."""
    if (folder / INDEX_NAME).is_file():
        return True
    if not LocalFiles(folder).names():
        return False
    from freqmask.data.decode import read_suffixes
    from freqmask.data.index import index_folder

    return len(index_folder(folder, read_suffixes())) == 0


def open_shards(files: ShardFiles, names: Sequence[str] | None, split: str, where: str) -> Source:
    """The images of shards.

    Args:
        files: where they lie.
        names: which of them; None for all.
        split: ``auto``, ``all`` or a split's name: of the folder that the shard lies in, or in its own name.
        where: DATA as it was typed.

    Raises:
        UserError: one of them is missing or no tar, or there is no such split, or no image in them.
    """
    index = find_index(files, names, where)
    if len(index) == 0:
        counts = ", ".join(
            f"{count:,} {suffix or 'without suffix'}" for suffix, count in index.ignored.items()
        )
        raise UserError(f"DATA ({where}) holds no images ({counts or 'the shards are empty'})")
    source = ShardSource(files, index)
    splits = index.splits()
    chosen = choose_split(splits, split, where) if splits or split not in ("auto", "all") else None
    wanted = None if names is None else set(names)
    used = [
        (chosen is None or shard_split == chosen) and (wanted is None or name in wanted)
        for name, _, shard_split in index.shards
    ]
    if all(used):
        return source
    if chosen is not None and split == "auto":
        index.notes = [*index.notes, split_note(chosen, splits)]
    return Subset(source, np.flatnonzero(np.repeat(used, np.diff(index.starts))))


def splits_in_shards(files: ShardFiles, names: Sequence[str] | None, where: str) -> list[str]:
    """The names of the splits that some shards have."""
    return find_index(files, names, where).splits()


def find_index(files: ShardFiles, names: Sequence[str] | None, where: str) -> ShardIndex:
    """The index beside the shards, that in the cache, or a new one from their headers.

    Args:
        files: where they lie.
        names: which of them; None for all.
        where: DATA as it was typed.
    """
    beside = _index_beside(files, names, where)
    if beside is not None:
        return beside
    listed = files.names() if names is None else list(names)
    if not listed:
        raise UserError(f"DATA ({where}) holds no .tar; check its spelling, or name the shards")
    try:
        states = [files.state(name) for name in listed]
    except FileNotFoundError as error:
        raise UserError(
            f"DATA ({where}): the shard {error.filename or error} is not there; check it"
        ) from error
    cached = cache_file("shards", VERSION, files.where, list(zip(listed, states, strict=True)))
    try:
        return load_index(cached)
    except ValueError:
        index = with_folder_classes(join_indexes(_read_all_headers(files, listed)))
    if index.save(cached):
        index.file = cached
    return index


def _index_beside(files: ShardFiles, names: Sequence[str] | None, where: str) -> ShardIndex | None:
    """The index that was written with the shards, where it fits them."""
    file = files.index_file()
    if file is None:
        return None
    try:
        index = load_index(file)
    except ValueError as error:
        raise UserError(
            f"DATA ({where}): {error}; delete it to have it made anew, or fetch it again"
        ) from error
    sizes = {name: size for name, size, _ in index.shards}
    if names is not None and not set(names) <= set(sizes):
        return None
    for name in () if files.remote else names or sizes:  # asking a server for each would take long
        try:
            there = files.size(name)
        except FileNotFoundError as error:
            raise UserError(
                f"DATA ({where}) lacks the shard {name}, which its {INDEX_NAME} lists; fetch it, or name those "
                "that are there by a pattern"
            ) from error
        if there != sizes[name]:
            raise UserError(
                f"DATA ({where}): the shard {name} has {there:,} bytes, not the {sizes[name]:,} of its "
                f"{INDEX_NAME}; fetch it again, or delete {INDEX_NAME} to have it made anew"
            )
    return index


def _read_all_headers(files: ShardFiles, names: Sequence[str]) -> list[ShardIndex]:
    """What the headers of each shard tell, in their order."""
    sizes = [files.size(name) for name in names]
    if files.remote or sum(sizes) > SPOKEN_BYTES:
        say(f"index       reading the headers of {len(names):,} shards of {files.where}, once")

    def read(name: str, size: int) -> ShardIndex:
        with files.stream(name) as file:
            return make_index([read_headers(name, file, size)])

    with ThreadPoolExecutor(HEADER_READERS) as pool:
        return list(pool.map(read, names, sizes))


def open_local_shards(text: str, split: str) -> Source:
    """Shards of this machine.

    Args:
        text: a folder, a tar, or a pattern such as ``shards-{000000..000009}.tar`` or ``shards-*.tar``.
        split: as for `open_shards`.
    """
    files, names = local_shards(text)
    return open_shards(files, names, split, text)


def local_shards(text: str) -> tuple[ShardFiles, list[str] | None]:
    """The folder, and which of its shards a text names; None for all.

    Raises:
        UserError: no file fits the pattern.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return cast(ShardFiles, LocalFiles(path)), None
    if path.is_file():
        return cast(ShardFiles, LocalFiles(path.parent)), [path.name]
    root, pattern = split_pattern(str(path))
    files = LocalFiles(Path(root or "."))
    names = [name for part in expand_braces(pattern) for name in _fitting(files, part)]
    if not names:
        raise UserError(
            f"DATA ({text}): no file fits the pattern; quote it, and check its folder and numbers"
        )
    return cast(ShardFiles, files), names


def _fitting(files: LocalFiles, pattern: str) -> list[str]:
    """The files of a pattern; a plain name is kept, to be missed by its name."""
    return files.matching(pattern) if re.search(r"[*?\[]", pattern) else [pattern]


def split_pattern(text: str) -> tuple[str, str]:
    """The folder before the first part with a sign of a pattern, and the rest.

    >>> split_pattern("data/train/shards-{0..3}.tar")
    ('data/train', 'shards-{0..3}.tar')
    """
    parts = text.split("/")
    first = next((k for k, part in enumerate(parts) if PATTERN.search(part)), len(parts) - 1)
    root = "/".join(parts[:first])
    return (root or "/" if text.startswith("/") and first else root), "/".join(parts[first:])


def expand_braces(pattern: str) -> list[str]:
    """Every text that a pattern with ranges and lists in braces stands for, in order.

    >>> expand_braces("{train,val}-{08..10}.tar")[:4]
    ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-08.tar']
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    first, last, words = found.groups()
    if words is None:
        width = len(first) if len(first) == len(last) or first.startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = words.split(",")
    rest = expand_braces(pattern[found.end() :])
    return [f"{pattern[: found.start()]}{choice}{tail}" for choice in choices for tail in rest]


def is_pattern(text: str) -> bool:
    """Whether a text names shards by a pattern."""
    return bool(PATTERN.search(text)) and text.endswith(".tar")
