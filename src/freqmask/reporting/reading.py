"""A run as its folder tells it, whatever state the folder is in."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from freqmask.errors import UserError, nearest
from freqmask.training.files import current_name, ends_whole, read_rows
from freqmask.training.run_folder import (
    CONFIG,
    RESULTS,
    SKIPPED,
    STATE,
    SUMMARY,
    RunFolder,
    folders_in,
    names_in,
)

_BEGUN = (CONFIG, STATE, SUMMARY, "metrics.csv")  # a folder with none of these is no run
# columns of runs that were begun before run.json recorded the parts of their loss
_OLD_PARTS = re.compile(r"reconstruction|(token_)?distillation|(?!(held_out_)?relative_loss).*_loss|loss/.*")
_PREVIEW, _CHECKPOINT = re.compile(r"step-(\d+)\.png"), re.compile(r"step-(\d+)\.ckpt")


@dataclass(frozen=True)
class Curve:
    """One column of metrics.csv: finite values at rising optimizer steps, and how many cells held NaN or infinity."""

    steps: np.ndarray
    values: np.ndarray
    not_finite: int = 0

    @property
    def last(self) -> float:
        """The value at the end."""
        return float(self.values[-1])

    def tail(self) -> float:
        """The median of the last 20 rows, at most a quarter of all, which one odd batch does not move."""
        return float(np.median(self.values[-min(20, max(len(self.values) // 4, 1)) :]))

    def thinned(self, most: int) -> Curve:
        """With at most ``most`` (4 or more) points: of each stretch its lowest and its highest, and both ends.

        A spike of a single step survives, which a mean or every n-th point would lose.
        """
        if len(self.steps) <= most:
            return self
        bounds = np.linspace(0, len(self.steps), (most - 2) // 2 + 1).astype(int)
        chosen = {0, len(self.steps) - 1}
        for start, stop in pairwise(bounds):
            stretch = self.values[start:stop]
            chosen |= {start + int(np.argmin(stretch)), start + int(np.argmax(stretch))}
        places = sorted(chosen)
        return Curve(self.steps[places], self.values[places])

    def trend(self, parts: int) -> Curve:
        """Its mean over each of ``parts`` stretches, at the stretch's mean step."""
        stretches = np.array_split(np.arange(len(self.steps)), min(parts, len(self.steps)))
        columns = (self.steps, self.values)
        steps, values = (np.array([column[part].mean() for part in stretches]) for column in columns)
        return Curve(steps, values)


EARLY = "measured before the training ended, perhaps of earlier weights (evaluate again)"


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    path: Path  # the folder
    name: str  # told apart from the other runs of the same report
    # finished, running (a living process trains here), or stopped on the way
    status: Literal["finished", "running", "stopped"]
    # every option, resolved; empty where the file is missing
    config: dict[str, Any] = field(default_factory=dict)
    # run.json: what was asked for, versions, number of images
    state: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)  # what it ended with
    curves: dict[str, Curve] = field(default_factory=dict)  # column of metrics.csv to its curve
    checkpoint: int = 0  # the step of the last one
    skipped: list[dict[str, str]] = field(default_factory=list)  # rows of skipped.csv
    results: list[dict[str, str]] = field(default_factory=list)  # rows of results.csv on the run itself
    others: list[dict[str, str]] = field(default_factory=list)  # those on models that were compared with it
    previews: list[tuple[int, Path]] = field(default_factory=list)  # step and image file, rising
    plan: Path | None = None  # the image drawn before the first step
    # a sentence for everything that should be here and is not, or cannot be read
    missing: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step that is known of."""
        steps = [int(curve.steps[-1]) for curve in self.curves.values()]
        return max([*steps, self.checkpoint, whole_number(self.summary.get("steps")) or 0])

    @property
    def total_steps(self) -> int | None:
        """How many it was asked for."""
        return whole_number(self.config.get("steps"))

    @property
    def early(self) -> list[str]:
        """The protocols that were measured before its training ended, by the clock."""
        ended = str(self.summary.get("ended", ""))
        return [
            *dict.fromkeys(row.get("protocol", "") for row in self.results if row.get("time", ended) < ended)
        ]

    @property
    def given(self) -> dict[str, Any]:
        """The options that were typed, as against those that were chosen by auto."""
        words = self.state.get("given")
        return words if isinstance(words, dict) else {}

    @property
    def loss_parts(self) -> list[str]:
        """The columns that its method adds up to the loss."""
        parts = self.state.get("parts")
        return (
            parts if isinstance(parts, list) else [name for name in self.curves if _OLD_PARTS.fullmatch(name)]
        )


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs at ``paths``; a folder of runs stands for all runs in it.

    Raises:
        UserError: a path does not exist, or holds no run.
    """
    folders = [folder for path in paths for folder in run_folders(Path(path).expanduser())]
    unique = {folder.resolve(): folder for folder in folders}
    names = [path.name for path in unique]
    return [
        read_run(folder, path.name if names.count(path.name) == 1 else str(folder))
        for path, folder in unique.items()
    ]


