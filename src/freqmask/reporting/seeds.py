"""Runs that differ in their seed only, joined: the ablation table of a paper."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from freqmask.reporting.evaluations import Measured, Row, measured
from freqmask.reporting.facts import given, is_incidental, text_of
from freqmask.reporting.reading import Run

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
