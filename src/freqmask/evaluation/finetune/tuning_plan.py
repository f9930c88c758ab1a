"""From the options of a fine-tuning to its numbers: every `auto` resolved once, with its reason, and told."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from freqmask.console import readable_time, say
from freqmask.data.values import Survey
from freqmask.errors import UserError
from freqmask.evaluation.finetune.classifier import NO_AUGMENT, Mixer, Network
from freqmask.evaluation.finetune.hyperparameters import (
    CROP_SCALE,
    FEW_IMAGES,
    PUBLISHED,
    SMALL_PICTURES,
    SMALL_SIDE,
    TINY_LR_BATCH,
    TINY_WEIGHTS,
    Published,
    Tuning,
)
from freqmask.evaluation.trainings import AUTO, Numbers
from freqmask.interop.models import OpenedModel
from freqmask.training import auto
from freqmask.training.auto import Choice, check_single_image
from freqmask.training.run_folder import RunFolder

HELD_OUT_FROM, HELD_OUT_SHARE, HELD_OUT_MOST = 2_000, 0.1, 2_000  # images
VALIDATIONS = 20  # a run
_PUBLISHED_NUMBERS = ("weight_decay", "layer_decay", "drop_path", "mixup", "cutmix", "smoothing")
_SMALL_NUMBERS = ("augment", "erasing", "crop_scale", "crop_share")


@dataclass
class Resolving(Numbers):
    """The numbers as they come together, and what they hang on.

    Attributes:
        opened: the backbone.
        seen: what the images are like.
    """

    opened: OpenedModel = field(kw_only=True)
    seen: Survey = field(kw_only=True)


def held_out_share(asked: Any, images: int) -> Choice:
    """The share of the training images on which accuracy is watched."""
    if asked not in (None, AUTO):
        return Choice(float(asked), "as asked")
    if images < HELD_OUT_FROM:
        return Choice(0.0, f"{images:,} images are too few to spare any")
    share = min(HELD_OUT_SHARE, HELD_OUT_MOST / images)
    return Choice(round(share, 4), "a tenth, at most 2,000 images")


def resolve(
    asked: Mapping[str, Any],
    opened: OpenedModel,
    network: Network,
    seen: Survey,
    images: int,
    classes: int,
    seed: int,
    held_out: float = 0.0,
) -> tuple[Tuning, Resolving]:
    """Every number of one fine-tuning.

    Args:
        asked: the command's options.
        opened: the backbone.
        network: the classifier made of it.
        seen: what the images are like.
        images: that are learnt from.
        classes: of the data.
        seed: of this training.
        held_out: share of the training images that is watched.

    Returns:
        The numbers, and how they came about.

    Raises:
        UserError: options that do not fit the model, the images or the machine.
    """
    numbers = Resolving(asked, opened=opened, seen=seen)
    published = _recipe(numbers)
    numbers.values |= {"seed": seed, "held_out": held_out, "flip": bool(asked["flip"]), "ema": asked["ema"]}
    _pictures(numbers, network, published)
    _machine(numbers)
    few = images < FEW_IMAGES and min(network.image_size) < SMALL_SIDE and published is PUBLISHED["vit"]
    for name in _PUBLISHED_NUMBERS:
        if few and name in ("mixup", "cutmix"):
            numbers.take(name, Choice(0.0, f"fewer than {FEW_IMAGES:,} small pictures"))
        else:
            numbers.take(name, Choice(getattr(published, name), published.words))
    _length(numbers, network, published, images, classes)
    _records(numbers, images)
    return Tuning(**numbers.values), numbers


def _recipe(numbers: Resolving) -> Published:
    convolutional = numbers.opened.backbone.is_cnn
    usual = Choice("a3" if convolutional else "vit", "a CNN" if convolutional else "it attends")
    numbers.take("recipe", usual)
    published = PUBLISHED[numbers.values["recipe"]]
    numbers.values |= {"optimizer": published.optimizer, "loss": published.loss}
    return published


def _pictures(numbers: Resolving, network: Network, published: Published) -> None:
    opened, values = numbers.opened, numbers.values
    values |= {
        "image_size": list(network.image_size),
        "channels": opened.input_size[0],
        "mean": list(opened.mean),
        "std": list(opened.std),
        "value_range": opened.value_range,
    }
    small = min(network.image_size) < SMALL_SIDE
    for name in _SMALL_NUMBERS:
        usual = CROP_SCALE if name == "crop_scale" else getattr(published, name)
        if small and not (name in ("augment", "erasing") and usual in (NO_AUGMENT, 0.0)):
            numbers.take(name, Choice(SMALL_PICTURES[name], f"pictures below {SMALL_SIDE} pixels"))
        else:
            numbers.take(name, Choice(usual, published.words))
    values["crop_scale"] = list(values["crop_scale"])
    _train_size(numbers, network, published, small)
    _randaugment(numbers)


def _train_size(numbers: Resolving, network: Network, published: Published, small: bool) -> None:
    height, width = network.image_size
    share = 1.0 if small or network.fixed_size else published.train_share
    usual = (
        [max(32, round(side * share / 32) * 32) for side in (height, width)] if share < 1 else [height, width]
    )
    numbers.take("train_size", Choice(usual, published.words if share < 1 else "that of the test"))
    size = numbers.values["train_size"]
    numbers.values["train_size"] = [size, size] if isinstance(size, int) else list(size)
    if network.fixed_size and numbers.values["train_size"] != [height, width]:
        raise UserError(
            f"train_size ({size}) must be the {height}x{width} pixels that {numbers.opened.name} is built for; "
            "leave it out, or give --image_size"
        )


def _randaugment(numbers: Resolving) -> None:
    values = numbers.values
    plain = set(numbers.seen.dtypes) == {"uint8"} and values["value_range"] in ("dtype", "0,255")
    if values["augment"] == NO_AUGMENT or (plain and values["channels"] == 3):
        return
    if numbers.asked["augment"] not in (None, AUTO):
        raise UserError(
            f"augment ({values['augment']}) must be none: RandAugment is for 8-bit colour images, and these have "
            f"{values['channels']} channels of {'/'.join(map(str, numbers.seen.dtypes))}"
        )
    values["augment"] = NO_AUGMENT
    numbers.reasons["augment"] = "RandAugment is for 8-bit colour images"


def _machine(numbers: Resolving) -> None:
    device = numbers.take_machine(numbers.asked["strategy"])
    light = max(numbers.seen.median_size) <= SMALL_SIDE and auto.usable_cores() <= 4
    if numbers.values["workers"] and numbers.asked["workers"] == AUTO and device.type == "cpu" and light:
        numbers.values["workers"] = 0
        numbers.reasons["workers"] = "small pictures load faster than they travel"


def _length(numbers: Resolving, network: Network, published: Published, images: int, classes: int) -> None:
    values, asked = numbers.values, numbers.asked
    device = torch.device(values["accelerator"])
    processes = int(values["devices"])
    memory = auto.usable_memory(device)
    cost = numbers.cost = measure(network, values, classes, device)
    numbers.take("batch_size", auto.choose_batch_size(cost, images, processes, memory))
    batch = int(values["batch_size"])
    if batch % processes:
        raise UserError(f"batch_size ({batch}) must be a multiple of the {processes} devices")
    numbers.take("accumulate", auto.choose_accumulation(cost, batch // processes, memory))
    part, rest = divmod(batch // processes, int(values["accumulate"]))
    if part == 1 and not rest:
        check_single_image(make_trial(network, values, classes, device)[1], str(numbers.opened.name))
    if rest or (part % 2 and (values["mixup"] or values["cutmix"])):
        raise UserError(
            f"batch_size ({batch}) must give every device and part the same even number of images, because pictures "
            f"are mixed in pairs (devices {processes}, accumulate {values['accumulate']}); change it, or give "
            "--mixup 0 --cutmix 0"
        )
    _steps(numbers, published, images, batch)
    numbers.take("lr", _rate(network, published, batch))
    peak = float(values["lr"])
    numbers.take("min_lr", Choice(min(published.scaled(published.min_lr, batch), peak), published.words))
    values["warmup_lr"] = min(published.scaled(published.warmup_lr, batch), peak)
    if asked["min_lr"] not in (None, AUTO) and float(values["min_lr"]) > peak:
        raise UserError(f"min_lr ({values['min_lr']:g}) must be at most lr ({peak:g})")


def _rate(network: Network, published: Published, batch: int) -> Choice:
    rate = published.scaled(published.lr, batch)
    if published.lr_rule == "sqrt":
        return Choice(rate, f"{published.lr:g} x sqrt(batch/{published.lr_batch})")
    if sum(parameter.nelement() for parameter in network.model.parameters()) >= TINY_WEIGHTS:
        return Choice(rate, f"{published.lr:g} x batch/{published.lr_batch}")
    reason = f"since networks below {TINY_WEIGHTS // 10**6} million weights learn more with it"
    return Choice(published.lr * batch / TINY_LR_BATCH, f"{published.lr:g} x batch/{TINY_LR_BATCH}, {reason}")


def _steps(numbers: Resolving, published: Published, images: int, batch: int) -> None:
    values, asked = numbers.values, numbers.asked
    if asked["steps"] is not None:
        values["steps"] = int(asked["steps"])
    else:
        epochs = published.epochs if asked["epochs"] is None else float(asked["epochs"])
        values["steps"] = max(math.ceil(epochs * images / batch), 1)
        if asked["epochs"] is None:
            numbers.reasons["steps"] = f"{epochs:g} epochs, {published.words}"
    epochs = values["steps"] * batch / images
    usual = min(published.warmup_epochs, epochs / 20)
    warmup = usual if asked["warmup_epochs"] in (None, AUTO) else float(asked["warmup_epochs"])
    if warmup == usual:
        least = usual < published.warmup_epochs
        numbers.reasons["warmup_steps"] = (
            "a twentieth" if least else f"{published.warmup_epochs:g} epochs, as published"
        )
    values["warmup_steps"] = min(round(warmup * images / batch), values["steps"] - 1)


def _records(numbers: Resolving, images: int) -> None:
    every = numbers.asked["validate_every_epochs"]
    steps, batch = numbers.values["steps"], numbers.values["batch_size"]
    numbers.values["validate_every_steps"] = (
        max(steps // VALIDATIONS, 1) if every in (None, AUTO) else max(round(every * images / batch), 1)
    )
    numbers.take_records()


def measure(network: Network, values: Mapping[str, Any], classes: int, device: torch.device) -> auto.Cost:
    """Time and memory of an image, measured on a copy so that the classifier stays as it was."""
    trial, loss = make_trial(network, values, classes, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return auto.measure_cost(trial, loss, device)


def make_trial(
    network: Network, values: Mapping[str, Any], classes: int, device: torch.device
) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A copy of the classifier, and its loss for a number of random images."""
    trial = copy.deepcopy(network.model).to(device).train()
    precision = torch.bfloat16 if "bf16" in str(values["precision"]) else torch.float16
    mixer = Mixer(classes, 0.0, 0.0, 0.0, 0.0)

    def loss(images: int) -> Tensor:
        pictures = torch.rand(images, values["channels"], *values["train_size"], device=device)
        _, targets = mixer(pictures, torch.zeros(images, dtype=torch.int64, device=device), 0)
        with torch.autocast(device.type, precision, enabled="mixed" in str(values["precision"])):
            return -(trial(pictures).log_softmax(dim=-1) * targets).sum()

    return trial, loss


