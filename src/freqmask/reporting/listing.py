"""Runs in a folder, a line each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from freqmask.console import readable_time
from freqmask.errors import UserError
from freqmask.reporting.evaluations import measured
from freqmask.reporting.facts import number
from freqmask.reporting.reading import Run, is_run, read_run, run_folders

HEADER = ("run", "state", "method", "backbone", "steps", "time", "loss / zero", "best probe")
_PROBES = ("linear", "knn")


def list_runs(folder: Path) -> list[Run]:
    """The runs of a folder, or the run that it is.

    Raises:
        UserError: the folder does not exist, or there is none in it.
    """
    if not folder.is_dir():
        raise UserError(f"folder ({folder}) does not exist; `freqmask pretrain` makes runs/, or name another")
    paths = run_folders(folder)
    if paths == [folder] and not is_run(folder):
        raise UserError(f"folder ({folder}) holds no run; name the folder above the run folders")
    return [read_run(path) for path in paths]


def table_lines(runs: Sequence[Run]) -> list[str]:
    """The runs under a header, columns below each other."""
    rows = [HEADER, *map(_row, runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _row(run: Run) -> tuple[str, ...]:
    seconds = number(run.summary.get("seconds"))
    curve = run.curves.get("relative_loss")
    steps = f"{run.last_step:,}"
    if run.status != "finished" and run.total_steps:
        steps += f" of {run.total_steps:,}"
    cells = (
        run.name,
        run.status,
        str(run.config.get("method") or "?"),
        str(run.config.get("backbone") or "?"),
        steps,
        readable_time(seconds) if seconds is not None else "–",
        f"{curve.tail():.3f}" if curve is not None else "–",
        best_probe(run),
    )
    # a name may hold a line break or an escape sequence
    return tuple(cell if cell.isprintable() else repr(cell)[1:-1] for cell in cells)


def best_probe(run: Run) -> str:
    """The highest score of a linear or k-NN probe, and which it was."""
    probes = [one for one in measured(run.results) if one.protocol in _PROBES]
    if not probes:
        return "–"
    best = max(probes, key=lambda one: one.mean)
    variant = f" {best.variant}" if best.variant else ""
    return f"{100 * best.mean:.1f} % ({best.protocol}{variant})"
