"""Segmentation: a network trained on images with masks, tested on whole images, counted and drawn; the protocol."""

from __future__ import annotations

import colorsys
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int16, Int64, Shaped
from safetensors.torch import load_file
from timm.models import get_model_args

from freqmask.backbones import Backbone
from freqmask.console import counted, rank, readable_time, say, say_left_out, shortened
from freqmask.data.loader import OrderedSampler, make_loader
from freqmask.data.source import Source, spread
from freqmask.data.values import ValueRange
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import BackboneModel, EvalModel, open_eval_model
from freqmask.evaluation.features import ComputeConfig
from freqmask.evaluation.mask_data import MaskConfig, SegmentationData, open_segmentation
from freqmask.evaluation.mask_files import PairDataset, RandomCrop
from freqmask.evaluation.protocol import EvalConfig, Protocol
from freqmask.evaluation.results import Result, ResultTable, SegmentationResult, image_margins
from freqmask.evaluation.trainings import (
    AUTO,
    TrainingJob,
    check_no_problems,
    make_task,
    run_names,
    run_training,
    series_folder,
)
from freqmask.evaluation.upernet import (
    DROP_PATH,
    NETWORK,
    Predictor,
    SegmentationModule,
    SegmentationPlan,
    Training,
    UperNet,
    choose_crop,
    decoder_class,
    drops_paths,
)
from freqmask.interop.models import OpenedModel, open_model, stage_features
from freqmask.interop.weight_files import check_weights, write_tensors
from freqmask.options import group_among
from freqmask.rng import torch_seeded
from freqmask.spectrum import as_float
from freqmask.training.auto import pick_device
from freqmask.training.files import check_writable, save_figure
from freqmask.training.loop import Task
from freqmask.training.run_folder import RUNS, RunFolder, comparable, from_anywhere

# The options that decide what a network becomes.
DECIDING = (
    *("crop", "image_size", "scale", "flip", "steps", "epochs", "batch_size", "lr", "warmup_steps"),
    *("weight_decay", "layer_decay", "drop_path", "decoder_channels", "precision", "value_range", "weights"),
)
_MOST_LEGEND = 40
_INCHES = 2.6  # of one panel's longer side
_LARGEST = 640  # pixels of a side; more would make a sheet of many megabytes
_OPACITY = 0.65
_GOLDEN = 0.618033988749895


def _problems(options: Mapping[str, Any]) -> Iterator[str]:
    scale, crop, stride = options["scale"], options["crop"], options["stride"]
    if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1]):
        yield f"scale ({scale}) must be the smallest and the largest factor on the image, such as 0.5 2"
    if isinstance(stride, int) and isinstance(crop, int) and stride > crop:
        yield f"stride ({stride}) must be at most crop ({crop}), or windows would leave gaps"


@dataclass
class SegmentationJob(TrainingJob):
    """The training of one network."""

    data: SegmentationData

    method, command, product = "segment", "evaluate segment", "network"
    metrics, numbers, decides = ["loss"], Training, DECIDING
    resumes_with = ("accumulate",)

    def __post_init__(self) -> None:
        channels = self.asked["decoder_channels"]
        with torch_seeded(self.seed):
            width = None if channels in (None, AUTO) else int(channels)
            self.network = UperNet(self.model.opened, len(self.data.labels), width)

    def trained_on(self) -> Source:
        return self.data.train

    def labels_decide(self) -> dict[str, Any]:
        labels = self.data.labels
        return {"classes": list(labels.values), "ignored labels": list(labels.ignored)}

    def plan(self) -> tuple[Training, dict[str, Any], Source]:
        images, labels = self.data.train, self.data.labels
        plan = SegmentationPlan(self.asked, job=self, network=self.network, images=len(images))
        training = plan.resolve()
        say()
        for line in plan.lines(training):
            say(line)
        arguments = get_model_args(self.model.opened.module)
        made = ("img_size", "in_chans", "num_classes", "patch_size")
        about = {
            "data": from_anywhere(self.data.name),
            "split": self.data.split,
            "patch_size": arguments.get("patch_size"),
            "model_args": comparable({k: v for k, v in arguments.items() if k not in made}),
            "classes": {int(value): name for value, name in zip(labels.values, labels.names, strict=True)},
            "ignore_label": list(labels.ignored),
        }
        return training, about, images

    def task(self, run: RunFolder, numbers: Training) -> Task:
        torch.manual_seed(numbers.seed)  # of dropout and drop path

        def export(trainer: L.Trainer, module: Any, step: int) -> None:
            # the whole network once it is done; until then the checkpoints hold it
            if trainer.is_global_zero and step == numbers.steps:
                write_tensors(run.path / NETWORK, module.network.state_dict())

        module = SegmentationModule(self.network.train(), numbers)
        dataset = make_pairs(self.data, self.data.train, numbers, cut=True)
        return make_task(run, numbers, module, dataset, export)

    def end(self, run: RunFolder, summary: Mapping[str, Any]) -> None:
        """Print how it ended; the checkpoints, three times the network, have served."""
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        say(f"done        {counted(summary['steps'], 'step')} in {readable_time(summary['seconds'])}")

    def trained(self, run: RunFolder) -> UperNet:
        """The network with the weights that a finished run ended with."""
        if not (run.path / NETWORK).is_file():
            raise UserError(
                f"run ({run.path}) is finished and its {NETWORK} is gone; delete it to train again"
            )
        self.network.load_state_dict(load_file(run.path / NETWORK))
        return self.network


