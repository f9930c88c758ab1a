"""Frozen features, computed once and cached by weights, preprocessing and images."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freqmask.console import say
from freqmask.data.cache import cache_file, cache_folder, read_arrays, write_arrays
from freqmask.data.loader import make_loader
from freqmask.data.sampler import OrderedSampler
from freqmask.data.sources import Source
from freqmask.evaluation.subjects import Subject, as_float
from freqmask.training.progress import Progress

_LAYOUT = 1  # raised when the same key would mean other numbers
MOST_CACHED = 20_000_000_000  # bytes of features kept; the oldest go first
_READ = "read"  # the array beside the features that tells which images could be read


@dataclass(frozen=True)
class Place:
    """Where features are computed.

    Attributes:
        device: of torch.
        batch_size: images at once; None goes by their size.
        workers: loader processes.
        bf16: autocast to bfloat16.
        cache: whether features are looked for in the cache, and kept there.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None
    workers: int = 0
    bf16: bool = False
    cache: bool = True


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
    for asked, batch, features in _batches(subject, source, what, place, change):
        found = batch["indices"].numpy() == asked  # another image stands in for one that cannot be read
        reasons.update(batch["skipped"])
        for name, tensor in features.items():
            values = tensor.float().cpu().numpy()
            if name not in table.values:
                table.values[name] = np.zeros((len(source), values.shape[1]), np.float32)
            table.values[name][asked[found]] = values[found]
        table.read[asked[found]] = True
        done += len(asked)
        if progress is not None:
            progress.update(done, {})
    if progress is not None:
        progress.close()
    for index in np.flatnonzero(~table.read):
        name = source.name(int(index))
        table.skipped.append((name, reasons.get(name, "it cannot be read")))
    seconds = time.monotonic() - began
    if seconds > 1 and not quiet:
        say(f"features    {subject.name}: {done:,} images in {seconds:.0f} s")
    return table


def _batches(
    subject: Subject, source: Source, what: str, place: Place, change: ImageChange | None
) -> Iterator[tuple[np.ndarray, dict[str, Any], dict[str, Tensor]]]:
    """Numbers of the images asked for, the batch, its features."""
    dataset = subject.dataset(source)
    height, width = dataset.geometries[0].size
    size = place.batch_size or (256 if place.device.type == "cuda" or height * width <= 128**2 else 32)
    size = min(size, len(source))
    done = 0
    with torch.inference_mode(), torch.autocast(place.device.type, torch.bfloat16, place.bf16):
        for batch in make_loader(dataset, OrderedSampler(len(source)), size, place.workers):
            images = as_float(batch["views"][0].to(place.device, non_blocking=True))
            images = change(images) if change is not None else images
            asked = np.arange(done, done + len(images))
            done += len(images)
            yield asked, batch, subject.features(images, what)


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
