"""The options of a pre-training before any work: which belong to the method, and what is wrong with them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from freqmask.errors import UserError, nearest
from freqmask.methods import METHODS, find_method
from freqmask.methods.masking import OPTIONS as OPTIONS_OF_FILTERS

# What the constructor of a method may take beside the options of its own: set by us from the data.
FROM_THE_DATA = {"backbone", "image_size", "channels", "mean", "std", "patch_size"}
SHARED_OPTIONS = {"stage", "model_args", "initialisation", "gradient_checkpointing"}
FILTER_OPTIONS = {name: set(defaults) for name, defaults in OPTIONS_OF_FILTERS.items()}
METHOD_OPTIONS = {
    *SHARED_OPTIONS,
    *FILTER_OPTIONS["fixed"],
    *FILTER_OPTIONS["com"],
    *("filter", "clamp", "masked_weight", "kept_weight", "reduce", "gamma", "focal"),
    *("views", "outputs", "hidden_size", "bottleneck_size", "student_temperature", "teacher_temperature"),
    *("teacher_temperature_start", "teacher_temperature_warmup", "center_momentum", "ema_momentum"),
    *("distillation_weight", "reconstruction_weight", "freeze_last_layer_epochs", "distil"),
    *("factor", "sigma", "kernel_sizes"),
}
RENAMED = {
    "freeze_last_layer_epochs": "freeze_last_layer_steps"
}  # a method counts in steps, a person in epochs
POSITIVE = (
    *("epochs", "steps", "hours", "batch_size", "lr", "accumulate", "overfit", "image_size", "channels"),
    "probe_every_epochs",
)
NOT_NEGATIVE = (
    "min_lr",
    "warmup_epochs",
    "weight_decay",
    "weight_decay_end",
    "workers",
    "preview_every_steps",
)
AT_LEAST_ONE = ("num_nodes", "keep_checkpoints", "checkpoint_every_steps", "log_every_steps", "patch_size")
CHOICES = {
    "precision": ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"),
    "strategy": ("auto", "ddp", "fsdp", "model_parallel"),
    "images_from": ("auto", "device", "loader"),
}
PAIRS = ("crop_scale", "betas")


def check_options(options: Mapping[str, Any]) -> None:
    """Everything that can be told to be wrong before looking at a single image.

    Args:
        options: the options of ``pretrain``.

    Raises:
        UserError: all problems in one message.
    """
    problems = [*_ranges(options), *_lengths(options), *_exclusions(options), *_choices(options)]
    try:
        problems += _unused(options)
        if options["init"] is not None:
            from freqmask.interop.weights import check_init

            check_init(options["init"])
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))


def method_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given for the method, by the names of its constructor."""
    given = {name: options[name] for name in METHOD_OPTIONS if options.get(name) is not None}
    return {RENAMED.get(name, name): value for name, value in given.items()}


def accepted_by(method: str) -> set[str]:
    """The names that a method's constructor takes."""
    return set(inspect.signature(find_method(method).__init__).parameters) - {"self"}


def filter_of(options: Mapping[str, Any]) -> str:
    """The filter that a method gets when none is named."""
    if options.get("filter") is not None:
        return str(options["filter"])
    parameter = inspect.signature(find_method(options["method"]).__init__).parameters.get("filter")
    return str(parameter.default) if parameter is not None else ""


