"""What is measured: a backbone behind MODEL, or the raw pixels that every backbone has to beat."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from freqmask.backbones import Features, recalibrate_batch_norm
from freqmask.data.dataset import TrainDataset
from freqmask.data.loader import make_loader
from freqmask.data.sources import Source
from freqmask.data.values import Survey, ValueRange
from freqmask.data.views import Geometry
from freqmask.errors import UserError
from freqmask.interop.embed import still_images
from freqmask.interop.folders import run_options
from freqmask.interop.models import PUBLIC, RANDOM, OpenedModel, open_model
from freqmask.training.runs import RunFolder

PIXELS = "pixels"
CONVERTIBLE = (1, 3, 4)  # channels of images that any model can be shown
_PIXEL_SIDE = 32  # raw pixels of larger images would be more numbers than a head can use
_BLOCKS = (1 / 2, 3 / 4)  # how deep inside the last block of a masked model serves its decoder
_CALIBRATION_IMAGES = 256
NOTABLE = 0.05  # share of an image's area or side from which a difference is told


class Subject(ABC):
    """Something that turns images into features.

    Attributes:
        text: MODEL as it was typed.
        name: what tables call it.
        kind: run, folder, timm, random or pixels.
        results: the folder where its results go unless told otherwise; None where it has none.
    """

    text: str
    name: str
    kind: str
    results: Path | None = None

    @abstractmethod
    def key(self) -> dict[str, Any]:
        """Plain values on which the features depend, beside the images: weights and preprocessing."""

    @abstractmethod
    def dataset(self, source: Source) -> TrainDataset:
        """The images as it wants to see them, in [0, 1] or uint8."""

    @abstractmethod
    def features(self, images: Float[Tensor, "batch channel height width"], what: str) -> dict[str, Tensor]:
        """Features (B, D) by name.

        Args:
            images: in [0, 1], on its device.
            what: ``end`` or ``blocks``.
        """

    @abstractmethod
    def begin(self, train: Source, device: torch.device) -> None:
        """Get ready on a device; ``train`` may be looked at, without labels."""


class PixelSubject(Subject):
    """Raw pixels, made smaller where they are many.

    Args:
        seen: what the images are like.
        side: of the reduced image in pixels.
    """

    def __init__(self, seen: Survey, side: int | None = None, crop: str = "center") -> None:
        self.text = self.name = self.kind = PIXELS
        self.side = side or min(_PIXEL_SIDE, *seen.median_size)
        self.seen, self.crop = seen, crop

    def begin(self, train: Source, device: torch.device) -> None:
        """Pixels are what they are."""

    def key(self) -> dict[str, Any]:
        """Size and statistics."""
        return {
            "weights": PIXELS,
            "input_size": [self.seen.channels, self.side, self.side],
            "mean": list(self.seen.mean),
            "std": list(self.seen.std),
            "value_range": self.seen.value_range.describe(),
            "crop": self.crop,
        }

    def dataset(self, source: Source) -> TrainDataset:
        """Squares of ``side`` pixels."""
        geometry = Geometry(image_size=self.side, crop=self.crop, horizontal_flip=0.0)
        return TrainDataset(
            source, [geometry], self.seen.value_range, self.seen.channels, convert_channels=True
        )

    def features(self, images: Tensor, what: str) -> dict[str, Tensor]:
        """Every pixel, normalised by the channel."""
        mean, std = images.new_tensor(self.seen.mean), images.new_tensor(self.seen.std)
        return {"end/mean": ((images - mean[:, None, None]) / std[:, None, None]).flatten(1)}


class ModelSubject(Subject):
    """A backbone.

    Args:
        text: MODEL as it was typed.
        opened: the model.
        crop: ``center`` or ``whole``.
    """

    def __init__(self, text: str, opened: OpenedModel, crop: str = "center") -> None:
        self.text, self.name, self.kind = text, opened.name, opened.kind
        self.opened, self.crop = opened, crop
        if opened.kind == "run" and opened.folder is not None:
            self.results = opened.folder.resolve().parent
        self.trained_crop = str(run_options(text).get("crop", opened.facts.get("crop", "")))
        count = len(opened.module.feature_info)
        inside = {math.ceil(share * count) - 1 for share in _BLOCKS}
        self.blocks = sorted(inside - {opened.backbone.stage % count})
        self._hash: str | None = None

    def begin(self, train: Source, device: torch.device) -> None:
        """Move to the device; fresh weights with batch norm get statistics of these images first."""
        self.opened.backbone.to(device)
        if self.kind == "random":
            recalibrate_batch_norm(self.opened.backbone, self._calibration(train, device))
            self._hash = None

    def _calibration(self, train: Source, device: torch.device) -> Any:
        images = self.dataset(train)
        places = torch.linspace(0, len(train) - 1, min(_CALIBRATION_IMAGES, len(train))).long().tolist()
        items: Any = [(0, place, place) for place in places]
        for batch in make_loader(images, items, min(64, len(items)), workers=0, pin_memory=False):
            yield self.opened.normalise(as_float(batch["views"][0].to(device)))

    def key(self) -> dict[str, Any]:
        """Weights, size, statistics, and which stage is the end."""
        if self._hash is None:
            self._hash = self.opened.weights_hash
        opened = self.opened
        return {
            "weights": self._hash,
            "architecture": opened.backbone.name.split(":")[-1] if self.kind != "run" else "",
            "stage": opened.backbone.stage,
            "input_size": list(opened.input_size),
            "mean": list(opened.mean),
            "std": list(opened.std),
            "value_range": opened.value_range,
            "crop": self.crop,
        }

    def dataset(self, source: Source) -> TrainDataset:
        """Windows of the model's size."""
        return still_images(self.opened, source, self.crop)

    def features(self, images: Tensor, what: str) -> dict[str, Tensor]:
        """The mean of the map and the class token: of the end, or of the blocks at 1/2 and 3/4."""
        normalised = self.opened.normalise(images)
        if what == "end":
            return _named("end", self.opened.backbone(normalised))
        found: dict[str, Tensor] = {}
        stages = self.opened.stages(normalised, self.blocks)
        for number, stage in zip(self.blocks, stages, strict=True):
            found |= _named(f"block{number + 1}", stage)
        return found


