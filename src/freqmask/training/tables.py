"""Tables that grow a row at a time and survive a kill: metrics.csv, skipped.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from freqmask.training.files import replace_atomically, writing


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row; a column that the table lacks is added, with empty cells above.

    Args:
        path: the CSV file, made with the row's names as its header where it is missing.
        row: name to value; a float is written with 7 digits.
    """
    header = _header(path)
    missing = [name for name in row if name not in header]
    if missing:
        header = [*header, *missing]
        _rewrite(path, header, read_rows(path))
    with writing(path), path.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerow([_cell(row.get(name, "")) for name in header])


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(io.StringIO(text)))


def cut_back(path: Path, column: str, largest: int) -> None:
    """Drop the rows whose ``column`` is above ``largest``: those of steps that will be made again."""
    if not path.is_file():
        return
    rows = [row for row in read_rows(path) if row.get(column) and int(row[column]) <= largest]
    _rewrite(path, _header(path), rows)


def _header(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return next(csv.reader(file), [])


def _rewrite(path: Path, header: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows([[row.get(name) or "" for name in header] for row in rows])

    replace_atomically(path, write)


def _cell(value: Any) -> Any:
    return f"{value:.7g}" if isinstance(value, float) else value
