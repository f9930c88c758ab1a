"""Images in parquet tables as Hugging Face lays them out: encoded files in one column, labels in another.

Tables here and behind URLs are read alike, row group by row group; of those here every row group is kept.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from freqmask.console import readable_bytes, say
from freqmask.data.cache import (
    cache_file,
    hash_of,
    piece_of,
    read_arrays,
    replacing,
    text_arrays,
    write_arrays,
)
from freqmask.data.decode import open_bytes, suffix_of
from freqmask.data.pixels import Picture
from freqmask.data.source import WINDOW_BLOCKS, BlockLayout, Source, SourceSummary
from freqmask.data.splits import Located, split_of
from freqmask.data.storage import Files, Unchanged
from freqmask.errors import BadImage, UserError, nearest

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "y")
MOST_NUMBERED = (
    100_000  # numbers up to there are classes by their value; ids beyond are classes by their order
)
# Beyond this the images here are laid out once, uncompressed, in the cache, which processes map and share.
IN_MEMORY_BYTES = 1_000_000_000
KEPT_BYTES = 200_000_000  # of row groups from afar that a process keeps; a larger one is kept alone
_ARRAYS = ("starts", "labels", "group_files", "group_numbers", "group_bytes", "paths", "footers")
CLASS_KINDS = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
READERS = 16  # requests under way at once while labels are read: one of a few kB for each row group
VERSION = 2


@dataclass
class Columns:
    """Which columns of a table matter."""

    image: str  # the first column of encoded images
    leaf: str  # what holds their bytes: ``image.bytes``, or the column itself
    label: str | None  # the column of classes, by its type in the metadata, else by its name; or None
    class_names: list[str] | None  # the names of the classes 0, 1, ..., as the metadata has them; or None
    has_paths: bool  # whether the images' own files are named beside their bytes

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
        structs = [f for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
        plain = [f for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
        if not structs and not plain:
            hint = nearest("image", schema.names) if schema.names else "it has no columns"
            raise UserError(
                f"DATA ({where}) must hold a column of encoded images (a struct of bytes and path, or bytes); {hint}"
            )
        image = [*structs, *plain][0]
        features = _features(schema)
        kinds = {field.name: field.type for field in schema}
        named = [name for name in kinds if features.get(name, {}).get("_type") == "ClassLabel"]
        usual = [
            name for name in LABEL_COLUMNS if name in kinds and any(is_a(kinds[name]) for is_a in CLASS_KINDS)
        ]
        label = next(iter([*named, *usual]), None)
        names = features.get(label or "", {}).get("names")
        return cls(
            image.name,
            f"{image.name}.bytes" if structs else image.name,
            label,
            [str(name) for name in names] if isinstance(names, list) else None,
            bool(structs) and image.type.get_field_index("path") >= 0,
        )


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's metadata says of the columns, or nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def number_classes(
    values: Sequence[int | str | None], names: list[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Labels counted from 0, int64 (image,) and -1 where there is none, and what they are called.

    Values are a name or a number of each image, None or negative without one; names are those of 0, 1, ... if known.

    >>> number_classes(["dog", None, "cat"])[1], number_classes([2, -1, 0])[0].tolist()
    (['cat', 'dog'], [2, -1, 0])
    """
    known = {value for value in values if value is not None and not (isinstance(value, int) and value < 0)}
    if names is None and all(isinstance(value, int) for value in known):
        largest = max((int(value) for value in known), default=-1)
        names = [str(number) for number in range(largest + 1)] if largest < MOST_NUMBERED else None
    places: dict[Any, int]
    if names is not None:
        places = {number: number for number in range(len(names))}
    else:
        ordered = sorted(known, key=lambda value: (isinstance(value, str), value))
        places, names = {value: place for place, value in enumerate(ordered)}, [str(v) for v in ordered]
    return np.array([places.get(value, -1) for value in values], np.int64), names