def open_subject(
    text: str | Path,
    seen: Survey,
    *,
    seed: int = 0,
    image_size: int | None = None,
    weights: str | None = None,
    value_range: str | None = None,
    crop: str = "center",
    wishes: Mapping[str, Any] | None = None,
) -> Subject:
    """Open MODEL for an evaluation.

    Args:
        text: as for :func:`freqmask.interop.models.open_model`, or ``pixels``.
        seen: what the images are like; ``timm:NAME`` and ``random:NAME`` are made for their channels where these
            cannot become three.
        seed: of fresh weights.
        image_size: side in pixels; None is what the model was trained at.
        weights: ``teacher`` or ``student`` of a FOLK run; None elsewhere leaves it out.
        value_range: what becomes [0, 1]; None is the model's own, or for weights from outside that of
            the images.
        crop: ``center`` or ``whole``.
        wishes: timm's arguments for a training, as for :func:`freqmask.interop.models.open_model`.

    Raises:
        UserError: there is no such model.
    """
    text = str(text)
    if value_range is not None:
        seen = Survey(**{**vars(seen), "value_range": ValueRange.parse(value_range) or seen.value_range})
    if text == PIXELS:
        return PixelSubject(seen, image_size, crop)
    foreign = text.startswith((PUBLIC, RANDOM))
    is_run = not foreign and RunFolder(text).exists()
    chosen = weights if is_run else None
    many = None if seen.channels in CONVERTIBLE else seen.channels
    opened = open_model(text, image_size=image_size, channels=many, seed=seed, weights=chosen, wishes=wishes)
    if foreign and many == opened.input_size[0] and not Path(text.partition(":")[2]).is_dir():
        opened.mean, opened.std = tuple(seen.mean), tuple(seen.std)  # ImageNet's are those of three colours
    if value_range is not None or (foreign and opened.value_range == "dtype"):
        opened.value_range = seen.value_range.describe()
    return ModelSubject(text, opened, crop)


def what_differs(subject: Subject, seen: Survey) -> list[str]:
    """What of the images a model is not shown, and what it is shown otherwise than it was trained.

    Args:
        subject: the model.
        seen: what the images are like.

    Returns:
        Sentences for the user.
    """
    channels, height, width = subject.key()["input_size"]
    rows, columns = seen.median_size
    lines = []
    scale = min(rows / height, columns / width)  # of the largest centered window of the model's shape
    cut = 1 - (height * scale) * (width * scale) / (rows * columns)
    if getattr(subject, "crop", "") == "center" and cut > NOTABLE:
        lines.append(
            f"crop center cuts {cut:.0%} of the area off images of {columns}x{rows} pixels, at the edges; --crop whole "
            "shows all of it, distorted to the window's shape"
        )
    if isinstance(subject, ModelSubject) and subject.trained_crop == "native" and scale > 1 + NOTABLE:
        lines.append(
            f"{subject.name} was trained on windows of {width}x{height} pixels as they are (crop native), and is shown "
            f"images of {columns}x{rows} reduced to that size; cut DATA into tiles, or give a larger --image_size"
        )
    if channels != seen.channels and subject.kind != PIXELS:
        lines.append(f"images of {seen.channels} channel(s) are shown to {subject.name} as {channels}")
    return lines


def check_models(models: list[str]) -> list[str]:
    """MODEL as a list, without repetitions.

    Raises:
        UserError: there is none.
    """
    if not models:
        raise UserError("MODEL is missing; try pixels, random:vit_tiny_patch16_224 and a run folder together")
    return list(dict.fromkeys(str(model) for model in models))


def tell_apart(subjects: Iterable[Subject]) -> None:
    """Models whose names are alike (``a/run`` and ``b/run``) are called by what was typed."""
    subjects = list(subjects)
    texts: dict[str, set[str]] = {}
    for subject in subjects:
        texts.setdefault(subject.name, set()).add(subject.text)
    for subject in subjects:
        if len(texts.get(subject.name, ())) > 1:
            subject.name = subject.text


def as_float(images: Tensor) -> Tensor:
    """uint8 becomes float32 in [0, 1] on the device it is on; floats pass."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def _named(place: str, features: Features) -> dict[str, Tensor]:
    found = {f"{place}/mean": features.pooled}
    if features.class_token is not None:
        found[f"{place}/token"] = features.class_token
    return found
