"""Fine-tunes every model with every seed, judges the classifiers on the test images, tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from freqmask.console import rank, say
from freqmask.data.values import Survey
from freqmask.evaluation import fewshot
from freqmask.evaluation.classifier import LOGITS, ClassifierSubject
from freqmask.evaluation.features import Place, compute_features, not_finite
from freqmask.evaluation.finetune.run import Task, fine_tune
from freqmask.evaluation.finetune.settings import DECIDING, check_tuning
from freqmask.evaluation.job import Setting, open_one, prepare, setting_of, tell
from freqmask.evaluation.labelled import LabelledData, Round, subset
from freqmask.evaluation.protocol import Heading
from freqmask.evaluation.results import Result, Summary
from freqmask.evaluation.subjects import PIXELS, ModelSubject
from freqmask.evaluation.trainings import digest, run_names
from freqmask.training.files import check_writable
from freqmask.training.runs import RUNS, RunFolder

ALL = "all labels"


@dataclass
class Bout:
    """A series of fine-tunings on the same data.

    Attributes:
        setting: what all evaluations share.
        options: of the command.
        data: the images.
        seen: what they are like.
        root: the folder of the runs.
        names: MODEL to what its runs are called.
        told: models whose plan has been shown.
    """

    setting: Setting
    options: Mapping[str, Any]
    data: LabelledData
    seen: Survey
    root: Path
    names: dict[str, str] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def subjects(self, text: str) -> Iterator[tuple[int, ModelSubject]]:
        """A model for each seed; fresh weights are other ones each time."""
        subject = None
        for seed in self.setting.seeds:
            if subject is None or subject.kind == "random":
                subject = open_one(text, self.seen, self.setting, seed)
            assert isinstance(subject, ModelSubject)  # pixels were refused
            yield seed, subject


def evaluate_finetune(options: Mapping[str, Any]) -> list[Summary]:
    """Fine-tune all models; one table, rows, and a bar picture.

    Args:
        options: those of the command.

    Returns:
        One summary a model; none after a dry run, and none from processes that only help to train.

    Raises:
        UserError: an option cannot be, or something cannot be opened.
    """
    bout, models = open_bout(options)
    variant = ALL if options["shots"] is None else fewshot.words_of(str(options["shots"]))
    results = [
        result
        for text in models
        for seed, subject in bout.subjects(text)
        for result in measure(bout, subject, seed, options, variant)
    ]
    if rank() > 0 or options["dry_run"]:
        return []
    heading = Heading("finetune", "fine-tuned, judged after the last step", variant)
    return tell(heading, bout.setting, bout.data, results)


def open_bout(options: Mapping[str, Any], frozen_too: bool = False) -> tuple[Bout, list[str]]:
    """Everything opened and checked before any work.

    Args:
        options: of the command.
        frozen_too: whether models are measured frozen beside, which raw pixels can be.

    Raises:
        UserError: an option cannot be, or something cannot be opened.
    """
    kept = [text for text in options["model"] if not (frozen_too and text == PIXELS)]
    check_tuning({**options, "model": kept})
    features = {"batch_size": "auto", "precision": "32", "cache": True, "seeds": options["seeds"] or [0]}
    setting = setting_of({**options, **features})
    setting.options = {
        name: value for name, value in options.items() if name not in ("model", "out", "dry_run")
    }
    models, data, seen = prepare(setting)
    words = {name: options[name] for name in (*DECIDING, "tune") if name in options}
    root = setting.out or RUNS / f"finetune-{digest(words, data.source.fingerprint(), data.split)}"
    check_writable(root, folder=True)
    return Bout(setting, options, data, seen, root, run_names(models)), models


def measure(
    bout: Bout, subject: ModelSubject, seed: int, options: Mapping[str, Any], variant: str, suffix: str = ""
) -> list[Result]:
    """One classifier a round, and what they all said of their test images as one result."""
    said: list[np.ndarray] = []
    images: list[np.ndarray] = []
    runs: list[RunFolder] = []
    learnt: list[int] = []
    trouble = ""
    for number, one in enumerate(bout.data.rounds):
        fold = f"-fold{number}" if len(bout.data.rounds) > 1 else ""
        folder = bout.root / f"{bout.names[subject.text]}-seed{seed}{fold}{suffix}"
        train = _learnt_from(bout.data, one, options.get("shots"), seed)
        briefly = subject.text in bout.told
        run = fine_tune(Task(subject, bout.data, bout.seen, train, seed, folder, options, briefly))
        bout.told.add(subject.text)
        if rank() > 0 or options["dry_run"]:
            continue
        predicted, kept, complaint = answers(run, bout.data, one.test, bout.setting.place, bout.setting.crop)
        said.append(predicted)
        images.append(kept)
        runs.append(run)
        learnt.append(len(train))
        trouble = trouble or complaint
    if not runs:
        return []
    facts = _facts(runs, learnt)
    tested = np.concatenate(images)
    answered = np.concatenate(said) if not trouble else np.empty(0)
    return [Result(subject, variant, seed, tested, answered, facts, trouble)]


def answers(
    run: RunFolder, data: LabelledData, test: np.ndarray, place: Place, crop: str
) -> tuple[np.ndarray, np.ndarray, str]:
    """What a run's classifier says of test images.

    Returns:
        The class of each image that could be read, the numbers of those images, and what is wrong, if anything.
    """
    subject = ClassifierSubject(str(run.path), data.class_names, crop)
    source = subset(data, test)
    subject.begin(source, place.device)
    table = compute_features(subject, source, "end", place)
    for name, reason in table.skipped[:3]:
        say(f"left out    {name}: {reason}")
    logits = table.values[LOGITS][table.read]
    broken = not_finite(logits)
    complaint = f"the answers to {broken:,} images are not finite; no result" if broken else ""
    return logits.argmax(axis=1), test[table.read], complaint


def _learnt_from(data: LabelledData, one: Round, shots: Any, seed: int) -> np.ndarray:
    """Training images with the labels to learn from: the draw of ``fewshot``."""
    if shots is None:
        return one.train
    return one.train[fewshot.draw(data.labels[one.train], str(shots), seed)]


def _facts(runs: Sequence[RunFolder], learnt: Sequence[int]) -> dict[str, Any]:
    """Cells on how the classifiers came about."""
    config, summaries = runs[0].config(), [run.summary() for run in runs]
    watched = [summary["held_out_accuracy"] for summary in summaries if "held_out_accuracy" in summary]
    facts: dict[str, Any] = {
        "train_images": " ".join(str(count) for count in learnt),
        "classifier": " ".join(str(run.path) for run in runs),
        **{name: config[name] for name in ("recipe", "steps", "lr")},
        "step_images": config["batch_size"],
    }
    if watched:
        facts["held_out_accuracy"] = float(np.mean(watched))
    return facts
