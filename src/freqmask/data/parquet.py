"""Images in tables as Hugging Face lays them out: encoded files in one column, labels in another. Of parquet files, or
of its library: a data set fetched whole from the hub into its cache, or a copy saved on this machine.

Tables here and behind URLs are read alike, row group by row group; of those here every row group is kept.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from freqmask.console import counted, readable_bytes, say
from freqmask.data.cache import Arrays, PackedIndex, cache_file, hash_of, piece_of, replacing, text_arrays
from freqmask.data.decode import open_bytes, read_file, suffix_of
from freqmask.data.pixels import Picture
from freqmask.data.source import WINDOW_BLOCKS, BlockLayout, JoinedSource, PackedSource, Source, SourceSummary
from freqmask.data.splits import Located, number_classes, split_of, split_of_shard
from freqmask.data.storage import Files, RangeFile, visible
from freqmask.errors import BadImage, UserError, brief

HUB = "hf:"
IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "picture", "photo")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target", "y")
# Beyond this the images here are laid out once, uncompressed, in the cache, which processes map and share.
IN_MEMORY_BYTES = 1_000_000_000
KEPT_BYTES = 200_000_000  # of row groups from afar that a process keeps; a larger one is kept alone
READERS = 16  # requests under way at once while labels are read: one of a few kB for each row group
VERSION = 6


@dataclass
class Columns:
    """Which columns of a table matter."""

    image: str  # of the columns of encoded images the one of a usual name, else the first
    leaf: str  # what holds their bytes: ``image.bytes``, or the column itself
    label: str | None  # the column of classes, by its type in the metadata, else by its name; or None
    class_names: list[str] | None  # the names of the classes 0, 1, ..., as the metadata has them; or None
    has_paths: bool  # whether the images' own files are named beside their bytes
    notes: list[str]  # a sentence on other columns that hold as much, or none

    @property
    def small(self) -> list[str]:
        """The columns that are read ahead, by their whole paths."""
        return [f"{self.image}.path"] * self.has_paths + ([self.label] if self.label else [])

    @classmethod
    def of(cls, schema: pa.Schema, where: object) -> Columns:
        """The columns of a schema with Hugging Face's metadata or without.

        Raises:
            UserError: none of them holds images; ``where`` names the file.
        """
        structs = [f for f in schema if _is_bytes(_part(f.type, "bytes"))]
        plain = [f for f in schema if _is_bytes(f.type)]
        if not structs and not plain:
            hint = f"it has {', '.join(map(repr, schema.names)) or 'no columns'}"
            raise UserError(
                f"DATA ({where}) must hold a column of encoded images (a struct of bytes and path, or bytes); {hint}"
            )
        found = [*structs, *plain]
        image = next((f for name in IMAGE_COLUMNS for f in found if f.name.lower() == name), found[0])
        alike = structs if image in structs else plain
        others = " or ".join(f.name for f in alike if f.name != image.name)
        features = _features(schema)
        able = [field.name for field in schema if _is_number(field.type) or _is_text(field.type)]
        named = [name for name in able if features.get(name, {}).get("_type") == "ClassLabel"]
        usual = [n for case in (str, str.lower) for known in LABEL_COLUMNS for n in able if case(n) == known]
        labels = list(dict.fromkeys([*(name for name in usual if name in named), *named, *usual]))
        label = labels[0] if labels else None
        notes = [f"Images are read from the column {image.name}, not from {others}."] if others else []
        if len(labels) > 1:
            notes += [f"Labels are read from the column {label}, not from {' or '.join(labels[1:])}."]
        names = features.get(label or "", {}).get("names")
        return cls(
            image.name,
            f"{image.name}.bytes" if image in structs else image.name,
            label,
            [str(name) for name in names] if isinstance(names, list) else None,
            _is_text(_part(image.type, "path")),
            notes,
        )


def _part(kind: pa.DataType, name: str) -> pa.DataType:
    """The type of a struct's field, or of nothing where there is none."""
    known = pa.types.is_struct(kind) and kind.get_field_index(name) >= 0
    return kind.field(name).type if known else pa.null()


