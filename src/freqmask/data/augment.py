"""How images are changed beyond crops: colors on the device; RandAugment, erasing and mixing of a fine-tuning.

The results are those of torchvision's functions for floats. Two departures, both so that a batch is one
computation without a loop over images: the four color changes come in one order (brightness, contrast,
saturation, hue) instead of a random one, and every image pays for every change, applied to it or not.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from PIL import Image
from timm.data.auto_augment import RandAugment, posterize, rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from freqmask.data.transforms import Geometry
from freqmask.errors import UserError
from freqmask.rng import Keys, batch_keys, sample_key, torch_seeded, uniform
from freqmask.spectrum import Images

PerImage = Float[Tensor, " batch"]
NO_AUGMENT = "none"
_TRANSLATION = 0.45  # of the shorter side: how far RandAugment shifts at most, as in timm's transforms
_RANDAUGMENT = 1  # the view's number in the key of its RandAugment: other numbers than those of its crop


@dataclass(frozen=True)
class PhotometricSettings:
    """How strongly and how often a view's colors change. All zero: not at all.

    Raises:
        UserError: all that is out of range, in one message.
    """

    jitter: float = 0.8  # probability that an image's colors are jittered
    brightness: float = 0.4  # the factor on all values is drawn from 1 - brightness to 1 + brightness
    contrast: float = 0.4  # the same for the distance from the image's mean gray
    saturation: float = 0.2  # the same for the distance from each pixel's gray
    hue: float = 0.1  # largest turn of the color circle to either side, as a share of it, at most 0.5
    grey: float = 0.2  # probability that an image becomes gray
    blur: float = 0.5  # probability that an image is blurred
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # smallest and largest sigma of the Gaussian, in pixels
    solarise: float = 0.0  # probability that the values from 0.5 on are inverted

    def __post_init__(self) -> None:
        chances = ("jitter", "grey", "blur", "solarise")
        problems = [
            f"{name} ({getattr(self, name)}) must be a probability, 0 to 1"
            for name in chances
            if not 0 <= getattr(self, name) <= 1
        ]
        strengths = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}
        problems += [
            f"{name} ({getattr(self, name)}) must be from 0 to {limit:g}"
            for name, limit in strengths.items()
            if not 0 <= getattr(self, name) <= limit
        ]
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            problems.append(f"blur_sigma {self.blur_sigma} must be two positive numbers, the smaller first")
        if problems:
            raise UserError("; ".join(problems))


NO_CHANGE = PhotometricSettings(0.0, 0.0, 0.0, 0.0, 0.0, grey=0.0, blur=0.0)
# DINO's two global views (docs/methods.md, FOLK): the first always blurred, the second sometimes solarized.
DINO_VIEWS = (
    PhotometricSettings(blur=1.0, solarise=0.0),
    PhotometricSettings(blur=0.1, solarise=0.2),
)


class PhotometricAugmentation(nn.Module):
    """Changes the colors and sharpness of each image of a batch, by numbers from its key.

    Hue, saturation, gray and solarize mean something for color images alone: with other than three channels
    only brightness, contrast and blur are done, and :meth:`notes` says so.
    """

    def __init__(self, settings: PhotometricSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or PhotometricSettings()

    def notes(self, channels: int) -> list[str]:
        """Sentences on what is switched off for images of that many channels."""
        color_only = ("saturation", "hue", "grey", "solarise")
        off = [name for name in color_only if getattr(self.settings, name) > 0]
        if channels == 3 or not off:
            return []
        return [f"{', '.join(off)} off: these changes are for three channels, the images have {channels}."]

    def forward(self, images: Images, keys: Keys | None = None) -> Images:
        """The batch, floats in [0, 1], changed by one key an image and view; without keys by fresh ones."""
        keys = batch_keys(images, keys)
        settings = self.settings
        if images.shape[1] != 3:
            settings = replace(settings, saturation=0.0, hue=0.0, grey=0.0, solarise=0.0)
        if settings.jitter > 0:
            jittered = _jittered(images, keys, settings)
            images = torch.where(_drawn(keys, "jitter", settings.jitter), jittered, images)
        if settings.grey > 0:
            images = torch.where(_drawn(keys, "grey", settings.grey), _gray(images).expand_as(images), images)
        if settings.blur > 0:
            sigma = _between(uniform(keys, "blur sigma"), *settings.blur_sigma)
            images = gaussian_blur(images, sigma, uniform(keys, "blur") < settings.blur)
        if settings.solarise > 0:
            solarized = torch.where(images >= 0.5, 1 - images, images)
            images = torch.where(_drawn(keys, "solarise", settings.solarise), solarized, images)
        return images


def adjust_brightness(images: Images, factor: PerImage) -> Images:
    """Multiply the values by a factor; clamped to [0, 1]."""
    return (images * _wide(factor)).clamp(0, 1)


def adjust_contrast(images: Images, factor: PerImage) -> Images:
    """Multiply the distance from the image's mean gray by a factor; clamped to [0, 1]."""
    mean = _gray(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(images), images, _wide(factor)).clamp(0, 1)


def adjust_saturation(images: Images, factor: PerImage) -> Images:
    """Multiply the distance from each pixel's gray by a factor; clamped to [0, 1]. Three channels."""
    return torch.lerp(_gray(images).expand_as(images), images, _wide(factor)).clamp(0, 1)


