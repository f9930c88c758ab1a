"""What lies where in parquet files: columns of images and classes, row groups, a column of one in few requests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from freqmask.console import say
from freqmask.data.cache import cache_file, read_arrays, write_arrays
from freqmask.data.shard_index import text_arrays
from freqmask.data.splits import split_of
from freqmask.data.storage import Files, RangeFile
from freqmask.errors import UserError, nearest

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "y")
MOST_NUMBERED = (
    100_000  # numbers up to there are classes by their value; ids beyond are classes by their order
)
FOOTER_BYTES = 65_536  # asked for at first; most footers are smaller
GAP_BYTES = 65_536  # between two pieces that cost less to fetch than another request would
END = b"PAR1"
VERSION = 1
READERS = 16  # requests under way at once while labels are read: one of a few kB for each row group


def image_column(schema: pa.Schema, where: object) -> str:
    """The first column of encoded images: a struct with bytes, or plain bytes.

    Args:
        schema: of the table.
        where: the file, for the message.

    Raises:
        UserError: there is none.
    """
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return str(field.name)
    for field in schema:
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            return str(field.name)
    hint = nearest("image", schema.names) if schema.names else "it has no columns"
    raise UserError(
        f"DATA ({where}) must hold a column of encoded images (a struct of bytes and path, or bytes); {hint}"
    )


def has_paths(schema: pa.Schema, column: str) -> bool:
    """Whether the column of images names the files that they were."""
    kind = schema.field(column).type
    return bool(pa.types.is_struct(kind) and kind.get_field_index("path") >= 0)


def label_column(schema: pa.Schema) -> str | None:
    """The column of classes: by its type in the metadata, else by its name."""
    features = _features(schema)
    named = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    plain = [name for name in LABEL_COLUMNS if name in schema.names and _is_class(schema.field(name).type)]
    return next(iter([*named, *plain]), None)


def _is_class(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's metadata says of the columns, or nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: about for name, about in features.items() if isinstance(about, dict)}


def class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """The names of the classes 0, 1, ..., as the metadata has them; None where it has not."""
    names = _features(schema).get(column, {}).get("names")
    return [str(name) for name in names] if isinstance(names, list) else None


def number_classes(
    values: Sequence[int | str | None], names: list[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Labels counted from 0, and what they are called.

    Args:
        values: of each image a name or a number; None or a negative number where there is none.
        names: of the classes 0, 1, ... where that is known.

    Returns:
        int64 (image,), -1 where there is none, and the names.

    >>> number_classes(["dog", None, "cat"])[1], number_classes([2, -1, 0])[0].tolist()
    (['cat', 'dog'], [2, -1, 0])
    """
    known = {value for value in values if value is not None and not (isinstance(value, int) and value < 0)}
    if names is None and all(isinstance(value, int) for value in known):
        largest = max((int(value) for value in known), default=-1)
        names = [str(number) for number in range(largest + 1)] if largest < MOST_NUMBERED else None
    if names is not None:
        fits = {number: number for number in range(len(names))}
        places: dict[Any, int] = fits
    else:
        ordered = sorted(known, key=lambda value: (isinstance(value, str), value))
        places, names = {value: place for place, value in enumerate(ordered)}, [str(v) for v in ordered]
    return np.array([places.get(value, -1) for value in values], np.int64), names


