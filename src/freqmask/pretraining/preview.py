"""Pictures of a run: its inputs before the first step, and what the model fills in while it learns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
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
    """The mask ``(1 or C, H, W // 2 + 1)``; for a degradation, which keeps none for certain, what is left."""
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
