"""What is measured: a backbone behind MODEL, a classifier, or the raw pixels that every backbone has to beat."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freqmask.backbones import Features, recalibrate_batch_norm
from freqmask.data.loader import ChosenSampler, TrainDataset, calibration_images, make_loader
from freqmask.data.pixels import check_channels
from freqmask.data.source import Source, Subset
from freqmask.data.sources import open_source
from freqmask.data.splits import hold_out, told_apart
from freqmask.data.values import Survey, ValueRange
from freqmask.errors import BadImage, UserError
from freqmask.evaluation.labelled import SPLITS, SplitConfig, open_labelled, pixel_hashes
from freqmask.evaluation.mask_data import MaskConfig, open_segmentation
from freqmask.imports import NotNamedError, named_by_user
from freqmask.interop.formats import CLASSIFIER, PIXELS, PUBLIC, RANDOM, run_behind
from freqmask.interop.models import OpenedClassifier, OpenedModel, open_classifier, open_model, still_images
from freqmask.interop.weight_files import hash_weights
from freqmask.options import group_among
from freqmask.spectrum import Images, as_float
from freqmask.training.run_folder import RunFolder

MOST_COMPARED = 200_000  # images of a training; beyond it comparing all of them would take hours
_KINDS = {  # method of a run: what it was to the model, and how it saw the images
    "finetune": ("fine-tuning", "fine-tuned", "with their labels"),
    "segment": ("training", "trained", "with their masks"),
    "pretrain": ("pre-training", "pre-trained", "labels unseen"),
}
LOGITS = "end/mean"  # the table's name of a classifier's logits, here one number a class of DATA
CONVERTIBLE = (1, 3, 4)  # channels of images that any model can be shown
NOTABLE = 0.05  # share of an image's area or side from which a difference is told
_PIXEL_SIDE = 32  # raw pixels of larger images would be more numbers than a head can use
_BLOCKS = (1 / 2, 3 / 4)  # how deep inside the last block of a masked model serves its decoder


class EvalModel(ABC):
    """Something that turns images into features."""

    text: str  # MODEL as it was typed
    name: str  # what tables call it
    kind: str  # run, folder, timm, random or pixels
    input_size: tuple[int, int, int]  # channels, height and width of what it is shown
    mean: tuple[float, ...]  # of each channel in [0, 1], taken off before the model
    std: tuple[float, ...]  # of each channel
    value_range: str  # what becomes [0, 1]
    # center (the largest centered window), whole (the image, distorted) or native (the middle at its own resolution)
    crop: str
    crop_share: float = 1.0  # of the side that the centered window keeps
    blocks: Sequence[int] = ()  # stages inside whose features can be had too
    # the folder where its results go unless told otherwise; None where it has none
    results: Path | None = None
    run: Path | None = None  # the folder of the training that it is of; None where none is known

    def key(self) -> dict[str, Any]:
        """Plain values on which the features depend, beside the images: weights and preprocessing."""
        shape = {name: list(getattr(self, name)) for name in ("input_size", "mean", "std")}
        return {**self.identity(), **shape, "value_range": self.value_range, "crop": self.crop}

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The part of the key that tells weights apart."""

    def dataset(self, source: Source) -> TrainDataset:
        """The images as it is shown them, uint8 or in [0, 1]: one window each, neither random nor flipped."""
        return still_images(self, source, self.crop)

    def normalize(self, images: Images) -> Tensor:
        """Images in [0, 1] become what the model takes."""
        mean, std = images.new_tensor(self.mean), images.new_tensor(self.std)
        return (images - mean[:, None, None]) / std[:, None, None]

    @abstractmethod
    def features(self, images: Images, what: str) -> dict[str, Tensor]:
        """Features (B, D) by name.

        Args:
            images: in [0, 1], on its device.
            what: ``end`` or ``blocks``.
        """

    def prepare(self, train: Source, device: torch.device) -> None:  # noqa: B027 - pixels are what they are
        """Get ready on a device; ``train`` may be looked at, without labels."""


class PixelModel(EvalModel):
    """Raw pixels, reduced to a side in pixels where they are many."""

    def __init__(self, survey: Survey, side: int | None = None, crop: str = "auto") -> None:
        self.text = self.name = self.kind = PIXELS
        side = side or min(_PIXEL_SIDE, *survey.median_size)
        self.input_size, self.crop = (survey.channels, side, side), _usual(crop)
        self.mean, self.std = tuple(survey.mean), tuple(survey.std)
        self.value_range = survey.value_range.describe()

    def identity(self) -> dict[str, Any]:
        return {"weights": PIXELS}

    def features(self, images: Tensor, what: str) -> dict[str, Tensor]:
        """Every pixel, normalized by the channel."""
        return {"end/mean": self.normalize(images).flatten(1)}


