"""What networks compute of many images: features, classes and masks, in parts that survive a kill."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from freqmask.console import image_progress, say, say_left_out
from freqmask.data.cache import hash_of
from freqmask.data.loader import ChosenSampler, TrainDataset, make_loader
from freqmask.data.pixels import Pages, missing_pixels
from freqmask.data.source import Source
from freqmask.data.sources import open_source
from freqmask.data.transforms import Geometry, resize
from freqmask.data.values import ValueRange
from freqmask.errors import UserError
from freqmask.evaluation.features import ComputeConfig, feature_batches
from freqmask.evaluation.mask_files import scaled_size
from freqmask.interop.exporters import Exported, Graph
from freqmask.interop.feature_files import Parts, PartWriter, rows_of
from freqmask.interop.feature_space import features_by_name
from freqmask.interop.models import OpenedClassifier, OpenedModel, still_images
from freqmask.interop.weight_files import hash_weights
from freqmask.training.files import new_folder, open_table, replace_atomically
from freqmask.training.run_folder import RunFolder
from freqmask.training.worker_pool import DiedError

_MOST_COLUMNS = 50  # classes whose probabilities all stand in the table


@dataclass(frozen=True)
class EmbedConfig:
    """Which features."""

    pooled: str = "mean"  # what stands for the image: mean, class_token, or the digest of the model's space
    patches: bool = False  # whether the map comes along
    blocks: tuple[int, ...] = ()  # stages (for a ViT: blocks) whose mean comes along
    crop: str = "center"  # or whole (distorted to the size), or native (the middle at its own resolution)
    precision: str = "32"  # or bf16 for autocast


class Embedding:
    """The features of a backbone: ``features`` (B, D), ``patches`` (B, h * w * D), row by row, ``block_i`` (B, D_i)."""

    def __init__(self, opened: OpenedModel, config: EmbedConfig | None = None) -> None:
        self.opened, self.config = opened, config or EmbedConfig()
        self.network = opened.backbone

    def describe(self) -> dict[str, Any]:
        """Plain values that decide the features, beside the images."""
        return {
            "model": self.opened.name,
            "weights": self.opened.weights_hash,
            **{name: list(getattr(self.opened, name)) for name in ("input_size", "mean", "std")},
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
        """Numbers of one image."""
        rows, columns, dim = self.grid
        return dim * (1 + self.config.patches * rows * columns + len(self.config.blocks))

    def dataset(self, source: Source) -> TrainDataset:
        """The images as the network is given them."""
        return still_images(self.opened, source, self.config.crop)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """Features (B, D) by name, of images (B, C, H, W) in [0, 1]."""
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
        return features


class Classification:
    """The probability of every class; what it has is what :class:`Embedding` has.

    Args:
        opened: the classifier.
        crop: ``center``, of which its own test share is kept, or ``whole``.
    """

    def __init__(self, opened: OpenedClassifier, crop: str) -> None:
        self.opened, self.crop = opened, crop
        self.network = Exported(opened.module, opened.mean, opened.std).eval()

    def describe(self) -> dict[str, Any]:
        names = ("name", "class_names", "input_size", "mean", "std", "value_range", "crop_share")
        settings = {name: getattr(self.opened, name) for name in names}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        return {**lists, "weights": hash_weights(self.opened.module), "crop": self.crop}

    @property
    def width(self) -> int:
        return len(self.opened.class_names)

    def dataset(self, source: Source) -> TrainDataset:
        return still_images(self.opened, source, self.crop)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": self.network(images)[0].float().softmax(dim=1)}


FeatureTask = Embedding | Classification


def plan_parts(task: FeatureTask, source: Source, out: Path) -> Parts:
    """The parts of a file of features."""
    labels = hash_of(repr(source.class_names), source.all_labels())  # which stand beside the features
    described = {**task.describe(), "data": source.content_stamp(), "labels": labels, "images": len(source)}
    return Parts(out, described, len(source), 4 * task.width)


def compute_parts(task: FeatureTask, source: Source, parts: Parts, config: ComputeConfig) -> None:
    """Compute the parts that are missing, on one device or several, with a progress bar.

    Raises:
        UserError: a process died; the same command computes what is missing.
    """
    whole, missing = parts.begin(), parts.missing()
    if whole:
        say(f"resumes     {whole} of {parts.count} parts are whole from before")
    size = config.images_at_once(*task.opened.input_size[1:])
    arguments = (missing, task, source, parts, size, config.workers, config.bf16)
    images = sum(len(parts.indices(number)) for number in missing)
    try:
        with image_progress(images) as count, closing(config):
            for done in accumulate(config.run(some_parts, len(missing), 1, arguments, [task, source])):
                count(done)
    except DiedError as error:
        raise UserError(f"{error}; the same command resumes from the parts that are whole") from error


def some_parts(
    device: torch.device,
    places: range,
    missing: Sequence[int],
    task: FeatureTask,
    source: Source,
    parts: Parts,
    size: int,
    workers: int,
    bf16: bool,
) -> Iterator[int]:
    """Those at ``places`` among the missing parts, in whatever process; yields how many images each batch had."""
    images = [index for place in places for index in parts.indices(missing[place])]
    writer = PartWriter(source, parts)
    task.network.to(device)
    for batch in feature_batches(device, images, task.dataset(source), task.compute, size, workers, bf16):
        writer.add(batch.wanted, batch.is_read, batch.features, batch.labels, batch.reasons)
        yield len(batch.wanted)


def write_classes(task: Classification, source: Source, path: Path, config: ComputeConfig) -> int:
    """A table with path, class, its probability and those of all classes where they are few; how many rows."""
    parts = plan_parts(task, source, path)
    compute_parts(task, source, parts, config)
    files, skipped = parts.whole()
    names, first = task.opened.class_names, ("path", "class", "probability")
    # a class may be called as one of the first columns
    columns = [f"probability of {name}" if name in first else name for name in names]
    columns = columns if len(names) <= _MOST_COLUMNS else []
    written = 0

    def write(temporary: Path) -> None:
        nonlocal written
        with open_table(temporary, "w") as file:
            table = csv.writer(file)
            table.writerow([*first, *columns])
            for name, shares in rows_of(files, ("path", "features")):
                best = max(range(len(shares)), key=shares.__getitem__)
                cells = [f"{share:.6g}" for share in [shares[best], *(shares if columns else ())]]
                table.writerow([name, names[best], *cells])
                written += 1

    replace_atomically(path, write)
    parts.remove()
    say_left_out(skipped)
    return written


@dataclass
class Segmenter:
    """A finished segmentation network."""

    network: Any  # of images in [0, 1], with normalization inside
    training: Any  # how it was trained
    labels: tuple[int, ...]  # of the masks, in the order of the network's outputs
    names: tuple[str, ...]  # of the classes


def open_segmenter(model: str) -> Segmenter | None:
    """The network of a finished segmentation run, or None where MODEL is something else.

    Raises:
        UserError: it is not finished; of a run of 0.1.0, the model that it began from is gone.
    """
    run = RunFolder(Path(model).expanduser())
    config = run.config() if run.exists() else {}
    if config.get("method") != "segment":
        return None
    # here and not above: Lightning comes with it, and classifiers do not wait for it
    from freqmask.evaluation.segmentation import open_network

    network, training = open_network(run)
    labels: dict[int, str] = config["classes"]
    return Segmenter(network, training, tuple(map(int, labels)), tuple(map(str, labels.values())))


class _Enlarged(nn.Module):
    """Logits (B, classes, H, W) at the size of the images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        logits = self.network(images).decoder
        return (F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False),)


