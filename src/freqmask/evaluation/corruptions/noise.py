"""Noise on every value: Gaussian, shot, impulse, speckle.

All corruptions take an image (height, width, channel) float32 in [0, 1], the numbers of their severity
(`strengths`) and a generator that belongs to the image, and return the same, not yet clipped.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Image = Float[np.ndarray, "height width channel"]


def gaussian_noise(image: Image, random: np.random.Generator, deviation: float) -> Image:
    """Normal noise of a standard deviation in image units: a sensor in the dark."""
    return image + deviation * random.standard_normal(image.shape, np.float32)


def shot_noise(image: Image, random: np.random.Generator, photons: float) -> Image:
    """Poisson noise; white is so many photons."""
    return (random.poisson(image * photons) / photons).astype(np.float32)


def impulse_noise(image: Image, random: np.random.Generator, share: float) -> Image:
    """A share of the values, each channel on its own, becomes 0 or 1 with equal chance."""
    struck = random.random(image.shape, np.float32) <= share
    white = random.random(image.shape, np.float32) <= 0.5
    return np.where(struck, white.astype(np.float32), image)


def speckle_noise(image: Image, random: np.random.Generator, deviation: float) -> Image:
    """Normal noise in proportion to the value."""
    return image * (1 + deviation * random.standard_normal(image.shape, np.float32))
