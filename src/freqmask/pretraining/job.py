"""A pre-training from its options to its end: set up or resume, train, report."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freqmask.console import launched_processes, rank, say, shell_path, silence_third_party_loggers
from freqmask.data.in_memory import InMemoryImages
from freqmask.data.source import Source, Subset, is_usable
from freqmask.data.sources import open_source
from freqmask.data.splits import hold_out
from freqmask.errors import UserError
from freqmask.evaluation.labelled import SplitConfig, open_labelled
from freqmask.interop.weight_files import hash_weights
from freqmask.interop.weights import load_initial
from freqmask.methods.distill import Teacher
from freqmask.options import command_words
from freqmask.pretraining import plan
from freqmask.pretraining.cache_on_device import keep_images
from freqmask.pretraining.figures import draw_plan
from freqmask.pretraining.resolve import (
    Resolved,
    check_options,
    make_method,
    parse_image_size,
    resolve,
)
from freqmask.pretraining.task import (
    Images,
    Pretraining,
    augmented,
    make_augmentation,
    make_dataset,
    make_geometries,
)
from freqmask.pretraining.watch import first_batch
from freqmask.recipes import read_recipe
from freqmask.reporting.page import refresh_report
from freqmask.spectrum import as_float
from freqmask.training.auto import pick_device, world_size
from freqmask.training.files import check_writable
from freqmask.training.loop import begin_run, check_parts, find_checkpoint, keep_threads, train
from freqmask.training.run_folder import (
    LOCK,
    RUNS,
    STATE,
    RunFolder,
    comparable,
    from_anywhere,
    new_run,
    newest_unfinished,
)

FIRST_RUN = "photos"  # the recipe of `freqmask pretrain` without any argument
PASS_RATIO = 0.8  # --overfit: the loss must fall below this share of where it began
CHOSEN_BY_RANK_0 = "FREQMASK_RUN"  # in the environment of the processes that Lightning starts
# These change what is read, shown or kept, and never what is trained.
HARMLESS = {
    *("out", "data", "workers", "logger", "max_skipped_share", "dry_run", "keep_checkpoints"),
    *("log_every_steps", "preview_every_steps", "checkpoint_every_steps", "checkpoint_every_minutes"),
    *("probe_data", "probe_every_epochs"),
}
# A run cannot be resumed without these.
_NUMBERS = (
    *("steps", "batch_size", "lr", "seed", "devices", "num_nodes", "accumulate", "keep_checkpoints"),
    *("log_every_steps", "checkpoint_every_steps", "checkpoint_every_minutes", "max_skipped_share"),
)
PATHS = ("data", "probe_data", "teacher", "init")
# These keep the data and the draws, but sums are made in another order.
DIFFERENT_BITS = {"images_from", "devices", "num_nodes", "strategy", "accelerator", "compile", "accumulate"}


def run_job(options: dict[str, Any], given: Mapping[str, Any]) -> Path:
    """Pre-train.

    Args:
        options: every option of ``pretrain``.
        given: those that were given.

    Returns:
        The run folder.
    """
    with silence_third_party_loggers(), keep_threads(), ExitStack() as held:
        options, given = _with_data(_as_words(options), _as_words(given))
        check_options(options)
        pick_device(options["accelerator"])
        launched = 1 if os.environ.get(CHOSEN_BY_RANK_0) else launched_processes()  # else by Lightning
        check_processes(options, launched)
        if rank() > 0 and launched > 1:  # the first process chooses
            if options["dry_run"]:
                return Path(options["out"])  # nothing will be begun that it could wait for
            run: RunFolder | None = RunFolder(options["out"]).begun()
        else:
            run = find_run(given)
        if run is not None and run.finished():
            _say_finished(run, options, given)
            return run.path
        training = _begin(options, given, held) if run is None else _resume(run, given, options, held)
        run = training.run
        if not training.options.get("dry_run"):
            os.environ.setdefault(CHOSEN_BY_RANK_0, str(run.path))
            try:
                summary = train(
                    training.task(), training.checkpoint, training.summary, partial(_say_stopped, training)
                )
            finally:
                if rank() == 0:
                    os.environ.pop(CHOSEN_BY_RANK_0, None)
            if rank() == 0:
                _say_end(training, summary)
        return run.path


def _as_words(options: Mapping[str, Any]) -> dict[str, Any]:
    """Filters and methods given as objects become the words that configuration and checkpoint record."""
    words = dict(options)
    if hasattr(words.get("filter"), "describe"):
        words["filter"] = words["filter"].describe()
    if isinstance(words.get("method"), type):
        words["method"] = f"{words['method'].__module__}:{words['method'].__qualname__}"
    if isinstance(words.get("teacher"), Path):
        words["teacher"] = str(words["teacher"])
    return words


def _with_data(options: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Without any argument the first run's recipe; without DATA, only what a run folder can fill in."""
    if not given:
        say(
            "no DATA given: a first look on photographs that come with scikit-image (freqmask recipes photos)"
        )
        recipe = read_recipe(FIRST_RUN).options()
        return {**options, **recipe}, recipe
    data = options["data"]
    if not data and not (given.get("out") and RunFolder(given["out"]).exists()):
        words = command_words({**given, "data": ["builtin:photos"]}, first="data")
        raise UserError(f"DATA is missing; try freqmask pretrain {words}")
    if data:
        sources = data if isinstance(data, (list, tuple)) else [data]
        given["data"] = options["data"] = [
            str(source) if isinstance(source, Path) else source for source in sources
        ]
    return options, given


