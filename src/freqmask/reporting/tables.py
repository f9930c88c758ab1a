"""Rows of results.csv joined over seeds, as bars; runs joined over seeds as Markdown, CSV, LaTeX; the list of runs."""

from __future__ import annotations

import csv
import html
import io
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from freqmask.console import plain_name, readable_time
from freqmask.errors import UserError
from freqmask.interop.formats import RANDOM
from freqmask.reporting.reading import EARLY, Curve, Run, number, read_runs
from freqmask.reporting.summary import settings_of

SCORES = ("accuracy", "miou", "mean_iou", "score")  # the first that a row has is the one that is shown
MOST_ROWS = 2_000  # in the page
MOST_BARS = 40  # of a chart in it
# What is measured; rows that agree in these, in the seed and in their command are the same measurement made again.
_SAME = ("protocol", "variant", "data", "split", "test_images", "classes", "model")
# Of a command: how and where it was measured, or what columns tell already (the first line here: the variant).
_NOT_MEASURED = frozenset({
    *("k", "shots", "radii", "corruptions", "severities", "attacks", "features", "images", "masks"),
    *("seeds", "data", "batch_size", "workers", "accelerator", "devices", "precision", "cache", "duplicates"),
    *("strategy", "accumulate", "log_every_steps", "checkpoint_every_steps", "checkpoint_every_minutes"),
    *("keep_checkpoints", "max_skipped_share", "validate_every_epochs", "overlays"),
})  # fmt: skip
_PATHS = ("labels", "frost", "folder")  # may be called from elsewhere
# Measured unless they are asked for: samples of another seed give slightly other numbers, and images come from where
# there is memory.
_MEASURED = frozenset({"mean", "std", "value_range", "images_from"})

Row = Mapping[str, str]
Kind = tuple[str, str, str, str]  # protocol, variant, data and score
# columns of metrics.csv that stand among the scores, and which value counts at the end: held-out images are evaluated
# rarely, and all of them, so that theirs needs no smoothing
_LOSSES: dict[Kind, tuple[str, Callable[[Curve], float]]] = {
    ("relative loss", "", "", ""): ("relative_loss", Curve.tail),
    ("held-out relative loss", "", "", ""): ("held_out_relative_loss", attrgetter("last")),
}


@dataclass(frozen=True)
class Cell:
    """A number over seeds: a value each, shown with so many digits after the point."""

    values: tuple[float, ...]
    digits: int = 1

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Measured:
    """One protocol and variant of a model on one data set, over seeds."""

    kind: Kind  # protocol, variant (such as ``k=20``), data and the score's name
    model: str  # as the row names it
    percent: Cell  # 100 times the score, a value a seed
    interval: tuple[float, float] | None  # 95 % over test images, in percent, where the rows give one

    def whiskers(self) -> tuple[float, float]:
        """How far they reach below and above its bar: over seeds where there are several, else over test images."""
        if self.percent.deviation is not None:
            return self.percent.deviation, self.percent.deviation
        low, high = self.interval or (self.percent.mean, self.percent.mean)
        return max(self.percent.mean - low, 0.0), max(high - self.percent.mean, 0.0)

    def __str__(self) -> str:
        text = f"{self.percent.mean:.1f}"
        if self.percent.deviation is not None:
            return f"{text} ± {self.percent.deviation:.1f} over {len(self.percent.values)} seeds"
        return f"{text}, interval {self.interval[0]:.1f} to {self.interval[1]:.1f}" if self.interval else text


def measured(rows: Sequence[Row], telling: Telling | None = None) -> list[Measured]:
    """Rows joined over seeds; of a measurement that was made again the last counts; rows without score are left out.

    Of a model that was trained in between, or images that became others, those that were measured last are joined.
    Options that tell measurements apart (``--feature``, ``--epochs``) stand in their variants: those that differ among
    the rows, or among all that are shown beside them.
    """
    telling = telling or Telling.of(rows)
    newest: dict[tuple[tuple[str, ...], str], Row] = {}
    last: dict[tuple[str, ...], tuple[str, str]] = {}
    for row in rows:
        score = next((name for name in SCORES if math.isfinite(number(row.get(name)))), None)
        if score is None:
            continue
        key = (*(row.get(name, "") for name in _SAME), telling.words(row), score)
        newest.pop((key, row.get("seed", "")), None)  # the last stands last
        newest[key, row.get("seed", "")] = row
        last[key] = _weights_and_images(row)
    families: dict[tuple[str, ...], list[Row]] = {}
    for (key, _), row in newest.items():
        if _weights_and_images(row) == last[key]:
            families.setdefault(key, []).append(row)
    return [_joined(family, score=key[-1], told=key[-2]) for key, family in families.items()]


