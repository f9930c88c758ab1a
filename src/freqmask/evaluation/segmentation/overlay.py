"""Pictures to be looked at: the image, what is there, and what each model says, with a legend."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped

from freqmask.evaluation.results import shortened
from freqmask.evaluation.segmentation.predict import Shown
from freqmask.training.checkpoint import replace_atomically

_MOST_LEGEND = 40
_INCHES = 2.6  # of one picture's longer side
_LARGEST = 640  # pixels of a side; more would make a sheet of many megabytes
_OPACITY = 0.65
_GOLDEN = 0.618033988749895


def class_colours(count: int) -> Float[np.ndarray, "class 3"]:
    """A colour in [0, 1] for each class, neighbours far apart in hue."""
    levels = ((0.75, 0.95), (0.95, 0.7), (0.5, 0.85))  # saturation and value by turns
    return np.array(
        [
            colorsys.hsv_to_rgb((number * _GOLDEN) % 1, *levels[number % len(levels)])
            for number in range(count)
        ]
    )


def as_colours(image: Float[np.ndarray, "channel height width"]) -> Float[np.ndarray, "height width 3"]:
    """An image of any number of channels: three as they are, others as the grey of their mean, stretched."""
    if len(image) == 3:
        return np.clip(image.transpose(1, 2, 0), 0, 1)
    grey = image.mean(axis=0)
    low, high = np.percentile(grey, (1, 99))
    stretched = np.clip((grey - low) / max(float(high - low), 1e-6), 0, 1)
    return np.repeat(stretched[:, :, None], 3, axis=2)


def overlaid(
    colours: Float[np.ndarray, "height width 3"],
    classes: Shaped[np.ndarray, "height width"],
    palette: Float[np.ndarray, "class 3"],
) -> Float[np.ndarray, "height width 3"]:
    """Class colours over the grey image; pixels that do not count are black."""
    grey = colours.mean(axis=2, keepdims=True)
    painted = (1 - _OPACITY) * grey + _OPACITY * palette[np.maximum(classes, 0)]
    painted[classes < 0] = 0.0
    return painted


def draw_overlays(path: Path, title: str, shown: Sequence[Shown], names: Sequence[str]) -> None:
    """A row an image: the image, the truth, the prediction of each model; below, what the colours mean.

    Args:
        path: of the PNG.
        title: above all.
        shown: the images.
        names: of the classes.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not shown:
        return
    palette = class_colours(len(names))
    models = list(shown[0].predicted)
    height, width = shown[0].truth.shape
    scale = _INCHES / max(height, width)
    columns, rows = 2 + len(models), len(shown)
    there = _classes_shown(shown)
    legend_rows = -(-min(len(there), _MOST_LEGEND) // (2 * columns)) or 1
    size = (columns * (scale * width + 0.1), rows * (scale * height + 0.25) + 0.6 + 0.22 * legend_rows)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, one in zip(axes, shown, strict=True):
        colours = as_colours(one.image)
        pictures = [colours, *(overlaid(colours, c, palette) for c in (one.truth, *one.predicted.values()))]
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(_smaller(picture), interpolation="nearest")
            axis.set_axis_off()
        row[0].set_title(shortened(one.name, 30), fontsize=7, parse_math=False, loc="left")
    for axis, words in zip(axes[0][1:], ["truth", *models], strict=True):
        axis.set_title(shortened(words, 30), fontsize=8, parse_math=False)
    figure.suptitle(shortened(title, 90), fontsize=9, parse_math=False)
    patches = [Patch(color=palette[k], label=names[k]) for k in there[:_MOST_LEGEND]]
    patches.append(Patch(color="black", label="does not count"))
    legend = figure.legend(
        handles=patches, loc="outside lower center", ncols=2 * columns, fontsize=7, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    replace_atomically(path, lambda unfinished: figure.savefig(unfinished, format="png"))


def _classes_shown(shown: Sequence[Shown]) -> list[int]:
    """Classes that some picture of the sheet holds."""
    maps = [classes for one in shown for classes in (one.truth, *one.predicted.values())]
    return sorted({int(k) for classes in maps for k in np.unique(classes) if k >= 0})


def _smaller(picture: np.ndarray) -> np.ndarray:
    step = -(-max(picture.shape[:2]) // _LARGEST)
    return picture[::step, ::step]
