"""Labels from a table: a CSV file with path and label, and optionally split and group."""

from __future__ import annotations

import codecs
import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from freqmask.data.source import Source, SourceSummary, Subset
from freqmask.data.splits import Located
from freqmask.errors import UserError, nearest

COLUMNS = ("path", "label", "split", "group")
MOST_NUMBERED = 100_000  # numbers up to there are classes by their value, ids beyond by their order
_FOREIGN = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8


@dataclass(frozen=True)
class Row:
    """A line of the table; what is empty there is None."""

    path: str
    label: str | None
    split: str | None
    group: str | None


def read_labels(file: Path) -> list[Row]:
    """The lines of a CSV table with a header; commas, semicolons or tabs; in UTF-8, UTF-16 or Windows-1252.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    try:
        text = decode_table(file.read_bytes())
    except OSError as error:
        raise UserError(f"labels ({file}) cannot be read ({error.strerror}); check the path") from error
    first, _, rest = text.partition("\n")
    told = re.fullmatch(r"sep=(.)\r?", first)  # Excel's way to name the delimiter
    delimiter = told[1] if told else max(",;\t", key=first.count)
    reader = csv.DictReader(io.StringIO(rest if told else text, newline=""), delimiter=delimiter)
    try:
        return _rows(reader, file)
    except csv.Error as error:
        raise UserError(f"labels ({file}) is no CSV table ({error}); check its quotes") from error


def _rows(reader: csv.DictReader[str], file: Path) -> list[Row]:
    columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
    missing = [name for name in COLUMNS[:2] if name not in columns]
    if missing:
        hint = nearest(missing[0], columns) if columns else "the file is empty"
        raise UserError(
            f"labels ({file}) must have the columns path and label, {missing[0]} is missing; {hint}"
        )

    def cell(record: dict[str, str], name: str) -> str | None:
        return as_text((record.get(columns.get(name, "")) or "").strip()) or None

    return [
        Row(record[columns["path"]], *(cell(record, name) for name in COLUMNS[1:]))
        for record in reader
        if (record[columns["path"]] or "").strip()
    ]


def decode_table(data: bytes) -> str:
    """The text of a table in the encoding that its bytes speak for; bytes that are no UTF-8 become surrogates."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return data.decode("utf-32", errors="replace")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    beginning = data[:200]
    if beginning.count(0) > len(beginning) // 4:  # in UTF-16 every other byte of plain letters is 0
        order = "utf-16-le" if beginning[1::2].count(0) > beginning[::2].count(0) else "utf-16-be"
        return data.decode(order, errors="replace")
    return data.decode("utf-8-sig", errors="surrogateescape")


def as_text(cell: str) -> str:
    """A cell whose bytes are no UTF-8 as Windows-1252 has it, which most of such tables are written in."""
    if not _FOREIGN.search(cell):
        return cell
    data = cell.encode("utf-8", errors="surrogateescape")
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def locate_labelled(file: Path, source: Callable[[], Source]) -> Located:
    """The images that a table lists, with its labels, groups and splits; its paths are names of ``source()``."""
    splits = sorted({row.split for row in read_labels(file) if row.split})
    return Located(str(file), lambda split, notes: LabelledSource(source(), file, split, notes), splits)