def _weights_and_images(row: Row) -> tuple[str, str]:
    """What tells them apart; fresh weights are others for each seed, as they should be."""
    is_fresh = row.get("model", "").startswith(RANDOM)
    return "" if is_fresh else row.get("model_weights", ""), row.get("data_fingerprint", "")


def _kind(row: Row) -> tuple[str, ...]:
    return tuple(row.get(name, "") for name in ("protocol", "variant", "data"))


@dataclass(frozen=True)
class Telling:
    """Which options tell measurements of one kind apart."""

    # by kind: an option -> versions of freqmask that have it
    versions: dict[tuple[str, ...], dict[str, set[str]]]
    differing: set[tuple[tuple[str, ...], str]]  # kinds and options of which there are several values

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Telling:
        """For rows that are shown together."""
        telling = cls({}, set())
        for row in rows:
            known = telling.versions.setdefault(_kind(row), {})
            for name in _options(row.get("command") or ""):
                known.setdefault(name, set()).add(row.get("freqmask", ""))
        first: dict[tuple[tuple[str, ...], str], str] = {}
        for row in rows:
            for name, value in telling._values(row).items():
                if first.setdefault((_kind(row), name), value) != value:
                    telling.differing.add((_kind(row), name))
        return telling

    def words(self, row: Row) -> str:
        """The values by which a row differs from others."""
        values = self._values(row).items() if row.get("command") else ()
        return ", ".join(f"{name} {value}" for name, value in values if (_kind(row), name) in self.differing)

    def _values(self, row: Row) -> dict[str, str]:
        """Options of a row; one that its command could have named and did not has its default."""
        options, version = _options(row.get("command") or ""), row.get("freqmask", "")
        known = self.versions[_kind(row)] if options else {}
        return {
            name: options.get(name, "default")
            for name, versions in known.items()
            if name in options or version in versions
        }


@cache
def _options(command: str) -> dict[str, str]:
    """What a command measured by, values by their option."""
    pairs = (part.partition(" ") for part in command.split(" --")[1:])
    return {
        name: Path(value.strip()).name if name in _PATHS else value.strip()
        for name, _, value in pairs
        if name not in _NOT_MEASURED
    }


def _joined(family: Sequence[Row], score: str, told: str) -> Measured:
    percent, low, high = (
        tuple(100 * number(row.get(name)) for row in family)
        for name in (score, f"{score}_low", f"{score}_high")
    )
    protocol, variant, data, model = (
        family[0].get(name, "") for name in ("protocol", "variant", "data", "model")
    )
    variant = ", ".join(filter(None, (variant, told)))
    known = all(map(math.isfinite, (*low, *high)))
    interval = (statistics.fmean(low), statistics.fmean(high)) if known else None
    return Measured((protocol, variant, data, score), model, Cell(percent), interval)


def evaluation_table(tables: Sequence[tuple[str, Sequence[Row]]]) -> dict[str, Any]:
    """Every evaluation row, of ``tables`` of a run's name (empty for models that are no runs) and its rows.

    Returns:
        ``header`` and ``rows``, the last so many; ``count``: how many there are; ``alike``: columns that say the
        same in every row, with what they say, which are left out of the rows.
    """
    pairs = [(owner or row.get("model", ""), row) for owner, rows in tables for row in rows]
    columns = list(dict.fromkeys(name for _, row in pairs for name in row))
    alike = {
        name: pairs[0][1].get(name, "")
        for name in columns
        if len(pairs) > 1 and len({row.get(name, "") for _, row in pairs}) == 1
    }
    shown = [name for name in columns if name not in alike]
    return {
        "header": ["run", *shown],
        "rows": [[owner, *(row.get(name, "") for name in shown)] for owner, row in pairs[-MOST_ROWS:]],
        "count": len(pairs),
        "alike": [(name, text) for name, text in alike.items() if text],
    }


def evaluation_charts(tables: Sequence[tuple[str, Sequence[Row]]]) -> list[dict[str, Any]]:
    """Bars of the same tables, a chart for each protocol and data set, as ``page.charts`` gives them, with ``bars``."""
    kinds: dict[tuple[str, str, str], list[tuple[str, int, Measured]]] = {}
    telling = Telling.of([row for _, rows in tables for row in rows])
    for color, (owner, rows) in enumerate(tables):
        for entry in measured(rows, telling):
            protocol, variant, data, score = entry.kind
            label = " · ".join(filter(None, [owner or entry.model, variant]))
            kinds.setdefault((protocol, data, score), []).append((label, color, entry))
    return [_bars(f"bars-{number}", *part) for number, part in enumerate(kinds.items())]


