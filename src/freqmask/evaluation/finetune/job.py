"""Fine-tunes every model with every seed and evaluates the classifiers on the test images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from freqmask.console import rank
from freqmask.evaluation import fewshot
from freqmask.evaluation.eval_model import LOGITS, PIXELS, BackboneModel, ClassifierModel
from freqmask.evaluation.features import ComputeConfig, compute_features, not_finite
from freqmask.evaluation.finetune.run import Task, fine_tune
from freqmask.evaluation.finetune.settings import DECIDING, check_tuning
from freqmask.evaluation.labelled import LabelledData, Round, subset
from freqmask.evaluation.protocol import (
    EvalConfig,
    Experiment,
    Protocol,
    open_experiment,
    say_skipped,
)
from freqmask.evaluation.results import ClassificationResult, Result
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
                Task(self.model, self.data, experiment.seen, train, seed, folder, options, briefly)
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
    """Cells on how the classifiers came about."""
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
