"""A classifier made of a backbone, and timm's augmentations of its training images, from keys."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from jaxtyping import Float, Int64, Shaped
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.models import get_model_args
from torch import Tensor, nn

from freqmask.data.transforms import Geometry
from freqmask.errors import UserError
from freqmask.interop.models import OpenedModel
from freqmask.rng import sample_key
from freqmask.timm_models import REFUSED, cannot, parameters_behind

HEAD_STD, HEAD_SCALE = 0.02, 0.001  # docs/evaluating.md, Fine-tuning
_DROPPED = ("norm.", "attn_pool.")  # a ViT's own end, which the mean of its patches bypasses


@dataclass
class Network:
    """A classifier before its first step."""

    model: Any  # timm's
    image_size: tuple[int, int]  # (height, width) that it takes
    fresh: list[str]  # parameters that begin from nothing
    dropped: list[str]  # pre-trained parameters that have no place in it
    fixed_size: bool  # whether it takes this size only
    notes: list[str]  # sentences for the user


def make_classifier(opened: OpenedModel, classes: int, drop_path: float, seed: int) -> Network:
    """The model's own timm architecture with its weights and a fresh head.

    A ViT is read as MFM reads it: the mean of the patch tokens through a fresh normalization (``fc_norm``), its
    pre-trained final one left out; the head is normal with std 0.02, cut at two, times 0.001. Other families
    keep their own end, with timm's initialization of the head.

    Raises:
        UserError: the architecture has no classifier, or its weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset the user's of CUDA, too
        model, notes = _create(opened, classes, drop_path)
        head = model.get_classifier()
        if opened.backbone.is_vit and isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=HEAD_STD)
            with torch.no_grad():
                head.weight.mul_(HEAD_SCALE)
                head.bias.zero_()
    fresh, dropped = _load(model, opened)
    backbone = opened.backbone
    size = backbone.padded_size if backbone.fixed_size else backbone.image_size
    _leave_out_unreached(model, torch.zeros(1, backbone.channels, *size), opened.name)
    return Network(model, size, fresh, dropped, backbone.fixed_size, notes)


def _create(opened: OpenedModel, classes: int, drop_path: float) -> tuple[Any, list[str]]:
    module = opened.module
    architecture = str(module.pretrained_cfg["architecture"])
    arguments = {**get_model_args(module), **_pooling(opened), "num_classes": classes}
    try:
        return timm.create_model(architecture, drop_path_rate=drop_path, **arguments), []
    except TypeError as error:
        refused = REFUSED.search(str(error))
        if refused is None or refused[1] != "drop_path_rate":
            raise cannot(architecture, f"{classes} classes with {arguments}", error) from error
    except (AssertionError, RuntimeError, ValueError) as error:
        raise cannot(architecture, f"{classes} classes with {arguments}", error) from error
    notes = [f"drop path is off: {architecture} does not take it"] if drop_path else []
    return timm.create_model(architecture, **arguments), notes


def _pooling(opened: OpenedModel) -> dict[str, Any]:
    taken = inspect.signature(type(opened.module).__init__).parameters
    norm = next((name for name in ("fc_norm", "use_fc_norm") if name in taken), None)
    if not opened.backbone.is_vit or norm is None or "global_pool" not in taken:
        return {}
    return {"global_pool": "avg", norm: True}


def _load(model: Any, opened: OpenedModel) -> tuple[list[str], list[str]]:
    ours, theirs = model.state_dict(), opened.module.state_dict()
    head = {id(tensor) for part in _heads(model) for tensor in part.state_dict(keep_vars=True).values()}
    heads = {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in head}
    fresh = [name for name in ours if name not in theirs]
    dropped = [name for name in theirs if name not in ours]
    lost = [name for name in fresh if name not in heads and not name.startswith("fc_norm.")]
    lost += [name for name in dropped if not name.startswith(_DROPPED)]
    lost += [name for name in ours if name in theirs and ours[name].shape != theirs[name].shape]
    if lost:
        shapes = ", ".join(f"{name} {_shape(theirs, name)} -> {_shape(ours, name)}" for name in lost[:3])
        raise UserError(
            f"model ({opened.name}): {len(lost)} of its parameters do not fit a classifier of the same "
            f"architecture ({shapes}); export it again, or take another model"
        )
    model.load_state_dict({name: tensor for name, tensor in theirs.items() if name in ours}, strict=False)
    return fresh, dropped