def _bars(key: str, kind: tuple[str, str, str], parts: Sequence[tuple[str, int, Measured]]) -> dict[str, Any]:
    protocol, data, score = kind
    bars = parts[:MOST_BARS]
    labels, colors, scores = zip(*bars, strict=True)
    rows = [[label, str(entry)] for label, _, entry in bars]
    title = f"{protocol} on {data}" if data else protocol
    more = f" The first {MOST_BARS} of {len(parts)}." if len(parts) > MOST_BARS else ""
    below, above = zip(*(entry.whiskers() for entry in scores), strict=True)
    trace = {
        "name": html.escape(title),
        "labels": [html.escape(label) for label in labels],
        "values": [round(entry.percent.mean, 3) for entry in scores],
        "below": [round(value, 3) for value in below],
        "above": [round(value, 3) for value in above],
        "colors": list(colors),
    }
    return {
        "key": key,
        "bars": True,
        "title": title,
        "unit": f"{score} in %",
        "meaning": f"{score} in %. Whiskers: standard deviation over seeds where there are several, else the "
        f"95 % interval over test images.{more}",
        "summary": " ".join(f"{label}: {text}." for label, text in rows),
        "traces": [trace],
        "header": ["model", f"{score} in %"],
        "rows": rows,
    }


@dataclass(frozen=True)
class Line:
    """One family of runs: the values of the settings that vary, and a cell or None for each number."""

    settings: list[str]
    cells: list[Cell | None]


@dataclass(frozen=True)
class Table:
    """What all formats are written from: names of the settings that vary, of the numbers, a line a family, notes."""

    settings: list[str]
    numbers: list[str]
    lines: list[Line]
    notes: list[str]


def join_seeds(runs: Sequence[Run], others: Sequence[Row] = ()) -> Table:
    """Families of runs that differ in nothing but their seed, beside what varies between the families.

    Other models, those of ``others`` and those that a run was compared with, have a line each at the end.
    """
    others = [*(row for run in runs for row in run.others), *others]
    telling = Telling.of([*(row for run in runs for row in run.results), *others])
    settings = _varying(runs)
    families: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        families.setdefault(tuple(sorted(identity(run).items())), []).append(run)
    lines: list[tuple[list[str], dict[Kind, Cell]]] = []
    for key, family in families.items():
        names = [dict(key).get(name, "–") for name in settings] or [", ".join(run.name for run in family)]
        seeds: dict[Kind, list[float]] = {}
        for run in family:
            for kind, value in _numbers(run, telling).items():
                seeds.setdefault(kind, []).append(value)
        lines.append((names, {kind: Cell(tuple(seeds[kind]), 3 if kind in _LOSSES else 1) for kind in seeds}))
    models: dict[str, dict[Kind, Cell]] = {}
    for entry in measured(others, telling):
        models.setdefault(entry.model, {})[entry.kind] = entry.percent
    lines += [([model, *["–"] * (len(settings) - 1)], cells) for model, cells in models.items()]
    kinds = dict.fromkeys(kind for _, cells in lines for kind in cells)
    columns = sorted(kinds, key=lambda kind: [*_LOSSES, *kinds].index(kind))
    made = [(*sorted(identity(run).items()), ("seed", str(run.config.get("seed")))) for run in runs]
    times = Counter(made)
    repeated = [run.name for run, key in zip(runs, made, strict=True) if times[key] > 1]
    unfinished = [run.name for run in runs if run.status != "finished"]
    return Table(
        settings or ["run"],
        [_title(kind, kinds) for kind in columns],
        [Line(names, [cells.get(kind) for kind in columns]) for names, cells in lines],
        ["mean ± standard deviation over runs that differ in their seed only, (n) of them"]
        + (["not finished: " + ", ".join(unfinished)] if unfinished else [])
        + (["of one seed, and counted as several: " + ", ".join(repeated)] if repeated else [])
        + [f"{run.name}, {EARLY}: {', '.join(run.early)}" for run in runs if run.early],
    )


def identity(run: Run) -> dict[str, str]:
    """The settings that make a run what it is, without its seed; a run without config.yaml is one of its own."""
    ignored = {"seed"} | (_MEASURED - set(run.given))
    settings = {name: text for name, text in settings_of(run).items() if name not in ignored}
    return settings if run.config else {"run": run.name}


def _varying(runs: Sequence[Run]) -> list[str]:
    """What varies and was typed for some run; what only follows from that (auto) is left out where it can be."""
    settings = [identity(run) for run in runs]
    names = list(dict.fromkeys(name for identified in settings for name in identified))
    varying = [name for name in names if len({identified.get(name) for identified in settings}) > 1]
    return [name for name in varying if any(name in run.given for run in runs)] or varying