def tables_of_one(names: Iterable[str], where: str) -> list[str]:
    """The parquet files among some names, all of one data set.

    Raises:
        UserError: they lie in several folders, which are the configurations of a data set.
    """
    tables = sorted(name for name in names if name.lower().endswith(".parquet"))
    parts = {name: PurePosixPath(name).parts[:-1] for name in tables}
    folders = {"/".join(p for p in parts[name] if p != "data" and not split_of(p)) for name in tables}
    if len(folders) > 1:
        some = sorted(folder or "the folder itself" for folder in folders)
        raise UserError(
            f"DATA ({where}) holds tables of {len(folders)} data sets ({', '.join(some[:8])}); name one: "
            f"{where.rstrip('/')}/{max(folders)}"
        )
    return tables


def locate_tables(files: Files, tables: Sequence[str], where: str) -> Located:
    """The images of parquet files, in order; splits by the folders' names, or else by how the files' names begin."""
    by_split: dict[str, list[str]] = {}
    for name in tables:
        path = PurePosixPath(name)
        split = path.parent.name if split_of(path.parent.name) else re.split(r"[-_.]", path.name)[0]
        by_split.setdefault(split, []).append(name)
    return Located(
        where,
        lambda split, notes: TableSource(files, tables if split is None else by_split[split], notes),
        sorted(by_split),
    )


class TableIndex:
    """The row groups of some parquet files, one behind the other; arrays may be mapped from a file."""

    def __init__(self, about: dict[str, Any], arrays: dict[str, np.ndarray], file: Path | None) -> None:
        self.file, self._about, self._arrays = file, about, arrays
        self.files = [(str(name), int(size)) for name, size in about["files"]]  # name and bytes
        self.image_leaf: str = about["image_leaf"]  # the column of encoded images: image.bytes
        self.class_names: list[str] | None = about["class_names"]
        self.labels = arrays["labels"]  # int64 (image,), -1 where there is none; empty without classes
        self.starts = arrays["starts"]  # (groups + 1,) number of the first image of each row group
        self.group_files = arrays["group_files"]  # (groups,) which file each lies in
        self.group_numbers = arrays["group_numbers"]  # (groups,) which of that file's it is
        self.group_bytes = arrays["group_bytes"]  # (groups,) what its images take in memory

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        if self.file is None:
            return TableIndex, (self._about, self._arrays, None)
        return _reopen, (self.file,)  # workers that are not forked map the same file

    def place(self, image: int) -> tuple[int, int]:
        """The row group of an image, and its row there."""
        group = int(self.starts.searchsorted(image, side="right")) - 1
        return group, image - int(self.starts[group])

    def path(self, image: int) -> str:
        """The file that the image was, or nothing."""
        return piece_of(self._arrays, "paths", image).decode("utf-8", "surrogateescape")

    def footer(self, file: int) -> pq.FileMetaData:
        """What the end of a file says of it."""
        return pq.read_metadata(pa.BufferReader(piece_of(self._arrays, "footers", file)))


def _reopen(file: Path) -> TableIndex:
    read = read_arrays(file, verify=False)
    if read is None:
        raise UserError(f"the index of DATA ({file}) was replaced while workers started; start again")
    return TableIndex(*read, file)


def index_tables(files: Files, names: Sequence[str]) -> TableIndex:
    """The index of some parquet files of one layout, from the cache where they have not changed.

    Raises:
        UserError: one of them is missing, damaged, or without images; or all are empty.
    """
    try:
        states = [(name, files.state(name)) for name in names]
        cached = cache_file("tables", VERSION, files.where, states)
        read = read_arrays(cached, holding=_ARRAYS)
        if read is not None:
            return TableIndex(*read, cached)
        if files.remote:
            plural = "s" * (len(names) > 1)
            say(
                f"index       reading footers and labels of {len(names):,} table{plural} of {files.where}, once"
            )
        about, arrays = _read_index(files, [(name, state[0]) for name, state in states])
    except FileNotFoundError as error:
        raise UserError(
            f"DATA ({files.where}): {error.filename or error} is not there; check its spelling"
        ) from error
    return TableIndex(about, arrays, cached if write_arrays(cached, about, arrays) else None)


