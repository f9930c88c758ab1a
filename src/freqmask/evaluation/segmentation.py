"""Segmentation: from a network that sees windows to the classes of whole images, counted and drawn; the protocol."""

from __future__ import annotations

import colorsys
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int16, Int64, Shaped
from torch import Tensor

from freqmask.console import rank, readable_time, say, silence_third_party_loggers
from freqmask.data.loader import make_loader
from freqmask.data.sampler import OrderedSampler
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import BackboneModel, EvalModel, check_models
from freqmask.evaluation.mask_data import MaskConfig, SegmentationData, open_segmentation
from freqmask.evaluation.protocol import EvalConfig, Protocol, say_skipped
from freqmask.evaluation.results import (
    Result,
    ResultTable,
    SegmentationResult,
    plain_texts,
    save_figure,
    shortened,
)
from freqmask.evaluation.scores import image_margins
from freqmask.evaluation.segmentation_task import (
    DECIDING,
    STRIDE_SHARE,
    SegmentationJob,
    Training,
    check_options,
    choose_crop,
    make_pairs,
    open_for_training,
)
from freqmask.evaluation.trainings import AUTO, run_names, run_training, series_folder
from freqmask.evaluation.upernet import UperNet, decoder_class
from freqmask.images import as_float
from freqmask.interop.models import stage_features
from freqmask.training.auto import pick_device
from freqmask.training.files import check_writable
from freqmask.training.run_folder import RUNS

Network = Callable[[Tensor], Tensor]  # images (B, C, H, W) in [0, 1] -> logits (B, K, h, w)
_MOST_LEGEND = 40
_INCHES = 2.6  # of one panel's longer side
_LARGEST = 640  # pixels of a side; more would make a sheet of many megabytes
_OPACITY = 0.65
_GOLDEN = 0.618033988749895


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side, so that they cover it: the last one ends where the side ends.

    >>> window_starts(100, 40, 30), window_starts(30, 40, 30)
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
    """The mean logits of overlapping square windows of an image in [0, 1].

    Window and stride are in pixels, the stride at most the window; ``batch_size`` windows are taken at once, filled up
    where the image is smaller.
    """
    height, width = image.shape[1:]
    padded = _pad_to(image, (max(height, window), max(width, window)), fill)
    corners = list(
        itertools.product(window_starts(height, window, stride), window_starts(width, window, stride))
    )
    total, counts = None, image.new_zeros(padded.shape[1:])
    for first in range(0, len(corners), batch_size):
        some = corners[first : first + batch_size]
        windows = torch.stack([padded[:, top : top + window, left : left + window] for top, left in some])
        batch = _resized(logits(windows), (window, window))
        total = batch.new_zeros(batch.shape[1], *padded.shape[1:]) if total is None else total
        for (top, left), window_logits in zip(some, batch, strict=True):
            total[:, top : top + window, left : left + window] += window_logits
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


