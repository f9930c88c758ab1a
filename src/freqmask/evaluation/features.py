"""Frozen features, computed once and cached by weights, preprocessing and images."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freqmask.console import Progress, launched_processes, rank, say
from freqmask.data.cache import cache_file, cache_folder, read_arrays, write_arrays
from freqmask.data.loader import ChosenSampler, TrainDataset, make_loader
from freqmask.data.source import Source, Subset, spread
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import EvalModel
from freqmask.spectrum import as_float
from freqmask.training.auto import choose_devices, choose_workers, pick_device, usable_cores
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
    def of(cls, options: Mapping[str, Any], command: str = "") -> ComputeConfig:
        """Where to compute, by the options of a command; on all of ``--devices`` where the command is named.

        Raises:
            UserError: there is no such device, or a launcher started the command several times.
        """
        device = pick_device(options["accelerator"])
        devices = [device]
        if command:
            check_started_once(command)
            devices = choose_devices(options.get("devices", 1), device, options["accelerator"])
        batch, workers = options["batch_size"], options["workers"]
        if workers == "auto":
            workers = choose_workers(device.type == "cuda", len(devices)).value
        if len(devices) > 1:
            count, threads, cores = len(devices), torch.get_num_threads(), usable_cores()
            words = f"{count} x {device.type}: each sees a part of the images; heads are trained on one"
            if device.type == "cpu" and count * threads > cores:
                faster = f"OMP_NUM_THREADS={max(cores // count, 1)} is faster"
                words += f" ({threads} threads each for {cores} cores; {faster})"
            say(f"devices     {words}")
        return cls(
            device=devices[0],
            batch_size=None if batch == "auto" else batch,
            workers=workers,
            bf16=options.get("precision") == "bf16",
            cache=options.get("cache", False),
            replicas=WorkerPool(devices) if len(devices) > 1 else None,
        )

    def images_at_once(self, height: int, width: int) -> int:
        """Images of a batch on a device, by their size where nothing was asked."""
        return self.batch_size or (256 if self.device.type == "cuda" or height * width <= 128**2 else 32)

    def run(
        self, work: Work, images: int, size: int, arguments: tuple[Any, ...], lasting: Sequence[object]
    ) -> Iterator[Any]:
        """Call ``work(device, range of images, *arguments)`` for all images, a part of them on each device.

        It yields something for each batch of ``size`` images; no more is promised of their order. ``lasting`` as for
        :meth:`freqmask.training.worker_pool.WorkerPool.run`.
        """
        if images:
            pool = self.replicas or WorkerPool([self.device])
            parts = part_images(images, size, len(pool))
            yield from pool.run(work, [(part, *arguments) for part in parts], lasting)

    def close(self) -> None:
        """End the processes of the other devices, if there are any."""
        if self.replicas is not None:
            self.replicas.close()


def check_started_once(command: str) -> None:
    """Raises a UserError where a launcher started this command several times: it starts its processes itself."""
    started = max(rank() + 1, launched_processes())
    if started > 1:
        raise UserError(
            f"{command} was started {started} times (torchrun, srun) and starts its processes itself; start it "
            f"once, with --devices {started}"
        )


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


class ImageChange:
    """What is done to images before a model sees them: nothing, a filter, a corruption."""

    def describe(self) -> str:
        """Tells changes apart in the cache."""
        return ""

    def in_loader(self, dataset: TrainDataset) -> TrainDataset:
        """The dataset that gives changed images, cut to the model's size."""
        return dataset

    def change(self, images: Tensor) -> Tensor:
        """A batch in [0, 1] on the device, changed."""
        return images


UNCHANGED = ImageChange()


def compute_features(
    model: EvalModel,
    source: Source,
    what: str,
    compute: ComputeConfig,
    change: ImageChange = UNCHANGED,
    quiet: bool = False,
) -> FeatureTable:
    """The features of every image, from the cache where they are there.

    Args:
        model: prepared on the device of ``compute``.
        source: the images.
        what: ``end`` or ``blocks``.
        compute: where.
        change: done to the images before.
        quiet: do not print how long it took.
    """
    key = {
        **model.key(),
        "what": what,
        "data": source.content_stamp(),
        "images": len(source),
        "bf16": compute.bf16,
        "change": change.describe(),
        "layout": _LAYOUT,
    }
    file = cache_file("features", key)
    cached = read_arrays(file, holding=[_READ]) if compute.cache else None
    if cached is not None:
        about, arrays = cached
        read = arrays.pop(_READ).astype(bool)
        if not any_shown(model.dataset(source), np.flatnonzero(~read)):
            return FeatureTable(arrays, read, [(n, r) for n, r in about["skipped"]])
    table = _compute(model, source, what, compute, change, quiet)
    if compute.cache:
        arrays = {**table.values, _READ: table.read.astype(np.uint8)}
        write_arrays(file, {"key": key, "skipped": table.skipped}, arrays)
        prune()
    return table


