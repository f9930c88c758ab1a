"""Tables and figures of robustness over models and seeds, and mCE: errors on ImageNet-C over those of AlexNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from freqmask.evaluation.corruptions import COMMON, CORRUPTIONS, SEVERITIES, Corruption, strengths_for
from freqmask.evaluation.eval_model import EvalModel
from freqmask.evaluation.labelled import LabelledData
from freqmask.evaluation.results import (
    ResultTable,
    Summary,
    aligned,
    draw_bars,
    plain_texts,
    save_figure,
    shortened,
)
from freqmask.images import as_float
from freqmask.rng import sample_key

CLEAN, CORRUPTED = "clean", "corrupted"
DATA, TREE = "data", "tree"  # groups of results; any other is the name of a test set
IMAGENET_CLASSES = 1000
_COLUMNS = 4  # panels side by side: 15 or 19 corruptions and the bars fill the sheet

Points = dict[tuple[str, int], float]  # (corruption, severity) -> accuracy
Tables = Mapping[str, ResultTable]

# AlexNet's error on ImageNet-C by severity, as published; sums over severities are what mCE divides by.
ALEXNET: dict[str, Sequence[float]] = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
    "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
    "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}


def mce_applies(classes: Sequence[str], side: int, measured: Points) -> bool:
    """Whether AlexNet's errors may be divided by: ImageNet's 1,000 classes, 224 pixels, everything measured."""
    from timm.data.imagenet_info import ImageNetInfo

    everything = {(name, severity) for name in COMMON for severity in SEVERITIES}
    if len(classes) != IMAGENET_CLASSES or side != 224 or not everything <= set(measured):
        return False
    return set(classes) == set(ImageNetInfo("imagenet-1k").label_names())


def corruption_errors(measured: Points) -> dict[str, float]:
    """CE of each of the 15 (arXiv 1903.12261, section 4.2): the sum of the errors over severities, over AlexNet's.

    ``measured`` is (corruption, severity) -> accuracy in [0, 1], all 15 in all 5.
    """
    return {
        name: sum(1 - measured[name, severity] for severity in SEVERITIES) / sum(ALEXNET[name])
        for name in COMMON
    }


def mean_corruption_error(measured: Points) -> float:
    """The mean of the 15 corruption errors, mCE; that of AlexNet is 1.

    >>> alexnet = {(name, severity): 1 - ALEXNET[name][severity - 1] for name in COMMON for severity in SEVERITIES}
    >>> round(mean_corruption_error(alexnet), 6)
    1.0
    """
    return float(np.mean(list(corruption_errors(measured).values())))


def points_of(summaries: Mapping[str, Summary]) -> Points:
    """A model's accuracies on corrupted images, from its summaries by variant (``fog 3``)."""
    known = {_corruption_of(variant): one.mean for variant, one in summaries.items() if one.values}
    return {point: accuracy for point, accuracy in known.items() if point is not None}


def _corruption_of(variant: str) -> tuple[str, int] | None:
    name, _, severity = variant.rpartition(" ")
    return (name, int(severity)) if name in CORRUPTIONS and severity.isdecimal() else None


def _measured_corruptions(table: ResultTable) -> list[str]:
    measured = {name for summaries in table.models().values() for name, _ in points_of(summaries)}
    return [name for name in CORRUPTIONS if name in measured]


def _headlines(group: str, summaries: Mapping[str, Summary]) -> dict[str, Summary]:
    rest = {variant: one for variant, one in summaries.items() if _corruption_of(variant) is None}
    return {"imagenet-c" if group == TREE else variant: one for variant, one in rest.items()}


def main_lines(tables: Tables) -> list[str]:
    """A line a model: clean, corrupted (also in per cent of clean), attacks, mCE, other test sets."""
    rows: dict[str, dict[str, str]] = {}
    for group, table in tables.items():
        for name, summaries in table.models().items():
            rows.setdefault(name, {}).update(_cells(group, table, summaries))
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [["model", *columns]]
    for name, cells in rows.items():
        error = cells.get(CLEAN, "").startswith("the features")
        lines.append(
            [name, cells[CLEAN]] if error else [name, *(cells.get(column, "-") for column in columns)]
        )
    notes = []
    if CORRUPTED in columns:
        notes.append("(corrupted: the mean over corruptions and severities; the interval is its own)")
    if "mCE (made)" in columns:
        notes.append(
            "(mCE (made): ImageNet-C's files are JPEGs, ours are not; read them for published numbers)"
        )
    return [*aligned(lines), *notes]


def _cells(group: str, table: ResultTable, summaries: Mapping[str, Summary]) -> dict[str, str]:
    """Column -> text."""
    cells: dict[str, str] = {}
    for title, one in _headlines(group, summaries).items():
        cells[title] = one.error or one.percent()
        if one.variant == CORRUPTED and one.values:
            cells["95 % interval"] = one.interval_text()
            if CLEAN in summaries and summaries[CLEAN].mean > 0:  # of nothing there is no share
                cells["of clean"] = f"{100 * one.mean / summaries[CLEAN].mean:.0f} %"
    points, first = points_of(summaries), table.results[0]
    side = 224 if group == TREE else min(first.model.input_size[1:])
    if mce_applies(first.class_names, side, points):
        title = "mCE" if group == TREE else "mCE (made)"
        cells[title] = f"{100 * mean_corruption_error(points):.1f}"
    return cells


