"""What is wrong with the options of a fine-tuning, before any work."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from freqmask.errors import UserError
from freqmask.evaluation.eval_model import PIXELS
from freqmask.evaluation.fewshot import parse_shots
from freqmask.evaluation.finetune.augment import NO_AUGMENT
from freqmask.evaluation.finetune.recipes import PUBLISHED
from freqmask.evaluation.trainings import AUTO

# The options that decide what a fine-tuning becomes; a run that goes on must have been asked for the same.
DECIDING = (
    *("recipe", "shots", "epochs", "steps", "batch_size", "lr", "min_lr", "warmup_epochs", "weight_decay"),
    *("layer_decay", "drop_path", "mixup", "cutmix", "smoothing", "augment", "erasing", "crop_scale", "flip"),
    *("crop_share", "train_size", "ema", "held_out", "precision", "image_size", "value_range", "weights"),
)
_AUGMENT = re.compile(r"rand(-(mstd|mmax|inc|m|n|p)\d+(\.\d+)?)+")
_ABOVE_ZERO = ("epochs", "lr", "train_size", "batch_size", "steps", "validate_every_epochs")
_FROM_ZERO = ("min_lr", "warmup_epochs", "weight_decay", "mixup", "cutmix")
_SHARES = ("drop_path", "smoothing", "erasing", "held_out", "max_skipped_share")
_WHOLE = ("steps", "batch_size", "train_size", "accumulate", "keep_checkpoints", "devices")
_WORDS = {
    "strategy": (AUTO, "ddp"),
    "precision": (AUTO, "32-true", "bf16-mixed", "16-mixed"),
}


_AUTOMATIC = (
    *("recipe", "batch_size", "lr", "min_lr", "warmup_epochs", "weight_decay", "layer_decay", "drop_path"),
    *(
        "mixup",
        "cutmix",
        "smoothing",
        "augment",
        "erasing",
        "train_size",
        "held_out",
        "crop_share",
        "workers",
    ),
    *("devices", "strategy", "precision", "accumulate", "validate_every_epochs", "log_every_steps"),
    "checkpoint_every_steps",
)


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a fine-tuning where a command has some of them only: the others are ``auto``."""
    defaults = dict.fromkeys(_AUTOMATIC, AUTO)
    plain = {"epochs": None, "steps": None, "crop_scale": None, "ema": None, "shots": None, "flip": True}
    machine = {"checkpoint_every_minutes": 10.0, "keep_checkpoints": 1, "max_skipped_share": 0.1}
    return {**defaults, **plain, **machine, "dry_run": False, **options}


def check_tuning(options: Mapping[str, Any]) -> None:
    """Raises a UserError with all that is wrong with the options."""
    problems = list(_problems(options))
    if problems:
        raise UserError("; ".join(problems))


def _problems(options: Mapping[str, Any]) -> Iterator[str]:
    if PIXELS in options["model"]:
        yield "model (pixels) must have weights to be fine-tuned; random:NAME is the supervised baseline"
    if options["recipe"] not in (AUTO, *PUBLISHED):
        yield f"recipe ({options['recipe']}) must be auto, {', '.join(PUBLISHED)}"
    if options.get("shots") is not None:
        parse_shots([str(options["shots"])])
    if options["epochs"] is not None and options["steps"] is not None:
        yield "epochs and steps exclude each other; give one of them"
    for name, known in _WORDS.items():
        if options[name] not in known:
            yield f"{name} ({options[name]}) must be one of {', '.join(known)}"
    yield from _numbers(options)
    if options["augment"] not in (AUTO, NO_AUGMENT) and not _AUGMENT.fullmatch(str(options["augment"])):
        yield f"augment ({options['augment']}) must be auto, none, or as timm writes it: rand-m9-mstd0.5-inc1"
    scale = options["crop_scale"]
    if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        yield f"crop_scale ({scale}) must be two shares of the area, such as 0.08 1"
    if options["ema"] is not None and not 0 < options["ema"] < 1:
        yield f"ema ({options['ema']}) must be above 0 and below 1, such as 0.9998"


def _numbers(options: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each number out of its range."""
    rules = {
        "must be a number above 0": (_ABOVE_ZERO, lambda value: value > 0),
        "must be a number of 0 or more": (_FROM_ZERO, lambda value: value >= 0),
        "must be a number from 0 to below 1": (_SHARES, lambda value: 0 <= value < 1),
        "must be a number above 0 and at most 1": (
            ("layer_decay", "crop_share"),
            lambda value: 0 < value <= 1,
        ),
        "must be a whole number of at least 1": (_WHOLE, lambda value: value >= 1 and value == int(value)),
    }
    for rule, (names, fits) in rules.items():
        for name in names:
            value = options[name]
            if value is None or value == AUTO:
                continue
            if isinstance(value, str) or not fits(value):
                yield f"{name} ({value if isinstance(value, str) else f'{value:g}'}) {rule}"
