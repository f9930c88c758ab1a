"""A run as its folder tells it, whatever state the folder is in."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from freqmask.errors import UserError, nearest
from freqmask.training.files import current_name, read_rows
from freqmask.training.run_folder import CONFIG, SKIPPED, STATE, SUMMARY, RunFolder

Status = Literal["finished", "going on", "stopped"]

PLAN = "plan.png"
RESULTS = "results.csv"
_PREVIEW = re.compile(r"step-(\d+)\.png")
_MARKS = (CONFIG, STATE, SUMMARY, "metrics.csv", RESULTS)  # a folder with none of these is no run


@dataclass(frozen=True)
class Curve:
    """One column of metrics.csv over the steps.

    Attributes:
        steps: optimiser steps, rising.
        values: as many finite numbers.
        not_finite: how many cells held NaN or infinity.
    """

    steps: np.ndarray
    values: np.ndarray
    not_finite: int = 0

    @property
    def last(self) -> float:
        """The value at the end."""
        return float(self.values[-1])

    def tail(self, rows: int = 20) -> float:
        """The median of the last rows, at most a quarter of all, which one odd batch does not move."""
        return float(np.median(self.values[-min(rows, max(len(self.values) // 4, 1)) :]))


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        path: the folder.
        name: told apart from the other runs of the same report.
        status: finished, going on (a living process trains here), or stopped on the way.
        config: every option, resolved; empty where the file is missing.
        state: run.json: what was asked for, versions, number of images.
        summary: what it ended with.
        curves: column of metrics.csv to its curve.
        rows: logged rows that could be read.
        skipped: rows of skipped.csv.
        results: rows of results.csv.
        previews: step and picture, rising.
        plan: the picture drawn before the first step.
        missing: a sentence for everything that should be here and is not, or cannot be read.
    """

    path: Path
    name: str
    status: Status
    config: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    rows: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    results: list[dict[str, str]] = field(default_factory=list)
    previews: list[tuple[int, Path]] = field(default_factory=list)
    plan: Path | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step that is known of."""
        steps = [int(curve.steps[-1]) for curve in self.curves.values()]
        return max([*steps, int(self.summary.get("steps") or 0)], default=0)

    @property
    def total_steps(self) -> int | None:
        """How many it was asked for."""
        steps = self.config.get("steps")
        return int(steps) if isinstance(steps, (int, float)) else None


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs at ``paths``; a folder of runs stands for all runs in it.

    Raises:
        UserError: a path does not exist, or holds no run.
    """
    folders = [folder for path in paths for folder in run_folders(Path(path))]
    unique = list({folder.resolve(): folder for folder in folders}.values())
    return [read_run(path, name) for path, name in zip(unique, _names(unique), strict=True)]


def read_run(path: Path, name: str | None = None) -> Run:
    """One run.

    Args:
        path: its folder.
        name: what it is called; by default as its folder.

    Raises:
        UserError: there is no run.
    """
    if not is_run(path):
        raise UserError(_no_run(path))
    missing: list[str] = []
    folder = RunFolder(path)
    config = _tolerant(folder.config, folder.path / CONFIG, missing)
    state = _tolerant(folder.state, folder.path / STATE, missing)
    summary = _tolerant(folder.summary, folder.path / SUMMARY, missing) if folder.finished() else {}
    curves, rows = read_curves(folder.metrics, missing)
    return Run(
        path=path,
        name=name or path.resolve().name,
        status=_status(folder),
        config=config,
        state=state,
        summary=summary,
        curves=curves,
        rows=rows,
        skipped=_tolerant_rows(path / SKIPPED, missing),
        results=_tolerant_rows(path / RESULTS, missing),
        previews=_previews(folder.previews, missing),
        plan=path / PLAN if (path / PLAN).is_file() else None,
        missing=missing,
    )


def read_results(paths: Sequence[str | Path]) -> list[dict[str, str]]:
    """The rows of results.csv files that belong to no run, such as those of raw pixels or public weights.

    Raises:
        UserError: a file does not exist, or is no table of results.
    """
    rows: list[dict[str, str]] = []
    for path in map(Path, paths):
        missing = [] if path.is_file() else ["it does not exist"]
        read = _tolerant_rows(path, missing)
        if missing or any("model" not in row for row in read):
            why = missing[0] if missing else "it has no column named model"
            raise UserError(f"results ({path}) must be a results.csv of `freqmask evaluate`: {why}")
        rows += read
    return rows


def is_run(path: Path) -> bool:
    """Whether anything of a run is there."""
    return any((path / mark).is_file() for mark in _MARKS)


def runs_in(folder: Path) -> list[Path]:
    """The run folders directly inside a folder, by name; a folder of runs with a table of results is none."""
    found = sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))
    return [path for path in found if _begun(path) or not any(map(is_run, _folders_in(path)))]


