"""Frozen features, computed once and cached by weights, preprocessing and images."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freqmask.console import say
from freqmask.data.cache import cache_file, cache_folder, read_arrays, write_arrays
from freqmask.data.loader import make_loader
from freqmask.data.sampler import ChosenSampler
from freqmask.data.sources import Source
from freqmask.data.subset import Subset
from freqmask.evaluation.subjects import Subject, as_float
from freqmask.training.progress import Progress
from freqmask.training.replicas import Replicas, Work

_LAYOUT = 1  # raised when the same key would mean other numbers
MOST_CACHED = 20_000_000_000  # bytes of features kept; the oldest go first
_READ = "read"  # the array beside the features that tells which images could be read


@dataclass(frozen=True)
class Place:
    """Where features are computed.

    Attributes:
        device: of torch; the first of several: heads learn there.
        batch_size: images at once on a device; None goes by their size.
        workers: loader processes of each device.
        bf16: autocast to bfloat16.
        cache: whether features are looked for in the cache, and kept there.
        replicas: the devices among which images are parted; None is the one device alone.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None
    workers: int = 0
    bf16: bool = False
    cache: bool = True
    replicas: Replicas | None = field(default=None, compare=False)

    def run(
        self, work: Work, images: int, size: int, arguments: tuple[Any, ...], lasting: Sequence[object]
    ) -> Iterator[Any]:
        """Call ``work(device, range of images, *arguments)`` for all images, a part of them on each device.

        Args:
            work: yields something for each batch of its images; no more is promised of their order.
            images: how many.
            size: of a batch.
            arguments: further ones.
            lasting: see :meth:`freqmask.training.replicas.Replicas.run`.
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


def part_images(images: int, size: int, parts: int) -> list[range]:
    """Images parted into ranges of whole batches: the same batches, and so the same numbers, as in one range.

    Args:
        images: how many.
        size: of a batch.
        parts: how many are wanted; fewer where there are fewer batches.
    """
    batches = -(-images // size)
    parts = min(parts, batches)
    edges = [min(batches * number // parts * size, images) for number in range(parts + 1)]
    return [range(first, end) for first, end in itertools.pairwise(edges)]


@dataclass
class FeatureTable:
    """Features of all images of a source.

    Attributes:
        values: name -> (image, dim) float32; rows of unreadable images are zero.
        read: (image,) whether each could be read.
        skipped: (name, reason) of those that could not.
    """

    values: dict[str, np.ndarray]
    read: np.ndarray
    skipped: list[tuple[str, str]] = field(default_factory=list)


ImageChange = Callable[[Tensor], Tensor]


def compute_features(
    subject: Subject,
    source: Source,
    what: str,
    place: Place,
    change: ImageChange | None = None,
    change_name: str = "",
    quiet: bool = False,
) -> FeatureTable:
    """The features of every image, from the cache where they are there.

    Args:
        subject: the model, begun on the place's device.
        source: the images.
        what: ``end`` or ``blocks``.
        place: where to compute.
        change: done to images in [0, 1] before the model sees them, such as a filter.
        change_name: tells changes apart in the cache.
        quiet: say nothing of how long it took.

    Returns:
        The table.
    """
    key = {
        **subject.key(),
        "what": what,
        "data": source.fingerprint(),
        "images": len(source),
        "bf16": place.bf16,
        "change": change_name,
        "layout": _LAYOUT,
    }
    file = cache_file("features", key)
    cached = read_arrays(file, verify=False) if place.cache else None
    if cached is not None:
        about, arrays = cached
        values = {name: array for name, array in arrays.items() if name != _READ}
        return FeatureTable(values, arrays[_READ].astype(bool), [(n, r) for n, r in about["skipped"]])
    table = _compute(subject, source, what, place, change, quiet)
    if place.cache:
        write_arrays(
            file, {"key": key, "skipped": table.skipped}, {**table.values, _READ: table.read.astype(np.uint8)}
        )
        prune()
    return table


def _compute(
    subject: Subject, source: Source, what: str, place: Place, change: ImageChange | None, quiet: bool
) -> FeatureTable:
    began = time.monotonic()
    table = FeatureTable({}, np.zeros(len(source), bool))
    reasons: dict[str, str] = {}
    progress = Progress(len(source), 0, {}, unit="image") if sys.stdout.isatty() else None
    if progress is not None:
        progress.start()
    done = 0
    size = _batch_size(subject, source, place)
    arguments = (subject, source, what, size, place.workers, place.bf16, change)
    for seen in place.run(_see, len(source), size, arguments, lasting(subject, source)):
        reasons.update(seen.skipped)
        for name, values in seen.features.items():
            if name not in table.values:
                table.values[name] = np.zeros((len(source), values.shape[1]), np.float32)
            table.values[name][seen.asked[seen.found]] = values[seen.found]
        table.read[seen.asked[seen.found]] = True
        done += len(seen.asked)
        if progress is not None:
            progress.update(done, {})
    if progress is not None:
        progress.close()
    for index in np.flatnonzero(~table.read):
        name = source.name(int(index))
        table.skipped.append((name, reasons.get(name, "it cannot be read")))
    seconds = time.monotonic() - began
    if seconds > 1 and not quiet:
        say(f"features    {subject.name} ({what}): {done:,} images in {seconds:.0f} s")
    return table


def lasting(subject: Subject, source: Source) -> list[object]:
    """The heavy objects that one look after the other shares: weights, and the whole list of images."""
    while isinstance(source, Subset):
        source = source.source
    return [getattr(subject, "subject", subject), source]  # of a `CorruptedSubject` the model within


def _batch_size(subject: Subject, source: Source, place: Place) -> int:
    height, width = subject.dataset(source).geometries[0].size
    size = place.batch_size or (256 if place.device.type == "cuda" or height * width <= 128**2 else 32)
    return min(size, len(source))


@dataclass(frozen=True)
class _Seen:
    """A batch after a look.

    Attributes:
        asked: (image,) numbers of the images asked for.
        found: (image,) whether each is there; another one stands in for one that cannot be read.
        features: name -> (image, dim) float32.
        skipped: (name, reason) of those that cannot be read.
    """

    asked: np.ndarray
    found: np.ndarray
    features: dict[str, np.ndarray]
    skipped: list[tuple[str, str]]


def _see(
    device: torch.device,
    images: range,
    subject: Subject,
    source: Source,
    what: str,
    size: int,
    workers: int,
    bf16: bool,
    change: ImageChange | None,
) -> Iterator[_Seen]:
    """The features of some images, batch by batch; in whatever process."""
    dataset = subject.dataset(source)
    first = images.start
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, bf16):
        for batch in make_loader(dataset, ChosenSampler(images), size, workers):
            views = as_float(batch["views"][0].to(device, non_blocking=True))
            features = subject.features(views if change is None else change(views), what)
            asked = np.arange(first, first + len(views))
            first += len(views)
            values = {name: tensor.float().cpu().numpy() for name, tensor in features.items()}
            yield _Seen(asked, batch["indices"].numpy() == asked, values, batch["skipped"])


def not_finite(values: np.ndarray) -> int:
    """How many rows hold a number that is not finite; such features are reported, never averaged."""
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
