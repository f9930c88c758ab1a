"""How ``freqmask embed`` is carried out: where, in how many processes, and what is told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from freqmask.console import Progress, say
from freqmask.data.source import Source
from freqmask.errors import UserError
from freqmask.interop.feature_parts import Embedding, Place, Wanted, finish, plan_parts, work_through
from freqmask.interop.feature_tables import task_of
from freqmask.interop.models import OpenedModel
from freqmask.training.auto import check_started_once, choose_devices, choose_workers, pick_device
from freqmask.training.worker_pool import DiedError, WorkerPool

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


def choose_place(
    batch_size: int | str, workers: int | str, accelerator: str, devices: int | str
) -> tuple[Place, list[torch.device]]:
    """Batch and workers of a device, and the devices, every auto resolved.

    Raises:
        UserError: a device that is not here, or a number out of range.
    """
    device = pick_device(accelerator)
    check_started_once("embed")
    chosen = choose_devices(devices, device, accelerator)
    batch = (256 if device.type == "cuda" else 32) if batch_size == "auto" else batch_size
    loaders = workers
    if workers == "auto":
        loaders = max(choose_workers(device.type == "cuda").value // len(chosen), 1)
    for name, value, least in (("batch_size", batch, 1), ("workers", loaders, 0)):
        if not isinstance(value, int) or value < least:
            raise UserError(f"{name} ({value}) must be a whole number of at least {least}, or auto")
    return Place(batch_size=int(batch), workers=int(loaders)), chosen


def compute(
    opened: OpenedModel,
    source: Source,
    path: Path,
    wanted: Wanted,
    place: Place,
    devices: list[torch.device],
) -> Embedding:
    """Compute the parts, here or in a process a device, and join them."""
    parts = plan_parts(opened, source, path, wanted)
    there = parts.begin()
    if there:
        say(f"goes on     {there} of {parts.count} parts are there from before")
    todo = sum(len(parts.indices(number)) for number in parts.missing(0, 1))
    began, done = time.monotonic(), 0
    progress = Progress(todo, 0, {"rate": "{:.0f} images/s"}, unit="image")
    progress.start()
    try:
        for number in _work(opened, source, path, wanted, place, devices):
            done += number
            progress.update(done, {"rate": done / max(time.monotonic() - began, 1e-9)})
    finally:
        progress.close()
    return finish(opened, path, parts, wanted, done)


def _work(
    opened: OpenedModel,
    source: Source,
    path: Path,
    wanted: Wanted,
    place: Place,
    devices: list[torch.device],
) -> Iterator[int]:
    """One process a device, each with every other part; yields how many images each batch had."""
    parts, count = plan_parts(opened, source, path, wanted), len(devices)
    ranks = [rank for rank in range(count) if parts.missing(rank, count)]
    shares = [replace(place, rank=rank, world_size=count) for rank in ranks]
    arguments = [(opened, source, path, wanted, share) for share in shares]
    with closing(WorkerPool(devices)) as replicas:
        try:
            yield from replicas.run(_embed, arguments, [opened, source])
        except DiedError as error:
            raise UserError(f"{error}; the same command goes on from the parts that are whole") from error


def _embed(
    device: torch.device, opened: OpenedModel, source: Source, path: Path, wanted: Wanted, place: Place
) -> Iterator[int]:
    parts = plan_parts(opened, source, path, wanted)
    return work_through(opened, source, parts, wanted, replace(place, device=str(device)))


def tell(embedding: Embedding, opened: OpenedModel, images: int) -> None:
    """What was written and left out."""
    say(f"embeddings  {embedding.path}: {embedding.rows:,} of {images:,} images, {opened.name}")
    for name, reason in embedding.skipped[:_SHOWN_SKIPPED]:
        say(f"            left out: {name}: {reason}")
    if len(embedding.skipped) > _SHOWN_SKIPPED:
        say(f"            ... and {len(embedding.skipped) - _SHOWN_SKIPPED} more that cannot be read")
