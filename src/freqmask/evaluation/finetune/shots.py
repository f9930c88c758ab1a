"""Few labels, all weights learning: three published settings, each of them, their average and the best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from freqmask.console import rank, say
from freqmask.errors import UserError
from freqmask.evaluation import fewshot
from freqmask.evaluation.eval_model import PIXELS
from freqmask.evaluation.fewshot import Fewshot
from freqmask.evaluation.finetune.job import Finetune, FinetuneExperiment
from freqmask.evaluation.finetune.settings import check_tuning, with_defaults
from freqmask.evaluation.protocol import EvalConfig, EvalContext, finish_report, say_blocks
from freqmask.evaluation.results import Result, ResultTable, Summary, draw_bar_chart, summarize

EPOCHS = 50.0  # of the first two settings: the publication names the third one's only
# Learning rates as published, at any batch: scaled down to a handful of images they would move nothing.
SETTINGS: dict[str, dict[str, Any]] = {
    "lr 2e-3, warm-up": {"lr": 2e-3, "warmup_epochs": 5},
    "lr 2e-4": {"lr": 2e-4, "warmup_epochs": 0},
    "lr 2e-4, 100 epochs": {"lr": 2e-4, "warmup_epochs": 0, "epochs": 100.0},
}
FROZEN, AVERAGE, BEST = "frozen", "average", "best"


class TunedFewshot(Finetune):
    """Fine-tuning on few labels, with or without the frozen features beside it.

    Args:
        options: those of the command ``fewshot``.
    """

    name = "fewshot"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.shots = fewshot.parse_shots(options["shots"] or fewshot.SHOTS)
        _check_frozen(options)
        self.frozen = None
        if options["tune"] == "both":
            self.frozen = Fewshot(self.shots, options["feature"], options["strength"])
        super().__init__(_tuning_options(options), self.frozen is not None)

    def config(self, options: Mapping[str, Any]) -> EvalConfig:
        """As for frozen features."""
        return EvalConfig.of(options, parted=False)

    def open(self, config: EvalConfig) -> FinetuneExperiment:
        """Everything opened and checked before any work."""
        experiment = super().open(config)
        tuned = [text for text in experiment.models if text != PIXELS]
        if not tuned:
            raise UserError(
                "model (pixels) has no weights to be fine-tuned; add a model, or give --tune frozen"
            )
        count = len(tuned) * len(self.shots) * len(SETTINGS) * len(config.seeds) * len(experiment.data.rounds)
        say(f"{count} fine-tunings, each a run in {experiment.root}")
        return experiment

    def contexts(self, experiment: FinetuneExperiment, text: str) -> Iterator[tuple[Any, int]]:
        """The model frozen, then to be fine-tuned."""
        if self.frozen is not None and rank() == 0:
            yield from self.frozen.contexts(experiment, text)
        if text != PIXELS:
            yield from super().contexts(experiment, text)

    def evaluate(self, context: Any, seed: int) -> list[Result]:
        """Logistic regression on frozen features, or all labels and settings of fine-tuning."""
        if self.frozen is not None and isinstance(context, EvalContext):
            rows = self.frozen.evaluate(context, seed)
            return [replace(row, variant=f"{row.variant}, {FROZEN}") for row in rows]
        rows = []
        for shot in self.shots:
            for number, (name, setting) in enumerate(SETTINGS.items(), 1):
                options = {**self.options, **setting, "shots": shot}
                suffix = f"-{shot.replace('%', 'percent')}-{number}"
                rows += context.measure(options, seed, f"{fewshot.shot_name(shot)}, {name}", suffix)
        return rows

    def report(self, experiment: FinetuneExperiment, results: Sequence[Result]) -> list[Summary]:
        """A table for each number of labels, the rows, a bar chart of the averages."""
        summaries: list[Summary] = []
        averages: list[Summary] = []
        for words in map(fewshot.shot_name, self.shots):
            here = summarize_settings(results, words)
            table = ResultTable(self.name, f"few labels: {words}", AVERAGE, results)
            table.summaries = here
            say_blocks(table.lines())
            averages += [replace(one, variant=words) for one in here if one.variant == AVERAGE]
            summaries += [replace(one, variant=f"{words}, {one.variant}") for one in here]
        say(
            f"({BEST}: the setting that is best on the test images, as published; {AVERAGE} is the fair number)"
        )
        table = ResultTable(self.name, "few labels", AVERAGE, results)
        folder = table.folder(experiment.config.out)
        figures = [folder / "fewshot-tuned.png", folder / "fewshot-tuned-classes.csv"]
        title = f"few labels, fine-tuned: average of {len(SETTINGS)} settings\n{experiment.data.name}"
        if averages:
            draw_bar_chart(figures[0], title, "accuracy in %", averages)
        table.write_classes(figures[1])
        say_blocks(table.warnings())
        finish_report([table], experiment.config, figures)
        return summaries


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


def summarize_settings(results: Sequence[Result], words: str) -> list[Summary]:
    """Summaries for one number of labels: every setting, then their average, then the best one.

    Args:
        results: of all models, settings and seeds; their variants are ``WORDS, SETTING``.
        words: the number of labels as tables say it.
    """
    beginning = f"{words}, "
    here = [
        replace(result, variant=result.variant.removeprefix(beginning))
        for result in results
        if result.variant.startswith(beginning)
    ]
    found = summarize(here)
    for text in dict.fromkeys(result.model.text for result in here if result.variant != FROZEN):
        family = [result for result in here if result.model.text == text and result.variant != FROZEN]
        if any(result.error for result in family):
            continue
        (mean,) = summarize([replace(result, variant=AVERAGE) for result in family])
        settings = summarize(family)
        by_seed = np.mean([one.values for one in settings], axis=0)
        found.append(replace(mean, values=[float(value) for value in by_seed]))
        found.append(replace(max(settings, key=lambda one: one.mean), variant=BEST))
    return found
