"""Runs in a folder, a line each; runs that differ in their seed only, joined; as Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from freqmask.console import readable_time
from freqmask.errors import UserError
from freqmask.reporting.evaluations import Measured, Row, measured
from freqmask.reporting.facts import given, is_incidental, number, text_of
from freqmask.reporting.reading import Run, is_run, read_run, run_folders

# Measured on the images unless they are asked for; samples of another seed give slightly other numbers.
_MEASURED = frozenset({"mean", "std", "value_range"})
_CURVES = {"relative_loss": "loss / zero", "held_out_relative_loss": "held-out loss / zero"}


@dataclass(frozen=True)
class Cell:
    """A number over the runs of a family.

    Attributes:
        values: one a run.
        digits: after the point.
    """

    values: tuple[float, ...]
    digits: int = 1

    @property
    def mean(self) -> float:
        """Over runs."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over runs; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Line:
    """One family of runs: the values of the settings that vary, and a cell or None for each number."""

    settings: list[str]
    cells: list[Cell | None]


@dataclass(frozen=True)
class Table:
    """What all formats are written from.

    Attributes:
        settings: names of the settings that vary between families.
        numbers: names of the columns of numbers.
        lines: a family each.
        notes: sentences that belong below.
    """

    settings: list[str]
    numbers: list[str]
    lines: list[Line]
    notes: list[str]


def join_seeds(runs: Sequence[Run], others: Sequence[Row] = ()) -> Table:
    """Families of runs that differ in nothing but their seed, beside what varies between the families.

    Args:
        runs: in the order in which their families are shown.
        others: evaluation rows of models that are no runs; a line a model, at the end.
    """
    families: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        families.setdefault(tuple(sorted(identity(run).items())), []).append(run)
    settings = _varying(runs)
    baselines = measured(others)
    columns = _columns(runs, baselines)
    lines = [
        Line(_settings(family, settings), [_cell(family, read, digits) for _, read, digits, _ in columns])
        for family in families.values()
    ]
    lines += [_baseline(model, baselines, settings, columns) for model in _models(baselines)]
    return Table(settings or ["run"], [name for name, _, _, _ in columns], lines, _notes(runs))


def _settings(family: Sequence[Run], settings: Sequence[str]) -> list[str]:
    values = identity(family[0])
    return [values.get(name, "–") for name in settings] or [", ".join(run.name for run in family)]


def _models(baselines: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(one.model for one in baselines))


def _baseline(
    model: str, baselines: Sequence[Measured], settings: Sequence[str], columns: Sequence[Column]
) -> Line:
    """A model that is no run: its name where the settings stand, seeds of its evaluation where runs stand."""
    found = {
        _kind(one): Cell(tuple(100 * value for value in one.values))
        for one in baselines
        if one.model == model
    }
    names = [model, *["–"] * (len(settings) - 1)]
    return Line(names, [found.get(kind) if kind else None for _, _, _, kind in columns])


def identity(run: Run) -> dict[str, str]:
    """The settings that make a run what it is, without its seed; a run without config.yaml is one of its own."""
    if not run.config:
        return {"run": run.name}
    ignored = {"seed"} | (_MEASURED - set(given(run)))
    return {
        name: text_of(value)
        for name, value in run.config.items()
        if name not in ignored and not is_incidental(name)
    }


def _varying(runs: Sequence[Run]) -> list[str]:
    """What varies and was typed for some run; what only follows from that (auto) is left out where it can be."""
    settings = [identity(run) for run in runs]
    names = list(dict.fromkeys(name for one in settings for name in one))
    varying = [name for name in names if len({one.get(name) for one in settings}) > 1]
    typed = [name for name in varying if any(name in given(run) for run in runs)]
    return typed or varying


Kind = tuple[str, str, str, str]
Column = tuple[str, Callable[[Run], float | None], int, Kind | None]


def _columns(runs: Sequence[Run], baselines: Sequence[Measured]) -> list[Column]:
    """Losses at the end, then every protocol and variant on every data set."""
    columns: list[Column] = [
        (title, _last(name), 3, None)
        for name, title in _CURVES.items()
        if any(name in run.curves for run in runs)
    ]
    found = [*(one for run in runs for one in measured(run.results)), *baselines]
    kinds = list(dict.fromkeys(map(_kind, found)))
    return columns + [(_title(kind, kinds), _score(kind), 1, kind) for kind in kinds]