def _read_index(files: Files, sizes: list[tuple[str, int]]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Footers, labels and paths of all files."""
    with ThreadPoolExecutor(READERS) as pool:
        footers = list(pool.map(lambda file: _read_footer(files, file[0]), sizes))
        columns = Columns.of(footers[0].schema.to_arrow_schema(), files.url(sizes[0][0]))
        groups = [(k, g) for k, footer in enumerate(footers) for g in range(footer.num_row_groups)]
        groups = [(k, g) for k, g in groups if footers[k].row_group(g).num_rows]
        if not groups:
            raise UserError(f"DATA ({files.url(sizes[0][0])}) holds no rows; check how it was written")
        for (name, _), footer in zip(sizes, footers, strict=True):
            leaves = {footer.schema.column(k).path for k in range(len(footer.schema))}
            lacking = [column for column in (columns.label, columns.leaf) if column and column not in leaves]
            if lacking:
                raise UserError(f"DATA: {files.url(name)} lacks the column {lacking[0]} of the first file")

        def small(place: tuple[int, int]) -> pa.Table:
            name = sizes[place[0]][0]
            try:
                return _read_group(files, name, footers[place[0]], place[1], columns.small)
            except FileNotFoundError:
                raise
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"DATA: {files.url(name)} is damaged; write or fetch it again") from error

        tables = list(pool.map(small, groups)) if columns.small else []
    labels = [value for t in tables for value in t[columns.label].to_pylist()] if columns.label else []
    paths = [t for t in tables if columns.has_paths and columns.image in t.column_names]
    texts = [text or "" for t in paths for text in pc.struct_field(t[columns.image], "path").to_pylist()]
    numbers, classes = number_classes(labels, columns.class_names)
    row_groups = [footers[k].row_group(g) for k, g in groups]
    arrays: dict[str, np.ndarray] = {
        "starts": np.cumsum([0, *(group.num_rows for group in row_groups)], dtype=np.int64),
        "group_files": np.array([k for k, _ in groups], np.int32),
        "group_numbers": np.array([g for _, g in groups], np.int32),
        "group_bytes": np.array([_image_bytes(group, columns.leaf) for group in row_groups], np.int64),
        "labels": numbers,
        **text_arrays("paths", [text.encode("utf-8", "surrogateescape") for text in texts]),
        **text_arrays("footers", [_serialized(footer) for footer in footers]),
    }
    classes_or_none = classes if labels else None
    return {"files": sizes, "image_leaf": columns.leaf, "class_names": classes_or_none}, arrays


def _read_footer(files: Files, name: str) -> pq.FileMetaData:
    where = files.url(name)
    try:
        with files.stream(name, 0) as file:
            return pq.ParquetFile(file).metadata
    except PermissionError as error:
        raise UserError(f"DATA ({where}) may not be read: no permission; check its access rights") from error
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
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


def _image_bytes(group: Any, leaf: str) -> int:
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == leaf)


class TableSource(Source):
    """The images of some parquet files of one layout, in order.

    Raises:
        UserError: one of them is missing, damaged, or without images; or all are empty.
    """

    def __init__(self, files: Files, names: Sequence[str], notes: Sequence[str] = ()) -> None:
        self.files, self.notes = files, list(notes)
        self._unchanged = (
            {} if files.remote else {name: Unchanged(Path(files.url(name)), time=False) for name in names}
        )
        self.index = index_tables(files, names)
        self.class_names = self.index.class_names
        sizes = self.index.group_bytes
        self.window = min(max(KEPT_BYTES // max(int(sizes.max()), 1), 1), WINDOW_BLOCKS)
        self._most_kept = self.window if files.remote else len(sizes)
        self._laid_out = not files.remote and int(sizes.sum()) > IN_MEMORY_BYTES
        self._begin()

    def _begin(self) -> None:
        self._labels = self.index.labels if self.class_names is not None else None
        self._kept: OrderedDict[int, pa.ChunkedArray] = (
            OrderedDict()
        )  # each process reads or maps them itself
        self._footers: dict[int, pq.FileMetaData] = {}
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        here_only = ("_labels", "_kept", "_footers", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in here_only}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return len(self.index)

    def open(self, index: int) -> Picture:
        return open_bytes(self._bytes(index))

    def encoded(self, index: int) -> tuple[bytes, str]:
        data = self._bytes(index)
        return data, suffix_of(data, self.index.path(index))

    def _bytes(self, index: int) -> bytes:
        self.check(index)
        group, row = self.index.place(index)
        data: bytes | None = self._images(group)[row].as_py()
        if data is None:
            raise BadImage("its row holds no bytes, only a path at most")
        return data

    def _images(self, group: int) -> pa.ChunkedArray:
        """The encoded images of a row group, bytes or null."""
        with self._lock:  # threads that want the same row group wait for one request
            if group not in self._kept:
                self._kept |= self._fetch(group)
                while len(self._kept) > self._most_kept:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]

    def _fetch(self, group: int) -> dict[int, pa.ChunkedArray]:
        """The images of a row group; of a file that is laid out, of all of its row groups."""
        file, number = int(self.index.group_files[group]), int(self.index.group_numbers[group])
        name = self.index.files[file][0]
        if name in self._unchanged:  # labels and places were read when it was opened
            self._unchanged[name].check()
        try:
            if self._laid_out:
                images = _mapped(Path(self.files.url(name)), self.index.image_leaf)
                groups = np.flatnonzero(self.index.group_files == file)
                first, starts = self.index.starts[groups[0]], self.index.starts
                return {int(g): images.slice(starts[g] - first, starts[g + 1] - starts[g]) for g in groups}
            if file not in self._footers:
                self._footers[file] = self.index.footer(file)
            table = _read_group(self.files, name, self._footers[file], number, [self.index.image_leaf])
            return {group: _bytes_of_cells(table.column(0))}
        except FileNotFoundError as error:
            raise BadImage(f"the table {name} is gone") from error
        except (pa.ArrowException, OSError, IndexError) as error:
            raise BadImage(f"the table {name} is damaged in its row group {number}") from error

    def blocks(self) -> BlockLayout | None:
        sizes = np.diff(self.index.starts)
        numbers = np.repeat(np.arange(len(sizes)), sizes)
        return BlockLayout(numbers, self.window, whole=True) if self.files.remote else None

    def name(self, index: int) -> str:
        path = self.index.path(index)
        return f"{index}:{path}" if path else str(index)

    def fingerprint(self) -> str:
        return hash_of(*(f"{PurePosixPath(name).name}\0{size}\0" for name, size in self.index.files))

    def summary(self) -> SourceSummary:
        count, notes = len(self.index.files), list(self.notes)
        kind = f"{count:,} parquet table{'s' * (count > 1)}"
        if self.files.remote:
            kind += f" at {self.files.where}"
            largest = readable_bytes(int(self.index.group_bytes.max()))
            notes.append(
                f"Tables are read over the network in row groups of up to {largest}, the images of {self.window} of "
                "them mixed; the order depends on the number of processes and workers."
            )
        return SourceSummary(kind, len(self), len(self), notes=notes)


def _bytes_of_cells(cells: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    return pc.struct_field(cells, "bytes") if pa.types.is_struct(cells.type) else cells


def _mapped(file: Path, leaf: str) -> pa.ChunkedArray:
    """The images of a large file, laid out uncompressed in the cache and mapped."""
    state = file.stat()
    cached = cache_file("images", str(file.absolute()), state.st_size, state.st_mtime_ns, leaf)
    if not _is_whole(cached):
        try:
            _lay_out(file, leaf, cached)
        except pa.ArrowException as error:
            raise UserError(f"DATA ({file}) is damaged; fetch it again") from error
        except OSError as error:
            raise UserError(
                f"DATA ({file}) cannot be laid out in {cached.parent} ({error.strerror or error}); make room "
                "there, or name another place by XDG_CACHE_HOME"
            ) from error
    return pa.ipc.open_file(pa.memory_map(str(cached))).read_all().column(0)


def _is_whole(cached: Path) -> bool:
    try:
        return bool(pa.ipc.open_file(pa.memory_map(str(cached))).num_record_batches)  # it stands at the end
    except (pa.ArrowException, OSError):
        return False


def _lay_out(file: Path, leaf: str, cached: Path) -> None:
    schema = pa.schema([("images", pa.large_binary())])
    with (
        replacing(cached) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for batch in pq.ParquetFile(file).iter_batches(batch_size=256, columns=[leaf]):
            images = _bytes_of_cells(batch.column(0)).cast(pa.large_binary())
            writer.write_batch(pa.record_batch([images], schema))
