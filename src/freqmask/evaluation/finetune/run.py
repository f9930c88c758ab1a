"""One fine-tuning from a model to a classifier's folder: begun, taken up again, or found finished."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freqmask import __version__
from freqmask.console import rank, say
from freqmask.data.splits import split_indices
from freqmask.data.values import Survey
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import BackboneModel
from freqmask.evaluation.finetune.announce import say_briefly, say_end, say_plan
from freqmask.evaluation.finetune.fit import Fit
from freqmask.evaluation.finetune.network import make_classifier
from freqmask.evaluation.finetune.recipes import Tuning, tuning_of
from freqmask.evaluation.finetune.resolve import held_out_share, resolve
from freqmask.evaluation.finetune.settings import DECIDING
from freqmask.evaluation.labelled import LabelledData, subset
from freqmask.evaluation.trainings import check_same, to_repeat, where_to_go_on
from freqmask.training.failures import silence_third_party_loggers, translate_errors
from freqmask.training.loop import leave
from freqmask.training.progress import LINES_A_RUN
from freqmask.training.run_folder import RunFolder, comparable, heading, now

_LINES_BRIEFLY = 4  # without a terminal a series of runs would be all progress
COMMAND = "evaluate finetune"
MACHINE = (
    *("accelerator", "devices", "strategy", "workers", "checkpoint_every_steps", "checkpoint_every_minutes"),
    *("keep_checkpoints", "max_skipped_share"),
)


@dataclass(frozen=True)
class Task:
    """What is to be fine-tuned.

    Attributes:
        subject: the model.
        data: the images.
        seen: what they are like.
        train: numbers of the images with the labels to learn from.
        seed: of the training.
        folder: of the run.
        asked: the command's options.
        briefly: whether the plan of such a run was shown already, with another seed or other labels.
    """

    subject: BackboneModel
    data: LabelledData
    seen: Survey
    train: np.ndarray
    seed: int
    folder: Path
    asked: Mapping[str, Any]
    briefly: bool = False

    @property
    def deciding(self) -> dict[str, Any]:
        """Plain values on which the result depends."""
        values = {name: self.asked[name] for name in DECIDING if name in self.asked}
        start = self.subject.key()["weights"]
        images = subset(self.data, self.train).fingerprint()
        return dict(
            comparable({**values, "seed": self.seed, "weights of the model": start, "images": images})
        )


def fine_tune(task: Task) -> RunFolder:
    """Train, or go on, or find that all is done.

    Returns:
        The run, its ``classifier/`` written; for a dry run nothing is written.

    Raises:
        UserError: the folder holds another run, or the training cannot go on.
    """
    run = RunFolder(task.folder)
    if rank() > 0:
        run.begun()
    _check_folder(run)
    if run.exists():
        check_same(run, task.deciding)
        if run.finished():
            say(f"run {run.path} is finished; its classifier is taken")
            return run
    with ExitStack() as stack:
        stack.enter_context(silence_third_party_loggers())
        if rank() == 0 and not task.asked["dry_run"]:
            run.lock()
            stack.callback(run.leave_nothing)
            stack.callback(run.unlock)
        tuning, checkpoint, model = _go_on(run, task) if run.exists() else _begin(run, task)
        if not task.asked["dry_run"]:
            _train(run, task, tuning, checkpoint, model)
    return run


def _check_folder(run: RunFolder) -> None:
    if run.path.is_file():
        raise UserError(f"out: {run.path} is a file; give the path of a folder that may be made")
    if not run.exists() and (run.path / "model.safetensors").exists():
        raise UserError(f"out: {run.path} holds a model and no fine-tuning; give another --out")


def _begin(run: RunFolder, task: Task) -> tuple[Tuning, None, Any]:
    """Every number resolved, told, and written."""
    opened, data = task.subject.opened, task.data
    share = held_out_share(task.asked["held_out"], len(task.train)).value
    train, held_out = _part(task, share)
    drop_path = task.asked["drop_path"]
    trial = make_classifier(opened, len(data.class_names), 0.0, task.seed)
    tuning, numbers = resolve(
        task.asked, opened, trial, task.seen, len(train), len(data.class_names), task.seed, share
    )
    network = make_classifier(opened, len(data.class_names), tuning.drop_path, task.seed)
    if network.notes and drop_path not in (None, "auto"):
        raise UserError(f"drop_path ({drop_path}) must be left out: {network.notes[0]}")
    if task.briefly:
        say_briefly(tuning, len(train))
    else:
        say_plan(task.subject.name, tuning, numbers, network, len(train), len(held_out))
    if task.asked["dry_run"]:
        say(f"run         {run.path}    (--dry_run: nothing was trained)")
        return tuning, None, network.model
    say(f"run         {run.path}, seed {task.seed}")
    config = {
        "method": "finetune",
        "model": task.subject.text,
        "data": comparable(task.asked["data"]),
        "labels": task.asked["labels"],
        "pages": task.asked["pages"],
        "split": task.asked["train_split"],
        "backbone": str(opened.module.pretrained_cfg["architecture"]),
        **asdict(tuning),
        **to_repeat(COMMAND, task.subject.text, task.seed, task.asked, asdict(tuning)),
    }
    state = {
        "deciding": task.deciding,
        "images": len(train),
        "data": data.source.fingerprint(),
        "freqmask": __version__,
        "torch": str(torch.__version__),
        "began": now(),
    }
    run.begin(config, state, heading(COMMAND))
    return tuning, None, network.model


def _go_on(run: RunFolder, task: Task) -> tuple[Tuning, Path | None, Any]:
    """An unfinished run: everything from its config, but what the machine is like."""
    config = run.config()
    machine = {name: task.asked[name] for name in MACHINE if task.asked[name] not in (None, "auto")}
    tuning = tuning_of({**config, **machine})
    checkpoint = where_to_go_on(run)
    network = make_classifier(task.subject.opened, len(task.data.class_names), tuning.drop_path, task.seed)
    return tuning, checkpoint, network.model


def _part(task: Task, share: float) -> tuple[np.ndarray, np.ndarray]:
    """What is learnt from and what is watched: parts of the training images, the same after a restart."""
    if share == 0:
        return task.train, task.train[:0]
    data = task.data
    groups = None if data.groups is None else [data.groups[int(index)] for index in task.train]
    parts = split_indices(data.labels[task.train], groups, (1 - share, share), task.seed)
    return task.train[parts[0]], task.train[parts[1]]


def _train(run: RunFolder, task: Task, tuning: Tuning, checkpoint: Path | None, model: Any) -> None:
    train, held_out = _part(task, tuning.held_out)
    began = time.time()
    fit = Fit(
        run,
        tuning,
        model,
        task.subject.opened.backbone.is_cnn,
        subset(task.data, train),
        subset(task.data, held_out) if len(held_out) else None,
        task.data.class_names,
        {
            "version": __version__,
            "method": "finetune",
            "model": task.subject.text,
            "run": run.path.name,
            "recipe": tuning.recipe,
            "data": task.data.source.fingerprint(),
        },
        _LINES_BRIEFLY if task.briefly else LINES_A_RUN,
    )
    with translate_errors(run, asdict(tuning)):
        outcome = fit.go(checkpoint)
    if outcome.stopped_by is not None:
        say(
            f"stopped at step {outcome.step:,} of {tuning.steps:,}, saved in {run.path}; the same command goes on"
        )
        leave(outcome.stopped_by)
    if rank() == 0:
        summary = {**outcome.summary, "seconds": round(time.time() - began, 1), "ended": now()}
        run.finish(summary)
        say_end(run, summary)
