"""Files of features: written in parts that survive a kill, joined into one, searched for nearest neighbors."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ArrowInvalid

from freqmask.data.source import Source, spread
from freqmask.errors import UserError
from freqmask.training.files import open_table, replace_atomically
from freqmask.training.run_folder import write_text

_PART_BYTES = 256 * 2**20  # of features in memory before a part is written
_MOST_IMAGES = 8192  # of a part: no more than these are computed again after a crash
_FEWEST_IMAGES = 64
_ROWS = 8192  # read at once when a file is searched
_NAMES = ("path", "index", "label", "class")


class Parts:
    """The scratch folder beside the file, with a note of what its parts are.

    ``task`` are plain values that decide what the file ``out`` will hold; an image's features have ``row_bytes``.
    """

    def __init__(self, out: Path, task: dict[str, Any], images: int, row_bytes: int) -> None:
        self.out, self.task, self.images = out, task, images
        self.folder = out.with_name(f".{out.name}.parts")
        # at least some thirty parts, so that there is one for every device
        most = min(_MOST_IMAGES, _PART_BYTES // max(row_bytes, 1), max(_FEWEST_IMAGES, images // 32))
        self.size = max(1, most)
        self.count = -(-images // self.size)

    def begin(self) -> int:
        """Make the folder, or keep what an earlier start of the same task left; how many parts are whole."""
        note, task = self.folder / "task.json", {**self.task, "part_size": self.size}
        if not note.is_file() or note.read_bytes() != json.dumps(task).encode():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_text(note, json.dumps(task))
        for path in self.folder.glob("part-*.parquet"):
            try:
                pq.read_metadata(path)  # it stands at the end
            except (pa.ArrowException, OSError):
                path.unlink()
        return self.count - len(self.missing())

    def path(self, number: int) -> Path:
        """Where a part lives."""
        return self.folder / f"part-{number:06d}.parquet"

    def missing(self) -> list[int]:
        """The parts that are still to be computed."""
        return [number for number in range(self.count) if not self.path(number).is_file()]

    def indices(self, number: int) -> range:
        """The images of a part."""
        return range(number * self.size, min((number + 1) * self.size, self.images))

    def remove(self) -> None:
        """Drop what was computed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def whole(self) -> tuple[list[Path], list[tuple[str, str]]]:
        """All parts, or a UserError, and name and reason of images that could not be read."""
        missing = self.missing()
        if missing:
            raise UserError(f"{len(missing)} parts of {self.out} are missing; the same command computes them")
        paths = [self.path(number) for number in range(self.count)]
        notes = [(pq.read_schema(path).metadata or {}).get(b"skipped", b"[]") for path in paths]
        return paths, [(str(name), str(reason)) for note in notes for name, reason in json.loads(note)]


class PartWriter:
    """Gathers the rows of parts, batch by batch in order, and writes each part when its last image has come."""

    def __init__(self, source: Source, parts: Parts) -> None:
        self.source, self.parts = source, parts
        self.tables: list[pa.Table] = []
        self.skipped: dict[str, str] = {}

    def add(
        self,
        wanted: np.ndarray,
        is_read: np.ndarray,
        features: Mapping[str, np.ndarray],
        labels: np.ndarray,
        reasons: Mapping[str, str],
    ) -> None:
        """Take a batch; rows whose image could not be read are dropped.

        Args:
            wanted: indices (rows,) of the images.
            is_read: False where another image was read instead.
            features: (rows, D) by name.
            labels: (rows,), -1 where there is none.
            reasons: name of an image to why it cannot be read.
        """
        owners = wanted // self.parts.size
        for number in np.unique(owners):
            is_own = owners == number
            self.tables.append(self._table(wanted, labels, features, is_own & is_read))
            unread = [self.source.name(int(index)) for index in wanted[is_own & ~is_read]]
            self.skipped |= {name: reasons.get(name, "it cannot be read") for name in unread}
            if wanted[is_own][-1] == self.parts.indices(int(number))[-1]:
                table = pa.concat_tables(self.tables).replace_schema_metadata(
                    {"skipped": json.dumps(list(self.skipped.items()))}
                )
                replace_atomically(self.parts.path(int(number)), partial(pq.write_table, table))
                self.tables, self.skipped = [], {}

    def _table(
        self, indices: np.ndarray, labels: np.ndarray, features: Mapping[str, np.ndarray], rows: np.ndarray
    ) -> pa.Table:
        classes, labels = self.source.class_names, labels[rows]
        names = [self.source.name(int(index)) for index in indices[rows]]
        columns: dict[str, pa.Array] = {
            "path": pa.array([_as_utf8(name) for name in names], pa.string()),
            "index": pa.array(indices[rows], pa.int64()),
            "label": pa.array(labels, pa.int64(), mask=labels < 0),
        }
        if classes is not None:
            known = [_as_utf8(classes[n]) if 0 <= n < len(classes) else None for n in labels]
            columns["class"] = pa.array(known, pa.string())
        for name, values in features.items():
            flat = pa.array(np.ascontiguousarray(values[rows]).reshape(-1), pa.float32())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        return pa.table(columns)


