"""Features of many images, in parts that survive a kill: how ``freqmask embed`` and ``predict`` are carried out."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freqmask.console import Progress, plain_name, say
from freqmask.data.loader import TrainDataset, make_loader
from freqmask.data.sampler import ChosenSampler
from freqmask.data.source import Source
from freqmask.errors import UserError
from freqmask.images import as_float
from freqmask.interop.feature_files import Parts, PartWriter
from freqmask.interop.feature_space import features_by_name
from freqmask.interop.models import OpenedModel, still_images
from freqmask.training.auto import check_started_once, choose_devices, choose_workers, pick_device
from freqmask.training.worker_pool import DiedError, WorkerPool

_SHOWN_SKIPPED = 3


class FeatureTask(ABC):
    """What is computed of images. It is sent to the processes that compute it.

    Attributes:
        precision: ``32``, or ``bf16`` for autocast.
    """

    precision = "32"

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain values that decide the features, beside the images."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers of one image."""

    @abstractmethod
    def dataset(self, source: Source) -> TrainDataset:
        """The images as the network is given them."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move the network."""

    @abstractmethod
    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """Features (B, D) by name, of images (B, C, H, W) in [0, 1]."""


@dataclass(frozen=True)
class EmbedConfig:
    """Which features.

    Attributes:
        pooled: what stands for the image: the mean of the map, the class token, or the digest of the model's space.
        patches: whether the map comes along.
        blocks: stages (for a ViT: blocks) whose mean comes along.
        crop: ``center`` (the largest centered window), ``whole`` (the image, distorted to the size) or ``native`` (the
            middle at its own resolution).
        precision: ``32``, or ``bf16`` for autocast.
    """

    pooled: str = "mean"
    patches: bool = False
    blocks: tuple[int, ...] = ()
    crop: str = "center"
    precision: str = "32"


