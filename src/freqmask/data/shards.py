"""Images in tar shards as WebDataset lays them out, each read by its place in the tar: any one, at any time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from threading import Lock
from typing import Any

import numpy as np

from freqmask.console import say
from freqmask.data.cache import cache_file
from freqmask.data.decode import open_bytes
from freqmask.data.pixels import Picture
from freqmask.data.shard_index import (
    VERSION,
    ShardIndex,
    ShardRows,
    folder_classes,
    load_index,
    make_index,
    read_headers,
)
from freqmask.data.source import WINDOW_BLOCKS, BlockLayout, Source, SourceSummary, Subset
from freqmask.data.splits import Located
from freqmask.data.storage import INDEX_NAME, Files
from freqmask.errors import BadImage, UserError
from freqmask.rng import identity_of

BLOCK_BYTES = 4_000_000
# What a worker's window needs, and a few more for a window that ends while the next one begins.
KEPT_BLOCKS = WINDOW_BLOCKS + 8
SPOKEN_BYTES = 1_000_000_000  # reading the headers of more than this takes long enough to be told
HEADER_READERS = 8


def block_numbers(index: ShardIndex) -> np.ndarray:
    """(image,) which block each image belongs to: pieces of about 4 MB, none over the end of a shard."""
    shards = np.repeat(np.arange(len(index.shards)), np.diff(index.starts))
    pieces = index.arrays["offsets"] // BLOCK_BYTES
    changes = (np.diff(shards, prepend=-1) != 0) | (np.diff(pieces, prepend=-1) != 0)
    return np.cumsum(changes, dtype=np.int32) - np.int32(1)


class BlockReader:
    """Reads images of remote shards, and whole blocks where one image of a block is not all that is wanted.

    The first look into a block fetches its image alone, the second one the whole block, which is then kept. So
    pictures here and there cost what they weigh, and reading in order two requests a block.
    """

    def __init__(self, files: Files, index: ShardIndex) -> None:
        self.files, self.index = files, index
        self.numbers = block_numbers(index)
        self._kept: OrderedDict[int, tuple[int, bytes] | None] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "index": self.index, "numbers": self.numbers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kept, self._lock = OrderedDict(), Lock()

    def read(self, image: int, shard: str, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop`` of a shard, which are those of an image, by its number."""
        block = int(self.numbers[image])
        with self._lock:
            seen = block in self._kept
            kept = self._kept.setdefault(block, None)
        if not seen:
            return self.files.read(shard, start, stop)
        if kept is None:
            first, last = np.searchsorted(self.numbers, [block, block + 1])
            offsets, sizes = self.index.arrays["offsets"], self.index.arrays["sizes"]
            begin, end = int(offsets[first]), int(offsets[last - 1] + sizes[last - 1])
            kept = begin, self.files.read(shard, begin, end)
        with self._lock:
            self._kept[block] = kept
            self._kept.move_to_end(block)
            while len(self._kept) > KEPT_BLOCKS:
                self._kept.popitem(last=False)
        begin, data = kept
        return data[start - begin : stop - begin]


def find_index(files: Files, names: Sequence[str] | None, where: str) -> ShardIndex:
    """The index beside the shards (None for all of them), that in the cache, or a new one from their headers."""
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
        shards = _read_all_headers(files, listed)
        index = make_index(shards, labels=folder_classes(shards))
    if index.save(cached):
        index.file = cached
    return index


def _index_beside(files: Files, names: Sequence[str] | None, where: str) -> ShardIndex | None:
    file = files.index_file()
    if file is None:
        return None
    try:
        index = load_index(file)
    except ValueError as error:
        raise UserError(
            f"DATA ({where}): its {INDEX_NAME} is damaged, or was written by another version; fetch it again, or "
            "delete it to have it made anew"
        ) from error
    sizes = {name: size for name, size, _ in index.shards}
    if names is not None and not set(names) <= set(sizes):
        return None
    for name in () if files.remote else names or sizes:  # asking a server for each would take long
        try:
            size = files.state(name)[0]
        except FileNotFoundError as error:
            raise UserError(
                f"DATA ({where}) lacks the shard {name}, which its {INDEX_NAME} lists; fetch it, or name those "
                "that are there by a pattern"
            ) from error
        if size != sizes[name]:
            raise UserError(
                f"DATA ({where}): the shard {name} has {size:,} bytes, not the {sizes[name]:,} of its "
                f"{INDEX_NAME}; fetch it again, or delete {INDEX_NAME} to have it made anew"
            )
    return index


def _read_all_headers(files: Files, names: Sequence[str]) -> list[ShardRows]:
    sizes = [files.state(name)[0] for name in names]
    if files.remote or sum(sizes) > SPOKEN_BYTES:
        say(f"index       reading the headers of {len(names):,} shards of {files.where}, once")

    def read(name: str, size: int) -> ShardRows:
        with files.stream(name) as file:
            return read_headers(name, file, size)

    with ThreadPoolExecutor(HEADER_READERS) as pool:
        return list(pool.map(read, names, sizes))


class ShardSource(Source):
    """The images of some shards, by the index of what lies where in them."""

    def __init__(self, files: Files, index: ShardIndex) -> None:
        self.files, self.index = files, index
        self.class_names = index.class_names
        self._reader = BlockReader(files, index) if files.remote else None

    def __len__(self) -> int:
        return len(self.index)

    def _place(self, index: int) -> tuple[str, int, int]:
        self.check(index)
        start = int(self.index.arrays["offsets"][index])
        return self._shard(index), start, start + int(self.index.arrays["sizes"][index])

    def _shard(self, index: int) -> str:
        return self.index.shards[self.index.shard_of(index)][0]

    def open(self, index: int) -> Picture:
        return open_bytes(self._bytes(index))

    def _bytes(self, index: int) -> bytes:
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
        if (
            self._reader is None
            and self.files.state(shard)[0] != self.index.shards[self.index.shard_of(index)][1]
        ):
            raise BadImage(f"the shard {shard} was rewritten after its index was read")
        return data

    def blocks(self) -> BlockLayout | None:
        return None if self._reader is None else BlockLayout(self._reader.numbers)

    def encoded(self, index: int) -> tuple[bytes, str]:
        return self._bytes(index), PurePosixPath(self.index.text("members", index)).suffix.lower()

    def name(self, index: int) -> str:
        """What the image was called before it was packed, or the member behind its shard's name."""
        named = self.index.text("names", index)
        return named or f"{self._shard(index).removesuffix('.tar')}/{self.index.text('members', index)}"

    def identity(self, index: int) -> int:
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


def locate_shards(files: Files, names: Sequence[str] | None, where: str) -> Located:
    """The images of shards (None: all); their splits are told by the folders that they lie in, or by their names."""
    index = find_index(files, names, where)
    if len(index) == 0:
        counts = ", ".join(
            f"{count:,} {suffix or 'without suffix'}" for suffix, count in index.ignored.items()
        )
        raise UserError(f"DATA ({where}) holds no images ({counts or 'the shards are empty'})")

    def open_split(chosen: str | None, notes: list[str]) -> Source:
        used = [
            (chosen is None or split == chosen) and (names is None or name in names)
            for name, _, split in index.shards
        ]
        if all(used):
            return ShardSource(files, index)
        index.notes = [*index.notes, *notes]
        return Subset(ShardSource(files, index), np.flatnonzero(np.repeat(used, np.diff(index.starts))))

    return Located(where, open_split, index.splits(names))
