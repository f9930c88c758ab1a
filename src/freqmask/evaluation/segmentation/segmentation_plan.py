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

from freqmask.console import say
from freqmask.data.values import Survey
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import PIXELS, BackboneModel
from freqmask.evaluation.segmentation.upernet import UperNet, segmentation_losses
from freqmask.evaluation.trainings import AUTO, Numbers, TrainingNumbers
from freqmask.training import auto
from freqmask.training.auto import Choice
from freqmask.training.optim import scaled_lr


@dataclass(frozen=True, kw_only=True)
class Training(TrainingNumbers):
    """Every number of one training.

    Attributes:
        crop: side of the training samples, and of the windows of an evaluation, in pixels.
        image_size: shorter side that images are brought to first; None leaves them as they are.
        scale: smallest and largest random factor on the image.
        decoder_channels: width of the decoder.
    """

    crop: int
    image_size: int | None
    scale: tuple[float, float]
    decoder_channels: int


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
    scale = options["scale"]
    if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1]):
        yield f"scale ({scale}) must be the smallest and the largest factor on the image, such as 0.5 2"
    crop, stride = options["crop"], options["stride"]
    if isinstance(stride, int) and isinstance(crop, int) and stride > crop:
        yield f"stride ({stride}) must be at most crop ({crop}), or windows would leave gaps"


BATCH, STEPS, IMAGES, WARMUP = 16, 160_000, 20_210, 1_500
LR, LR_OTHERS, WEIGHT_DECAY, LAYER_DECAY, DROP_PATH = 7e-4, 1e-4, 0.05, 0.65, 0.1
CROP, CROP_ON_CPU = 512, 224
SCALE = (0.5, 2.0)
STRIDE_SHARE = 341 / 512  # of the window
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
    numbers.take_machine("auto")
    if int(values["devices"]) > 1:
        values["strategy"] = "ddp"
    _length(numbers, network, images)
    _rates(numbers, subject, network)
    numbers.take_records()
    return training_of(values), numbers


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
    why = numbers.why
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
    yield from numbers.machine_lines(training)