def files_by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Files by the split that their folder is named after, or else by how their names begin.

    >>> files_by_split(["data/train-00000-of-00002.parquet", "default/test/0000.parquet"])
    {'train': ['data/train-00000-of-00002.parquet'], 'test': ['default/test/0000.parquet']}
    """
    by_split: dict[str, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        split = path.parent.name if split_of(path.parent.name) else re.split(r"[-_.]", path.name)[0]
        by_split.setdefault(split, []).append(name)
    return by_split


def tables_of_one(names: Iterable[str], where: str) -> list[str]:
    """The parquet files among some names, all of one data set.

    Args:
        names: relative to the root.
        where: the root, for the message.

    Raises:
        UserError: they lie in several folders, which are the configurations of a data set.
    """
    found = sorted(name for name in names if name.lower().endswith(".parquet"))
    folders = {_configuration(name) for name in found}
    if len(folders) > 1:
        some = sorted(folder or "the folder itself" for folder in folders)
        raise UserError(
            f"DATA ({where}) holds tables of {len(folders)} data sets ({', '.join(some[:8])}); name one: "
            f"{where.rstrip('/')}/{max(folders)}"
        )
    return found


def _configuration(name: str) -> str:
    parts = PurePosixPath(name).parts[:-1]
    return "/".join(part for part in parts if part != "data" and not split_of(part))


def read_footer(files: Files, name: str) -> bytes:
    """The end of a file, which says where everything lies in it.

    Args:
        files: where the file lies.
        name: of the file.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it is truncated or no parquet file.
    """
    size = files.size(name)
    tail = files.read(name, max(0, size - FOOTER_BYTES), size)
    whole = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != END or whole > size:
        raise UserError(f"DATA: {name} is truncated or no parquet file; write or fetch it again")
    return tail[-whole:] if whole <= len(tail) else files.read(name, size - whole, size)


def parse_footer(footer: bytes, name: str) -> pq.FileMetaData:
    """What a footer says.

    Args:
        footer: from `read_footer`.
        name: of the file, for the message.

    Raises:
        UserError: it is damaged.
    """
    try:
        return pq.read_metadata(pa.BufferReader(END + footer))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"DATA: {name} is damaged in its footer; write or fetch it again") from error


def read_columns(
    files: Files, name: str, about: pq.FileMetaData, group: int, leaves: Sequence[str]
) -> pa.Table:
    """Some columns of a row group.

    Args:
        files: where the file lies.
        name: of the file.
        about: its footer, parsed.
        group: number of the row group.
        leaves: columns by their whole paths: ``image.bytes``, ``label``.

    Raises:
        FileNotFoundError: the file is not there.
        UserError: it cannot be read, however often it is tried.
        pyarrow.ArrowException: the row group is damaged.
    """
    spans = _spans(about.row_group(group), leaves)
    pieces = {start: files.read(name, start, stop) for start, stop in spans}

    def fetched(start: int, stop: int) -> bytes:
        for first, data in pieces.items():
            if first <= start and stop <= first + len(data):
                return data[start - first : stop - first]
        raise OSError(f"bytes {start} to {stop} were not fetched")

    with pq.ParquetFile(RangeFile(fetched, files.size(name)), metadata=about) as file:
        return file.read_row_group(group, columns=list(leaves), use_threads=False)


def _spans(group: Any, leaves: Sequence[str]) -> list[tuple[int, int]]:
    """First byte and the one after the last of what has to be fetched, neighbours as one."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    wanted = sorted(_place(chunk) for chunk in chunks if chunk.path_in_schema in leaves)
    spans: list[tuple[int, int]] = []
    for start, stop in wanted:
        if spans and start - spans[-1][1] <= GAP_BYTES:
            start, stop = spans[-1][0], max(stop, spans.pop()[1])
        spans.append((start, stop))
    return spans


def _place(chunk: Any) -> tuple[int, int]:
    start = chunk.data_page_offset
    if chunk.has_dictionary_page:
        start = min(start, chunk.dictionary_page_offset)
    return start, start + chunk.total_compressed_size


class TableIndex:
    """The row groups of some parquet files, one behind the other; arrays may be mapped from a file.

    Attributes:
        files: name and bytes of each.
        image_leaf: the column of encoded images by its whole path: ``image.bytes``.
        class_names: by label, or None.
        starts: (groups + 1,) number of the first image of each row group.
        group_files: (groups,) which file each lies in.
        group_numbers: (groups,) which of that file's it is.
        group_bytes: (groups,) what its images take in memory.
        labels: (image,) int64, -1 where there is none; empty where there are no classes.
    """

    def __init__(self, about: dict[str, Any], arrays: dict[str, np.ndarray], file: Path | None) -> None:
        self.files: list[tuple[str, int]] = [(str(name), int(size)) for name, size in about["files"]]
        self.image_leaf: str = about["image_leaf"]
        self.class_names: list[str] | None = about["class_names"]
        self.file, self._about, self._arrays = file, about, arrays
        self.starts, self.labels = arrays["starts"], arrays["labels"]
        self.group_files, self.group_numbers = arrays["group_files"], arrays["group_numbers"]
        self.group_bytes = arrays["group_bytes"]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        if self.file is None:
            return TableIndex, (self._about, self._arrays, None)
        return _reopen, (self.file,)  # workers that are not forked map the same file

    def place(self, image: int) -> tuple[int, int]:
        """The row group of an image, and its row there."""
        group = int(np.searchsorted(self.starts, image, side="right")) - 1
        return group, image - int(self.starts[group])

    def path(self, image: int) -> str:
        """The file that the image was, or nothing."""
        return self._piece("paths", image).decode("utf-8", "surrogateescape")

    def footer(self, file: int) -> bytes:
        """The footer of a file."""
        return self._piece("footers", file)

    def _piece(self, column: str, number: int) -> bytes:
        ends = self._arrays[f"{column}_ends"]
        if len(ends) == 1:
            return b""
        return bytes(self._arrays[column][ends[number] : ends[number + 1]].tobytes())


