"""Images, spectra and filters made visible: `plan.png`, previews, the figure of every filter.

Any number of channels, faint and signed images are shown, each with a note of what was done to make it visible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from freqmask.backbones import eval_no_grad
from freqmask.console import plain, plain_name, say, shortened
from freqmask.data.decode import open_file
from freqmask.data.image_folder import named_image
from freqmask.errors import UserError
from freqmask.rng import Keys, combine
from freqmask.spectrum import Images, as_float, full_spectrum, log_magnitude, pair_weights, power, psnr, rfft2
from freqmask.training.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from freqmask.filters import Filter


_PIXELS = 20_000  # enough to find three principal components, few enough to take no time
_TEXT: dict[str, Any] = {"fontsize": 8, "parse_math": False}  # a file name may hold a dollar sign
_CAPTION = 0.46  # inches for three lines above a picture
_HEADING = 0.3  # inches for the title
_FAINT = 0.5  # an image whose highlights stay below this is brightened
_NOISE = 1e-5  # of the range of images; below it lies what float32 rounds, which is no picture
_SIGNED = 0.25  # an image whose shadows reach this far below zero, as a share of its highlights, is signed


@dataclass(frozen=True)
class Palette:
    """How images of any number of channels become colors, the same for all images of one sheet.

    One channel is shown gray, two as red and cyan, three as they are; more by their first three principal
    components, found on the reference images.
    """

    weights: np.ndarray  # ``(3, C)`` or ``(1, C)``, from channels to colors
    low: np.ndarray  # what becomes 0 after weighing, one number a color
    high: np.ndarray  # what becomes 1 after weighing, one number a color
    center: np.ndarray  # the image value around which signed images are shown, one number a channel
    spread: float  # how far from the center an image may go, in image units

    @classmethod
    def of(cls, images: Images) -> Palette:
        """The palette for images like these, in [0, 1]."""
        channels = images.shape[1]
        if channels <= 3:
            weights = {1: np.eye(1), 2: np.array([[1.0, 0], [0, 1], [0, 1]]), 3: np.eye(3)}[channels]
            unit = np.ones(len(weights))
            return cls(weights, 0 * unit, unit, np.full(channels, 0.5), 0.5)
        pixels = images.detach().cpu().double().movedim(1, -1).flatten(0, -2)
        pixels = np.nan_to_num(pixels[:: max(1, len(pixels) // _PIXELS)].numpy())
        center = pixels.mean(axis=0)
        _, directions = np.linalg.eigh(np.cov(pixels.T))
        weights = directions[:, :-4:-1].T  # the three largest, largest first
        weights = weights * np.where(weights.sum(axis=1, keepdims=True) < 0, -1, 1)  # brighter is more
        low, high = np.percentile(pixels @ weights.T, (1, 99), axis=0)
        spread = float(np.percentile(np.abs(pixels - center), 99))
        return cls(weights, low, np.maximum(high, low + 1e-6), center, max(spread, 1e-6))

    def show(self, image: Float[Tensor, "channel height width"]) -> tuple[np.ndarray, str]:
        """Colours in [0, 1], ``(H, W, 3)`` or ``(H, W)``, and what was done to make the image visible.

        Args:
            image: in [0, 1] or, for a part of an image, with negative values.

        Returns:
            The colors; the note is empty where the image is shown as it is.
        """
        values, note = np.nan_to_num(image.detach().float().cpu().numpy(), posinf=0.0, neginf=0.0), ""
        low, high = np.percentile(values, (1, 99))
        bright = float(self.center.max()) + self.spread
        if max(-low, high) < _NOISE * bright:
            pass  # shown as it is, which is empty
        elif low < -_SIGNED * max(high, 1e-6):
            gain = self.spread / max(-low, high)
            values, note = self.center[:, None, None] + gain * values, f"around gray x{gain:.1f}"
        elif 0 < high < _FAINT * bright:
            values, note = bright / high * values, f"brightened x{bright / high:.1f}"
        colors = np.einsum("kc,chw->hwk", self.weights, values)
        colors = np.clip((colors - self.low) / (self.high - self.low), 0, 1)
        return (colors[..., 0] if len(self.weights) == 1 else colors), note


def centered(
    keep: Float[Tensor, "*batch height half_width"], width: int
) -> Float[Tensor, "*batch height width"]:
    """A keep mask in ``rfft2``'s layout, of images of this width, as the whole spectrum, DC in the center."""
    return torch.fft.fftshift(full_spectrum(keep, width), dim=(-2, -1))


def spectrum_levels(images: Float[Tensor, "*batch channel height width"]) -> np.ndarray:
    """Decimal logarithm of the magnitude ``(*batch, H, W)``, mean of the channels, DC in the center.

    The floor of 1e-3 is far below the spectrum of 8-bit rounding (ortho-normal), so that a hole is dark.
    """
    magnitude = torch.expm1(log_magnitude(images.detach().float().cpu())).mean(dim=-3)
    return np.log10(np.nan_to_num(magnitude.numpy(), posinf=0.0) + 1e-3)