def check_processes(options: Mapping[str, Any], world: int) -> None:
    """Raises a UserError unless a launcher's processes and the options fit, and the run has a name."""
    if world == 1:
        return
    if not options["out"]:
        raise UserError(f"out must be given when {world} processes are started from outside: --out RUN")
    asked, nodes = options["devices"], int(options["num_nodes"])
    if asked != "auto" and int(asked) * nodes != world:
        raise UserError(
            f"devices ({asked}) x num_nodes ({nodes}) must be the {world} processes that were started; "
            f"try --devices {max(world // nodes, 1)}"
        )


def find_run(given: Mapping[str, Any]) -> RunFolder | None:
    """The run that options continue, as they were given, or None for a new one.

    Raises:
        UserError: ``out`` is something else than a run.
    """
    if os.environ.get(CHOSEN_BY_RANK_0):
        return RunFolder(os.environ[CHOSEN_BY_RANK_0])
    out = given.get("out")
    if out is None:
        return newest_unfinished(_identity(given))
    run = RunFolder(out)
    if run.exists():
        return run
    if run.path.is_file():
        raise UserError(f"out ({out}) is a file; give the path of a folder that may be made")
    left_by_a_start = ("plan.png", LOCK, STATE)
    if run.path.is_dir() and any(
        path.name not in left_by_a_start and path.suffix != ".tmp" for path in run.path.iterdir()
    ):
        raise UserError(f"out ({out}) holds other files and no run; give a new or an empty folder")
    return None


def _identity(given: Mapping[str, Any]) -> dict[str, Any]:
    # where a run is written does not say what it is
    return dict(comparable({name: value for name, value in given.items() if name not in ("out", "dry_run")}))


