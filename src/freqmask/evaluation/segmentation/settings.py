"""The numbers of one training of a segmentation network, and what is wrong with the options that set them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from freqmask.errors import UserError
from freqmask.evaluation.eval_model import PIXELS
from freqmask.evaluation.trainings import AUTO

INFERENCES = ("windows", "whole")
PRECISIONS = (AUTO, "32-true", "bf16-mixed", "16-mixed")
_WHOLE = (
    "steps",
    "batch_size",
    "accumulate",
    "crop",
    "image_size",
    "decoder_channels",
    "stride",
    "keep_checkpoints",
)


@dataclass(frozen=True)
class Training:
    """Every number of one training.

    Attributes:
        crop: side of the training samples, and of the windows of an evaluation, in pixels.
        image_size: shorter side that images are brought to first; None leaves them as they are.
        scale: smallest and largest random factor on the image.
        flip: whether samples are mirrored half of the time.
        steps: optimiser steps.
        batch_size: images of an optimiser step over all devices and parts.
        accumulate: parts that a device's batch is cut into.
        lr: peak learning rate.
        warmup_steps: of linear warm-up.
        weight_decay: of matrices.
        layer_decay: factor on the learning rate from a layer of the backbone to the one below.
        drop_path: share of residual branches dropped in the last block.
        decoder_channels: width of the decoder.
        channels: of the images.
        mean: of each channel in [0, 1].
        std: of each channel.
        value_range: what becomes [0, 1].
        seed: of fresh weights, order and augmentation.
        accelerator: Lightning's.
        devices: how many.
        num_nodes: machines.
        strategy: Lightning's.
        precision: Lightning's.
        workers: loader processes.
        log_every_steps: between rows of metrics.csv.
        checkpoint_every_steps: between checkpoints.
        checkpoint_every_minutes: the same, whichever comes first.
        keep_checkpoints: that stay on the disk while it trains.
        max_skipped_share: of unreadable images at which it stops.
    """

    crop: int
    image_size: int | None
    scale: tuple[float, float]
    flip: bool
    steps: int
    batch_size: int
    accumulate: int
    lr: float
    warmup_steps: int
    weight_decay: float
    layer_decay: float
    drop_path: float
    decoder_channels: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    value_range: str
    seed: int
    accelerator: str
    devices: int
    num_nodes: int
    strategy: str
    precision: str
    workers: int
    log_every_steps: int
    checkpoint_every_steps: int
    checkpoint_every_minutes: float
    keep_checkpoints: int
    max_skipped_share: float

    @property
    def images_at_once(self) -> int:
        """Of one device."""
        return self.batch_size // (self.devices * self.num_nodes) // self.accumulate


# What the machine is like, which a training that goes on takes from the new command.
MACHINE = (
    *("accelerator", "devices", "strategy", "workers", "log_every_steps", "checkpoint_every_steps"),
    *("checkpoint_every_minutes", "keep_checkpoints", "max_skipped_share", "accumulate"),
)
# The options that decide what a network becomes.
DECIDING = (
    *("crop", "image_size", "scale", "flip", "steps", "epochs", "batch_size", "lr", "warmup_steps"),
    *("weight_decay", "layer_decay", "drop_path", "decoder_channels", "precision", "value_range", "weights"),
)


def training_of(values: Mapping[str, Any]) -> Training:
    """The numbers as a config holds them; what is no number of a training is passed over."""
    names = [field.name for field in dataclasses.fields(Training)]
    plain = {name: values.get(name) for name in names}
    plain |= {name: tuple(plain[name]) for name in ("scale", "mean", "std")}  # type: ignore[arg-type]
    return Training(**plain)  # type: ignore[arg-type]


def check_options(options: Mapping[str, Any]) -> None:
    """Raises a UserError with all that is wrong with the options."""
    problems = list(_problems(options))
    if problems:
        raise UserError("; ".join(problems))


def _problems(options: Mapping[str, Any]) -> Iterator[str]:
    if PIXELS in options["model"]:
        yield "model (pixels) must have weights to be trained on; random:NAME is the baseline"
    if options["steps"] is not None and options["epochs"] is not None:
        yield "epochs and steps exclude each other; give one of them"
    yield from _numbers(options)
    scale = options["scale"]
    if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1]):
        yield f"scale ({scale}) must be the smallest and the largest factor on the image, such as 0.5 2"
    for one in options["inference"] or ():
        if one not in INFERENCES:
            yield f"inference ({one}) must be {' or '.join(INFERENCES)}, or both"
    crop, stride = options["crop"], options["stride"]
    if isinstance(stride, int) and isinstance(crop, int) and stride > crop:
        yield f"stride ({stride}) must be at most crop ({crop}), or windows would leave gaps"
    if options["precision"] not in PRECISIONS:
        yield f"precision ({options['precision']}) must be one of {', '.join(PRECISIONS)}"


def _numbers(options: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each number out of its range."""
    rules = {
        "must be a whole number of at least 1": (_WHOLE, lambda value: value >= 1 and value == int(value)),
        "must be above 0": (("epochs", "lr", "checkpoint_every_minutes"), lambda value: value > 0),
        "must be 0 or more": (("weight_decay", "warmup_steps", "overlays"), lambda value: value >= 0),
        "must be above 0 and at most 1": (("layer_decay",), lambda value: 0 < value <= 1),
        "must be from 0 to below 1": (("drop_path", "max_skipped_share"), lambda value: 0 <= value < 1),
    }
    for rule, (names, fits) in rules.items():
        for name in names:
            value = options[name]
            if value in (None, AUTO):
                continue
            if isinstance(value, (str, bool)) or not fits(value):
                yield f"{name} ({value}) {rule}"
