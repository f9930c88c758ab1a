"""Features of images on their way to the disk: computed in parts, joined at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from freqmask.data.loader import TrainDataset, make_loader
from freqmask.data.source import Source
from freqmask.data.transforms import Box, Geometry
from freqmask.errors import UserError
from freqmask.interop.feature_space import features_by_name
from freqmask.interop.models import OpenedModel
from freqmask.interop.parts import Parts, Rows
from freqmask.interop.tables import join_parts


@dataclass(frozen=True)
class Wanted:
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


@dataclass
class Place:
    """Who computes: this process among several, and on what.

    Attributes:
        device: torch's name of it.
        rank: this process, from 0.
        world_size: processes.
        batch_size: images at once.
        workers: loader processes.
    """

    device: str = "cpu"
    rank: int = 0
    world_size: int = 1
    batch_size: int = 32
    workers: int = 0


@dataclass
class Embedding:
    """What was written.

    Attributes:
        path: the file.
        rows: images in it.
        computed: images computed now, the others being there from before.
        skipped: (name, reason) of images that could not be read.
    """

    path: Path
    rows: int
    computed: int
    skipped: list[tuple[str, str]] = field(default_factory=list)


class MiddleWindow(Geometry):
    """The middle of an image at its own resolution, for models that were trained with ``--crop native``."""

    def box(self, picture_size: tuple[int, int], key: int, attempt: int = 0) -> Box:
        """The window of the view's size in the middle."""
        _, _, height, width = super().box(picture_size, key, attempt)
        return ((picture_size[0] - height) // 2, (picture_size[1] - width) // 2, height, width)


def still_geometry(opened: OpenedModel, crop: str = "auto") -> Geometry:
    """One window of the model's size, neither random nor flipped.

    Args:
        opened: the model.
        crop: ``center``, ``whole``, ``native``, or ``auto``: native where it was trained so, else center.
    """
    if crop == "auto":
        crop = "native" if opened.trained_crop == "native" else "center"
    kind = MiddleWindow if crop == "native" else Geometry
    return kind(image_size=opened.backbone.image_size, crop=crop, horizontal_flip=0.0)


def still_images(opened: OpenedModel, source: Source, crop: str = "auto") -> TrainDataset:
    """The images as an evaluation sees them, see :func:`still_geometry`."""
    geometry = still_geometry(opened, crop)
    return TrainDataset(source, [geometry], opened.values, opened.input_size[0], convert_channels=True)


def plan_parts(opened: OpenedModel, source: Source, out: Path, wanted: Wanted) -> Parts:
    """The parts of a task."""
    backbone = opened.backbone
    cells = (backbone.padded_size[0] // backbone.stride) * (backbone.padded_size[1] // backbone.stride)
    floats = backbone.feature_dim * (1 + wanted.patches * cells + len(wanted.blocks))
    task = {
        "model": opened.name,
        "weights": opened.weights_hash,
        "data": source.fingerprint(),
        "images": len(source),
        "input_size": list(opened.input_size),
        "value_range": opened.value_range,
        **asdict(wanted),
        "blocks": list(wanted.blocks),
    }
    return Parts(out, task, len(source), 4 * floats)


def compute_parts(
    opened: OpenedModel,
    source: Source,
    parts: Parts,
    wanted: Wanted,
    place: Place,
    report: Callable[[int], None] = lambda images: None,
) -> int:
    """Compute this process's missing parts.

    Args:
        opened: the model; moved to the device.
        source: the images.
        parts: begun.
        wanted: which features.
        place: where.
        report: called with the number of images done.

    Returns:
        Images computed.
    """
    done = 0
    for number in work_through(opened, source, parts, wanted, place):
        done += number
        report(done)
    return done


def work_through(
    opened: OpenedModel, source: Source, parts: Parts, wanted: Wanted, place: Place
) -> Iterator[int]:
    """The same, batch by batch: yields how many images each had."""
    missing = parts.missing(place.rank, place.world_size)
    items = [(0, index, index) for number in missing for index in parts.indices(number)]
    if not items:
        return
    opened.backbone.to(place.device)
    dataset = still_images(opened, source, wanted.crop)
    loader = make_loader(dataset, items, min(place.batch_size, len(items)), place.workers)  # type: ignore[arg-type]
    rows = Rows(source, parts, missing)
    done = 0
    for number, features in _ahead(_features(opened, loader, wanted, place)):
        asked = [index for _, _, index in items[done : done + number]]
        done += number
        rows.add(asked, *features)
        yield number


def _features(
    opened: OpenedModel, loader: Any, wanted: Wanted, place: Place
) -> Iterator[tuple[int, tuple[dict[str, Tensor], Tensor, Tensor, list[tuple[str, str]]]]]:
    """Batches of features, still on the device."""
    device = torch.device(place.device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, wanted.precision == "bf16"):
        for batch in loader:
            images = batch["views"][0].to(device, non_blocking=True)
            images = images.float().div_(255) if images.dtype == torch.uint8 else images
            features = compute_features(opened, opened.normalise(images), wanted)
            yield len(images), (features, batch["indices"], batch["labels"], batch["skipped"])


def compute_features(opened: OpenedModel, normalised: Tensor, wanted: Wanted) -> dict[str, Tensor]:
    """The features of one batch.

    Args:
        opened: the model.
        normalised: images (B, C, H, W) as the backbone takes them.
        wanted: which features.

    Returns:
        ``features`` (B, D), ``patches`` (B, h * w * D), row by row, and ``block_i`` (B, D_i).
    """
    if opened.space is not None and wanted.pooled == opened.space.digest:
        chosen = opened.space.apply(features_by_name(opened, normalised, opened.space.parts))
        if not wanted.patches and not wanted.blocks:
            return {"features": chosen}
        plain = compute_features(opened, normalised, replace(wanted, pooled="mean"))
        return {**plain, "features": chosen}
    seen = opened.backbone(normalised)
    token = wanted.pooled == "class_token" and seen.class_token is not None
    features = {"features": seen.class_token if token else seen.pooled}
    if wanted.patches:
        features["patches"] = seen.feature_map.permute(0, 2, 3, 1).flatten(1)
    if wanted.blocks:
        stages = opened.stages(normalised, wanted.blocks)
        # timm gives the stages in the model's order, each once, whatever the order they were asked in
        features |= {f"block_{n}": s.pooled for n, s in zip(sorted(set(wanted.blocks)), stages, strict=True)}
    return {name: tensor.float() for name, tensor in features.items()}


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """One batch behind: while a GPU computes a batch, the one before is copied and written."""
    before = None
    for batch in batches:
        if before is not None:
            yield before
        before = batch
    if before is not None:
        yield before


def finish(opened: OpenedModel, out: Path, parts: Parts, wanted: Wanted, computed: int) -> Embedding:
    """Join the parts into the file and drop them.

    Raises:
        UserError: a part is missing, or no image could be read.
    """
    paths = [parts.path(number) for number in range(parts.count)]
    lacking = [path.name for path in paths if not path.is_file()]
    if lacking:
        raise UserError(f"{len(lacking)} parts of {out} are missing; the same command computes them")
    schemas = [pq.read_schema(path) for path in paths]
    skipped = [
        (str(name), str(reason))
        for schema in schemas
        for name, reason in json.loads((schema.metadata or {}).get(b"skipped", b"[]"))
    ]
    grid = (opened.backbone.padded_size[0] // opened.backbone.stride, -1, opened.backbone.feature_dim)
    rows = join_parts(paths, out, parts.task, grid if wanted.patches else None)
    shutil.rmtree(parts.folder, ignore_errors=True)
    return Embedding(out, rows, computed, skipped)
