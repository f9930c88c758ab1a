"""From the options to the numbers of a training: every ``auto`` resolved once, each with its reason.

The published numbers are BEiT's for ADE20K with self-supervised weights
(https://github.com/microsoft/unilm, upernet_beit_base_12_512_slide_160k_ade20k_pt): 160,000 steps of 16 crops of
512 pixels out of 20,210 images, AdamW (0.9, 0.999), learning rate 7e-4, linear decay after 1,500 steps of warm-up,
weight decay 0.05, layer decay 0.65, drop path 0.1; windows of 512 every 341 pixels. CNNs and hierarchical networks
get 1e-4 and no layer decay (as UperNet on ConvNeXt, roughly), and fresh weights none either.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from freqmask.data.values import Survey
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import BackboneModel
from freqmask.evaluation.segmentation.settings import Training, training_of
from freqmask.evaluation.segmentation.upernet import UperNet, segmentation_losses
from freqmask.evaluation.trainings import AUTO, Numbers
from freqmask.training import auto
from freqmask.training.auto import Choice
from freqmask.training.optim import scaled_lr

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
