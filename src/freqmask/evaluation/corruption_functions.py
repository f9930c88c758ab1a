"""Noise, blur, weather and what editing and storing do: common corruptions of images, one function each.

All take an image (height, width, channel) float32 in [0, 1], a generator that belongs to the image and the numbers of
their severity (`corruptions`), and return the same, not yet clipped.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image as PillowImage
from scipy.ndimage import (
    correlate,
    distance_transform_edt,
    gaussian_filter,
    map_coordinates,
    sobel,
    uniform_filter,
)
from scipy.signal import fftconvolve
from skimage.filters import apply_hysteresis_threshold

from freqmask.spectrum import LUMA

Image = Float[np.ndarray, "height width channel"]

_SMOOTH_RADIUS = 8  # discs up to this radius have an edge of 3 pixels, larger ones of 5
_LUMA = np.array(LUMA, np.float32)
_WATER, _MUD = (np.array(levels, np.float32) / 255 for levels in ((175, 238, 238), (63, 42, 20)))
_EDGES = (50, 150)  # gradients of 8-bit images; an edge goes on at the first, somewhere it has the second
_DROP = 20.0  # pixels from its edge at which a drop is as deep as it gets
_RELIEF = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])  # light from the upper left
_FLAT = math.tan(math.pi / 8)


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


def gaussian_blur(image: Image, random: np.random.Generator, deviation: float) -> Image:
    """A Gaussian of a standard deviation in pixels, cut at four of them; the border is repeated."""
    if deviation <= 0:
        return image
    return gaussian_filter(image, (deviation, deviation, 0), mode="nearest", truncate=4.0)


def defocus_blur(image: Image, random: np.random.Generator, radius: float, edge: float) -> Image:
    """The disc of a lens out of focus, its edge smoothed by a Gaussian (both in pixels); the border is reflected."""
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
    """Frosted glass: a slight blur, pixels replaced by neighbors at most ``farthest`` away, the blur again.

    The paper speaks of pixels that are shuffled; the program meant to swap them and copies one over the other,
    because both sides of its assignment are views of one array. The published images are copies, so are ours.
    """
    height, width, channels = image.shape
    blurred = gaussian_blur(image, random, deviation)
    order = list(range(height * width))
    reach = max(1, round(farthest))
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    here = (rows[:, None] * width + columns).ravel()  # all but the border, last first
    for _ in range(int(passes)):
        down, right = random.integers(-reach, reach, (2, len(here)))
        # one after the other, because copies are copied again; lists are faster here than arrays
        for target, source in zip(here.tolist(), (here + down * width + right).tolist(), strict=True):
            order[target] = order[source]
    return gaussian_blur(blurred.reshape(-1, channels)[order].reshape(image.shape), random, deviation)


def motion_blur(image: Image, random: np.random.Generator, radius: float, deviation: float) -> Image:
    """A movement to one side, within 45 degrees of the horizontal; parameters as of `streaked`."""
    return streaked(image, radius, deviation, random.uniform(-45, 45))


def streaked(image: Image, radius: float, deviation: float, angle: float) -> Image:
    """The image drawn out to one side, by half a Gaussian, as ImageMagick's motion blur does.

    A radius in pixels has 2 radius + 1 taps; the angle is in degrees.
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
    """The middle of the image, bilinearly enlarged by a factor of at least 1 to its whole size."""
    height, width = image.shape[:2]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = np.ascontiguousarray(image[top : top + rows, left : left + columns].transpose(2, 0, 1))
    size = (max(round(rows * factor), height), max(round(columns * factor), width))
    large = F.interpolate(torch.from_numpy(middle)[None], size=size, mode="bilinear", align_corners=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[:, top : top + height, left : left + width].numpy().transpose(1, 2, 0)


def contrast(image: Image, random: np.random.Generator, factor: float) -> Image:
    """Distances from the mean of each channel, multiplied."""
    means = image.mean(axis=(0, 1), keepdims=True)
    return (image - means) * factor + means


def brightness(image: Image, random: np.random.Generator, added: float) -> Image:
    """More of the value of HSV (the largest channel); hue and saturation stay."""
    value = image.max(axis=2, keepdims=True)
    brighter = np.clip(value + added, 0, 1)
    return np.where(value > 0, image * (brighter / np.maximum(value, 1e-8)), brighter)


def saturate(image: Image, random: np.random.Generator, factor: float, added: float) -> Image:
    """The saturation of HSV, multiplied and raised.

    Gray pixels of color images turn slightly red where it is raised: their hue counts as 0, as in the
    published images. Images of one channel have no saturation and stay.
    """
    if image.shape[2] == 1:
        return image
    value, least = image.max(axis=2, keepdims=True), image.min(axis=2, keepdims=True)
    saturation = (value - least) / np.maximum(value, 1e-8)
    wanted = np.clip(saturation * factor + added, 0, 1)
    color = value - (value - image) * (wanted / np.maximum(saturation, 1e-8))
    if image.shape[2] != 3:
        return np.where(saturation > 0, color, image)
    red = np.concatenate([value, value * (1 - wanted), value * (1 - wanted)], axis=2)
    return np.where(saturation > 0, color, red)


def jpeg_compression(image: Image, random: np.random.Generator, quality: float) -> Image:
    """Stored as JPEG; other than three channels each on its own."""
    pixels = np.clip(image * 255, 0, 255).round().astype(np.uint8)
    if pixels.shape[2] == 3:
        return _stored(pixels, int(quality))
    planes = [_stored(np.ascontiguousarray(plane), int(quality)) for plane in pixels.transpose(2, 0, 1)]
    return np.stack(planes, axis=2)


def _stored(pixels: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(PillowImage.open(file, formats=["JPEG"]), np.float32) / 255


def pixelate(image: Image, random: np.random.Generator, share: float) -> Image:
    """Reduced to a share of its side and enlarged again, both by averaging over boxes."""
    height, width = image.shape[:2]
    small = (max(1, int(width * share)), max(1, int(height * share)))
    planes = []
    for plane in image.transpose(2, 0, 1):
        reduced = PillowImage.fromarray(np.ascontiguousarray(plane)).resize(small, PillowImage.Resampling.BOX)
        planes.append(np.asarray(reduced.resize((width, height), PillowImage.Resampling.BOX)))
    return np.stack(planes, axis=2)


def elastic_transform(
    image: Image, random: np.random.Generator, size: float, smoothness: float, corners: float
) -> Image:
    """A random affine map, then every pixel shifted by a smooth random field.

    Shifts have a size in pixels (0 for none) before a Gaussian smooths them, whose deviation is ``smoothness``;
    each of three points of the image may go ``corners`` pixels far.
    """
    height, width = image.shape[:2]
    # three corners of a square in the middle, of a third of the side on either hand, go each somewhere else
    centre, reach = np.array([height, width]) // 2, min(height, width) // 3
    before = centre + reach * np.array([[1, 1], [-1, 1], [-1, -1]])
    after = before + random.uniform(-corners, corners, (3, 2))
    back = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)  # (row, column, 1) -> row, column
    places = np.mgrid[:height, :width]
    homogeneous = np.concatenate([places, np.ones_like(places[:1])])
    image = _sampled(image, np.einsum("khw,kp->phw", homogeneous, back), "mirror")
    if size == 0:
        return image
    noise = random.uniform(-1, 1, (2, height, width))
    shifts = size * np.stack([smoothed(plane, smoothness) for plane in noise])
    return _sampled(image, places + shifts, "reflect")


def _sampled(image: Image, places: np.ndarray, mode: str) -> Image:
    planes = [map_coordinates(plane, places, order=1, mode=mode) for plane in image.transpose(2, 0, 1)]
    return np.stack(planes, axis=2)


def smoothed(plane: np.ndarray, deviation: float) -> np.ndarray:
    """A Gaussian cut at three standard deviations, border mirrored: as a product of cosine transforms.

    The widths here are as large as the image, where sums over a thousand taps would take a second.
    """
    rows, columns = (_transfer(length, deviation) for length in plane.shape)
    spectrum = scipy.fft.dctn(plane, norm="ortho") * rows[:, None] * columns
    return scipy.fft.idctn(spectrum, norm="ortho")


@lru_cache(maxsize=32)
def _transfer(length: int, deviation: float) -> np.ndarray:
    """What the Gaussian leaves of each cosine of a line of ``length`` pixels."""
    if deviation <= 0:
        return np.ones(length)
    reach = int(3 * deviation + 0.5)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    cosines = np.cos(np.pi / length * np.arange(length)[:, None] * np.arange(-reach, reach + 1))
    return cosines @ (taps / taps.sum())


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

    Flakes are noise of a mean and a deviation, enlarged ``flake`` times, cut off below the threshold and drawn out
    (radius and deviation ``fall`` in pixels); ``share`` is that of the image, the rest its pale copy.
    """
    height, width = image.shape[:2]
    layer = (mean + deviation * random.standard_normal((height, width, 1))).astype(np.float32)
    layer = enlarged(layer, max(flake, 1.0))
    layer = np.where(layer < threshold, 0, np.clip(layer, 0, 1)).astype(np.float32)
    layer = streaked(layer, radius, fall, random.uniform(-135, -45))
    pale = np.maximum(image, gray(image) * 1.5 + 0.5)
    return share * image + (1 - share) * pale + layer + np.rot90(layer, 2)


def frost(
    image: Image,
    random: np.random.Generator,
    share: float,
    ice: float,
    scale: float,
    pictures: Sequence[Float[np.ndarray, "rows columns 3"]] = (),
) -> Image:
    """Seen through a frozen pane: shares of the image and of a random window of a picture of frost, added.

    The pictures have the ``scale`` already.
    """
    picture, (height, width) = pictures[int(random.integers(len(pictures)))], image.shape[:2]
    top = random.integers(picture.shape[0] - height + 1)
    left = random.integers(picture.shape[1] - width + 1)
    window = picture[top : top + height, left : left + width]
    return share * image + ice * in_channels(window, image.shape[2])


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
    """Drops on the lens: shining water, or (``is_mud`` 1) mud.

    Drops are noise of a mean and a deviation, blurred (``smoothness`` in pixels) and cut off below the threshold;
    ``strength`` is that of the water's shine, of mud the blur of its edge in pixels.
    """
    layer = mean + deviation * random.standard_normal(image.shape[:2])
    layer = gaussian_filter(layer, smoothness, mode="nearest", truncate=4.0)
    if is_mud:
        mud = gaussian_filter((layer > threshold).astype(float), strength, mode="nearest", truncate=4.0)
        mud = np.where(mud < 0.8, 0, mud).astype(np.float32)[..., None]
        return image * (1 - mud) + mud * in_channels(_MUD, image.shape[2])
    shine = (strength * _shine(np.where(layer < threshold, 0, layer)))[..., None].astype(np.float32)
    return image + shine * in_channels(_WATER, image.shape[2])


def _shine(drops: np.ndarray) -> np.ndarray:
    """How much each pixel of drops of water shines, in [0, 1]: a relief of the distance to their edges."""
    levels = (255 * np.clip(drops, 0, 1)).astype(np.uint8)
    edges = find_edges(levels, *_EDGES)
    depth = np.minimum(distance_transform_edt(~edges), _DROP) if edges.any() else np.full(drops.shape, _DROP)
    smooth = uniform_filter(depth, 3, mode="mirror").astype(np.uint8)
    counts = np.bincount(smooth.ravel(), minlength=256)  # equalized, as OpenCV's equalizeHist
    below = counts.cumsum() - counts[counts > 0][0]
    depth = np.round(255 * below / max(below[-1], 1))[smooth].clip(0, 255).astype(int)
    relief = np.clip(correlate(depth, _RELIEF, mode="mirror"), 0, 255)
    lit = levels * uniform_filter(relief.astype(float), 3, mode="mirror")
    return lit / max(lit.max(), 1e-8)


def gray(image: Image) -> Image:
    """Luma (ITU-R 601) of three channels, the mean of any others: (height, width, 1)."""
    if image.shape[2] == 3:
        return (image @ _LUMA)[..., None]
    return image.mean(axis=2, keepdims=True)


def in_channels(colors: np.ndarray, channels: int) -> np.ndarray:
    """Red, green and blue as they are, or their mean for images of any other number of channels."""
    return colors if channels == 3 else colors.mean(axis=-1, keepdims=True)


def find_edges(
    levels: UInt8[np.ndarray, "height width"], low: float, high: float
) -> Bool[np.ndarray, "height width"]:
    """Canny's edges: pixels whose gradient is the largest across the edge and connected with one above ``high``.

    The gradient is the sum of the magnitudes of both Sobel derivatives. Edges lie at the very pixels where the drops
    of the published spatter have them. scikit-image's finds them too, but half of them a pixel further out, and the
    shine of a drop is a matter of a few pixels: drops would shine half as much.
    """
    down, right = (sobel(levels.astype(np.int32), axis, mode="nearest") for axis in (0, 1))
    size = np.abs(down) + np.abs(right)
    padded = np.pad(size, 1)

    def beside(rows: int, columns: int) -> np.ndarray:
        height, width = size.shape
        return padded[1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    level, upright = np.abs(down) < _FLAT * np.abs(right), np.abs(right) < _FLAT * np.abs(down)
    falling = down * right > 0
    # of two equal neighbors the upper or left one is the edge
    largest = np.select(
        [level, upright, falling],
        [
            (size > beside(0, -1)) & (size >= beside(0, 1)),
            (size > beside(-1, 0)) & (size >= beside(1, 0)),
            (size > beside(-1, -1)) & (size > beside(1, 1)),
        ],
        (size > beside(-1, 1)) & (size > beside(1, -1)),
    )
    return apply_hysteresis_threshold(np.where(largest, size, 0), low, high)


def plasma(side: int, decay: float, random: np.random.Generator) -> Float[np.ndarray, "side side"]:
    """A random surface in [0, 1], by the diamond-square algorithm on a torus.

    A grid is halved until its step is one pixel. Every new point is the mean of its four neighbors plus a
    uniform displacement, which begins at 1 and is divided by decay^2 at every halving. It works on the next power of
    two above ``side``, of which the surface is a part.
    """
    whole = 1 << max(1, (side - 1).bit_length())
    surface = np.zeros((whole, whole))
    step, size = whole, 1.0
    while step >= 2:
        half, count = step // 2, whole // step
        moved = size * random.uniform(-1, 1, (3, count, count))
        corners = surface[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        middles = (pairs + np.roll(pairs, -1, axis=1)) / 4 + moved[0]  # of squares, then those of sides
        surface[half::step, half::step] = middles
        across = corners + np.roll(corners, -1, axis=1) + middles + np.roll(middles, 1, axis=0)
        surface[::step, half::step] = across / 4 + moved[1]
        along = corners + np.roll(corners, -1, axis=0) + middles + np.roll(middles, 1, axis=1)
        surface[half::step, ::step] = along / 4 + moved[2]
        step, size = half, size / decay**2
    surface -= surface.min()
    return (surface / surface.max())[:side, :side]
