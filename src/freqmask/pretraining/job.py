"""A pre-training from its options to its end: set up, fit, tell."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freqmask import __version__
from freqmask.console import rank, say
from freqmask.data.in_memory import InMemoryImages
from freqmask.data.source import Source, Subset
from freqmask.data.sources import open_source
from freqmask.data.splits import hold_out
from freqmask.errors import UserError
from freqmask.evaluation.labelled import LabelledData, open_labelled
from freqmask.images import as_float
from freqmask.options import command_words
from freqmask.pretraining import plan
from freqmask.pretraining.cache_on_device import keep_images
from freqmask.pretraining.figures import draw_plan
from freqmask.pretraining.pretraining_module import augmented
from freqmask.pretraining.resolve import Resolved, make_augmentation, make_geometries, make_method, resolve
from freqmask.pretraining.resume import (
    CHOSEN_BY_RANK_0,
    Continued,
    check_processes,
    continue_run,
    find_run,
    follows,
    say_finished,
    without_out,
)
from freqmask.pretraining.settings import check_accelerator, check_options
from freqmask.pretraining.task import Pretraining, make_dataset
from freqmask.pretraining.watch import first_batch
from freqmask.reporting.page import refresh_report
from freqmask.training.auto import usable_cores
from freqmask.training.failures import silence_third_party_loggers
from freqmask.training.files import check_writable
from freqmask.training.loop import train
from freqmask.training.run_folder import RUNS, RunFolder, comparable, heading, new_run, now

FIRST_RUN = "photos"  # the recipe of `freqmask pretrain` without any argument
PASS_RATIO = 0.8  # --overfit: the loss must fall below this share of where it began


@dataclass
class Images:
    """The images of a run, parted.

    Attributes:
        source: all of them.
        train: what is learnt from.
        held_out: what the loss is measured on; None where there are too few.
        probed: images with labels to measure features on, if asked for.
    """

    source: Source
    train: Source
    held_out: Source | None
    probed: LabelledData | None = None


def run_job(options: dict[str, Any], given: Mapping[str, Any]) -> Path:
    """Pre-train.

    Args:
        options: every option of ``pretrain``.
        given: those that were given.

    Returns:
        The run folder.
    """
    with silence_third_party_loggers():
        return _run(*_with_data(_named(options), _named(given)))


def _run(options: dict[str, Any], given: dict[str, Any]) -> Path:
    check_options(options)
    check_accelerator(options["accelerator"])
    check_processes(options)
    if follows():
        return _go_on(continue_run(RunFolder(options["out"]).begun(), given, options))
    found = find_run(given)
    if found is not None and found.finished():
        say_finished(found)
        return found.path
    if found is not None:
        return _go_on(continue_run(found, given, options))
    return _begin(options, given)


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    """Filters and methods given as objects become the words that configuration and checkpoint record."""
    named = dict(options)
    if hasattr(named.get("filter"), "describe"):
        named["filter"] = named["filter"].describe()
    if isinstance(named.get("method"), type):
        named["method"] = f"{named['method'].__module__}:{named['method'].__qualname__}"
    return named


def _with_data(options: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Without any argument the first run's recipe; without DATA, only what a run folder can fill in."""
    if not given:
        from freqmask.recipes import read_recipe

        recipe = read_recipe(FIRST_RUN).options()
        say(
            "no DATA given: a first look on photographs that come with scikit-image (freqmask recipes photos)"
        )
        return {**options, **recipe}, recipe
    data = options["data"]
    if data is not None and not isinstance(data, (list, tuple)):
        options["data"] = [data]
    if not options["data"] and not (given.get("out") and RunFolder(given["out"]).exists()):
        words = command_words({**given, "data": ["builtin:photos"]}, first="data")
        raise UserError(f"DATA is missing; try freqmask pretrain {words}")
    if options["data"]:
        given["data"] = options["data"] = [
            str(one) if isinstance(one, Path) else one for one in options["data"]
        ]
    return options, given


def _begin(options: dict[str, Any], given: dict[str, Any]) -> Path:
    """A new run: resolve, tell the plan, draw it, train."""
    check_writable(options["out"] or RUNS, folder=True)
    images = part(options)
    resolved = resolve(options, images.source, len(images.train))
    run = (
        RunFolder(options["out"])
        if options["out"]
        else new_run(str(options["method"]), resolved.options["backbone"])
    )
    run.lock()
    try:
        _tell_plan(resolved, images, run, given)
        state = {
            "given": without_out(given),
            "data": images.source.fingerprint(),
            "images": len(images.train),
            "held_out_images": 0 if images.held_out is None else len(images.held_out),
            "probe_images": 0 if images.probed is None else len(images.probed.rounds[0].test),
            "convert_channels": resolved.options["convert_channels"],
            "freqmask": __version__,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "cores": usable_cores(),
            "began": now(),
        }
        _draw_plan(run, resolved, images, state["convert_channels"])
        if options["dry_run"]:
            say(f"plan drawn  {run.path / 'plan.png'}    (--dry_run: nothing was trained)")
            return run.path
        kept = _kept(resolved.options, images, state, by_hand=given.get("images_from") == "device")
        run.begin(_recorded(resolved.options), state, heading("pretrain"))
        os.environ[CHOSEN_BY_RANK_0] = str(run.path)
        return _train(run, resolved.options, images, state, kept, None)
    except BaseException:
        run.leave_nothing("plan.png")
        raise
    finally:
        os.environ.pop(CHOSEN_BY_RANK_0, None)
        run.unlock()


