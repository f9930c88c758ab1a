"""What filters do to an image: a picture of each, and its shares of bins and of energy in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from freqmask.pretraining.display import Palette, centred, new_sheet, save_sheet, show_image, spectrum_levels
from freqmask.spectrum import pair_weights, power, rfft2

if TYPE_CHECKING:
    from freqmask.filters import Filter

_COLUMNS = 6  # two filters side by side where there is one image


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
    blocks = max(1, _COLUMNS // (3 * len(images)))  # filters side by side
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
    """A log spectrum ``(H, W)`` in colours where it is kept and in dark greys where it is not."""
    from matplotlib import colormaps

    low, high = np.percentile(spectrum, (1, 99.9))
    level = np.clip((spectrum - low) / max(high - low, 1e-6), 0, 1)
    coloured = colormaps["viridis"].resampled(16)(level)[..., :3]
    grey = np.repeat(0.15 + 0.3 * level[..., None], 3, axis=-1)
    return keep[..., None] * coloured + (1 - keep[..., None]) * grey
