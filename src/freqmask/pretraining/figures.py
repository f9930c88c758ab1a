"""Figures: a run's inputs before the first step, what it fills in while it learns, and what filters do to an image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from freqmask.backbones import eval_no_grad
from freqmask.images import as_float, psnr
from freqmask.pretraining.display import (
    Palette,
    centred,
    new_sheet,
    save_sheet,
    show_image,
    spectrum_levels,
    spectrum_scale,
)
from freqmask.rng import combine
from freqmask.spectrum import pair_weights, power, rfft2

if TYPE_CHECKING:
    from freqmask.filters import Filter


_INPUTS = 8  # columns of plan.png
_IMAGES = 4  # rows of a preview
_COLUMNS = (
    "original",
    "what the model saw",
    "missing part filled in",
    "spectrum: original",
    "spectrum: seen",
    "spectrum: filled in",
)


@torch.no_grad()
def draw_plan(path: str | Path, views: Sequence[Tensor], method: Any, keys: Int64[Tensor, " batch"]) -> Path:
    """Draws eight inputs as the method sees them: the view, what is left of it, and what its spectrum keeps.

    Args:
        path: the PNG to write.
        views: ``n_views`` batches ``(B, C, H, W)``, uint8 in 0..255 or float in [0, 1].
        method: the method that will be trained; its mode and weights are left as they are.
        keys: the batch's keys, so that the picture shows what a step with them would see.

    Returns:
        The path written.
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
            seen = method.reconstruct(view, view_keys)
        names = filter_names(method, view_keys)
        label = f"view {number + 1}" if len(images) > 1 else ""
        for column, cells in enumerate(axes[3 * number : 3 * number + 3].T):
            _draw_image(cells[0], palette, view[column], label)
            _draw_image(cells[1], palette, seen["filtered"][column], names[column])
            _draw_keep(cells[2], seen["keep"][column], seen["filtered"][column])
    return save_sheet(figure, path)


