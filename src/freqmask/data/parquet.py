"""Images in parquet tables as Hugging Face lays them out: encoded files in one column, labels in another."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from freqmask.console import readable_bytes
from freqmask.data.cache import cache_file, replacing
from freqmask.data.decode import open_bytes, suffix_of
from freqmask.data.parquet_index import (
    TableIndex,
    class_names,
    has_paths,
    image_column,
    index_tables,
    label_column,
    number_classes,
    parse_footer,
    read_columns,
)
from freqmask.data.pixels import Picture
from freqmask.data.source import WINDOW_BLOCKS, Blocks, Source, SourceSummary
from freqmask.data.storage import Files, RemoteFiles
from freqmask.errors import BadImage, UserError

# Beyond this the images are laid out once, uncompressed, in the cache, which processes map and share.
IN_MEMORY_BYTES = 1_000_000_000
KEPT_BYTES = 200_000_000  # of row groups that a process keeps; a larger one is kept alone


def open_tables(files: Files, names: Sequence[str], notes: Sequence[str] = ()) -> Source:
    """The images of parquet files: here mapped into memory, behind a URL read row group by row group.

    Args:
        files: where they lie.
        names: which of them, in order.
        notes: sentences for the summary.

    Raises:
        UserError: a file is not there, damaged, or holds no images.
    """
    if isinstance(files, RemoteFiles):
        return RemoteTables(files, names, notes)
    return ParquetSource([Path(files.where) / name for name in names], list(notes))


class ParquetSource(Source):
    """The images of parquet files of one layout.

    Args:
        files: the files, in order.
        notes: sentences for the summary.

    Raises:
        UserError: a file is damaged, or holds no column of images.
    """

    def __init__(self, files: list[Path], notes: list[str] | None = None) -> None:
        self.files, self.notes = files, list(notes or [])
        self._schema = _opened(files[0]).schema_arrow
        self.image_column = image_column(self._schema, files[0])
        self.label_column = label_column(self._schema)
        self._images: pa.ChunkedArray | None = None
        self._labels = self._read_labels()
        self._count = sum(_opened(file).metadata.num_rows for file in files)
        if self._count == 0:
            raise UserError(f"DATA ({files[0]}) holds no rows; check how it was written")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}  # each process reads or maps the files itself

    def __len__(self) -> int:
        return self._count

    def _read_labels(self) -> np.ndarray | None:
        """All labels (image,), -1 where missing, or None; sets the names of classes."""
        if self.label_column is None:
            return None
        column = self.label_column
        values = [value for file in self.files for value in _read_table(file, [column])[column].to_pylist()]
        labels, self.class_names = number_classes(values, class_names(self._schema, column))
        return labels

    def _column(self) -> pa.ChunkedArray:
        """The column of images, read once a process."""
        if self._images is None:
            if sum(_uncompressed_bytes(file) for file in self.files) <= IN_MEMORY_BYTES:
                tables = [_read_table(file, [self.image_column]) for file in self.files]
            else:
                tables = [_mapped(file, self.image_column) for file in self.files]
            self._images = pa.chunked_array([chunk for t in tables for chunk in t[self.image_column].chunks])
        return self._images

    def open(self, index: int) -> Picture:
        data = self._cell(index)[0]
        if data is None:
            raise BadImage("its row holds no bytes, only a path at most")
        return open_bytes(data)

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        data, path = self._cell(index)
        return None if data is None else (data, suffix_of(data, path or ""))

    def _cell(self, index: int) -> tuple[bytes | None, str | None]:
        self.check(index)
        value = self._column()[index].as_py()
        return (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)

    def name(self, index: int) -> str:
        path = self._path_column()[index].as_py() if has_paths(self._schema, self.image_column) else None
        return f"{index}:{path}" if path else str(index)

    def _path_column(self) -> pa.ChunkedArray:
        return pc.struct_field(self._column(), "path")

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for file in self.files:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def summary(self) -> SourceSummary:
        return SourceSummary("parquet table", len(self), len(self), notes=list(self.notes))


def _opened(file: Path) -> pq.ParquetFile:
    """A file, its footer read."""
    try:
        return pq.ParquetFile(file)
    except PermissionError as error:
        raise UserError(f"DATA ({file}) may not be read: no permission; check its access rights") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"DATA ({file}) is truncated or no parquet file; write or fetch it again") from error


def _read_table(file: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(file, columns=columns, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"DATA ({file}) is damaged or lacks the column {columns[0]} of the first file; fetch it again"
        ) from error


def _uncompressed_bytes(file: Path) -> int:
    about = _opened(file).metadata
    return sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))


def _mapped(file: Path, column: str) -> pa.Table:
    """One column of a large file, laid out uncompressed in the cache and mapped."""
    state = file.stat()
    cached = cache_file("table", str(file.absolute()), state.st_size, state.st_mtime_ns, column)
    if not cached.exists():
        try:
            _lay_out(file, column, cached)
        except pa.ArrowException as error:
            raise UserError(f"DATA ({file}) is damaged; fetch it again") from error
        except OSError as error:
            raise UserError(
                f"DATA ({file}) cannot be laid out in {cached.parent} ({error.strerror or error}); make room "
                "there, or name another place by XDG_CACHE_HOME"
            ) from error
    return pa.ipc.open_file(pa.memory_map(str(cached))).read_all()


def _lay_out(file: Path, column: str, cached: Path) -> None:
    about = _opened(file)
    schema = pa.schema([about.schema_arrow.field(column)])
    with (
        replacing(cached) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for batch in about.iter_batches(batch_size=256, columns=[column]):
            writer.write_batch(batch)


class RemoteTables(Source):
    """The images of parquet files behind a URL; names, labels and fingerprint are those of a copy here.

    Args:
        files: where they lie.
        names: which of them, in order.
        notes: sentences for the summary.

    Raises:
        UserError: a file is not there, damaged, or holds no images.
    """

    def __init__(self, files: Files, names: Sequence[str], notes: Sequence[str] = ()) -> None:
        self.files, self.notes = files, list(notes)
        self.index = index_tables(files, names)
        self.class_names = self.index.class_names
        self._labels = self.index.labels if self.class_names is not None else None
        self._reader = GroupReader(files, self.index)

    def __len__(self) -> int:
        return len(self.index)

    def open(self, index: int) -> Picture:
        return open_bytes(self.encoded(index)[0])

    def encoded(self, index: int) -> tuple[bytes, str]:
        self.check(index)
        group, row = self.index.place(index)
        data = self._reader.images(group)[row].as_py()
        if data is None:
            raise BadImage("its row holds no bytes, only a path at most")
        return data, suffix_of(data, self.index.path(index))

    def blocks(self) -> Blocks:
        sizes = np.diff(self.index.starts)
        return Blocks(np.repeat(np.arange(len(sizes)), sizes), self._reader.window, whole=True)

    def name(self, index: int) -> str:
        path = self.index.path(index)
        return f"{index}:{path}" if path else str(index)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for name, size in self.index.files:
            digest.update(f"{PurePosixPath(name).name}\0{size}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def summary(self) -> SourceSummary:
        count, largest = len(self.index.files), readable_bytes(int(self.index.group_bytes.max()))
        window = self._reader.window
        note = (
            f"Tables are read over the network in row groups of up to {largest}, the images of {window} of them mixed; "
            "the order depends on the number of processes and workers."
        )
        kind = f"{count:,} parquet table{'s' * (count > 1)} at {self.files.where}"
        return SourceSummary(kind, len(self), len(self), notes=[*self.notes, note])


class GroupReader:
    """Row groups as they are asked for; those used last are kept.

    Args:
        files: where the tables lie.
        index: what lies where in them.
    """

    def __init__(self, files: Files, index: TableIndex) -> None:
        self.files, self.index = files, index
        largest = max(int(index.group_bytes.max()), 1)
        self.window = min(max(KEPT_BYTES // largest, 1), WINDOW_BLOCKS)
        self._begin()

    def _begin(self) -> None:
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._footers: dict[int, pq.FileMetaData] = {}
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "index": self.index, "window": self.window}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def images(self, group: int) -> pa.ChunkedArray:
        """The encoded images of a row group, bytes or null.

        Raises:
            BadImage: the row group is damaged, or its file is gone.
            UserError: it cannot be read, however often it is tried.
        """
        with self._lock:  # threads that want the same row group wait for one request
            if group not in self._kept:
                images = self._fetch(group)
                while len(self._kept) >= self.window:
                    self._kept.popitem(last=False)
                self._kept[group] = images
            self._kept.move_to_end(group)
            return self._kept[group]

    def _fetch(self, group: int) -> pa.ChunkedArray:
        file, number = int(self.index.group_files[group]), int(self.index.group_numbers[group])
        name = self.index.files[file][0]
        if file not in self._footers:
            self._footers[file] = parse_footer(self.index.footer(file), name)
        try:
            table = read_columns(self.files, name, self._footers[file], number, [self.index.image_leaf])
            cells = table.column(0)
            return pc.struct_field(cells, "bytes") if pa.types.is_struct(cells.type) else cells
        except FileNotFoundError as error:
            raise BadImage(f"the table {name} is gone") from error
        except (pa.ArrowException, OSError, IndexError) as error:
            raise BadImage(f"the table {name} is damaged in its row group {number}") from error
