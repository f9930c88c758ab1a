"""What an evaluation leaves behind: a table on the screen, rows in results.csv, a bar chart, a table of classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from filelock import FileLock

from freqmask import __version__
from freqmask.console import plain_name
from freqmask.evaluation.eval_model import EvalModel, disambiguate
from freqmask.evaluation.scores import (
    Margins,
    accuracy_of,
    accuracy_units,
    bootstrap_interval,
    class_scores,
    margins,
    mean_iou,
    one_class,
    score,
    segmentation_score,
)
from freqmask.options import command_words
from freqmask.training.files import (
    append_row,
    check_writable,
    read_rows,
    replace_atomically,
    write_rows,
    writing,
)
from freqmask.training.run_folder import now

RESULTS = "results.csv"
_MOST_BARS = 5  # variants side by side in the chart
_CLASSES_SHOWN = 40
# Columns that say, with those of the model, what was measured: a row of the same replaces it.
_IDENTITY = {
    *(
        "protocol",
        "model",
        "variant",
        "seed",
        "data",
        "split",
        "data_fingerprint",
        "command",
        "freqmask",
        "torch",
    ),
}
_WIDEST = 160  # signs of a model's or a class's name in a table on the terminal


@dataclass
class Result(ABC):
    """What one model predicted under one seed and variant; a row of results.csv."""

    model: EvalModel  # that predicted
    data: Any  # the images: their name, split, source and classes
    variant: str  # of the protocol, such as k=20
    seed: int  # of the heads and of fresh weights
    images: np.ndarray  # numbers of the images that were predicted, as often as each was
    # further cells of the row: what was chosen, how many training images
    metadata: dict[str, Any] = field(default_factory=dict, kw_only=True)
    error: str = field(default="", kw_only=True)  # why there is no number; empty where there is one
    group: str = field(default="", kw_only=True)  # which of the tables of a protocol it stands in

    METRIC: ClassVar[str] = "accuracy"  # the one of the table; of it is the interval
    OTHERS: ClassVar[dict[str, str]] = {"balanced_accuracy": "balanced", "macro_f1": "macro-F1"}
    CLASS_METRIC: ClassVar[str] = "recall"
    UNIT: ClassVar[str] = "image"  # what is classified

    @abstractmethod
    def scores(self) -> Any:
        """A dataclass of scores in [0, 1], `METRIC` first."""

    @abstractmethod
    def classes(self) -> dict[str, np.ndarray]:
        """Columns of a table of the classes: how many there are, and their scores."""

    @abstractmethod
    def margins(self) -> Margins:
        """Of each class how many are predicted rightly, there are, are predicted."""

    @classmethod
    @abstractmethod
    def interval(cls, results: Sequence[Any]) -> tuple[float, float]:
        """95 % of the mean of `METRIC` over several seeds."""

    @cached_property
    def own_interval(self) -> tuple[float, float]:
        """95 % of `METRIC` under this seed."""
        return type(self).interval([self])

    @property
    def class_names(self) -> Sequence[str]:
        """Of the data."""
        names: Sequence[str] = self.data.class_names
        return names


@dataclass
class ClassificationResult(Result):
    """A class for each image."""

    # (prediction,) of images; empty where there is no result
    predicted: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def truth(self) -> np.ndarray:
        """(prediction,) the classes that are right."""
        labels: np.ndarray = self.data.labels[self.images]
        return labels

    def scores(self) -> Any:
        return score(self.margins())

    def classes(self) -> dict[str, np.ndarray]:
        scores = class_scores(self.margins())
        return {"images": scores["total"], **{name: scores[name] for name in ("precision", "recall", "f1")}}

    def margins(self) -> Margins:
        return margins(self.truth, self.predicted, len(self.class_names))

    @classmethod
    def interval(cls, results: Sequence[ClassificationResult]) -> tuple[float, float]:
        first = results[0]
        correct = np.mean([result.predicted == result.truth for result in results], axis=0)
        groups: Sequence[object] | None = first.data.groups_of(first.images)
        if groups is not None:
            groups = [group or f"image {index}" for group, index in zip(groups, first.images, strict=True)]
        elif len(np.unique(first.images)) < len(first.images):  # an image in several versions is drawn whole
            groups = first.images.tolist()
        return bootstrap_interval(accuracy_units(correct, groups), accuracy_of)


@dataclass
class SegmentationResult(Result):
    """A class for each pixel of each image."""

    # (image, 3, class) the margins of each image
    counts: np.ndarray = field(default_factory=lambda: np.empty((0, 3, 0)))

    METRIC = "mean_iou"
    OTHERS: ClassVar[dict[str, str]] = {
        "pixel_accuracy": "pixel accuracy",
        "mean_accuracy": "mean accuracy",
    }
    CLASS_METRIC, UNIT = "iou", "pixel"

    def scores(self) -> Any:
        return segmentation_score(self.margins())

    def classes(self) -> dict[str, np.ndarray]:
        scores, labels = class_scores(self.margins()), np.array(self.data.labels.values)
        more = {"iou": scores["iou"], "accuracy": scores["recall"], "precision": scores["precision"]}
        return {"label": labels, "pixels": scores["total"], **more}

    def margins(self) -> Margins:
        total: np.ndarray = self.counts.sum(axis=0)
        return total

    @classmethod
    def interval(cls, results: Sequence[SegmentationResult]) -> tuple[float, float]:
        counts = np.stack([result.counts for result in results], axis=1)  # (image, seed, 3, class)
        return bootstrap_interval(counts, lambda sums: float(mean_iou(sums).mean()))


@dataclass
class Summary:
    """One model and variant over all seeds, in [0, 1]."""

    name: str  # of the model
    variant: str  # of the protocol
    values: list[float] = field(default_factory=list)  # accuracy, or mean IoU, by seed
    interval: tuple[float, float] = (float("nan"), float("nan"))  # 95 % over test images, or over groups
    scores: Any = None  # all scores, means over seeds; None where there is no number
    # name of a class -> recall, or IoU, mean over seeds
    classes: dict[str, float] = field(default_factory=dict)
    error: str = ""  # why there is no number

    @property
    def accuracies(self) -> list[float]:
        """The values of a classification."""
        return self.values

    @property
    def mean(self) -> float:
        """Over seeds; nan where there is no number."""
        return float(np.mean(self.values)) if self.values else float("nan")

    def interval_text(self) -> str:
        """The interval in per cent."""
        low, high = self.interval
        return f"{100 * low:.1f} to {100 * high:.1f}"

    def percent(self) -> str:
        """In per cent, with the deviation over seeds where there are several; - where there is no number."""
        if not self.values:
            return "-"
        spread = f" ± {100 * float(np.std(self.values, ddof=1)):.1f}" if len(self.values) > 1 else ""
        return f"{100 * self.mean:.1f}{spread}"


def summarize(results: Sequence[Result]) -> list[Summary]:
    """One summary a model and variant, in the order in which they came; no two models have the same name then."""
    disambiguate([result.model for result in results])
    families: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        families.setdefault((result.model.text, result.variant), []).append(result)
    return [_summary(family) for family in families.values()]


def _summary(family: Sequence[Result]) -> Summary:
    first = family[0]
    error = next((result.error for result in family if result.error), "")
    if error:
        return Summary(first.model.name, first.variant, error=error)
    each = [result.scores() for result in family]
    scores = replace(
        each[0], **{name: float(np.mean([vars(one)[name] for one in each])) for name in vars(each[0])}
    )
    values = [result.classes()[first.CLASS_METRIC] for result in family]
    return Summary(
        first.model.name,
        first.variant,
        [float(vars(one)[first.METRIC]) for one in each],
        type(first).interval(family) if len(family) > 1 else first.own_interval,
        scores,
        dict(zip(first.class_names, np.mean(values, axis=0).tolist(), strict=True)),
    )


@dataclass
class ResultTable:
    """The results of one protocol over models, variants and seeds."""

    protocol: str  # the command's name
    title: str  # above the table
    headline: str  # the variant whose interval and further scores the table shows
    results: Sequence[Result]  # in the order of the rows
    prefix: str = ""  # of all variants, which its lines leave out

    @cached_property
    def summaries(self) -> list[Summary]:
        """Over seeds."""
        return summarize(self.results)

    def models(self) -> dict[str, dict[str, Summary]]:
        """Model -> variant -> summary."""
        models: dict[str, dict[str, Summary]] = {}
        for one in self.summaries:
            models.setdefault(one.name, {})[one.variant] = one
        return models

    def lines(self) -> list[str]:
        """One table over all models: a column a variant, then more on the headline variant. In per cent."""
        variants = list(dict.fromkeys(one.variant for one in self.summaries if not one.error))
        first, wanted = variants[0] if variants else "", self.prefix + self.headline
        headline = wanted if wanted in variants else first
        others = type(self.results[0]).OTHERS
        names = [variant.removeprefix(self.prefix) for variant in variants]
        rows = [["model", *names, "95 % interval", *others.values()]]
        for name, summaries in self.models().items():
            main = summaries.get(headline)
            cells = [summaries[variant].percent() if variant in summaries else "-" for variant in variants]
            if main is not None and not main.error:
                more = [f"{100 * getattr(main.scores, score):.1f}" for score in others]
                rows.append([name, *cells, main.interval_text(), *more])
            elif any(cell != "-" for cell in cells):
                rows.append([name, *cells, "-", *["-"] * len(others)])
            else:
                rows.append([name, next((one.error for one in summaries.values() if one.error), "no result")])
        further = " and ".join(others.values())
        note = f"({self.metric} in %; interval, {further} are those of {headline.removeprefix(self.prefix)})"
        return [self.title, *aligned(rows), *([note] if headline else [])]

    @property
    def metric(self) -> str:
        """What the table shows, in words."""
        return self.results[0].METRIC.replace("_", " ").replace("iou", "IoU")

    def class_lines(self) -> list[str]:
        """Recall (IoU) of each class by model, in per cent, where there are few enough classes to read."""
        shown = [one for one in self.summaries if one.variant == self.headline and not one.error]
        if not shown or len(shown[0].classes) > _CLASSES_SHOWN:
            return []
        metric = self.results[0].CLASS_METRIC.replace("iou", "IoU")
        rows = [[f"{metric} in %", *(one.name for one in shown)]]
        for name in shown[0].classes:
            values = [one.classes.get(name, float("nan")) for one in shown]
            rows.append([name, *("-" if np.isnan(value) else f"{100 * value:.1f}" for value in values)])
        return aligned(rows)

    def warnings(self) -> list[str]:
        """A sentence for every result that takes everything for one class: its number says nothing of the model."""
        return [
            f"warning: {result.model.name} ({result.variant}, seed {result.seed}) takes every {result.UNIT} "
            f"for {result.class_names[alone]!r}: its {result.METRIC.replace('_', ' ')} follows from how common that "
            "class is, not from what was learned"
            for result in self.results
            if not result.error and (alone := one_class(result.margins())) is not None
        ]

    def add_rows(self, options: Mapping[str, Any], out: Path | None) -> list[Path]:
        """Add a row a result to ``out/results.csv``, else to that of the model's run, else to ./results.csv.

        The options are those that were given, to repeat the rows. Returns the files written to.
        """
        rows: dict[Path, list[dict[str, str]]] = {}
        for result in self.results:
            row = row_of(result, self.protocol, options)
            plain = {
                name: f"{cell:.7g}" if isinstance(cell, float) else str(cell) for name, cell in row.items()
            }
            rows.setdefault((out or result.model.results or Path()) / RESULTS, []).append(plain)
        for path, members in rows.items():
            add_rows(path, members)
        return list(rows)

    def draw_chart(self, path: Path) -> None:
        """Bars by model, side by side for the variants, with their intervals; nothing where there are none."""
        measured = [one for one in self.summaries if not one.error]
        if measured:
            title = f"{self.title}\n{self.results[0].data.name}"
            draw_bar_chart(path, title, f"{self.metric} in %", measured)

    def folder(self, out: Path | None) -> Path:
        """Where figures go: ``out``, else the first run that was measured, else here."""
        return out or next((one.model.results for one in self.results if one.model.results), None) or Path()


def write_class_scores(path: Path, results: Iterable[Result]) -> None:
    """A CSV of the scores of every class in each of the results."""
    rows = []
    for result in results:
        about = {"model": result.model.name, "variant": result.variant, "seed": result.seed}
        if result.error:
            continue
        table = {name: column.tolist() for name, column in result.classes().items()}
        for name, *numbers in zip(result.class_names, *table.values(), strict=True):
            plain = [None if x != x else f"{x:.4f}" if isinstance(x, float) else x for x in numbers]
            rows.append({**about, "class": name, **dict(zip(table, plain, strict=True))})
    write_rows(path, list(rows[0]) if rows else ["model", "variant", "seed", "class"], rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells under each other: the first column to the left, numbers to the right; short rows (errors) stick out."""
    rows = [[shortened(row[0], _WIDEST), *map(plain_name, row[1:])] for row in rows]
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[column]) for row in whole) for column in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join(cells).rstrip())
    return lines