def say_plan(
    name: str, tuning: Tuning, numbers: Resolving, network: Network, images: int, held_out: int
) -> None:
    """The plan of a new fine-tuning.

    Args:
        name: of the model.
        tuning: every number.
        numbers: how they came about.
        network: the classifier.
        images: that are learnt from.
        held_out: that are watched.
    """
    say()
    for line in _lines(name, tuning, numbers, network, images, held_out):
        say(line)


def say_briefly(tuning: Tuning, images: int) -> None:
    """What tells a run from the one whose plan was shown before."""
    say()
    say(
        f"training    {images:,} images, {tuning.steps:,} steps of {tuning.batch_size}, learning rate {tuning.lr:.3g}, "
        f"{tuning.warmup_steps:,} steps of warm-up; the rest as before"
    )


def _lines(
    name: str, tuning: Tuning, numbers: Resolving, network: Network, images: int, held_out: int
) -> Iterator[str]:
    why = numbers.why
    height, width = tuning.image_size
    yield f"model       {name} at {height}x{width} pixels, fresh: {_names(network.fresh)}{_left(network.dropped)}"
    for note in network.notes:
        yield f"            {note}"
    watched = f"{held_out:,} held out to be watched" if held_out else "none held out"
    yield f"images      {images:,} to learn from, {watched}; the test images are looked at once, at the end"
    epochs = tuning.steps * tuning.batch_size / images
    yield f"recipe      {PUBLISHED[tuning.recipe].words}{why('recipe')}"
    yield (
        f"training    {tuning.steps:,} steps of {tuning.batch_size} images{why('batch_size')} = "
        f"{epochs:,.1f} epochs{why('steps')}"
    )
    optimizer = "AdamW" if tuning.optimizer == "adamw" else "LAMB"
    yield (
        f"            {optimizer}, learning rate {tuning.lr:.3g}{why('lr')}, {tuning.warmup_steps:,} steps of warm-up"
        f"{why('warmup_steps')}, cosine to {tuning.min_lr:.2g}"
    )
    yield (
        f"            weight decay {tuning.weight_decay:g}, layer decay {tuning.layer_decay:g}, "
        f"drop path {tuning.drop_path:g}" + (f", moving average {tuning.ema:g}" if tuning.ema else "")
    )
    low, high = tuning.crop_scale
    size = f"{tuning.train_size[0]}x{tuning.train_size[1]}"
    yield f"pictures    crops of {low:g} to {high:g} of the area{why('crop_scale')} at {size}{_mirrored(tuning)}"
    augment = "no RandAugment" if tuning.augment == NO_AUGMENT else tuning.augment
    yield f"            {augment}{why('augment')}, erasing {tuning.erasing:g}{why('erasing')}"
    yield (
        f"            mixup {tuning.mixup:g}{why('mixup')}, cutmix {tuning.cutmix:g}{why('cutmix')}, "
        f"smoothing {tuning.smoothing:g}"
    )
    yield f"            tested on the centred {tuning.crop_share:.3g} of the side{why('crop_share')}"
    yield from numbers.machine_lines(tuning)


def _mirrored(tuning: Tuning) -> str:
    return ", mirrored half of the time" if tuning.flip else ", never mirrored"


def _names(parameters: list[str]) -> str:
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[0] for name in parameters)) or "nothing"


def _left(dropped: list[str]) -> str:
    return f"; left out: {_names(dropped)}" if dropped else ""


def say_end(run: RunFolder, summary: Mapping[str, Any]) -> None:
    """How a fine-tuning ended and where its classifier lies."""
    watched = summary.get("held_out_accuracy")
    accuracy = f", {watched:.1%} right on held-out images" if watched is not None else ""
    say(f"done        {summary['steps']:,} steps in {readable_time(summary['seconds'])}{accuracy}")
    say(f"classifier  {run.path / 'classifier'}")
