"""Weather: snow, fog, drops of water or mud on the lens, and frost, whose pictures are photographs or drawn.

ImageNet-C adds photographs of frozen panes, which are not ours to ship. What stands in for them is drawn:
needles of ice in patches of one direction each, with the brightness, the tint, the contrast and the falling
spectrum of the photographs. `--frost FOLDER` takes the photographs themselves.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image as PillowImage
from scipy.ndimage import correlate, distance_transform_edt, gaussian_filter, sobel, uniform_filter
from skimage.filters import apply_hysteresis_threshold

from freqmask.errors import UserError
from freqmask.evaluation.corruption_functions import Image, enlarged, streaked
from freqmask.images import LUMA

Picture = Float[np.ndarray, "height width 3"]

# Red, green and blue on average, and the standard deviation: as measured on the authors' five photographs.
_PANES = (
    ((0.31, 0.58, 0.65), 0.07),
    ((0.79, 0.80, 0.84), 0.09),
    ((0.79, 0.80, 0.84), 0.09),
    ((0.54, 0.60, 0.65), 0.11),
    ((0.44, 0.48, 0.53), 0.17),
)
_PANE = (360, 540)  # pixels, about the size of the photographs
_DIRECTIONS = 9
_SUFFIXES = (".png", ".jpg", ".jpeg")
_LUMA = np.array(LUMA, np.float32)
_WATER, _MUD = (np.array(levels, np.float32) / 255 for levels in ((175, 238, 238), (63, 42, 20)))
_EDGES = (50, 150)  # gradients of 8-bit images; an edge goes on at the first, somewhere it has the second
_DROP = 20.0  # pixels from its edge at which a drop is as deep as it gets
_RELIEF = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])  # light from the upper left
_FLAT = math.tan(math.pi / 8)


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
    pictures: str | None = None,
) -> Image:
    """Seen through a frozen pane: shares of the image and of a random window of a picture of frost, added.

    ``scale`` and ``pictures`` as ``frost_pictures`` takes them.
    """
    choices = frost_pictures(pictures, scale, max(image.shape[:2]))
    picture, (height, width) = choices[random.integers(len(choices))], image.shape[:2]
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
        _halve(surface, step, size, random)
        step, size = step // 2, size / decay**2
    surface -= surface.min()
    return (surface / surface.max())[:side, :side]


def _halve(surface: np.ndarray, step: int, size: float, random: np.random.Generator) -> None:
    """Fill in the points between those of a grid, in place: middles of squares, then middles of sides."""
    half, count = step // 2, len(surface) // step
    moved = size * random.uniform(-1, 1, (3, count, count))
    corners = surface[::step, ::step]
    pairs = corners + np.roll(corners, -1, axis=0)
    middles = (pairs + np.roll(pairs, -1, axis=1)) / 4 + moved[0]
    surface[half::step, half::step] = middles
    across = corners + np.roll(corners, -1, axis=1) + middles + np.roll(middles, 1, axis=0)
    surface[::step, half::step] = across / 4 + moved[1]
    along = corners + np.roll(corners, -1, axis=0) + middles + np.roll(middles, 1, axis=1)
    surface[half::step, ::step] = along / 4 + moved[2]


@lru_cache(maxsize=4)
def frost_pictures(folder: str | None, scale: float, least: int) -> tuple[Picture, ...]:
    """Pictures of frost in [0, 1] from a folder of photographs (PNG, JPEG), or drawn ones, at a scale of their size.

    Reducing takes single pixels, as the published program does, so that frost stays sharp; the shorter side has at
    least ``least`` pixels, whatever the scale.

    Raises:
        UserError: the folder holds no pictures.
    """
    originals = _drawn_panes() if folder is None else _photographs(Path(folder))
    return tuple(_scaled(picture, scale, least) for picture in originals)


def check_frost(folder: str | None) -> None:
    """Raises a UserError for a folder without photographs."""
    if folder is not None:
        _files(Path(folder))


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise UserError(
            f"frost ({folder}) must be a folder of photographs of frost (PNG or JPEG), such as frost1.png to "
            "frost6.jpg of ImageNet-C's authors; leave it out for drawn frost"
        )
    return files


def _photographs(folder: Path) -> list[Picture]:
    pictures = []
    for file in _files(folder):
        try:
            with PillowImage.open(file, formats=["PNG", "JPEG"]) as opened:
                pictures.append(np.asarray(opened.convert("RGB"), np.float32) / 255)
        except OSError as error:
            raise UserError(f"frost ({file}) cannot be read as an image; take it away") from error
    return pictures


def _scaled(picture: Picture, scale: float, least: int) -> Picture:
    scale = max(scale, least / min(picture.shape[:2]))
    if scale == 1:
        return picture
    size = tuple(max(least, round(side * scale)) for side in picture.shape[:2])
    planes = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None]
    small = F.interpolate(planes, size=size, mode="bilinear", align_corners=False)
    return np.ascontiguousarray(small[0].numpy().transpose(1, 2, 0))


@lru_cache(maxsize=1)
def _drawn_panes() -> list[Picture]:
    """The drawn pictures, the same everywhere."""
    panes = []
    for number, (tint, contrast) in enumerate(_PANES):
        ice = _needles(np.random.Generator(np.random.Philox(key=number)))
        panes.append(np.clip(np.array(tint, np.float32) + contrast * ice[..., None], 0, 1).astype(np.float32))
    return panes


def _needles(random: np.random.Generator) -> Float[np.ndarray, "height width"]:
    """A drawn pane of mean 0 and deviation 1: in every patch needles of another direction, and uneven light."""
    height, width = _PANE
    down, right = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency, angle = np.hypot(down, right), np.arctan2(down, right)
    ice, total = np.zeros(_PANE), np.zeros(_PANE)
    for number in range(_DIRECTIONS):
        off = (angle - np.pi * number / _DIRECTIONS + np.pi / 2) % np.pi - np.pi / 2
        along = np.exp(-0.5 * (off / 0.13) ** 2) * _falling(frequency, 1.1, 0.015)
        needles = np.abs(_filtered(random, along))
        patch = np.exp(3.5 * _filtered(random, _falling(frequency, 2.0, 0.01)))
        ice, total = ice + patch * needles, total + patch
    light = _filtered(random, _falling(frequency, 2.0, 0.003))
    return _standard(_standard(ice / total) + 0.5 * light)


def _falling(frequency: np.ndarray, power: float, flat_below: float) -> np.ndarray:
    return np.where(frequency > 0, np.maximum(frequency, flat_below) ** -power, 0)


def _filtered(random: np.random.Generator, amplitudes: np.ndarray) -> np.ndarray:
    return _standard(np.fft.irfft2(np.fft.rfft2(random.standard_normal(_PANE)) * amplitudes, _PANE))


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()