def draw_preview(path: str | Path, reconstruction: Mapping[str, Tensor], title: str) -> Path:
    """Draws four images: original, what the model saw, the missing part filled in, and the three spectra.

    Above what the model saw and what it filled in stands their PSNR against the original, in dB.

    Args:
        path: the PNG to write.
        reconstruction: from ``method.reconstruct``: ``target``, ``filtered`` and ``filled``
            ``(B, C, H, W)`` in [0, 1].
        title: what the picture is of.

    Returns:
        The path written.
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
        _draw_image(axes[row, 0], palette, target[row], headings[0])
        _draw_image(axes[row, 1], palette, seen[row], headings[1], _decibel(seen[row], target[row]))
        _draw_image(axes[row, 2], palette, filled[row], headings[2], _decibel(filled[row], target[row]))
        scale = spectrum_scale(spectra[0][row])
        for column, spectrum in enumerate(spectra, start=3):
            show_image(axes[row, column], spectrum[row], headings[column], **scale)
    return save_sheet(figure, path)


def filter_names(method: Any, keys: Int64[Tensor, " batch"]) -> list[str]:
    """What is done to each image: the name of its filter or degradation, empty where there is neither."""
    mixture = getattr(method, "filter", None)
    if mixture is None:
        degradation = getattr(method, "degradation", None)
        return ["" if degradation is None else type(degradation).__name__.lower()] * len(keys)
    if not hasattr(mixture, "names"):
        return [mixture.describe()] * len(keys)
    return [mixture.names[index] for index in mixture.draw(keys).tolist()]


def _decibel(image: Tensor, target: Tensor) -> str:
    value = psnr(image, target)
    if math.isnan(value):
        return "not finite"
    return "the same" if math.isinf(value) else f"{value:.1f} dB"


def _draw_keep(axis: Any, keep: Tensor, seen: Tensor) -> None:
    mask = centred(keep.mean(dim=0), seen.shape[-1]).float().cpu().numpy()
    if mask.any():
        show_image(axis, mask, f"{mask.mean():.1%} kept", vmax=1.12)  # light grey: white has no edge on paper
    else:
        levels = spectrum_levels(seen)
        show_image(axis, levels, "its spectrum", **spectrum_scale(levels))


def _draw_image(axis: Any, palette: Palette, image: Tensor, *lines: str) -> None:
    colours, note = palette.show(image)
    heading, *facts = lines
    show_image(axis, colours, heading, ", ".join(fact for fact in (*facts, note) if fact))


_SHEET_COLUMNS = 6  # two filters side by side where there is one image


@dataclass(frozen=True)
class Filtering:
    """One image through one filter.

    Attributes:
        name: the filter in its own words.
        kept: the filtered image ``(C, H, W)``, not clamped.
        removed: the image less what was kept.
        keep: the whole spectrum's mask ``(H, W)``, DC in the centre, mean of the channels.
        bins: share of the spectrum's bins that is kept, 0 to 1.
        energy: share of the energy that is kept, 0 to 1, the mean (DC) left out of account.
    """

    name: str
    kept: Tensor
    removed: Tensor
    keep: Tensor
    bins: float
    energy: float


@torch.no_grad()
def apply_filter(
    name: str, image_filter: Filter, image: Float[Tensor, "channel height width"], keys: Tensor
) -> Filtering:
    """Passes one image in [0, 1] through a filter and measures what is left of it.

    Args:
        name: the filter in its own words.
        image_filter: the filter.
        image: any number of channels.
        keys: ``(1,)``, for filters that draw.
    """
    kept, keep = image_filter(image[None], keys)
    height, width = image.shape[-2:]
    weights = pair_weights(height, width)
    energies = weights * power(rfft2(image))
    energies[..., 0, 0] = 0  # the mean is most of the energy of any image in [0, 1] and says nothing
    total = energies.sum().clamp_min(1e-12)
    return Filtering(
        name=name,
        kept=kept[0],
        removed=image - kept[0],
        keep=centred(keep[0].mean(dim=0), width),
        bins=float((weights * keep[0].mean(dim=0)).sum() / (height * width)),
        energy=float((energies * keep[0].square()).sum() / total),
    )


def draw_filters(
    path: str | Path,
    images: Mapping[str, Float[Tensor, "channel height width"]],
    filterings: Sequence[Sequence[Filtering]],
) -> Path:
    """Draws kept part, removed part and spectrum of every filter on every image.

    In the spectra, what is kept is coloured and what is removed is grey.

    Args:
        path: the PNG to write.
        images: name to image in [0, 1], all of one size.
        filterings: for every filter the images in the same order.
    """
    blocks = max(1, _SHEET_COLUMNS // (3 * len(images)))  # filters side by side
    rows = 1 + -(-len(filterings) // blocks)
    height, width = next(iter(images.values())).shape[-2:]
    title = "filters: the kept part, the removed part, the spectrum (kept: coloured, removed: grey)"
    figure, axes = new_sheet(rows, 3 * blocks * len(images), height / width, title, cell=1.75)
    for number, (name, image) in enumerate(images.items()):
        palette, spectrum = Palette.of(image[None]), spectrum_levels(image)
        _draw_original(axes[0, 3 * number : 3 * number + 3], palette, image, spectrum, name)
        for position, row_of_images in enumerate(filterings):
            row, block = 1 + position // blocks, position % blocks
            first = 3 * (block * len(images) + number)
            _draw_filtering(axes[row, first : first + 3], palette, row_of_images[number], spectrum)
    return save_sheet(figure, path)


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
            shares = f"{filtering.bins:10.2%}  {filtering.energy:12.2%}  {1 - filtering.energy:15.2%}"
            lines.append(f"{filtering.name:{width}}  {shares}" + (f"   {image}" if named else ""))
    return "\n".join(lines)


def _draw_original(cells: Any, palette: Palette, image: Tensor, spectrum: np.ndarray, name: str) -> None:
    colours, note = palette.show(image)
    show_image(cells[0], colours, name, note)
    show_image(cells[2], _dimmed(spectrum, np.ones_like(spectrum)), "its spectrum")


def _draw_filtering(cells: Any, palette: Palette, filtering: Filtering, spectrum: np.ndarray) -> None:
    kept, kept_note = palette.show(filtering.kept)
    removed, removed_note = palette.show(filtering.removed)
    show_image(cells[0], kept, filtering.name, _joined(f"kept {filtering.energy:.1%}", kept_note))
    show_image(cells[1], removed, f"removed {1 - filtering.energy:.1%}", removed_note)
    show_image(cells[2], _dimmed(spectrum, filtering.keep.numpy()), f"{filtering.bins:.1%} of the bins")


def _joined(*facts: str) -> str:
    return ", ".join(fact for fact in facts if fact)


def _dimmed(spectrum: np.ndarray, keep: np.ndarray) -> np.ndarray:
    from matplotlib import colormaps

    low, high = np.percentile(spectrum, (1, 99.9))
    level = np.clip((spectrum - low) / max(high - low, 1e-6), 0, 1)
    coloured = colormaps["viridis"].resampled(16)(level)[..., :3]
    grey = np.repeat(0.15 + 0.3 * level[..., None], 3, axis=-1)
    return keep[..., None] * coloured + (1 - keep[..., None]) * grey
