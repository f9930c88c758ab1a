"""What lies where in parquet files behind a URL: row groups, classes and names, as mapped arrays in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from freqmask.console import say
from freqmask.data.cache import cache_file, read_arrays, write_arrays
from freqmask.data.parquet_parts import parse_footer, read_columns, read_footer
from freqmask.data.shard_files import ShardFiles
from freqmask.data.shard_index import text_arrays
from freqmask.data.table_layout import class_names, has_paths, image_column, label_column, number_classes
from freqmask.errors import UserError

VERSION = 1
READERS = 16  # requests under way at once while labels are read: one of a few kB for each row group


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


def index_tables(files: ShardFiles, names: Sequence[str]) -> TableIndex:
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


def _read(files: ShardFiles, sizes: list[tuple[str, int]]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
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
    files: ShardFiles, name: str, about: pq.FileMetaData, group: int, columns: _Columns
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
    """What the images of a row group take in memory."""
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == leaf)