def make_pairs(data: SegmentationData, source: Source, training: Training, cut: bool) -> PairDataset:
    """Images with masks: random crops of them where ``cut``, else whole."""
    crop = RandomCrop(training.crop, training.scale, training.image_size, 0.5 if training.flip else 0.0)
    return PairDataset(
        source,
        data.labels.lookup(),
        ValueRange.parse(training.value_range) or ValueRange(),
        training.channels,
        training.seed,
        crop if cut else None,
        training.image_size,
        training.mean,
    )


def open_network(run: RunFolder) -> tuple[UperNet, Training]:
    """The network of a finished run, from the run alone.

    Raises:
        UserError: it is not finished; of a run of 0.1.0, which knows MODEL's path only, MODEL is gone.
    """
    if not (run.path / NETWORK).is_file():
        raise UserError(f"model ({run.path}) has no network yet; its command resumes it")
    config = run.config()
    training = Training.read(config)
    optional = {"drop_path_rate": 0.0, "dynamic_img_size": True}
    if "model_args" in config:
        backbone = Backbone(
            config["backbone"],
            training.crop,
            training.channels,
            config.get("patch_size"),
            model_args=config["model_args"],
            optional_model_args=optional,
        )
        size = (training.channels, training.crop, training.crop)
        opened = OpenedModel(
            run.path.name, "random", backbone, size, tuple(training.mean), tuple(training.std)
        )
    else:
        try:
            opened = open_model(config["model"], image_size=training.crop, optional_model_args=optional)
        except UserError as error:
            raise UserError(
                f"model ({run.path}) was built on {config['model']}, whose architecture is needed: {error}"
            ) from error
    network = UperNet(opened, len(config["classes"]), training.decoder_channels)
    network.load_state_dict(load_file(run.path / NETWORK))
    check_weights(network.state_dict(), str(run.path))
    return network.eval(), training


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
    places = set(spread(np.arange(count), drawn).tolist())
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
    say_left_out(list(skipped.items()))
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
    return np.array([colorsys.hsv_to_rgb((k * _GOLDEN) % 1, *levels[k % len(levels)]) for k in range(count)])


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
    figure.legend(handles=patches, loc="outside lower center", ncols=2 * columns, fontsize=7, frameon=False)
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
        self.options = options
        self.inferences = list(dict.fromkeys(options["inference"] or ["windows"]))
        self.headline = self.inferences[0]
        self.overlays: dict[int, Overlay] = {}

    def compute_of(self, options: Mapping[str, Any]) -> ComputeConfig:
        return ComputeConfig()

    def open(self, config: EvalConfig) -> None:
        check_no_problems(config.models, "trained on", "baseline", _problems(self.options))
        decoder_class()
        check_writable(config.out or RUNS, folder=True)
        super().open(config)
        words = {name: self.options[name] for name in DECIDING if name in self.options}
        decides = (words, self.data.train.fingerprint(), self.data.split, self.data.labels.values)
        self.root, self.run_names = series_folder(config.out, self.name, *decides), run_names(config.models)

    def open_data(self, config: EvalConfig) -> SegmentationData:
        return open_segmentation(group_among(MaskConfig, self.options))

    def open_model(self, text: str, seed: int) -> BackboneModel:
        """MODEL for samples of the crop's size, with drop path; one that takes any size stays able to."""
        asked = self.options
        given = asked["drop_path"] not in (None, AUTO)
        rate = float(asked["drop_path"]) if given else DROP_PATH
        model = open_eval_model(
            text,
            self.survey,
            seed=seed,
            image_size=choose_crop(asked, self.survey).value,
            weights=asked["weights"],
            value_range=asked["value_range"],
            optional_model_args={"drop_path_rate": rate, "dynamic_img_size": True},
        )
        assert isinstance(model, BackboneModel)  # pixels were refused
        deep = len(model.opened.module.feature_info) > 1  # the first block of all never drops
        if rate and deep and given and not drops_paths(model.opened.module):
            raise UserError(f"drop_path ({asked['drop_path']}) must be left out: {text} does not take it")
        return model

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
            folder, model = self.root / f"{self.run_names[text]}-seed{seed}", self.named(text, seed)
            yield SegmentationJob(model, self.data, self.survey, seed, folder, self.options), seed

    def evaluate(self, job: SegmentationJob, seed: int) -> list[Result]:
        """One training, tested in each of the ways asked for; nothing after a dry run or in a helping process."""
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
            draw_overlays(figures[0], self.data.name, list(self.overlays.values()), self.data.labels.names)
        return figures
