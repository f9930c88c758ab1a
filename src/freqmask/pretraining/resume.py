"""Which folder a run lives in, what may differ when it resumes, and processes that agree on one run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from freqmask.console import rank, say
from freqmask.errors import UserError
from freqmask.pretraining.settings import parse_image_size
from freqmask.training.auto import launched_processes
from freqmask.training.checkpoint import newest_usable
from freqmask.training.run_folder import LOCK, STATE, RunFolder, comparable, newest_unfinished

CHOSEN_BY_RANK_0 = "FREQMASK_RUN"  # in the environment of the processes that Lightning starts
# These change what is read, shown or kept, and never what is learnt.
HARMLESS = {
    *("out", "data", "workers", "logger", "max_skipped_share", "dry_run", "keep_checkpoints"),
    *("log_every_steps", "preview_every_steps", "checkpoint_every_steps", "checkpoint_every_minutes"),
    *("probe_data", "probe_every_epochs"),
}
# These keep the data and the draws, but sums are made in another order.
DIFFERENT_BITS = {"images_from", "devices", "num_nodes", "strategy", "accelerator", "compile", "accumulate"}


class Continued(NamedTuple):
    """A run that goes on: its options, the checkpoint to start from, sentences for the user."""

    run: RunFolder
    options: dict[str, Any]
    checkpoint: Path | None
    sentences: list[str]


def find_run(given: Mapping[str, Any]) -> RunFolder | None:
    """The run that these options continue, or None for a new one.

    Args:
        given: the options as they were given.

    Raises:
        UserError: ``out`` is something else than a run.
    """
    if os.environ.get(CHOSEN_BY_RANK_0):
        return RunFolder(os.environ[CHOSEN_BY_RANK_0])
    out = given.get("out")
    if out is None:
        return newest_unfinished(without_out(given))
    run = RunFolder(out)
    if run.exists():
        return run
    if run.path.is_file():
        raise UserError(f"out ({out}) is a file; give the path of a folder that may be made")
    if run.path.is_dir() and any(not _from_a_begin(path) for path in run.path.iterdir()):
        raise UserError(f"out ({out}) holds other files and no run; give a new or an empty folder")
    return None


def _from_a_begin(path: Path) -> bool:
    return path.name in ("plan.png", LOCK, STATE) or path.suffix == ".tmp"


def without_out(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say what a run is; where it is written does not."""
    named = {name: value for name, value in given.items() if name not in ("out", "dry_run")}
    return dict(comparable(named))


def continue_run(run: RunFolder, given: Mapping[str, Any], known: Iterable[str]) -> Continued:
    """Take a run up again.

    Args:
        run: an unfinished run.
        given: the options as they were given this time.
        known: the names of all options; those that the config leaves out are null.

    Raises:
        UserError: options that change the result differ from the run's; each is named.
    """
    config, asked = run.config(), run.state().get("given", {})
    options, sentences, differing = {**dict.fromkeys(known), **config}, [], []
    for name, value in comparable(dict(given)).items():
        if name in HARMLESS:
            options[name] = given[name] if value != "auto" else config.get(name)
        elif value == "auto" or _same(name, value, config.get(name)) or value == asked.get(name):
            continue
        elif name in DIFFERENT_BITS:
            options[name] = value
            sentences.append(
                f"{name} was {config.get(name)} and is {value} now: same data and draws, last bits may differ"
            )
        else:
            differing.append(f"{name} was {asked.get(name, config.get(name))} and is {value} now")
    if differing:
        raise UserError(
            f"run {run.path} was begun with other settings: {'; '.join(differing)}; leave them out to go on "
            "with the run, or give another --out to begin anew"
        )
    if "accumulate" not in given:
        options["accumulate"] = _parts(config, options)
    checkpoint, complaints = newest_usable(run.checkpoints)
    return Continued(run, options, checkpoint, [*complaints, *sentences])


def _parts(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    images = [
        int(options["batch_size"]) // (int(options["devices"]) * int(options["num_nodes"]))
        for options in (before, after)
    ]
    at_once = images[0] // int(before["accumulate"])
    return next(
        parts for parts in range(1, images[1] + 1) if images[1] % parts == 0 and images[1] // parts <= at_once
    )


def _same(name: str, value: Any, stored: Any) -> bool:
    if name == "image_size":
        return bool(comparable(parse_image_size(value)) == stored)
    return bool(value == stored)


def say_finished(run: RunFolder) -> None:
    """What a finished run ended with, and how to train on from it."""
    summary = run.summary()
    say(
        f"run {run.path} is finished: {summary.get('steps', 0):,} steps, loss {summary.get('loss', float('nan')):.4g}"
    )
    say(f"its backbone: {run.backbone}")
    data = " ".join(str(one) for one in run.config().get("data", []))
    say(f"to train on from it: freqmask pretrain {data} --init {run.path} --out {run.path}-continued")


def started_from_outside() -> int:
    """How many processes a launcher started, 1 without one. Those that Lightning starts itself don't count."""
    return 1 if os.environ.get(CHOSEN_BY_RANK_0) else launched_processes()


def check_processes(options: Mapping[str, Any]) -> None:
    """Raises a UserError unless the launcher's processes and the options fit, and the run has a name."""
    world = started_from_outside()
    if world == 1:
        return
    if not options["out"]:
        raise UserError(f"out must be given when {world} processes are started from outside: --out RUN")
    asked = options["devices"]
    if asked != "auto" and int(asked) * int(options["num_nodes"]) != world:
        raise UserError(
            f"devices ({asked}) x num_nodes ({options['num_nodes']}) must be the {world} processes that were "
            f"started; try --devices {max(world // int(options['num_nodes']), 1)}"
        )


def follows() -> bool:
    """Whether this process only takes part in a run that the first one chooses."""
    return rank() > 0 and started_from_outside() > 1
