"""What the page draws: columns of metrics.csv as curves, thinned for the eye, and evaluations as bars."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from freqmask.reporting.reading import Curve, Run
from freqmask.reporting.summary import wording
from freqmask.reporting.tables import Measured, Row, measured

Item = TypeVar("Item")

POINTS = 60_000  # in the whole page, over all curves of all runs: about 1 MB
MOST_A_CURVE = 2_000  # no screen shows more
TREND_FROM = 300  # points from which a curve is too ragged to be read without its mean
TREND_PARTS = 100
TABLE_ROWS = 12
WIDE = 5  # largest over smallest value from which a linear scale hides the smaller lines
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MOST_BARS = 40
_LINES_TOGETHER = 3  # columns of several runs that one chart can hold and be read


def thin(steps: np.ndarray, values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The curve with at most ``most`` (4 or more) points: of each stretch its lowest and its highest, and both ends.

    A spike of a single step survives, which a mean or every n-th point would lose.
    """
    if len(steps) <= most:
        return steps, values
    bounds = np.linspace(0, len(steps), (most - 2) // 2 + 1).astype(int)
    chosen = {0, len(steps) - 1}
    for start, stop in pairwise(bounds):
        chosen |= {start + int(np.argmin(values[start:stop])), start + int(np.argmax(values[start:stop]))}
    picked = np.array(sorted(chosen))
    return steps[picked], values[picked]


def trend(steps: np.ndarray, values: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """The curve's mean over each of ``parts`` stretches, at the stretch's mean step."""
    stretches = np.array_split(np.arange(len(steps)), min(parts, len(steps)))
    return tuple(np.array([column[part].mean() for part in stretches]) for column in (steps, values))  # type: ignore[return-value]


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


@dataclass(frozen=True)
class Panel:
    """One chart of curves."""

    key: str  # its anchor in the page
    title: str  # above it
    meaning: str  # how to read it, for somebody who has not read the papers
    columns: str  # pattern of the columns that it shows
    reference: float | None = None  # a level that means something
    logarithmic: bool = True  # whether the scale may be switched to a logarithmic one
    wide: bool = False  # whether it is logarithmic at once where the lines lie far apart


PANELS = (
    Panel(
        "zero",
        "Relative loss (1 = zero prediction)",
        "1 means that nothing has been learned: an empty prediction would do as well. Apart for each filter, and "
        "for held-out images where there are some.",
        r"(held_out_)?relative_loss(/(?!band_).*)?",
        reference=1.0,
        logarithmic=False,
    ),
    Panel(
        "bands",
        "The same by frequency",
        "Bands of radii in the spectrum, in cycles per shorter side: low numbers are shapes, high numbers are fine "
        "detail. Low bands fall first; a band that stays at 1 is not being learned.",
        r"relative_loss/band_.*",
        reference=1.0,
        wide=True,
    ),
    Panel(
        "loss",
        "Loss and its parts",
        "What the training lowers. Its height means little by itself; the first chart gives it a scale.",
        r"loss|held_out_loss",  # and the parts that a run names
    ),
    Panel(
        "probe",
        "Probes on labelled images",
        "How well the frozen features tell classes apart during the training. Higher is better.",
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


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Everything the page needs to draw the curves of all runs.

    Returns:
        One mapping a chart: ``key``, ``title``, ``meaning``, ``summary`` (a sentence for those who cannot see
        it), ``traces``, ``reference``, ``logarithmic``, and ``header`` and ``rows`` of its table of numbers.
    """
    columns = list(dict.fromkeys(name for run in runs for name in run.curves))
    left = [name for name in columns if name not in ("step", "epoch")]
    most = max(min(POINTS // max(sum(len(run.curves) for run in runs), 1), MOST_A_CURVE), 50)
    drawn: list[dict[str, Any]] = []
    for panel in PANELS:
        parts = {name for run in runs for name in run.loss_parts} if panel.key == "loss" else ()
        chosen = sorted((n for n in left if n in parts or re.fullmatch(panel.columns, n)), key=_in_order)
        left = [name for name in left if name not in chosen]
        drawn += _panel_charts(panel, chosen, runs, most)
    for name in left:  # columns that a method of somebody's own logs
        panel = Panel(f"other-{len(drawn)}", name, "Logged by the method.", re.escape(name))
        drawn += _panel_charts(panel, [name], runs, most)
    return drawn


def _in_order(column: str) -> tuple[int, float, str]:
    band = re.search(r"band_([\d.]+)", column)
    order = 0 if column in ("loss", "relative_loss") else 1 if column.startswith("held_out") else 2
    return (order, float(band[1]) if band else 0.0, column)


def _panel_charts(panel: Panel, columns: list[str], runs: Sequence[Run], most: int) -> list[dict[str, Any]]:
    curves = [run.curves[name] for run in runs for name in columns if name in run.curves]
    if not curves or (panel.key == "weight_decay" and all(np.ptp(curve.values) == 0 for curve in curves)):
        return []
    if len(runs) == 1 or len(columns) <= _LINES_TOGETHER:
        return [_chart(panel, columns, runs, most)]
    return [
        _chart(
            replace(panel, key=f"{panel.key}-{number}", title=f"{panel.title}: {wording(column)}"),
            [column],
            runs,
            most,
        )
        for number, column in enumerate(columns)
    ]


def _chart(panel: Panel, columns: list[str], runs: Sequence[Run], most: int) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    named: list[tuple[str, Curve]] = []
    for number, run in enumerate(runs):
        for part, column in enumerate(name for name in columns if name in run.curves):
            words = [run.name] * (len(runs) > 1) + [wording(column)] * (len(runs) == 1 or len(columns) > 1)
            name, curve = ": ".join(words), run.curves[column]
            color, dash = (number, DASHES[part % len(DASHES)]) if len(runs) > 1 else (part, "solid")
            named.append((name, curve))
            for steps, values, faint in _lines(curve, most):
                points = {"x": np.round(steps).astype(int).tolist(), "y": [float(f"{y:.5g}") for y in values]}
                traces.append(
                    {"name": html.escape(name), "color": color, "dash": dash, **points, "faint": faint}
                )
    header, rows = _numbers(named)
    lowest = min(curve.values.min() for _, curve in named)
    spread = max(curve.values.max() for _, curve in named) / lowest if lowest > 0 else 0.0
    return {
        "key": panel.key,
        "title": panel.title,
        "meaning": panel.meaning,
        "summary": " ".join(_sentence(name, curve) for name, curve in named),
        "traces": traces,
        "reference": panel.reference,
        "logarithmic": bool(panel.logarithmic and lowest > 0),
        "wide": bool(panel.wide and spread > WIDE),
        "header": header,
        "rows": rows,
    }


def _lines(curve: Curve, most: int) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """The curve; a long one as a faint band of its extremes under the line of its mean."""
    if len(curve.steps) < TREND_FROM:
        yield curve.steps, curve.values, False
        return
    yield *thin(curve.steps, curve.values, most - TREND_PARTS if most > 200 else most), True
    yield *trend(curve.steps, curve.values, TREND_PARTS), False


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


def evaluation_charts(tables: Sequence[tuple[str, Sequence[Row]]]) -> list[dict[str, Any]]:
    """Bars, a chart for each protocol and data set; the same mapping as of the curves, with ``bars``.

    Args:
        tables: the run that rows belong to (empty for models that are no runs), and the rows.
    """
    kinds: dict[tuple[str, str, str], list[tuple[str, int, Measured]]] = {}
    for color, (owner, rows) in enumerate(tables):
        for one in measured(rows):
            protocol, variant, data, score = one.kind
            label = " · ".join(filter(None, [owner or one.model, variant]))
            kinds.setdefault((protocol, data, score), []).append((label, color, one))
    return [_bars(f"bars-{number}", *part) for number, part in enumerate(kinds.items())]


def _bars(key: str, kind: tuple[str, str, str], parts: Sequence[tuple[str, int, Measured]]) -> dict[str, Any]:
    protocol, data, score = kind
    bars = parts[:MOST_BARS]
    labels, colors, scores = zip(*bars, strict=True)
    rows = [[label, _score_text(one)] for label, _, one in bars]
    title = f"{protocol} on {data}" if data else protocol
    more = f" The first {MOST_BARS} of {len(parts)}." if len(parts) > MOST_BARS else ""
    below, above = zip(*map(_spread, scores), strict=True)
    trace = {
        "name": html.escape(title),
        "labels": [html.escape(label) for label in labels],
        "values": [round(one.percent.mean, 3) for one in scores],
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


def _spread(one: Measured) -> tuple[float, float]:
    """How far a bar's whiskers reach below and above it."""
    if one.percent.deviation is not None:
        return one.percent.deviation, one.percent.deviation
    low, high = one.interval or (one.percent.mean, one.percent.mean)
    return max(one.percent.mean - low, 0.0), max(high - one.percent.mean, 0.0)


def _score_text(one: Measured) -> str:
    text = f"{one.percent.mean:.1f}"
    if one.percent.deviation is not None:
        return f"{text} ± {one.percent.deviation:.1f} over {len(one.percent.values)} seeds"
    return f"{text}, interval {one.interval[0]:.1f} to {one.interval[1]:.1f}" if one.interval else text
