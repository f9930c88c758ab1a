"""What an evaluation gives: scores of predicted classes, their intervals, summaries over seeds, table and bar chart.

What else stands in a row of results.csv is put there by ``protocol.row_of``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int64, Shaped

from freqmask.console import aligned, shortened
from freqmask.evaluation.eval_model import EvalModel
from freqmask.training.files import save_figure, write_rows

_MOST_BARS, _CLASSES_SHOWN = 5, 40  # variants side by side in the chart, classes in a table
RESAMPLES = 2000
EVERYTHING = 0.999  # share of the predictions from which they count as one class
Margins = Int64[np.ndarray, "3 classes"]  # of each class how many are predicted rightly, exist, are predicted


@dataclass(frozen=True)
class Scores:
    """In [0, 1], over the images of one prediction."""

    accuracy: float  # share of right predictions
    balanced_accuracy: float  # mean recall of the classes that exist
    macro_f1: float  # mean F1 of the classes that exist or were predicted


@dataclass(frozen=True)
class SegmentationScores:
    """In [0, 1], over all pixels of all images together."""

    mean_iou: float  # mean over the classes of intersection over union
    pixel_accuracy: float  # share of pixels named right
    mean_accuracy: float  # mean over the classes of the share of their pixels named right


def margins(
    truth: Int64[np.ndarray, " image"], predicted: Int64[np.ndarray, " image"], classes: int
) -> Margins:
    """Of each class how many are predicted rightly, how many there are, and how many are predicted.

    The diagonal and the sums of the confusion matrix, without the matrix: of 5,000 classes it would be 200 MB.
    """
    parts = (truth[truth == predicted], truth, predicted)
    return np.stack([np.bincount(part, minlength=classes) for part in parts])


def image_margins(
    truth: Shaped[np.ndarray, "height width"], predicted: Shaped[np.ndarray, "height width"], classes: int
) -> Margins:
    """The margins over the pixels of an image; pixels whose truth is negative do not count."""
    counted = truth >= 0
    return margins(truth[counted].astype(np.int64), predicted[counted].astype(np.int64), classes)


def score(counts: Margins) -> Scores:
    """The scores of a prediction from its margins."""
    right, total, predicted = counts
    counted = (total + predicted) > 0
    f1 = 2 * right[counted] / (total + predicted)[counted]
    return Scores(*_accuracies(counts), float(f1.mean()))


def segmentation_score(counts: Margins) -> SegmentationScores:
    """The scores of a data set from the margins over all its pixels.

    A class that neither exists nor is predicted anywhere is left out of the means, as mmsegmentation does.
    """
    return SegmentationScores(float(mean_iou(counts)), *_accuracies(counts))


def _accuracies(counts: Margins) -> tuple[float, float]:
    """The share of right predictions, and the mean recall of the classes that exist."""
    right, total, _ = counts
    if not total.any():
        return float("nan"), float("nan")
    return float(right.sum() / total.sum()), float((right[total > 0] / total[total > 0]).mean())


def mean_iou(counts: Shaped[np.ndarray, "*rest 3 classes"]) -> Float[np.ndarray, "*rest"]:
    """Mean over the classes of right / (existing + predicted - right), empty classes left out."""
    right, total, predicted = np.moveaxis(counts, -2, 0)
    union = total + predicted - right
    with np.errstate(invalid="ignore", divide="ignore"):
        ious = np.where(union > 0, right / union, 0.0)
        return np.asarray(ious.sum(-1) / (union > 0).sum(-1))


def class_scores(counts: Margins) -> dict[str, Shaped[np.ndarray, " classes"]]:
    """Of every class how many there are, and its scores in [0, 1]; nan where there is nothing to divide by."""
    right, total, predicted = counts
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "total": total,
            "precision": right / predicted,
            "recall": right / total,
            "f1": 2 * right / (total + predicted),
            "iou": right / (total + predicted - right),
        }


def one_class(counts: Margins) -> int | None:
    """The class that everything is taken for though others exist; None where predictions differ."""
    _, total, predicted = counts
    most = int(predicted.argmax())
    alone = predicted[most] >= EVERYTHING * predicted.sum() and total[most] < EVERYTHING * total.sum()
    return most if predicted.sum() and alone else None


def accuracy_units(
    correct: Float[np.ndarray, " image"], groups: Sequence[object] | None = None
) -> Float[np.ndarray, "unit 2"]:
    """What the interval of an accuracy draws: right predictions and images of each unit.

    Args:
        correct: share of right predictions on each image (over seeds), in [0, 1].
        groups: where images belong together (patients, scenes), whole groups are drawn, since images of one
            group tell less than as many of several; None, or None for an image, where they do not.
    """
    correct = np.asarray(correct, float)
    if groups is None:
        return np.stack([correct, np.ones(len(correct))], axis=1)
    keys = [object() if group is None else group for group in groups]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    members = np.array([numbers[key] for key in keys])
    return np.stack([np.bincount(members, correct), np.bincount(members).astype(float)], axis=1)


def bootstrap_interval(
    units: Shaped[np.ndarray, "unit ..."],
    statistic: Callable[[np.ndarray], float],
    others: Shaped[np.ndarray, "unit ..."] | None = None,
) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of a statistic over test images (or groups), drawn again with replacement.

    Kept beside scipy.stats.bootstrap, which takes 0.36 s for 10,000 images and 0.44 s for mean IoU of 500 (this:
    0.50 and 0.22 s): it draws other numbers, so that results of earlier versions would not repeat.

    Args:
        units: counts of each image or group, which are summed over those drawn.
        statistic: of the sum.
        others: another model's counts of the same images, above whose statistic it is measured.
    """
    values = _resampled(units, statistic) - (0 if others is None else _resampled(others, statistic))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _resampled(units: np.ndarray, statistic: Callable[[np.ndarray], float]) -> np.ndarray:
    generator = np.random.default_rng(0)  # the same draws of images for all models
    flat, count = units.reshape(len(units), -1).astype(np.float64), len(units)  # exact up to 2^53 pixels
    values = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        times = np.bincount(generator.integers(0, count, count), minlength=count)
        values[number] = statistic((times @ flat).reshape(units.shape[1:]))
    return values


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

    SCORE: ClassVar[Any]  # the scores of margins, `METRIC` first

    def scores(self) -> Any:
        """A dataclass of scores in [0, 1]."""
        return type(self).SCORE(self.margins())

    @abstractmethod
    def classes(self) -> dict[str, np.ndarray]:
        """Columns of a table of the classes: how many there are, and their scores."""

    @abstractmethod
    def margins(self) -> Margins:
        """Of each class how many are predicted rightly, there are, are predicted."""

    @classmethod
    @abstractmethod
    def units(cls, results: Sequence[Any]) -> Shaped[np.ndarray, "unit ..."]:
        """What an interval draws of several seeds: counts of each image, or group of images."""

    @staticmethod
    @abstractmethod
    def statistic(sums: np.ndarray) -> float:
        """The mean of `METRIC` over the seeds, of units that are summed."""

    @classmethod
    def interval(cls, results: Sequence[Any]) -> tuple[float, float]:
        """95 % of the mean of `METRIC` over several seeds."""
        return bootstrap_interval(cls.units(results), cls.statistic)

    @classmethod
    def lead(cls, results: Sequence[Any], others: Sequence[Any]) -> tuple[float, float] | None:
        """95 % of how far one model's mean is above another's, the same images drawn for both; None of others."""
        if not np.array_equal(results[0].images, others[0].images):
            return None
        return bootstrap_interval(cls.units(results), cls.statistic, cls.units(others))

    @cached_property
    def own_interval(self) -> tuple[float, float]:
        """95 % of `METRIC` under this seed."""
        return type(self).interval([self])

    @property
    def class_names(self) -> Sequence[str]:
        """Of the data."""
        return self.data.class_names


