"""Images and spectra made fit for the eye: any number of channels, faint and signed images, keep masks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from freqmask.data.decode import open_file
from freqmask.errors import BadImage, UserError
from freqmask.spectrum import full_spectrum, log_magnitude
from freqmask.training.checkpoint import replace_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_PIXELS = 20_000  # enough to find three principal components, few enough to take no time
_TEXT: dict[str, Any] = {"fontsize": 8, "parse_math": False}  # a file name may hold a dollar sign
_CAPTION = 0.34  # inches for two lines above a picture
_HEADING = 0.3  # inches for the title
_FAINT = 0.5  # an image whose highlights stay below this is brightened
_SIGNED = 0.25  # an image whose shadows reach this far below zero, as a share of its highlights, is signed


@dataclass(frozen=True)
class Palette:
    """How images of any number of channels become colours, the same for all pictures of one sheet.

    One channel is shown grey, two as red and cyan, three as they are; more by their first three principal
    components, found on the reference images.

    Attributes:
        weights: ``(3, C)`` or ``(1, C)``, from channels to colours.
        low: what becomes 0 after weighing, one number a colour.
        high: what becomes 1 after weighing, one number a colour.
        centre: the image value around which signed images are shown, one number a channel.
        spread: how far from the centre an image may go, in image units.
    """

    weights: np.ndarray
    low: np.ndarray
    high: np.ndarray
    centre: np.ndarray
    spread: float

    @classmethod
    def of(cls, images: Float[Tensor, "batch channel height width"]) -> Palette:
        """The palette for images like these, in [0, 1]."""
        channels = images.shape[1]
        if channels <= 3:
            weights = {1: np.eye(1), 2: np.array([[1.0, 0], [0, 1], [0, 1]]), 3: np.eye(3)}[channels]
            unit = np.ones(len(weights))
            return cls(weights, 0 * unit, unit, np.full(channels, 0.5), 0.5)
        return cls._principal(_pixels(images))

    @classmethod
    def _principal(cls, pixels: np.ndarray) -> Palette:
        centre = pixels.mean(axis=0)
        _, directions = np.linalg.eigh(np.cov(pixels.T))
        weights = directions[:, :-4:-1].T  # the three largest, largest first
        weights = weights * np.where(weights.sum(axis=1, keepdims=True) < 0, -1, 1)  # brighter is more
        low, high = np.percentile(pixels @ weights.T, (1, 99), axis=0)
        spread = float(np.percentile(np.abs(pixels - centre), 99))
        return cls(weights, low, np.maximum(high, low + 1e-6), centre, max(spread, 1e-6))

    def show(self, image: Float[Tensor, "channel height width"]) -> tuple[np.ndarray, str]:
        """Colours in [0, 1], ``(H, W, 3)`` or ``(H, W)``, and what was done to make the image visible.

        Args:
            image: in [0, 1] or, for a part of an image, with negative values.

        Returns:
            The colours; the note is empty where the image is shown as it is.
        """
        values = np.nan_to_num(image.detach().float().cpu().numpy(), posinf=0.0, neginf=0.0)
        values, note = self._stretched(values)
        colours = np.einsum("kc,chw->hwk", self.weights, values)
        colours = np.clip((colours - self.low) / (self.high - self.low), 0, 1)
        return (colours[..., 0] if len(self.weights) == 1 else colours), note

    def _stretched(self, values: np.ndarray) -> tuple[np.ndarray, str]:
        low, high = np.percentile(values, (1, 99))
        centre = self.centre[:, None, None]
        if low < -_SIGNED * max(high, 1e-6):
            gain = self.spread / max(-low, high)
            return centre + gain * values, f"around grey x{gain:.1f}"
        bright = float(self.centre.max()) + self.spread
        if 0 < high < _FAINT * bright:
            gain = bright / high
            return gain * values, f"brightened x{gain:.1f}"
        return values, ""


def _pixels(images: Tensor) -> np.ndarray:
    pixels = images.detach().double().movedim(1, -1).flatten(0, -2)
    step = max(1, len(pixels) // _PIXELS)
    return np.nan_to_num(pixels[::step].cpu().numpy())


def centred(
    keep: Float[Tensor, "*batch height half_width"], width: int
) -> Float[Tensor, "*batch height width"]:
    """A keep mask of half-spectrum bins as the whole spectrum, DC in the centre.

    Args:
        keep: 1 = kept, in ``rfft2``'s layout.
        width: the images' width in pixels.
    """
    return torch.fft.fftshift(full_spectrum(keep, width), dim=(-2, -1))


def spectrum_levels(images: Float[Tensor, "*batch channel height width"]) -> np.ndarray:
    """Decimal logarithm of the magnitude ``(*batch, H, W)``, mean of the channels, DC in the centre.

    The floor of 1e-3 is far below the spectrum of 8-bit rounding (ortho-normal), so that a hole is dark.
    """
    magnitude = torch.expm1(log_magnitude(images.detach().float().cpu())).mean(dim=-3)
    return np.log10(np.nan_to_num(magnitude.numpy(), posinf=0.0) + 1e-3)


def spectrum_scale(levels: np.ndarray) -> dict[str, Any]:
    """Colours for the spectra of one image: the original's range, so that a hole is seen as a hole.

    Args:
        levels: the original's, from ``spectrum_levels``.
    """
    from matplotlib import colormaps

    low, high = np.percentile(levels, (2, 99.9))
    # 16 colours: more are not told apart in noise, and make the file much larger
    return {
        "cmap": colormaps["magma"].resampled(16),
        "interpolation_stage": "data",  # levels are averaged, not colours: no new ones arise
        "vmin": low - 0.5,
        "vmax": max(high, low + 1e-3),
    }


def new_sheet(rows: int, columns: int, aspect: float, title: str, cell: float = 1.5) -> tuple[Figure, Any]:
    """A figure of equal cells without pyplot's global state.

    Args:
        rows: rows of cells.
        columns: columns of cells.
        aspect: height over width of the images shown.
        title: a line above all.
        cell: width of a cell in inches.

    Returns:
        The figure and its axes ``(rows, columns)``, frames and ticks off.
    """
    from matplotlib.figure import Figure

    picture = cell * min(max(aspect, 0.3), 3.0)
    height = rows * (picture + _CAPTION) + _HEADING
    figure = Figure(figsize=(columns * cell, height), dpi=100)
    figure.suptitle(title, fontsize=10, y=1 - 0.08 / height, va="top", parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False)
    top = 1 - (_HEADING + _CAPTION) / height
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.0, top=top, wspace=0.05, hspace=_CAPTION / picture)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def show_image(axis: Axes, colours: np.ndarray, *lines: str, **scale: Any) -> None:
    """One picture with its lines of text above it.

    Args:
        axis: where it is drawn.
        colours: ``(H, W)`` or ``(H, W, 3)``.
        lines: text; empty ones are left out.
        scale: ``imshow``'s ``vmin``, ``vmax`` and ``cmap``, for what is not an image in [0, 1].
    """
    options = {"vmin": 0.0, "vmax": 1.0, "cmap": "gray", **scale}
    axis.imshow(colours, **options)
    axis.set_title("\n".join(line for line in lines if line), pad=2, **_TEXT)


def save_sheet(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG under a temporary name and renames it, so that nobody sees half a picture."""
    path = Path(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # names in any script
        replace_atomically(path, lambda unfinished: figure.savefig(unfinished, format="png"))
    return path


def read_squares(files: list[str], image_size: int | None) -> dict[str, Tensor]:
    """The middle squares of image files, all of one size.

    Args:
        files: their paths.
        image_size: side in pixels; None is 224, or the shortest side among the images where that is smaller.

    Returns:
        (C, size, size) in [0, 1] by the file's name, numbered where two files have the same.

    Raises:
        UserError: a file that cannot be read.
    """
    squares = [_read_square(file) for file in files]
    size = image_size or min(224, *(square.shape[-1] for square in squares))
    names = [Path(file).name for file in files]
    unique = len(set(names)) == len(names)
    return {
        name if unique else f"{number} {name}": interpolate(
            square[None], size=(size, size), mode="bicubic", antialias=True
        )[0].clamp(0, 1)
        for number, (name, square) in enumerate(zip(names, squares, strict=True), start=1)
    }


def _read_square(file: str) -> Tensor:
    try:
        picture = open_file(Path(file))
        height, width = picture.size
        side = min(height, width)
        pixels = picture.decode(box=((height - side) // 2, (width - side) // 2, side, side))
    except BadImage as error:
        raise UserError(f"image ({file}) cannot be read: {error.reason}; name another file") from error
    values = pixels.astype(np.float32)
    # 8 bits are shown as they are; other types rarely fill their range and are stretched between percentiles
    low, high = (0.0, 255.0) if pixels.dtype == np.uint8 else np.nanpercentile(values, (0.1, 99.9))
    values = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return torch.from_numpy(np.nan_to_num(values, nan=float(np.nanmean(values))))
