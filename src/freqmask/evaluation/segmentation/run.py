"""One training from a model to a network's file: begun, taken up again, or found finished."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from freqmask import __version__
from freqmask.console import rank, readable_time, say
from freqmask.data.values import Survey
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import BackboneModel, open_eval_model
from freqmask.evaluation.segmentation.announce import say_plan
from freqmask.evaluation.segmentation.fit import NETWORK, Fit
from freqmask.evaluation.segmentation.mask_data import SegmentationData
from freqmask.evaluation.segmentation.resolve import DROP_PATH, choose_crop, drops_paths, resolve
from freqmask.evaluation.segmentation.settings import DECIDING, MACHINE, Training, training_of
from freqmask.evaluation.segmentation.upernet import UperNet
from freqmask.evaluation.trainings import AUTO, check_same, to_repeat, where_to_go_on
from freqmask.training.failures import silence_third_party_loggers, translate_errors
from freqmask.training.loop import leave
from freqmask.training.run_folder import RunFolder, comparable, heading, now

COMMAND = "evaluate segment"


@dataclass(frozen=True)
class Task:
    """What is to be trained.

    Attributes:
        text: MODEL as it was typed.
        data: images with masks.
        seen: what the images are like.
        seed: of the training.
        folder: of the run.
        asked: the command's options.
    """

    text: str
    data: SegmentationData
    seen: Survey
    seed: int
    folder: Path
    asked: Mapping[str, Any]

    def open(self, side: int) -> BackboneModel:
        """The model for samples of a size, with drop path; one that takes any size stays able to."""
        drop_path = self.asked["drop_path"]
        rate = DROP_PATH if drop_path in (None, AUTO) else float(drop_path)
        subject = open_eval_model(
            self.text,
            self.seen,
            seed=self.seed,
            image_size=side,
            weights=self.asked["weights"],
            value_range=self.asked["value_range"],
            wishes={"drop_path_rate": rate, "dynamic_img_size": True},
        )
        assert isinstance(subject, BackboneModel)  # pixels were refused
        deep = len(subject.opened.module.feature_info) > 1  # the first block of all never drops
        if rate and deep and drop_path not in (None, AUTO) and not drops_paths(subject.opened.module):
            raise UserError(f"drop_path ({drop_path}) must be left out: {self.text} does not take it")
        return subject

    def deciding(self, subject: BackboneModel) -> dict[str, Any]:
        """Plain values on which the network depends."""
        values = {name: self.asked[name] for name in DECIDING if name in self.asked}
        data, labels = self.data, self.data.labels
        return dict(
            comparable(
                {
                    **values,
                    "seed": self.seed,
                    "weights of the model": subject.key()["weights"],
                    "images": data.train.fingerprint(),
                    "classes": list(labels.values),
                    "ignored labels": list(labels.ignored),
                }
            )
        )


@dataclass
class Trained:
    """A network at the end of its training.

    Attributes:
        subject: the model that it began from.
        network: with the weights that it ended with.
        training: every number.
        run: its folder.
    """

    subject: BackboneModel
    network: UperNet
    training: Training
    run: RunFolder


def train(task: Task) -> Trained | None:
    """Train, or go on, or find that all is done.

    Returns:
        The network; None after a dry run, for which nothing is written.

    Raises:
        UserError: the folder holds another run, or the training cannot go on.
    """
    run = RunFolder(task.folder)
    if rank() > 0:
        run.begun()
    on_gpu = torch.cuda.is_available() and task.asked["accelerator"] != "cpu"
    crop = choose_crop(task.asked["crop"], task.seen, on_gpu)
    subject = task.open(crop.value)
    if run.exists():
        check_same(run, task.deciding(subject))
    network = _network(subject, task)
    subject.key()  # remembers the hash of the weights; later it would be that of what was learnt
    with ExitStack() as stack:
        stack.enter_context(silence_third_party_loggers())
        if rank() == 0 and not task.asked["dry_run"]:
            run.lock()
            stack.callback(run.leave_nothing)
            stack.callback(run.unlock)
        if run.finished():
            return _finished(run, subject, network)
        if run.exists():
            training, checkpoint = _go_on(run, task)
        else:
            training, checkpoint = _begin(run, task, subject, network, crop), None
        if task.asked["dry_run"]:
            return None
        _fit(run, task, training, network, checkpoint)
    return Trained(subject, network, training, run)


def _network(subject: BackboneModel, task: Task) -> UperNet:
    """The decoder's fresh weights follow from the seed, whatever was drawn before."""
    channels = task.asked["decoder_channels"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        wanted = None if channels in (None, AUTO) else int(channels)
        return UperNet(subject.opened, len(task.data.labels), wanted)


def _finished(run: RunFolder, subject: BackboneModel, network: UperNet) -> Trained:
    if not (run.path / NETWORK).is_file():
        raise UserError(f"run ({run.path}) is finished and its {NETWORK} is gone; delete it to train again")
    say(f"run {run.path} is finished; its network is taken")
    network.load_state_dict(load_file(run.path / NETWORK))
    return Trained(subject, network, training_of(run.config()), run)


def _begin(run: RunFolder, task: Task, subject: BackboneModel, network: UperNet, crop: Any) -> Training:
    """Every number resolved, told, and written."""
    training, numbers = resolve(task.asked, subject, network, crop, len(task.data.train), task.seed)
    say_plan(subject, training, numbers, network, len(task.data.train))
    if task.asked["dry_run"]:
        say(f"run         {run.path}    (--dry_run: nothing was trained)")
        return training
    say(f"run         {run.path}, seed {task.seed}")
    labels = task.data.labels
    config = {
        "method": "segment",
        "model": task.text,
        "data": task.data.name,
        "split": task.data.split,
        "backbone": str(subject.opened.module.pretrained_cfg["architecture"]),
        "classes": {int(value): name for value, name in zip(labels.values, labels.names, strict=True)},
        "ignore_label": list(labels.ignored),
        **comparable(asdict(training)),
        **to_repeat(COMMAND, task.text, task.seed, task.asked, asdict(training)),
    }
    state = {
        "deciding": task.deciding(subject),
        "images": len(task.data.train),
        "data": task.data.train.fingerprint(),
        "freqmask": __version__,
        "torch": str(torch.__version__),
        "began": now(),
    }
    run.begin(config, state, heading(COMMAND))
    return training


def _go_on(run: RunFolder, task: Task) -> tuple[Training, Path | None]:
    """An unfinished run: everything from its config, but what the machine is like."""
    asked = {name: task.asked.get(name) for name in MACHINE}
    machine = {name: value for name, value in asked.items() if value not in (None, AUTO)}
    training = training_of({**run.config(), **machine})
    return training, where_to_go_on(run)


def _fit(run: RunFolder, task: Task, training: Training, network: UperNet, checkpoint: Path | None) -> None:
    began = time.time()
    with translate_errors(run, asdict(training)):
        outcome = Fit(run, training, network, task.data.train, task.data.labels).go(checkpoint)
    if outcome.stopped_by is not None:
        say(
            f"stopped at step {outcome.step:,} of {training.steps:,}, saved in {run.path}; the same command goes on"
        )
        leave(outcome.stopped_by)
    if rank() == 0:
        seconds = time.time() - began
        run.finish({**outcome.summary, "seconds": round(seconds, 1), "ended": now()})
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # three times the network, which is written
        say(f"done        {outcome.step:,} steps in {readable_time(seconds)}")