def _heads(model: Any) -> list[nn.Module]:
    head = model.get_classifier()
    heads = [part for part in (head if isinstance(head, tuple) else (head,)) if isinstance(part, nn.Module)]
    if not any(list(part.parameters()) for part in heads):
        raise UserError(f"model ({type(model).__name__}) has no classifier in timm; take another backbone")
    return heads


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return "x".join(map(str, state[name].shape)) or "scalar" if name in state else "nothing"


def _leave_out_unreached(model: Any, image: Tensor, name: str) -> None:
    model.requires_grad_(True).eval()
    try:
        with torch.enable_grad():
            reached = parameters_behind([model(image)])
    except (AssertionError, RuntimeError, ValueError) as error:
        raise cannot(name, f"images of {tuple(image.shape[-2:])}", error) from error
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in reached)
    model.train()


NO_AUGMENT = "none"
_TRANSLATION = 0.45  # of the shorter side: how far RandAugment shifts at most, as in timm's transforms
_RANDAUGMENT = 1  # the view's number in the key of its RandAugment: other numbers than those of its crop


@contextmanager
def randomness_from(key: int, torch_too: bool = False, device: torch.device | None = None) -> Iterator[None]:
    """Python's, numpy's and (``torch_too``) torch's generators start from a signed 64-bit key; restored afterwards.

    timm draws from them; so an image's changes follow from its key alone, whatever the worker or a restart.
    """
    before = random.getstate(), np.random.get_state()
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    try:
        if not torch_too:
            yield
            return
        devices = [device] if device is not None and device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(key)
            for one in devices:  # those of other devices stay as they are
                with torch.cuda.device(one):
                    torch.cuda.manual_seed(key)
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@dataclass(frozen=True)
class AugmentedGeometry(Geometry):
    """A view that RandAugment changes after it is cut and mirrored."""

    augment: str = NO_AUGMENT  # as timm writes it, such as rand-m9-mstd0.5-inc1
    fill: tuple[int, int, int] = (124, 116, 104)  # color of what comes in from outside the image, 0 to 255

    def finish(
        self, window: Shaped[Tensor, "channel window_height window_width"], key: int
    ) -> Shaped[Tensor, "channel height width"]:
        """The view, changed by numbers from its key; 8-bit color only."""
        view = super().finish(window, key)
        if self.augment == NO_AUGMENT:
            return view
        change = _randaugment(self.augment, min(self.size), self.fill)
        with randomness_from(sample_key(key, _RANDAUGMENT, 0)):
            changed = change(Image.fromarray(view.permute(1, 2, 0).contiguous().numpy()))
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


@functools.lru_cache(maxsize=8)
def _randaugment(text: str, side: int, fill: tuple[int, int, int]) -> RandAugment:
    settings = {"translate_const": int(side * _TRANSLATION), "img_mean": fill}
    return rand_augment_transform(text, {**settings, "interpolation": Image.Resampling.BICUBIC})


@dataclass
class Mixer:
    """Erases rectangles and mixes the images of a batch with each other."""

    classes: int
    mixup: float  # alpha; 0 for none
    cutmix: float  # alpha; 0 for none
    smoothing: float  # of the labels
    erasing: float  # probability that an image loses a rectangle to noise

    def __call__(
        self,
        images: Float[Tensor, "batch channel height width"],
        labels: Int64[Tensor, " batch"],
        key: int,
    ) -> tuple[Float[Tensor, "batch channel height width"], Float[Tensor, "batch class"]]:
        """The batch as the classifier is trained on it: images, and how much of each class they are.

        The normalized images are changed in place.
        """
        with randomness_from(key, torch_too=self.erasing > 0, device=images.device):
            if self.erasing:
                images = RandomErasing(self.erasing, mode="pixel", device=images.device)(images)
            if self.mixup or self.cutmix:
                mix = Mixup(self.mixup, self.cutmix, label_smoothing=self.smoothing, num_classes=self.classes)
                return mix(images, labels)
        return images, mixup_target(labels, self.classes, smoothing=self.smoothing)
