"""Features of images on their way to the disk: computed in parts that survive a kill, joined at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from freqmask.data.loader import TrainDataset, make_loader
from freqmask.data.pixels import Box
from freqmask.data.source import Source
from freqmask.data.transforms import Geometry
from freqmask.errors import UserError
from freqmask.interop.feature_space import features_by_name
from freqmask.interop.feature_tables import join_parts
from freqmask.interop.models import OpenedModel
from freqmask.training.files import replace_atomically

_PART_BYTES = 256 * 2**20  # of features in memory before a part is written
_MOST_IMAGES = 8192  # of a part: no more than these are computed again after a crash
_FEWEST_IMAGES = 64


class Parts:
    """The scratch folder beside the file, with a note of what its parts are.

    Args:
        out: the file to be written.
        task: plain values that decide what the file will hold.
        images: in the source.
        row_bytes: of one image's features.
    """

    def __init__(self, out: Path, task: dict[str, Any], images: int, row_bytes: int) -> None:
        self.folder = out.with_name(f".{out.name}.parts")
        # at least some thirty parts, so that there is one for every device
        self.size = max(
            1, min(_MOST_IMAGES, _PART_BYTES // max(row_bytes, 1), max(_FEWEST_IMAGES, images // 32))
        )
        self.count = -(-images // self.size)
        self.images = images
        self.task = task
        self._note = json.dumps({**task, "part_size": self.size})

    def begin(self) -> int:
        """Make the folder, or keep what an earlier start of the same task left; how many parts are there."""
        note = self.folder / "task.json"
        if not note.is_file() or note.read_text(encoding="utf-8") != self._note:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            replace_atomically(note, lambda path: _write_text(path, self._note))
        return sum(self.path(number).is_file() for number in range(self.count))

    def path(self, number: int) -> Path:
        """Where a part lives."""
        return self.folder / f"part-{number:06d}.parquet"

    def missing(self, rank: int, world_size: int) -> list[int]:
        """The parts that a process has still to compute."""
        own = range(rank, self.count, world_size)
        return [number for number in own if not self.path(number).is_file()]

    def indices(self, number: int) -> range:
        """The images of a part."""
        return range(number * self.size, min((number + 1) * self.size, self.images))


class Rows:
    """Gathers the rows of parts and writes each part when it is whole.

    Args:
        source: gives names.
        parts: where they are written.
        missing: the parts that are coming, in order.
    """

    def __init__(self, source: Source, parts: Parts, missing: list[int]) -> None:
        self.source = source
        self.parts = parts
        self.missing = missing
        self.tables: list[pa.Table] = []
        self.skipped: dict[str, str] = {}

    def add(
        self,
        asked: list[int],
        features: dict[str, Tensor],
        indices: Tensor,
        labels: Tensor,
        skipped: list[tuple[str, str]],
    ) -> None:
        """Take a batch; where another image stands in for one that cannot be read, it is dropped."""
        wanted = np.array(asked)
        read = indices.numpy() == wanted
        unread = {self.source.name(int(index)) for index in wanted[~read]}
        reasons = {name: reason for name, reason in skipped if name in unread}
        host = {name: tensor.cpu().numpy() for name, tensor in features.items()}
        owners = wanted // self.parts.size
        for number in dict.fromkeys(owners.tolist()):
            mine = owners == number
            self.tables.append(self._table(wanted, labels.numpy(), host, mine & read))
            self.skipped |= {
                name: reasons.get(name, "it cannot be read")
                for name in (self.source.name(int(index)) for index in wanted[mine & ~read])
            }
            if wanted[mine][-1] == self.parts.indices(number)[-1]:
                self._write(number)

    def _table(
        self, indices: np.ndarray, labels: np.ndarray, features: dict[str, np.ndarray], rows: np.ndarray
    ) -> pa.Table:
        names = self.source.class_names
        labels = labels[rows]
        columns: dict[str, pa.Array] = {
            "path": pa.array([_text(self.source.name(int(index))) for index in indices[rows]], pa.string()),
            "index": pa.array(indices[rows], pa.int64()),
            "label": pa.array(labels, pa.int64(), mask=labels < 0),
        }
        if names is not None:
            columns["class"] = pa.array(
                [names[n] if 0 <= n < len(names) else None for n in labels], pa.string()
            )
        for name, values in features.items():
            flat = pa.array(np.ascontiguousarray(values[rows]).reshape(-1), pa.float32())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        return pa.table(columns)

    def _write(self, number: int) -> None:
        table = pa.concat_tables(self.tables).replace_schema_metadata(
            {"skipped": json.dumps(list(self.skipped.items()))}
        )
        replace_atomically(self.parts.path(number), lambda path: pq.write_table(table, path))
        self.tables, self.skipped = [], {}


def _text(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


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
