"""Frozen features, computed once and cached by weights, preprocessing and images."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freqmask.console import Progress, say
from freqmask.data.cache import cache_file, cache_folder, read_arrays, write_arrays
from freqmask.data.loader import make_loader
from freqmask.data.sampler import ChosenSampler
from freqmask.data.source import Source, Subset
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import EvalModel
from freqmask.images import as_float
from freqmask.training.auto import (
    check_started_once,
    choose_devices,
    choose_workers,
    pick_device,
    usable_cores,
)
from freqmask.training.worker_pool import Work, WorkerPool

_LAYOUT = 1  # raised when the same key would mean other numbers
MOST_CACHED = 20_000_000_000  # bytes of features kept; the oldest go first
_READ = "read"  # the array beside the features that tells which images could be read


@dataclass(frozen=True)
class ComputeConfig:
    """Where features are computed."""

    # of torch; the first of several: heads learn there
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None  # images at once on a device; None goes by their size
    workers: int = 0  # loader processes of each device
    bf16: bool = False  # autocast to bfloat16
    cache: bool = True  # whether features are looked for in the cache, and kept there
    # the devices that share the images; None is the one device alone
    replicas: WorkerPool | None = field(default=None, compare=False)

    @classmethod
    def of(cls, options: Mapping[str, Any], parallel: bool = False) -> ComputeConfig:
        """Where to compute, by the options of a command; on all of ``--devices`` where ``parallel``.

        Raises:
            UserError: there is no such device, or a number is out of its range.
        """
        device = pick_device(options["accelerator"])
        batch, workers = options["batch_size"], options["workers"]
        loaders = choose_workers(device.type == "cuda").value if workers == "auto" else workers
        batch = None if batch == "auto" else batch
        for name, value, least in (("batch_size", batch, 1), ("workers", loaders, 0)):
            if value is not None and (not isinstance(value, int) or value < least):
                raise UserError(f"{name} ({value}) must be a whole number of at least {least}, or auto")
        compute = cls(device, batch, int(loaders), options["precision"] == "bf16", options["cache"])
        if not parallel:
            return compute
        check_started_once("evaluate")
        devices = choose_devices(options["devices"], device, options["accelerator"])
        if len(devices) == 1:
            return compute
        if workers == "auto":
            loaders = max(int(loaders) // len(devices), 1)
        say(f"devices     {_describe_devices(devices)}")
        return replace(compute, device=devices[0], workers=int(loaders), replicas=WorkerPool(devices))

    def run(
        self, work: Work, images: int, size: int, arguments: tuple[Any, ...], lasting: Sequence[object]
    ) -> Iterator[Any]:
        """Call ``work(device, range of images, *arguments)`` for all images, a part of them on each device.

        It yields something for each batch of ``size`` images; no more is promised of their order. ``lasting`` as for
        :meth:`freqmask.training.worker_pool.WorkerPool.run`.
        """
        if self.replicas is None:
            yield from work(self.device, range(images), *arguments)
            return
        parts = part_images(images, size, len(self.replicas))
        yield from self.replicas.run(work, [(part, *arguments) for part in parts], lasting)

    def close(self) -> None:
        """End the processes of the other devices, if there are any."""
        if self.replicas is not None:
            self.replicas.close()


def _describe_devices(devices: Sequence[torch.device]) -> str:
    count, threads, cores = len(devices), torch.get_num_threads(), usable_cores()
    words = f"{count} x {devices[0].type}: each sees a part of the images; heads are trained on one"
    if devices[0].type == "cpu" and count * threads > cores:
        words += (
            f" ({threads} threads each for {cores} cores; OMP_NUM_THREADS={max(cores // count, 1)} is faster)"
        )
    return words


def part_images(images: int, size: int, parts: int) -> list[range]:
    """Ranges of images of whole batches: the same batches, and so the same numbers, as in one range.

    There are fewer parts where there are fewer batches.
    """
    batches = -(-images // size)
    parts = min(parts, batches)
    edges = [min(batches * number // parts * size, images) for number in range(parts + 1)]
    return [range(first, end) for first, end in itertools.pairwise(edges)]


@dataclass
class FeatureTable:
    """Features of all images of a source."""

    values: dict[str, np.ndarray]  # name -> (image, dim) float32; rows of unreadable images are zero
    read: np.ndarray  # (image,) whether each could be read
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of those that could not

    @property
    def error(self) -> str:
        """What is wrong with the numbers; empty where nothing is. Such features are reported, never averaged."""
        broken = max((not_finite(values) for values in self.values.values()), default=0)
        return f"the features of {broken:,} images are not finite; no result" if broken else ""


ImageChange = Callable[[Tensor], Tensor]


def compute_features(
    model: EvalModel,
    source: Source,
    what: str,
    compute: ComputeConfig,
    change: ImageChange | None = None,
    change_name: str = "",
    quiet: bool = False,
) -> FeatureTable:
    """The features of every image, from the cache where they are there.

    Args:
        model: prepared on the device of ``compute``.
        source: the images.
        what: ``end`` or ``blocks``.
        compute: where.
        change: done to images in [0, 1] before the model, such as a filter.
        change_name: tells changes apart in the cache.
        quiet: do not print how long it took.
    """
    key = {
        **model.key(),
        "what": what,
        "data": source.fingerprint(),
        "images": len(source),
        "bf16": compute.bf16,
        "change": change_name,
        "layout": _LAYOUT,
    }
    file = cache_file("features", key)
    cached = read_arrays(file, holding=[_READ]) if compute.cache else None
    if cached is not None:
        about, arrays = cached
        values = {name: array for name, array in arrays.items() if name != _READ}
        return FeatureTable(values, arrays[_READ].astype(bool), [(n, r) for n, r in about["skipped"]])
    table = _compute(model, source, what, compute, change, quiet)
    if compute.cache:
        write_arrays(
            file, {"key": key, "skipped": table.skipped}, {**table.values, _READ: table.read.astype(np.uint8)}
        )
        prune()
    return table


def _compute(
    model: EvalModel,
    source: Source,
    what: str,
    compute: ComputeConfig,
    change: ImageChange | None,
    quiet: bool,
) -> FeatureTable:
    began = time.monotonic()
    table = FeatureTable({}, np.zeros(len(source), bool))
    reasons: dict[str, str] = {}
    progress = Progress(len(source), 0, {}, unit="image") if sys.stdout.isatty() else None
    if progress is not None:
        progress.start()
    done = 0
    height, width = model.input_size[1:]
    usual = 256 if compute.device.type == "cuda" or height * width <= 128**2 else 32
    size = min(compute.batch_size or usual, len(source))
    arguments = (model, source, what, size, compute.workers, compute.bf16, change)
    for batch in compute.run(_batches, len(source), size, arguments, shared_objects(model, source)):
        reasons.update(batch.skipped)
        for name, values in batch.features.items():
            if name not in table.values:
                table.values[name] = np.zeros((len(source), values.shape[1]), np.float32)
            table.values[name][batch.wanted[batch.is_read]] = values[batch.is_read]
        table.read[batch.wanted[batch.is_read]] = True
        done += len(batch.wanted)
        if progress is not None:
            progress.update(done, {})
    if progress is not None:
        progress.close()
    for index in np.flatnonzero(~table.read):
        name = source.name(int(index))
        table.skipped.append((name, reasons.get(name, "it cannot be read")))
    seconds = time.monotonic() - began
    if seconds > 1 and not quiet:
        say(f"features    {model.name} ({what}): {done:,} images in {seconds:.0f} s")
    return table


def shared_objects(model: EvalModel, source: Source) -> list[object]:
    """The heavy objects that every call needs, which are sent once: weights, and the whole list of images."""
    while isinstance(source, Subset):
        source = source.source
    return [getattr(model, "clean", model), source]  # of a `CorruptedModel` the model within


@dataclass(frozen=True)
class _Batch:
    wanted: np.ndarray  # (image,) their numbers
    is_read: np.ndarray  # (image,) False where a fallback replaces one that cannot be read
    features: dict[str, np.ndarray]  # name -> (image, dim) float32
    skipped: list[tuple[str, str]]  # (name, reason) of those that cannot be read


def _batches(
    device: torch.device,
    images: range,
    model: EvalModel,
    source: Source,
    what: str,
    size: int,
    workers: int,
    bf16: bool,
    change: ImageChange | None,
) -> Iterator[_Batch]:
    """The features of some images, batch by batch; in whatever process."""
    dataset = model.dataset(source)
    first = images.start
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, bf16):
        for batch in make_loader(dataset, ChosenSampler(images), size, workers):
            views = as_float(batch["views"][0].to(device, non_blocking=True))
            features = model.features(views if change is None else change(views), what)
            wanted = np.arange(first, first + len(views))
            first += len(views)
            values = {name: tensor.float().cpu().numpy() for name, tensor in features.items()}
            yield _Batch(wanted, batch["indices"].numpy() == wanted, values, batch["skipped"])


def not_finite(values: np.ndarray) -> int:
    """How many rows hold a number that is not finite."""
    return int((~np.isfinite(values).all(axis=1)).sum())


def prune(most: int = MOST_CACHED) -> None:
    """Drop the features that were written longest ago until the others fit."""
    try:
        files = sorted(cache_folder().glob("features-*.bin"), key=lambda file: file.stat().st_mtime)
        sizes = [file.stat().st_size for file in files]
        total = sum(sizes)
        for file, size in zip(files[:-1], sizes[:-1], strict=True):
            if total <= most:
                break
            file.unlink(missing_ok=True)
            total -= size
    except OSError:
        return  # another process is at it
