"""Where each image lies in tar shards, as compact arrays: told from headers, kept beside them or cached."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from freqmask.data.cache import hash_of, piece_of, read_arrays, text_arrays, write_arrays
from freqmask.data.decode import read_suffixes
from freqmask.data.labels import in_order
from freqmask.data.splits import split_of
from freqmask.errors import UserError, brief

VERSION = 1
SCHEMA = pa.schema([
    ("member", pa.large_binary()), ("offset", pa.int64()), ("size", pa.int64()), ("label", pa.binary()),
    ("group", pa.binary()), ("name", pa.large_binary()), ("height", pa.uint32()), ("width", pa.uint32()),
    ("channels", pa.uint16()), ("bits", pa.uint8()),
])  # fmt: skip
"""Of rows as a table."""
PLAIN_COLUMNS = {
    "offsets": "offset", "sizes": "size", "heights": "height", "widths": "width",
    "channels": "channels", "bits": "bits",
}  # fmt: skip
"""Array of an index -> column of the rows, the same numbers."""
LABEL_KEYS = ("label", "cls", "class", "class_name", "target")
LARGEST_NOTE = 1_000_000  # bytes of a .cls or .json that is read for its label


class Row(NamedTuple):
    """One image of a shard."""

    member: str  # its name inside the tar
    offset: int  # where its bytes begin in the tar
    size: int  # how many there are
    label: str | None = None  # the name of its class, or None
    group: str | None = None  # what it must not be separated from, or None
    name: str | None = None  # what it was called before it was packed; None where that is the member's name
    height: int = 0  # in pixels as shown, 0 where unknown
    width: int = 0  # the same
    channels: int = 0  # 0 where unknown
    bits: int = 0  # of a sample, 0 where unknown


@dataclass
class ShardRows:
    """One shard and its images."""

    name: str  # path relative to where the set lies, with ``/``
    bytes: int  # size of the tar
    split: str | None  # name of the split it belongs to, or None
    rows: pa.Table  # its images, in the order of the tar; see `pack_rows`
    ignored: dict[str, int] = field(default_factory=dict)  # suffix -> members that are not read
    notes: list[str] = field(default_factory=list)  # sentences for the user


def pack_rows(rows: Sequence[Row]) -> pa.Table:
    """Rows as a table: a hundred bytes each, where they would take half a thousand."""
    columns = zip(*rows, strict=True) if rows else [()] * len(SCHEMA)
    arrays = [pa.array(map(_raw, values), field.type) for values, field in zip(columns, SCHEMA, strict=True)]
    return pa.table(arrays, SCHEMA)


def _raw(value: Any) -> Any:
    """Texts as bytes: names of files need not be UTF-8."""
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


class ShardIndex:
    """The images of some shards, about 110 bytes an image; arrays may be mapped from a file."""

    def __init__(
        self, about: dict[str, Any], arrays: dict[str, np.ndarray], file: Path | None = None
    ) -> None:
        self.shards = [(str(name), int(size), split) for name, size, split in about["shards"]]
        self.class_names: list[str] | None = about["class_names"]
        self.group_names: list[str] | None = about["group_names"]
        self.ignored: dict[str, int] = about["ignored"]  # suffix -> members that are not read
        self.notes: list[str] = about["notes"]
        self.extra: dict[str, Any] = about.get("extra", {})  # what the writer kept with it
        self.file = file
        self._about, self.arrays = about, arrays
        self.starts = arrays["starts"]  # (shards + 1,) number of the first image of each shard

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        if self.file is None:
            return ShardIndex, (self._about, self.arrays)
        return load_index, (self.file, False)  # workers that are not forked map the same file

    def shard_of(self, number: int) -> int:
        """The number of the shard that holds an image."""
        return int(np.searchsorted(self.starts, number, side="right")) - 1

    def text(self, column: str, number: int) -> str:
        """A text of an image: ``members``, or ``names`` (empty where that is the member's)."""
        return piece_of(self.arrays, column, number).decode("utf-8", "surrogateescape")

    def splits(self, names: Collection[str] | None = None) -> list[str]:
        """The names of the splits there are: in some shards, or in all."""
        return sorted({split for name, _, split in self.shards if split and (names is None or name in names)})

    def fingerprint(self) -> str:
        """A hash of the shards' names and of what lies where in them."""
        columns = (self.arrays[column] for column in ("starts", "offsets", "sizes", "members"))
        return hash_of(repr(self.shards), *columns)

    def save(self, file: Path, **extra: Any) -> bool:
        """Write it, whole or not at all, with anything JSON as `extra`; False where the place cannot be written."""
        return write_arrays(file, self._about | {"extra": extra}, self.arrays)


def load_index(file: Path, verify: bool = True) -> ShardIndex:
    """An index from the file that :meth:`ShardIndex.save` wrote, its checksum compared with ``verify``.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    read = read_arrays(
        file, verify, holding=["offsets", "sizes", "labels", "groups", "members", "names", "starts"]
    )
    if read is None or read[0].get("version") != VERSION:
        raise ValueError(f"{file} is damaged, or was written by another version")
    return ShardIndex(*read, file=file)


def make_index(
    shards: Sequence[ShardRows],
    class_names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
) -> ShardIndex:
    """The index of at least one shard whose images are known.

    Classes are those given, in that order, or those that occur, numbers by value, others by the alphabet; ``labels``
    is the class of each image, in the place of what the rows say.
    """
    table = pa.concat_tables([shard.rows for shard in shards])
    named = table["label"] if labels is None else pa.array(map(_raw, labels), pa.binary())
    classes, class_numbers = _numbered(named, class_names)
    groups, group_numbers = _numbered(table["group"])
    arrays = {column: table[name].to_numpy() for column, name in PLAIN_COLUMNS.items()}
    arrays |= {"labels": class_numbers, "groups": group_numbers}
    arrays["starts"] = np.cumsum([0, *(len(shard.rows) for shard in shards)], dtype=np.int64)
    arrays |= text_arrays("members", table["member"].to_pylist())
    renamed = table["name"].null_count < len(table)
    names = pc.coalesce(table["name"], table["member"]).to_pylist() if renamed else []
    about = {
        "version": VERSION,
        "shards": [(shard.name, shard.bytes, shard.split) for shard in shards],
        "class_names": classes,
        "group_names": groups,
        "ignored": dict(sum((Counter(shard.ignored) for shard in shards), Counter[str]())),
        "notes": list(dict.fromkeys(note for shard in shards for note in shard.notes)),
    }
    return ShardIndex(about, arrays | text_arrays("names", names))


def _numbered(texts: Any, names: Sequence[str] | None = None) -> tuple[list[str] | None, np.ndarray]:
    """The names, those that occur where none are given; the place of each text among them, -1 without one."""
    if names is None:
        occurring = (text.decode("utf-8", "surrogateescape") for text in pc.unique(texts).to_pylist() if text)
        names = in_order(set(occurring))
    numbers = pc.index_in(texts, value_set=pa.array(map(_raw, names), pa.binary()))
    return list(names) or None, pc.fill_null(numbers, -1).to_numpy().astype(np.int32)


def folder_classes(shards: Sequence[ShardRows]) -> list[str] | None:
    """The first folder in the members' names as the class of each image, as in a folder; None where it is none.

    It is none where an image has a label, where members lie outside of folders, and where there is only one.
    """
    if any(shard.rows["label"].null_count < len(shard.rows) for shard in shards):
        return None
    members = [member for shard in shards for member in shard.rows["member"].to_pylist()]
    folders = [
        member.decode("utf-8", "surrogateescape").removeprefix("./").split("/")[:-1] for member in members
    ]
    depth = int(all(parts and split_of(parts[0]) for parts in folders))
    if min(map(len, folders), default=0) <= depth:
        return None
    labels = [parts[depth] for parts in folders]
    return labels if len(set(labels)) > 1 else None


@dataclass
class _Sample:
    """The members of one key, as WebDataset groups them: ``000.jpg``, ``000.cls``."""

    key: str
    images: list[Row] = field(default_factory=list)
    label: str | None = None
    group: str | None = None
    name: str | None = None


def read_headers(name: str, file: BinaryIO, size: int) -> ShardRows:
    """The images of a tar of so many bytes, whose pixels are not read; a UserError where it is damaged or none."""
    suffixes, ignored = read_suffixes(), Counter[str]()
    rows: list[Row] = []
    others = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for sample in _samples(tar, suffixes, ignored):
                # The image of a sample: 000.jpg, not 000.mask.png; where there are none such, each is its own.
                plain = [row for row in sample.images if PurePosixPath(row.member).name.count(".") == 1]
                chosen = plain[:1] or sample.images
                others += len(sample.images) - len(chosen)
                rows += [
                    row._replace(label=sample.label, group=sample.group, name=sample.name) for row in chosen
                ]
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"DATA: the shard {name} is truncated, compressed or no tar ({brief(error, 100)}); fetch it again, or "
            "unpack it"
        ) from error
    notes = [f"Of samples with several images the first is read ({name} and others)."] if others else []
    return ShardRows(name, size, split_of_shard(name), pack_rows(rows), dict(ignored.most_common()), notes)


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


def _read_note(sample: _Sample, kind: str, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
    """The label in a ``.cls``; label, group and name in a ``.json``."""
    file = tar.extractfile(info)
    text = "" if file is None else file.read().decode("utf-8", "replace").strip()
    if kind == "cls":
        sample.label = text or sample.label
        return
    try:
        metadata = json.loads(text)
    except ValueError:
        return
    if isinstance(metadata, dict):
        label = next((metadata[key] for key in LABEL_KEYS if isinstance(metadata.get(key), str | int)), None)
        sample.label = sample.label or (None if label is None else str(label))
        sample.group = str(metadata["group"]) if metadata.get("group") is not None else None
        sample.name = metadata["name"] if isinstance(metadata.get("name"), str) else None


def split_of_shard(name: str) -> str | None:
    """The split that a shard's folder or file name tells.

    >>> split_of_shard("val/000001.tar"), split_of_shard("imagenet-train-000007.tar"), split_of_shard("7.tar")
    ('val', 'train', None)
    """
    *folders, file = name.split("/")
    words = [*folders[-1:], *re.split(r"[-_.]", file.removesuffix(".tar"))]
    return next((word for word in words if split_of(word)), None)