def read_run(path: Path, name: str | None = None) -> Run:
    """The run in a folder, called as that where it has no other name; a UserError where there is none."""
    if not _is_begun(path):
        raise UserError(_no_run(path))
    missing: list[str] = []
    folder = RunFolder(path)
    matches = [(_PREVIEW.fullmatch(file.name), file) for file in folder.previews.glob("*.png")]
    saved = [file.name for file in folder.checkpoints.glob("*.ckpt")]
    rows = _rows(path / RESULTS, missing)
    own = names_in(rows, path.resolve())
    run = Run(
        path=path,
        name=name or path.resolve().name,
        status="finished" if folder.finished() else "running" if _is_trained(folder) else "stopped",
        config=_read(folder.config, path / CONFIG, missing),
        state=_read(folder.state, path / STATE, missing),
        summary=_read(folder.summary, path / SUMMARY, missing) if folder.finished() else {},
        curves=_metrics(folder.metrics, missing),
        checkpoint=max((int(found[1]) for found in map(_CHECKPOINT.fullmatch, saved) if found), default=0),
        skipped=_rows(path / SKIPPED, missing),
        results=[row for row in rows if row.get("model", "") in own],
        others=[row for row in rows if row.get("model", "") not in own],
        previews=sorted((int(match[1]), file) for match, file in matches if match),
        plan=path / "plan.png" if (path / "plan.png").is_file() else None,
        missing=missing,
    )
    if not run.previews:
        missing.append("No preview has been drawn yet.")
    if run.early:
        missing.append(f"{EARLY.capitalize()}: {', '.join(run.early)}.")
    return run


def read_results(paths: Sequence[str | Path]) -> list[dict[str, str]]:
    """The rows of results.csv files that belong to no run, such as those of raw pixels or public weights.

    Raises:
        UserError: a file does not exist, or is no table of results.
    """
    rows: list[dict[str, str]] = []
    for path in (Path(path).expanduser() for path in paths):
        errors = [] if path.is_file() else ["it is a folder" if path.is_dir() else "it does not exist"]
        read = _rows(path, errors)
        if errors or any("model" not in row for row in read):
            why = errors[0] if errors else "it has no column named model"
            raise UserError(f"results ({path}) must be a results.csv of `freqmask evaluate`: {why}")
        rows += read
    return rows


def run_folders(path: Path) -> list[Path]:
    """A run folder itself, or the runs inside a folder of runs (which may hold a table of results, too)."""
    if _is_begun(path) or not path.is_dir():
        return [path]
    return _runs_in(path) or [path]


def _is_begun(path: Path) -> bool:
    return any((path / mark).is_file() for mark in _BEGUN)


def _runs_in(folder: Path) -> list[Path]:
    # a table of results alone, or beside runs, is no run
    return sorted(path for path in folders_in(folder) if _is_begun(path))