def _numbers(run: Run, telling: Telling) -> dict[Kind, float]:
    """Losses at the end and the score of every protocol and variant on every data set, the last that was measured."""
    values = {
        kind: at_end(run.curves[name]) for kind, (name, at_end) in _LOSSES.items() if name in run.curves
    }
    return values | {entry.kind: entry.percent.mean for entry in measured(run.results, telling)}


def _title(kind: Kind, kinds: Iterable[Kind]) -> str:
    """Protocol and variant; data and score where they are needed to tell columns apart."""
    if kind in _LOSSES:
        return kind[0]
    scores = [other for other in kinds if other not in _LOSSES]
    parts = [" ".join(filter(None, kind[:2]))]
    parts += [kind[place] for place in (2, 3) if len({other[place] for other in scores}) > 1]
    return ", ".join(parts) + " %"


def markdown(table: Table) -> str:
    """Columns under each other, so that the source reads as well as the page."""
    rows = [
        table.settings + table.numbers,
        *([*line.settings, *map(_plain, line.cells)] for line in table.lines),
    ]
    cells = [[_markdown_text(cell) for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    left = len(table.settings)
    rule = ["-" * width if place < left else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    lines = [f"| {' | '.join(row)} |" for row in _padded([cells[0], rule, *cells[1:]], widths)]
    return "\n".join([*lines, "", *(f"{_markdown_text(note)}  " for note in table.notes)]).rstrip()


def comma_separated(table: Table) -> str:
    """For a program: mean, standard deviation and n of every number in columns of their own."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    parts = ("mean", "std", "n")
    writer.writerow(table.settings + [f"{name} {part}" for name in table.numbers for part in parts])
    for line in table.lines:
        row: list[str] = list(line.settings)
        for cell in line.cells:
            spread = None if cell is None else cell.deviation
            row += ["", "", "0"] if cell is None else [f"{cell.mean:.6g}", "", f"{len(cell.values)}"]
            row[-2] = "" if spread is None else f"{spread:.6g}"
        writer.writerow(row)
    return buffer.getvalue().rstrip("\n")


def latex(table: Table) -> str:
    """A tabular for the booktabs package."""
    rows = [[*line.settings, *map(_plain, line.cells)] for line in table.lines]
    header, *body = (
        " & ".join("".join(_LATEX.get(sign, sign) for sign in cell) for cell in row) + r" \\"
        for row in [table.settings + table.numbers, *rows]
    )
    return "\n".join(
        [
            *(f"% {note}" for note in table.notes),
            r"\begin{tabular}{" + "l" * len(table.settings) + "r" * len(table.numbers) + "}",
            *(r"\toprule", header, r"\midrule", *body, r"\bottomrule"),
            r"\end{tabular}",
        ]
    )


FORMS = {"md": markdown, "csv": comma_separated, "latex": latex}
# tabulate would be a dependency for the few lines below and for LaTeX, whose dashes it leaves as they are
_LATEX = {sign: f"\\{sign}" for sign in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "±": r"$\pm$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def _plain(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    spread = f" ± {cell.deviation:.{cell.digits}f}" if cell.deviation is not None else ""
    return f"{cell.mean:.{cell.digits}f}{spread} ({len(cell.values)})"


def _markdown_text(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|"))


def _padded(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> list[list[str]]:
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]


def list_runs(folder: Path) -> list[Run]:
    """The runs of a folder, or the run that it is; a UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"folder ({folder}) does not exist; `freqmask pretrain` makes runs/, or name another")
    return read_runs([folder])


def table_lines(runs: Sequence[Run]) -> list[str]:
    """The runs under a header, columns below each other."""
    header = ("run", "state", "method", "backbone", "steps", "time", "relative loss", "best probe")
    rows = [header, *map(_run_row, runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(row).rstrip() for row in _padded(rows, widths)]


def _run_row(run: Run) -> tuple[str, ...]:
    seconds = number(run.summary.get("seconds"))
    curve = run.curves.get("relative_loss")
    probes = [entry for entry in measured(run.results) if entry.kind[0] in ("linear", "knn")]
    best = max(probes, key=lambda entry: entry.percent.mean, default=None)
    asked = f" of {run.total_steps:,}" if run.status != "finished" and run.total_steps else ""
    cells = (
        run.name,
        run.status,
        str(run.config.get("method") or "?"),
        str(run.config.get("backbone") or "?"),
        f"{run.last_step:,}{asked}",
        readable_time(seconds) if seconds >= 0 else "–",
        f"{curve.tail():.3f}" if curve is not None else "–",
        f"{best.percent.mean:.1f} % ({' '.join(filter(None, best.kind[:2]))})" if best else "–",
    )
    return tuple(map(plain_name, cells))
