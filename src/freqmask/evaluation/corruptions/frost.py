"""Pictures of frost: photographs from a folder, or drawn ones.

ImageNet-C adds photographs of frozen panes, which are not ours to ship. What stands in for them is drawn:
needles of ice in patches of one direction each, with the brightness, the tint, the contrast and the falling
spectrum of the photographs. `--frost FOLDER` takes the photographs themselves.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image as PillowImage

from freqmask.errors import UserError

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


@lru_cache(maxsize=4)
def frost_pictures(folder: str | None, scale: float, least: int) -> tuple[Picture, ...]:
    """Pictures of frost in [0, 1], reduced or enlarged.

    Args:
        folder: of photographs (PNG, JPEG); None for drawn ones.
        scale: of the pictures: 1 is their own size. Reducing takes single pixels, as the published program
            does, so that frost stays sharp.
        least: pixels that the shorter side has at least, whatever the scale.

    Raises:
        UserError: the folder holds no pictures.
    """
    originals = _drawn_panes() if folder is None else _photographs(Path(folder))
    return tuple(_scaled(picture, scale, least) for picture in originals)


def window(picture: Picture, size: tuple[int, int], random: np.random.Generator) -> Picture:
    """A random window of a picture that is large enough."""
    top = random.integers(picture.shape[0] - size[0] + 1)
    left = random.integers(picture.shape[1] - size[1] + 1)
    return picture[top : top + size[0], left : left + size[1]]


def check_frost(folder: str | None) -> None:
    """Refuses a folder without photographs.

    Raises:
        UserError: it holds none.
    """
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
    found = []
    for file in _files(folder):
        try:
            with PillowImage.open(file, formats=["PNG", "JPEG"]) as opened:
                found.append(np.asarray(opened.convert("RGB"), np.float32) / 255)
        except OSError as error:
            raise UserError(f"frost ({file}) cannot be read as an image; take it away") from error
    return found


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
        there = np.exp(3.5 * _filtered(random, _falling(frequency, 2.0, 0.01)))
        ice, total = ice + there * needles, total + there
    light = _filtered(random, _falling(frequency, 2.0, 0.003))
    pane = _standard(ice / total) + 0.5 * light
    return _standard(pane)


def _falling(frequency: np.ndarray, power: float, from_: float) -> np.ndarray:
    """Amplitudes that fall as a power of the frequency (cycles per pixel), level below ``from_``, no mean."""
    return np.where(frequency > 0, np.maximum(frequency, from_) ** -power, 0)


def _filtered(random: np.random.Generator, amplitudes: np.ndarray) -> np.ndarray:
    """Normal noise with these amplitudes in its half spectrum, of mean 0 and deviation 1."""
    return _standard(np.fft.irfft2(np.fft.rfft2(random.standard_normal(_PANE)) * amplitudes, _PANE))


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()
