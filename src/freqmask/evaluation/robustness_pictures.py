"""Pictures of an examination: curves over severity, and a sheet of corrupted images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from freqmask.draws import sample_key
from freqmask.evaluation.corruptions import SEVERITIES, Corruption, strengths_for
from freqmask.evaluation.examination import CLEAN
from freqmask.evaluation.labelled import LabelledData
from freqmask.evaluation.results import shortened
from freqmask.evaluation.robustness_board import Board, headlines
from freqmask.evaluation.subjects import Subject
from freqmask.training.checkpoint import replace_atomically

if TYPE_CHECKING:
    from freqmask.evaluation.robustness import Wanted

_COLUMNS = 4  # panels side by side: 15 or 19 corruptions and the bars fill the sheet


def draw_curves(path: Path, boards: Sequence[Board]) -> None:
    """A panel a corruption, a curve a model; the last panel has clean images, attacks and other test sets."""
    from matplotlib.figure import Figure

    curves = [(name, board) for board in boards for name in board.corruptions]
    models = list(dict.fromkeys(model for board in boards for model in board.models))
    columns = min(_COLUMNS, len(curves) + 1)
    rows = -(-(len(curves) + 1) // columns)
    figure = Figure(
        figsize=(max(2.2 * columns, 4.5), 1.9 * rows + 0.6 + 0.18 * len(models)),
        dpi=110,
        layout="constrained",
    )
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axis, (name, board) in zip(axes, curves, strict=False):
        _draw_curve(axis, name, board, models)
    _draw_bars(axes[len(curves)], boards, models)
    for axis in axes[len(curves) + 1 :]:
        axis.set_axis_off()
    for axis in axes[max(len(curves) - columns, 0) : len(curves)]:
        axis.set_xlabel("severity", fontsize=8)
    for axis in axes[::columns]:
        axis.set_ylabel("accuracy in %", fontsize=8)
    handles, labels = axes[len(curves)].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    replace_atomically(path, lambda unfinished: figure.savefig(unfinished, format="png"))


def _draw_curve(axis: Any, name: str, board: Board, models: Sequence[str]) -> None:
    """Accuracy over severity; severity 0 is the clean image."""
    for model, points in board.points.items():
        clean = board.models[model].get(CLEAN)
        curve = [(0, float(np.mean(clean.accuracies)))] if clean is not None and clean.accuracies else []
        curve += [(severity, points[name, severity]) for severity in SEVERITIES if (name, severity) in points]
        x, y = np.array(curve).T
        axis.plot(x, 100 * y, "o-", ms=2.5, lw=1.2, color=f"C{models.index(model)}")
    axis.axhline(100 / len(board.data.class_names), color="0.75", lw=0.8)
    axis.set_title(name.replace("_", " "), fontsize=8)
    axis.set_xticks(range(6))
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


def _draw_bars(axis: Any, boards: Sequence[Board], models: Sequence[str]) -> None:
    """Clean, corrupted, attacked, other test sets, side by side for the models."""
    found: dict[str, dict[str, float]] = {model: {} for model in models}
    for board in boards:
        for model, summaries in board.models.items():
            for title, one in headlines(board, summaries).items():
                if one.accuracies:
                    found[model][title] = float(np.mean(one.accuracies))
    names = list(dict.fromkeys(name for bars in found.values() for name in bars))
    width = 0.8 / max(len(models), 1)
    for number, (model, bars) in enumerate(found.items()):
        places = [names.index(name) + (number - (len(models) - 1) / 2) * width for name in bars]
        heights = [100 * value for value in bars.values()]
        axis.bar(places, heights, 0.92 * width, color=f"C{number}", label=shortened(model, 40))
    axis.set_xticks(
        range(len(names)),
        [shortened(name, 18) for name in names],
        rotation=40,
        ha="right",
        fontsize=6,
        parse_math=False,
    )
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def draw_sheet(path: Path, subject: Subject, data: LabelledData, wanted: Wanted) -> None:
    """The first test image as the model sees it, clean and in every corruption and severity."""
    from matplotlib.figure import Figure

    dataset = subject.dataset(data.source)
    sample = dataset[(0, 0, int(data.tested[0]))]
    image, key = sample.views[0], sample_key(0, 0, data.source.identity(sample.index))
    strengths = strengths_for(min(image.shape[1:]), wanted.constants)
    rows, columns = len(wanted.corruptions), len(wanted.severities) + 1
    figure = Figure(figsize=(1.35 * columns + 1.3, 1.35 * rows + 0.3), dpi=100)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=1.3 / figure.get_figwidth(),
        right=1,
        bottom=0,
        top=1 - 0.3 / figure.get_figheight(),
        wspace=0.03,
        hspace=0.03,
    )
    for row, name in enumerate(wanted.corruptions):
        axes[row, 0].text(
            -0.05,
            0.5,
            name.replace("_", " "),
            ha="right",
            va="center",
            fontsize=9,
            transform=axes[row, 0].transAxes,
        )
        for column, severity in enumerate([0, *wanted.severities]):
            shown = (
                image if severity == 0 else Corruption(name, severity, strengths, wanted.frost)(image, key)
            )
            _show(axes[row, column], shown.numpy())
    for column, severity in enumerate([0, *wanted.severities]):
        axes[0, column].set_title("clean" if severity == 0 else str(severity), fontsize=9)
    replace_atomically(path, lambda unfinished: figure.savefig(unfinished, format="png"))


def _show(axis: Any, image: np.ndarray) -> None:
    """Colours as they are, any other number of channels by their mean."""
    values = image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1)
    colours = values.transpose(1, 2, 0) if len(values) == 3 else values.mean(axis=0)
    axis.imshow(colours, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()