def _of_cells(kind: pa.DataType) -> pa.DataType:
    """The type of a column's cells, also of those that are numbered, as pandas does with categories."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    return _of_cells(kind) in (pa.binary(), pa.large_binary())


def _is_text(kind: pa.DataType) -> bool:
    return _of_cells(kind) in (pa.string(), pa.large_string())


def _is_number(kind: pa.DataType) -> bool:
    cells = _of_cells(kind)
    return bool(pa.types.is_integer(cells) or pa.types.is_floating(cells) or pa.types.is_boolean(cells))


def _values(cells: pa.ChunkedArray) -> list[Any]:
    """Cells in Python; texts as those of files' names, because nothing makes a writer keep to UTF-8."""
    if not _is_text(cells.type):
        return list(cells.to_pylist())
    texts = cells.cast(_of_cells(cells.type)).cast(pa.large_binary()).to_pylist()
    return [text if text is None else text.decode("utf-8", "surrogateescape") for text in texts]


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's metadata says of the columns, or nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"].items()
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: feature for name, feature in features if isinstance(feature, dict)}


def locate_tables(files: Files, names: Sequence[str], where: str, named: bool) -> Located:
    """The images of parquet files, in order; splits by the names of their folders or files.

    Those of a folder, which nobody ``named`` one by one, must be of one data set: a UserError where they lie in
    several folders, which are the configurations of one.
    """
    tables = names if named else visible(names)
    parts = [PurePosixPath(name).parts[:-1] for name in tables]
    folders = {"/".join(p for p in above if p != "data" and not split_of(p)) for above in parts}
    if len(folders) > 1 and not named:
        some = sorted(folder or "the folder itself" for folder in folders)
        raise UserError(
            f"DATA ({where}) holds tables of {len(folders)} data sets ({', '.join(some[:8])}); name one: "
            f"{where.rstrip('/')}/{max(folders)}"
        )
    by_split: dict[str, list[str]] = {}
    for name in tables:
        split = split_of_shard(name) or re.split(r"[-_.]", PurePosixPath(name).name)[0]
        by_split.setdefault(split, []).append(name)
    return Located(
        where,
        lambda split, notes: TableSource(files, tables if split is None else by_split[split], notes),
        sorted(by_split),
    )


class TableIndex(PackedIndex):
    """The row groups of some parquet files, one behind the other."""

    kind, version = "tables", VERSION
    columns = ("starts", "labels", "group_files", "group_numbers", "group_bytes", "paths", "footers")

    def __init__(self, about: dict[str, Any], arrays: Arrays, file: Path | None = None) -> None:
        super().__init__(about, arrays, file)
        self.files = [(str(name), int(size)) for name, size in about["files"]]  # name and bytes
        self.image_leaf: str = about["image_leaf"]  # the column of encoded images: image.bytes
        self._footers: dict[int, pq.FileMetaData] = {}

    def footer(self, file: int) -> pq.FileMetaData:
        """What the end of a file says of it."""
        if file not in self._footers:
            self._footers[file] = pq.read_metadata(pa.BufferReader(piece_of(self.arrays, "footers", file)))
        return self._footers[file]


