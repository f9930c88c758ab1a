"""Where each image lies in a set of tar shards, as compact arrays in one file beside them or in the cache."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from freqmask.data.cache import bytes_of, read_arrays, write_arrays
from freqmask.data.labels import in_order

INDEX_NAME = "shards.index"
VERSION = 1
NUMBERS = {
    "offsets": np.int64,
    "sizes": np.int64,
    "labels": np.int32,
    "groups": np.int32,
    "heights": np.uint32,
    "widths": np.uint32,
    "channels": np.uint16,
    "bits": np.uint8,
}
"""Columns of numbers and their types; -1 is no label or group, 0 an unknown size, count or depth."""
TEXTS = ("members", "names")


class Row(NamedTuple):
    """One image of a shard.

    Attributes:
        member: its name inside the tar.
        offset: where its bytes begin in the tar.
        size: how many there are.
        label: the name of its class, or None.
        group: what it must not be separated from, or None.
        name: what it was called before it was packed; None where that is the member's name.
        height: in pixels as shown, 0 where unknown.
        width: the same.
        channels: 0 where unknown.
        bits: of a sample, 0 where unknown.
    """

    member: str
    offset: int
    size: int
    label: str | None = None
    group: str | None = None
    name: str | None = None
    height: int = 0
    width: int = 0
    channels: int = 0
    bits: int = 0


@dataclass
class ShardRows:
    """One shard and its images.

    Attributes:
        name: path relative to where the set lies, with ``/``.
        bytes: size of the tar.
        split: name of the split it belongs to, or None.
        rows: its images, in the order of the tar.
        ignored: suffix -> members that are not read.
        notes: sentences for the user.
    """

    name: str
    bytes: int
    split: str | None
    rows: list[Row]
    ignored: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class ShardIndex:
    """The images of some shards, about 110 bytes an image; arrays may be mapped from a file.

    Attributes:
        shards: (name, bytes, split) of each.
        starts: (shards + 1,) number of the first image of each shard.
        class_names: by label, or None.
        group_names: by number, or None.
        ignored: suffix -> members that are not read.
        notes: sentences for the user.
        extra: what the writer kept with it.
        file: the file that holds the same, or None.
    """

    def __init__(
        self, about: dict[str, Any], arrays: dict[str, np.ndarray], file: Path | None = None
    ) -> None:
        self.shards = [(str(name), int(size), split) for name, size, split in about["shards"]]
        self.class_names: list[str] | None = about["class_names"]
        self.group_names: list[str] | None = about["group_names"]
        self.ignored: dict[str, int] = about["ignored"]
        self.notes: list[str] = about["notes"]
        self.extra: dict[str, Any] = about.get("extra", {})
        self.file = file
        self._about, self.arrays = about, arrays
        self.starts = arrays["starts"]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        if self.file is None:
            return self.__dict__
        return {"file": self.file}  # workers that are not forked map the same file

    def __setstate__(self, state: dict[str, Any]) -> None:
        if len(state) > 1:
            self.__dict__.update(state)
            return
        self.__dict__.update(vars(load_index(state["file"], verify=False)))

    def shard_of(self, number: int) -> int:
        """The number of the shard that holds an image."""
        return int(np.searchsorted(self.starts, number, side="right")) - 1

    def text(self, column: str, number: int) -> str:
        """A text of an image: ``members``, or ``names`` (empty where that is the member's)."""
        ends = self.arrays[f"{column}_ends"]
        if len(ends) == 1:
            return ""
        piece = self.arrays[column][ends[number] : ends[number + 1]]
        return piece.tobytes().decode("utf-8", "surrogateescape")

    def splits(self, names: Collection[str] | None = None) -> list[str]:
        """The names of the splits there are: in some shards, or in all."""
        return sorted({split for name, _, split in self.shards if split and (names is None or name in names)})

    def fingerprint(self) -> str:
        """A hash of the shards' names and of what lies where in them."""
        digest = hashlib.blake2b(repr(self.shards).encode(errors="surrogateescape"), digest_size=8)
        for column in ("starts", "offsets", "sizes", "members"):
            digest.update(bytes_of(self.arrays[column]))
        return digest.hexdigest()

    def save(self, file: Path, **extra: Any) -> bool:
        """Write it, whole or not at all; False where the place cannot be written.

        Args:
            file: where to.
            extra: anything JSON that the writer wants to find again as `extra`.
        """
        return write_arrays(file, self._about | {"extra": extra}, self.arrays)


def load_index(file: Path, verify: bool = True) -> ShardIndex:
    """An index from its file.

    Args:
        file: what :meth:`ShardIndex.save` wrote.
        verify: True to compare its checksum.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    read = read_arrays(file, verify)
    if read is None or read[0].get("version") != VERSION:
        raise ValueError(f"{file} is damaged, or was written by another version")
    return ShardIndex(*read, file=file)


def make_index(shards: Sequence[ShardRows], class_names: Sequence[str] | None = None) -> ShardIndex:
    """The index of shards whose images are known.

    Args:
        shards: in order.
        class_names: the classes in order; None: those that occur, numbers by value, others by the alphabet.
    """
    rows = [row for shard in shards for row in shard.rows]
    classes = list(class_names) if class_names is not None else in_order({r.label for r in rows if r.label})
    groups = sorted({row.group for row in rows if row.group is not None})
    numbers: dict[str, Iterable[int]] = {
        "labels": _numbered([row.label for row in rows], classes),
        "groups": _numbered([row.group for row in rows], groups),
    }
    arrays = {
        column: np.fromiter(numbers.get(column) or (getattr(row, _SINGULAR[column]) for row in rows), kind)
        for column, kind in NUMBERS.items()
    }
    arrays["starts"] = np.cumsum([0, *(len(shard.rows) for shard in shards)], dtype=np.int64)
    arrays |= text_arrays("members", [row.member for row in rows])
    named = any(row.name is not None for row in rows)
    arrays |= text_arrays("names", [row.name or row.member for row in rows] if named else [])
    names = [(shard.name, shard.bytes, shard.split) for shard in shards]
    ignored = sum((Counter(shard.ignored) for shard in shards), Counter[str]())
    notes = [note for shard in shards for note in shard.notes]
    return ShardIndex(about_shards(names, classes or None, groups or None, dict(ignored), notes), arrays)


_SINGULAR = {"offsets": "offset", "sizes": "size", "heights": "height", "widths": "width"} | {
    same: same for same in ("channels", "bits")
}


def about_shards(
    shards: Sequence[tuple[str, int, str | None]],
    classes: list[str] | None,
    groups: list[str] | None,
    ignored: dict[str, int],
    notes: Sequence[str],
) -> dict[str, Any]:
    """What stands beside the arrays."""
    return {
        "version": VERSION,
        "shards": list(shards),
        "class_names": classes,
        "group_names": groups,
        "ignored": ignored,
        "notes": list(dict.fromkeys(notes)),
    }


def _numbered(texts: list[str | None], names: list[str]) -> list[int]:
    """The place of each text among the names, -1 for None."""
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    return [numbers.get(text, -1) for text in texts]


def text_arrays(column: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Texts as one array of bytes and where each ends."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    return {
        column: np.frombuffer(b"".join(encoded), np.uint8),
        f"{column}_ends": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
    }
