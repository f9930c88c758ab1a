"""Spatial corruptions of MFM's restoration tasks: super-resolution, deblurring, denoising (arXiv 2206.07706).

They are batch modules like the filters, randomness from the keys.
Strengths are meant for 224 pixels; ``"auto"`` scales them with the shorter side (our choice).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqmask.errors import UserError
from freqmask.rng import Keys, batch_keys, normal, uniform
from freqmask.spectrum import REFERENCE_SIDE, Images, constant, image_size, single_or_double

Auto = Literal["auto"]


def _check_auto(name: str, value: float | str, least: float) -> None:
    if isinstance(value, str):
        if value != "auto":
            raise UserError(f"{name} ({value!r}) must be a number or 'auto'; 'auto' suits the image size")
    elif not (math.isfinite(value) and value > least):
        raise UserError(f"{name} ({value}) must be above {least:g}; try 'auto'")


class Degradation(nn.Module):
    """What makes images worse: a subclass defines ``degrade``."""

    @abstractmethod
    def degrade(self, images: Tensor, keys: Tensor) -> Tensor:
        """Images of the same size and precision; what is random is drawn from the keys, one an image."""

    def forward(self, images: Images, keys: Keys | None = None) -> Images:
        """Degrades a batch.

        Args:
            images: in [0, 1].
            keys: one an image; ``None`` draws fresh ones.

        Returns:
            Of the same size, float32 or float64; noise may leave [0, 1].
        """
        keys = batch_keys(images, keys)
        return self.degrade(single_or_double(images), keys)


class Downscale(Degradation):
    """Bicubic down without antialiasing, clamp, bicubic up, clamp: the input of super-resolution.

    Args:
        factor: how many pixels become one, above 1; ``"auto"``: 8 at 224 pixels, scaled with the shorter
            side, at least 2.

    Raises:
        UserError: for a factor out of range.
    """

    def __init__(self, factor: float | Auto = "auto") -> None:
        super().__init__()
        _check_auto("factor", factor, 1.0)
        self.factor = factor

    def factor_at(self, height: int, width: int) -> float:
        """The factor, above 1, for images of (H, W) pixels."""
        scaled = 8.0 * min(height, width) / REFERENCE_SIDE
        return max(2.0, scaled) if isinstance(self.factor, str) else self.factor

    def degrade(self, images: Tensor, keys: Tensor) -> Tensor:
        """Bicubic down and up; nothing is random."""
        height, width = image_size(images)
        factor = self.factor_at(height, width)
        small = (max(1, round(height / factor)), max(1, round(width / factor)))
        # an antialiased resize would be another task: aliasing is part of what must be undone
        reduced = F.interpolate(images, size=small, mode="bicubic", align_corners=False).clamp(0, 1)
        return F.interpolate(reduced, size=(height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def reflected(length: int, margin: int) -> list[int]:
    """Places of a line continued by reflection without repeating its ends, as often as needed.

    Args:
        length: pixels of the line.
        margin: how many places before and after it.

    Returns:
        ``length + 2 margin`` places in [0, length).

    >>> reflected(4, 2)
    [2, 1, 0, 1, 2, 3, 2, 1]
    """
    period = max(1, 2 * (length - 1))
    return [min(place % period, -place % period) for place in range(-margin, length + margin)]


@constant
def _margins(length: int, margin: int, device: torch.device) -> Tensor:
    return torch.tensor(reflected(length, margin), device=device)


@constant
def gaussian_kernels(sizes: tuple[int, ...], sigma: float, device: torch.device) -> Tensor:
    """Normalized one-dimensional kernels, centered in the width of the largest.

    Args:
        sizes: odd numbers of taps.
        sigma: standard deviation in pixels.
        device: where they are wanted.

    Returns:
        float32 (sizes, largest); the outer product of a row with itself is the two-dimensional kernel.
    """
    places = torch.arange(max(sizes), dtype=torch.float64) - max(sizes) // 2
    taps = torch.exp(-0.5 * (places / sigma).square())
    kernels = torch.stack([torch.where(places.abs() <= size // 2, taps, 0.0) for size in sizes])
    return (kernels / kernels.sum(-1, keepdim=True)).float().to(device)


class Blur(Degradation):
    """Isotropic Gaussian blur, kernel size drawn per image, border reflected without repeating the edge.

    Args:
        sizes: odd kernel sizes, one is drawn for each image; ``"auto"``: 7, 9, ..., 21 at 224 pixels.
        sigma: in pixels, above 0; ``"auto"``: 5 at 224 pixels.

    Raises:
        UserError: for a setting out of range.
    """

    def __init__(self, sizes: Sequence[int] | Auto = "auto", sigma: float | Auto = "auto") -> None:
        super().__init__()
        _check_auto("sigma", sigma, 0.0)
        if isinstance(sizes, str):
            _check_auto("sizes", sizes, 0.0)
        elif not len(sizes) or any(size < 1 or size % 2 == 0 for size in sizes):
            raise UserError(f"sizes ({list(sizes)}) must be odd and at least 1; try sizes=[7, 9, 11]")
        self.sizes = sizes if isinstance(sizes, str) else tuple(sizes)
        self.sigma = sigma

    def sizes_at(self, height: int, width: int) -> tuple[int, ...]:
        """The odd kernel sizes for images of (H, W) pixels.

        Scaled ones are at least 3 and may coincide, so that each keeps its chance.
        """
        if not isinstance(self.sizes, str):
            return self.sizes
        scale = min(height, width) / REFERENCE_SIDE
        return tuple(max(3, 2 * math.floor(size * scale / 2) + 1) for size in range(7, 22, 2))

    def sigma_at(self, height: int, width: int) -> float:
        """The standard deviation in pixels for images of (H, W) pixels."""
        return 5.0 * min(height, width) / REFERENCE_SIDE if isinstance(self.sigma, str) else self.sigma

    def degrade(self, images: Tensor, keys: Tensor) -> Tensor:
        """Each image under its own kernel."""
        height, width = image_size(images)
        sizes = self.sizes_at(height, width)
        kernels = gaussian_kernels(sizes, self.sigma_at(height, width), images.device)
        kernel = kernels[(uniform(keys, "blur/size") * len(sizes)).long()].to(images.dtype)
        return _convolve(_convolve(images, kernel, -2), kernel, -1)


def _convolve(images: Tensor, kernel: Tensor, dim: int) -> Tensor:
    """Each image with its own kernel along one axis; a sum of shifted images."""
    length, taps = image_size(images)[dim], kernel.shape[1]
    padded = images.index_select(dim, _margins(length, taps // 2, images.device))
    # shifted sums rather than a grouped convolution: no autocast, no TF32, fused when compiled
    blurred = torch.zeros_like(images)
    for tap in range(taps):
        blurred = torch.addcmul(blurred, kernel[:, tap, None, None, None], padded.narrow(dim, tap, length))
    return blurred


class Noise(Degradation):
    """Gaussian noise, per pixel and channel, not clamped.

    Args:
        sigma: standard deviation in the images' unit, above 0; the same at every size.

    Raises:
        UserError: for a sigma out of range.
    """

    def __init__(self, sigma: float = 75 / 255) -> None:
        super().__init__()
        if not (math.isfinite(sigma) and sigma > 0):
            raise UserError(f"sigma ({sigma}) must be above 0; the published 75/255 is 0.294")
        self.sigma = sigma

    def degrade(self, images: Tensor, keys: Tensor) -> Tensor:
        """A number for each pixel and channel."""
        return images + self.sigma * normal(keys, "noise", images.shape[1:]).to(images.dtype)