class BackboneModel(EvalModel):
    """A backbone: MODEL as it was typed, and opened."""

    def __init__(self, text: str, opened: OpenedModel, crop: str = "auto") -> None:
        self.text, self.name, self.kind = text, opened.name, opened.kind
        self.opened = opened
        self.crop = "native" if (crop, opened.trained_crop) == ("auto", "native") else _usual(crop)
        self.input_size, self.mean, self.std = opened.input_size, opened.mean, opened.std
        self.value_range = opened.value_range
        if opened.kind == "run" and opened.folder is not None:
            self.run = self.results = opened.folder.resolve().parent
        count = len(opened.module.feature_info)
        inside = {math.ceil(share * count) - 1 for share in _BLOCKS}
        self.blocks = sorted(inside - {opened.backbone.stage % count})
        self._hash: str | None = None

    def prepare(self, train: Source, device: torch.device) -> None:
        """Move to the device; fresh weights with batch norm get statistics of these images first."""
        self.opened.backbone.to(device)
        if self.kind == "random":
            places = calibration_images(train)
            images, at_once = self.dataset(train), min(64, len(places))
            loader = make_loader(images, ChosenSampler(places), at_once, workers=0, pin_memory=False)
            views = (as_float(batch["views"][0].to(device)) for batch in loader)
            recalibrate_batch_norm(self.opened.backbone, map(self.normalize, views))
            self._hash = None

    def identity(self) -> dict[str, Any]:
        if self._hash is None:
            self._hash = self.opened.weights_hash
        return {
            "weights": self._hash,
            "architecture": self.opened.backbone.name.split(":")[-1] if self.kind != "run" else "",
            "stage": self.opened.backbone.stage,
        }

    def features(self, images: Tensor, what: str) -> dict[str, Tensor]:
        """The mean of the map and the class token: of the end, or of the blocks at 1/2 and 3/4."""
        normalized = self.normalize(images)
        if what == "end":
            return _named("end", self.opened.backbone(normalized))
        stages = self.opened.stages(normalized, self.blocks)
        named = [_named(f"block{k + 1}", stage) for k, stage in zip(self.blocks, stages, strict=True)]
        return {name: values for features in named for name, values in features.items()}


class ClassifierModel(EvalModel):
    """A classifier whose logits are the features: those of DATA's classes, in DATA's order.

    Args:
        text: ``timm:NAME``, the run folder of a fine-tuning, or an exported folder with a classifier.
        class_names: of DATA.
        crop: ``center`` (and ``auto``), of which the model's own test share is kept, ``whole`` or ``native``.

    Raises:
        UserError: it has no classifier, or its classes are not those of DATA.
    """

    def __init__(self, text: str, class_names: Sequence[str], crop: str = "auto") -> None:
        opened = None if text == PIXELS else open_classifier(text)
        if opened is None:
            raise UserError(f"model ({text}) has no classifier of its own; try --head linear")
        self.text, self.crop, self.classifier = text, _usual(crop), opened.module
        self.kind = "timm" if text.startswith(PUBLIC) else "folder"
        path = Path(text).expanduser().resolve()
        folder = path.parent if path.name == CLASSIFIER else path
        self.name = text if self.kind == "timm" else folder.name
        self.run = folder if RunFolder(folder).exists() else None
        self.crop_share, self.value_range = opened.crop_share, opened.value_range
        self.input_size, self.mean, self.std = opened.input_size, opened.mean, opened.std
        self.columns = torch.tensor(_columns(opened, text, class_names))
        self._hash = hash_weights(self.classifier)

    def prepare(self, train: Source, device: torch.device) -> None:
        """Move to the device."""
        self.classifier.to(device)

    def identity(self) -> dict[str, Any]:
        return {
            "weights": self._hash,
            "classifier": hashlib.blake2b(self.columns.numpy().tobytes(), digest_size=4).hexdigest(),
            "crop_share": self.crop_share,
        }

    def features(self, images: Tensor, what: str) -> dict[str, Tensor]:
        """Logits (B, classes of DATA)."""
        logits = self.classifier(self.normalize(images))
        return {LOGITS: logits[:, self.columns.to(logits.device)]}


