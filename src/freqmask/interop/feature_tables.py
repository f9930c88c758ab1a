"""Files of features: joined from parts, and searched for nearest neighbours, a piece at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pyarrow import ArrowInvalid

from freqmask.errors import UserError
from freqmask.training.files import replace_atomically

SUFFIXES = (".parquet", ".npy")
_ROWS = 8192  # read at once when a file is searched
_NAMES = ("path", "index", "label", "class")


def join_parts(
    parts: Sequence[Path], out: Path, facts: dict[str, Any], grid: tuple[int, ...] | None = None
) -> int:
    """One file of many parts; never more than one part is in memory.

    A ``.npy`` holds one array: the patches (N, h, w, D) if they were asked for, else the blocks (N, K, D), else
    the features (N, D); beside it stands ``NAME.csv`` with path, index and label of each row.

    Args:
        parts: parquet files of one schema, in order.
        out: ``.parquet`` or ``.npy``.
        facts: what it was made from, written into a parquet file's metadata.
        grid: (h, w, D) of the patches.

    Returns:
        The rows written.
    """
    if out.suffix == ".npy":
        return _join_npy(parts, out, grid)
    schema = pq.read_schema(parts[0]).with_metadata({"freqmask": json.dumps(facts)})

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, schema) as writer:
            for part in parts:
                writer.write_table(pq.read_table(part).cast(schema))

    replace_atomically(out, write)
    return sum(pq.read_metadata(part).num_rows for part in parts)


def task_of(path: Path) -> dict[str, Any] | None:
    """What a file of features was made from; None where it does not say, as a ``.npy`` never does."""
    if path.suffix != ".parquet":
        return None
    try:
        note = (pq.read_schema(path).metadata or {}).get(b"freqmask")
        return dict(json.loads(note)) if note else None
    except (ArrowInvalid, OSError, ValueError):
        return None


def _join_npy(parts: Sequence[Path], out: Path, grid: tuple[int, ...] | None) -> int:
    rows = sum(pq.read_metadata(part).num_rows for part in parts)
    columns = [name for name in pq.read_schema(parts[0]).names if name.startswith("block_")]
    if grid is not None:
        columns = ["patches"]
    elif not columns:
        columns = ["features"]

    def write(path: Path) -> None:
        with path.open("wb") as file:
            started = False
            for part in parts:
                array = _columns_of(part, columns, grid)
                if not started:
                    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, *array.shape[1:])}
                    np.lib.format.write_array_header_2_0(file, header)
                    started = True
                file.write(np.ascontiguousarray(array).data)

    replace_atomically(out.with_suffix(".csv"), lambda path: _write_names(parts, path))
    replace_atomically(out, write)
    return rows


def _columns_of(part: Path, columns: list[str], grid: tuple[int, ...] | None) -> np.ndarray:
    table = pq.read_table(part, columns=columns)
    arrays = [_matrix(table, name) for name in columns]
    if grid is not None:
        return arrays[0].reshape(len(arrays[0]), *_without_hole(grid, arrays[0].shape[1]))
    if columns == ["features"]:
        return arrays[0]
    if len({array.shape[1] for array in arrays}) > 1:
        raise UserError(
            "the blocks' features differ in width, which a .npy cannot hold; --out FILE.parquet can"
        )
    return np.stack(arrays, axis=1)


def _without_hole(grid: tuple[int, ...], width: int) -> tuple[int, ...]:
    known = int(np.prod([side for side in grid if side > 0]))
    return tuple(side if side > 0 else width // known for side in grid)


def _matrix(table: Any, name: str) -> np.ndarray:
    column = table.column(name)
    width = column.type.list_size
    chunks = [np.asarray(chunk.flatten()).reshape(-1, width) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.empty((0, width), np.float32)


def _write_names(parts: Sequence[Path], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        names = [name for name in _NAMES if name in pq.read_schema(parts[0]).names]
        writer.writerow(names)
        for part in parts:
            table = pq.read_table(part, columns=names)
            writer.writerows(zip(*(table.column(name).to_pylist() for name in names), strict=True))


def features_in(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The features of a parquet file a piece at a time: (rows, D) and the indices (rows,) in the data."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=["features", "index"]):
            table = batch.column("features")
            width = table.type.list_size
            yield np.asarray(table.flatten()).reshape(-1, width), np.asarray(batch.column("index"))


def pieces(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As :func:`features_in`, for either kind of file; of a ``.npy`` all but the first axis is one feature."""
    if path.suffix == ".parquet":
        yield from features_in(path)
        return
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    with path.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        indices = np.array([int(row["index"]) for row in csv.DictReader(file)])
    for start in range(0, len(array), _ROWS):
        rows = np.asarray(array[start : start + _ROWS])
        yield rows.reshape(len(rows), -1), indices[start : start + _ROWS]


def nearest_neighbours(path: Path, queries: int, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """For some images, spread evenly over the file, the most similar others.

    Similarity is the cosine after the mean of all features is taken off, which they have in common.

    Args:
        path: the file, parquet or npy.
        queries: how many images.
        neighbours: how many each.

    Returns:
        Indices in the data (query, 1 + neighbours), each query first, and the similarities; -1 where there are
        too few images.
    """
    total, count = np.zeros(1), 0
    for rows, _ in pieces(path):
        total, count = total + rows.sum(axis=0, dtype=np.float64), count + len(rows)
    if count == 0:
        return np.empty((0, 1 + neighbours), int), np.empty((0, 1 + neighbours))
    mean = (total / count).astype(np.float32)
    chosen = np.unique(np.linspace(0, count - 1, min(queries, count)).round().astype(int))
    asked, own = _rows_at(path, chosen, mean)
    found = np.full((len(chosen), 0), -1)
    scores = np.full((len(chosen), 0), -np.inf, np.float32)
    for rows, indices in pieces(path):
        similarity = asked @ _unit(rows - mean).T
        similarity[own[:, None] == indices[None]] = np.inf  # itself comes first
        scores = np.concatenate([scores, similarity], axis=1)
        found = np.concatenate([found, np.broadcast_to(indices, similarity.shape)], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : 1 + neighbours]
        scores, found = np.take_along_axis(scores, best, 1), np.take_along_axis(found, best, 1)
    lacking = 1 + neighbours - found.shape[1]
    return (
        np.pad(found, ((0, 0), (0, max(lacking, 0))), constant_values=-1),
        np.pad(scores, ((0, 0), (0, max(lacking, 0))), constant_values=-np.inf),
    )


def _rows_at(path: Path, chosen: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The features at some rows, of unit length, and their indices in the data."""
    found, indices, start = [], [], 0
    for rows, numbers in pieces(path):
        here = chosen[(chosen >= start) & (chosen < start + len(rows))] - start
        found.append(_unit(rows[here] - mean))
        indices.append(numbers[here])
        start += len(rows)
    return np.concatenate(found), np.concatenate(indices)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
