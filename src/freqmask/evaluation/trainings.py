"""What evaluations that train have in common: their runs' names, beginning, resuming, and how numbers come about."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from freqmask import __version__
from freqmask.console import rank, readable_bytes, readable_time, say, silence_third_party_loggers
from freqmask.data.source import Source
from freqmask.errors import UserError
from freqmask.training.auto import Choice, Cost, choose_machine, choose_row, pick_device
from freqmask.training.checkpoint import newest_usable
from freqmask.training.loop import images_at_once
from freqmask.training.run_folder import RunFolder, comparable, heading, now

AUTO = "auto"
CHECKPOINTS = 20  # a run
# Options that say nothing of how a training is repeated, or that --config of the repeating command has not.
_NOT_REPEATED = ("model", "seeds", "out", "dry_run", "config", "tune", "strength", "feature", "cache")
_MACHINE = (
    *("accelerator", "devices", "strategy", "workers", "checkpoint_every_steps", "checkpoint_every_minutes"),
    *("keep_checkpoints", "max_skipped_share"),
)
_AS_ASKED = ("image_size", "train_size")  # an option is a side, a resolved number a height and a width


@dataclass
class Numbers:
    """The numbers of a training as they come together.

    Attributes:
        asked: the options as they were given.
        values: name of a number to its value.
        reasons: name to the reason, for those that were not given.
        cost: of an image.
    """

    asked: Mapping[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    cost: Cost | None = None

    def take(self, name: str, choice: Choice) -> None:
        """What was asked for, else the choice."""
        asked = self.asked.get(name)
        if asked in (None, AUTO):
            self.values[name], self.reasons[name] = choice
        else:
            self.values[name] = asked

    def take_machine(self, strategy: str) -> torch.device:
        """Accelerator, devices, precision and loader workers.

        Args:
            strategy: Lightning's.
        """
        device = pick_device(self.asked["accelerator"])
        self.values |= {"accelerator": device.type, "num_nodes": 1, "strategy": strategy}
        for name, choice in choose_machine(device).items():
            self.take(name, choice)
        return device

    def take_records(self) -> None:
        """How often metrics and checkpoints are written, once steps and cost are known."""
        steps, batch = int(self.values["steps"]), int(self.values["batch_size"])
        assert self.cost is not None
        a_step = self.cost.seconds(1, batch // int(self.values["devices"]))
        self.take("log_every_steps", choose_row(a_step, steps))
        self.take("checkpoint_every_steps", Choice(max(steps // CHECKPOINTS, 1), "twenty times"))
        for name in ("checkpoint_every_minutes", "keep_checkpoints", "max_skipped_share"):
            self.values[name] = self.asked[name]

    def why(self, name: str) -> str:
        """The reason for a number, in brackets; nothing where it was given."""
        return f" ({self.reasons[name]})" if self.reasons.get(name) else ""

    def machine_lines(self, training: TrainingNumbers) -> Iterator[str]:
        """The plan's lines on where it runs and what it costs."""
        parts = f", batch in {training.accumulate} parts" if training.accumulate > 1 else ""
        yield (
            f"machine     {training.devices} x {training.accelerator}, {training.precision}{self.why('precision')}, "
            f"{training.workers} loader workers{parts}"
        )
        if self.cost is not None:
            a_device = training.images_at_once * training.accumulate
            yield (
                f"cost        about {readable_time(self.cost.seconds(training.steps, a_device))} (measured, where "
                f"loading keeps up), {readable_bytes(self.cost.peak_bytes(training.images_at_once))} of memory"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingNumbers:
    """What every training of an evaluation is told, without any ``auto``, as its ``config.yaml`` records it.

    Attributes:
        steps: optimiser steps.
        batch_size: images an optimiser step over all devices and parts.
        accumulate: parts that a device's batch is cut into.
        lr: peak learning rate, of the last layer.
        warmup_steps: of linear warm-up.
        weight_decay: on weights with two dimensions or more.
        layer_decay: factor on the learning rate from a layer of the backbone to the one below.
        drop_path: share of residual branches dropped in the last block.
        flip: whether half of the images are mirrored.
        channels: of the images.
        mean: of the channels in [0, 1].
        std: of the channels.
        value_range: what becomes [0, 1].
        seed: of fresh weights, order, crops and augmentation.
        accelerator: cpu, cuda or mps.
        devices: how many.
        num_nodes: machines.
        strategy: Lightning's.
        precision: Lightning's.
        workers: loader processes.
        log_every_steps: steps between rows of metrics.csv.
        checkpoint_every_steps: and
        checkpoint_every_minutes: whichever comes first.
        keep_checkpoints: that stay on the disk.
        max_skipped_share: of unreadable images at which it stops.
    """

    steps: int
    batch_size: int
    accumulate: int
    lr: float
    warmup_steps: int
    weight_decay: float
    layer_decay: float
    drop_path: float
    flip: bool
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    value_range: str
    seed: int
    accelerator: str
    devices: int
    num_nodes: int
    strategy: str
    precision: str
    workers: int
    log_every_steps: int
    checkpoint_every_steps: int
    checkpoint_every_minutes: float
    keep_checkpoints: int
    max_skipped_share: float

    @property
    def images_at_once(self) -> int:
        """Images of one part of a step on one device."""
        return images_at_once(vars(self))


def run_names(models: Sequence[str]) -> dict[str, str]:
    """What the runs of each MODEL are called: its last part, told apart where two are alike.

    >>> run_names(["runs/a/backbone", "random:runs/a", "b/a"])
    {'runs/a/backbone': 'a', 'random:runs/a': 'random-a', 'b/a': 'a-2'}
    """
    names: dict[str, str] = {}
    for text in models:
        stem, taken = _stem(text), set(names.values())
        free = (f"{stem}-{number}" for number in itertools.count(2))
        names[text] = stem if stem not in taken else next(name for name in free if name not in taken)
    return names


def _stem(text: str) -> str:
    foreign = text.startswith(("timm:", "random:"))
    path = Path(text.partition(":")[2] if foreign else text)
    name = path.resolve().parent.name if path.name == "backbone" else path.name or path.resolve().name
    prefix = f"{text.partition(':')[0]}-" if foreign else ""
    return re.sub(r"[^\w.-]+", "_", prefix + name).strip("_")


def digest(*decides: Any) -> str:
    """Tells series of trainings apart: the same command finds its own again."""
    return hashlib.blake2b(json.dumps(decides, default=str).encode(), digest_size=4).hexdigest()


def check_same(run: RunFolder, asked: Mapping[str, Any]) -> None:
    """A run goes on, or is taken as it is, only where it was asked for in the same words.

    Args:
        run: begun.
        asked: the plain values on which its result depends.

    Raises:
        UserError: one differs.
    """
    before = run.state().get("deciding", {})
    other = [name for name in asked if before.get(name) != asked[name]]
    if other:
        told = "; ".join(f"{name} was {before.get(name)} and is {asked[name]} now" for name in other)
        raise UserError(f"run {run.path} was begun with other settings: {told}; give another --out")


def to_repeat(
    command: str, model: str, seed: int, asked: Mapping[str, Any], numbers: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``config.yaml`` holds so that ``freqmask COMMAND --config`` repeats this one training.

    Args:
        command: such as ``evaluate finetune``.
        model: MODEL as typed.
        seed: of the training.
        asked: the options of the command.
        numbers: name to value of those that were resolved.
    """
    options = {name: value for name, value in asked.items() if name not in _NOT_REPEATED}
    options |= {name: numbers[name] for name in options if name in numbers and name not in _AS_ASKED}
    options |= {"epochs": None}  # the steps say it
    given = {name: value for name, value in comparable(options).items() if value is not None}
    return {"command": command, "options": {"model": [model], "seeds": [seed], **given}}


def where_to_go_on(run: RunFolder) -> Path | None:
    """The checkpoint from which an unfinished run goes on, and says so; None for its beginning."""
    checkpoint, complaints = newest_usable(run.checkpoints)
    if rank() == 0:
        for complaint in complaints:
            say(f"note: {complaint}")
        where = f"from {checkpoint.name}" if checkpoint else "from its beginning, no checkpoint yet"
        say(f"run {run.path} goes on {where}")
    return checkpoint


def numbers_to_resume(run: RunFolder, asked: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """The numbers of an unfinished run: those of its config, but what the machine is like, which the command says.

    Args:
        run: begun.
        asked: the options of the command.
        more: further options that may differ without changing what is learnt.
    """
    machine = {name: asked.get(name) for name in (*_MACHINE, *more)}
    return {**run.config(), **{name: value for name, value in machine.items() if value not in (None, AUTO)}}


@contextmanager
def held(run: RunFolder, dry_run: bool) -> Iterator[None]:
    """The run is this process's own inside; one that fails before it has begun leaves nothing behind."""
    with ExitStack() as stack:
        stack.enter_context(silence_third_party_loggers())
        if rank() == 0 and not dry_run:
            run.lock()
            stack.callback(run.leave_nothing)
            stack.callback(run.unlock)
        yield


def begin_run(
    run: RunFolder,
    command: str,
    who: tuple[str, int],
    asked: Mapping[str, Any],
    numbers: Mapping[str, Any],
    about: Mapping[str, Any],
    deciding: Mapping[str, Any],
    train: Source,
    fingerprint: str,
) -> None:
    """Write what a run is asked for, or say where it would be after ``--dry_run``.

    Args:
        run: a new run.
        command: such as ``evaluate finetune``.
        who: MODEL as typed and the seed.
        asked: the options of the command.
        numbers: every number, resolved.
        about: what else the config holds.
        deciding: plain values on which the result depends.
        train: training images.
        fingerprint: of the data.
    """
    if asked["dry_run"]:
        say(f"run         {run.path}    (--dry_run: nothing was trained)")
        return
    say(f"run         {run.path}, seed {who[1]}")
    repeated = to_repeat(command, *who, asked, numbers)
    state = {
        "deciding": dict(deciding),
        "images": len(train),
        "data": fingerprint,
        "freqmask": __version__,
        "torch": str(torch.__version__),
        "began": now(),
    }
    run.begin({**about, **comparable(dict(numbers)), **repeated}, state, heading(command))
