"""Blur: defocused, through glass, in motion, zooming, and Gaussian."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve

from freqmask.evaluation.corruptions.noise import Image

_SMOOTH_RADIUS = 8  # discs up to this radius have an edge of 3 pixels, larger ones of 5


def gaussian_blur(image: Image, random: np.random.Generator, deviation: float) -> Image:
    """A Gaussian of a standard deviation in pixels, cut at four of them; the border is repeated."""
    if deviation <= 0:
        return image
    return gaussian_filter(image, (deviation, deviation, 0), mode="nearest", truncate=4.0)


def defocus_blur(image: Image, random: np.random.Generator, radius: float, edge: float) -> Image:
    """The disc of a lens out of focus; the border is reflected.

    Args:
        image: in [0, 1].
        random: not used.
        radius: of the disc in pixels.
        edge: standard deviation in pixels of the Gaussian that smooths its edge.
    """
    kernel = disc(radius, edge)
    margin = len(kernel) // 2
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    return fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1)).astype(np.float32)


def disc(radius: float, edge: float) -> np.ndarray:
    """The kernel of `defocus_blur`, (side, side), odd, of sum 1."""
    reach = 1 if radius <= _SMOOTH_RADIUS else 2
    places = np.arange(-math.floor(radius) - reach, math.floor(radius) + reach + 1)
    hard = (places[:, None] ** 2 + places**2 <= radius**2).astype(np.float32)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(edge, 1e-3)) ** 2)
    smooth = fftconvolve(hard, np.outer(taps, taps), mode="same")
    return np.clip(smooth, 0, None) / np.clip(smooth, 0, None).sum()


def glass_blur(
    image: Image, random: np.random.Generator, deviation: float, farthest: float, passes: float
) -> Image:
    """Frosted glass: a slight blur, pixels replaced by neighbours, the blur again.

    The paper speaks of pixels that are shuffled; the program meant to swap them and copies one over the other,
    because both sides of its assignment are views of one array. The published images are copies, so are ours.

    Args:
        image: in [0, 1].
        random: the image's.
        deviation: of the blur in pixels.
        farthest: how far away in rows and columns a pixel may be taken from, in pixels.
        passes: how often this is done to the whole image.
    """
    height, width, channels = image.shape
    blurred = gaussian_blur(image, random, deviation)
    order = list(range(height * width))
    reach = max(1, round(farthest))
    for _ in range(int(passes)):
        _copy(order, (height, width), reach, random)
    return gaussian_blur(blurred.reshape(-1, channels)[order].reshape(image.shape), random, deviation)


def _copy(order: list[int], size: tuple[int, int], reach: int, random: np.random.Generator) -> None:
    """Replace every pixel but those at the border, last first, by one at most ``reach`` away, in place.

    One after the other, because copies are copied again; lists are faster here than arrays.
    """
    height, width = size
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    here = (rows[:, None] * width + columns).ravel()
    down, right = random.integers(-reach, reach, (2, len(here)))
    for one, other in zip(here.tolist(), (here + down * width + right).tolist(), strict=True):
        order[one] = order[other]


def motion_blur(image: Image, random: np.random.Generator, radius: float, deviation: float) -> Image:
    """A movement to one side, within 45 degrees of the horizontal; parameters as of `streaked`."""
    return streaked(image, radius, deviation, random.uniform(-45, 45))


def streaked(image: Image, radius: float, deviation: float, angle: float) -> Image:
    """The image drawn out to one side, by half a Gaussian, as ImageMagick's motion blur does.

    Args:
        image: any channels.
        radius: of the streak in pixels; it has 2 radius + 1 taps.
        deviation: of the Gaussian in pixels.
        angle: in degrees.
    """
    taps = 2 * math.ceil(radius) + 1
    weights = np.exp(-0.5 * (np.arange(taps) / deviation) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    steps = np.arange(taps)
    rows = np.ceil(steps * math.sin(math.radians(angle)) - 0.5).astype(int)
    columns = np.ceil(steps * math.cos(math.radians(angle)) - 0.5).astype(int)
    height, width = image.shape[:2]
    padded = np.pad(image, ((taps, taps), (taps, taps), (0, 0)), mode="edge")
    out = np.zeros_like(image)
    for weight, row, column in zip(weights, rows + taps, columns + taps, strict=True):
        out += weight * padded[row : row + height, column : column + width]
    return out


def zoom_blur(image: Image, random: np.random.Generator, *factors: float) -> Image:
    """A zoom during the exposure: the mean of the image (twice) and of its enlargements by the factors."""
    total = image.copy()
    for factor in factors:
        total += enlarged(image, factor)
    return total / (len(factors) + 1)


def enlarged(image: Image, factor: float) -> Image:
    """The middle of the image, bilinearly enlarged to its whole size.

    Args:
        image: any channels.
        factor: at least 1.
    """
    height, width = image.shape[:2]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = np.ascontiguousarray(image[top : top + rows, left : left + columns].transpose(2, 0, 1))
    size = (max(round(rows * factor), height), max(round(columns * factor), width))
    large = F.interpolate(torch.from_numpy(middle)[None], size=size, mode="bilinear", align_corners=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[:, top : top + height, left : left + width].numpy().transpose(1, 2, 0)