class Embedding(FeatureTask):
    """The features of a backbone: ``features`` (B, D), ``patches`` (B, h * w * D), row by row, ``block_i`` (B, D_i)."""

    def __init__(self, opened: OpenedModel, config: EmbedConfig | None = None) -> None:
        self.opened, self.config = opened, config or EmbedConfig()
        self.precision = self.config.precision

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.opened.name,
            "weights": self.opened.weights_hash,
            "input_size": list(self.opened.input_size),
            "value_range": self.opened.value_range,
            **asdict(self.config),
            "blocks": list(self.config.blocks),
        }

    @property
    def grid(self) -> tuple[int, int, int]:
        """Rows, columns and width of the patches."""
        backbone = self.opened.backbone
        rows, columns = (side // backbone.stride for side in backbone.padded_size)
        return rows, columns, backbone.feature_dim

    @property
    def width(self) -> int:
        rows, columns, dim = self.grid
        return dim * (1 + self.config.patches * rows * columns + len(self.config.blocks))

    def dataset(self, source: Source) -> TrainDataset:
        return still_images(self.opened, source, self.config.crop)

    def to(self, device: torch.device) -> None:
        self.opened.backbone.to(device)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        opened, config = self.opened, self.config
        normalized, features = opened.normalise(images), {}
        is_space = opened.space is not None and config.pooled == opened.space.digest
        if is_space:
            features["features"] = opened.space.apply(
                features_by_name(opened, normalized, opened.space.parts)
            )
        if not is_space or config.patches:
            output = opened.backbone(normalized)
            is_token = config.pooled == "class_token" and output.class_token is not None
            features.setdefault("features", output.class_token if is_token else output.pooled)
        if config.patches:
            features["patches"] = output.feature_map.permute(0, 2, 3, 1).flatten(1)
        if config.blocks:
            # timm gives the stages in the model's order, each once, whatever the order they were asked in
            blocks = sorted(set(config.blocks))
            stages = opened.stages(normalized, blocks)
            features |= {f"block_{n}": stage.pooled for n, stage in zip(blocks, stages, strict=True)}
        return {name: tensor.float() for name, tensor in features.items()}


@dataclass
class ComputeConfig:
    """Images at once, and loader processes, of one device."""

    batch_size: int = 32
    workers: int = 0


def choose_compute(
    batch_size: int | str, workers: int | str, accelerator: str, devices: int | str, command: str = "embed"
) -> tuple[ComputeConfig, list[torch.device]]:
    """Batch and workers of a device, and the devices, every auto resolved.

    Raises:
        UserError: a device that is not here, or a number out of range.
    """
    device = pick_device(accelerator)
    check_started_once(command)
    chosen = choose_devices(devices, device, accelerator)
    if batch_size == "auto":
        batch_size = 256 if device.type == "cuda" else 32
    if workers == "auto":
        workers = max(choose_workers(device.type == "cuda").value // len(chosen), 1)
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
        if not isinstance(value, int) or value < least:
            raise UserError(f"{name} ({value}) must be a whole number of at least {least}, or auto")
    return ComputeConfig(int(batch_size), int(workers)), chosen


def plan_parts(task: FeatureTask, source: Source, out: Path) -> Parts:
    """The parts of a file of features."""
    described = {**task.describe(), "data": source.fingerprint(), "images": len(source)}
    return Parts(out, described, len(source), 4 * task.width)


def compute(
    task: FeatureTask, source: Source, parts: Parts, config: ComputeConfig, devices: list[torch.device]
) -> None:
    """Compute the parts, here or in a process a device, with a progress bar.

    Raises:
        UserError: a process died; the same command computes what is missing.
    """
    whole = parts.begin()
    if whole:
        say(f"resumes     {whole} of {parts.count} parts are whole from before")
    todo = sum(len(parts.indices(number)) for number in parts.missing())
    began, done = time.monotonic(), 0
    progress = Progress(todo, 0, {"rate": "{:.0f} images/s"}, unit="image")
    progress.start()
    ranks = [rank for rank in range(len(devices)) if parts.missing(rank, len(devices))]
    arguments = [(task, source, parts, config, rank, len(devices)) for rank in ranks]
    try:
        with closing(WorkerPool(devices)) as pool:
            for number in pool.run(compute_share, arguments, [task, source]) if arguments else ():
                done += number
                progress.update(done, {"rate": done / max(time.monotonic() - began, 1e-9)})
    except DiedError as error:
        raise UserError(f"{error}; the same command resumes from the parts that are whole") from error
    finally:
        progress.close()


def compute_share(
    device: torch.device,
    task: FeatureTask,
    source: Source,
    parts: Parts,
    config: ComputeConfig,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[int]:
    """Every ``world_size``-th missing part, from ``rank``; yields how many images each batch had."""
    indices = [index for number in parts.missing(rank, world_size) for index in parts.indices(number)]
    writer = PartWriter(source, parts)
    task.to(device)
    for features, batch in _one_behind(_features(device, task, source, indices, config)):
        host = {name: tensor.cpu().numpy() for name, tensor in features.items()}
        writer.add(batch.wanted, batch.is_read, host, batch.labels.numpy(), batch.reasons)
        yield len(batch.wanted)


def _features(
    device: torch.device, task: FeatureTask, source: Source, indices: list[int], config: ComputeConfig
) -> Iterator[tuple[dict[str, Tensor], ImageBatch]]:
    """Batches of features, still on the device."""
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, task.precision == "bf16"):
        for batch in image_batches(task.dataset(source), source, indices, config):
            yield task.compute(as_float(batch.views[0].to(device, non_blocking=True))), batch


def _one_behind(batches: Iterator[Any]) -> Iterator[Any]:
    """While a GPU computes a batch, the one before is copied and written."""
    before = next(batches, None)
    for batch in batches:
        yield before
        before = batch
    if before is not None:
        yield before


@dataclass
class ImageBatch:
    """Views (B, C, H, W) of images in order; where one cannot be read, another one stands in its place.

    Attributes:
        wanted: indices (B,).
        is_read: False (B,) where another image was read instead.
        views: as the dataset makes them.
        labels: (B,), -1 where there is none.
        reasons: name of an image to why it cannot be read.
    """

    wanted: np.ndarray
    is_read: np.ndarray
    views: list[Tensor]
    labels: Tensor
    reasons: dict[str, str]


def image_batches(
    dataset: TrainDataset, source: Source, indices: Sequence[int], config: ComputeConfig
) -> Iterator[ImageBatch]:
    """The images, each once, in order."""
    done, size = 0, min(config.batch_size, max(len(indices), 1))
    for batch in make_loader(dataset, ChosenSampler(indices), size, config.workers) if indices else ():
        wanted = np.array(indices[done : done + len(batch["indices"])])
        is_read = batch["indices"].numpy() == wanted
        unread = {source.name(int(index)) for index in wanted[~is_read]}
        reasons = {name: reason for name, reason in batch["skipped"] if name in unread}
        done += len(wanted)
        yield ImageBatch(wanted, is_read, batch["views"], batch["labels"], reasons)


def say_left_out(skipped: Sequence[tuple[str, str]]) -> None:
    """Names the first images that could not be read, and how many more there are."""
    for name, reason in skipped[:_SHOWN_SKIPPED]:
        say(f"            left out: {plain_name(name)}: {reason}")
    if len(skipped) > _SHOWN_SKIPPED:
        say(f"            ... and {len(skipped) - _SHOWN_SKIPPED} more that cannot be read")


def checked_blocks(blocks: list[int] | None, opened: OpenedModel) -> tuple[int, ...]:
    """The blocks asked for, counted from 0, each once.

    Raises:
        UserError: the model has no such block.
    """
    count = len(opened.module.feature_info)
    for number in blocks or []:
        if not -count <= number < count:
            raise UserError(f"blocks ({number}) must be from 0 to {count - 1} for {opened.name}")
    return tuple(sorted({number % count for number in blocks or []}))