def any_shown(dataset: TrainDataset, images: np.ndarray) -> bool:
    """Whether one of some images that could not be shown can be now: a right or the disk was missing then.

    Of many a few are tried. An image of channels that the model does not take is none of them.
    """
    for index in spread(images, 16).tolist():
        with suppress(UserError):  # image after image is bad
            if dataset[0, 0, index].index == index:
                return True
    return False


def _compute(
    model: EvalModel,
    source: Source,
    what: str,
    compute: ComputeConfig,
    change: ImageChange,
    quiet: bool,
) -> FeatureTable:
    began, done = time.monotonic(), 0
    table = FeatureTable({}, np.zeros(len(source), bool))
    reasons: dict[str, str] = {}
    progress, is_shown = Progress(len(source), 0, {}, unit="image"), sys.stdout.isatty()
    progress.start()
    size = min(compute.images_at_once(*model.input_size[1:]), len(source))
    arguments = (model, source, what, size, compute.workers, compute.bf16, change)
    for batch in compute.run(_batches, len(source), size, arguments, shared_objects(model, source)):
        reasons.update(batch.reasons)
        for name, values in batch.features.items():
            if name not in table.values:
                table.values[name] = np.zeros((len(source), values.shape[1]), np.float32)
            table.values[name][batch.wanted[batch.is_read]] = values[batch.is_read]
        table.read[batch.wanted[batch.is_read]] = True
        done += len(batch.wanted)
        if is_shown:  # elsewhere it would be line after line
            progress.update(done, {})
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
    return [model, source]


def _batches(
    device: torch.device,
    images: range,
    model: EvalModel,
    source: Source,
    what: str,
    size: int,
    workers: int,
    bf16: bool,
    change: ImageChange,
) -> Iterator[FeatureBatch]:
    """The features of some images, batch by batch; in whatever process."""
    dataset = change.in_loader(model.dataset(source))
    return feature_batches(
        device, images, dataset, lambda views: model.features(change.change(views), what), size, workers, bf16
    )


@dataclass(frozen=True)
class FeatureBatch:
    """Images in their order; where one cannot be read, a fallback was computed in its stead."""

    wanted: np.ndarray  # (image,) their numbers
    is_read: np.ndarray  # (image,) False where it is a fallback's
    labels: np.ndarray  # (image,) -1 where there is none
    features: dict[str, np.ndarray]  # name -> (image, dim) float32
    reasons: dict[str, str]  # name of an image, fallbacks among them -> why it cannot be read


def feature_batches(
    device: torch.device,
    images: Sequence[int],
    dataset: TrainDataset,
    features: Callable[[Tensor], dict[str, Tensor]],
    size: int,
    workers: int,
    bf16: bool,
) -> Iterator[FeatureBatch]:
    """What ``features`` gives of some images in [0, 1] (B, C, H, W), by name, batch by batch of ``size``."""

    def computed() -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, bf16):
            for batch in make_loader(dataset, ChosenSampler(images), max(min(size, len(images)), 1), workers):
                yield batch, features(as_float(batch["views"][0].to(device, non_blocking=True)))

    done = 0
    # one behind: while a GPU computes a batch, the one before is copied and used
    ahead: Iterator[Any] = itertools.chain(computed(), [None])
    for (batch, tensors), _ in itertools.pairwise(ahead):
        wanted = np.asarray(images[done : done + len(batch["indices"])])
        done += len(wanted)
        yield FeatureBatch(
            wanted,
            batch["indices"].numpy() == wanted,
            batch["labels"].numpy(),
            {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()},
            dict(batch["skipped"]),
        )


def not_finite(values: np.ndarray) -> int:
    """How many rows hold a number that is not finite."""
    return int((~np.isfinite(values).all(axis=1)).sum())


def prune(most: int = MOST_CACHED) -> None:
    """Drop the features that were written longest ago until the others fit."""
    with suppress(OSError):  # another process is at it
        files = sorted(cache_folder().glob("features-*.bin"), key=lambda file: file.stat().st_mtime)
        sizes = [file.stat().st_size for file in files]
        total = sum(sizes)
        for file, size in zip(files[:-1], sizes[:-1], strict=True):
            if total <= most:
                break
            file.unlink(missing_ok=True)
            total -= size