def segmentation_graph(segmenter: Segmenter) -> Graph:
    """What ``export`` writes of a segmentation network: logits at the size of the images."""
    training = segmenter.training
    metadata = {
        "class_names": segmenter.names,
        "labels": segmenter.labels,
        "value_range": training.value_range,
        "normalised_inside": True,
    }
    outputs = {"logits": f"(B, {len(segmenter.names)} classes, H, W)"}
    size = (training.channels, training.crop, training.crop)
    return Graph(_Enlarged(segmenter.network), outputs, size, metadata, multiple=32)


class _WholeImages(TrainDataset):
    """An image at the size that the network is given, and its own height and width."""

    shorter_side: Any = None

    def _views(self, picture: Any, keys: Any) -> list[Tensor]:
        window = picture.decode((0, 0, *picture.size))
        image = self._tensor(window, missing_pixels(window, picture.nodata))
        return [resize(image, scaled_size(picture.size, self.shorter_side)), torch.tensor(picture.size)]


def write_masks(
    segmenter: Segmenter, source: Source, path: Path, inference: str, config: ComputeConfig
) -> int:
    """A folder of masks, each as large as its image and with the labels of the training masks; how many.

    Args:
        segmenter: the network.
        source: the images.
        path: the folder, atomic.
        inference: ``windows`` that overlap by a third, or ``whole``.
        config: device, windows at once, and loader processes.
    """
    from freqmask.evaluation.upernet import Predictor

    training = segmenter.training
    geometry = Geometry(training.crop, crop="whole", horizontal_flip=0.0)
    values = ValueRange.parse(training.value_range) or ValueRange()
    dataset = _WholeImages(source, [geometry], values, training.channels, convert_channels=True)
    dataset.shorter_side = training.image_size
    at_once = config.batch_size or training.images_at_once  # what a step of its training had room for
    predictor = Predictor(segmenter.network, training, config.device, at_once)
    labels = np.array(segmenter.labels, np.uint16 if max(segmenter.labels) > 255 else np.uint8)
    names, skipped = _mask_names(source), list[tuple[str, str]]()
    loader = make_loader(dataset, ChosenSampler(range(len(source))), 1, config.workers)  # sizes differ
    with new_folder(path) as folder, torch.inference_mode():
        for index, batch in enumerate(loader):
            name = source.name(index)
            if int(batch["indices"][0]) != index:  # another image in its stead
                skipped.append((name, dict(batch["skipped"]).get(name, "it cannot be read")))
                continue
            classes, _ = predictor(batch["views"][0][0], tuple(batch["views"][1][0].tolist()), inference)
            target = folder / names[index]
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels[classes]).save(target)
    say_left_out(skipped)
    return len(source) - len(skipped)