def row_of(result: Result, protocol: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A row of results.csv: when, who, how good, on what, and all that repeats it."""
    scores: dict[str, Any] = {result.METRIC: "", "error": result.error}
    if not result.error:
        low, high = result.own_interval
        scores = {**vars(result.scores()), f"{result.METRIC}_low": low, f"{result.METRIC}_high": high}
    return {
        "time": now(),
        "protocol": protocol,
        "model": result.model.name,
        "variant": result.variant,
        "seed": result.seed,
        **scores,
        "data": result.data.name,
        "split": result.data.split,
        "classes": len(result.class_names),
        "test_images": len(np.unique(result.images)),
        **result.metadata,
        **{
            f"model_{name}": " ".join(f"{x:g}" for x in value) if isinstance(value, list) else value
            for name, value in result.model.key().items()
        },
        "data_fingerprint": result.data.source.fingerprint(),
        "command": command_of(protocol, result.model.text, options),
        "freqmask": __version__,
        "torch": str(torch.__version__),
    }


def add_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Append rows; those of the same measurements, which a command that was repeated left before, make room.

    Rows of other weights, images, options, seeds or versions stay: they are the history.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {_measurement(row) for row in rows}
    # another process may write to the same table: its rows must not come between reading and writing
    with writing(path), FileLock(path.with_name(f".{path.name}.lock")):
        known = read_rows(path)
        others = [row for row in known if _measurement(row) not in measured]
        if len(others) < len(known):
            header = list(dict.fromkeys(name for row in (*known, *rows) for name in row if name))
            write_rows(path, header, [*others, *rows])
            return
        for row in rows:
            append_row(path, row)


def _measurement(row: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    """What was measured, and how, whatever came out."""
    return frozenset(
        (name, cell)
        for name, cell in row.items()
        if cell and name and (name in _IDENTITY or name.startswith("model_"))
    )


def command_of(protocol: str, model: str, options: Mapping[str, Any]) -> str:
    """The command that measures this model again."""
    dropped = ("model", "out", "dry_run")
    given = {name: value for name, value in options.items() if value is not None and name not in dropped}
    return f"freqmask evaluate {protocol} {command_words({'model': [model], **given}, first='model')}"


def check_results(folder: Path) -> None:
    """Raises a UserError for a folder whose table cannot be written; asked before hours of measuring."""
    check_writable(folder, folder=True)
    check_writable(folder / RESULTS, "results")
    read_rows(folder / RESULTS)  # a damaged one would refuse the rows after all measuring


def shortened(name: str, most: int = 24) -> str:
    """A name for a figure: of a long path its end, or the figure would be all labels.

    >>> shortened("runs/a-very-long-folder/of-runs/mfm-1", 12)
    '...uns/mfm-1'
    """
    name = plain_name(name)  # a font draws no control characters
    return name if len(name) <= most else "..." + name[3 - most :]


def save_figure(figure: Any, path: Path) -> None:
    """A PNG, replaced whole."""
    replace_atomically(path, lambda unfinished: figure.savefig(unfinished, format="png"))


def plain_texts(legend: Any) -> None:
    """Names of files in a legend are no formulas."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def draw_bar_chart(path: Path, title: str, label: str, summaries: Sequence[Summary]) -> None:
    """Bars by model, side by side for the variants, with their intervals."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one.name for one in summaries))
    series: dict[str, dict[str, Summary]] = {}
    for one in summaries:
        series.setdefault(one.variant, {})[one.name] = one
    series = dict(list(series.items())[:_MOST_BARS])
    figure = Figure(figsize=(max(4.0, 1.6 + 1.3 * len(names)), 3.6), dpi=120, layout="constrained")
    axis = figure.add_subplot()
    draw_bars(axis, names, series)
    axis.set_xticks(range(len(names)), map(shortened, names), rotation=20, ha="right", parse_math=False)
    axis.set_ylabel(label)
    axis.set_title(
        "\n".join(shortened(line, 60) for line in title.splitlines()), fontsize=9, parse_math=False
    )
    if len(series) > 1:
        axis.legend(fontsize=8, frameon=False, ncols=len(series), loc="upper left", bbox_to_anchor=(0, -0.25))
    save_figure(figure, path)


def draw_bars(axis: Any, names: Sequence[str], series: Mapping[str, Mapping[str, Summary]]) -> None:
    """A group of bars a name, one a series, with the intervals; a series is label -> name -> summary."""
    width = 0.8 / max(len(series), 1)
    for number, (label, bars) in enumerate(series.items()):
        known = {name: one for name, one in bars.items() if one.values}
        places = [names.index(name) + (number - (len(series) - 1) / 2) * width for name in known]
        heights = [100 * one.mean for one in known.values()]
        ends = np.array([one.interval for one in known.values()]).reshape(-1, 2).T * 100
        errors = np.clip([heights - ends[0], ends[1] - heights], 0, None)
        color = f"C{number}"
        style = {"color": color, "ecolor": "0.3", "label": shortened(label, 40)}
        axis.bar(places, heights, 0.92 * width, yerr=errors, **style)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