def _reopen(file: Path) -> TableIndex:
    read = read_arrays(file, verify=False)
    if read is None:
        raise UserError(f"the index of DATA ({file}) was replaced while workers started; start again")
    return TableIndex(*read, file)


def index_tables(files: Files, names: Sequence[str]) -> TableIndex:
    """The index of some parquet files of one layout, from the cache where their sizes are the same.

    Args:
        files: where they lie.
        names: which of them, in order.

    Raises:
        UserError: one of them is not there, damaged, or without images; or all are empty.
    """
    try:
        sizes = [(name, files.size(name)) for name in names]
        cached = cache_file("tables", VERSION, files.where, sizes)
        read = read_arrays(cached)
        if read is not None:
            return TableIndex(*read, cached)
        plural = "s" * (len(names) > 1)
        say(f"index       reading footers and labels of {len(names):,} table{plural} of {files.where}, once")
        about, arrays = _read(files, sizes)
    except FileNotFoundError as error:
        raise UserError(
            f"DATA ({files.where}): {error.filename or error} is not there; check its spelling"
        ) from error
    return TableIndex(about, arrays, cached if write_arrays(cached, about, arrays) else None)


@dataclass
class _Columns:
    """The names of a table's columns; of images, ``leaf`` is what holds their bytes."""

    image: str
    leaf: str
    label: str | None
    path: bool

    @property
    def small(self) -> list[str]:
        """The columns that are read ahead, by their whole paths."""
        return [*([f"{self.image}.path"] if self.path else []), *([self.label] if self.label else [])]


def _columns(schema: pa.Schema, where: str) -> _Columns:
    image = image_column(schema, where)
    leaf = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image
    return _Columns(image, leaf, label_column(schema), has_paths(schema, image))


def _read(files: Files, sizes: list[tuple[str, int]]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Footers, labels and paths of all files."""
    names = [name for name, _ in sizes]
    with ThreadPoolExecutor(READERS) as pool:
        footers = list(pool.map(lambda name: read_footer(files, name), names))
        abouts = [parse_footer(footer, name) for footer, name in zip(footers, names, strict=True)]
        schema = abouts[0].schema.to_arrow_schema()
        columns = _columns(schema, f"{files.where}/{names[0]}")
        groups = [(k, g) for k, about in enumerate(abouts) for g in range(about.num_row_groups)]
        groups = [(k, g) for k, g in groups if abouts[k].row_group(g).num_rows]

        def small(place: tuple[int, int]) -> pa.Table:
            return _small_columns(files, names[place[0]], abouts[place[0]], place[1], columns)

        tables = list(pool.map(small, groups)) if columns.small else []
    if not groups:
        raise UserError(f"DATA ({files.where}/{names[0]}) holds no rows; check how it was written")
    labels = [value for t in tables for value in t[columns.label].to_pylist()] if columns.label else []
    numbers, classes = number_classes(labels, class_names(schema, columns.label or ""))
    paths = [value or "" for t in tables for value in _paths(t, columns)]
    row_groups = [abouts[k].row_group(g) for k, g in groups]
    arrays: dict[str, np.ndarray] = {
        "starts": np.cumsum([0, *(group.num_rows for group in row_groups)], dtype=np.int64),
        "group_files": np.array([k for k, _ in groups], np.int32),
        "group_numbers": np.array([g for _, g in groups], np.int32),
        "group_bytes": np.array([_image_bytes(group, columns.leaf) for group in row_groups], np.int64),
        "labels": numbers,
        **text_arrays("paths", paths),
        "footers": np.frombuffer(b"".join(footers), np.uint8),
        "footers_ends": np.cumsum([0, *map(len, footers)], dtype=np.int64),
    }
    found: dict[str, Any] = {
        "files": sizes,
        "image_leaf": columns.leaf,
        "class_names": classes if labels else None,
    }
    return found, arrays


def _small_columns(
    files: Files, name: str, about: pq.FileMetaData, group: int, columns: _Columns
) -> pa.Table:
    """Labels and paths of a row group."""
    try:
        table = read_columns(files, name, about, group, columns.small)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"DATA: {files.where}/{name} is damaged; write or fetch it again") from error
    if columns.label is not None and columns.label not in table.column_names:
        raise UserError(f"DATA: {files.where}/{name} lacks the column {columns.label} of the first file")
    return table


def _paths(table: pa.Table, columns: _Columns) -> list[str | None]:
    if not columns.path or columns.image not in table.column_names:
        return []
    found: list[str | None] = pc.struct_field(table[columns.image], "path").to_pylist()
    return found


def _image_bytes(group: Any, leaf: str) -> int:
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == leaf)
