"""Images in tar shards as WebDataset lays them out, each read by its place in the tar: any one, at any time.

Where each lies is told from headers, as compact arrays, kept beside the shards or cached.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from freqmask.console import counted, say
from freqmask.data.cache import Arrays, PackedIndex, hash_of, text_arrays
from freqmask.data.decode import read_suffixes
from freqmask.data.source import (
    WINDOW_BLOCKS,
    BlockLayout,
    PackedSource,
    Source,
    SourceSummary,
    Subset,
    in_order,
)
from freqmask.data.splits import Located, split_of, split_of_shard
from freqmask.data.storage import INDEX_NAME, PARTS, Files, State
from freqmask.errors import BadImage, UserError, brief, describe_os_error
from freqmask.rng import identity_of

BLOCK_BYTES = 4_000_000
# What a worker's window needs, and a few more for a window that ends while the next one begins.
KEPT_BLOCKS = WINDOW_BLOCKS + 8
SPOKEN_BYTES = 1_000_000_000  # reading the headers of more than this takes long enough to be told
HEADER_READERS = 8
VERSION = 1
SCHEMA = pa.schema([
    ("member", pa.large_binary()), ("offset", pa.int64()), ("size", pa.int64()), ("label", pa.binary()),
    ("group", pa.binary()), ("name", pa.large_binary()), ("height", pa.uint32()), ("width", pa.uint32()),
    ("channels", pa.uint16()), ("bits", pa.uint8()),
])  # fmt: skip
"""Of rows as a table."""
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


class ShardIndex(PackedIndex):
    """The images of some shards."""

    kind, version = "shards", VERSION
    of_images = ("offsets", "sizes", "labels", "groups")
    columns = (*of_images, "members", "members_ends", "names", "names_ends", "starts")

    def __init__(self, about: dict[str, Any], arrays: Arrays, file: Path | None = None) -> None:
        super().__init__(about, arrays, file)
        self.shards = [(str(name), int(size), split) for name, size, split in about["shards"]]
        self.group_names: list[str] | None = about["group_names"]
        self.notes: list[str] = list(about["notes"])
        self.ignored: dict[str, int] = dict(about["ignored"])  # suffix -> members that are not read

    def is_sound(self) -> bool:
        fitting = len(self.shards) == len(self.starts) - 1
        named = self.arrays["groups"].max(initial=-1) < len(self.group_names or ())
        ends = (len(self.arrays["members_ends"]), len(self.arrays["names_ends"]))
        return fitting and named and set(ends) <= {1, len(self) + 1} and super().is_sound()

    def splits(self, names: Collection[str] | None = None) -> list[str]:
        """The names of the splits there are: in some shards, or in all."""
        return sorted({split for name, _, split in self.shards if split and (names is None or name in names)})


def make_index(
    shards: Sequence[ShardRows],
    class_names: Sequence[str] | None = None,
    labels: pa.ChunkedArray | None = None,
) -> ShardIndex:
    """The index of at least one shard whose images are known.

    Classes are those given, in that order, or those that occur, numbers by value, others by the alphabet; ``labels``
    is the class of each image, in the place of what the rows say.
    """
    table = pa.concat_tables([shard.rows for shard in shards])
    named = table["label"] if labels is None else labels.cast(pa.binary())
    classes, class_numbers = _numbered(named, class_names)
    groups, group_numbers = _numbered(table["group"])
    arrays = {f"{name}s": table[name].to_numpy() for name in ("offset", "size", "height", "width")}
    arrays |= {name: table[name].to_numpy() for name in ("channels", "bits")}
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


def folder_classes(shards: Sequence[ShardRows]) -> tuple[pa.ChunkedArray | None, list[str]]:
    """The folder in the members' names that is the class of each image, as in a folder; None where there is none.

    That is the first below those that hold everything (``tar cf photos.tar photos``) and below train and val, which
    are named, too. There is none where an image has a label, where members lie outside of folders, or all in one.
    """
    if any(shard.rows["label"].null_count < len(shard.rows) for shard in shards):
        return None, []
    members = pa.concat_tables([shard.rows for shard in shards])["member"]
    # pyarrow, because a million take 1.5 seconds in Python
    members = pc.replace_substring_regex(members, r"^\./", "")
    splits: list[str] = []
    while len(members):
        parts = pc.split_pattern(members, "/", max_splits=1)  # (image,) the first folder, and what lies below
        if pc.min(pc.list_value_length(parts)).as_py() < 2:
            break
        tops, members = (pc.list_element(parts, place) for place in (0, 1))
        names = pc.unique(tops).to_pylist()
        kinds = {split_of(os.fsdecode(name)) for name in names}
        if len(names) > 1 and (None in kinds or splits):
            return tops, splits
        splits = splits or (sorted(map(os.fsdecode, names)) if len(names) > 1 else [])
    return None, splits


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
    others = apart = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for sample in _samples(tar, suffixes, ignored):
                # The image of a sample: 000.jpg, not 000.mask.png; where there are none such, each is its own.
                plain = [row for row in sample.images if PurePosixPath(row.member).name.count(".") == 1]
                chosen = plain[:1] or sample.images
                others += len(sample.images) - len(chosen)
                apart += not chosen and sample.label is not None
                told: dict[str, Any] = {"label": sample.label, "group": sample.group, "name": sample.name}
                rows += [row._replace(**told) for row in chosen]
            # tarfile takes a damaged header for the end, and all images behind it would be missing in silence
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset:,}")
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"DATA: the shard {name} is truncated, compressed or no tar ({brief(error, 100)}); fetch it again, or "
            "unpack it"
        ) from error
    notes = [f"Of samples with several images the first is read ({name} and others)."] if others else []
    if apart:
        notes.append(
            f"{apart:,} labels of {name} are left out, not standing beside their images (tar --sort=name)."
        )
    return ShardRows(name, size, split_of_shard(name), pack_rows(rows), dict(ignored.most_common()), notes)


def _samples(tar: tarfile.TarFile, suffixes: frozenset[str], ignored: Counter[str]) -> Iterator[_Sample]:
    """Members of one key stand one behind the other; a hard link has the bytes of the member that it names."""
    sample, files = _Sample(""), dict[str, tarfile.TarInfo]()
    for info in tar:
        path, file = PurePosixPath(info.name), files.get(info.linkname) if info.islnk() else info
        if info.isdir() or path.name.startswith("."):
            continue
        if file is None or not file.isreg():  # a link to what is not there, or may be elsewhere
            ignored[path.suffix.lower()] += 1
            continue
        files[info.name] = file
        stem, _, extension = path.name.partition(".")
        key = str(path.with_name(stem))
        if key != sample.key:
            yield sample
            sample = _Sample(key)
        suffix = path.suffix.lower()
        if suffix in suffixes:
            sample.images.append(Row(info.name, file.offset_data, file.size))
        elif extension.lower() in ("cls", "json") and file.size <= LARGEST_NOTE:
            _read_note(sample, extension.lower(), tar, file)
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
    except (ValueError, RecursionError):
        return
    if isinstance(metadata, dict):
        label = next((metadata[key] for key in LABEL_KEYS if isinstance(metadata.get(key), str | int)), None)
        sample.label = sample.label or (None if label is None else str(label))
        sample.group = str(metadata["group"]) if metadata.get("group") is not None else None
        sample.name = metadata["name"] if isinstance(metadata.get("name"), str) else None


def find_index(files: Files, names: Sequence[str] | None, where: str) -> ShardIndex:
    """The index beside the shards (None for all of them), that in the cache, or a new one from their headers."""
    beside = _index_beside(files, names, where)
    if beside is not None:
        return beside
    listed = files.names() if names is None else list(names)
    if names is None and not files.remote and Path(files.url(PARTS)).is_dir():
        raise UserError(
            f"DATA ({where}) is not finished: freqmask prepare was cut short there; the same command resumes it"
        )
    if not listed:
        raise UserError(f"DATA ({where}) holds no .tar; check its spelling, or name the shards")

    def make() -> ShardIndex:
        shards = _read_all_headers(files, listed)
        labels, splits = folder_classes(shards)
        if splits:
            words = "lie side by side in the shards, and all are used; unpacked they are parts"
            shards[0].notes.append(f"{' and '.join(splits)} {words}, as by --labels with a column split.")
        return make_index(shards, labels=labels)

    return ShardIndex.cached(files, listed, make, sorted(read_suffixes()), "hard links", "wrapping folders")


def _index_beside(files: Files, names: Sequence[str] | None, where: str) -> ShardIndex | None:
    file = files.index_file
    if file is None:
        return None
    with file.open("rb"):
        pass  # one that may not be read is not damaged
    try:
        index = ShardIndex.load(file)
    except ValueError as error:
        raise UserError(
            f"DATA ({where}): its {INDEX_NAME} is damaged, or was written by another version; fetch it again, or "
            "delete it to have it made anew"
        ) from error
    sizes = {name: size for name, size, _ in index.shards}
    if names is not None and not set(names) <= set(sizes):
        return None
    states: dict[str, State] = {}
    for name in () if files.remote else names or sizes:  # asking a server for each would take long
        try:
            states[name] = files.state(name)
        except FileNotFoundError as error:
            raise UserError(
                f"DATA ({where}) lacks the shard {name}, which its {INDEX_NAME} lists; fetch it, or name those "
                "that are there by a pattern"
            ) from error
        if states[name][0] != sizes[name]:
            raise UserError(
                f"DATA ({where}): the shard {name} has {states[name][0]:,} bytes, not the {sizes[name]:,} of its "
                f"{INDEX_NAME}; fetch it again, or delete {INDEX_NAME} to have it made anew"
            )
    index.states = states
    added = sorted({*files.names()} - {*sizes}) if names is None and not files.remote else []
    if added:
        index.notes.append(
            f"{counted(len(added), 'shard')} (such as {added[0]}) that {INDEX_NAME} does not list: not read; delete "
            f"{INDEX_NAME} to have it made anew."
        )
    return index


def _read_all_headers(files: Files, names: Sequence[str]) -> list[ShardRows]:
    sizes = [files.state(name)[0] for name in names]
    if files.remote or sum(sizes) > SPOKEN_BYTES:
        say(f"index       reading the headers of {counted(len(names), 'shard')} of {files.where}, once")

    def read(name: str, size: int) -> ShardRows:
        try:
            with files.stream(name) as file:
                return read_headers(name, file, size)
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            raise UserError(f"DATA ({files.url(name)}) cannot be read: {describe_os_error(error)}") from error

    with ThreadPoolExecutor(HEADER_READERS) as pool:
        return list(pool.map(read, names, sizes))


class ShardSource(PackedSource):
    """The images of some shards, by the index of what lies where in them."""

    kind, most_kept = "shard", KEPT_BLOCKS
    index: ShardIndex

    def __init__(self, files: Files, index: ShardIndex, notes: Sequence[str] = ()) -> None:
        super().__init__(files, index, [*index.notes, *notes])
        self._blocks: np.ndarray | None = None
        if files.remote:  # (image,) the piece of about 4 MB that each lies in, none over the end of a shard
            shards = np.repeat(np.arange(len(index.shards)), np.diff(index.starts))
            pieces = index.arrays["offsets"] // BLOCK_BYTES
            changes = (np.diff(shards, prepend=-1) != 0) | (np.diff(pieces, prepend=-1) != 0)
            self._blocks = np.cumsum(changes, dtype=np.int32) - np.int32(1)

    def _shard(self, index: int) -> str:
        return self.index.shards[self.index.part_of(index)][0]

    def _bytes(self, index: int) -> bytes:
        self.check(index)
        shard, start = self._shard(index), int(self.index.arrays["offsets"][index])
        stop = start + int(self.index.arrays["sizes"][index])
        try:
            data = self._fetch(index, shard, start, stop)
        except FileNotFoundError as error:
            raise BadImage(f"the shard {shard} is gone") from error
        except OSError as error:
            raise BadImage(f"the shard {shard} cannot be read ({error.strerror or error})") from error
        if len(data) < stop - start:
            raise BadImage(f"the shard {shard} is truncated")
        if not self.files.remote:
            self.files.refuse_changed(shard, self._states[shard])
        return data

    def _fetch(self, index: int, shard: str, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop`` of a shard, which are those of an image.

        Of one behind a URL the first look into a block fetches its image alone, the second one the whole block, which
        is then kept. So images here and there cost what they weigh, and reading in order two requests a block.
        """
        if self._blocks is None:
            return self.files.read(shard, start, stop)
        block = int(self._blocks[index])
        with self._lock:
            seen, kept = block in self._kept, self._kept.get(block)
            self._keep(block, kept)
        if not seen:
            return self.files.read(shard, start, stop)
        if kept is None:
            first, last = np.searchsorted(self._blocks, [block, block + 1])
            offsets, sizes = (self.index.arrays[name][first:last] for name in ("offsets", "sizes"))
            begin, end = int(offsets.min()), int((offsets + sizes).max())  # hard links lie before their names
            kept = begin, self.files.read(shard, begin, end)
            with self._lock:
                self._keep(block, kept)
        begin, data = kept
        return bytes(data[start - begin : stop - begin])

    def blocks(self) -> BlockLayout | None:
        return None if self._blocks is None else BlockLayout(self._blocks)

    def encoded(self, index: int) -> tuple[bytes, str]:
        return self._bytes(index), PurePosixPath(self.index.text("members", index)).suffix.lower()

    def name(self, index: int) -> str:
        """What the image was called before it was packed, or the member behind its shard's name."""
        named = self.index.text("names", index)
        return named or f"{self._shard(index).removesuffix('.tar')}/{self.index.text('members', index)}"

    def identity(self, index: int) -> int:
        shard = PurePosixPath(self._shard(index)).name
        return identity_of(f"{shard}/{self.index.text('members', index)}".encode(errors="surrogateescape"))

    def group(self, index: int) -> str | None:
        number = int(self.index.arrays["groups"][index])
        return None if number < 0 or self.index.group_names is None else self.index.group_names[number]

    def fingerprint(self) -> str:
        """A hash of the shards' names and of what lies where in them."""
        columns = (self.index.arrays[column] for column in ("starts", "offsets", "sizes", "members"))
        return hash_of(repr(self.index.shards), *columns)

    def summary(self) -> SourceSummary:
        read = "Shards are read over the network in pieces of 4 MB, mixed within windows of 16 pieces"
        return replace(self._summary(len(self.index.shards), read), ignored=dict(self.index.ignored))


def locate_shards(files: Files, names: Sequence[str] | None, where: str) -> Located:
    """The images of shards (None: all); their splits are told by the folders that they lie in, or by their names."""
    index = find_index(files, names, where)
    if len(index) == 0:
        counts = [f"{count:,} {suffix or 'without suffix'}" for suffix, count in index.ignored.items()]
        raise UserError(f"DATA ({where}) holds no images ({', '.join(counts) or 'the shards are empty'})")

    def open_split(chosen: str | None, notes: list[str]) -> Source:
        used = [
            (chosen is None or split == chosen) and (names is None or name in names)
            for name, _, split in index.shards
        ]
        source = ShardSource(files, index, [] if all(used) else notes)
        if all(used):
            return source
        return Subset(source, np.flatnonzero(np.repeat(used, np.diff(index.starts))))

    return Located(where, open_split, index.splits(names))