class LabelledSource(Subset):
    """Images of a source, by their names, that a split of a table lists (None: all of it), with its labels and groups.

    Raises:
        UserError: the table names images that are not there, or names one twice.
    """

    def __init__(self, source: Source, file: Path, chosen: str | None, notes: list[str]) -> None:
        rows = [row for row in read_labels(file) if chosen is None or row.split == chosen]
        super().__init__(source, _find(source, rows, file))
        if _FOREIGN.search(decode_table(file.read_bytes())):
            notes = [*notes, f"{file.name} is not in UTF-8; it is read as Windows-1252."]
        unlisted = len(source) - len(self)
        if unlisted and chosen is None:
            notes = [*notes, f"{unlisted:,} images that {file.name} does not list are left out."]
        self.notes = notes
        self.class_names = in_order({row.label for row in rows if row.label is not None}) or None
        numbers = {name: number for number, name in enumerate(self.class_names or ())}
        self._labels = np.array([-1 if row.label is None else numbers[row.label] for row in rows], np.int64)
        self._groups = [row.group for row in rows] if any(row.group for row in rows) else None

    label, all_labels = Source.label, Source.all_labels

    def group(self, index: int) -> str | None:
        return super().group(index) if self._groups is None else self._groups[index]

    def summary(self) -> SourceSummary:
        whole = super().summary()
        whole.notes = [*whole.notes, *self.notes]
        return whole


def number_classes(
    values: Sequence[int | str | None], names: list[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Labels counted from 0, int64 (image,) and -1 where there is none, and what they are called.

    Values are a name or a number of each image, None or negative without one; names are those of 0, 1, ... if known.

    >>> number_classes(["dog", None, "cat"])[1], number_classes([2, -1, 0])[0].tolist()
    (['cat', 'dog'], [2, -1, 0])
    """
    known = {value for value in values if value is not None and not (isinstance(value, int) and value < 0)}
    if names is None and all(isinstance(value, int) for value in known):
        largest = max((int(value) for value in known), default=-1)
        names = [str(number) for number in range(largest + 1)] if largest < MOST_NUMBERED else None
    places: dict[Any, int]
    if names is not None:
        places = {number: number for number in range(len(names))}
    else:
        ordered = sorted(known, key=lambda value: (isinstance(value, str), value))
        places, names = {value: place for place, value in enumerate(ordered)}, [str(v) for v in ordered]
    return np.array([places.get(value, -1) for value in values], np.int64), names


def in_order(labels: set[str]) -> list[str]:
    """Class names: numbers by value, anything else by the alphabet."""
    if all(label.isdecimal() for label in labels):
        return sorted(labels, key=int)
    return sorted(labels)


def _find(source: Source, rows: list[Row], file: Path) -> np.ndarray:
    if not rows:
        raise UserError(f"labels ({file}) lists no images; it needs a line for each below its header")
    numbers = {source.name(index): index for index in range(len(source))}
    # a name may begin with a space or hold a backslash; more often, they are of the table
    paths = [row.path if row.path in numbers else _as_name(row.path.strip(), source) for row in rows]
    if any(path not in numbers for path in paths):
        paths = _otherwise_spelt(paths, numbers)
    missing = [path for path in paths if path not in numbers]
    if missing:
        close = nearest(missing[0], list(numbers)[:10_000])
        relative = f"names are relative to DATA, like {source.name(0)!r}"
        hint = close if close.startswith("did you mean") else relative
        raise UserError(
            f"labels ({file}) names {len(missing)} images that DATA lacks (first {missing[0]!r}); {hint}"
        )
    if len(set(paths)) < len(paths):
        twice = Counter(paths).most_common(1)[0][0]
        raise UserError(f"labels ({file}) names {twice!r} twice; one line an image")
    return np.array([numbers[path] for path in paths], np.int64)


def _otherwise_spelt(paths: list[str], numbers: dict[str, int]) -> list[str]:
    """Names as DATA has them, where a table writes ü as one character and the disc as two, or in another encoding."""
    composed = {unicodedata.normalize("NFC", name): name for name in numbers}
    return [
        path if path in numbers else composed.get(unicodedata.normalize("NFC", as_text(path)), path)
        for path in paths
    ]


def _as_name(path: str, source: Source) -> str:
    """A path of the table as sources name images: relative to the folder, with forward slashes."""
    root = getattr(source, "root", None)
    if root is not None and Path(path).is_absolute():
        for base in (Path(root).absolute(), Path(root).resolve()):
            if Path(path).is_relative_to(base):
                return Path(path).relative_to(base).as_posix()
    return path.replace("\\", "/").removeprefix("./")