def _begun(path: Path) -> bool:
    return any((path / mark).is_file() for mark in _MARKS if mark != RESULTS)


def _folders_in(path: Path) -> list[Path]:
    return [inside for inside in path.iterdir() if inside.is_dir()]


def run_folders(path: Path) -> list[Path]:
    """A run folder itself, or the runs inside a folder of runs (which may hold a table of results, too)."""
    if _begun(path) or not path.is_dir():
        return [path]
    return runs_in(path) or [path]


def _no_run(path: Path) -> str:
    if not path.exists():
        there = [run.name for run in runs_in(path.parent)] if path.parent.is_dir() else []
        hint = f"; {nearest(path.name, there)}" if there and len(there) < 1000 else ""
        return f"run ({path}) does not exist{hint}"
    if not path.is_dir():
        return f"run ({path}) must be a run folder, it is a file; name the folder that pretrain printed"
    return (
        f"run ({path}) holds no run: no {CONFIG}, no metrics.csv; `freqmask runs` lists the runs under runs/"
    )


def _names(paths: Sequence[Path]) -> list[str]:
    names = [path.resolve().name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def _status(folder: RunFolder) -> Status:
    if folder.finished():
        return "finished"
    try:
        return "going on" if folder.is_locked() else "stopped"
    except OSError:  # a folder that we may only read cannot be asked for its lock
        return "stopped"


def _tolerant(read: Any, path: Path, missing: list[str]) -> dict[str, Any]:
    try:
        content = read() if path.is_file() else None
    except (UserError, OSError, ValueError) as error:
        missing.append(f"{path.name} cannot be read: {error}")
        return {}
    if content is None:
        missing.append(f"{path.name} is missing.")
        return {}
    if not isinstance(content, dict):
        missing.append(f"{path.name} holds no options.")
        return {}
    return content


def _tolerant_rows(path: Path, missing: list[str]) -> list[dict[str, str]]:
    try:
        rows = read_rows(path)
    except (csv.Error, OSError) as error:
        missing.append(f"{path.name} cannot be read: {error}")
        return []
    # a row that is too long has a None key, one that is too short has None values
    return [{key: value or "" for key, value in row.items() if key} for row in rows]


def _previews(folder: Path, missing: list[str]) -> list[tuple[int, Path]]:
    found = [(_PREVIEW.fullmatch(path.name), path) for path in folder.glob("*.png")]
    pictures = sorted((int(match[1]), path) for match, path in found if match)
    if not pictures:
        missing.append("No preview has been drawn yet.")
    return pictures


def read_curves(path: Path, missing: list[str]) -> tuple[dict[str, Curve], int]:
    """The columns of a metrics table, as far as it can be read.

    Args:
        path: metrics.csv.
        missing: takes a sentence for what cannot be read.

    Returns:
        Column to curve, without those that hold no number, and the number of rows.
    """
    if not path.is_file():
        missing.append("metrics.csv is missing: nothing was logged, or it was moved; there are no curves.")
        return {}, 0
    header, rows, broken = _table(path)
    if "step" not in header:
        missing.append("metrics.csv has no column named step; there are no curves.")
        return {}, 0
    if broken:
        missing.append(f"{broken:,} lines of metrics.csv are cut short or garbled and were left out.")
    if not rows:
        missing.append("metrics.csv holds no row yet; there are no curves.")
        return {}, 0
    columns = dict(_columns(header, rows))
    steps = np.array([_number(cell) for cell in columns.pop("step")])
    curves = {name: _curve(steps, cells) for name, cells in columns.items()}
    return {name: curve for name, curve in curves.items() if len(curve.values)}, len(rows)


def _table(path: Path) -> tuple[list[str], list[list[str]], int]:
    """Header, whole rows, and how many lines are not whole."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    lines = text.splitlines(keepends=True)
    cut = 1 if lines and not lines[-1].endswith("\n") else 0
    try:
        table = list(csv.reader(io.StringIO("".join(lines[: len(lines) - cut]))))
    except csv.Error:
        return [], [], 0
    header, rows = ([current_name(name) for name in table[0]], table[1:]) if table else ([], [])
    position = header.index("step") if "step" in header else 0
    whole = [row for row in rows if len(row) == len(header) and math.isfinite(_number(row[position]))]
    return header, whole, len(rows) - len(whole) + cut


def _columns(header: list[str], rows: list[list[str]]) -> Iterable[tuple[str, tuple[str, ...]]]:
    return zip(header, zip(*rows, strict=True), strict=True)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _curve(steps: np.ndarray, cells: Sequence[str]) -> Curve:
    values = np.array([_number(cell) for cell in cells])
    finite = np.isfinite(values)
    filled = sum(1 for cell in cells if cell)
    order = np.argsort(steps[finite], kind="stable")
    return Curve(steps[finite][order], values[finite][order], filled - int(finite.sum()))
