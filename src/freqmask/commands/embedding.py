"""How ``freqmask embed`` is carried out: where, in how many processes, and what is told."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from freqmask.console import say
from freqmask.data.sources import Source
from freqmask.errors import UserError
from freqmask.interop.embed import Embedding, Place, Wanted, compute_parts, finish, plan_parts
from freqmask.interop.models import OpenedModel
from freqmask.interop.tables import task_of
from freqmask.pretraining.resolve import pick_device
from freqmask.pretraining.settings import check_accelerator
from freqmask.training.plan import choose_workers
from freqmask.training.progress import Progress

_SHOWN_SKIPPED = 3


def default_out(opened: OpenedModel) -> Path:
    """Where features go unless asked otherwise: into the run folder, or the current one."""
    name = "embeddings.parquet"
    return opened.folder.parent / name if opened.kind == "run" and opened.folder is not None else Path(name)


def checked_blocks(blocks: list[int] | None, opened: OpenedModel) -> list[int]:
    """The blocks asked for, counted from 0, each once.

    Raises:
        UserError: the model has no such block.
    """
    count = len(opened.module.feature_info)
    for number in blocks or []:
        if not -count <= number < count:
            raise UserError(f"blocks ({number}) must be from 0 to {count - 1} for {opened.name}")
    return sorted({number % count for number in blocks or []})


def is_there(path: Path, task: dict[str, Any]) -> bool:
    """Whether the file holds the features asked for."""
    return path.is_file() and task_of(path) == task


def choose_place(batch_size: int | str, workers: int | str, accelerator: str) -> Place:
    """Device, batch and workers, every auto resolved.

    Raises:
        UserError: a device that is not here, or a number out of range.
    """
    check_accelerator(accelerator)
    device = pick_device(accelerator)
    batch = (256 if device.type == "cuda" else 32) if batch_size == "auto" else batch_size
    loaders = choose_workers(device.type == "cuda").value if workers == "auto" else workers
    for name, value, least in (("batch_size", batch, 1), ("workers", loaders, 0)):
        if not isinstance(value, int) or value < least:
            raise UserError(f"{name} ({value}) must be a whole number of at least {least}, or auto")
    return Place(device.type, 0, 1, int(batch), int(loaders))


def count_processes(devices: int | str, place: Place) -> int:
    """One process a device.

    Raises:
        UserError: there are not that many devices.
    """
    here = torch.cuda.device_count() if place.device == "cuda" else 1
    if devices == "auto":
        return here
    if not isinstance(devices, int) or devices < 1 or (place.device == "cuda" and devices > here):
        raise UserError(f"devices ({devices}) must be auto or from 1 to {here}")
    return devices


def compute(
    opened: OpenedModel, source: Source, path: Path, wanted: Wanted, place: Place, processes: int
) -> Embedding:
    """Compute the parts, here or in several processes, and join them."""
    parts = plan_parts(opened, source, path, wanted)
    there = parts.begin()
    if there:
        say(f"goes on     {there} of {parts.count} parts are there from before")
    todo = sum(len(parts.indices(number)) for number in parts.missing(0, 1))
    began = time.monotonic()
    if processes > 1 and todo:
        _spawn(opened, source, path, wanted, place, processes)
        computed = todo
    else:
        progress = Progress(todo, 0, {"rate": "{:.0f} images/s"}, unit="image")
        progress.start()
        try:
            computed = compute_parts(
                opened,
                source,
                parts,
                wanted,
                place,
                lambda done: progress.update(done, {"rate": done / max(time.monotonic() - began, 1e-9)}),
            )
        finally:
            progress.close()
    return finish(opened, path, parts, wanted, computed)


def _spawn(
    opened: OpenedModel, source: Source, path: Path, wanted: Wanted, place: Place, processes: int
) -> None:
    """One process a device, each with every other part."""
    opened.backbone.cpu()
    arguments = (opened, source, path, wanted, place, processes)
    try:
        spawn(_work, arguments, nprocs=processes, join=True)
    except (ProcessExitedException, ProcessRaisedException) as error:
        reason = str(error).strip().splitlines()[-1].removeprefix("freqmask.errors.UserError: ")
        raise UserError(f"{reason}; the same command goes on from the parts that are whole") from error


def _work(
    rank: int, opened: OpenedModel, source: Source, path: Path, wanted: Wanted, place: Place, processes: int
) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # the first process alone speaks
    device = f"cuda:{rank}" if place.device == "cuda" else place.device
    parts = plan_parts(opened, source, path, wanted)
    compute_parts(
        opened, source, parts, wanted, replace(place, device=device, rank=rank, world_size=processes)
    )


def tell(embedding: Embedding, opened: OpenedModel, images: int) -> None:
    """What was written and left out."""
    say(f"embeddings  {embedding.path}: {embedding.rows:,} of {images:,} images, {opened.name}")
    for name, reason in embedding.skipped[:_SHOWN_SKIPPED]:
        say(f"            left out: {name}: {reason}")
    if len(embedding.skipped) > _SHOWN_SKIPPED:
        say(f"            ... and {len(embedding.skipped) - _SHOWN_SKIPPED} more that cannot be read")