@dataclass
class ClassificationResult(Result):
    """A class for each image."""

    # (prediction,) of images; empty where there is no result
    predicted: np.ndarray = field(default_factory=lambda: np.empty(0))

    SCORE = staticmethod(score)

    @property
    def truth(self) -> np.ndarray:
        """(prediction,) the classes that are right."""
        return self.data.labels[self.images]

    def classes(self) -> dict[str, np.ndarray]:
        scores = class_scores(self.margins())
        return {"images": scores["total"], **{name: scores[name] for name in ("precision", "recall", "f1")}}

    def margins(self) -> Margins:
        return margins(self.truth, self.predicted, len(self.class_names))

    @classmethod
    def units(cls, results: Sequence[ClassificationResult]) -> np.ndarray:
        first = results[0]
        correct = np.mean([result.predicted == result.truth for result in results], axis=0)
        groups: Sequence[object] | None = first.data.groups_of(first.images)
        if groups is not None:
            groups = [group or f"image {index}" for group, index in zip(groups, first.images, strict=True)]
        elif len(np.unique(first.images)) < len(first.images):  # an image in several versions is drawn whole
            groups = first.images.tolist()
        return accuracy_units(correct, groups)

    @staticmethod
    def statistic(sums: np.ndarray) -> float:
        return float(sums[0] / sums[1])


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
    SCORE = staticmethod(segmentation_score)

    def classes(self) -> dict[str, np.ndarray]:
        scores, labels = class_scores(self.margins()), np.array(self.data.labels.values)
        more = {"iou": scores["iou"], "accuracy": scores["recall"], "precision": scores["precision"]}
        return {"label": labels, "pixels": scores["total"], **more}

    def margins(self) -> Margins:
        return self.counts.sum(axis=0)

    @classmethod
    def units(cls, results: Sequence[SegmentationResult]) -> np.ndarray:
        return np.stack([result.counts for result in results], axis=1)  # (image, seed, 3, class)

    @staticmethod
    def statistic(sums: np.ndarray) -> float:
        return float(mean_iou(sums).mean())


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
        return " to ".join(f"{100 * end:.1f}" for end in self.interval)

    def percent(self) -> str:
        """In per cent, with the deviation over seeds where there are several; - where there is no number."""
        spread = f" ± {100 * float(np.std(self.values, ddof=1)):.1f}" if len(self.values) > 1 else ""
        return f"{100 * self.mean:.1f}{spread}" if self.values else "-"