def _last(name: str) -> Callable[[Run], float | None]:
    # held-out images are looked at rarely, and all of them: their last value needs no smoothing
    def read(run: Run) -> float | None:
        curve = run.curves.get(name)
        if curve is None:
            return None
        return curve.last if name.startswith("held_out") else curve.tail()

    return read


def _kind(one: Measured) -> Kind:
    return one.protocol, one.variant, one.data, one.score


def _title(kind: Kind, kinds: Sequence[Kind]) -> str:
    """Protocol and variant; data and score where they are needed to tell columns apart."""
    protocol, variant, data, score = kind
    title = " ".join(filter(None, [protocol, variant]))
    if len({other[2] for other in kinds}) > 1:
        title += f", {data}"
    if len({other[3] for other in kinds}) > 1:
        title += f", {score}"
    return title + " %"


def _score(kind: Kind) -> Callable[[Run], float | None]:
    def read(run: Run) -> float | None:
        found = [one.mean for one in measured(run.results) if _kind(one) == kind]
        return 100 * statistics.fmean(found) if found else None

    return read


def _cell(family: Sequence[Run], read: Callable[[Run], float | None], digits: int) -> Cell | None:
    values = [value for value in map(read, family) if value is not None]
    return Cell(tuple(values), digits) if values else None


def _notes(runs: Sequence[Run]) -> list[str]:
    unfinished = [run.name for run in runs if run.status != "finished"]
    notes = ["mean ± standard deviation over runs that differ in their seed only, (n) of them"]
    if unfinished:
        notes.append("not finished: " + ", ".join(unfinished))
    return notes


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "±": r"$\pm$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def markdown(table: Table) -> str:
    """Columns under each other, so that the source reads as well as the page."""
    header = [*table.settings, *table.numbers]
    rows = [[*line.settings, *map(_plain, line.cells)] for line in table.lines]
    cells = [[_markdown_text(cell) for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    left = len(table.settings)
    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [cells[0], rule, *cells[1:]]
    ]
    return "\n".join([*lines, "", *(f"{_markdown_text(note)}  " for note in table.notes)]).rstrip()


def comma_separated(table: Table) -> str:
    """For a program: mean, standard deviation and n of every number in columns of their own."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    parts = [f"{name} {part}" for name in table.numbers for part in ("mean", "std", "n")]
    writer.writerow([*table.settings, *parts])
    for line in table.lines:
        writer.writerow([*line.settings, *(text for cell in line.cells for text in _apart(cell))])
    return buffer.getvalue().rstrip("\n")


def latex(table: Table) -> str:
    """A tabular for the booktabs package."""
    header = [*table.settings, *table.numbers]
    rows = [[*line.settings, *map(_plain, line.cells)] for line in table.lines]
    lines = [
        *(f"% {note}" for note in table.notes),
        r"\begin{tabular}{" + "l" * len(table.settings) + "r" * len(table.numbers) + "}",
        r"\toprule",
        _latex_row(header),
        r"\midrule",
        *map(_latex_row, rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines)


FORMS = {"md": markdown, "csv": comma_separated, "latex": latex}


def _plain(cell: Cell | None) -> str:
    """Mean ± standard deviation (n).

    >>> _plain(Cell((40.0, 42.0)))
    '41.0 ± 1.4 (2)'
    """
    if cell is None:
        return "–"
    spread = f" ± {cell.deviation:.{cell.digits}f}" if cell.deviation is not None else ""
    return f"{cell.mean:.{cell.digits}f}{spread} ({len(cell.values)})"


def _apart(cell: Cell | None) -> list[str]:
    if cell is None:
        return ["", "", "0"]
    deviation = f"{cell.deviation:.6g}" if cell.deviation is not None else ""
    return [f"{cell.mean:.6g}", deviation, str(len(cell.values))]


def _markdown_text(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|"))


def _latex_row(cells: list[str]) -> str:
    return " & ".join("".join(_LATEX.get(sign, sign) for sign in cell) for cell in cells) + r" \\"


RUN_COLUMNS = ("run", "state", "method", "backbone", "steps", "time", "loss / zero", "best probe")
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
    rows = [RUN_COLUMNS, *map(_run_row, runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(RUN_COLUMNS))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _run_row(run: Run) -> tuple[str, ...]:
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
