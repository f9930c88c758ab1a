"""What an evaluation leaves behind: a table on the screen, rows in results.csv, a bar picture, a table of classes."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from freqmask import __version__
from freqmask.evaluation.labelled import LabelledData
from freqmask.evaluation.scores import Scores, bootstrap_interval, margins, one_class, per_class, score
from freqmask.evaluation.subjects import Subject, tell_apart
from freqmask.training.checkpoint import replace_atomically
from freqmask.training.files import check_writable
from freqmask.training.runs import now
from freqmask.training.tables import append_row

RESULTS = "results.csv"
_MOST_BARS = 5  # variants side by side in the picture
_CLASSES_SHOWN = 20


@dataclass
class Result:
    """What one model answered under one seed and variant.

    Attributes:
        subject: the model.
        variant: of the protocol, such as ``k=20``.
        seed: of the heads and of fresh weights.
        images: (answered,) numbers of the images answered for; several times where the answers of several
            versions of an image count as one result.
        predicted: their classes; empty where there is no result.
        facts: further cells of the row: what was chosen, how many images were learnt from.
        trouble: why there is no result; empty where there is one.
    """

    subject: Subject
    variant: str
    seed: int
    images: np.ndarray
    predicted: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)
    trouble: str = ""


@dataclass
class Summary:
    """One model and variant over all seeds, in [0, 1].

    Attributes:
        name: of the model.
        variant: of the protocol.
        accuracies: by seed.
        interval: 95 % over test images, or over groups.
        scores: means over seeds.
        trouble: why there is no number.
    """

    name: str
    variant: str
    accuracies: list[float]
    interval: tuple[float, float]
    scores: Scores
    trouble: str = ""


def summarise(results: Sequence[Result], data: LabelledData) -> list[Summary]:
    """One summary a model and variant, in the order in which they came; no two models have the same name then."""
    tell_apart([result.subject for result in results])
    families: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        families.setdefault((result.subject.text, result.variant), []).append(result)
    return [_summary(family, data) for family in families.values()]


def _summary(family: Sequence[Result], data: LabelledData) -> Summary:
    first = family[0]
    if first.trouble:
        nothing = float("nan")
        return Summary(
            first.subject.name, first.variant, [], (nothing,) * 2, Scores(*(nothing,) * 3), first.trouble
        )
    each = [score_of(result, data) for result in family]
    correct = np.mean([result.predicted == data.labels[result.images] for result in family], axis=0)
    means = Scores(*(float(np.mean([getattr(one, name) for one in each])) for name in vars(each[0])))
    return Summary(
        first.subject.name,
        first.variant,
        [one.accuracy for one in each],
        bootstrap_interval(correct, _units(first.images, data)),
        means,
    )


def _units(images: np.ndarray, data: LabelledData) -> list[str | None] | None:
    """What an interval draws whole: the groups of DATA, and every image that was answered for several times."""
    if data.groups is not None:
        return [data.groups[int(index)] or f"image {index}" for index in images]
    if len(np.unique(images)) == len(images):
        return None
    return [str(index) for index in images.tolist()]


def score_of(result: Result, data: LabelledData) -> Scores:
    """The scores of one result."""
    return score(data.labels[result.images], result.predicted, len(data.class_names))


def table_lines(title: str, headline: str, summaries: Sequence[Summary]) -> list[str]:
    """One table over all models: a column a variant, then more on the headline variant. In per cent."""
    variants = list(dict.fromkeys(summary.variant for summary in summaries if not summary.trouble))
    names = list(dict.fromkeys(summary.name for summary in summaries))
    found = {(summary.name, summary.variant): summary for summary in summaries}
    headline = headline if headline in variants else (variants[0] if variants else "")
    header = ["model", *variants, "95 % interval", "balanced", "macro-F1"]
    rows = [header]
    for name in names:
        main = found.get((name, headline))
        cells = [percent(found.get((name, variant))) for variant in variants]
        if main is None or main.trouble:
            trouble = next((one.trouble for one in summaries if one.name == name and one.trouble), "")
            some = [*cells, "-", "-", "-"] if any(cell != "-" for cell in cells) else ["no result"]
            rows.append([name, *([trouble] if trouble else some)])
            continue
        interval = f"{100 * main.interval[0]:.1f} to {100 * main.interval[1]:.1f}"
        scores = [f"{100 * main.scores.balanced_accuracy:.1f}", f"{100 * main.scores.macro_f1:.1f}"]
        rows.append([name, *cells, interval, *scores])
    note = f"(accuracy in %; interval, balanced accuracy and macro-F1 are those of {headline})"
    return [title, *aligned(rows), *([note] if headline else [])]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells under each other: the first column to the left, numbers to the right."""
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[column]) for row in whole) for column in range(len(rows[0]))]
    widths[0] = max(widths[0], *(len(row[0]) for row in rows))
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join(cells).rstrip())
    return lines