def _pad_to(image: Tensor, size: tuple[int, int], fill: Tensor) -> Tensor:
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
class Predictor:
    """A network on a device."""

    network: UperNet
    training: Training  # how it was trained
    device: torch.device
    batch_size: int  # windows at once
    stride: int = 0  # from window to window in pixels; 0 is two thirds of the crop

    def __post_init__(self) -> None:
        self.network.to(self.device).eval()
        self.stride = self.stride or max(1, round(self.training.crop * STRIDE_SHARE))
        self.fill = torch.tensor(self.training.mean)

    def __call__(
        self, image: Shaped[Tensor, "channel height width"], size: tuple[int, int], inference: str
    ) -> tuple[Int64[np.ndarray, "mask_height mask_width"], bool]:
        """The class of every pixel of the mask, and whether all logits were finite.

        Args:
            image: uint8 or in [0, 1], at the network's input size.
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
            decoded: Tensor = self.network(images).decoder
        return decoded


@dataclass
class Overlay:
    """One test image with the classes of its pixels, to be drawn."""

    name: str
    image: Float[np.ndarray, "channel height width"]  # in [0, 1], as large as its mask
    truth: Int16[np.ndarray, "height width"]  # negative where a pixel does not count
    predicted: dict[str, Shaped[np.ndarray, "height width"]] = field(default_factory=dict)  # by model


@torch.inference_mode()
def predict(
    predictor: Predictor,
    data: SegmentationData,
    inference: str,
    name: str,
    overlays: dict[int, Overlay],
    drawn: int,
) -> tuple[Int64[np.ndarray, "image 3 classes"], Int64[np.ndarray, " image"], str]:
    """Segment every test image in ``windows`` or ``whole``, and count.

    Args:
        predictor: the network.
        data: the test images.
        inference: ``windows`` or ``whole``.
        name: the model's, for what is printed and drawn.
        overlays: of images that are drawn, which get the model's predictions beside those of others.
        drawn: how many of them, evenly spread.

    Returns:
        The margins of each image that could be read, the numbers of those images, and what is wrong, if anything.

    Raises:
        UserError: not one image can be read.
    """
    began, count = time.monotonic(), len(data.test)
    places = set(np.linspace(0, count - 1, min(drawn, count)).round().astype(int).tolist())
    dataset = make_pairs(data, data.test, predictor.training, cut=False)
    counts, images, skipped, finite = [], [], {}, True
    loader = make_loader(dataset, OrderedSampler(count), 1, predictor.training.workers)
    for asked, batch in enumerate(loader):
        skipped.update(batch["skipped"])
        if int(batch["indices"][0]) != asked:  # a fallback for one that cannot be read
            continue
        image, truth = batch["views"][0][0], batch["views"][1][0].numpy()
        predicted, good = predictor(image, truth.shape, inference)
        counts.append(image_margins(truth, predicted, len(data.labels)))
        images.append(asked)
        finite = finite and good
        if asked in places:
            if asked not in overlays:
                pixels = F.interpolate(as_float(image)[None], size=truth.shape, mode="bilinear")
                overlays[asked] = Overlay(data.test.name(asked), pixels[0].cpu().numpy(), truth)
            overlays[asked].predicted[name] = predicted
    say_skipped(list(skipped.items()))
    if not images:
        raise UserError("not one of the test images can be read; check DATA")
    say(
        f"tested      {name}: {len(images):,} images in {readable_time(time.monotonic() - began)} ({inference})"
    )
    error = "" if finite else "the logits are not finite; no result"
    return np.stack(counts), np.array(images, np.int64), error


def class_colors(count: int) -> Float[np.ndarray, "class 3"]:
    """A color in [0, 1] for each class, neighbors far apart in hue."""
    levels = ((0.75, 0.95), (0.95, 0.7), (0.5, 0.85))  # saturation and value by turns
    colors = [
        colorsys.hsv_to_rgb((number * _GOLDEN) % 1, *levels[number % len(levels)]) for number in range(count)
    ]
    return np.array(colors)


def as_colors(image: Float[np.ndarray, "channel height width"]) -> Float[np.ndarray, "height width 3"]:
    """An image of any number of channels: three as they are, others as the gray of their mean, stretched."""
    if len(image) == 3:
        return np.clip(image.transpose(1, 2, 0), 0, 1)
    gray = image.mean(axis=0)
    low, high = np.percentile(gray, (1, 99))
    stretched = np.clip((gray - low) / max(float(high - low), 1e-6), 0, 1)
    return np.repeat(stretched[:, :, None], 3, axis=2)


def draw_overlays(path: Path, title: str, overlays: Sequence[Overlay], names: Sequence[str]) -> None:
    """A row an image: the image, the truth, the prediction of each model; below, what the colors mean."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    palette, models = class_colors(len(names)), list(overlays[0].predicted)
    height, width = overlays[0].truth.shape
    scale = _INCHES / max(height, width)
    columns, rows = 2 + len(models), len(overlays)
    maps = [[one.truth, *one.predicted.values()] for one in overlays]
    present = sorted({int(k) for row in maps for classes in row for k in np.unique(classes) if k >= 0})
    legend_rows = -(-min(len(present), _MOST_LEGEND) // (2 * columns)) or 1
    size = (columns * (scale * width + 0.1), rows * (scale * height + 0.25) + 0.6 + 0.22 * legend_rows)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, overlay, classes in zip(axes, overlays, maps, strict=True):
        colors = as_colors(overlay.image)
        for axis, panel in zip(row, [colors, *(_overlaid(colors, k, palette) for k in classes)], strict=True):
            step = -(-max(panel.shape[:2]) // _LARGEST)
            axis.imshow(panel[::step, ::step], interpolation="nearest")
            axis.set_axis_off()
        # below the image: above it a long name would run into the title of the next column
        below = {"va": "top", "transform": row[0].transAxes, "fontsize": 7, "parse_math": False}
        row[0].text(0, -0.02, shortened(overlay.name, 30), **below)
    for axis, words in zip(axes[0][1:], ["truth", *models], strict=True):
        axis.set_title(shortened(words, 30), fontsize=8, parse_math=False)
    figure.suptitle(shortened(title, 90), fontsize=9, parse_math=False)
    patches = [Patch(color=palette[k], label=shortened(names[k], 30)) for k in present[:_MOST_LEGEND]]
    patches.append(Patch(color="black", label="does not count"))
    where: dict[str, Any] = {
        "loc": "outside lower center",
        "ncols": 2 * columns,
        "fontsize": 7,
        "frameon": False,
    }
    plain_texts(figure.legend(handles=patches, **where))
    save_figure(figure, path)


def _overlaid(colors: np.ndarray, classes: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Class colors over the gray image; pixels that do not count are black."""
    gray = colors.mean(axis=2, keepdims=True)
    painted = (1 - _OPACITY) * gray + _OPACITY * palette[np.maximum(classes, 0)]
    painted[classes < 0] = 0.0
    return painted


class Segment(Protocol):
    """UperNet on a backbone, all weights trained, by the options of the command."""

    title, seeds = "UperNet, evaluated after the last step", (0,)
    all_classes = True  # of every way of inference

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = {**options, "model": check_models(options["model"])}
        self.inferences = list(dict.fromkeys(options["inference"] or ["windows"]))
        self.headline = self.inferences[0]
        self.overlays: dict[int, Overlay] = {}

    def config_of(self, options: Mapping[str, Any]) -> EvalConfig:
        return EvalConfig(
            models=check_models(options["model"]),
            data=options["data"],
            seeds=options["seeds"] or self.seeds,
            weights=options["weights"],
            value_range=options["value_range"],
            out=None if options["out"] is None else Path(options["out"]),
            options=options,
        )

    def open(self, config: EvalConfig) -> None:
        check_options(self.options)
        decoder_class()
        check_writable(config.out or RUNS, folder=True)
        super().open(config)
        words = {name: self.options[name] for name in DECIDING if name in self.options}
        decides = (words, self.data.train.fingerprint(), self.data.split, self.data.labels.values)
        self.root, self.names = series_folder(config.out, self.name, *decides), run_names(config.models)

    def open_data(self, config: EvalConfig) -> SegmentationData:
        names = MaskConfig.__dataclass_fields__
        return open_segmentation(MaskConfig(**{name: self.options[name] for name in names}))

    def open_model(self, text: str, seed: int) -> BackboneModel:
        return open_for_training(text, self.survey, seed, self.options)

    def what_differs(self, model: EvalModel) -> list[str]:
        return []  # whole images are segmented

    def check_model(self, model: BackboneModel) -> None:
        """Whether the network takes whole images, where they are asked for."""
        if "whole" not in self.inferences:
            return
        crop = int(choose_crop(self.options, self.survey).value)
        try:
            with torch.no_grad():
                images = torch.zeros(1, model.opened.backbone.channels, crop + 8, 2 * crop)
                stage_features(model.opened.backbone, images)
        except (AssertionError, RuntimeError, ValueError, UserError) as error:
            raise UserError(
                f"inference (whole) must be left out: {model.text} takes images of {crop}x{crop} pixels only; "
                "--inference windows will do"
            ) from error

    def contexts(self, text: str) -> Iterator[tuple[SegmentationJob, int]]:
        """A training for each seed."""
        for seed in self.config.seeds:
            folder, model = self.root / f"{self.names[text]}-seed{seed}", self.open_model(text, seed)
            yield SegmentationJob(model, self.data, self.survey, seed, folder, self.options), seed

    def evaluate(self, job: SegmentationJob, seed: int) -> list[Result]:
        """One training, tested in each of the ways asked for; nothing after a dry run or in a helping process."""
        with silence_third_party_loggers():
            run = run_training(job)
        if self.options["dry_run"] or rank() > 0:
            return []
        training, stride = Training.read(run.config()), self.options["stride"]
        device, network = pick_device(self.options["accelerator"]), job.trained(run)
        every = 0 if stride in (None, AUTO) else int(stride)
        predictor = Predictor(network, training, device, training.images_at_once, every)
        model, data = job.model, job.data
        names = ("steps", "crop", "lr", "layer_decay", "drop_path", "decoder_channels")
        metadata = {
            "train_images": len(data.train),
            **{name: getattr(training, name) for name in names},
            "step_images": training.batch_size,
            "shorter_side": training.image_size or "",
            "stride": predictor.stride,
            "network": str(run.path),
        }
        results: list[Result] = []
        for way in self.inferences:
            is_drawn = way == self.headline and seed == self.config.seeds[0]
            drawn = int(self.options["overlays"]) if is_drawn else 0
            counts, images, error = predict(predictor, data, way, model.name, self.overlays, drawn)
            row = SegmentationResult(model, data, way, seed, images, counts, metadata=metadata, error=error)
            results.append(row)
        model.opened.backbone.cpu()
        return results

    def draw(self, tables: Mapping[str, ResultTable], folder: Path) -> list[Path]:
        figures = super().draw(tables, folder)
        if self.overlays:
            figures.insert(0, folder / f"{self.name}-overlays.png")
            data, overlays = self.data, list(self.overlays.values())
            draw_overlays(figures[0], data.name, overlays, data.labels.names)
        return figures