def summarize(results: Sequence[Result]) -> list[Summary]:
    """One summary a model and variant, in the order in which they came."""
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
    means = {name: float(np.mean([vars(one)[name] for one in each])) for name in vars(each[0])}
    values = [result.classes()[first.CLASS_METRIC] for result in family]
    return Summary(
        first.model.name,
        first.variant,
        [float(vars(one)[first.METRIC]) for one in each],
        type(first).interval(family) if len(family) > 1 else first.own_interval,
        replace(each[0], **means),
        dict(zip(first.class_names, np.mean(values, axis=0).tolist(), strict=True)),
    )


@dataclass
class ResultTable:
    """The results of one protocol over models, variants and seeds."""

    title: str  # above the table
    headline: str  # the variant whose interval and further scores the table shows
    results: Sequence[Result]  # in the order of the rows
    prefix: str = ""  # of all variants, which its lines leave out
    averaged: Sequence[str] = ()  # the variants that the headline is the mean of, where it is such a mean

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
        behind = self._behind(headline)
        more = ["95 % interval", *(["behind the best"] if behind else []), *others.values()]
        rows = [["model", *names, *more]]
        for name, summaries in self.models().items():
            main = summaries.get(headline)
            cells = [summaries[variant].percent() if variant in summaries else "-" for variant in variants]
            if main is not None and not main.error:
                scores = [f"{100 * getattr(main.scores, score):.1f}" for score in others]
                rows.append([name, *cells, main.interval_text(), *behind.get(name, []), *scores])
            elif any(cell != "-" for cell in cells):
                rows.append([name, *cells, *["-"] * len(more)])
            else:
                rows.append([name, next((one.error for one in summaries.values() if one.error), "no result")])
        further = f"{', '.join(more[1:-1])} and {more[-1]}"
        note = f"({self.metric} in %; interval, {further} are those of {headline.removeprefix(self.prefix)})"
        return [self.title, *aligned(rows), *([note] if headline else [])]

    def _behind(self, variant: str) -> dict[str, list[str]]:
        """A cell for each of several models: how far it is behind the best without an error (a mean of nan)."""
        means = {one.name: one.mean for one in self.summaries if one.variant == variant and one.mean >= 0}
        best = max(means, key=lambda name: means[name], default="")
        parts = {variant} if variant in {one.variant for one in self.results} else set(self.averaged)
        known = [one for one in self.results if one.variant in parts]
        families = {name: [one for one in known if one.model.name == name] for name in means}
        cells = {name: ["-"] for name in self.models()}
        for name in means.keys() - {best}:
            ends = type(known[0]).lead(families[best], families[name])
            apart = "" if ends is None else f" ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})"
            cells[name] = [f"{100 * (means[best] - means[name]):.1f}{apart}"]
        return cells if len(means) > 1 else {}

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
            f"for {result.class_names[alone]!r}: its {self.metric} follows from how common that "
            "class is, not from what was learned"
            for result in self.results
            if not result.error and (alone := one_class(result.margins())) is not None
        ]


def write_class_scores(path: Path, results: Iterable[Result]) -> None:
    """A CSV of the scores of every class in each of the results."""
    rows = []
    for result in results:
        if result.error:
            continue
        about = {"model": result.model.name, "variant": result.variant, "seed": result.seed}
        table = {name: column.tolist() for name, column in result.classes().items()}
        for name, *numbers in zip(result.class_names, *table.values(), strict=True):
            plain = [None if x != x else f"{x:.4f}" if isinstance(x, float) else x for x in numbers]
            rows.append({**about, "class": name, **dict(zip(table, plain, strict=True))})
    write_rows(path, list(rows[0]) if rows else ["model", "variant", "seed", "class"], rows)


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
    lines = [shortened(line, 60) for line in title.splitlines()]
    axis.set_title("\n".join(lines), fontsize=9, parse_math=False)
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
        style = {"color": f"C{number}", "ecolor": "0.3", "label": shortened(label, 40)}
        axis.bar(places, heights, 0.92 * width, yerr=errors, **style)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
