"""An evaluation from its options to its end: open, measure every model, tell."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freqmask.console import say
from freqmask.data.sources import Source
from freqmask.data.values import Survey, survey
from freqmask.errors import UserError
from freqmask.evaluation.duplicates import seen_in_pretraining
from freqmask.evaluation.features import Place, not_finite
from freqmask.evaluation.labelled import LabelledData, Parting, open_labelled, subset
from freqmask.evaluation.protocol import Bench, Heading, Outcome, Protocol
from freqmask.evaluation.results import (
    Result,
    Summary,
    append_results,
    check_results,
    class_lines,
    draw_bars,
    summarise,
    table_lines,
    warnings_of,
    write_classes,
)
from freqmask.evaluation.subjects import Subject, check_models, open_subject, what_differs
from freqmask.training.devices import check_started_once, choose_devices
from freqmask.training.plan import choose_workers, usable_cores
from freqmask.training.replicas import Replicas

_SHOWN_SKIPPED = 3
LONG = 5.0  # seconds after which silence seems a standstill


@dataclass
class Setting:
    """What all protocols share, as the commands' options give it.

    Attributes:
        models: MODEL as typed.
        data: DATA.
        labels: a CSV table, or None.
        parting: how the images are parted.
        pages: what the pages of a TIFF are.
        seeds: of heads, draws and fresh weights.
        image_size: side in pixels; None is each model's own.
        weights: teacher or student of FOLK runs.
        value_range: what becomes [0, 1]; None is each model's own.
        crop: center or whole.
        place: where to compute.
        out: folder of the results, or None.
        options: those of the command, to repeat it.
    """

    models: list[str]
    data: Any
    labels: str | None = None
    parting: Parting = field(default_factory=Parting)
    pages: Any = "channels"
    seeds: Sequence[int] = (0,)
    image_size: int | None = None
    weights: str | None = None
    value_range: str | None = None
    crop: str = "center"
    place: Place = field(default_factory=Place)
    out: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def setting_of(options: Mapping[str, Any]) -> Setting:
    """The options that all commands share, as one setting."""
    model, data, out = options["model"], options["data"], options["out"]
    several = isinstance(data, (list, tuple))
    return Setting(
        models=[str(model)] if isinstance(model, (str, Path)) else list(model),
        data=list(data) if several else [data],
        labels=options["labels"],
        parting=Parting(
            options["train_split"],
            options["test_split"],
            options["test_share"],
            options["folds"],
            options["split_seed"],
            options["duplicates"],
        ),
        pages=options["pages"],
        seeds=options["seeds"] or (0, 1, 2),
        image_size=options["image_size"],
        weights=options["weights"],
        value_range=options["value_range"],
        crop=options["crop"],
        place=make_place(
            options["accelerator"],
            options["batch_size"],
            options["workers"],
            options["precision"],
            options["cache"],
        ),
        out=None if out is None else Path(out),
        options={name: value for name, value in options.items() if name not in ("model", "out")},
    )


def shared_setting_of(options: Mapping[str, Any]) -> Setting:
    """The same for a command whose images are parted among the devices of its ``--devices``.

    Raises:
        UserError: there are not that many, or a launcher started the command several times.
    """
    check_started_once("evaluate")
    setting = setting_of(options)
    place = setting.place
    devices = choose_devices(options["devices"], place.device, options["accelerator"])
    if len(devices) > 1:
        workers = place.workers
        if options["workers"] == "auto":
            workers = max(workers // len(devices), 1)
        say(f"devices     {_in_words(devices)}")
        setting.place = replace(place, device=devices[0], workers=workers, replicas=Replicas(devices))
    return setting


def _in_words(devices: Sequence[torch.device]) -> str:
    count, threads, cores = len(devices), torch.get_num_threads(), usable_cores()
    words = f"{count} x {devices[0].type}: each sees a part of the images; heads learn on one"
    if devices[0].type == "cpu" and count * threads > cores:
        words += (
            f" ({threads} threads each for {cores} cores; OMP_NUM_THREADS={max(cores // count, 1)} is faster)"
        )
    return words


def evaluate(protocol: Protocol, setting: Setting) -> list[Summary]:
    """Measure all models by a protocol, show one table, append to results.csv, draw the bars.

    Args:
        protocol: how.
        setting: what, on what, where.

    Returns:
        One summary a model and variant.

    Raises:
        UserError: a model or the data cannot be opened; nothing has been written then.
    """
    models, data, seen = prepare(setting)
    results: list[Result] = []
    with closing(setting.place):
        for text in models:
            results += measure(text, protocol, data, seen, setting)
    return tell(protocol, setting, data, results)


def prepare(setting: Setting, check: bool = True) -> tuple[list[str], LabelledData, Survey]:
    """Open everything once, so that a mistake shows before hours of work.

    Args:
        setting: what, on what, where.
        check: whether each MODEL is opened as a backbone that something is learnt on; a classifier with its own
            head needs no training images.

    Raises:
        UserError: whatever is wrong with models, data or seeds.
    """
    models = check_models(setting.models)
    if not setting.seeds or len(set(setting.seeds)) < len(setting.seeds):
        raise UserError(f"seeds ({list(setting.seeds)}) must be one or several different numbers; try 0 1 2")
    if setting.out is not None:
        check_results(setting.out)
    parting = replace(setting.parting, learn=check)
    data = open_labelled(setting.data, setting.labels, parting, setting.pages)
    seen = survey(data.source)
    differences: dict[str, None] = {}
    for text in models if check else []:
        subject = open_one(text, seen, setting, setting.seeds[0])
        check_results(setting.out or subject.results or Path())
        differences |= dict.fromkeys(what_differs(subject, seen))
        if subject.kind == "run" and subject.results is not None:
            say(seen_in_pretraining(subject.results, data.source, data.tested))
    learnt = len(np.unique(np.concatenate([one.train for one in data.rounds])))
    say(
        f"{data.name}: {learnt:,} images to learn from, {len(data.tested):,} to test, "
        f"{len(data.class_names)} classes ({data.split})"
    )
    for note in [*data.notes, *differences]:
        say(f"note: {note}")
    return models, data, seen


def open_one(text: str, seen: Survey, setting: Setting, seed: int) -> Subject:
    """One MODEL as the setting wants it."""
    return open_subject(
        text,
        seen,
        seed=seed,
        image_size=setting.image_size,
        weights=setting.weights,
        value_range=setting.value_range,
        crop=setting.crop,
    )


def measure(
    text: str, protocol: Protocol, data: LabelledData, seen: Survey, setting: Setting
) -> list[Result]:
    """All seeds and rounds of one model; a seed that nothing depends on is measured once."""
    results: list[Result] = []
    bench: Bench | None = None
    for seed in setting.seeds:
        if bench is None or bench.subject.kind == "random":
            bench = begin(open_one(text, seen, setting, seed), data, setting.place)
        results += one_seed(bench, protocol, seed)
        if not protocol.seeded and bench.subject.kind != "random":
            break
    return results


def begin(subject: Subject, data: LabelledData, place: Place) -> Bench:
    """A model on its device, the images that it cannot read taken out."""
    train: Source = subset(data, data.rounds[0].train)
    subject.begin(train, place.device)
    bench = Bench(subject, data, place)
    table = bench.table("end")
    for name, reason in table.skipped[:_SHOWN_SKIPPED]:
        say(f"left out    {name}: {reason}")
    if len(table.skipped) > _SHOWN_SKIPPED:
        say(f"left out    ... and {len(table.skipped) - _SHOWN_SKIPPED} more that cannot be read")
    bench.data = data.without(set(np.flatnonzero(~table.read).tolist()))
    return bench


def one_seed(bench: Bench, protocol: Protocol, seed: int) -> list[Result]:
    """One answer a variant, put together from all rounds."""
    tested = bench.data.tested
    read = bench.inside() if protocol.inside else bench.table("end").values
    broken = max(not_finite(values) for values in read.values())
    if broken:
        trouble = f"the features of {broken:,} images are not finite; no result"
        say(f"warning: {bench.subject.name}: {trouble}")
        return [Result(bench.subject, protocol.headline, seed, tested, np.empty(0), trouble=trouble)]
    began = time.monotonic()
    answers: dict[str, list[Outcome]] = {}
    for one in bench.data.rounds:
        for variant, outcome in protocol.run(bench, one, seed).items():
            answers.setdefault(variant, []).append(outcome)
    if (seconds := time.monotonic() - began) > LONG:
        say(f"{protocol.name:<11} {bench.subject.name}: seed {seed} in {seconds:.0f} s")
    return [
        Result(
            bench.subject, variant, seed, tested, np.concatenate([o.predicted for o in found]), facts(found)
        )
        for variant, found in answers.items()
        if len(found) == len(bench.data.rounds)
    ]


def facts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Cells on how the answers came about."""
    chosen = list(dict.fromkeys(outcome.chosen for outcome in outcomes if outcome.chosen))
    return {
        "train_images": " ".join(str(outcome.learnt_from) for outcome in outcomes),
        "chosen": "; ".join(chosen),
    }