def _go_on(continued: Continued) -> Path:
    """An unfinished run: everything from its config, the data compared, train on."""
    run, options = continued.run, continued.options
    first = rank() == 0
    if first:
        run.lock()
    try:
        state = run.state()
        images = part(options)
        where = (
            f"from {continued.checkpoint.name}"
            if continued.checkpoint
            else "from its beginning, no checkpoint yet"
        )
        say(f"run {run.path} goes on {where}; the plan is in {run.path / 'config.yaml'}")
        for sentence in continued.sentences:
            say(f"note: {sentence}")
        if images.source.fingerprint() != state.get("data"):
            say(
                f"note: the images have changed since the run began: {state.get('images'):,} to train on then, "
                f"{len(images.train):,} now"
            )
        if options.get("dry_run"):
            return run.path
        os.environ.setdefault(CHOSEN_BY_RANK_0, str(run.path))
        kept = _kept(options, images, state, by_hand=False)
        return _train(run, options, images, state, kept, continued.checkpoint)
    finally:
        if first:
            os.environ.pop(CHOSEN_BY_RANK_0, None)
            run.unlock()


def part(options: Mapping[str, Any]) -> Images:
    """Open the data and keep 2 % apart; a run that shall overfit keeps none."""
    source = open_source(options["data"], pages=options["pages"], split=options["split"])
    probed = (
        open_labelled(options["probe_data"], pages=options["pages"]) if options.get("probe_data") else None
    )
    if options["overfit"] is not None:
        train = Subset(source, np.arange(min(int(options["overfit"]), len(source))))
        return Images(source, train, None, probed)
    train_indices, held_out = hold_out(source, seed=options["seed"])
    held_out_images = Subset(source, held_out) if len(held_out) else None
    return Images(source, Subset(source, train_indices), held_out_images, probed)


def _tell_plan(resolved: Resolved, images: Images, run: RunFolder, given: Mapping[str, Any]) -> None:
    held_out = len(images.held_out) if images.held_out is not None else 0
    for line in plan.plan_lines(resolved, images.source.summary(), len(images.train), held_out):
        say(line)
    for line in plan.advice_lines(resolved.options, len(images.train), data_words(resolved.options)):
        say(line)
    say(f"run         {run.path}")
    for line in plan.length_lines(resolved, given):
        say(line)


def _draw_plan(run: RunFolder, resolved: Resolved, images: Images, convert: bool) -> None:
    options = resolved.options
    method: Any = resolved.method
    geometries = make_geometries(options, method.n_views)
    batch = first_batch(make_dataset(options, images.train, geometries, convert), 8)
    views = [as_float(view) for view in batch["views"]]
    views = augmented(views, make_augmentation(options, method.n_views), batch["keys"])
    draw_plan(run.path / "plan.png", views, method, batch["keys"])


def _kept(
    options: dict[str, Any], images: Images, state: Mapping[str, Any], by_hand: bool
) -> InMemoryImages | None:
    """The images decoded, where they stay on the device; where one turns out unfit the options say loader."""
    geometry = make_geometries(options, 1)[0]
    kept = keep_images(options, images.train, geometry, bool(state["convert_channels"]), by_hand)
    options["images_from"] = "loader" if kept is None else "device"
    return kept


def _train(
    run: RunFolder,
    options: dict[str, Any],
    images: Images,
    state: Mapping[str, Any],
    kept: InMemoryImages | None,
    checkpoint: Path | None,
) -> Path:
    """The method with its first weights, trained, and told how it ended."""
    steps_an_epoch = len(images.train) / options["batch_size"]
    torch.manual_seed(options["seed"])
    method = make_method(options, steps_an_epoch)
    if options["init"]:
        from freqmask.interop.weights import load_initial

        for sentence in load_initial(method, options["init"]):
            say(f"init        {sentence}")
    found = dict(state)
    training = Pretraining(run, options, images.train, images.held_out, method, found, images.probed, kept)

    def stopped(step: int) -> None:
        refresh_report(run.path)
        say(
            f"    freqmask pretrain {data_words(options)} --out {shlex.quote(str(run.path))}    (from anywhere)"
        )

    summary = train(training.task(), checkpoint, training.summary, stopped)
    if rank() == 0:
        refresh_report(run.path)
        _tell_end(run, options, summary)
    return run.path


def _tell_end(run: RunFolder, options: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    previews = sorted(run.previews.glob("step-*.png"))
    preview = str(previews[-1]) if previews else None
    for line in plan.summary_lines(run, summary, preview, data_words(options)):
        say(line)
    if options["overfit"] is not None:
        _judge_overfit(summary, int(options["overfit"]))
    else:
        for line in plan.next_lines(run.path, data_words(options)):
            say(line)


def _judge_overfit(summary: Mapping[str, Any], count: int) -> None:
    ratio = summary["loss"] / summary["first_loss"]
    word = "PASS" if ratio <= PASS_RATIO else "FAIL"
    say(
        f"{word}: on {count} images the loss fell to {ratio:.2f} of where it began (PASS is {PASS_RATIO} or less)"
    )
    if word == "FAIL":
        say("      try a higher --lr or more --steps; if it still fails, the method or the data is broken")


def data_words(options: Mapping[str, Any]) -> str:
    """DATA as it would be typed; what was made in Python cannot be."""
    return " ".join(
        shlex.quote(str(one)) if isinstance(one, (str, Path)) else "DATA" for one in options["data"]
    )


def _recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = dict(
        comparable({name: value for name, value in options.items() if name not in ("dry_run", "out")})
    )
    # null is the default of every option but this one, where it means something
    return {name: value for name, value in plain.items() if value is not None or name == "clip_grad"}
