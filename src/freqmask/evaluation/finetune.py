"""Fine-tunes every model with every seed, on all labels or a few, and evaluates the classifiers on the test images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from freqmask.console import rank, say
from freqmask.errors import UserError
from freqmask.evaluation import fewshot
from freqmask.evaluation.eval_model import LOGITS, PIXELS, BackboneModel, ClassifierModel
from freqmask.evaluation.features import compute_features, not_finite
from freqmask.evaluation.fewshot import Fewshot
from freqmask.evaluation.finetune_numbers import DECIDING, check_tuning, with_defaults
from freqmask.evaluation.finetune_task import FinetuneJob
from freqmask.evaluation.labelled import LabelledData, subset
from freqmask.evaluation.protocol import (
    EvalConfig,
    EvalContext,
    Experiment,
    Protocol,
    finish_report,
    say_blocks,
    say_skipped,
)
from freqmask.evaluation.results import (
    ClassificationResult,
    Result,
    ResultTable,
    Summary,
    draw_bar_chart,
    summarize,
)
from freqmask.evaluation.trainings import run_names, run_training, series_folder
from freqmask.training.run_folder import RunFolder


def predict_images(
    run: RunFolder, data: LabelledData, test: np.ndarray, config: EvalConfig
) -> tuple[np.ndarray, np.ndarray, str]:
    """What a run's classifier predicts of test images.

    Returns:
        The class of each image that could be read, the numbers of those images, and what is wrong, if anything.
    """
    model, source = ClassifierModel(str(run.path), data.class_names, config.crop), subset(data, test)
    model.prepare(source, config.compute.device)
    table = compute_features(model, source, "end", config.compute)
    say_skipped(table.skipped)
    logits = table.values[LOGITS][table.read]
    broken = not_finite(logits)
    error = f"the logits of {broken:,} images are not finite; no result" if broken else ""
    return logits.argmax(axis=1), test[table.read], error


def _metadata(runs: Sequence[tuple[RunFolder, int]]) -> dict[str, Any]:
    config, summaries = runs[0][0].config(), [run.summary() for run, _ in runs]
    measured = [summary["held_out_accuracy"] for summary in summaries if "held_out_accuracy" in summary]
    return {
        "train_images": " ".join(str(count) for _, count in runs),
        "classifier": " ".join(str(run.path) for run, _ in runs),
        **{name: config[name] for name in ("recipe", "steps", "lr")},
        "step_images": config["batch_size"],
        **({"held_out_accuracy": float(np.mean(measured))} if measured else {}),
    }


class Finetune(Protocol):
    """All weights learn from labels.

    Args:
        options: of the command.
        frozen_too: whether models are measured frozen beside, which raw pixels can be.
    """

    title = "fine-tuned, evaluated after the last step"
    seeds: Sequence[int] = (0,)

    def __init__(self, options: Mapping[str, Any], frozen_too: bool = False) -> None:
        self.options, self.frozen_too = options, frozen_too
        self.headline = "all labels" if options["shots"] is None else fewshot.shot_name(str(options["shots"]))

    def config(self, options: Mapping[str, Any]) -> EvalConfig:
        features = {"batch_size": "auto", "precision": "32", "cache": True}
        return replace(EvalConfig.of({**options, **features}, self.seeds, parallel=False), options=options)

    def open(self, config: EvalConfig) -> Experiment:
        models = [text for text in config.models if not (self.frozen_too and text == PIXELS)]
        check_tuning({**self.options, "model": models})
        experiment = super().open(config)
        words = {name: self.options[name] for name in (*DECIDING, "tune") if name in self.options}
        self.root = series_folder(
            config.out, "finetune", words, experiment.data.source.fingerprint(), experiment.data.split
        )
        self.names = run_names(experiment.models)
        self.planned: set[str] = set()  # models whose plan has been printed
        return experiment

    def contexts(self, text: str) -> Iterator[tuple[Any, int]]:
        """A model that is to be fine-tuned, for each seed."""
        experiment, model = self.experiment, None
        for seed in experiment.config.seeds:
            if model is None or model.kind == "random":
                model = experiment.open_model(text, seed)
            yield model, seed

    def evaluate(self, context: Any, seed: int) -> list[Result]:
        """The classifiers of all rounds as one row."""
        return self.measure(context, self.options, seed, self.headline)

    def measure(
        self, model: BackboneModel, options: Mapping[str, Any], seed: int, variant: str, suffix: str = ""
    ) -> list[Result]:
        """One classifier a round, and their predictions of all test images as one row; ``suffix`` ends run names."""
        experiment, data, parts, metadata = self.experiment, self.experiment.data, [], []
        for number, fold in enumerate(data.rounds):
            words = f"seed{seed}-fold{number}" if len(data.rounds) > 1 else f"seed{seed}"
            folder, train = self.root / f"{self.names[model.text]}-{words}{suffix}", fold.train
            if options.get("shots") is not None:
                train = train[fewshot.draw(data.labels[train], str(options["shots"]), seed)]
            short = model.text in self.planned
            job = FinetuneJob(model, data, experiment.survey, seed, folder, options, short, train=train)
            run = run_training(job)
            self.planned.add(model.text)
            if rank() == 0 and not options["dry_run"]:
                parts.append(predict_images(run, data, fold.test, experiment.config))
                metadata.append((run, len(train)))
        if not parts:
            return []
        error = next((error for _, _, error in parts if error), "")
        images = np.concatenate([images for _, images, _ in parts])
        predicted = np.empty(0) if error else np.concatenate([predicted for predicted, _, _ in parts])
        cells = _metadata(metadata)
        return [
            ClassificationResult(model, data, variant, seed, images, predicted, metadata=cells, error=error)
        ]


EPOCHS = 50.0  # of the first two settings: the publication names the third one's only
# Learning rates as published, at any batch: scaled down to a handful of images they would move nothing.
SETTINGS: dict[str, dict[str, Any]] = {
    "lr 2e-3, warm-up": {"lr": 2e-3, "warmup_epochs": 5},
    "lr 2e-4": {"lr": 2e-4, "warmup_epochs": 0},
    "lr 2e-4, 100 epochs": {"lr": 2e-4, "warmup_epochs": 0, "epochs": 100.0},
}
FROZEN, AVERAGE, BEST = "frozen", "average", "best"


class TunedFewshot(Finetune):
    """Fine-tuning on few labels, with or without the frozen features beside it, by the options of ``fewshot``."""

    seeds = (0, 1, 2)

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.shots = fewshot.parse_shots(options["shots"] or fewshot.SHOTS)
        _check_frozen(options)
        self.frozen = None
        if options["tune"] == "both":
            self.frozen = Fewshot(self.shots, options["feature"], options["strength"])
        super().__init__(_tuning_options(options), self.frozen is not None)

    def config(self, options: Mapping[str, Any]) -> EvalConfig:
        return EvalConfig.of(options, self.seeds, parallel=False)

    def open(self, config: EvalConfig) -> Experiment:
        experiment = super().open(config)
        tuned = [text for text in experiment.models if text != PIXELS]
        if not tuned:
            raise UserError(
                "model (pixels) has no weights to be fine-tuned; add a model, or give --tune frozen"
            )
        count = len(tuned) * len(self.shots) * len(SETTINGS) * len(config.seeds) * len(experiment.data.rounds)
        say(f"{count} fine-tunings, each a run in {self.root}")
        return experiment

    def contexts(self, text: str) -> Iterator[tuple[Any, int]]:
        if self.frozen is not None and rank() == 0:
            self.frozen.experiment = self.experiment
            yield from self.frozen.contexts(text)
        if text != PIXELS:
            yield from super().contexts(text)

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
                rows += self.measure(context, options, seed, f"{fewshot.shot_name(shot)}, {name}", suffix)
        return rows

    def report(self, results: Sequence[Result]) -> list[Summary]:
        """A table for each number of labels, the rows, a bar chart of the averages."""
        summaries: list[Summary] = []
        averages: list[Summary] = []
        for words in map(fewshot.shot_name, self.shots):
            table = ResultTable(self.name, f"few labels: {words}", AVERAGE, results)
            table.summaries = summarize_settings(results, words)
            say_blocks(table.lines())
            averages += [replace(one, variant=words) for one in table.summaries if one.variant == AVERAGE]
            summaries += [replace(one, variant=f"{words}, {one.variant}") for one in table.summaries]
        say(
            f"({BEST}: the setting that is best on the test images, as published; {AVERAGE} is the fair number)"
        )
        table = ResultTable(self.name, "few labels", AVERAGE, results)
        folder = table.folder(self.experiment.config.out)
        figures = [folder / "fewshot-tuned.png", folder / "fewshot-tuned-classes.csv"]
        title = f"few labels, fine-tuned: average of {len(SETTINGS)} settings\n{self.experiment.data.name}"
        if averages:
            draw_bar_chart(figures[0], title, "accuracy in %", averages)
        table.write_classes(figures[1])
        say_blocks(table.warnings())
        finish_report([table], self.experiment.config, figures)
        return summaries


def _check_frozen(options: Mapping[str, Any]) -> None:
    usual = {"strength": fewshot.INVERSE_STRENGTH, "feature": "mean", "precision": "32", "cache": True}
    given = [name for name, value in usual.items() if options[name] != value]
    if options["tune"] == "finetune" and given:
        raise UserError(
            f"{given[0]} ({options[given[0]]}) is of frozen features; leave it out, or give --tune both"
        )


def _tuning_options(options: Mapping[str, Any]) -> dict[str, Any]:
    dropped = ("batch_size", "precision", "shots")
    epochs = EPOCHS if options["epochs"] is None else options["epochs"]
    tuned = with_defaults(
        {
            **{name: value for name, value in options.items() if name not in dropped},
            "held_out": 0.0,
            "epochs": epochs,
            "seeds": options["seeds"] or [0, 1, 2],
        }
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
    summaries = summarize(here)
    for text in dict.fromkeys(result.model.text for result in here if result.variant != FROZEN):
        family = [result for result in here if result.model.text == text and result.variant != FROZEN]
        if any(result.error for result in family):
            continue
        (mean,) = summarize([replace(result, variant=AVERAGE) for result in family])
        settings = summarize(family)
        by_seed = np.mean([one.values for one in settings], axis=0)
        summaries.append(replace(mean, values=[float(value) for value in by_seed]))
        summaries.append(replace(max(settings, key=lambda one: one.mean), variant=BEST))
    return summaries
