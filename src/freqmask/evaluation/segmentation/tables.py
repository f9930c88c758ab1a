"""What a segmentation leaves behind: a table on the screen, rows, the table of classes, bars."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from freqmask.evaluation.results import RESULTS, Bar, aligned, draw_bar_chart, row_of
from freqmask.evaluation.scores import one_class
from freqmask.evaluation.segmentation.data import SegmentationData
from freqmask.evaluation.segmentation.predict import Answers
from freqmask.evaluation.segmentation.scores import (
    SegmentationScores,
    bootstrap_interval,
    per_class,
    score,
)
from freqmask.evaluation.subjects import Subject, tell_apart
from freqmask.training.checkpoint import replace_atomically
from freqmask.training.tables import append_row

PROTOCOL = "segment"
_CLASSES_SHOWN = 40


@dataclass
class SegmentationResult:
    """What one trained network answered.

    Attributes:
        subject: the model.
        variant: ``windows`` or ``whole``.
        seed: of the training.
        answers: counts of every test image.
        facts: further cells of the row.
    """

    subject: Subject
    variant: str
    seed: int
    answers: Answers
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def trouble(self) -> str:
        """Why there is no number; empty where there is one."""
        return "" if self.answers.finite else "logits are not finite; no result"

    @property
    def counts(self) -> np.ndarray:
        """(3, class) over all images together."""
        total: np.ndarray = self.answers.counts.sum(axis=0)
        return total


@dataclass
class SegmentationSummary:
    """One model and way to test over all seeds, in [0, 1].

    Attributes:
        name: of the model.
        variant: ``windows`` or ``whole``.
        mean_ious: by seed.
        interval: 95 % of the mean IoU over test images.
        scores: means over seeds.
        class_ious: name of a class -> mean IoU over seeds; nan where it is nowhere.
        trouble: why there is no number.
    """

    name: str
    variant: str
    mean_ious: list[float]
    interval: tuple[float, float]
    scores: SegmentationScores
    class_ious: dict[str, float]
    trouble: str = ""


def summarise(results: Sequence[SegmentationResult], data: SegmentationData) -> list[SegmentationSummary]:
    """One summary a model and variant, in the order in which they came; no two models have the same name then."""
    tell_apart([result.subject for result in results])
    families: dict[tuple[str, str], list[SegmentationResult]] = {}
    for result in results:
        families.setdefault((result.subject.text, result.variant), []).append(result)
    return [_summary(family, data) for family in families.values()]


def _summary(family: Sequence[SegmentationResult], data: SegmentationData) -> SegmentationSummary:
    first, names = family[0], data.labels.names
    trouble = next((result.trouble for result in family if result.trouble), "")
    if trouble:
        nothing = float("nan")
        none = SegmentationScores(nothing, nothing, nothing)
        return SegmentationSummary(
            first.subject.name, first.variant, [], (nothing, nothing), none, {}, trouble
        )
    each = [score(result.counts) for result in family]
    means = SegmentationScores(*(float(np.mean([getattr(s, n) for s in each])) for n in vars(each[0])))
    ious = np.array([[one.iou for one in per_class(result.counts, names)] for result in family])
    return SegmentationSummary(
        first.subject.name,
        first.variant,
        [one.mean_iou for one in each],
        bootstrap_interval([result.answers.counts for result in family]),
        means,
        dict(zip(names, ious.mean(axis=0).tolist(), strict=True)),
    )


def table_lines(title: str, summaries: Sequence[SegmentationSummary]) -> list[str]:
    """One table over all models, in per cent."""
    several = len({summary.variant for summary in summaries}) > 1
    rows = [["model", "mean IoU", "95 % interval", "pixel accuracy", "mean accuracy"]]
    for one in summaries:
        name = f"{one.name}, {one.variant}" if several else one.name
        if one.trouble:
            rows.append([name, one.trouble])
            continue
        low, high = one.interval
        scores = [f"{100 * one.scores.pixel_accuracy:.1f}", f"{100 * one.scores.mean_accuracy:.1f}"]
        rows.append([name, _spread(one.mean_ious), f"{100 * low:.1f} to {100 * high:.1f}", *scores])
    return [
        title,
        *aligned(rows),
        "(in %, over all pixels of all test images; the interval is of the mean IoU)",
    ]


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * float(np.mean(values)):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * float(np.std(values, ddof=1)):.1f}"


def warnings_of(results: Sequence[SegmentationResult], data: SegmentationData) -> list[str]:
    """A sentence for every network that calls all pixels one class: its mean IoU is that of no segmentation."""
    lines = []
    for result in (one for one in results if not one.trouble):
        _, there, said = result.counts
        if (alone := one_class(said, there)) is not None:
            lines.append(
                f"warning: {result.subject.name} ({result.variant}, seed {result.seed}) calls every pixel "
                f"{data.labels.names[alone]!r}: its mean IoU is that of no segmentation at all"
            )
    return lines


def class_lines(summaries: Sequence[SegmentationSummary], variant: str) -> list[str]:
    """IoU of each class by model, in per cent, where there are few enough classes to read."""
    shown = [one for one in summaries if one.variant == variant and not one.trouble]
    if not shown or len(shown[0].class_ious) > _CLASSES_SHOWN:
        return []
    rows = [["IoU in %", *(one.name for one in shown)]]
    for name in shown[0].class_ious:
        ious = [one.class_ious[name] for one in shown]
        rows.append([name, *("-" if np.isnan(iou) else f"{100 * iou:.1f}" for iou in ious)])
    return aligned(rows)


def append_results(
    results: Sequence[SegmentationResult],
    data: SegmentationData,
    options: Mapping[str, Any],
    out: Path | None,
) -> list[Path]:
    """Append a row a result to ``out/results.csv``, else to that of the model's run, else to ./results.csv.

    Returns:
        The tables written to.
    """
    written: dict[Path, None] = {}
    fingerprint = data.source.fingerprint()
    for result in results:
        path = (out or result.subject.results or Path()) / RESULTS
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "data": data.name,
            "split": data.split,
            "classes": len(data.labels),
            "test_images": len(result.answers.images),
            "train_images": len(data.train),
            **result.facts,
        }
        who = (result.subject, result.variant, result.seed)
        append_row(path, row_of(PROTOCOL, who, _scores(result), about, fingerprint, options))
        written[path] = None
    return list(written)


def _scores(result: SegmentationResult) -> dict[str, Any]:
    if result.trouble:
        return {"mean_iou": "", "trouble": result.trouble}
    low, high = bootstrap_interval([result.answers.counts])
    return {**vars(score(result.counts)), "mean_iou_low": low, "mean_iou_high": high}


def write_classes(path: Path, results: Sequence[SegmentationResult], data: SegmentationData) -> None:
    """A CSV of IoU, accuracy and precision of every class, model, seed and variant."""

    def write(unfinished: Path) -> None:
        with unfinished.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            columns = ("iou", "accuracy", "precision")
            table.writerow(["model", "seed", "variant", "label", "class", "pixels", *columns])
            for result in (one for one in results if not one.trouble):
                classes = per_class(result.counts, data.labels.names)
                for label, one in zip(data.labels.values, classes, strict=True):
                    numbers = ["" if np.isnan(x) else f"{x:.4f}" for x in (getattr(one, n) for n in columns)]
                    who = [result.subject.name, result.seed, result.variant]
                    table.writerow([*who, label, one.name, one.pixels, *numbers])

    replace_atomically(path, write)


def draw(path: Path, title: str, summaries: Sequence[SegmentationSummary]) -> None:
    """Bars of the mean IoU."""
    bars = [
        Bar(one.name, one.variant, float(np.mean(one.mean_ious)), one.interval)
        for one in summaries
        if not one.trouble
    ]
    draw_bar_chart(path, title, "mean IoU", bars)