def _read_index(files: Files, names: Sequence[str]) -> tuple[dict[str, Any], Arrays]:
    """Footers, labels and paths of all files."""
    if files.remote:
        say(
            f"index       reading footers and labels of {counted(len(names), 'table')} of {files.where}, once"
        )
    sizes = [(name, files.state(name)[0]) for name in names]
    with ThreadPoolExecutor(READERS) as pool:
        footers = list(pool.map(lambda file: _read_footer(files, file[0]), sizes))
        columns = Columns.of(footers[0].schema.to_arrow_schema(), files.url(sizes[0][0]))
        groups = [(k, g) for k, footer in enumerate(footers) for g in range(footer.num_row_groups)]
        groups = [(k, g) for k, g in groups if footers[k].row_group(g).num_rows]
        if not groups:
            raise UserError(f"DATA ({files.url(sizes[0][0])}) holds no rows; check how it was written")
        image_bytes: list[int] = []
        for (name, size), footer in zip(sizes, footers, strict=True):
            leaves = [footer.schema.column(k).path for k in range(len(footer.schema))]
            lacking = [column for column in (columns.label, columns.leaf) if column and column not in leaves]
            if lacking:
                raise UserError(f"DATA: {files.url(name)} lacks the column {lacking[0]} of the first file")
            try:
                image_bytes += _image_bytes(footer, size, leaves.index(columns.leaf))
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"DATA ({files.url(name)}) is damaged; write or fetch it again") from error

        def small(place: tuple[int, int]) -> pa.Table:
            name = sizes[place[0]][0]
            try:
                return _read_group(files, name, footers[place[0]], place[1], columns.small)
            except FileNotFoundError:
                raise
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"DATA: {files.url(name)} is damaged; write or fetch it again") from error

        tables = list(pool.map(small, groups)) if columns.small else []
    labels = [value for t in tables for value in _values(t[columns.label])] if columns.label else []
    texts = [path for t in tables for path in _paths(t, columns.image)] if columns.has_paths else []
    numbers, classes = number_classes(labels, columns.class_names)
    counts = [footers[k].row_group(g).num_rows for k, g in groups]
    arrays: Arrays = {
        "starts": np.cumsum([0, *counts], dtype=np.int64),
        "group_files": np.array([k for k, _ in groups], np.int32),
        "group_numbers": np.array([g for _, g in groups], np.int32),
        "group_bytes": np.array(image_bytes, np.int64),
        "labels": numbers,
        **text_arrays("paths", [text.encode("utf-8", "surrogateescape") for text in texts]),
        **text_arrays("footers", [_serialized(footer) for footer in footers]),
    }
    about = {"version": VERSION, "files": sizes, "image_leaf": columns.leaf, "notes": columns.notes}
    return {**about, "class_names": classes if labels else None}, arrays


def _paths(table: pa.Table, column: str) -> list[str]:
    """What the images of one file are called, nothing where it does not say, though the first one does."""
    if column not in table.column_names:
        return [""] * table.num_rows
    return [text or "" for text in _values(pc.struct_field(table[column], "path"))]


def _read_footer(files: Files, name: str) -> pq.FileMetaData:
    where = files.url(name)
    try:
        with files.stream(name, 0) as file:
            footer = pq.ParquetFile(file).metadata
        footer.schema.to_arrow_schema()  # what is damaged in it raises here, where the file has a name
        return footer
    except (FileNotFoundError, PermissionError):
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"DATA ({where}) is truncated or no parquet file; write or fetch it again") from error


def _read_group(
    files: Files, name: str, footer: pq.FileMetaData, group: int, leaves: Sequence[str]
) -> pa.Table:
    """Some columns of a row group, by their whole paths; a request for those that lie side by side."""
    with files.stream(name, 0) as file:
        table = pq.ParquetFile(file, metadata=footer, pre_buffer=True)
        return table.read_row_group(group, columns=list(leaves), use_threads=False)


def _serialized(footer: pq.FileMetaData) -> bytes:
    sink = pa.BufferOutputStream()
    footer.write_metadata_file(sink)
    return sink.getvalue().to_pybytes()


def _image_bytes(footer: pq.FileMetaData, size: int, leaf: int) -> list[int]:
    """What the images of each row group with rows take; raises where the footer of a file of ``size`` is damaged.

    Asked for a damaged column, pyarrow's metadata ends the process: nothing catches what C++ throws there. To begin
    to read the column raises the same as an error, before the first byte is asked for.
    """

    def unread(start: int, stop: int) -> bytes:
        raise _SoundError

    table, path = pq.ParquetFile(RangeFile(unread, size), metadata=footer), footer.schema.column(leaf).path
    sizes = []
    for group in range(footer.num_row_groups):
        if footer.row_group(group).num_rows:
            with contextlib.suppress(_SoundError):
                table.read_row_group(group, columns=[path], use_threads=False)
            sizes.append(footer.row_group(group).column(leaf).total_uncompressed_size)
    return sizes