def _mask_names(source: Source) -> list[str]:
    """Of each image the path of its mask, which is its own below DATA: with its suffix where another has it without."""
    whole = [_as_path(source.name(index)) or str(index) for index in range(len(source))]
    owners: dict[str, int] = {}  # some file systems know no capitals
    stems = [re.sub(r"(?<=[^/])\.\w+(?=(#\d+)?$)", "", name) for name in whole]  # a page has its number
    for index, stem in enumerate(stems):
        owners.setdefault(stem.casefold(), index)
    for index, name in enumerate(whole):
        if owners[stems[index].casefold()] != index:
            while owners.setdefault(name.casefold(), index) != index:
                name += f"-{index}"
            stems[index] = name
    return [f"{stem}.png" for stem in stems]


def _as_path(name: str) -> str:
    """A name as a path in a folder, whatever an archive or a table calls its images."""
    parts = [part for part in Path(name.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    plain = "/".join("".join(sign if sign.isprintable() else "_" for sign in part) for part in parts)
    return plain.encode("utf-8", "replace").decode("utf-8").replace(":", "_")


def open_images(data: Sequence[str], pages: Pages, split: str, labels: str | None = None) -> Source:
    """The images that DATA names; says what of it is not read, and what was taken for granted."""
    source = open_source(data, pages, split, labels)
    for note in source.summary().notes:
        say(f"note: {note}")
    return source


def checked_blocks(blocks: list[int] | None, opened: OpenedModel, path: Path) -> tuple[int, ...]:
    """The blocks asked for, counted from 0, each once.

    Raises:
        UserError: the model has no such block, or the file cannot hold their features.
    """
    count = len(opened.module.feature_info)
    for number in blocks or []:
        if not -count <= number < count:
            raise UserError(f"blocks ({number}) must be from 0 to {count - 1} for {opened.name}")
    numbers = tuple(sorted({number % count for number in blocks or []}))
    if path.suffix == ".npy" and len({opened.module.feature_info[n]["num_chs"] for n in numbers}) > 1:
        raise UserError(
            f"blocks ({', '.join(map(str, numbers))}) differ in width, which a .npy cannot hold; "
            f"try --out {path.with_suffix('.parquet')}"
        )
    return numbers
