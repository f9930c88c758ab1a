"""``freqmask embed``: the features of images."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from freqmask.console import say
from freqmask.errors import UserError

if TYPE_CHECKING:
    from freqmask.data.sources import Source
    from freqmask.interop.embed import Embedding, Place, Wanted
    from freqmask.interop.models import OpenedModel

_QUERIES, _NEIGHBOURS = 8, 7
_SHOWN_SKIPPED = 3


def embed(
    model: str,
    data: list[str],
    *,
    out: str | None = None,
    neighbours: bool = False,
    patches: bool = False,
    blocks: list[int] | None = None,
    feature: Literal["auto", "mean", "class_token"] = "auto",
    weights: str | None = None,
    image_size: int | None = None,
    crop: Literal["center", "whole"] = "center",
    value_range: str | None = None,
    pages: Literal["channels", "images"] = "channels",
    split: str = "all",
    labels: str | None = None,
    batch_size: int | str = "auto",
    workers: int | str = "auto",
    accelerator: str = "auto",
    devices: int | str = "auto",
    precision: Literal["32", "bf16"] = "32",
    overwrite: bool = False,
) -> Path:
    """Writes the features of images to a parquet or npy file; the same command goes on where it was cut short.

    A parquet file has the columns path, index, label, features and, if asked, patches (row by row) and
    block_N; a npy file one array, with path, index and label of each row in a csv file beside it.

    Args:
        model: a run folder, an exported folder, timm:NAME or random:NAME.
        data: folders or files of images, as for pretrain.
        out: a .parquet or .npy file; the default is embeddings.parquet, in the run folder if model is one.
        neighbours: also draw some images with their nearest neighbours, to see what the model finds alike.
        patches: also the features of every patch.
        blocks: also the mean feature of these blocks or stages, counted from 0.
        feature: what stands for an image; auto is the mean of the map, and the class token for FOLK.
        weights: teacher or student of a FOLK run; the default is what the run exports.
        image_size: side in pixels that the network sees; the default is what it was trained at.
        crop: center takes the largest centred square, whole the whole picture, distorted to a square.
        value_range: the values that become 0 and 1 (dtype or LOW,HIGH); the default is the model's own.
        pages: what the pages of a TIFF are.
        split: all, auto or the name of a split.
        labels: a CSV table with the columns path and label.
        batch_size: images at once on a device.
        workers: loader processes of each device.
        accelerator: auto, cpu, cuda or mps.
        devices: how many; auto is all GPUs, else one.
        precision: 32 or bf16; bf16 is faster and rounds to three digits.
        overwrite: replace a file that holds something else.

    Returns:
        The file.

    Raises:
        UserError: the model or the data cannot be opened, or out cannot be written.
    """
    from freqmask.data.sources import open_source
    from freqmask.data.values import ValueRange
    from freqmask.interop.embed import Wanted, plan_parts
    from freqmask.interop.export import pooled_of
    from freqmask.interop.models import open_model
    from freqmask.interop.outputs import check_out
    from freqmask.interop.tables import SUFFIXES

    opened = open_model(model, image_size=image_size, weights=weights)
    if value_range is not None:
        opened.value_range = (ValueRange.parse(value_range) or opened.values).describe()
    source = open_source([data] if isinstance(data, str) else data, pages=pages, split=split, labels=labels)
    path = Path(out) if out is not None else _default_out(opened)
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"out ({path}) must end in .parquet or .npy; try --out {path.with_suffix('.parquet')}"
        )
    if path.suffix == ".npy" and patches and blocks:
        raise UserError("a .npy holds one array: ask for patches or blocks, or --out FILE.parquet for both")
    pooled = pooled_of(opened.facts.get("method"), opened) if feature == "auto" else feature
    if pooled == "class_token" and not opened.backbone.has_class_token:
        raise UserError(f"feature (class_token): {opened.name} has none; try --feature mean")
    wanted = Wanted(pooled, patches, tuple(_checked_blocks(blocks, opened)), crop, precision)
    parts = plan_parts(opened, source, path, wanted)
    if _is_there(path, parts.task):
        say(f"embeddings  {path} is there already, of the same images and weights")
    else:
        check_out(path, overwrite, folder=False)
        place = _place(batch_size, workers, accelerator)
        processes = _processes(devices, place)
        embedding = _run(opened, source, path, wanted, place, processes)
        _tell(embedding, opened, len(source))
    if neighbours:
        from freqmask.commands.sheets import draw_neighbours

        say(f"look at     {draw_neighbours(path, opened, source, _QUERIES, _NEIGHBOURS)}")
    return path


def _default_out(opened: OpenedModel) -> Path:
    name = "embeddings.parquet"
    return opened.folder.parent / name if opened.kind == "run" and opened.folder is not None else Path(name)


def _checked_blocks(blocks: list[int] | None, opened: OpenedModel) -> list[int]:
    count = len(opened.module.feature_info)
    for number in blocks or []:
        if not -count <= number < count:
            raise UserError(f"blocks ({number}) must be from 0 to {count - 1} for {opened.name}")
    return sorted({number % count for number in blocks or []})


def _is_there(path: Path, task: dict[str, Any]) -> bool:
    """Whether the file holds the features asked for."""
    from freqmask.interop.tables import task_of

    return path.is_file() and task_of(path) == task


def _place(batch_size: int | str, workers: int | str, accelerator: str) -> Place:
    from freqmask.interop.embed import Place
    from freqmask.pretraining.resolve import pick_device
    from freqmask.pretraining.settings import check_accelerator
    from freqmask.training.plan import choose_workers

    check_accelerator(accelerator)
    device = pick_device(accelerator)
    batch = (256 if device.type == "cuda" else 32) if batch_size == "auto" else batch_size
    loaders = choose_workers(device.type == "cuda").value if workers == "auto" else workers
    for name, value, least in (("batch_size", batch, 1), ("workers", loaders, 0)):
        if not isinstance(value, int) or value < least:
            raise UserError(f"{name} ({value}) must be a whole number of at least {least}, or auto")
    return Place(device.type, 0, 1, int(batch), int(loaders))


def _processes(devices: int | str, place: Place) -> int:
    import torch

    here = torch.cuda.device_count() if place.device == "cuda" else 1
    if devices == "auto":
        return here
    if not isinstance(devices, int) or devices < 1 or (place.device == "cuda" and devices > here):
        raise UserError(f"devices ({devices}) must be auto or from 1 to {here}")
    return devices


def _run(
    opened: OpenedModel, source: Source, path: Path, wanted: Wanted, place: Place, processes: int
) -> Embedding:
    """Compute the parts, here or in several processes, and join them."""
    from freqmask.interop.embed import compute_parts, finish, plan_parts
    from freqmask.training.progress import Progress

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
    from torch.multiprocessing.spawn import spawn

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
    from dataclasses import replace

    from freqmask.interop.embed import compute_parts, plan_parts

    os.environ["LOCAL_RANK"] = str(rank)  # the first process alone speaks
    device = f"cuda:{rank}" if place.device == "cuda" else place.device
    parts = plan_parts(opened, source, path, wanted)
    compute_parts(
        opened, source, parts, wanted, replace(place, device=device, rank=rank, world_size=processes)
    )


def _tell(embedding: Embedding, opened: OpenedModel, images: int) -> None:
    say(f"embeddings  {embedding.path}: {embedding.rows:,} of {images:,} images, {opened.name}")
    for name, reason in embedding.skipped[:_SHOWN_SKIPPED]:
        say(f"            left out: {name}: {reason}")
    if len(embedding.skipped) > _SHOWN_SKIPPED:
        say(f"            ... and {len(embedding.skipped) - _SHOWN_SKIPPED} more that cannot be read")
