"""Few labels, all weights learning: three published settings, each of them, their average and the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from freqmask.console import rank, say
from freqmask.errors import UserError
from freqmask.evaluation import fewshot
from freqmask.evaluation.finetune.job import Bout, measure, open_bout
from freqmask.evaluation.finetune.settings import check_tuning, with_defaults
from freqmask.evaluation.job import make_place
from freqmask.evaluation.job import measure as measure_frozen
from freqmask.evaluation.labelled import LabelledData
from freqmask.evaluation.protocols import Fewshot
from freqmask.evaluation.results import (
    Result,
    Summary,
    append_results,
    draw_bars,
    summarise,
    table_lines,
    write_classes,
)
from freqmask.evaluation.subjects import PIXELS

EPOCHS = 50.0  # of the first two settings: the publication names the third one's only
# Learning rates as published, at any batch: scaled down to a handful of images they would move nothing.
SETTINGS: dict[str, dict[str, Any]] = {
    "lr 2e-3, warm-up": {"lr": 2e-3, "warmup_epochs": 5},
    "lr 2e-4": {"lr": 2e-4, "warmup_epochs": 0},
    "lr 2e-4, 100 epochs": {"lr": 2e-4, "warmup_epochs": 0, "epochs": 100.0},
}
FROZEN, AVERAGE, BEST = "frozen", "average", "best"


def evaluate_shots(options: Mapping[str, Any]) -> list[Summary]:
    """Fine-tune all models on few labels, with or without the frozen answer beside it.

    Args:
        options: those of the command ``fewshot``.

    Returns:
        For each number of labels and model a summary a setting, their average and the best.

    Raises:
        UserError: an option cannot be, or something cannot be opened.
    """
    shots = fewshot.parse_shots(list(options["shots"] or fewshot.SHOTS))
    _check_frozen(options)
    tuned = _tuning_options(options)
    bout, models = open_bout(tuned, frozen_too=options["tune"] == "both")
    bout.setting.options = {name: value for name, value in options.items() if name not in ("model", "out")}
    bout.setting.place = make_place(
        *(options[name] for name in ("accelerator", "batch_size", "workers", "precision", "cache"))
    )
    learning = [text for text in models if text != PIXELS]
    if not learning:
        raise UserError("model (pixels) has no weights to be fine-tuned; add a model, or give --tune frozen")
    count = len(learning) * len(shots) * len(SETTINGS) * len(bout.setting.seeds) * len(bout.data.rounds)
    say(f"{count} fine-tunings, each a run in {bout.root}")
    results = _frozen(bout, models, shots, options) if options["tune"] == "both" else []
    for text in learning:
        results += _tuned(bout, text, shots, tuned)
    return [] if rank() > 0 else _tell(bout, results, shots)


def _check_frozen(options: Mapping[str, Any]) -> None:
    """Raises a UserError where an option of frozen features is given and none are measured."""
    usual = {"strength": fewshot.INVERSE_STRENGTH, "feature": "mean", "precision": "32", "cache": True}
    given = [name for name, value in usual.items() if options[name] != value]
    if options["tune"] == "finetune" and given:
        raise UserError(
            f"{given[0]} ({options[given[0]]}) is of frozen features; leave it out, or give --tune both"
        )


def _tuning_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a fine-tuning: the command's where it has them, else what ``auto`` makes of them."""
    shared = {
        name: value for name, value in options.items() if name not in ("batch_size", "precision", "shots")
    }
    epochs = EPOCHS if options["epochs"] is None else options["epochs"]
    tuned = with_defaults(
        {**shared, "held_out": 0.0, "epochs": epochs, "seeds": options["seeds"] or [0, 1, 2]}
    )
    check_tuning({**tuned, "model": [text for text in tuned["model"] if text != PIXELS]})
    return tuned


def _frozen(
    bout: Bout, models: Sequence[str], shots: Sequence[str], options: Mapping[str, Any]
) -> list[Result]:
    """Logistic regression on the same labels."""
    if rank() > 0:
        return []
    protocol = Fewshot(shots, options["feature"], options["strength"])
    results = [
        result
        for text in models
        for result in measure_frozen(text, protocol, bout.data, bout.seen, bout.setting)
    ]
    return [replace(result, variant=f"{result.variant}, {FROZEN}") for result in results]


def _tuned(bout: Bout, text: str, shots: Sequence[str], options: Mapping[str, Any]) -> list[Result]:
    """All labels and settings of one model."""
    results = []
    for seed, subject in bout.subjects(text):
        for shot in shots:
            for number, (name, setting) in enumerate(SETTINGS.items(), 1):
                variant = f"{fewshot.words_of(shot)}, {name}"
                suffix = f"-{shot.replace('%', 'percent')}-{number}"
                results += measure(
                    bout, subject, seed, {**options, **setting, "shots": shot}, variant, suffix
                )
    return results


def _tell(bout: Bout, results: Sequence[Result], shots: Sequence[str]) -> list[Summary]:
    """A table for each number of labels, the rows, the picture."""
    summaries: list[Summary] = []
    averages: list[Summary] = []
    for shot in shots:
        words = fewshot.words_of(shot)
        here = summarised(results, bout.data, words)
        say()
        for line in table_lines(f"few labels: {words}", AVERAGE, here):
            say(line)
        averages += [replace(one, variant=words) for one in here if one.variant == AVERAGE]
        summaries += [replace(one, variant=f"{words}, {one.variant}") for one in here]
    say(f"({BEST}: the setting that is best on the test images, as published; {AVERAGE} is the fair number)")
    tables = append_results(results, bout.data, "fewshot", bout.setting.options, bout.setting.out)
    folder = (
        bout.setting.out or next((r.subject.results for r in results if r.subject.results), None) or Path()
    )
    title = f"few labels, fine-tuned: average of {len(SETTINGS)} settings\n{bout.data.name}"
    look = [folder / "fewshot-tuned.png", folder / "fewshot-tuned-classes.csv"]
    draw_bars(look[0], title, averages)
    write_classes(look[1], results, bout.data, None)
    say()
    say(f"rows        {', '.join(map(str, tables))}")
    say(f"look at     {' and '.join(map(str, look))}")
    return summaries


def summarised(results: Sequence[Result], data: LabelledData, words: str) -> list[Summary]:
    """Summaries for one number of labels: every setting, then their average, then the best one.

    Args:
        results: of all models, settings and seeds; their variants are ``WORDS, SETTING``.
        data: the images.
        words: the number of labels as tables say it.
    """
    beginning = f"{words}, "
    here = [
        replace(result, variant=result.variant.removeprefix(beginning))
        for result in results
        if result.variant.startswith(beginning)
    ]
    found = summarise(here, data)
    for text in dict.fromkeys(result.subject.text for result in here if result.variant != FROZEN):
        family = [result for result in here if result.subject.text == text and result.variant != FROZEN]
        if any(result.trouble for result in family):
            continue
        (mean,) = summarise([replace(result, variant=AVERAGE) for result in family], data)
        settings = summarise(family, data)
        by_seed = np.mean([one.accuracies for one in settings], axis=0)
        found.append(replace(mean, accuracies=[float(value) for value in by_seed]))
        found.append(replace(max(settings, key=lambda one: float(np.mean(one.accuracies))), variant=BEST))
    return found
