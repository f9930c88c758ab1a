"""What editing and storing do: contrast, brightness, saturation, elastic shifts, pixelation, JPEG."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import scipy.fft
from PIL import Image as PillowImage
from scipy.ndimage import map_coordinates

from freqmask.evaluation.corruptions.noise import Image


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

    Grey pixels of colour images turn slightly red where it is raised: their hue counts as 0, as in the
    published images. Images of one channel have no saturation and stay.
    """
    if image.shape[2] == 1:
        return image
    value, least = image.max(axis=2, keepdims=True), image.min(axis=2, keepdims=True)
    saturation = (value - least) / np.maximum(value, 1e-8)
    wanted = np.clip(saturation * factor + added, 0, 1)
    colour = value - (value - image) * (wanted / np.maximum(saturation, 1e-8))
    if image.shape[2] != 3:
        return np.where(saturation > 0, colour, image)
    red = np.concatenate([value, value * (1 - wanted), value * (1 - wanted)], axis=2)
    return np.where(saturation > 0, colour, red)


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

    Args:
        image: in [0, 1].
        random: the image's.
        size: of the shifts in pixels, before they are smoothed; 0 for none.
        smoothness: standard deviation in pixels of the Gaussian that smooths them.
        corners: how far each of three points of the image may go, in pixels.
    """
    height, width = image.shape[:2]
    image = _sampled(image, _affine_places(height, width, random, corners), "mirror")
    if size == 0:
        return image
    noise = random.uniform(-1, 1, (2, height, width))
    shifts = size * np.stack([smoothed(noise[0], smoothness), smoothed(noise[1], smoothness)])
    return _sampled(image, np.mgrid[:height, :width] + shifts, "reflect")


def _affine_places(height: int, width: int, random: np.random.Generator, corners: float) -> np.ndarray:
    """(2, height, width): row and column in the original of each pixel after a random affine map.

    Three corners of a square in the middle, of a third of the side on either hand, go each somewhere else.
    """
    centre, reach = np.array([height, width]) // 2, min(height, width) // 3
    before = centre + reach * np.array([[1, 1], [-1, 1], [-1, -1]])
    after = before + random.uniform(-corners, corners, (3, 2))
    back = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)  # (row, column, 1) -> row, column
    rows, columns = np.mgrid[:height, :width]
    return np.einsum("khw,kp->phw", np.stack([rows, columns, np.ones_like(rows)]), back)


def _sampled(image: Image, places: np.ndarray, mode: str) -> Image:
    """The image at other places, bilinearly; the border mirrored, its pixels repeated or not."""
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