def _as_utf8(name: str) -> str:
    """A name as parquet can hold it: bytes that are no UTF-8 are escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def join_parts(parts: Parts, grid: tuple[int, ...] | None = None) -> tuple[int, list[tuple[str, str]]]:
    """One file of many parts, which are dropped; never more than one part is in memory.

    A ``.npy`` holds one array: the patches (N, h, w, D) if they were asked for, else the blocks (N, K, D), else
    the features (N, D); beside it stands ``NAME.csv`` with path, index and label of each row. A parquet file holds
    all columns, and in its metadata what it was made from.

    Args:
        parts: all computed; a UserError where one is missing.
        grid: (h, w, D) of the patches, where a ``.npy`` shall hold them.

    Returns:
        The rows written, and (name, reason) of images that could not be read.
    """
    paths, skipped = parts.whole()
    rows = sum(pq.read_metadata(path).num_rows for path in paths)
    if parts.out.suffix == ".npy":
        replace_atomically(parts.out.with_suffix(".csv"), partial(_write_names, paths))
        replace_atomically(parts.out, partial(_write_npy, paths, rows, grid))
    else:
        replace_atomically(parts.out, partial(_write_parquet, paths, parts.task))
    parts.remove()
    return rows, skipped


def task_of(path: Path) -> dict[str, Any] | None:
    """What a file of features was made from; None where it does not say, as a ``.npy`` never does."""
    if path.suffix != ".parquet" or not path.is_file():
        return None
    try:
        note = (pq.read_schema(path).metadata or {}).get(b"freqmask")
        return dict(json.loads(note)) if note else None
    except (ArrowInvalid, OSError, ValueError):
        return None


def images_missing_in(path: Path, count: int) -> np.ndarray:
    """Numbers of those of ``count`` images that a parquet file of features lacks."""
    there = pq.read_table(path, columns=["index"])["index"].to_numpy()
    return np.setdiff1d(np.arange(count), there)


def _write_parquet(parts: Sequence[Path], task: Mapping[str, Any], path: Path) -> None:
    schema = pq.read_schema(parts[0]).with_metadata({"freqmask": json.dumps(task)})
    with pq.ParquetWriter(path, schema) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part).cast(schema))


def _write_npy(parts: Sequence[Path], rows: int, grid: tuple[int, ...] | None, path: Path) -> None:
    blocks = [name for name in pq.read_schema(parts[0]).names if name.startswith("block_")]
    with path.open("wb") as file:
        for part in parts:
            table = pq.read_table(part)
            if grid is not None:
                array = matrix(table, "patches").reshape(table.num_rows, *grid)
            elif not blocks:
                array = matrix(table, "features")
            else:
                array = np.stack([matrix(table, name) for name in blocks], axis=1)
            if part == parts[0]:
                header = {"descr": "<f4", "fortran_order": False, "shape": (rows, *array.shape[1:])}
                np.lib.format.write_array_header_2_0(file, header)
            file.write(np.ascontiguousarray(array).data)


def matrix(table: Any, name: str) -> np.ndarray:
    """A column of features as (rows, D)."""
    column = table.column(name)
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(column.flatten()).reshape(-1, column.type.list_size)


def rows_of(parts: Sequence[Path], names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The cells of some columns, row by row, names as the disk has them."""
    for part in parts:
        table = pq.read_table(part, columns=list(names))
        columns = (table.column(name).to_pylist() for name in names)
        yield from zip(*([_exact(cell) for cell in column] for column in columns), strict=True)


def _exact(cell: Any) -> Any:
    """Undoes :func:`_as_utf8`."""
    if not isinstance(cell, str):
        return cell
    return re.sub(r"\\x([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), cell)


def _write_names(parts: Sequence[Path], path: Path) -> None:
    with open_table(path, "w") as file:
        names = [name for name in _NAMES if name in pq.read_schema(parts[0]).names]
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows_of(parts, names))


def _pieces(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features (rows, D) and indices (rows,) a piece at a time; of a ``.npy`` all but the first axis is one feature."""
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches(_ROWS, columns=["features", "index"]):
                yield matrix(batch, "features"), np.asarray(batch.column("index"))
        return
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    with open_table(path.with_suffix(".csv")) as file:
        indices = np.array([int(row["index"]) for row in csv.DictReader(file)])
    for start in range(0, len(array), _ROWS):
        rows = np.asarray(array[start : start + _ROWS])
        yield rows.reshape(len(rows), -1), indices[start : start + _ROWS]


def nearest_neighbors(path: Path, queries: int, neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    """For some images, spread evenly over the file, the most similar others.

    Similarity is the cosine after the mean of all features is taken off, which they have in common. The search goes
    through the file piece by piece: scikit-learn's ``NearestNeighbors`` would hold all features in memory.

    Returns:
        Indices in the data (query, 1 + neighbors), each query first, and the similarities; -1 where there are
        too few images.
    """
    is_parquet = path.suffix == ".parquet"
    count = pq.read_metadata(path).num_rows if is_parquet else len(np.load(path, mmap_mode="r"))
    chosen = spread(np.arange(count), queries)
    total, start, picked, numbers = np.zeros(1), 0, [], []
    for rows, indices in _pieces(path):
        places = chosen[(chosen >= start) & (chosen < start + len(rows))] - start
        picked.append(rows[places])
        numbers.append(indices[places])
        total, start = total + rows.sum(axis=0, dtype=np.float64), start + len(rows)
    mean = (total / count).astype(np.float32)
    asked, own = _unit(np.concatenate(picked) - mean), np.concatenate(numbers)
    # too few images leave -1 in the last columns
    nearest = np.full((len(chosen), 1 + neighbors), -1)
    scores = np.full((len(chosen), 1 + neighbors), -np.inf, np.float32)
    for rows, indices in _pieces(path):
        similarity = asked @ _unit(rows - mean).T
        similarity[own[:, None] == indices[None]] = np.inf  # itself comes first
        scores = np.concatenate([scores, similarity], axis=1)
        nearest = np.concatenate([nearest, np.broadcast_to(indices, similarity.shape)], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : 1 + neighbors]
        scores, nearest = np.take_along_axis(scores, best, 1), np.take_along_axis(nearest, best, 1)
    return nearest, scores


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
