"""What a training of a segmentation network says before its first step."""

from __future__ import annotations

from collections.abc import Iterator

from freqmask.console import readable_bytes, readable_time, say
from freqmask.evaluation.eval_model import BackboneModel
from freqmask.evaluation.segmentation.settings import Training
from freqmask.evaluation.segmentation.upernet import UperNet
from freqmask.evaluation.trainings import Numbers


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
