"""Parts of a parquet file that lies far away: its footer, and some columns of a row group, in few requests."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from freqmask.data.shard_files import ShardFiles
from freqmask.errors import UserError

FOOTER_BYTES = 65_536  # asked for at first; most footers are smaller
GAP_BYTES = 65_536  # between two pieces that cost less to fetch than another request would
END = b"PAR1"


def read_footer(files: ShardFiles, name: str) -> bytes:
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
    files: ShardFiles, name: str, about: pq.FileMetaData, group: int, leaves: Sequence[str]
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
    with pq.ParquetFile(_Pieces(pieces, files.size(name)), metadata=about) as file:
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


class _Pieces(io.RawIOBase):
    """A file of which only some pieces are there."""

    def __init__(self, pieces: dict[int, bytes], size: int) -> None:
        super().__init__()
        self._pieces, self._size, self._at = pieces, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Bytes of one of the pieces."""
        for start, data in self._pieces.items():
            if start <= self._at and self._at + size <= start + len(data):
                self._at += size
                return data[self._at - size - start : self._at - start]
        raise OSError(f"bytes {self._at} to {self._at + size} were not fetched")