def spectrum_scale(levels: np.ndarray) -> dict[str, Any]:
    """Colors for the spectra of one image: the range of the original's levels, so that a hole is seen as a hole."""
    from matplotlib import colormaps

    low, high = np.percentile(levels, (2, 99.9))
    # 16 colors: more are not told apart in noise, and make the file much larger
    return {
        "cmap": colormaps["magma"].resampled(16),
        "interpolation_stage": "data",  # levels are averaged, not colors: no new ones arise
        "vmin": low - 0.5,
        "vmax": max(high, low + 1e-3),
    }


def new_sheet(rows: int, columns: int, aspect: float, title: str, cell: float = 1.5) -> tuple[Figure, Any]:
    """A figure of equal cells, and its axes ``(rows, columns)``, without pyplot's global state.

    Args:
        rows: of cells.
        columns: of cells.
        aspect: height over width of the images shown.
        title: a line above all.
        cell: width of a cell in inches.
    """
    from matplotlib.figure import Figure

    height_in_inches = cell * min(max(aspect, 0.3), 3.0)
    height = rows * (height_in_inches + _CAPTION) + _HEADING
    figure = Figure(figsize=(columns * cell, height), dpi=100)
    figure.suptitle(plain(title), fontsize=10, y=1 - 0.08 / height, va="top", parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False)
    top = 1 - (_HEADING + _CAPTION) / height
    figure.subplots_adjust(
        left=0.01, right=0.99, bottom=0.0, top=top, wspace=0.05, hspace=_CAPTION / height_in_inches
    )
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def show_image(axis: Axes, colors: np.ndarray, *lines: str, **scale: Any) -> None:
    """One image, ``(H, W)`` or ``(H, W, 3)``, with its lines of text above it; empty ones are left out.

    ``scale`` is ``imshow``'s ``vmin``, ``vmax`` and ``cmap``, for what is not an image in [0, 1].
    """
    axis.imshow(colors, **{"vmin": 0.0, "vmax": 1.0, "cmap": "gray", **scale})
    axis.set_title("\n".join(plain_name(line) for line in lines if line), pad=2, **_TEXT)


_LEAST_SIDE = 8  # pixels, as of --image_size
_MOSTLY_CUT = 0.25  # of an image: where its square is less, that is said