class _SoundError(Exception):
    """A column is so far in order that its bytes are asked for."""


class TableSource(PackedSource):
    """The images of some parquet files of one layout, in order.

    Raises:
        UserError: one of them is missing, damaged, or without images; or all are empty.
    """

    kind = "parquet table"
    index: TableIndex

    def __init__(self, files: Files, names: Sequence[str], notes: Sequence[str] = ()) -> None:
        index = TableIndex.cached(files, names, lambda: TableIndex(*_read_index(files, names)))
        super().__init__(files, index, [*index.about["notes"], *notes])
        sizes = self.index.arrays["group_bytes"]  # what their images take in memory
        self.window = min(max(KEPT_BYTES // max(int(sizes.max()), 1), 1), WINDOW_BLOCKS)
        self.most_kept = self.window if files.remote else len(sizes)
        self._laid_out = not files.remote and int(sizes.sum()) > IN_MEMORY_BYTES

    def encoded(self, index: int) -> tuple[bytes, str]:
        data = self._bytes(index)
        return data, suffix_of(data, self.index.text("paths", index))

    def _bytes(self, index: int) -> bytes:
        self.check(index)
        first, files = self.index.part_of(index), self.index.arrays["group_files"]
        if self._laid_out:  # a file is kept as one block
            first = int(files.searchsorted(files[first]))
        with self._lock:  # threads that want the same row group wait for one request
            self._keep(first, self._kept[first] if first in self._kept else self._fetch(first))
            images = self._kept[first]
        data: bytes | None = images[index - int(self.index.starts[first])].as_py()
        if data is None:
            raise BadImage("its row holds no bytes, only a path at most")
        return data

    def _fetch(self, group: int) -> pa.ChunkedArray:
        """The encoded images, bytes or null, of a row group; of one that begins a file that is laid out, of all."""
        file, number = (int(self.index.arrays[name][group]) for name in ("group_files", "group_numbers"))
        name = self.index.files[file][0]
        self.files.refuse_changed(name, self._states[name])
        try:
            if self._laid_out:
                return _mapped(Path(self.files.url(name)), self.index.image_leaf)
            table = _read_group(self.files, name, self.index.footer(file), number, [self.index.image_leaf])
            return _bytes_of_cells(table.column(0))
        except FileNotFoundError as error:
            raise BadImage(f"the table {name} is gone") from error
        except (pa.ArrowException, OSError, IndexError) as error:
            raise BadImage(f"the table {name} is damaged in its row group {number}") from error

    def blocks(self) -> BlockLayout | None:
        if not self.files.remote:
            return None
        sizes = np.diff(self.index.starts)
        return BlockLayout(np.repeat(np.arange(len(sizes)), sizes), self.window, whole=True)

    def name(self, index: int) -> str:
        path = self.index.text("paths", index)
        return f"{index}:{path}" if path else str(index)

    def fingerprint(self) -> str:
        return hash_of(*(f"{PurePosixPath(name).name}\0{size}\0" for name, size in self.index.files))

    def summary(self) -> SourceSummary:
        largest = readable_bytes(int(self.index.arrays["group_bytes"].max()))
        read = f"in row groups of up to {largest}, the images of {self.window} of them mixed"
        return self._summary(len(self.index.files), f"Tables are read over the network {read}")


def _bytes_of_cells(cells: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    return pc.struct_field(cells, "bytes") if pa.types.is_struct(cells.type) else cells


def _mapped(file: Path, leaf: str) -> pa.ChunkedArray:
    """The images of a large file, laid out uncompressed in the cache and mapped."""
    state = file.stat()
    cached = cache_file("images", str(file.absolute()), state.st_size, state.st_mtime_ns, leaf)
    whole = False
    with contextlib.suppress(pa.ArrowException, OSError):
        whole = bool(pa.ipc.open_file(pa.memory_map(str(cached))).num_record_batches)  # it stands at the end
    if not whole:
        try:
            schema = pa.schema([("images", pa.large_binary())])
            with (
                replacing(cached) as temporary,
                pa.OSFile(str(temporary), "wb") as sink,
                pa.ipc.new_file(sink, schema) as writer,
            ):
                for batch in pq.ParquetFile(file).iter_batches(batch_size=256, columns=[leaf]):
                    images = _bytes_of_cells(batch.column(0)).cast(pa.large_binary())
                    writer.write_batch(pa.record_batch([images], schema))
        except pa.ArrowException as error:
            raise UserError(f"DATA ({file}) is damaged; fetch it again") from error
        except OSError as error:
            raise UserError(
                f"DATA ({file}) cannot be laid out in {cached.parent} ({error.strerror or error}); make room "
                "there, or name another place by XDG_CACHE_HOME"
            ) from error
    return pa.ipc.open_file(pa.memory_map(str(cached))).read_all().column(0)


def locate_dataset(data: str | Path) -> Located:
    """The images of ``hf:NAME``, ``hf:NAME:CONFIG``, or a folder of ``datasets.save_to_disk``; else a UserError."""
    splits = _load(data)

    def open_split(chosen: str | None, notes: list[str]) -> Source:
        if chosen is not None:
            return HuggingFaceSource(splits[chosen], chosen, str(data), notes)
        sources = [HuggingFaceSource(split, name, str(data)) for name, split in splits.items()]
        return sources[0] if len(sources) == 1 else JoinedSource(sources)

    return Located(str(data), open_split, sorted(name for name in splits if name))


def _load(data: str | Path) -> dict[str, Any]:
    """Split (or "") -> dataset."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"DATA ({data}) needs datasets; pip install 'freqmask[data]'") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every try
    try:
        if isinstance(data, Path):
            loaded = datasets.load_from_disk(str(data))
        else:
            name, _, config = data.removeprefix(HUB).partition(":")
            say(
                f"data        fetching {data} into Hugging Face's cache (hf://datasets/{name} would read it where "
                "it is)"
            )
            loaded = datasets.load_dataset(*([name, config] if config else [name]))
    except Exception as error:  # the hub, the network, the file system and scripts each raise their own
        raise UserError(
            f"DATA ({data}) cannot be opened ({brief(error, 300)}); check name and connection"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        return {str(name): split for name, split in loaded.items()}
    return {"": loaded}


class HuggingFaceSource(Source):
    """One split of a ``datasets.Dataset``; its images stay encoded until they are asked for.

    A UserError where there is no column of images, or no row; it names DATA as it was typed in ``where``.
    """

    kind = "Hugging Face dataset"

    def __init__(self, dataset: Any, split: str, where: str, notes: list[str] | None = None) -> None:
        from datasets import Image

        columns = Columns.of(dataset.features.arrow_schema, where)
        self.split, self.notes = split, [*columns.notes, *(notes or [])]
        column = columns.image
        if len(dataset) == 0:
            raise UserError(f"DATA ({where}) holds no rows; check how it was written")
        self._fingerprint = f"{dataset._fingerprint} {column} {len(dataset)}"
        if columns.label is not None:
            labels = dataset.select_columns([columns.label]).with_format(None)[:][columns.label]
            self._labels, self.class_names = number_classes(list(labels), columns.class_names)
        images = dataset.select_columns([column]).with_format(None)
        if isinstance(dataset.features[column], Image):
            images = images.cast_column(column, Image(decode=False))
        self._images, self._column = images, column

    def __len__(self) -> int:
        return len(self._images)

    def open(self, index: int) -> Picture:
        return open_bytes(self.encoded(index)[0])

    def encoded(self, index: int) -> tuple[bytes, str]:
        self.check(index)
        cell = self._images[index][self._column]
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if data is None:
            if path is None:
                raise BadImage("its row holds no image")
            data = read_file(Path(path))
        return data, suffix_of(data, path or "")

    def name(self, index: int) -> str:
        return f"{self.split}-{index}" if self.split else str(index)

    def fingerprint(self) -> str:
        return hash_of(self._fingerprint)
