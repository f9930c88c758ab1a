"""Images in tar shards as WebDataset lays them out, each read by its place in the tar: any one, at any time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from freqmask.data.blocks import BlockReader
from freqmask.data.decode import open_bytes
from freqmask.data.pictures import Picture
from freqmask.data.shard_files import LocalFiles, ShardFiles, local_files
from freqmask.data.shard_finding import find_index
from freqmask.data.shard_index import INDEX_NAME, ShardIndex
from freqmask.data.source import Blocks, Source, SourceSummary, Subset
from freqmask.data.splits import choose_split, split_note
from freqmask.errors import BadImage, UserError


class ShardSource(Source):
    """The images of some shards.

    Args:
        files: where they lie.
        index: what lies where in them.
    """

    def __init__(self, files: ShardFiles, index: ShardIndex) -> None:
        self.files, self.index = files, index
        self.class_names = index.class_names
        self._reader = BlockReader(files, index) if files.remote else None

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

    def blocks(self) -> Blocks | None:
        return None if self._reader is None else Blocks(self._reader.numbers)

    def encoded(self, index: int) -> tuple[bytes, str]:
        return self._bytes(index), PurePosixPath(self.index.text("members", index)).suffix.lower()

    def name(self, index: int) -> str:
        """What the image was called before it was packed, or the member behind its shard's name."""
        named = self.index.text("names", index)
        return named or f"{self._shard(index).removesuffix('.tar')}/{self.index.text('members', index)}"

    def identity(self, index: int) -> int:
        from freqmask.rng import identity_of

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
    splits = index.splits(names)
    chosen = choose_split(splits, split, where) if splits or split not in ("auto", "all") else None
    used = [
        (chosen is None or shard_split == chosen) and (names is None or name in names)
        for name, _, shard_split in index.shards
    ]
    if all(used):
        return source
    if chosen is not None and split == "auto":
        index.notes = [*index.notes, split_note(chosen, splits)]
    return Subset(source, np.flatnonzero(np.repeat(used, np.diff(index.starts))))


def splits_in_shards(files: ShardFiles, names: Sequence[str] | None, where: str) -> list[str]:
    """The names of the splits that some shards have."""
    return find_index(files, names, where).splits(names)


def open_local_shards(text: str, split: str) -> Source:
    """Shards of this machine.

    Args:
        text: a folder, a tar, or a pattern such as ``shards-{000000..000009}.tar`` or ``shards-*.tar``.
        split: as for `open_shards`.
    """
    files, names = local_files(text)
    return open_shards(files, names, split, text)