def _say_finished(run: RunFolder, options: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    summary = run.summary()
    steps, loss = summary.get("steps", 0), summary.get("loss", float("nan"))
    say(f"run {run.path} is finished: {steps:,} steps, loss {loss:.4g}")
    begun, told = dict[str, Any](), list[str]()
    with suppress(UserError):  # a record that was damaged since, or images that are gone
        begun = _given(run)
        changed = differences(run, given)
        told = [f"{name} was {before} and is {now} now" for name, (before, now) in changed.items()]
        if given.get("data"):
            source = open_source(given["data"], pages=options["pages"], split=options["split"])
            told += _changed_images(run, source)
    if told:
        say(f"note: {'; '.join(told)}: the run stays as it was trained; give another --out to begin anew")
    say(f"its backbone: {run.backbone}")
    trained = run.config()
    trained |= {"data": options["data"] or trained.get("data")}  # as it is called from here
    say(f"to train on from it: {plan.train_on(run.path, trained, begun)}")


def part(options: Mapping[str, Any]) -> Images:
    """Open the data and keep 2 % apart; a run that shall overfit keeps none."""
    pages, probe_data = options["pages"], options.get("probe_data")
    source = open_source(options["data"], pages=pages, split=options["split"])
    probed = open_labelled(probe_data, SplitConfig(pages=pages)) if probe_data else None
    if options["overfit"] is not None:
        train = Subset(source, np.arange(min(int(options["overfit"]), len(source))))
        return Images(source, train, None, probed)
    train_indices, held_out = hold_out(source, seed=options["seed"])
    # of few images the one that is held out may be a broken one, and nothing would be left to measure on
    measured = len(held_out) > 3 or any(is_usable(source, int(index)) for index in held_out)
    held_out_images = Subset(source, held_out) if measured else None
    return Images(source, Subset(source, train_indices), held_out_images, probed)


def _begin(options: dict[str, Any], given: dict[str, Any], held: ExitStack) -> Pretraining:
    """A new run, its folder held: every `auto` resolved, the plan printed and drawn."""
    check_writable(options["out"] or RUNS, folder=True)
    images = part(options)
    resolved = resolve(options, images.source, len(images.train), images.watched)
    options, method = resolved.values, resolved.method
    run = (
        RunFolder(options["out"]) if options["out"] else new_run(str(options["method"]), options["backbone"])
    )
    held.enter_context(run.held("plan.png"))
    if run.exists():  # while this one looked at the images
        raise UserError(f"run {run.path} was begun by another process meanwhile; the same command resumes it")
    held_out = len(images.held_out) if images.held_out is not None else 0
    for line in (
        *plan.plan_lines(resolved, images.source.summary(), len(images.train), held_out),
        *plan.advice_lines(options, len(images.train), plan.data_words(options)),
        f"run         {run.path}",
        *plan.length_lines(resolved, given),
    ):
        say(line)
    state = {
        "given": _identity(given),
        "data": images.source.fingerprint(),
        "images": len(images.train),
        "held_out_images": held_out,
        "probe_images": images.tested,
        "convert_channels": options["convert_channels"],
        "parts": list(getattr(method, "parts", ())),
        **weights_of(method),
    }
    _draw_plan(run, resolved, images)
    if options["dry_run"]:
        say(f"plan drawn  {run.path / 'plan.png'}    (--dry_run: nothing was trained)")
        return Pretraining(run, options, images, method, state)
    # before anything is written: weights that do not fit leave no run that the right ones would have to resume
    method = _first_weights(options, images, method.teacher if options.get("teacher") else None)
    kept = _kept(options, images, state, by_hand=given.get("images_from") == "device")
    plain = comparable({name: value for name, value in options.items() if name not in ("dry_run", "out")})
    # null is the default of every option but this one, where it means something
    config = {name: value for name, value in plain.items() if value is not None or name == "clip_grad"}
    config |= {name: from_anywhere(config[name]) for name in PATHS if name in config}
    begin_run(run, "pretrain", config, state)
    return Pretraining(run, options, images, method, state, kept)


def _draw_plan(run: RunFolder, resolved: Resolved, images: Images) -> None:
    options, method = resolved.values, resolved.method
    geometries = make_geometries(options, method.n_views)
    batch = first_batch(make_dataset(options, images.train, geometries, options["convert_channels"]), 8)
    views = [as_float(view) for view in batch["views"]]
    views = augmented(views, make_augmentation(options, method.n_views), batch["keys"])
    draw_plan(run.path / "plan.png", views, method, batch["keys"])


def _resume(run: RunFolder, given: Mapping[str, Any], known: Iterable[str], held: ExitStack) -> Pretraining:
    """An unfinished run, its folder held: everything from its config, the data compared."""
    options, notes = continued_options(run, given, known)
    held.enter_context(run.held())
    state = run.state()
    images = part(options)
    notes += _changed_images(run, images.source)
    checkpoint = find_checkpoint(run, notes)
    if options.get("dry_run"):
        return Pretraining(run, options, images, None, state)
    kept = _kept(options, images, state, by_hand=False)
    # weights that a checkpoint takes the place of may be gone, once they have been measured
    init = None if checkpoint is not None and run.began_measured() else options["init"]
    method = _first_weights({**options, "init": init}, images)
    if checkpoint is not None:
        check_same(method, state)
    return Pretraining(run, options, images, method, state, kept, checkpoint)


def _changed_images(run: RunFolder, source: Source) -> list[str]:
    """A sentence where they are others than those that the run began with."""
    state = run.state()
    if state.get("data") in (None, source.fingerprint()):
        return []
    then = state.get("images", 0) + state.get("held_out_images", 0)
    return [f"the images have changed since the run began: {then:,} then, {len(source):,} now"]


def weights_of(method: Any) -> dict[str, str]:
    """What tells the teacher's weights from others, for the run's state; nothing where none teaches."""
    teacher = getattr(method, "teacher", None)
    return {"teacher": hash_weights(teacher.backbone)} if isinstance(teacher, Teacher) else {}


def check_same(method: Any, state: Mapping[str, Any]) -> None:
    """Refuse to resume with other weights than those that the run began with.

    Raises:
        UserError: the teacher's weights have changed.
    """
    now = weights_of(method)
    if now and state.get("teacher", now["teacher"]) != now["teacher"]:
        raise UserError(
            f"teacher ({method.teacher.name}) has other weights than when the run began; bring back the old ones, or "
            "begin anew with another --out"
        )


def continued_options(
    run: RunFolder, given: Mapping[str, Any], known: Iterable[str]
) -> tuple[dict[str, Any], list[str]]:
    """The options of a run that is resumed, and what is worth a note about them.

    Args:
        run: an unfinished run.
        given: the options as they were given this time.
        known: the names of all options; those that the config leaves out are null.

    Raises:
        UserError: options that change the result differ from the run's; each is named.
    """
    run.check_whole(_NUMBERS, {"given": dict, "data": str, "images": int, "convert_channels": bool})
    config = run.config()
    options, notes, differing = {**dict.fromkeys(known), **config}, [], []
    for name, value in comparable(dict(given)).items():
        if name in HARMLESS:
            options[name] = config.get(name) if value == "auto" else given[name]
    for name, (before, now) in differences(run, given).items():
        if name in DIFFERENT_BITS:
            options[name] = now
            notes.append(
                f"{name} was {config.get(name)} and is {now} now: same data and draws, last bits and batch norm may "
                "differ"
            )
        else:
            differing.append(f"{name} was {before} and is {now} now")
    if differing:
        raise UserError(
            f"run {run.path} was begun with other settings: {'; '.join(differing)}; leave them out to resume "
            "the run, or give another --out to begin anew"
        )
    if "accumulate" not in given:  # at most as many images at once as before, on however many devices
        before, images = (int(each["batch_size"]) // world_size(each) for each in (config, options))
        at_once = before // int(config["accumulate"])
        fitting = (n for n in range(1, images + 1) if images % n == 0 and images // n <= at_once)
        options["accumulate"] = next(fitting, 1)
    check_parts(options)
    return options, notes


def differences(run: RunFolder, given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of the given options that change what is trained those that are others than the run's: name -> (then, now)."""
    config, asked, found = run.config(), _given(run), {}
    for name, value in comparable(dict(given)).items():
        stored = config.get(name)
        if name in PATHS:  # which may have been typed in another folder
            value, stored = from_anywhere(value), from_anywhere(stored)
        same = comparable(parse_image_size(value)) if name == "image_size" and value != "auto" else value
        if name not in HARMLESS and value != "auto" and same != stored and value != asked.get(name):
            found[name] = asked.get(name, stored), value
    return found


def _given(run: RunFolder) -> dict[str, Any]:
    """The options that a run was begun with, as far as it noted them."""
    given = run.state().get("given")
    return given if isinstance(given, dict) else {}


def _kept(
    options: dict[str, Any], images: Images, state: Mapping[str, Any], by_hand: bool
) -> InMemoryImages | None:
    """The images decoded, where they stay on the device; where one turns out unfit the options say loader."""
    geometry = make_geometries(options, 1)[0]
    kept = keep_images(options, images.train, geometry, bool(state["convert_channels"]), by_hand)
    options["images_from"] = "loader" if kept is None else "device"
    return kept


def _first_weights(options: Mapping[str, Any], images: Images, teacher: Any = None) -> Any:
    """The method as the run begins with it; where a checkpoint follows, Lightning reads it."""
    torch.manual_seed(options["seed"])
    method = make_method(options, len(images.train) / options["batch_size"], teacher)
    if options["init"]:
        for sentence in load_initial(method, options["init"]):
            say(f"init        {sentence}")
    return method


def _say_stopped(training: Pretraining) -> None:
    run = training.run
    if rank() == 0:
        refresh_report(run.path)
    words = plan.data_words({"data": from_anywhere(training.options["data"])})
    say(f"    freqmask pretrain {words} --out {shell_path(run.path.absolute())}    (from anywhere)")


def _say_end(training: Pretraining, summary: Mapping[str, Any]) -> None:
    run, options = training.run, training.options
    refresh_report(run.path)
    for line in plan.summary_lines(run, summary):
        say(line)
    if options["overfit"] is None:
        labelled = training.images.source.class_names is not None
        for line in plan.next_lines(run.path, options, training.state["given"], labelled):
            say(line)
    elif "loss" in summary:
        count, ratio = int(options["overfit"]), summary["loss"] / summary["first_loss"]
        word = "PASS" if ratio <= PASS_RATIO else "FAIL"
        say(
            f"{word}: on {count} images the loss fell to {ratio:.2f} of where it began (PASS is {PASS_RATIO} or less)"
        )
        if word == "FAIL":
            say(
                "      try a higher --lr or more --steps; if it still fails, the method or the data is broken"
            )
