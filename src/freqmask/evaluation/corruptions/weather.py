"""Weather: snow, frost, fog, and drops of water or mud on the lens."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import correlate, distance_transform_edt, gaussian_filter, uniform_filter

from freqmask.evaluation.corruptions.blur import enlarged, streaked
from freqmask.evaluation.corruptions.edges import find_edges
from freqmask.evaluation.corruptions.frost import frost_pictures, window
from freqmask.evaluation.corruptions.noise import Image
from freqmask.evaluation.corruptions.plasma import plasma

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_WATER, _MUD = (175, 238, 238), (63, 42, 20)  # red, green, blue of 255
_EDGES = (50, 150)  # gradients of 8-bit images; an edge goes on at the first, somewhere it has the second
_DROP = 20.0  # pixels from its edge at which a drop is as deep as it gets
_RELIEF = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])  # light from the upper left


def snow(
    image: Image,
    random: np.random.Generator,
    mean: float,
    deviation: float,
    flake: float,
    threshold: float,
    radius: float,
    fall: float,
    share: float,
) -> Image:
    """Falling flakes over an image that has turned pale.

    Args:
        image: in [0, 1].
        random: the image's.
        mean: of the noise that flakes are cut from.
        deviation: of that noise.
        flake: how much it is enlarged.
        threshold: above which it is snow.
        radius: of the streaks in pixels.
        fall: standard deviation of the streaks in pixels.
        share: of the image; the rest is its pale copy.
    """
    height, width = image.shape[:2]
    layer = (mean + deviation * random.standard_normal((height, width, 1))).astype(np.float32)
    layer = enlarged(layer, max(flake, 1.0))
    layer = np.where(layer < threshold, 0, np.clip(layer, 0, 1)).astype(np.float32)
    layer = streaked(layer, radius, fall, random.uniform(-135, -45))
    pale = np.maximum(image, grey(image) * 1.5 + 0.5)
    return share * image + (1 - share) * pale + layer + np.rot90(layer, 2)


def frost(
    image: Image,
    random: np.random.Generator,
    share: float,
    ice: float,
    scale: float,
    pictures: str | None = None,
) -> Image:
    """Seen through a frozen pane: the image and a random window of a picture of frost, added.

    Args:
        image: in [0, 1].
        random: the image's.
        share: of the image.
        ice: share of the frost.
        scale: of the pictures: 1 is their own size.
        pictures: a folder of photographs of frost; None takes drawn frost.
    """
    choices = frost_pictures(pictures, scale, max(image.shape[:2]))
    seen = window(choices[random.integers(len(choices))], image.shape[:2], random)
    return share * image + ice * in_channels(seen, image.shape[2])


def fog(image: Image, random: np.random.Generator, density: float, decay: float) -> Image:
    """Fog of uneven density, added; the whole is darkened so that nothing becomes brighter than it was."""
    height, width = image.shape[:2]
    clouds = plasma(max(height, width), decay, random)[:height, :width, None].astype(np.float32)
    brightest = image.max()
    return (image + density * clouds) * brightest / (brightest + density)


def spatter(
    image: Image,
    random: np.random.Generator,
    mean: float,
    deviation: float,
    smoothness: float,
    threshold: float,
    strength: float,
    is_mud: float,
) -> Image:
    """Drops on the lens: shining water, or mud.

    Args:
        image: in [0, 1].
        random: the image's.
        mean: of the noise that drops are cut from.
        deviation: of that noise.
        smoothness: standard deviation in pixels of the Gaussian that it is blurred by.
        threshold: above which it is a drop.
        strength: of the water's shine; of mud the blur of its edge in pixels.
        is_mud: 1 for mud, 0 for water.
    """
    layer = mean + deviation * random.standard_normal(image.shape[:2])
    layer = gaussian_filter(layer, smoothness, mode="nearest", truncate=4.0)
    if is_mud:
        mud = gaussian_filter((layer > threshold).astype(float), strength, mode="nearest", truncate=4.0)
        mud = np.where(mud < 0.8, 0, mud).astype(np.float32)[..., None]
        return image * (1 - mud) + mud * in_channels(_colour(_MUD), image.shape[2])
    shine = (strength * _shine(np.where(layer < threshold, 0, layer)))[..., None].astype(np.float32)
    return image + shine * in_channels(_colour(_WATER), image.shape[2])


def _shine(drops: np.ndarray) -> np.ndarray:
    """How much each pixel of drops of water shines, in [0, 1]: a relief of the distance to their edges."""
    levels = (255 * np.clip(drops, 0, 1)).astype(np.uint8)
    edges = find_edges(levels, *_EDGES)
    depth = np.minimum(distance_transform_edt(~edges), _DROP) if edges.any() else np.full(drops.shape, _DROP)
    depth = _equalised(uniform_filter(depth, 3, mode="mirror").astype(np.uint8))
    relief = np.clip(correlate(depth, _RELIEF, mode="mirror"), 0, 255)
    lit = levels * uniform_filter(relief.astype(float), 3, mode="mirror")
    return lit / max(lit.max(), 1e-8)


def _equalised(levels: np.ndarray) -> np.ndarray:
    """Levels from 0 to 255 that occur about equally often, the lowest at 0."""
    counts = np.bincount(levels.ravel(), minlength=256)
    below = counts.cumsum() - counts[counts > 0][0]
    return np.round(255 * below / max(below[-1], 1))[levels].clip(0, 255).astype(int)


def grey(image: Image) -> Image:
    """Luma (ITU-R 601) of three channels, the mean of any others: (height, width, 1)."""
    if image.shape[2] == 3:
        return (image @ _LUMA)[..., None]
    return image.mean(axis=2, keepdims=True)


def in_channels(colours: np.ndarray, channels: int) -> np.ndarray:
    """Red, green and blue as they are, or their mean for images of any other number of channels."""
    return colours if channels == 3 else colours.mean(axis=-1, keepdims=True)


def _colour(levels: tuple[int, int, int]) -> np.ndarray:
    return np.array(levels, np.float32) / 255