def _columns(opened: OpenedClassifier, text: str, class_names: Sequence[str]) -> list[int]:
    """Which of the model's outputs stands for each class of DATA.

    By name where the model tells names or is ImageNet's and DATA has WordNet numbers; else by number where DATA's
    classes are numbers of outputs (folders 0, 1, ..., whose own order is 0, 1, 10), or by order where the counts agree.
    """
    named, count = bool(opened.module.pretrained_cfg.get("label_names")), opened.module.num_classes
    names = told_apart([unicodedata.normalize("NFC", name) for name in opened.class_names])  # as of folders
    if (named or count == 1000) and set(class_names) <= set(names):
        return [names.index(name) for name in class_names]
    if not named and set(class_names) <= set(map(str, range(count))):
        return list(map(int, class_names))
    if not named and count == len(class_names):
        return list(range(count))
    missing = next((name for name in class_names if name not in names), class_names[0])
    raise UserError(
        f"model ({text}) classifies {count} classes and DATA has {len(class_names)}, {missing!r} not "
        "among the model's; name DATA's folders as the model's classes (ImageNet: n01440764 ...), or try --head linear"
    )


def open_eval_model(
    text: str | Path,
    survey: Survey,
    *,
    seed: int = 0,
    image_size: int | None = None,
    weights: str | None = None,
    value_range: str | None = None,
    crop: str = "auto",
    optional_model_args: Mapping[str, Any] | None = None,
) -> EvalModel:
    """Open MODEL for an evaluation.

    Args:
        text: as for :func:`freqmask.interop.models.open_model`, whose arguments the others are, or ``pixels``.
        survey: what the images are like; ``timm:NAME`` and ``random:NAME`` are made for their channels where these
            cannot become three.
        value_range: what becomes [0, 1]; None is the model's own, or for weights from outside that of the images.
        crop: ``auto``, ``center``, ``whole`` or ``native``.

    Raises:
        UserError: there is no such model.
    """
    text = str(text)
    if value_range is not None:
        survey = replace(survey, value_range=ValueRange.parse(value_range) or survey.value_range)
    if text == PIXELS:
        return PixelModel(survey, image_size, crop)
    foreign = text.startswith((PUBLIC, RANDOM))
    path = Path(text).expanduser()
    # RUN/backbone is of one, too, and refused: it holds no others
    is_run = not foreign and (RunFolder(path).exists() or run_behind(path) is not None)
    many = None if survey.channels in CONVERTIBLE else survey.channels
    opened = open_model(
        text,
        image_size=image_size,
        channels=many,
        seed=seed,
        weights=weights if is_run else None,
        optional_model_args=optional_model_args,
    )
    if foreign and many == opened.input_size[0] and not Path(text.partition(":")[2]).expanduser().is_dir():
        # ImageNet's are those of three colors
        opened.mean, opened.std = tuple(survey.mean), tuple(survey.std)
    if value_range is not None or (foreign and opened.value_range == "dtype"):
        opened.value_range = survey.value_range.describe()
    return BackboneModel(text, opened, crop)


def check_shown(model: EvalModel, survey: Survey) -> None:
    """Raises a UserError where the images' channels cannot become those that a model takes."""
    try:
        check_channels(survey.channels, survey.channels if model.kind == PIXELS else model.input_size[0])
    except BadImage as error:
        raise UserError(
            f"model ({model.name}) takes images of {model.input_size[0]} channel(s), and those of DATA have "
            f"{survey.channels}, which cannot be made into them; leave the model out, or name other images"
        ) from error


def what_differs(model: EvalModel, survey: Survey) -> list[str]:
    """Sentences on what of the images a model is not shown, and what it is shown otherwise than it was trained."""
    channels, height, width = model.input_size
    rows, columns = survey.median_size
    lines = []
    trained_so = isinstance(model, BackboneModel) and model.opened.trained_crop == "native"
    scale = min(rows / height, columns / width)  # of the largest centered window of the model's shape
    cut = 1 - (height * scale) * (width * scale) / (rows * columns)
    if model.crop == "center" and cut > NOTABLE:
        lines.append(
            f"crop center cuts {cut:.0%} of the area off images of {columns}x{rows} pixels, at the edges; --crop whole "
            "shows all of it, distorted to the window's shape"
        )
    if model.crop == "native" and scale > 1 + NOTABLE:
        lines.append(
            f"{model.name} is shown the middle {width}x{height} of images of {columns}x{rows} pixels, at their own "
            f"resolution{' as in its training' * trained_so}; --crop center reduces them, tiles or a larger "
            "--image_size show more"
        )
    elif trained_so and scale > 1 + NOTABLE:
        lines.append(
            f"{model.name} was trained on windows of {width}x{height} pixels as they are (crop native), and is shown "
            f"images of {columns}x{rows} reduced to that size; --crop native shows the middle as it is"
        )
    if channels != survey.channels and model.kind != PIXELS:
        lines.append(f"images of {survey.channels} channel(s) are shown to {model.name} as {channels}")
    return lines


