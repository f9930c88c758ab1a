"""Parts of a file of features, so that a run that was cut short goes on.

Part k holds the images ``[k * size, (k + 1) * size)`` of the source, those that cannot be read left out. Parts are
whole or not there; several processes take every other part.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from freqmask.data.source import Source
from freqmask.training.checkpoint import replace_atomically

_PART_BYTES = 256 * 2**20  # of features in memory before a part is written
_MOST_IMAGES = 8192  # of a part: no more than these are computed again after a crash
_FEWEST_IMAGES = 64


class Parts:
    """The scratch folder beside the file, with a note of what its parts are.

    Args:
        out: the file to be written.
        task: plain values that decide what the file will hold.
        images: in the source.
        row_bytes: of one image's features.
    """

    def __init__(self, out: Path, task: dict[str, Any], images: int, row_bytes: int) -> None:
        self.folder = out.with_name(f".{out.name}.parts")
        # at least some thirty parts, so that there is one for every device
        self.size = max(
            1, min(_MOST_IMAGES, _PART_BYTES // max(row_bytes, 1), max(_FEWEST_IMAGES, images // 32))
        )
        self.count = -(-images // self.size)
        self.images = images
        self.task = task
        self._note = json.dumps({**task, "part_size": self.size})

    def begin(self) -> int:
        """Make the folder, or keep what an earlier start of the same task left; how many parts are there."""
        note = self.folder / "task.json"
        if not note.is_file() or note.read_text(encoding="utf-8") != self._note:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            replace_atomically(note, lambda path: _write_text(path, self._note))
        return sum(self.path(number).is_file() for number in range(self.count))

    def path(self, number: int) -> Path:
        """Where a part lives."""
        return self.folder / f"part-{number:06d}.parquet"

    def missing(self, rank: int, world_size: int) -> list[int]:
        """The parts that a process has still to compute."""
        own = range(rank, self.count, world_size)
        return [number for number in own if not self.path(number).is_file()]

    def indices(self, number: int) -> range:
        """The images of a part."""
        return range(number * self.size, min((number + 1) * self.size, self.images))


class Rows:
    """Gathers the rows of parts and writes each part when it is whole.

    Args:
        source: gives names.
        parts: where they are written.
        missing: the parts that are coming, in order.
    """

    def __init__(self, source: Source, parts: Parts, missing: list[int]) -> None:
        self.source = source
        self.parts = parts
        self.missing = missing
        self.tables: list[pa.Table] = []
        self.skipped: dict[str, str] = {}

    def add(
        self,
        asked: list[int],
        features: dict[str, Tensor],
        indices: Tensor,
        labels: Tensor,
        skipped: list[tuple[str, str]],
    ) -> None:
        """Take a batch; where another image stands in for one that cannot be read, it is dropped."""
        wanted = np.array(asked)
        read = indices.numpy() == wanted
        unread = {self.source.name(int(index)) for index in wanted[~read]}
        reasons = {name: reason for name, reason in skipped if name in unread}
        host = {name: tensor.cpu().numpy() for name, tensor in features.items()}
        owners = wanted // self.parts.size
        for number in dict.fromkeys(owners.tolist()):
            mine = owners == number
            self.tables.append(self._table(wanted, labels.numpy(), host, mine & read))
            self.skipped |= {
                name: reasons.get(name, "it cannot be read")
                for name in (self.source.name(int(index)) for index in wanted[mine & ~read])
            }
            if wanted[mine][-1] == self.parts.indices(number)[-1]:
                self._write(number)

    def _table(
        self, indices: np.ndarray, labels: np.ndarray, features: dict[str, np.ndarray], rows: np.ndarray
    ) -> pa.Table:
        names = self.source.class_names
        labels = labels[rows]
        columns: dict[str, pa.Array] = {
            "path": pa.array([_text(self.source.name(int(index))) for index in indices[rows]], pa.string()),
            "index": pa.array(indices[rows], pa.int64()),
            "label": pa.array(labels, pa.int64(), mask=labels < 0),
        }
        if names is not None:
            columns["class"] = pa.array(
                [names[n] if 0 <= n < len(names) else None for n in labels], pa.string()
            )
        for name, values in features.items():
            flat = pa.array(np.ascontiguousarray(values[rows]).reshape(-1), pa.float32())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        return pa.table(columns)

    def _write(self, number: int) -> None:
        table = pa.concat_tables(self.tables).replace_schema_metadata(
            {"skipped": json.dumps(list(self.skipped.items()))}
        )
        replace_atomically(self.parts.path(number), lambda path: pq.write_table(table, path))
        self.tables, self.skipped = [], {}


def _text(name: str) -> str:
    """A file's name as valid Unicode, whatever bytes it has."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