def read_squares(files: list[str], image_size: int | None) -> dict[str, Tensor]:
    """The middle squares of image files, all of one size.

    Args:
        files: their paths.
        image_size: side in pixels; None is 224, or the shortest side among the images where that is smaller.

    Returns:
        (C, size, size) in [0, 1] by the file's name, numbered where two files have the same.

    Raises:
        UserError: a file that cannot be read, or is too small to have a spectrum.
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
    with named_image(file) as path:
        picture = open_file(path)
        height, width = picture.size
        side = min(height, width)
        if side < _LEAST_SIDE:
            raise UserError(
                f"image ({file}, {height}x{width} pixels) must have at least {_LEAST_SIDE} pixels on its shorter side; "
                "name a larger one"
            )
        if side < _MOSTLY_CUT * max(height, width):
            say(f"note: of {file} ({height}x{width} pixels) only the middle square of {side}x{side} is used")
        pixels = picture.decode(box=((height - side) // 2, (width - side) // 2, side, side))
    values = pixels.astype(np.float32)
    # 8 bits are shown as they are; other types rarely fill their range and are stretched between percentiles
    low, high = (0.0, 255.0) if pixels.dtype == np.uint8 else np.nanpercentile(values, (0.1, 99.9))
    values = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return torch.from_numpy(np.nan_to_num(values, nan=float(np.nanmean(values))))


_INPUTS = 8  # columns of plan.png
_IMAGES = 4  # rows of a preview
_COLUMNS = (
    "original",
    "filtered input",
    "missing part filled in",
    "spectrum: original",
    "spectrum: filtered",
    "spectrum: filled in",
)


@torch.no_grad()
def draw_plan(path: str | Path, views: Sequence[Tensor], method: Any, keys: Keys) -> Path:
    """Draws eight inputs as the method sees them into a PNG: the view, what is left of it, what its spectrum keeps.

    Args:
        path: the PNG; it is returned.
        views: ``n_views`` batches ``(B, C, H, W)``, uint8 in 0..255 or float in [0, 1].
        method: the method that will be trained; its mode and weights are left as they are.
        keys: the batch's keys, so that the figure shows what a step with them would see.
    """
    images = [as_float(view[:_INPUTS]) for view in views]
    palette = Palette.of(torch.cat(images))
    count, height, width = len(images[0]), *images[0].shape[-2:]
    title = (
        f"{count} inputs of {method.name}: the view, what the method sees, which frequencies it keeps (light)"
    )
    figure, axes = new_sheet(3 * len(images), count, height / width, title)
    for number, view in enumerate(images):
        view_keys = combine(keys[:_INPUTS], number)
        with eval_no_grad(method):  # in train mode batch norm would take note of these images
            shown = method.reconstruct(view, view_keys)
        names = [bare_name(name) for name in filter_names(method, view_keys)]
        label = f"view {number + 1}" if len(images) > 1 else ""
        for column, cells in enumerate(axes[3 * number : 3 * number + 3].T):
            draw_panel(cells[0], palette, view[column], label)
            draw_panel(cells[1], palette, shown["filtered"][column], names[column])
            keep, seen = shown["keep"][column], shown["filtered"][column]
            mask = centered(keep.mean(dim=0), seen.shape[-1]).float().cpu().numpy()
            if mask.any():
                # light gray: white has no edge on paper
                show_image(cells[2], mask, f"{mask.mean():.1%} kept", vmax=1.12)
            else:
                levels = spectrum_levels(seen)
                show_image(cells[2], levels, "its spectrum", **spectrum_scale(levels))
    return save_figure(figure, path)


def draw_preview(path: str | Path, reconstruction: Mapping[str, Tensor], title: str) -> Path:
    """Draws four images: original, filtered input, the missing part filled in, with their PSNR, and three spectra.

    Args:
        path: the PNG; it is returned.
        reconstruction: from ``method.reconstruct``: ``target``, ``filtered`` and ``filled``
            ``(B, C, H, W)`` in [0, 1].
        title: a line above all.
    """
    target, seen, filled = (
        reconstruction[name][:_IMAGES].float().cpu() for name in ("target", "filtered", "filled")
    )
    palette = Palette.of(target)
    aspect = target.shape[-2] / target.shape[-1]
    heading = f"{title}   (dB: PSNR against the original)"
    figure, axes = new_sheet(len(target), len(_COLUMNS), aspect, heading, cell=1.65)
    spectra = [spectrum_levels(images) for images in (target, seen, filled)]
    for row in range(len(target)):
        headings = _COLUMNS if row == 0 else ("",) * len(_COLUMNS)
        draw_panel(axes[row, 0], palette, target[row], headings[0])
        draw_panel(axes[row, 1], palette, seen[row], headings[1], psnr_words(seen[row], target[row]))
        draw_panel(axes[row, 2], palette, filled[row], headings[2], psnr_words(filled[row], target[row]))
        scale = spectrum_scale(spectra[0][row])
        for column, spectrum in enumerate(spectra, start=3):
            show_image(axes[row, column], spectrum[row], headings[column], **scale)
    return save_figure(figure, path)


def filter_names(method: Any, keys: Keys) -> list[str]:
    """What is done to each image: the name of its filter or degradation, empty where there is neither."""
    mixture = getattr(method, "filter", None)
    if mixture is None:
        degradation = getattr(method, "degradation", None)
        return ["" if degradation is None else type(degradation).__name__.lower()] * len(keys)
    if not hasattr(mixture, "names"):
        return [mixture.describe()] * len(keys)
    return [mixture.names[index] for index in mixture.draw(keys).tolist()]


def bare_name(name: str) -> str:
    """A filter's name without arguments and module: a small image has no room for them above it."""
    return name.partition("(")[0].rpartition(":")[2]


def psnr_words(image: Tensor, target: Tensor) -> str:
    """How near an image is to another, for a caption."""
    value = psnr(image, target)
    if math.isnan(value):
        return "not finite"
    return "the same" if math.isinf(value) else f"{value:.1f} dB"


def draw_panel(axis: Any, palette: Palette, image: Tensor, *lines: str) -> None:
    """An image with its heading and facts, and what was done to make it visible: a dark one must not look bright."""
    colors, note = palette.show(image)
    show_image(axis, colors, *lines, note)


_FLAT = "no energy beside its mean"
_WIDEST_NAME = 28  # characters above a picture
_SHEET_COLUMNS = 6  # two filters side by side where there is one image


@dataclass(frozen=True)
class Filtering:
    """One image through one filter."""

    name: str  # the filter in its own words
    kept: Tensor  # the filtered image ``(C, H, W)``, not clamped
    removed: Tensor  # the image less what was kept
    keep: Tensor  # the whole spectrum's mask ``(H, W)``, DC in the center, mean of the channels
    bins: float  # share of the spectrum's bins that is kept, 0 to 1
    energy: float  # share of the energy that is kept, 0 to 1, the mean (DC) left out of account; NaN where all is DC