def _usual(crop: str) -> str:
    return "center" if crop == "auto" else crop


def _named(place: str, features: Features) -> dict[str, Tensor]:
    token = {} if features.class_token is None else {f"{place}/token": features.class_token}
    return {f"{place}/mean": features.pooled, **token}


def seen_in_training(folder: Path, source: Source, tested: np.ndarray) -> str:
    """A sentence on how many test images a run was trained on.

    Args:
        folder: of the run; its config names what it was trained on.
        source: the images of the evaluation.
        tested: which of them are test images.
    """
    name, images = folder.name, "training images"
    try:
        config, state = RunFolder(folder).config(), RunFolder(folder).state()
        method, data = config.get("method"), config.get("data") or []
        images = f"{_KINDS.get(str(method), _KINDS['pretrain'])[0]} images"
        with named_by_user((), folder / "config.yaml"):
            trained, used, changed = _trained_on(config, state)
    except NotNamedError as error:
        return f"{name}: its {images} were not compared with the test images: {error}"
    except _GoneError:
        return f"{name}: its {images} ({data}) are no longer there to be compared with the test images"
    except (UserError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return f"{name}: its record (config.yaml, run.json) does not tell which images it was trained on"
    _, how, labels = _KINDS.get(str(method), _KINDS["pretrain"])
    typed = config.get("options", {}).get("data", data)
    paths = [typed] if isinstance(typed, str) else map(str, typed)
    if changed and any(":" not in path and not Path(path).expanduser().is_absolute() for path in paths):
        # 0.1.0 recorded paths as they were typed
        return (
            f"{name}: its {images} ({data}) are not those that this path leads to from here; to have them compared "
            "with the test images, evaluate in the folder where it was trained"
        )
    if len(trained) > MOST_COMPARED:
        return f"{name}: {len(trained):,} {images} are too many to be compared with the test images"
    known = set(pixel_hashes(trained, used))
    count = sum(value in known for value in pixel_hashes(source, tested))
    if changed:
        parted = ", or parted otherwise," if method == "finetune" else ""
        return (
            f"{name}: its {images} ({data}) are others now{parted} than they were; {count:,} of the {len(tested):,} "
            "test images are among these"
        )
    return f"{name}: {how} on {count:,} of the {len(tested):,} test images ({labels})"


class _GoneError(Exception):
    """The images that a run was trained on cannot be opened."""


@contextmanager
def _opening() -> Iterator[None]:
    try:
        yield
    except NotNamedError:
        raise
    except UserError as error:
        raise _GoneError from error


def _trained_on(
    config: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[Source, np.ndarray | None, bool]:
    """The images that a run names, which of them it was trained on (None: all), and whether they are others now."""
    options = config.get("options", {})
    if config.get("method") == "finetune":
        split = replace(group_among(SplitConfig, options), splits_in=Path(config.get("splits_in", SPLITS)))
        with _opening():
            data = open_labelled(options["data"], split)
        for one in data.rounds:
            seed = options["seeds"][0]
            used = data.drawn(one.train, options.get("shots"), seed)
            used = data.parted(used, config["held_out"], seed)[0]
            if Subset(data.source, used).fingerprint() == state["data"]:
                return data.source, used, False
        if len(data.rounds) > 1:
            raise LookupError("of which fold it was")
        return data.source, used, True
    if config.get("method") == "segment":
        with _opening():
            trained = open_segmentation(group_among(MaskConfig, options)).train
        return trained, None, state["data"] != trained.fingerprint()
    pages, split = config.get("pages", "channels"), config.get("split", "auto")
    with _opening():
        trained = open_source(config.get("data") or [], pages=pages, split=split)
    changed = state.get("data") not in (None, trained.fingerprint())
    if changed or len(trained) > MOST_COMPARED:
        return trained, None, changed
    if config.get("overfit"):
        return trained, np.arange(min(int(config["overfit"]), len(trained))), False
    return trained, hold_out(trained, seed=int(config.get("seed", 0)))[0], False
