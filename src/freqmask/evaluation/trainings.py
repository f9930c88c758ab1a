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
from freqmask.console import rank, say
from freqmask.data.source import Source
from freqmask.errors import UserError
from freqmask.training.auto import Choice, Cost
from freqmask.training.checkpoint import newest_usable
from freqmask.training.failures import silence_third_party_loggers
from freqmask.training.run_folder import RunFolder, comparable, heading, now

AUTO = "auto"
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
