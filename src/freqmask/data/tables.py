"""Images in a parquet table as Hugging Face lays it out: encoded files in one column, labels in another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from freqmask.data.cache import cache_file, replacing
from freqmask.data.decode import open_bytes, suffix_of
from freqmask.data.pictures import Picture
from freqmask.data.shard_files import local_files
from freqmask.data.source import Source, SourceSummary
from freqmask.data.splits import choose_split, split_note
from freqmask.data.table_layout import (
    class_names,
    files_by_split,
    has_paths,
    image_column,
    label_column,
    number_classes,
)
from freqmask.errors import BadImage, UserError

# Beyond this the images are laid out once, uncompressed, in the cache, which processes map and share.
IN_MEMORY_BYTES = 1_000_000_000


def open_pattern(text: str, split: str) -> Source:
    """The parquet files that a pattern names, such as ``tables/train-*.parquet``.

    Raises:
        UserError: no file fits it.
    """
    files, names = local_files(text)
    folder = Path(files.where)
    return open_tables(folder, [folder / name for name in names or ()], split)


def open_tables(folder: Path, files: list[Path], split: str) -> Source:
    """The parquet files of a folder, of one split where their names begin with one.

    Args:
        folder: the folder, for messages.
        files: ``train-00000-of-00002.parquet``, ``test.parquet`` ...
        split: ``auto``, ``all``, or how the names of files begin.
    """
    by_split = files_by_split(file.relative_to(folder).as_posix() for file in files)
    chosen = choose_split(by_split, split, str(folder))
    notes = [split_note(chosen, by_split)] if chosen and split == "auto" else []
    return ParquetSource(files if chosen is None else [folder / name for name in by_split[chosen]], notes)


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
        """Bytes and path of a row."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        value = self._column()[index].as_py()
        return (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)

    def label(self, index: int) -> int | None:
        return None if self._labels is None or self._labels[index] < 0 else int(self._labels[index])

    def all_labels(self) -> np.ndarray:
        return np.full(len(self), -1, np.int64) if self._labels is None else self._labels.copy()

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
