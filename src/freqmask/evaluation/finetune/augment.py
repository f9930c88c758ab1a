"""What a training picture goes through: timm's RandAugment, erasing, mixup and cutmix, from keys."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from freqmask.data.transforms import Geometry
from freqmask.rng import sample_key

NO_AUGMENT = "none"
_TRANSLATION = 0.45  # of the shorter side: how far RandAugment shifts at most, as in timm's transforms
_RANDAUGMENT = 1  # the view's number in the key of its RandAugment: other numbers than those of its crop


@contextmanager
def randomness_from(key: int, torch_too: bool = False, device: torch.device | None = None) -> Iterator[None]:
    """Python's and numpy's global generators start from a key inside, and are as before afterwards.

    timm draws from them; so a picture's changes follow from its key alone, whatever the worker or a restart.

    Args:
        key: a signed 64-bit number.
        torch_too: whether torch's generators do the same.
        device: of torch, whose generator is put back beside the CPU's.
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
            torch.manual_seed(key)
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@dataclass(frozen=True)
class AugmentedGeometry(Geometry):
    """A view that RandAugment changes after it is cut and mirrored.

    Args:
        augment: as timm writes it, such as ``rand-m9-mstd0.5-inc1``; ``none`` leaves the view as it is.
        fill: colour of what comes in from outside the picture, three levels of 0 to 255.
    """

    augment: str = NO_AUGMENT
    fill: tuple[int, int, int] = (124, 116, 104)

    def finish(
        self, window: Shaped[Tensor, "channel window_height window_width"], key: int
    ) -> Shaped[Tensor, "channel height width"]:
        """The view, changed by numbers from its key; only 8-bit colour can be."""
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


class Mixer:
    """Erases rectangles and mixes the pictures of a batch with each other.

    Args:
        classes: of the data.
        mixup: alpha; 0 for none.
        cutmix: alpha; 0 for none.
        smoothing: of the labels.
        erasing: probability that a picture loses a rectangle to noise.
    """

    def __init__(self, classes: int, mixup: float, cutmix: float, smoothing: float, erasing: float) -> None:
        self.classes, self.smoothing, self.erasing = classes, smoothing, erasing
        self.mix = (
            Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes) if mixup or cutmix else None
        )

    def __call__(
        self,
        images: Float[Tensor, "batch channel height width"],
        labels: Int64[Tensor, " batch"],
        key: int,
    ) -> tuple[Float[Tensor, "batch channel height width"], Float[Tensor, "batch class"]]:
        """The batch as the classifier learns from it.

        Args:
            images: normalised; changed in place.
            labels: their classes.
            key: of the batch.

        Returns:
            Images, and how much of each class they are.
        """
        with randomness_from(key, torch_too=self.erasing > 0, device=images.device):
            if self.erasing:
                images = RandomErasing(self.erasing, mode="pixel", device=images.device)(images)
            if self.mix is not None:
                return self.mix(images, labels)
        return images, mixup_target(labels, self.classes, smoothing=self.smoothing)