def percent(summary: Summary | None) -> str:
    """Accuracy in per cent, with its deviation over seeds where there are several; - where there is none."""
    if summary is None or summary.trouble:
        return "-"
    mean = 100 * float(np.mean(summary.accuracies))
    if len(summary.accuracies) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * float(np.std(summary.accuracies, ddof=1)):.1f}"


def class_lines(results: Sequence[Result], data: LabelledData, variant: str) -> list[str]:
    """Recall of each class by model, in per cent, where there are few enough classes to read."""
    if len(data.class_names) > _CLASSES_SHOWN:
        return []
    columns = _recalls(results, data, variant)
    if not columns:
        return []
    header = ["recall in %", *columns]
    rows = [
        [name, *(f"{100 * recalls[number]:.1f}" for recalls in columns.values())]
        for number, name in enumerate(data.class_names)
    ]
    return aligned([header, *rows])


def _recalls(results: Sequence[Result], data: LabelledData, variant: str) -> dict[str, np.ndarray]:
    found: dict[str, list[list[float]]] = {}
    for result in results:
        if result.variant == variant and not result.trouble:
            classes = per_class(data.labels[result.images], result.predicted, data.class_names)
            found.setdefault(result.subject.name, []).append([one.recall for one in classes])
    return {name: np.mean(recalls, axis=0) for name, recalls in found.items()}


def warnings_of(results: Sequence[Result], data: LabelledData) -> list[str]:
    """A sentence for every result that takes all images for one class: its accuracy says nothing of the model."""
    lines = []
    for result in results:
        if not result.trouble:
            _, there, said = margins(data.labels[result.images], result.predicted, len(data.class_names))
            if (alone := one_class(said, there)) is not None:
                lines.append(
                    f"warning: {result.subject.name} ({result.variant}, seed {result.seed}) takes every image for "
                    f"{data.class_names[alone]!r}: its accuracy is the share of that class, not what it has learned"
                )
    return lines


def check_results(folder: Path) -> None:
    """Raises a UserError for a folder whose table cannot be written; asked before hours of measuring."""
    check_writable(folder, folder=True)
    check_writable(folder / RESULTS, "results")


def append_results(
    results: Iterable[Result], data: LabelledData, protocol: str, options: Mapping[str, Any], out: Path | None
) -> list[Path]:
    """Append a row a result, to ``out/results.csv``, else to that of the model's run, else to ./results.csv.

    Args:
        results: what was measured.
        data: on what.
        protocol: the command's name.
        options: those that were given, to repeat the row.
        out: a folder, or None.

    Returns:
        The tables written to.
    """
    written: dict[Path, None] = {}
    for result in results:
        folder = out or result.subject.results or Path()
        folder.mkdir(parents=True, exist_ok=True)
        append_row(folder / RESULTS, _row(result, data, protocol, options))
        written[folder / RESULTS] = None
    return list(written)


def _row(result: Result, data: LabelledData, protocol: str, options: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any]
    if result.trouble:
        found = {"accuracy": "", "trouble": result.trouble}
    else:
        scores = score_of(result, data)
        right = (result.predicted == data.labels[result.images]).astype(float)
        low, high = bootstrap_interval(right, _units(result.images, data))
        found = {**vars(scores), "accuracy_low": low, "accuracy_high": high}
    about = {
        "data": data.name,
        "split": data.split,
        "classes": len(data.class_names),
        "test_images": len(np.unique(result.images)),
        **result.facts,
    }
    who = (result.subject, result.variant, result.seed)
    return row_of(protocol, who, found, about, data.source.fingerprint(), options)


