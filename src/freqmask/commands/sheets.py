"""The pictures and tables of ``embed`` and ``reconstruct``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freqmask.console import shortened
from freqmask.data.source import Source
from freqmask.interop.feature_files import nearest_neighbors
from freqmask.interop.models import Band, OpenedModel, still_images
from freqmask.pretraining.figures import (
    Palette,
    bare_name,
    draw_panel,
    filter_names,
    new_sheet,
    psnr_words,
    show_image,
    spectrum_levels,
    spectrum_scale,
)
from freqmask.rng import combine, identity_of, sample_key
from freqmask.spectrum import as_float
from freqmask.training.files import save_figure

_QUERIES, _NEIGHBORS = 8, 7  # rows, and columns beside the first
_LONGEST_NAME = 22
_KEYS = 256  # tried to see every filter of a mixture
_COLUMNS = (
    "original",
    "filtered",
    "predicted",
    "filled in",
    "error x4",
    "spectra: original",
    "filtered",
    "predicted",
)
_GAIN = 4  # errors are a few hundredths


def draw_neighbors(path: Path, opened: OpenedModel, source: Source) -> Path:
    """Some images, each with the images whose features are nearest.

    Args:
        path: the file of features; the picture stands beside it.
        opened: the model that made it.
        source: its images.

    Returns:
        The PNG.
    """
    indices, scores = nearest_neighbors(path, _QUERIES, _NEIGHBORS)
    dataset = still_images(opened, source)
    images = {
        int(n): as_float(dataset[0, int(n), int(n)].views[0]) for n in {*indices.flatten().tolist()} if n >= 0
    }
    palette = Palette.of(torch.stack(list(images.values())))
    height, width = opened.backbone.image_size
    how = "cosine, after the mean of all is taken off"
    title = f"nearest neighbors by {opened.name}: left an image, then the most similar ones ({how})"
    figure, axes = new_sheet(len(indices), 1 + _NEIGHBORS, height / width, title)
    for row, (found, similarities) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True)):
        for column, (index, score) in enumerate(zip(found, similarities, strict=True)):
            if index < 0:
                continue
            colors, _ = palette.show(images[index])
            heading = shortened(source.name(index), _LONGEST_NAME)
            if column:
                label, names = source.label(index), source.class_names
                name = "" if label is None else f" {names[label] if names else label}"
                heading = f"{_similarity(score)}{name[:14]}"
            show_image(axes[row, column], colors, heading)
    return save_figure(figure, path.with_suffix(".neighbours.png"))


def draw_reconstructions(
    path: str | Path, pictures: Sequence[tuple[str, str, dict[str, Tensor]]], title: str
) -> Path:
    """A row for each image and filter: original, filtered, predicted, filled in, error, and three spectra.

    Args:
        path: the PNG to write.
        pictures: name of the image, what was done to it, and ``reconstruct``'s tensors with batch 1.
        title: a line above all.
    """
    height, width = pictures[0][2]["target"].shape[-2:]
    figure, axes = new_sheet(len(pictures), len(_COLUMNS), height / width, f"{title}   (dB: PSNR)", cell=1.65)
    for row, (name, done, tensors) in enumerate(pictures):
        shown = {key: value[0].detach().float().cpu() for key, value in tensors.items() if key != "keep"}
        target, panels = shown["target"], axes[row]
        headings = _COLUMNS if row == 0 else ("",) * len(_COLUMNS)
        lines = {"target": shortened(name, _LONGEST_NAME)}
        lines |= {key: psnr_words(shown[key], target) for key in ("filtered", "prediction", "filled")}
        lines["filtered"] = f"{bare_name(done)} {lines['filtered']}"
        palette = Palette.of(target[None])
        for column, (key, line) in enumerate(lines.items()):
            draw_panel(panels[column], palette, shown[key].clamp(0, 1), headings[column], line)
        error = (shown["filled"].clamp(0, 1) - target).abs().mean(dim=0)
        mean = f"mean {float(error.mean()):.3f}"
        show_image(panels[4], (_GAIN * error).clamp(0, 1).numpy(), headings[4], mean)
        scale = spectrum_scale(spectrum_levels(target[None])[0])
        for column, key in enumerate(("target", "filtered", "prediction"), start=5):
            show_image(panels[column], spectrum_levels(shown[key][None])[0], headings[column], **scale)
    return save_figure(figure, path)


def _similarity(score: float) -> str:
    """Two digits, four where nearly all are alike: a column of 1.00 tells nothing."""
    return f"{score:.2f}" if score < 0.99 else f"{score:.4f}"


def turns(method: Any, file: str, seed: int) -> list[tuple[str, Tensor]]:
    """Every filter of the method's mixture by name, with a key under which it is drawn."""
    first = torch.tensor([sample_key(seed, 0, identity_of(Path(file).name))])
    keys = torch.cat([combine(first, number) for number in range(_KEYS)])
    found: dict[str, Tensor] = {}
    for name, key in zip(filter_names(method, keys), keys, strict=True):
        found.setdefault(name, key[None])
    return sorted(found.items())


def band_lines(tables: list[list[Band]]) -> list[str]:
    """A table: radius of the band, share hidden, and the mean PSNR of what is filtered, predicted, filled in."""
    lines = [f"  {'radius':>12}  {'hidden':>7}  {'seen':>8}  {'predicted':>9}  {'filled in':>9}"]
    for bands in zip(*tables, strict=True):
        names = ("hidden", "filtered", "predicted", "filled")
        hidden, *means = (sum(getattr(band, name) for band in bands) / len(bands) for name in names)
        seen, predicted, filled = ("the same" if math.isinf(mean) else f"{mean:.1f}" for mean in means)
        radius = f"{bands[0].low} to {bands[0].high}"
        lines.append(f"  {radius:>12}  {hidden:>7.1%}  {seen:>8}  {predicted:>9}  {filled:>9}")
    return lines