def corruption_lines(table: ResultTable) -> list[str]:
    """Mean over severities: a line a corruption, a column a model."""
    models = {name: points for name, summaries in table.models().items() if (points := points_of(summaries))}
    if not models:
        return []
    rows = [["mean over severities", *models]]
    for name in _measured_corruptions(table):
        by_model = [[points[key] for key in points if key[0] == name] for points in models.values()]
        rows.append([name, *(f"{100 * np.mean(values):.1f}" if values else "-" for values in by_model)])
    return aligned(rows)


def draw_curves(path: Path, tables: Tables) -> None:
    """A panel a corruption, a curve a model; the last panel has clean images, attacks and other test sets."""
    from matplotlib.figure import Figure

    curves = [(name, table) for table in tables.values() for name in _measured_corruptions(table)]
    models = list(dict.fromkeys(name for table in tables.values() for name in table.models()))
    columns = min(_COLUMNS, len(curves) + 1)
    rows = -(-(len(curves) + 1) // columns)
    figure = Figure(
        figsize=(max(2.2 * columns, 4.5), 1.9 * rows + 0.6 + 0.18 * len(models)),
        dpi=110,
        layout="constrained",
    )
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axis, (name, table) in zip(axes, curves, strict=False):
        _draw_curve(axis, name, table, models)
    _draw_bars(axes[len(curves)], tables, models)
    for axis in axes[len(curves) + 1 :]:
        axis.set_axis_off()
    for axis in axes[max(len(curves) - columns, 0) : len(curves)]:
        axis.set_xlabel("severity", fontsize=8)
    for axis in axes[::columns]:
        axis.set_ylabel("accuracy in %", fontsize=8)
    handles, labels = axes[len(curves)].get_legend_handles_labels()
    plain_texts(figure.legend(handles, labels, loc="outside lower center", fontsize=8, frameon=False))
    save_figure(figure, path)


def _draw_curve(axis: Any, name: str, table: ResultTable, models: Sequence[str]) -> None:
    """Accuracy over severity; severity 0 is the clean image."""
    for model, summaries in table.models().items():
        clean, points = summaries.get(CLEAN), points_of(summaries)
        curve = [(0.0, clean.mean)] if clean is not None and clean.values else []
        curve += [(severity, points[name, severity]) for severity in SEVERITIES if (name, severity) in points]
        x, y = np.array(curve or [(np.nan, np.nan)]).T
        axis.plot(x, 100 * y, "o-", ms=2.5, lw=1.2, color=f"C{models.index(model)}")
    axis.axhline(100 / len(table.results[0].class_names), color="0.75", lw=0.8)
    axis.set_title(name.replace("_", " "), fontsize=8)
    axis.set_xticks(range(6))
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


def _draw_bars(axis: Any, tables: Tables, models: Sequence[str]) -> None:
    """Clean, corrupted, attacked, other test sets, side by side for the models."""
    series: dict[str, dict[str, Summary]] = {model: {} for model in models}
    for group, table in tables.items():
        for model, summaries in table.models().items():
            series[model] |= _headlines(group, summaries)
    names = list(dict.fromkeys(name for bars in series.values() for name in bars))
    draw_bars(axis, names, series)
    words = [shortened(name, 18) for name in names]
    axis.set_xticks(range(len(names)), words, rotation=40, ha="right", fontsize=6, parse_math=False)
    axis.tick_params(axis="y", labelsize=7)


def draw_sheet(
    path: Path,
    model: EvalModel,
    data: LabelledData,
    corruptions: Sequence[str],
    severities: Sequence[int],
    constants: str,
    frost: str | None,
) -> None:
    """The first test image as the model sees it, clean and in every corruption and severity."""
    from matplotlib.figure import Figure

    sample = model.dataset(data.source)[(0, 0, int(data.tested[0]))]
    image, key = sample.views[0], sample_key(0, 0, data.source.identity(sample.index))
    strengths = strengths_for(min(image.shape[1:]), constants)
    columns = [0, *severities]
    figure = Figure(figsize=(1.35 * len(columns) + 1.3, 1.35 * len(corruptions) + 0.3), dpi=100)
    axes = figure.subplots(len(corruptions), len(columns), squeeze=False)
    left, top = 1.3 / figure.get_figwidth(), 1 - 0.3 / figure.get_figheight()
    figure.subplots_adjust(left=left, right=1, bottom=0, top=top, wspace=0.03, hspace=0.03)
    for row, name in zip(axes, corruptions, strict=True):
        title = name.replace("_", " ")
        row[0].text(-0.05, 0.5, title, ha="right", va="center", fontsize=9, transform=row[0].transAxes)
        for axis, severity in zip(row, columns, strict=True):
            shown = Corruption(name, severity, strengths, frost)(image, key) if severity else image
            values = as_float(shown).numpy()
            colors = values.transpose(1, 2, 0) if len(values) == 3 else values.mean(axis=0)
            axis.imshow(colors, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
    for axis, severity in zip(axes[0], columns, strict=True):
        axis.set_title(str(severity) if severity else "clean", fontsize=9)
    save_figure(figure, path)
