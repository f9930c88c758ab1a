"""From the options to a training: every `auto` resolved once, each with its reason."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from freqmask.data.augment import NO_CHANGE, PhotometricAugmentation, PhotometricSettings
from freqmask.data.source import Source
from freqmask.data.transforms import Geometry
from freqmask.data.values import Survey, survey
from freqmask.errors import UserError
from freqmask.images import IMAGENET_MEAN, IMAGENET_STD
from freqmask.methods import build_method
from freqmask.pretraining.cache_on_device import choose_place
from freqmask.pretraining.settings import (
    accepted_by,
    in_steps,
    method_defaults,
    method_settings,
    parse_image_size,
)
from freqmask.training import auto
from freqmask.training.failures import check_single_image
from freqmask.training.optim import BASE_LR, BASE_MIN_LR, BASE_WARMUP_LR, OptimConfig, scaled_lr

SMALL_IMAGE = 160  # below it, crops of a fifth of the area empty the upper band (docs/methods.md)
TINY_IMAGE = 96  # below it, blur and solarisation leave too little
TINY_WEIGHTS = 8_000_000  # experience: networks smaller than this want more than the published learning rate
TINY_LR, TINY_LR_BATCH = 1e-3, 256
FEW_IMAGES, OUTPUTS, FEW_OUTPUTS = 100_000, 65_536, 4_096
OVERFIT_STEPS = 300
CHECKPOINTS_A_RUN, PREVIEWS_A_RUN = 50, 10
DINO_JITTER = [0.4, 0.4, 0.2, 0.1, 0.8]


@dataclass
class Resolved:
    """A training without any `auto` left.

    Attributes:
        options: every option of ``pretrain`` by name, plain values.
        reasons: name of an option to the reason for its value, for those that were resolved.
        survey: what the images are like; None on a restart, which takes all from the run.
        cost: what an image costs; None on a restart.
        method: the method, freshly initialised; None on a restart.
    """

    options: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)
    survey: Survey | None = None
    cost: auto.Cost | None = None
    method: nn.Module | None = None

    def choose(self, name: str, choice: auto.Choice | None) -> None:
        """Put a choice where the option still says auto."""
        if choice is not None and self.options[name] in ("auto", None):
            self.options[name] = choice.value
            self.reasons[name] = choice.reason


def resolve(options: Mapping[str, Any], source: Source, images: int) -> Resolved:
    """Resolve every `auto`, by the data, the method and a measurement on this machine.

    Args:
        options: the options of ``pretrain``, checked.
        source: the images.
        images: how many of them are trained on.

    Returns:
        The resolved options with their reasons.

    Raises:
        UserError: the data or the method cannot be what the options ask.
    """
    resolved = Resolved(dict(options))
    _resolve_images(resolved, source)
    _resolve_machine(resolved)
    _resolve_method(resolved, images)
    _resolve_length(resolved, images)
    _resolve_records(resolved)
    assert resolved.survey is not None
    place = choose_place(resolved.options, resolved.survey, images)
    resolved.options["images_from"], resolved.reasons["images_from"] = place
    return resolved


def _resolve_images(resolved: Resolved, source: Source) -> None:
    options = resolved.options
    seen = survey(source, options["value_range"], options["channels"], options["seed"])
    resolved.survey = seen
    resolved.choose(
        "convert_channels", auto.Choice(options["channels"] != "auto", "whether channels is given")
    )
    resolved.choose("channels", auto.Choice(seen.channels, "the commonest count"))
    options["value_range"] = seen.value_range.describe()
    resolved.choose("image_size", auto.choose_image_size(min(seen.median_size)))
    options["image_size"] = parse_image_size(options["image_size"])
    photographs = options["channels"] == 3 and set(seen.dtypes) == {"uint8"}
    reason = "ImageNet's, as published" if photographs else "measured on these images"
    resolved.choose("mean", auto.Choice(list(IMAGENET_MEAN) if photographs else _rounded(seen.mean), reason))
    resolved.choose("std", auto.Choice(list(IMAGENET_STD) if photographs else _rounded(seen.std), reason))
    for name in ("mean", "std"):
        if len(options[name]) != options["channels"]:
            raise UserError(f"{name} must be {options['channels']} numbers, one a channel; try --{name} auto")
    small = shorter_side(options) < SMALL_IMAGE
    usual = 0.25 if options["method"] == "folk" else 0.2
    reason = "small images: smaller crops would empty the upper band" if small else "as published"
    resolved.choose("crop_scale", auto.Choice([0.5 if small else usual, 1.0], reason))


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values]


def shorter_side(options: Mapping[str, Any]) -> int:
    """The shorter side of what the network sees, in pixels."""
    size = options["image_size"]
    return int(size) if isinstance(size, int) else int(min(size))


def _resolve_machine(resolved: Resolved) -> None:
    options = resolved.options
    device = pick_device(options["accelerator"])
    resolved.choose("accelerator", auto.Choice(device.type, "the fastest device here"))
    options["accelerator"] = device.type
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    resolved.choose("devices", auto.Choice(count, "all of them" if count > 1 else "one device here"))
    resolved.choose("workers", auto.choose_workers(device.type == "cuda"))
    resolved.choose("precision", auto.choose_precision(device.type))


def pick_device(accelerator: str) -> torch.device:
    """The device of an accelerator's name; `auto` is CUDA, then Apple's, then the CPU."""
    if accelerator == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    return torch.device("cuda" if accelerator == "gpu" else accelerator)


def _resolve_method(resolved: Resolved, images: int) -> None:
    options = resolved.options
    device = pick_device(options["accelerator"])
    side = shorter_side(options)
    if options["backbone"] == "auto" and options["init"]:
        from freqmask.interop.weights import initial_backbone

        found = initial_backbone(options["init"], options["model_args"])
        options["backbone"], options["model_args"], patch = found
        resolved.reasons["backbone"] = "that of --init"
        options["patch_size"] = patch if options["patch_size"] == "auto" else options["patch_size"]
    resolved.choose("backbone", auto.choose_backbone(side, device.type == "cuda"))
    resolved.choose("patch_size", auto.choose_patch_size(side, options["backbone"]))
    if options["patch_size"] == "auto":
        options["patch_size"] = None
    if "outputs" in accepted_by(options["method"]) and options["outputs"] in (None, "auto"):
        few = images < FEW_IMAGES
        resolved.reasons["outputs"] = f"{images:,} images"
        options["outputs"] = FEW_OUTPUTS if few else OUTPUTS
    torch.manual_seed(options["seed"])
    resolved.method = make_method(options)
    options |= method_defaults(options, getattr(resolved.method, "settings", {}))


def make_method(options: Mapping[str, Any], steps_an_epoch: float | None = None) -> nn.Module:
    """The method that resolved options ask for, with its own defaults where they are silent.

    Args:
        options: resolved options.
        steps_an_epoch: turns options in epochs into steps; where it is not known yet they are left out.
    """
    settings = in_steps(method_settings(options), options["method"], steps_an_epoch)
    shared = ("backbone", "image_size", "channels", "mean", "std", "patch_size")
    return build_method(options["method"], **{name: options[name] for name in shared}, **settings)


def _resolve_length(resolved: Resolved, images: int) -> None:
    """Batch, accumulation, epochs or steps, learning rates: they hang on each other."""
    options = resolved.options
    device = pick_device(options["accelerator"])
    assert resolved.method is not None
    cost = resolved.cost = measure(resolved.method, options, device)
    memory = auto.usable_memory(device)
    processes = int(options["devices"]) * int(options["num_nodes"])
    seconds = None if options["hours"] is None else options["hours"] * 3600
    resolved.choose("batch_size", auto.choose_batch_size(cost, images, processes, memory, seconds))
    batch = int(options["batch_size"])
    if batch % processes:
        raise UserError(f"batch_size ({batch}) must be a multiple of the {processes} devices")
    resolved.choose("accumulate", auto.choose_accumulation(cost, batch // processes, memory))
    if (batch // processes) % int(options["accumulate"]):
        raise UserError(
            f"accumulate ({options['accumulate']}) must divide the {batch // processes} images of a device's batch"
        )
    if batch // processes // int(options["accumulate"]) == 1:
        check_single_image(make_trial(resolved.method, options, device)[1], str(options["backbone"]))
    _resolve_steps(resolved, images, cost)
    _resolve_learning_rates(resolved, images)


def _resolve_steps(resolved: Resolved, images: int, cost: auto.Cost) -> None:
    options = resolved.options
    batch = int(options["batch_size"])
    if options["overfit"] and not any(options[name] for name in ("steps", "epochs", "hours")):
        options["steps"] = OVERFIT_STEPS
    if options["hours"] is not None:
        a_step = cost.seconds(1, batch // (int(options["devices"]) * int(options["num_nodes"])))
        options["steps"] = max(int(options["hours"] * 3600 / a_step), 1)
        resolved.reasons["steps"] = f"{options['hours']:g} hours at {a_step:.2g} seconds a step, measured now"
        options["hours"] = None
    if options["steps"] is None:
        if options["epochs"] is None:
            choice = auto.choose_epochs(images, batch)
            options["epochs"] = choice.value
            resolved.reasons["epochs"] = choice.reason
        options["steps"] = max(math.ceil(options["epochs"] * images / batch), 1)
    options["epochs"] = None  # from here on steps say it, exactly
    epochs = options["steps"] * batch / images
    resolved.choose("warmup_epochs", auto.choose_warmup_epochs(epochs))


def _resolve_learning_rates(resolved: Resolved, images: int) -> None:
    options = resolved.options
    batch = int(options["batch_size"])
    backbone = next(iter(resolved.method.backbones().values()))  # type: ignore[union-attr,operator]
    weights = sum(parameter.nelement() for parameter in backbone.parameters())
    if weights < TINY_WEIGHTS:
        rate = scaled_lr(TINY_LR, batch, TINY_LR_BATCH)
        reason = f"1e-3 x batch/256, since networks below {TINY_WEIGHTS // 10**6} million weights learn more with it"
    else:
        rate, reason = scaled_lr(BASE_LR, batch), "3e-4 x batch/512, as published"
    if options["init"]:
        rate, reason = rate / 4, f"a quarter of {reason}, since the weights are learnt already"
    resolved.choose("lr", auto.Choice(rate, reason))
    resolved.choose(
        "min_lr", auto.Choice(min(scaled_lr(BASE_MIN_LR, batch), options["lr"]), "2.5e-6 x batch/512")
    )


def _resolve_records(resolved: Resolved) -> None:
    options = resolved.options
    steps = int(options["steps"])
    assert resolved.cost is not None
    a_step = resolved.cost.seconds(1, int(options["batch_size"]) // int(options["devices"]))
    resolved.choose("log_every_steps", auto.choose_row(a_step, steps))
    resolved.choose(
        "checkpoint_every_steps", auto.Choice(max(steps // CHECKPOINTS_A_RUN, 1), "fifty times a run")
    )
    resolved.choose("preview_every_steps", auto.Choice(max(steps // PREVIEWS_A_RUN, 1), "ten times a run"))


def measure(method: nn.Module, options: Mapping[str, Any], device: torch.device) -> auto.Cost:
    """Time and memory of an image, measured on a copy so that the method stays as it was."""
    trial, loss = make_trial(method, options, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return auto.measure_cost(trial, loss, device)


def make_trial(
    method: nn.Module, options: Mapping[str, Any], device: torch.device
) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A copy of the method, and its loss for a number of random images."""
    trial: Any = copy.deepcopy(method).to(device)
    size = options["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    precision = torch.bfloat16 if "bf16" in str(options["precision"]) else torch.float16

    def loss(images: int) -> Tensor:
        views = [
            torch.rand(images, options["channels"], height, width, device=device)
            for _ in range(trial.n_views)
        ]
        keys = torch.arange(images, device=device)
        with torch.autocast(device.type, precision, enabled="mixed" in str(options["precision"])):
            result: Tensor = trial(views, keys)["loss"]
        return result

    return trial, loss


def make_geometries(options: Mapping[str, Any], views: int) -> list[Geometry]:
    """How each view is cut; a run that shall overfit sees every image whole, always the same."""
    still = options["overfit"] is not None
    geometry = Geometry(
        image_size=options["image_size"],
        scale=tuple(options["crop_scale"]),
        crop="center" if still else options["crop"],
        horizontal_flip=0.5 if options["flip"] and not still else 0.0,
        vertical_flip=0.5 if options["vertical_flip"] and not still else 0.0,
        quarter_turns=bool(options["quarter_turns"]) and not still,
    )
    return [geometry] * views


def make_augmentation(options: Mapping[str, Any], views: int) -> list[nn.Module]:
    """Photometric changes of each view: DINO's for FOLK, none for the others, unless asked otherwise."""
    if options["overfit"] is not None:
        return []
    settings = [_photometry(options, number) for number in range(views)]
    if all(setting == NO_CHANGE for setting in settings):
        return []
    return [PhotometricAugmentation(setting) for setting in settings]


def _photometry(options: Mapping[str, Any], view: int) -> PhotometricSettings:
    folk = options["method"] == "folk"
    tiny = shorter_side(options) < TINY_IMAGE
    blurs = options["blur"] or ([1.0, 0.1] if folk and not tiny else [0.0])
    solarises = options["solarise"] or ([0.0, 0.2] if folk and not tiny else [0.0])
    jitter = options["colour_jitter"] or (DINO_JITTER if folk else [0.0] * 5)
    grey = options["grey"] if options["grey"] is not None else (0.2 if folk else 0.0)
    brightness, contrast, saturation, hue, probability = jitter
    return PhotometricSettings(
        jitter=probability,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        grey=grey,
        blur=blurs[min(view, len(blurs) - 1)],
        solarise=solarises[min(view, len(solarises) - 1)],
    )


def make_recipe(options: Mapping[str, Any], images: int) -> OptimConfig:
    """The recipe that resolved options describe."""
    batch, steps = int(options["batch_size"]), int(options["steps"])
    warmup = min(round(options["warmup_epochs"] * images / batch), max(steps - 1, 0))
    decay = float(options["weight_decay"])
    end = options["weight_decay_end"]
    lr = float(options["lr"])
    return OptimConfig(
        lr=lr,
        min_lr=float(options["min_lr"]),
        warmup_lr=min(scaled_lr(BASE_WARMUP_LR, batch), lr),
        warmup_steps=warmup,
        total_steps=steps,
        weight_decay=decay,
        weight_decay_end=decay if end is None else float(end),
        betas=tuple(options["betas"] or (0.9, 0.95)),
        clip_grad=options["clip_grad"],
    )
