"""From a network that sees windows to the classes of whole images: predictions counted, a few of them shown."""

from __future__ import annotations

import colorsys
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int16, Int64, Shaped
from torch import Tensor

from freqmask.console import readable_time, say
from freqmask.data.loader import make_loader
from freqmask.data.sampler import ChosenSampler, OrderedSampler
from freqmask.data.source import Source
from freqmask.errors import UserError
from freqmask.evaluation.protocol import say_skipped
from freqmask.evaluation.results import plain_texts, save_figure, shortened
from freqmask.evaluation.scores import image_margins
from freqmask.evaluation.segmentation.mask_data import Labels
from freqmask.evaluation.segmentation.segmentation_plan import Training
from freqmask.evaluation.segmentation.segmentation_task import pairs
from freqmask.evaluation.segmentation.upernet import UperNet
from freqmask.images import as_float

Network = Callable[[Tensor], Tensor]  # images (B, C, H, W) in [0, 1] -> logits (B, K, h, w)
_MOST_LEGEND = 40
_INCHES = 2.6  # of one picture's longer side
_LARGEST = 640  # pixels of a side; more would make a sheet of many megabytes
_OPACITY = 0.65
_GOLDEN = 0.618033988749895


def places(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side, so that they cover it: the last one ends where the side ends.

    >>> places(100, 40, 30), places(30, 40, 30)
    ([0, 30, 60], [0])
    """
    if length <= window:
        return [0]
    return [min(start, length - window) for start in range(0, length - window + stride, stride)]


def segment_windows(
    logits: Network,
    image: Float[Tensor, "channel height width"],
    window: int,
    stride: int,
    batch_size: int,
    fill: Float[Tensor, " channel"],
) -> Float[Tensor, "classes height width"]:
    """The mean logits of overlapping windows.

    Args:
        logits: of square windows.
        image: in [0, 1].
        window: side in pixels.
        stride: from one window to the next, at most ``window``.
        batch_size: windows at once.
        fill: what stands where an image is smaller than a window.
    """
    height, width = image.shape[1:]
    padded = pad_to(image, (max(height, window), max(width, window)), fill)
    corners = list(itertools.product(places(height, window, stride), places(width, window, stride)))
    total, counts = None, image.new_zeros(padded.shape[1:])
    for first in range(0, len(corners), batch_size):
        some = corners[first : first + batch_size]
        windows = torch.stack([padded[:, top : top + window, left : left + window] for top, left in some])
        found = _resized(logits(windows), (window, window))
        total = found.new_zeros(found.shape[1], *padded.shape[1:]) if total is None else total
        for (top, left), one in zip(some, found, strict=True):
            total[:, top : top + window, left : left + window] += one
            counts[top : top + window, left : left + window] += 1
    assert total is not None  # there is always a window
    return (total / counts)[:, :height, :width]


def segment_whole(
    logits: Network, image: Float[Tensor, "channel height width"]
) -> Float[Tensor, "classes height width"]:
    """The logits of the image seen in one piece; the network must take its size."""
    return _resized(logits(image[None]), (image.shape[1], image.shape[2]))[0]


def classes_at(
    logits: Float[Tensor, "classes height width"], size: tuple[int, int]
) -> Int64[Tensor, "mask_height mask_width"]:
    """The likeliest class of every pixel of the mask; logits are resampled, never classes."""
    return _resized(logits[None], size)[0].argmax(dim=0)


def pad_to(
    image: Float[Tensor, "channel height width"], size: tuple[int, int], fill: Float[Tensor, " channel"]
) -> Float[Tensor, "channel new_height new_width"]:
    """The image with ``fill`` below and to the right of it."""
    if tuple(image.shape[1:]) == size:
        return image
    padded = fill.to(image)[:, None, None].expand(-1, *size).clone()
    padded[:, : image.shape[1], : image.shape[2]] = image
    return padded


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(logits.shape[-2:]) == size:
        return logits.float()
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


@dataclass
class Shown:
    """One image to be looked at.

    Attributes:
        name: of the image.
        image: (channel, height, width) in [0, 1], as large as its mask.
        truth: classes, negative where a pixel does not count.
        predicted: name of a model -> classes.
    """

    name: str
    image: Float[np.ndarray, "channel height width"]
    truth: Int16[np.ndarray, "height width"]
    predicted: dict[str, Shaped[np.ndarray, "height width"]] = field(default_factory=dict)


class Predictor:
    """A network on a device.

    Args:
        network: trained.
        training: how it was.
        device: of torch.
        stride: from window to window in pixels.
        batch_size: windows at once.
    """

    def __init__(
        self, network: UperNet, training: Training, device: torch.device, stride: int, batch_size: int
    ) -> None:
        self.network = network.to(device).eval()
        self.training, self.device, self.stride, self.batch_size = training, device, stride, batch_size
        self.fill = torch.tensor(training.mean)

    def __call__(
        self, image: Shaped[Tensor, "channel height width"], size: tuple[int, int], inference: str
    ) -> tuple[Int64[np.ndarray, "mask_height mask_width"], bool]:
        """The class of every pixel of the mask, and whether all logits were finite.

        Args:
            image: uint8 or in [0, 1], at the size that the network is to see it.
            size: of the mask.
            inference: ``windows`` or ``whole``.
        """
        pixels = as_float(image.to(self.device))
        if inference == "whole":
            logits = segment_whole(self._logits, pixels)
        else:
            crop = self.training.crop
            logits = segment_windows(self._logits, pixels, crop, self.stride, self.batch_size, self.fill)
        return classes_at(logits, size).cpu().numpy(), bool(torch.isfinite(logits).all())

    def _logits(self, images: Tensor) -> Tensor:
        kind = torch.bfloat16 if "bf16" in self.training.precision else torch.float16
        with torch.autocast(self.device.type, kind, enabled="mixed" in self.training.precision):
            found: Tensor = self.network(images).decoder
        return found


@torch.inference_mode()
def predict(
    predictor: Predictor, source: Source, labels: Labels, inference: str, name: str
) -> tuple[Int64[np.ndarray, "image 3 classes"], Int64[np.ndarray, " image"], str]:
    """Segment every image and count.

    Args:
        predictor: the network.
        source: test images with masks.
        labels: the classes.
        inference: ``windows`` or ``whole``.
        name: of the model, for the lines printed.

    Returns:
        The margins of each image that could be read, the numbers of those images, and what is wrong, if anything.

    Raises:
        UserError: not one image can be read.
    """
    began = time.monotonic()
    dataset = pairs(source, labels, predictor.training, cut=False)
    counts, images, skipped, finite = [], [], {}, True
    loader = make_loader(dataset, OrderedSampler(len(source)), 1, predictor.training.workers)
    for asked, batch in enumerate(loader):
        skipped.update(batch["skipped"])
        if int(batch["indices"][0]) != asked:  # another image stands in for one that cannot be read
            continue
        image, truth = batch["views"][0][0], batch["views"][1][0].numpy()
        predicted, good = predictor(image, truth.shape, inference)
        counts.append(image_margins(truth, predicted, len(labels)))
        images.append(asked)
        finite = finite and good
    say_skipped(list(skipped.items()))
    if not images:
        raise UserError("not one of the test images can be read; check DATA")
    say(
        f"tested      {name}: {len(images):,} images in {readable_time(time.monotonic() - began)} ({inference})"
    )
    error = "" if finite else "the logits are not finite; no result"
    return np.stack(counts), np.array(images, np.int64), error


@torch.inference_mode()
def add_shown(
    shown: list[Shown],
    predictor: Predictor,
    source: Source,
    labels: Labels,
    inference: str,
    name: str,
    count: int,
) -> list[Shown]:
    """A model's predictions of a few evenly spread images, beside those of other models.

    Args:
        shown: predictions of other models of the same images; empty for the first.
        predictor: the network.
        source: test images with masks.
        labels: the classes.
        inference: ``windows`` or ``whole``.
        name: of the model.
        count: of images.
    """
    places = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)).tolist()
    dataset = pairs(source, labels, predictor.training, cut=False)
    known = {one.name: one for one in shown}
    for place, batch in zip(places, make_loader(dataset, ChosenSampler(places), 1, 0), strict=True):
        if int(batch["indices"][0]) != place:
            continue
        image, truth = batch["views"][0][0], batch["views"][1][0].numpy()
        predicted, _ = predictor(image, truth.shape, inference)
        title = source.name(place)
        if title not in known:
            pixels = torch.nn.functional.interpolate(as_float(image)[None], size=truth.shape, mode="bilinear")
            known[title] = Shown(title, pixels[0].cpu().numpy(), truth)
        known[title].predicted[name] = predicted
    return list(known.values())


def class_colors(count: int) -> Float[np.ndarray, "class 3"]:
    """A color in [0, 1] for each class, neighbours far apart in hue."""
    levels = ((0.75, 0.95), (0.95, 0.7), (0.5, 0.85))  # saturation and value by turns
    return np.array(
        [
            colorsys.hsv_to_rgb((number * _GOLDEN) % 1, *levels[number % len(levels)])
            for number in range(count)
        ]
    )


def as_colors(image: Float[np.ndarray, "channel height width"]) -> Float[np.ndarray, "height width 3"]:
    """An image of any number of channels: three as they are, others as the gray of their mean, stretched."""
    if len(image) == 3:
        return np.clip(image.transpose(1, 2, 0), 0, 1)
    gray = image.mean(axis=0)
    low, high = np.percentile(gray, (1, 99))
    stretched = np.clip((gray - low) / max(float(high - low), 1e-6), 0, 1)
    return np.repeat(stretched[:, :, None], 3, axis=2)


def overlaid(
    colors: Float[np.ndarray, "height width 3"],
    classes: Shaped[np.ndarray, "height width"],
    palette: Float[np.ndarray, "class 3"],
) -> Float[np.ndarray, "height width 3"]:
    """Class colors over the gray image; pixels that do not count are black."""
    gray = colors.mean(axis=2, keepdims=True)
    painted = (1 - _OPACITY) * gray + _OPACITY * palette[np.maximum(classes, 0)]
    painted[classes < 0] = 0.0
    return painted


def draw_overlays(path: Path, title: str, shown: Sequence[Shown], names: Sequence[str]) -> None:
    """A row an image: the image, the truth, the prediction of each model; below, what the colors mean.

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
    palette = class_colors(len(names))
    models = list(shown[0].predicted)
    height, width = shown[0].truth.shape
    scale = _INCHES / max(height, width)
    columns, rows = 2 + len(models), len(shown)
    maps = [classes for one in shown for classes in (one.truth, *one.predicted.values())]
    there = sorted({int(k) for classes in maps for k in np.unique(classes) if k >= 0})
    legend_rows = -(-min(len(there), _MOST_LEGEND) // (2 * columns)) or 1
    size = (columns * (scale * width + 0.1), rows * (scale * height + 0.25) + 0.6 + 0.22 * legend_rows)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, one in zip(axes, shown, strict=True):
        colors = as_colors(one.image)
        pictures = [colors, *(overlaid(colors, c, palette) for c in (one.truth, *one.predicted.values()))]
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(_smaller(picture), interpolation="nearest")
            axis.set_axis_off()
        # below the image: above it a long name would run into the title of the next column
        below = {"va": "top", "transform": row[0].transAxes, "fontsize": 7, "parse_math": False}
        row[0].text(0, -0.02, shortened(one.name, 30), **below)
    for axis, words in zip(axes[0][1:], ["truth", *models], strict=True):
        axis.set_title(shortened(words, 30), fontsize=8, parse_math=False)
    figure.suptitle(shortened(title, 90), fontsize=9, parse_math=False)
    patches = [Patch(color=palette[k], label=names[k]) for k in there[:_MOST_LEGEND]]
    patches.append(Patch(color="black", label="does not count"))
    legend = figure.legend(
        handles=patches, loc="outside lower center", ncols=2 * columns, fontsize=7, frameon=False
    )
    plain_texts(legend)
    save_figure(figure, path)


def _smaller(picture: np.ndarray) -> np.ndarray:
    step = -(-max(picture.shape[:2]) // _LARGEST)
    return picture[::step, ::step]
