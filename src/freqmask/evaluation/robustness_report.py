"""What an examination leaves behind: a table over all models, rows, curves, a sheet of corrupted images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from freqmask.console import say
from freqmask.evaluation import corruption_error
from freqmask.evaluation.examination import CLEAN, CORRUPTED
from freqmask.evaluation.job import Setting
from freqmask.evaluation.labelled import LabelledData
from freqmask.evaluation.results import Summary, aligned, append_results, percent
from freqmask.evaluation.robustness_board import Board, Points, headlines, points_of
from freqmask.evaluation.robustness_pictures import draw_curves, draw_sheet
from freqmask.evaluation.subjects import Subject

if TYPE_CHECKING:
    from freqmask.evaluation.robustness import Wanted

Cells = dict[str, str]  # column -> text


def tell(
    boards: Sequence[Board],
    setting: Setting,
    head: str,
    example: tuple[Subject, LabelledData, Wanted] | None,
) -> list[Summary]:
    """The tables, the rows, the pictures; returns all summaries."""
    for line in ["", f"robustness, {head} head; accuracy in %", *main_table(boards)]:
        say(line)
    for board in boards:
        lines = corruption_table(board)
        for line in ["", *lines] if lines else []:
            say(line)
    tables: dict[Path, None] = {}
    for board in boards:
        for data, result in board.results:
            tables |= dict.fromkeys(
                append_results([result], data, "robustness", setting.options, setting.out)
            )
    subjects = [result.subject for board in boards for _, result in board.results]
    folder = setting.out or next((one.results for one in subjects if one.results), None) or Path()
    pictures = [folder / "robustness.png"]
    draw_curves(pictures[0], boards)
    if example is not None:
        pictures.append(folder / "corruptions.png")
        draw_sheet(pictures[-1], *example)
    say()
    say(f"rows        {', '.join(map(str, tables))}")
    say(f"look at     {' and '.join(map(str, pictures))}")
    return [summary for board in boards for summary in board.summaries]


def main_table(boards: Sequence[Board]) -> list[str]:
    """A line a model: clean, corrupted (also in per cent of clean), attacks, mCE, other test sets."""
    rows: dict[str, Cells] = {}
    for board in boards:
        for name, summaries in board.models.items():
            rows.setdefault(name, {}).update(_cells(board, summaries))
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [["model", *columns]]
    for name, cells in rows.items():
        trouble = cells.get(CLEAN, "").startswith("features")
        lines.append(
            [name, cells[CLEAN]] if trouble else [name, *(cells.get(column, "-") for column in columns)]
        )
    return [*aligned(lines), *_notes(columns)]


def _cells(board: Board, summaries: dict[str, Summary]) -> Cells:
    cells: Cells = {}
    for title, one in headlines(board, summaries).items():
        cells[title] = one.trouble or percent(one)
        if one.variant == CORRUPTED and one.accuracies:
            low, high = one.interval
            cells["95 % interval"] = f"{100 * low:.1f} to {100 * high:.1f}"
            clean = summaries.get(CLEAN)
            if clean is not None:
                cells["of clean"] = f"{100 * np.mean(one.accuracies) / np.mean(clean.accuracies):.0f} %"
    points = points_of(summaries)
    if corruption_error.applies(board.data.class_names, board.side, points):
        title = "mCE" if board.is_read else "mCE (made)"
        cells[title] = f"{100 * corruption_error.mean_corruption_error(points):.1f}"
    return cells


def _notes(columns: Sequence[str]) -> list[str]:
    notes = []
    if CORRUPTED in columns:
        notes.append("(corrupted: the mean over corruptions and severities; the interval is its own)")
    if "mCE (made)" in columns:
        notes.append(
            "(mCE (made): ImageNet-C's files are JPEGs, ours are not; read them for published numbers)"
        )
    return notes


def corruption_table(board: Board) -> list[str]:
    """Mean over severities: a line a corruption, a column a model."""
    models = {name: points for name, points in board.points.items() if points}
    if not models:
        return []
    rows = [["mean over severities", *models]]
    rows += [
        [name, *(f"{100 * _mean(points, name):.1f}" for points in models.values())]
        for name in board.corruptions
    ]
    return aligned(rows)


def _mean(points: Points, name: str) -> float:
    found = [accuracy for (one, _), accuracy in points.items() if one == name]
    return float(np.mean(found)) if found else float("nan")
