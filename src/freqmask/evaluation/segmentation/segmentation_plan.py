"""The numbers of a training: what is wrong with the options, every ``auto`` resolved with its reason, and told.

The published numbers are BEiT's for ADE20K with self-supervised weights
(https://github.com/microsoft/unilm, upernet_beit_base_12_512_slide_160k_ade20k_pt): 160,000 steps of 16 crops of
512 pixels out of 20,210 images, AdamW (0.9, 0.999), learning rate 7e-4, linear decay after 1,500 steps of warm-up,
weight decay 0.05, layer decay 0.65, drop path 0.1; windows of 512 every 341 pixels. CNNs and hierarchical networks
get 1e-4 and no layer decay (as UperNet on ConvNeXt, roughly), and fresh weights none either.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from freqmask.console import readable_bytes, readable_time, say
from freqmask.data.values import Survey
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import PIXELS, BackboneModel
from freqmask.evaluation.segmentation.upernet import UperNet, segmentation_losses
from freqmask.evaluation.trainings import AUTO, Numbers
from freqmask.training import auto
from freqmask.training.auto import Choice
from freqmask.training.optim import scaled_lr

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


BATCH, STEPS, IMAGES, WARMUP = 16, 160_000, 20_210, 1_500
LR, LR_OTHERS, WEIGHT_DECAY, LAYER_DECAY, DROP_PATH = 7e-4, 1e-4, 0.05, 0.65, 0.1
CROP, CROP_ON_CPU = 512, 224
SCALE = (0.5, 2.0)
STRIDE_SHARE = 341 / 512  # of the window
CHECKPOINTS, SECONDS_A_ROW = 20, 5.0
_BEIT = "as BEiT on ADE20K"


def choose_crop(asked: Any, seen: Survey, on_gpu: bool) -> Choice:
    """Side of the samples: BEiT's 512, less for smaller images and on a CPU; a multiple of 32."""
    if asked not in (None, AUTO):
        return Choice(int(asked), "as asked")
    shorter = min(seen.median_size)
    most = CROP if on_gpu else CROP_ON_CPU
    side = max(32, min(most, shorter) // 32 * 32)
    if side < most:
        return Choice(side, f"the median shorter side is {shorter}")
    return Choice(side, _BEIT if on_gpu else "training runs on the CPU")


def resolve(
    asked: Mapping[str, Any], subject: BackboneModel, network: UperNet, crop: Choice, images: int, seed: int
) -> tuple[Training, Numbers]:
    """All numbers of a training.

    Args:
        asked: the command's options.
        subject: the model.
        network: made for the crop, without drop path.
        crop: side of the samples.
        images: to learn from.
        seed: of the training.

    Raises:
        UserError: numbers do not fit each other.
    """
    numbers = Numbers(asked)
    values, opened = numbers.values, subject.opened
    values |= {"seed": seed, "crop": crop.value, "image_size": asked["image_size"], "num_nodes": 1}
    values |= {"channels": opened.input_size[0], "mean": opened.mean, "std": opened.std}
    values |= {"value_range": opened.value_range, "decoder_channels": network.decoder_channels}
    numbers.reasons["crop"] = crop.reason
    numbers.take("scale", Choice(SCALE, _BEIT))
    values["flip"] = asked["flip"]
    _machine(numbers)
    _length(numbers, network, images)
    _rates(numbers, subject, network)
    _records(numbers)
    return training_of(values), numbers


def _machine(numbers: Numbers) -> None:
    from freqmask.evaluation.features import pick_device

    asked, values = numbers.asked, numbers.values
    device = pick_device(asked["accelerator"])
    values |= {"accelerator": device.type, "strategy": AUTO}
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    numbers.take("devices", Choice(count, "all of them" if count > 1 else "one device here"))
    if not isinstance(values["devices"], int) or values["devices"] < 1:
        raise UserError(f"devices ({values['devices']}) must be 1 or more, or auto")
    if values["devices"] > 1:
        values["strategy"] = "ddp"
    numbers.take("workers", auto.choose_workers(device.type == "cuda"))
    numbers.take("precision", auto.choose_precision(device.type))


def _length(numbers: Numbers, network: UperNet, images: int) -> None:
    values, asked = numbers.values, numbers.asked
    numbers.take("batch_size", Choice(BATCH, _BEIT))
    batch, devices = int(values["batch_size"]), int(values["devices"])
    device = torch.device(values["accelerator"])
    cost = numbers.cost = measure(network, values, device)
    if batch % devices:
        raise UserError(f"batch_size ({batch}) must be a multiple of the {devices} devices")
    numbers.take("accumulate", auto.choose_accumulation(cost, batch // devices, auto.usable_memory(device)))
    part, rest = divmod(batch // devices, int(values["accumulate"]))
    if rest or part < 2:
        raise UserError(
            f"batch_size ({batch}) over {devices} devices in {values['accumulate']} parts must leave two images or "
            "more at once, because the decoder has batch norm; take a larger batch_size or a smaller crop"
        )
    passes = asked["epochs"] or STEPS * BATCH / IMAGES
    usual = min(math.ceil(passes * images / batch), STEPS)
    why = "" if asked["epochs"] else f"{passes:.0f} epochs, {_BEIT}"
    numbers.take("steps", Choice(max(usual, 1), why))
    warmup = max(round(values["steps"] * WARMUP / STEPS), 1)
    numbers.take("warmup_steps", Choice(warmup, f"{WARMUP:,} of {STEPS:,}, {_BEIT}"))
    values["warmup_steps"] = min(values["warmup_steps"], values["steps"] - 1)


def _rates(numbers: Numbers, subject: BackboneModel, network: UperNet) -> None:
    plain, fresh = network.pyramid.is_plain, subject.kind == "random"
    rate = scaled_lr(LR if plain else LR_OTHERS, int(numbers.values["batch_size"]), BATCH)
    numbers.take("lr", Choice(rate, f"{LR if plain else LR_OTHERS:g} x batch/{BATCH}"))
    numbers.take("weight_decay", Choice(WEIGHT_DECAY, _BEIT))
    if fresh:
        numbers.take("layer_decay", Choice(1.0, "fresh weights have nothing to keep"))
    else:
        numbers.take("layer_decay", Choice(LAYER_DECAY if plain else 1.0, _BEIT if plain else "no plain ViT"))
    numbers.take("drop_path", Choice(DROP_PATH, _BEIT))
    if not drops_paths(network.pyramid.backbone.timm_model):
        numbers.values["drop_path"] = 0.0


def drops_paths(model: nn.Module) -> bool:
    """Whether a timm model drops residual branches in training."""
    return any(isinstance(part, DropPath) for part in model.modules())


def _records(numbers: Numbers) -> None:
    values, asked = numbers.values, numbers.asked
    steps = int(values["steps"])
    assert numbers.cost is not None
    a_step = numbers.cost.seconds(1, int(values["batch_size"]) // int(values["devices"]))
    values["log_every_steps"] = max(
        1, min(round(SECONDS_A_ROW / max(a_step, 1e-6)), max(steps // 20, 1), 100)
    )
    values["checkpoint_every_steps"] = max(steps // CHECKPOINTS, 1)
    for name in ("checkpoint_every_minutes", "keep_checkpoints", "max_skipped_share"):
        values[name] = asked[name]


def measure(network: UperNet, values: Mapping[str, Any], device: torch.device) -> auto.Cost:
    """Time and memory of a sample, measured on a copy so that the network stays as it was."""
    trial = copy.deepcopy(network).to(device).train()
    precision = torch.bfloat16 if "bf16" in str(values["precision"]) else torch.float16
    side = int(values["crop"])

    def loss(images: int) -> Tensor:
        samples = torch.rand(images, values["channels"], side, side, device=device)
        masks = torch.zeros(images, side, side, dtype=torch.int64, device=device)
        with torch.autocast(device.type, precision, enabled="mixed" in str(values["precision"])):
            return segmentation_losses(trial(samples), masks)["loss"]

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return auto.measure_cost(trial, loss, device, images=2)


def say_plan(
    subject: BackboneModel, training: Training, numbers: Numbers, network: UperNet, images: int
) -> None:
    """The plan of a new training.

    Args:
        subject: the model.
        training: every number.
        numbers: how they came about.
        network: backbone and decoder.
        images: that are learnt from.
    """
    say()
    for line in _lines(subject, training, numbers, network, images):
        say(line)


def _lines(
    subject: BackboneModel, training: Training, numbers: Numbers, network: UperNet, images: int
) -> Iterator[str]:
    def why(option: str) -> str:
        reason = numbers.reasons.get(option)
        return f" ({reason})" if reason else ""

    stages = [stage + 1 for stage in network.pyramid.stages]
    what = "blocks" if network.pyramid.is_plain else "stages"
    yield (
        f"model       {subject.name}, {what} {', '.join(map(str, stages))}; UperNet of {training.decoder_channels} "
        "channels"
    )
    size = "as large as they are" if training.image_size is None else f"shorter side {training.image_size}"
    low, high = training.scale
    mirrored = "mirrored half of the time" if training.flip else "never mirrored"
    yield (
        f"samples     crops of {training.crop} pixels{why('crop')}, images {size}, times {low:g} to {high:g}, "
        f"{mirrored}"
    )
    epochs = training.steps * training.batch_size / images
    yield (
        f"training    {training.steps:,} steps of {training.batch_size} samples{why('batch_size')} = {epochs:,.1f} "
        f"epochs{why('steps')}"
    )
    yield (
        f"            AdamW, learning rate {training.lr:.3g}{why('lr')}, {training.warmup_steps:,} steps of warm-up, "
        "linear to 0"
    )
    yield (
        f"            weight decay {training.weight_decay:g}, layer decay {training.layer_decay:g}"
        f"{why('layer_decay')}, drop path {training.drop_path:g}"
    )
    parts = f", batch in {training.accumulate} parts" if training.accumulate > 1 else ""
    yield (
        f"machine     {training.devices} x {training.accelerator}, {training.precision}{why('precision')}, "
        f"{training.workers} loader workers{parts}"
    )
    if numbers.cost is not None:
        a_device = training.images_at_once * training.accumulate
        yield (
            f"cost        about {readable_time(numbers.cost.seconds(training.steps, a_device))} (measured, where "
            f"loading keeps up), {readable_bytes(numbers.cost.peak_bytes(training.images_at_once))} of memory"
        )
