"""Fine-tunes every model with every seed, on all labels or a few, and evaluates the classifiers on the test images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from freqmask.console import rank, say
from freqmask.errors import UserError
from freqmask.evaluation import fewshot
from freqmask.evaluation.eval_model import LOGITS, PIXELS, BackboneModel, ClassifierModel
from freqmask.evaluation.features import ComputeConfig, compute_features, not_finite
from freqmask.evaluation.fewshot import Fewshot
from freqmask.evaluation.finetune.hyperparameters import DECIDING, check_tuning, with_defaults
from freqmask.evaluation.finetune.tuning_task import FinetuneJob, fine_tune
from freqmask.evaluation.labelled import LabelledData, Round, subset
from freqmask.evaluation.protocol import (
    EvalConfig,
    EvalContext,
    Experiment,
    Protocol,
    finish_report,
    open_experiment,
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
from freqmask.evaluation.trainings import digest, run_names
from freqmask.training.files import check_writable
from freqmask.training.run_folder import RUNS, RunFolder

ALL = "all labels"


@dataclass
class FinetuneExperiment(Experiment):
    """A series of fine-tunings on the same data.

    Attributes:
        root: the folder of the runs.
        names: MODEL to what its runs are called.
        told: models whose plan has been shown.
    """

    root: Path = Path()
    names: dict[str, str] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)


class Finetune(Protocol):
    """All weights learn from labels.

    Args:
        options: of the command.
        frozen_too: whether models are measured frozen beside, which raw pixels can be.
    """

    name, title = "finetune", "fine-tuned, evaluated after the last step"

    def __init__(self, options: Mapping[str, Any], frozen_too: bool = False) -> None:
        self.options, self.frozen_too = options, frozen_too
        self.headline = ALL if options["shots"] is None else fewshot.shot_name(str(options["shots"]))

    def config(self, options: Mapping[str, Any]) -> EvalConfig:
        """Batch size and precision are those of the training; classifiers are tested as frozen features are."""
        features = {"batch_size": "auto", "precision": "32", "cache": True}
        config = EvalConfig.of({**options, **features}, seeds=(0,), parted=False)
        config.options = options
        return config

    def open(self, config: EvalConfig) -> FinetuneExperiment:
        """Everything opened and checked before any work."""
        models = [text for text in config.models if not (self.frozen_too and text == PIXELS)]
        check_tuning({**self.options, "model": models})
        opened = open_experiment(config)
        words = {name: self.options[name] for name in (*DECIDING, "tune") if name in self.options}
        series = digest(words, opened.data.source.fingerprint(), opened.data.split)
        root = config.out or RUNS / f"finetune-{series}"
        check_writable(root, folder=True)
        return FinetuneExperiment(**vars(opened), root=root, names=run_names(opened.models))

    def contexts(self, experiment: FinetuneExperiment, text: str) -> Iterator[tuple[FinetuneContext, int]]:
        """A model for each seed; fresh weights are other ones each time."""
        model = None
        for seed in experiment.config.seeds:
            if model is None or model.kind == "random":
                model = experiment.open_model(text, seed)
            assert isinstance(model, BackboneModel)  # pixels were refused
            yield FinetuneContext(model, experiment.data, experiment.config.compute, experiment), seed

    def evaluate(self, context: FinetuneContext, seed: int) -> list[Result]:
        """The classifiers of all rounds as one row."""
        return context.measure(self.options, seed, self.headline)


@dataclass
class FinetuneContext:
    """A model that is to be fine-tuned.

    Attributes:
        model: as it was pre-trained.
        data: images, labels, splits.
        compute: where classifiers are tested.
        experiment: the series it belongs to.
    """

    model: BackboneModel
    data: LabelledData
    compute: ComputeConfig
    experiment: FinetuneExperiment

    def measure(self, options: Mapping[str, Any], seed: int, variant: str, suffix: str = "") -> list[Result]:
        """One classifier a round, and their predictions of all test images as one row.

        Args:
            options: of the fine-tuning.
            seed: of it.
            variant: of the row.
            suffix: of the run folder's name.
        """
        experiment, found, runs, n_train = self.experiment, [], [], []
        for number, one in enumerate(self.data.rounds):
            fold = f"-fold{number}" if len(self.data.rounds) > 1 else ""
            folder = experiment.root / f"{experiment.names[self.model.text]}-seed{seed}{fold}{suffix}"
            train = training_images(self.data, one, options.get("shots"), seed)
            briefly = self.model.text in experiment.told
            run = fine_tune(
                FinetuneJob(self.model, self.data, experiment.seen, train, seed, folder, options, briefly)
            )
            experiment.told.add(self.model.text)
            if rank() == 0 and not options["dry_run"]:
                found.append(predictions(run, self.data, one.test, self.compute, experiment.config.crop))
                runs.append(run)
                n_train.append(len(train))
        if not runs:
            return []
        error = next((error for _, _, error in found if error), "")
        images = np.concatenate([images for _, images, _ in found])
        predicted = np.empty(0) if error else np.concatenate([predicted for predicted, _, _ in found])
        metadata = _metadata(runs, n_train)
        return [
            ClassificationResult(
                self.model, self.data, variant, seed, images, predicted, metadata=metadata, error=error
            )
        ]


def predictions(
    run: RunFolder, data: LabelledData, test: np.ndarray, compute: ComputeConfig, crop: str
) -> tuple[np.ndarray, np.ndarray, str]:
    """What a run's classifier predicts of test images.

    Returns:
        The class of each image that could be read, the numbers of those images, and what is wrong, if anything.
    """
    model, source = ClassifierModel(str(run.path), data.class_names, crop), subset(data, test)
    model.prepare(source, compute.device)
    table = compute_features(model, source, "end", compute)
    say_skipped(table.skipped)
    logits = table.values[LOGITS][table.read]
    broken = not_finite(logits)
    error = f"the logits of {broken:,} images are not finite; no result" if broken else ""
    return logits.argmax(axis=1), test[table.read], error


def training_images(data: LabelledData, one: Round, shots: Any, seed: int) -> np.ndarray:
    """Training images whose labels are used: the draw of ``fewshot``."""
    if shots is None:
        return one.train
    return one.train[fewshot.draw(data.labels[one.train], str(shots), seed)]


def _metadata(runs: Sequence[RunFolder], n_train: Sequence[int]) -> dict[str, Any]:
    config, summaries = runs[0].config(), [run.summary() for run in runs]
    watched = [summary["held_out_accuracy"] for summary in summaries if "held_out_accuracy" in summary]
    cells: dict[str, Any] = {
        "train_images": " ".join(str(count) for count in n_train),
        "classifier": " ".join(str(run.path) for run in runs),
        **{name: config[name] for name in ("recipe", "steps", "lr")},
        "step_images": config["batch_size"],
    }
    if watched:
        cells["held_out_accuracy"] = float(np.mean(watched))
    return cells


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
    usual = {"strength": fewshot.INVERSE_STRENGTH, "feature": "mean", "precision": "32", "cache": True}
    given = [name for name, value in usual.items() if options[name] != value]
    if options["tune"] == "finetune" and given:
        raise UserError(
            f"{given[0]} ({options[given[0]]}) is of frozen features; leave it out, or give --tune both"
        )


def _tuning_options(options: Mapping[str, Any]) -> dict[str, Any]:
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
