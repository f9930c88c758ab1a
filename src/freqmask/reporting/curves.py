"""Which column of metrics.csv stands in which chart, thinned for the eye, and what the chart says in words."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from freqmask.reporting.reading import Curve, Run

Item = TypeVar("Item")


def thin(steps: np.ndarray, values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The curve with at most ``most`` points: of each stretch its lowest and its highest, and both ends.

    A spike of a single step survives, which a mean or every n-th point would lose.

    Args:
        steps: rising.
        values: as many, finite.
        most: at least 4.
    """
    if len(steps) <= most:
        return steps, values
    bounds = np.linspace(0, len(steps), (most - 2) // 2 + 1).astype(int)
    chosen = {0, len(steps) - 1}
    for start, stop in pairwise(bounds):
        chosen.add(start + int(np.argmin(values[start:stop])))
        chosen.add(start + int(np.argmax(values[start:stop])))
    picked = np.array(sorted(chosen))
    return steps[picked], values[picked]


def trend(steps: np.ndarray, values: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """The curve's mean over each of ``parts`` stretches, at the stretch's mean step."""
    stretches = np.array_split(np.arange(len(steps)), min(parts, len(steps)))
    return (
        np.array([steps[stretch].mean() for stretch in stretches]),
        np.array([values[stretch].mean() for stretch in stretches]),
    )


def spread_out(items: Sequence[Item], most: int) -> list[Item]:
    """At most ``most`` of the items, evenly spaced, the first and the last among them.

    >>> spread_out(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= most:
        return list(items)
    if most <= 1:
        return [items[-1]][:most]
    places = np.linspace(0, len(items) - 1, most).round().astype(int)
    return [items[place] for place in places]


POINTS = 60_000  # in the whole page, over all curves of all runs: about 1 MB
MOST_A_CURVE = 2_000  # no screen shows more
TREND_FROM = 300  # points from which a curve is too ragged to be read without its mean
TREND_PARTS = 100
TABLE_ROWS = 12
WIDE = 5  # largest over smallest value from which a linear scale hides the smaller lines
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_LINES_TOGETHER = 3  # columns of several runs that one chart can hold and be read


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        key: its anchor in the page.
        title: above it.
        meaning: how to read it, for somebody who has not read the papers.
        columns: pattern of the columns that it shows.
        reference: a level that means something.
        logarithmic: whether the scale may be switched to a logarithmic one.
        wide: whether it is logarithmic at once where the lines lie far apart.
    """

    key: str
    title: str
    meaning: str
    columns: str
    reference: float | None = None
    logarithmic: bool = True
    wide: bool = False


PANELS = (
    Panel(
        "zero",
        "Relative loss (1 = zero prediction)",
        "1 means that nothing has been learnt: an empty prediction would do as well. Apart for each filter, and "
        "for held-out images where there are some.",
        r"(held_out_)?relative_loss(/(?!band_).*)?",
        reference=1.0,
        logarithmic=False,
    ),
    Panel(
        "bands",
        "The same by frequency",
        "Bands of radii in the spectrum, in cycles per shorter side: low numbers are shapes, high numbers are fine "
        "detail. Low bands fall first; a band that stays at 1 is not being learnt.",
        r"relative_loss/band_.*",
        reference=1.0,
        wide=True,
    ),
    Panel(
        "loss",
        "Loss and its parts",
        "What the training lowers. Its height means little by itself; the first chart gives it a scale.",
        r"loss|held_out_loss|reconstruction|distillation|(?!relative_loss).*_loss|loss/.*",
    ),
    Panel(
        "probe",
        "Probes on labelled images",
        "How well the frozen features tell classes apart while the training goes on. Higher is better.",
        r".*(knn|linear|probe|accuracy).*",
        logarithmic=False,
    ),
    Panel(
        "rankme",
        "RankMe",
        "The effective number of dimensions that the features use. A fall towards 1 is a collapse.",
        r".*rank_?me.*",
    ),
    Panel(
        "collapse",
        "Collapse number of the teacher, in nats",
        "Entropy of the teacher's mean answer minus its mean entropy. Below 0.1 after warm-up nearly all images get "
        "the same answer: the run has collapsed.",
        r"collapse",
        reference=0.1,
        logarithmic=False,
    ),
    Panel("lr", "Learning rate", "A linear warm-up, then a cosine.", r"lr|learning_rate.*"),
    Panel(
        "grad_norm",
        "Gradient norm",
        "Before it is clipped. Rare spikes are harmless; a steady rise comes before a loss that is not a number.",
        r"grad(ient)?_norm.*",
    ),
    Panel("speed", "Images per second", "Without previews and checkpoints.", r"images_per_second"),
    Panel(
        "wait",
        "Share of the time spent waiting for images",
        "Above some 0.1 the loader slows the training: more workers, smaller files.",
        r"data_wait_share",
        logarithmic=False,
    ),
    Panel("weight_decay", "Weight decay", "Constant unless weight_decay_end is given.", r"weight_decay"),
)
_HIDDEN = r"step|epoch"


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Everything the page needs to draw the curves of all runs.

    Returns:
        One mapping a chart: ``key``, ``title``, ``meaning``, ``summary`` (a sentence for those who cannot see
        it), ``traces``, ``reference``, ``logarithmic``, and ``header`` and ``rows`` of its table of numbers.
    """
    columns = list(dict.fromkeys(name for run in runs for name in run.curves))
    left = [name for name in columns if not re.fullmatch(_HIDDEN, name)]
    total = sum(len(run.curves) for run in runs)
    most = max(min(POINTS // max(total, 1), MOST_A_CURVE), 50)
    built = []
    for panel in PANELS:
        chosen = sorted((name for name in left if re.fullmatch(panel.columns, name)), key=_in_order)
        left = [name for name in left if name not in chosen]
        built += _panel_charts(panel, chosen, runs, most)
    for name in left:  # columns that a method of somebody's own logs
        panel = Panel(f"other-{len(built)}", name, "Logged by the method.", re.escape(name))
        built += _panel_charts(panel, [name], runs, most)
    return built


def _panel_charts(panel: Panel, columns: list[str], runs: Sequence[Run], most: int) -> list[dict[str, Any]]:
    if not columns or _never_moves(panel, columns, runs):
        return []
    if len(runs) == 1 or len(columns) <= _LINES_TOGETHER:
        return [_chart(panel, columns, runs, most)]
    return [
        _chart(
            Panel(
                f"{panel.key}-{number}",
                f"{panel.title}: {wording(column)}",
                panel.meaning,
                panel.columns,
                panel.reference,
                panel.logarithmic,
                panel.wide,
            ),
            [column],
            runs,
            most,
        )
        for number, column in enumerate(columns)
    ]


def _never_moves(panel: Panel, columns: list[str], runs: Sequence[Run]) -> bool:
    curves = [run.curves[name] for run in runs for name in columns if name in run.curves]
    return panel.key == "weight_decay" and all(np.ptp(curve.values) == 0 for curve in curves)


def _chart(panel: Panel, columns: list[str], runs: Sequence[Run], most: int) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    named: list[tuple[str, Curve]] = []
    for number, run in enumerate(runs):
        for part, column in enumerate(name for name in columns if name in run.curves):
            name = _trace_name(run, column, len(runs), len(columns))
            colour, dash = (number, DASHES[part % len(DASHES)]) if len(runs) > 1 else (part, "solid")
            traces += _traces(name, run.curves[column], most, colour, dash)
            named.append((name, run.curves[column]))
    header, rows = _numbers(named)
    positive = all((curve.values > 0).all() for _, curve in named)
    return {
        "key": panel.key,
        "title": panel.title,
        "meaning": panel.meaning,
        "summary": " ".join(_sentence(name, curve) for name, curve in named),
        "traces": traces,
        "reference": panel.reference,
        "logarithmic": panel.logarithmic and positive,
        "wide": panel.wide and positive and _spans(named) > WIDE,
        "header": header,
        "rows": rows,
    }


def _spans(named: Sequence[tuple[str, Curve]]) -> float:
    lows, highs = zip(*((curve.values.min(), curve.values.max()) for _, curve in named), strict=True)
    return float(max(highs) / min(lows))


def wording(column: str) -> str:
    """A column's name as a person says it.

    >>> wording("relative_loss/band_4_8"), wording("held_out_relative_loss")
    ('band 4 to 8', 'held-out images')
    """
    band = re.fullmatch(r"relative_loss/band_(\w+)_(\w+)", column)
    if band:
        return f"band {band[1]} to {band[2]}"
    special = {
        "held_out_relative_loss": "held-out images",
        "held_out_loss": "held-out images",
        "relative_loss": "training, all filters",
        "loss": "training",
        "data_wait_share": "waiting",
    }
    return special.get(column, column.removeprefix("relative_loss/").replace("_", " "))


def _trace_name(run: Run, column: str, runs: int, columns: int) -> str:
    if runs == 1:
        return wording(column)
    return run.name if columns == 1 else f"{run.name}: {wording(column)}"


def _traces(name: str, curve: Curve, most: int, colour: int, dash: str) -> list[dict[str, Any]]:
    """The curve; a long one as a faint band of its extremes under the line of its mean."""
    group = {"name": html.escape(name), "colour": colour, "dash": dash}
    if len(curve.steps) < TREND_FROM:
        return [{**group, **_points(curve.steps, curve.values), "faint": False}]
    return [
        {
            **group,
            **_points(*thin(curve.steps, curve.values, most - TREND_PARTS if most > 200 else most)),
            "faint": True,
        },
        {**group, **_points(*trend(curve.steps, curve.values, TREND_PARTS)), "faint": False},
    ]


def _points(steps: np.ndarray, values: np.ndarray) -> dict[str, list[float]]:
    return {"x": [round(step) for step in steps.tolist()], "y": [_short(value) for value in values.tolist()]}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _sentence(name: str, curve: Curve) -> str:
    low, high = float(curve.values.min()), float(curve.values.max())
    text = (
        f"{name}: from {curve.values[0]:.4g} at step {curve.steps[0]:,.0f} to {curve.last:.4g} "
        f"at step {curve.steps[-1]:,.0f}, lowest {low:.4g}, highest {high:.4g}"
    )
    return text + (f", {curve.not_finite:,} values that are no numbers." if curve.not_finite else ".")


def _numbers(named: Sequence[tuple[str, Curve]]) -> tuple[list[str], list[list[str]]]:
    """A few rows of the chart as a table: at these steps the last value known."""
    steps = np.unique(np.concatenate([curve.steps for _, curve in named]))
    rows = []
    for step in spread_out(steps.tolist(), TABLE_ROWS):
        cells = [f"{step:,.0f}"]
        for _, curve in named:
            before = np.searchsorted(curve.steps, step, side="right")
            cells.append(f"{curve.values[before - 1]:.4g}" if before and step <= curve.steps[-1] else "")
        rows.append(cells)
    return ["step", *(name for name, _ in named)], rows


def _in_order(column: str) -> tuple[int, float, str]:
    band = re.search(r"band_([\d.]+)", column)
    order = 0 if column in ("loss", "relative_loss") else 1 if column.startswith("held_out") else 2
    return (order, float(band[1]) if band else 0.0, column)