@torch.no_grad()
def apply_filter(
    name: str, image_filter: Filter, image: Float[Tensor, "channel height width"], keys: Tensor
) -> Filtering:
    """Passes one image in [0, 1] through a filter, with ``(1,)`` keys, and measures what is left of it."""
    kept, keep = image_filter(image[None], keys)
    height, width = image.shape[-2:]
    weights = pair_weights(height, width)
    energies = weights * power(rfft2(image))
    energies[..., 0, 0] = 0  # the mean is most of the energy of any image in [0, 1] and says nothing
    # of the values, since rounding noise has energy, too
    is_flat = bool((image.amax(dim=(-2, -1)) - image.amin(dim=(-2, -1)) < _NOISE).all())
    return Filtering(
        name=name,
        kept=kept[0],
        removed=image - kept[0],
        keep=centered(keep[0].mean(dim=0), width),
        bins=float((weights * keep[0].mean(dim=0)).sum() / (height * width)),
        energy=math.nan if is_flat else float((energies * keep[0].square()).sum() / energies.sum()),
    )


def draw_filters(
    path: str | Path,
    images: Mapping[str, Float[Tensor, "channel height width"]],
    filterings: Sequence[Sequence[Filtering]],
) -> Path:
    """Draws kept part, removed part and spectrum (kept: colored, removed: gray) of every filter on every image.

    Args:
        path: the PNG; it is returned.
        images: name to image in [0, 1], all of one size.
        filterings: for every filter the images in the same order.
    """
    blocks = max(1, _SHEET_COLUMNS // (3 * len(images)))  # filters side by side
    rows = 1 + -(-len(filterings) // blocks)
    height, width = next(iter(images.values())).shape[-2:]
    title = "filters: the kept part, the removed part, the spectrum (kept: colored, removed: gray)"
    figure, axes = new_sheet(rows, 3 * blocks * len(images), height / width, title, cell=1.75)
    for number, (name, image) in enumerate(images.items()):
        palette, spectrum = Palette.of(image[None]), spectrum_levels(image)
        colors, note = palette.show(image)
        flat = _FLAT if math.isnan(filterings[0][number].energy) else ""
        name = shortened(name, _WIDEST_NAME)
        show_image(axes[0, 3 * number], colors, name, ", ".join(fact for fact in (note, flat) if fact))
        show_image(axes[0, 3 * number + 2], _dimmed(spectrum, np.ones_like(spectrum)), "its spectrum")
        for position, row_of_images in enumerate(filterings):
            row, block = 1 + position // blocks, position % blocks
            first, filtering = 3 * (block * len(images) + number), row_of_images[number]
            cells = axes[row, first : first + 3]
            text = plain_name(filtering.name)  # of a filter the beginning tells, of a path its end
            text = text if len(text) <= _WIDEST_NAME else text[: _WIDEST_NAME - 3] + "..."
            draw_panel(cells[0], palette, filtering.kept, text, f"kept {_percent(filtering.energy, 1)}")
            draw_panel(cells[1], palette, filtering.removed, f"removed {_percent(1 - filtering.energy, 1)}")
            levels = _dimmed(spectrum, filtering.keep.numpy())
            show_image(cells[2], levels, f"{filtering.bins:.1%} of the bins")
    return save_figure(figure, path)


def filter_table(images: Sequence[str], filterings: Sequence[Sequence[Filtering]]) -> str:
    """The shares in numbers, a line for each filter and image."""
    lines = ["kept: share of the spectrum's bins, and of the energy without the mean", ""]
    named = len(images) > 1
    width = max(len(row[0].name) for row in filterings)
    lines.append(
        f"{'filter':{width}}   bins kept   energy kept   energy removed" + ("   image" if named else "")
    )
    for row in filterings:
        for image, filtering in zip(images, row, strict=True):
            energies = _percent(filtering.energy, 2), _percent(1 - filtering.energy, 2)
            shares = f"{filtering.bins:10.2%}  {energies[0]:>12}  {energies[1]:>15}"
            lines.append(f"{filtering.name:{width}}  {shares}" + (f"   {image}" if named else ""))
    if any(math.isnan(filtering.energy) for row in filterings for filtering in row):
        lines += ["", f"–: the image is of a single color, it has {_FLAT}"]
    return "\n".join(lines)


def _percent(share: float, digits: int) -> str:
    return "–" if math.isnan(share) else f"{share:.{digits}%}"


def _dimmed(spectrum: np.ndarray, keep: np.ndarray) -> np.ndarray:
    from matplotlib import colormaps

    low, high = np.percentile(spectrum, (1, 99.9))
    level = np.clip((spectrum - low) / max(high - low, 1e-6), 0, 1)
    colored = colormaps["viridis"].resampled(16)(level)[..., :3]
    gray = np.repeat(0.15 + 0.3 * level[..., None], 3, axis=-1)
    return keep[..., None] * colored + (1 - keep[..., None]) * gray