def _no_run(path: Path) -> str:
    if not path.exists():
        runs = [run.name for run in _runs_in(path.parent)] if path.parent.is_dir() else []
        hint = f"; {nearest(path.name, runs)}" if runs and len(runs) < 1000 else ""
        return f"run ({path}) does not exist{hint}"
    if not path.is_dir():
        return f"run ({path}) must be a run folder, it is a file; name the folder that pretrain printed"
    table = path / RESULTS
    table_hint = f"; --results {table} shows what was measured there" if table.is_file() else ""
    wanted = "name a run folder, or the folder that such lie in"
    return f"run ({path}) holds no run: no {CONFIG}, no metrics.csv; {wanted}{table_hint}"


def _is_trained(folder: RunFolder) -> bool:
    try:
        return folder.is_locked()
    except OSError:  # a folder that we may only read cannot be asked for its lock
        return False


def _read(read: Any, path: Path, missing: list[str]) -> dict[str, Any]:
    try:
        content = read() if path.is_file() else None
    except (UserError, OSError, ValueError) as error:
        missing.append(f"{path.name} cannot be read: {error}")
        return {}
    if isinstance(content, dict):
        return content
    missing.append(f"{path.name} is missing." if content is None else f"{path.name} holds no options.")
    return {}


def _rows(path: Path, missing: list[str]) -> list[dict[str, str]]:
    try:
        rows = read_rows(path)
        if not ends_whole(path):
            missing.append(
                f"The last line of {path.name} has no line break, may be cut short, and was left out."
            )
    except (UserError, OSError) as error:
        missing.append(f"{path.name} cannot be read: {error}")
        return []
    if path.name == RESULTS and rows and not {"protocol", "model"} <= rows[0].keys():
        names = ", ".join(filter(None, rows[0]))[:80]
        missing.append(f"{RESULTS} is no table of `freqmask evaluate`, separated by commas (it has {names}).")
        return []
    # a row that is too long has a None key, one that is too short has None values
    return [{key: value or "" for key, value in row.items() if key} for row in rows]


def _metrics(path: Path, missing: list[str]) -> dict[str, Curve]:
    """Curves by column, without those that hold no number; why there are none."""
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        missing.append(f"metrics.csv cannot be read: {error}")
        return {}
    lines = content.decode("utf-8-sig", errors="replace").splitlines(keepends=True)
    header, *rows = [_cells(line) for line in lines] or [[]]
    header = [current_name(name) for name in header]
    place = header.index("step") if "step" in header else 0
    whole = [row for row in rows if len(row) == len(header) and math.isfinite(number(row[place]))]
    if "step" in header and len(whole) < len(rows):
        broken = len(rows) - len(whole)
        missing.append(f"{broken:,} lines of metrics.csv are cut short or garbled and were left out.")
    if "step" not in header or not whole:
        why = "holds no row yet" if "step" in header else "has no column named step"
        why = why if path.is_file() else "is missing: nothing was logged, or it was moved"
        missing.append(f"metrics.csv {why}; there are no curves.")
        return {}
    columns = dict(zip(header, zip(*whole, strict=True), strict=True))
    steps = np.array([number(cell) for cell in columns.pop("step")])
    curves = {name: _curve(steps, cells) for name, cells in columns.items()}
    return {name: curve for name, curve in curves.items() if len(curve.values)}


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), []) if line.endswith("\n") else []  # a kill cuts the last one short
    except csv.Error:  # a cell beyond the module's limit
        return []


def _curve(steps: np.ndarray, cells: Sequence[str]) -> Curve:
    values = np.array([number(cell) for cell in cells])
    finite = np.isfinite(values)
    order = np.argsort(steps[finite], kind="stable")
    return Curve(steps[finite][order], values[finite][order], sum(map(bool, cells)) - int(finite.sum()))


def whole_number(value: Any) -> int | None:
    """The value of a setting, cut off behind the point; None where it is no number."""
    return int(number(value)) if math.isfinite(number(value)) else None


def number(value: Any) -> float:
    """The value of a cell or a setting; NaN where it is no number, as a file edited by hand may have it."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