def row_of(
    protocol: str,
    who: tuple[Subject, str, int],
    scores: Mapping[str, Any],
    about: Mapping[str, Any],
    fingerprint: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """A row of results.csv: when, who, how good, on what, and all that repeats it.

    Args:
        protocol: the command's name.
        who: model, variant and seed.
        scores: name to value.
        about: the data and the training.
        fingerprint: of the images.
        options: those that were given.
    """
    subject, variant, seed = who
    return {
        "time": now(),
        "protocol": protocol,
        "model": subject.name,
        "variant": variant,
        "seed": seed,
        **scores,
        **about,
        **{f"model_{name}": _plain(value) for name, value in subject.key().items()},
        "data_fingerprint": fingerprint,
        "command": command_of(protocol, subject.text, options),
        "freqmask": __version__,
        "torch": str(torch.__version__),
    }


def _plain(value: Any) -> Any:
    return " ".join(f"{one:g}" for one in value) if isinstance(value, list) else value


def command_of(protocol: str, model: str, options: Mapping[str, Any]) -> str:
    """The command that measures this model again."""
    words = ["freqmask", "evaluate", protocol, model]
    for name, value in options.items():
        if value is None or name in ("model", "out"):
            continue
        many = isinstance(value, (list, tuple))
        words += [f"--{name}", *(_word(one) for one in (value if many else [value]))]
    return shlex.join(words)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def write_classes(path: Path, results: Sequence[Result], data: LabelledData, variant: str | None) -> None:
    """A CSV of precision, recall and F1 of every class, model and seed, of one variant or (None) of all."""
    import csv

    def write(unfinished: Path) -> None:
        with unfinished.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(["model", "variant", "seed", "class", "images", "precision", "recall", "f1"])
            for result in results:
                if variant not in (None, result.variant) or result.trouble:
                    continue
                for one in per_class(data.labels[result.images], result.predicted, data.class_names):
                    numbers = [f"{value:.4f}" for value in (one.precision, one.recall, one.f1)]
                    about = [result.subject.name, result.variant, result.seed]
                    table.writerow([*about, one.name, one.images, *numbers])

    replace_atomically(path, write)


def shortened(name: str, most: int = 24) -> str:
    """A name for a picture: of a long path its end, or the picture would be all labels.

    >>> shortened("runs/a-very-long-folder/of-runs/mfm-1", 12)
    '...uns/mfm-1'
    """
    return name if len(name) <= most else "..." + name[3 - most :]


class Bar(NamedTuple):
    """A number of the picture, in [0, 1]."""

    name: str
    variant: str
    value: float
    interval: tuple[float, float]


def draw_bars(path: Path, title: str, summaries: Sequence[Summary]) -> None:
    """Bars of accuracy by model, side by side for the variants, with their intervals."""
    measured = [one for one in summaries if not one.trouble]
    bars = [Bar(one.name, one.variant, float(np.mean(one.accuracies)), one.interval) for one in measured]
    draw_bar_chart(path, title, "accuracy", bars)


def draw_bar_chart(path: Path, title: str, score: str, bars: Sequence[Bar]) -> None:
    """Bars of a score by model, side by side for the variants, with their intervals; nothing where there are none."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(bar.name for bar in bars))
    variants = list(dict.fromkeys(bar.variant for bar in bars))[:_MOST_BARS]
    if not names:
        return
    figure = Figure(figsize=(max(4.0, 1.6 + 1.3 * len(names)), 3.6), dpi=120, layout="constrained")
    axis = figure.add_subplot()
    width = 0.8 / len(variants)
    for place, variant in enumerate(variants):
        for number, name in enumerate(names):
            found = [bar for bar in bars if (bar.name, bar.variant) == (name, variant)]
            if found:
                mean = 100 * found[0].value
                low, high = (100 * end for end in found[0].interval)
                axis.bar(
                    number + (place - (len(variants) - 1) / 2) * width,
                    mean,
                    width * 0.92,
                    yerr=[[max(mean - low, 0.0)], [max(high - mean, 0.0)]],
                    color=f"C{place}",
                    ecolor="0.3",
                    label=variant if number == 0 else None,
                )
    axis.set_xticks(range(len(names)), map(shortened, names), rotation=20, ha="right", parse_math=False)
    axis.set_ylabel(f"{score} in %")
    axis.set_title(
        "\n".join(shortened(line, 60) for line in title.splitlines()), fontsize=9, parse_math=False
    )
    if len(variants) > 1:
        axis.legend(
            fontsize=8, frameon=False, ncols=len(variants), loc="upper left", bbox_to_anchor=(0, -0.25)
        )
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    replace_atomically(path, lambda unfinished: figure.savefig(unfinished, format="png"))
