"""Images in parquet files behind a URL: nothing is copied here, row groups are fetched as they are needed."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import PurePosixPath
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from freqmask.console import readable_bytes
from freqmask.data.decode import open_bytes, suffix_of
from freqmask.data.parquet_parts import parse_footer, read_columns
from freqmask.data.pictures import Picture
from freqmask.data.shard_files import ShardFiles
from freqmask.data.source import WINDOW_BLOCKS, Blocks, Source, SourceSummary
from freqmask.data.table_index import TableIndex, index_tables
from freqmask.errors import BadImage

KEPT_BYTES = 200_000_000  # of row groups that a process keeps; a larger one is kept alone


class RemoteTables(Source):
    """The images of parquet files behind a URL; names, labels and fingerprint are those of a copy here.

    Args:
        files: where they lie.
        names: which of them, in order.
        notes: sentences for the summary.

    Raises:
        UserError: a file is not there, damaged, or holds no images.
    """

    def __init__(self, files: ShardFiles, names: Sequence[str], notes: Sequence[str] = ()) -> None:
        self.files, self.notes = files, list(notes)
        self.index = index_tables(files, names)
        self.class_names = self.index.class_names
        self._reader = GroupReader(files, self.index)

    def __len__(self) -> int:
        return len(self.index)

    def open(self, index: int) -> Picture:
        return open_bytes(self.encoded(index)[0])

    def encoded(self, index: int) -> tuple[bytes, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        group, row = self.index.place(index)
        data = self._reader.images(group)[row].as_py()
        if data is None:
            raise BadImage("its row holds no bytes, only a path at most")
        return data, suffix_of(data, self.index.path(index))

    def label(self, index: int) -> int | None:
        return (
            None
            if self.class_names is None or self.index.labels[index] < 0
            else int(self.index.labels[index])
        )

    def all_labels(self) -> np.ndarray:
        return np.full(len(self), -1, np.int64) if self.class_names is None else np.array(self.index.labels)

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

    def __init__(self, files: ShardFiles, index: TableIndex) -> None:
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