def adjust_hue(images: Images, turn: PerImage) -> Images:
    """Turn the color circle of HSV by a share of it, -0.5 to 0.5. Three channels."""
    value, brightest = images.max(dim=1)
    chroma = value - images.amin(dim=1)
    red, green, blue = images.unbind(1)
    scale = torch.where(chroma > 0, chroma, 1)
    # The angle in sixths of the circle, counted from the brightest channel's own corner.
    sector = torch.stack(((green - blue) / scale, 2 + (blue - red) / scale, 4 + (red - green) / scale), dim=1)
    angle = sector.gather(1, brightest[:, None])[:, 0] + 6 * turn[:, None, None]
    channels = []
    for corner in (5, 3, 1):
        around = torch.remainder(corner + angle, 6)
        channels.append(value - chroma * torch.minimum(around, 4 - around).clamp(0, 1))
    return torch.stack(channels, dim=1)


def gaussian_blur(images: Images, sigma: PerImage, chosen: Bool[Tensor, " batch"] | None = None) -> Images:
    """Blur each image with its own Gaussian (``sigma`` in pixels), borders mirrored without repeating the edge.

    Rows and columns are multiplied by a banded matrix each, which holds the mirrored borders: two batched
    matrix products, the same on every device, instead of one convolution an image. None in ``chosen`` blurs all.
    """
    with torch.autocast(images.device.type, enabled=False):
        exact = images if images.dtype == torch.float64 else images.float()
        vertical = _blur_matrix(images.shape[2], sigma, chosen).to(exact.dtype)
        horizontal = _blur_matrix(images.shape[3], sigma, chosen).to(exact.dtype)
        blurred = vertical[:, None] @ exact @ horizontal[:, None].mT
    return blurred.to(images.dtype)


def blur_reach(side: int) -> int:
    """How many pixels the kernel reaches to each side: a tenth of the image across, 23 pixels at 224."""
    return min(max(1, round(side / 20)), side - 1)


def _blur_matrix(
    side: int, sigma: PerImage, chosen: Bool[Tensor, " batch"] | None
) -> Float[Tensor, "batch out in"]:
    """What each output pixel of a line takes from each input pixel; the identity where not chosen."""
    reach = blur_reach(side)
    place = torch.arange(side, device=sigma.device)
    out, source = place[:, None], place[None, :]
    # A tap that leaves the line comes back mirrored: source -j stands for j, and 2 (side - 1) - j for j.
    direct, before, after = source - out, -source - out, 2 * (side - 1) - source - out
    weight = torch.zeros(1, device=sigma.device)
    for distance, valid in ((direct, source >= 0), (before, source > 0), (after, source < side - 1)):
        tap = torch.exp(-0.5 * (distance / sigma[:, None, None]) ** 2)
        weight = weight + torch.where(valid & (distance.abs() <= reach), tap, 0)
    matrix = weight / weight.sum(dim=2, keepdim=True)
    if chosen is None:
        return matrix
    return torch.where(chosen[:, None, None], matrix, torch.eye(side, device=sigma.device))


def _jittered(images: Images, keys: Tensor, settings: PhotometricSettings) -> Images:
    drawn = uniform(keys, "colour", (4,))  # streams keep their names, or old runs would draw anew
    strengths = (settings.brightness, settings.contrast, settings.saturation)
    for place, adjust in enumerate((adjust_brightness, adjust_contrast, adjust_saturation)):
        if strengths[place] > 0:
            images = adjust(images, _between(drawn[:, place], 1 - strengths[place], 1 + strengths[place]))
    if settings.hue > 0:
        images = adjust_hue(images, _between(drawn[:, 3], -settings.hue, settings.hue))
    return images


def _gray(images: Images) -> Float[Tensor, "batch 1 height width"]:
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _between(drawn: PerImage, low: float, high: float) -> PerImage:
    return low + (high - low) * drawn


def _drawn(keys: Tensor, stream: str, probability: float) -> Bool[Tensor, "batch 1 1 1"]:
    return _wide(uniform(keys, stream) < probability)


def _wide(numbers: Tensor) -> Tensor:
    return numbers[:, None, None, None]


@contextmanager
def randomness_from(key: int, torch_too: bool = False, device: torch.device | None = None) -> Iterator[None]:
    """Python's, numpy's and (``torch_too``) torch's generators start from a signed 64-bit key; restored afterwards.

    timm draws from them; so an image's changes follow from its key alone, whatever the worker or a restart.
    """
    before = random.getstate(), np.random.get_state()
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    try:
        with torch_seeded(key, device) if torch_too else nullcontext():
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
        """The view, changed by numbers from its key; of color, and 8 bits of it where a deep image is among others."""
        view = super().finish(window, key)
        if self.augment == NO_AUGMENT:
            return view
        if view.is_floating_point():
            view = (view * 255).round().to(torch.uint8)
        change = _randaugment(self.augment, min(self.size), self.fill)
        with randomness_from(sample_key(key, _RANDAUGMENT, 0)):
            changed = change(Image.fromarray(view.permute(1, 2, 0).contiguous().numpy()))
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


@functools.lru_cache(maxsize=8)
def _randaugment(text: str, side: int, fill: tuple[int, int, int]) -> RandAugment:
    settings = {"translate_const": int(side * _TRANSLATION), "img_mean": fill}
    change = rand_augment_transform(text, {**settings, "interpolation": Image.Resampling.BICUBIC})
    for one in change.ops:
        if one.name.startswith("Posterize"):
            one.aug_fn = _posterize
    return change


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    # the highest level keeps no bit, which is black; Pillow refuses it since 13
    return posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


@dataclass
class Mixer:
    """Erases rectangles and mixes the images of a batch with each other."""

    classes: int
    mixup: float  # alpha; 0 for none
    cutmix: float  # alpha; 0 for none
    smoothing: float  # of the labels
    erasing: float  # probability that an image loses a rectangle to noise

    def __call__(
        self, images: Images, labels: Int64[Tensor, " batch"], key: int
    ) -> tuple[Images, Float[Tensor, "batch class"]]:
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
