"""Where each image lies in tar shards, as compact arrays: told from headers, joined, kept beside them or cached."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from freqmask.data.cache import bytes_of, read_arrays, write_arrays
from freqmask.data.decode import read_suffixes
from freqmask.data.labels import in_order
from freqmask.data.splits import split_of
from freqmask.errors import UserError

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
LABEL_KEYS = ("label", "cls", "class", "class_name", "target")
LARGEST_NOTE = 1_000_000  # bytes of a .cls or .json that is read for its label


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


def join_indexes(parts: Sequence[ShardIndex], class_names: list[str] | None = None) -> ShardIndex:
    """Several indexes as one; classes of the same name are the same class.

    Args:
        parts: in order, at least one.
        class_names: the classes in order; None: those of the parts.
    """
    classes = class_names or _united([part.class_names for part in parts])
    groups = _united([part.group_names for part in parts])
    arrays = {column: np.concatenate([part.arrays[column] for part in parts]) for column in NUMBERS}
    arrays["labels"] = _renumbered(parts, "labels", [part.class_names for part in parts], classes)
    arrays["groups"] = _renumbered(parts, "groups", [part.group_names for part in parts], groups)
    arrays["starts"] = _joined_ends([part.starts for part in parts])
    named = any(len(part.arrays["names_ends"]) > 1 for part in parts)
    for column in TEXTS if named else TEXTS[:1]:
        own = [column if len(part.arrays[f"{column}_ends"]) == len(part) + 1 else "members" for part in parts]
        arrays[column] = np.concatenate([p.arrays[c] for p, c in zip(parts, own, strict=True)])
        arrays[f"{column}_ends"] = _joined_ends(
            [p.arrays[f"{c}_ends"] for p, c in zip(parts, own, strict=True)]
        )
    if not named:
        arrays |= text_arrays("names", [])
    ignored = sum((Counter(part.ignored) for part in parts), Counter[str]())
    notes = [note for part in parts for note in part.notes]
    shards = [shard for part in parts for shard in part.shards]
    return ShardIndex(about_shards(shards, classes, groups, dict(ignored), notes), arrays)


def _united(names: list[list[str] | None]) -> list[str] | None:
    """The names of all parts: in their order where they agree."""
    known = [part for part in names if part]
    if not known:
        return None
    return (
        known[0] if all(part == known[0] for part in known) else in_order({n for part in known for n in part})
    )


def _renumbered(
    parts: Sequence[ShardIndex], column: str, names: list[list[str] | None], whole: list[str] | None
) -> np.ndarray:
    """A column of numbers by the names of the whole."""
    places = {name: number for number, name in enumerate(whole or ())}
    found = []
    for part, own in zip(parts, names, strict=True):
        new = np.array([*(places[name] for name in own or ()), -1], np.int32)
        found.append(new[part.arrays[column]])
    return np.concatenate(found)


def _joined_ends(ends: list[np.ndarray]) -> np.ndarray:
    starts = np.cumsum([0, *(part[-1] for part in ends)])
    joined = [part[1:] + start for part, start in zip(ends, starts, strict=False)]
    return np.concatenate([np.zeros(1, np.int64), *joined])


def with_folder_classes(index: ShardIndex) -> ShardIndex:
    """Where no image has a label, the first folder in the members' names is the class, as in a folder.

    Args:
        index: as headers tell.
    """
    if index.class_names is not None or len(index) == 0:
        return index
    folders = [
        index.text("members", number).removeprefix("./").split("/")[:-1] for number in range(len(index))
    ]
    depth = int(all(parts and split_of(parts[0]) for parts in folders))
    if min(map(len, folders)) <= depth:
        return index
    names = in_order({parts[depth] for parts in folders})
    if len(names) < 2:
        return index
    numbers = {name: number for number, name in enumerate(names)}
    index.arrays["labels"] = np.array([numbers[parts[depth]] for parts in folders], np.int32)
    about = about_shards(index.shards, names, index.group_names, index.ignored, index.notes)
    return ShardIndex(about, index.arrays)


@dataclass
class _Sample:
    """The members of one key, as WebDataset groups them: ``000.jpg``, ``000.cls``."""

    key: str
    images: list[Row] = field(default_factory=list)
    label: str | None = None
    group: str | None = None
    name: str | None = None


def read_headers(name: str, file: BinaryIO, size: int) -> ShardRows:
    """The images of a tar; their pixels are not read.

    Args:
        name: what the shard is called, relative to its set.
        file: the tar, seekable.
        size: its bytes.

    Raises:
        UserError: it is compressed, damaged or no tar.
    """
    suffixes, ignored = read_suffixes(), Counter[str]()
    rows: list[Row] = []
    others = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for sample in _samples(tar, suffixes, ignored):
                chosen = _chosen(sample.images)
                others += len(sample.images) - len(chosen)
                rows += [
                    row._replace(label=sample.label, group=sample.group, name=sample.name) for row in chosen
                ]
    except (tarfile.TarError, EOFError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"DATA: the shard {name} is truncated, compressed or no tar ({reason}); fetch it again, or unpack it"
        ) from error
    notes = [f"Of samples with several images the first is read ({name} and others)."] if others else []
    return ShardRows(name, size, split_of_shard(name), rows, dict(ignored.most_common()), notes)


def _samples(tar: tarfile.TarFile, suffixes: frozenset[str], ignored: Counter[str]) -> Iterator[_Sample]:
    """Members of one key stand one behind the other."""
    sample = _Sample("")
    for info in tar:
        path = PurePosixPath(info.name)
        if not info.isreg() or path.name.startswith("."):
            continue
        stem, _, extension = path.name.partition(".")
        key = str(path.with_name(stem))
        if key != sample.key:
            yield sample
            sample = _Sample(key)
        suffix = path.suffix.lower()
        if suffix in suffixes:
            sample.images.append(Row(info.name, info.offset_data, info.size))
        elif extension.lower() in ("cls", "json") and info.size <= LARGEST_NOTE:
            _read_note(sample, extension.lower(), tar, info)
        else:
            ignored[suffix] += 1
    yield sample


def _chosen(images: list[Row]) -> list[Row]:
    """The image of a sample: ``000.jpg``, not ``000.mask.png``; where there are none such, each is its own."""
    plain = [row for row in images if PurePosixPath(row.member).name.count(".") == 1]
    return plain[:1] or images


def _read_note(sample: _Sample, kind: str, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
    """The label in a ``.cls``; label, group and name in a ``.json``."""
    file = tar.extractfile(info)
    text = "" if file is None else file.read().decode("utf-8", "replace").strip()
    if kind == "cls":
        sample.label = text or sample.label
        return
    try:
        facts = json.loads(text)
    except ValueError:
        return
    if isinstance(facts, dict):
        found = next((facts[key] for key in LABEL_KEYS if isinstance(facts.get(key), str | int)), None)
        sample.label = sample.label or (None if found is None else str(found))
        sample.group = str(facts["group"]) if facts.get("group") is not None else None
        sample.name = facts["name"] if isinstance(facts.get("name"), str) else None


def split_of_shard(name: str) -> str | None:
    """The split that a shard's folder or file name tells.

    >>> split_of_shard("val/000001.tar"), split_of_shard("imagenet-train-000007.tar"), split_of_shard("7.tar")
    ('val', 'train', None)
    """
    *folders, file = name.split("/")
    words = [*folders[-1:], *re.split(r"[-_.]", file.removesuffix(".tar"))]
    return next((word for word in words if split_of(word)), None)
