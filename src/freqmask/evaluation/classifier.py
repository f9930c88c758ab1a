"""A timm model with its own classifier: its answers are measured as they are, no head is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freqmask.data.dataset import TrainDataset
from freqmask.data.sources import Source
from freqmask.data.values import ValueRange
from freqmask.data.views import Geometry
from freqmask.errors import UserError
from freqmask.evaluation.subjects import PIXELS, Subject
from freqmask.interop.folders import CLASSIFIER, LOCAL, find_backbone, read_config
from freqmask.interop.models import PUBLIC, RANDOM, hash_weights
from freqmask.interop.public import check_public
from freqmask.interop.timm_folder import OURS
from freqmask.timm_models import check_name

LOGITS = "end/mean"  # the table's name of a subject's answer, here one number a class of DATA


class ClassifierSubject(Subject):
    """A classifier whose logits are the features: those of DATA's classes, in DATA's order.

    Args:
        text: ``timm:NAME``, the run folder of a fine-tuning, or an exported folder with a classifier.
        class_names: of DATA.
        crop: ``center``, of which the model's own test share is kept, or ``whole``.

    Raises:
        UserError: it has no classifier, or its classes are not those of DATA.
    """

    def __init__(self, text: str, class_names: Sequence[str], crop: str = "center") -> None:
        self.text, self.crop = text, crop
        self.model, self.value_range = _open(text)
        self.kind = "timm" if text.startswith(PUBLIC) else "folder"
        self.name = text if self.kind == "timm" else _name(Path(text).resolve())
        config = self.model.pretrained_cfg
        self.crop_share = float(config.get("crop_pct") or 1.0)
        channels, height, width = (int(side) for side in config["input_size"])
        self.input_size = (channels, height, width)
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.columns = torch.tensor(_columns(self.model, text, class_names))
        self._hash = hash_weights(self.model)

    def begin(self, train: Source, device: torch.device) -> None:
        """Move to the device."""
        self.model.to(device)

    def key(self) -> dict[str, Any]:
        """Weights, size, statistics, and which classes."""
        return {
            "weights": self._hash,
            "classifier": " ".join(str(int(number)) for number in self.columns),
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "value_range": self.value_range,
            "crop": self.crop,
            "crop_share": self.crop_share,
        }

    def dataset(self, source: Source) -> TrainDataset:
        """Windows of the model's size."""
        geometry = Geometry(
            image_size=self.input_size[1:],
            crop=self.crop,
            horizontal_flip=0.0,
            center_share=self.crop_share,
        )
        values = ValueRange.parse(self.value_range)
        return TrainDataset(source, [geometry], values, self.input_size[0], convert_channels=True)

    def features(self, images: Tensor, what: str) -> dict[str, Tensor]:
        """Logits (B, classes of DATA)."""
        mean, std = images.new_tensor(self.mean), images.new_tensor(self.std)
        logits = self.model((images - mean[:, None, None]) / std[:, None, None])
        return {LOGITS: logits[:, self.columns.to(logits.device)]}


def _name(path: Path) -> str:
    """A run's name, also where its ``classifier`` folder was named."""
    return path.parent.name if path.name == CLASSIFIER else path.name


def _open(text: str) -> tuple[Any, str]:
    """The timm model in evaluation mode, and the value range that became [0, 1] in its training."""
    import timm

    model: Any
    if text == PIXELS or text.startswith(RANDOM):
        raise UserError(f"model ({text}) has no classifier of its own; try --head linear")
    if text.startswith(PUBLIC):
        name = text.removeprefix(PUBLIC)
        check_name(name)
        check_public(name, f"model ({text})")
        model, value_range = timm.create_model(name, pretrained=True), "dtype"
    else:
        folder = find_backbone(text)
        config = read_config(folder)
        model = timm.create_model(LOCAL + str(folder), pretrained=True)
        value_range = str(config.get(OURS, {}).get("value_range", "dtype"))
    if model.num_classes < 1:
        raise UserError(f"model ({text}) has no classifier of its own; try --head linear")
    return model.eval().requires_grad_(False), value_range


def _columns(model: Any, text: str, class_names: Sequence[str]) -> list[int]:
    """Which of the model's outputs stands for each class of DATA.

    By name where the model tells names or is ImageNet's and DATA has WordNet numbers, else by order where
    the counts agree.
    """
    names = [str(name) for name in model.pretrained_cfg.get("label_names") or _imagenet_names(model)]
    if set(class_names) <= set(names):
        return [names.index(name) for name in class_names]
    if not model.pretrained_cfg.get("label_names") and model.num_classes == len(class_names):
        return list(range(model.num_classes))
    missing = next((name for name in class_names if name not in names), class_names[0])
    raise UserError(
        f"model ({text}) classifies {model.num_classes} classes and DATA has {len(class_names)}, {missing!r} not "
        "among the model's; name DATA's folders as the model's classes (ImageNet: n01440764 ...), or try --head linear"
    )


def _imagenet_names(model: Any) -> list[str]:
    from timm.data.imagenet_info import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names()) if model.num_classes == 1000 else []
