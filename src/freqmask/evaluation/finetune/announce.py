"""What a fine-tuning says before its first step and after its last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from freqmask.console import readable_bytes, readable_time, say
from freqmask.evaluation.finetune.augment import NO_AUGMENT
from freqmask.evaluation.finetune.network import Network
from freqmask.evaluation.finetune.recipes import PUBLISHED, Tuning
from freqmask.evaluation.finetune.resolve import Resolving
from freqmask.training.auto import Cost
from freqmask.training.run_folder import RunFolder


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
    def why(option: str) -> str:
        return f" ({numbers.reasons[option]})" if option in numbers.reasons else ""

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
    yield _machine(tuning, numbers)
    if numbers.cost is not None:
        yield _cost(tuning, numbers.cost)


def _mirrored(tuning: Tuning) -> str:
    return ", mirrored half of the time" if tuning.flip else ", never mirrored"


def _machine(tuning: Tuning, numbers: Resolving) -> str:
    why = f" ({numbers.reasons['precision']})" if "precision" in numbers.reasons else ""
    parts = f", batch in {tuning.accumulate} parts" if tuning.accumulate > 1 else ""
    return (
        f"machine     {tuning.devices} x {tuning.accelerator}, {tuning.precision}{why}, "
        f"{tuning.workers} loader workers{parts}"
    )


def _cost(tuning: Tuning, cost: Cost) -> str:
    a_device = tuning.images_at_once * tuning.accumulate
    seconds = readable_time(cost.seconds(tuning.steps, a_device))
    return (
        f"cost        about {seconds} (measured, where loading keeps up), "
        f"{readable_bytes(cost.peak_bytes(tuning.images_at_once))} of memory"
    )


def _names(parameters: list[str]) -> str:
    """Modules instead of their weights and biases."""
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[0] for name in parameters)) or "nothing"


def _left(dropped: list[str]) -> str:
    return f"; left out: {_names(dropped)}" if dropped else ""


def say_end(run: RunFolder, summary: Mapping[str, Any]) -> None:
    """How a fine-tuning ended and where its classifier lies."""
    watched = summary.get("held_out_accuracy")
    accuracy = f", {watched:.1%} right on held-out images" if watched is not None else ""
    say(f"done        {summary['steps']:,} steps in {readable_time(summary['seconds'])}{accuracy}")
    say(f"classifier  {run.path / 'classifier'}")