def tell(
    protocol: Protocol | Heading, setting: Setting, data: LabelledData, results: Sequence[Result]
) -> list[Summary]:
    """The table, the rows, the pictures."""
    summaries = summarise(results, data)
    say()
    for line in table_lines(protocol.title, protocol.headline, summaries):
        say(line)
    variant = protocol.headline
    lines = class_lines(results, data, variant)
    for line in ["", *lines] if lines else []:
        say(line)
    for line in warnings_of(results, data):
        say(line)
    tables = append_results(results, data, protocol.name, setting.options, setting.out)
    folder = setting.out or next((r.subject.results for r in results if r.subject.results), None) or Path()
    draw_bars(folder / f"{protocol.name}.png", f"{protocol.title}\n{data.name}", summaries)
    write_classes(folder / f"{protocol.name}-classes.csv", results, data, variant)
    say()
    say(f"rows        {', '.join(map(str, tables))}")
    say(f"look at     {folder / f'{protocol.name}.png'} and {folder / f'{protocol.name}-classes.csv'}")
    return summaries


def make_place(
    accelerator: str, batch_size: int | str, workers: int | str, precision: str, cache: bool
) -> Place:
    """Where to compute, by the options of a command.

    Raises:
        UserError: there is no such device, or a number is out of its range.
    """
    device = pick_device(accelerator)
    loaders = choose_workers(device.type == "cuda").value if workers == "auto" else workers
    batch = None if batch_size == "auto" else batch_size
    for name, value, least in (("batch_size", batch, 1), ("workers", loaders, 0)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise UserError(f"{name} ({value}) must be a whole number of at least {least}, or auto")
    return Place(device, None if batch is None else int(batch), int(loaders), precision == "bf16", cache)


def pick_device(accelerator: str) -> torch.device:
    """The device of an accelerator's name; ``auto`` is CUDA, then Apple's, then the CPU.

    Raises:
        UserError: it is not here.
    """
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = "cuda" if accelerator == "gpu" else accelerator
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if here[kind]))
    if not here.get(name):
        raise UserError(f"accelerator ({accelerator}) is not here; try --accelerator cpu")
    return torch.device(name)