def _ranges(options: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in (*POSITIVE, *NOT_NEGATIVE, *AT_LEAST_ONE):
        value = options.get(name)
        if value in (None, "auto") or (name == "image_size" and not isinstance(value, (int, float))):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            problems.append(f"{name} ({value}) must be a number{_or_auto(name)}")
        elif value < 0 or (value == 0 and name not in NOT_NEGATIVE):
            rule = "0 or more" if name in NOT_NEGATIVE else "above 0"
            problems.append(f"{name} ({value}) must be {rule}{_or_auto(name)}")
    share = options["max_skipped_share"]
    if not 0 <= share <= 1:
        problems.append(f"max_skipped_share ({share}) must be from 0 to 1")
    if options["clip_grad"] is not None and options["clip_grad"] <= 0:
        problems.append(f"clip_grad ({options['clip_grad']}) must be above 0, or null for none")
    if options["checkpoint_every_minutes"] <= 0:
        problems.append(f"checkpoint_every_minutes ({options['checkpoint_every_minutes']}) must be above 0")
    return problems


def _or_auto(name: str) -> str:
    return (
        "" if name in ("epochs", "steps", "hours", "overfit", "weight_decay", "num_nodes") else "; try auto"
    )


def _lengths(options: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in PAIRS:
        value = options.get(name)
        if value not in (None, "auto") and (isinstance(value, str) or len(value) != 2):
            problems.append(f"{name} ({value}) must be two numbers")
    if options.get("colour_jitter") is not None and len(options["colour_jitter"]) != 5:
        problems.append("colour_jitter must be five numbers: brightness contrast saturation hue probability")
    return problems


def _exclusions(options: Mapping[str, Any]) -> list[str]:
    named = [name for name in ("epochs", "steps", "hours") if options.get(name) is not None]
    if len(named) > 1:
        return [f"--{' and --'.join(named)} exclude each other; give one of them"]
    return []


def _unused(options: Mapping[str, Any]) -> list[str]:
    """Options that the chosen method or filter would pass over in silence."""
    method = str(options["method"])
    accepted = accepted_by(method)
    given = {name for name in METHOD_OPTIONS if options.get(name) is not None}
    unused = sorted(name for name in given if RENAMED.get(name, name) not in accepted)
    problems = [f"option --{name} is not used by method {method}{_whose(name)}" for name in unused]
    chosen = filter_of(options)
    usable = FILTER_OPTIONS.get(chosen, set())
    for name in sorted((FILTER_OPTIONS["fixed"] | FILTER_OPTIONS["com"]) & given - usable - set(unused)):
        home = next(filter_name for filter_name, names in FILTER_OPTIONS.items() if name in names)
        problems.append(f"option --{name} is not used by filter {chosen}; it belongs to --filter {home}")
    return problems


def _whose(name: str) -> str:
    owners = [method for method in METHODS if RENAMED.get(name, name) in accepted_by(method)]
    return f"; it belongs to {', '.join(owners)}" if owners else ""


def _choices(options: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, known in CHOICES.items():
        if str(options[name]) not in known:
            problems.append(f"{name} ({options[name]}) is unknown; {nearest(str(options[name]), known)}")
    devices = options["devices"]
    if devices != "auto" and (isinstance(devices, bool) or not isinstance(devices, int) or devices < 1):
        problems.append(f"devices ({devices}) must be 1 or more, or auto")
    return problems


def parse_image_size(value: int | str | Sequence[int]) -> int | tuple[int, int]:
    """224, ``"96x160"`` (height x width), or both as a ``config.yaml`` has them.

    Raises:
        UserError: it is neither.
    """
    text = str(value).lower() if isinstance(value, (int, str)) else "x".join(map(str, value))
    try:
        sides = [int(side) for side in text.split("x")]
    except ValueError as error:
        raise UserError(f"image_size ({value}) must be a number of pixels, HEIGHTxWIDTH, or auto") from error
    if len(sides) == 1:
        return sides[0]
    if len(sides) == 2 and min(sides) > 0:
        return sides[0], sides[1]
    raise UserError(f"image_size ({value}) must be a number of pixels, HEIGHTxWIDTH, or auto")


def check_accelerator(name: str) -> None:
    """Raises a UserError for a device that is not known or not here."""
    import torch

    known = ("auto", "cpu", "cuda", "gpu", "mps")
    if name not in known:
        raise UserError(f"accelerator ({name}) is unknown; {nearest(name, known)}")
    if name in ("cuda", "gpu") and not torch.cuda.is_available():
        raise UserError(f"accelerator ({name}) is not here: torch sees no CUDA device; try --accelerator cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("accelerator (mps) is not here; try --accelerator cpu")
