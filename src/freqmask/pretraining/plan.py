"""What a run says before its first step and after its last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from freqmask.data.source import SourceSummary
from freqmask.data.values import Survey
from freqmask.methods import find_method
from freqmask.options import as_typed, command_words
from freqmask.pretraining.resolve import Resolved
from freqmask.reporting.reading import read_run
from freqmask.reporting.summary import EARLY, features_remarks
from freqmask.training import auto
from freqmask.training.run_folder import RunFolder

FEW_IMAGES = 50_000  # below it public weights are usually the better beginning (docs/methods.md)
PUBLIC_VIT, PUBLIC_CNN = "vit_small_patch16_224", "resnet50"
SHRUNK = 6  # median side over that of the views from which small things are lost in resized crops
PREVIEW_BYTES = 500_000
LONG_SECONDS = 3600  # above it somebody who named no length is told how to name one


def plan_lines(resolved: Resolved, summary: SourceSummary, images: int, held_out: int) -> Iterator[str]:
    """The plan of a new run, a line each.

    Args:
        resolved: the training.
        summary: what the source found.
        images: trained on.
        held_out: kept apart.
    """
    options, reasons = resolved.options, resolved.reasons
    # What matters stands first: the images, what is trained, for how long.
    yield (
        f"images      {summary.found:,} found ({summary.kind}), {images:,} to train on, {held_out:,} held out "
        f"to measure the loss on"
    )
    patch = f", patch {options['patch_size']}{_why(reasons, 'patch_size')}" if options["patch_size"] else ""
    yield f"backbone    {options['backbone']}{_why(reasons, 'backbone')}{patch}{_network_size(resolved.method)}"
    about = find_method(options["method"]).about
    yield f"method      {options['method']}" + (f": {about}" if about else "")
    epochs = options["steps"] * options["batch_size"] / images
    took = f", about {auto.readable_time(seconds_of(resolved))}" if resolved.cost is not None else ""
    yield (
        f"training    {options['steps']:,} steps of {options['batch_size']} images = {epochs:,.1f} epochs"
        f"{_why(reasons, 'epochs')}{_why(reasons, 'steps')}{took}"
    )
    yield ""
    yield from _data_lines(summary, resolved.survey)
    yield from _seen_lines(options, reasons, resolved.survey)
    yield from _training_lines(options, reasons)
    if resolved.cost is not None:
        yield from _cost_lines(options, resolved.cost)


def _network_size(method: Any) -> str:
    # model_args may leave little of what a name says
    if method is None:
        return ""
    backbone = method.backbones()[method.default_backbone]
    weights = sum(parameter.nelement() for parameter in backbone.parameters()) / 1e6
    depth = f" of {len(backbone.timm_model.blocks)} blocks" if backbone.is_vit else ""
    return f"; width {backbone.feature_dim}{depth}, {weights:.3g} million weights"


def seconds_of(resolved: Resolved) -> float:
    """How long the training takes where loading keeps up."""
    options = resolved.options
    assert resolved.cost is not None
    processes = options["devices"] * options["num_nodes"]
    return resolved.cost.seconds(options["steps"], options["batch_size"] // processes)


def _why(reasons: Mapping[str, str], name: str) -> str:
    return f" ({reasons[name]})" if name in reasons else ""


def _data_lines(summary: SourceSummary, survey: Survey | None) -> Iterator[str]:
    for suffix, count in sorted(summary.ignored.items()):
        yield f"files       {count:,} {suffix} not read{_extra(suffix)}"
    for note in summary.notes:
        yield f"data        {note}"
    if survey is None:
        return
    low, high, middle = (
        "x".join(str(side) for side in size)
        for size in (survey.min_size, survey.max_size, survey.median_size)
    )
    yield f"sizes       {low} to {high}, median {middle}"
    yield f"            {_counts(survey.dtypes)}; channels {_counts(survey.channel_counts)}"
    for note in survey.notes:
        yield f"            {note}"
    for name, reason in survey.bad[:3]:
        yield f"            cannot be used: {printable(name)}: {reason}"
    if len(survey.bad) > 3:
        yield f"            ... and {len(survey.bad) - 3} more of the {survey.count} looked at"


def _extra(suffix: str) -> str:
    return "; pip install 'freqmask[data]' reads them" if suffix.lower() in (".heic", ".heif") else ""


def _counts(counts: Mapping[Any, int]) -> str:
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{key} ({count})" for key, count in sorted(counts.items(), key=lambda item: -item[1]))


def _crop_words(options: Mapping[str, Any]) -> str:
    smallest, largest = options["crop_scale"]
    return {
        "resized": f"crops of {smallest:g} to {largest:g} of the area",
        "native": "crops of just this size, never resampled",
        "center": "the largest window in the middle",
        "whole": "whole images, distorted to this size",
    }[options["crop"]]


def _mirror_words(options: Mapping[str, Any]) -> str:
    ways = {"flip": "left to right", "vertical_flip": "top to bottom"}
    mirrored = " and ".join(words for name, words in ways.items() if options[name])
    turned = ", turned by quarters" if options["quarter_turns"] else ""
    return (f", mirrored {mirrored} half of the time" if mirrored else ", never mirrored") + turned


def _seen_lines(
    options: Mapping[str, Any], reasons: Mapping[str, str], survey: Survey | None
) -> Iterator[str]:
    def why(name: str) -> str:
        return _why(reasons, name)

    size = options["image_size"]
    shown = f"{size}x{size}" if isinstance(size, int) else f"{size[0]}x{size[1]}"
    yield f"the network sees {shown} pixels{why('image_size')}, {options['channels']} channels{why('channels')}"
    mean, std = ([f"{value:.3g}" for value in options[name][:3]] for name in ("mean", "std"))
    more = ", ..." if options["channels"] > 3 else ""
    yield f"            normalised by mean {', '.join(mean)}{more} and std {', '.join(std)}{more}{why('mean')}"
    if survey is not None and min(survey.median_size) < (size if isinstance(size, int) else min(size)):
        yield (
            f"            the median image has {min(survey.median_size)} pixels and is enlarged: its added frequencies "
            "are empty, and predicting nothing there teaches nothing; try --image_size auto"
        )
    if options["overfit"] is None:
        unused = (
            "" if "crop_scale" in reasons else " (crop_scale is for --crop resized and changes nothing here)"
        )
        scale = why("crop_scale") if options["crop"] == "resized" else unused
        yield f"            {_crop_words(options)}{scale}{_mirror_words(options)}"
        side = size if isinstance(size, int) else min(size)
        if survey is not None and options["crop"] == "resized" and min(survey.median_size) > SHRUNK * side:
            yield (
                f"            the median image has {min(survey.median_size):,} pixels and its crops are shrunk: fine "
                "detail is lost; --crop native keeps it"
            )
    names = ("filter", "radius", "low_pass_share", "com_fractions", "outputs")
    told = [
        f"{name} {_brief(options[name])}{why(name)}"
        for name in names
        if options.get(name) not in (None, "auto")
    ]
    if told:
        yield f"options     {', '.join(told)}"


def _brief(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else as_typed(value)


def _training_lines(options: Mapping[str, Any], reasons: Mapping[str, str]) -> Iterator[str]:
    if "batch_size" in reasons:
        yield f"batch       {reasons['batch_size']}"
    yield (
        f"optimizer   learning rate {options['lr']:.3g}"
        + (f" ({reasons['lr']})" if "lr" in reasons else "")
        + f", warm-up {options['warmup_epochs']:g} epochs, then cosine to {options['min_lr']:.2g}; "
        + f"weight decay {options['weight_decay']:g}"
    )
    yield (
        f"machine     {options['devices']} x {options['accelerator']}, {options['precision']}"
        + (f" ({reasons['precision']})" if "precision" in reasons else "")
        + f", {options['workers']} loader workers"
        + (f" ({reasons['workers']})" if "workers" in reasons else "")
        + (
            f", batch in {options['accumulate']} parts ({reasons.get('accumulate', 'as asked')})"
            if options["accumulate"] > 1
            else ""
        )
    )
    why = reasons["images_from"]
    if options["images_from"] == "device":
        yield f"loading     once: images stay on the {options['accelerator']} ({why})"
    else:
        yield f"loading     images are read anew at every step ({why})"


def _cost_lines(options: Mapping[str, Any], cost: auto.Cost) -> Iterator[str]:
    part = options["batch_size"] // options["devices"] // options["num_nodes"] // options["accumulate"]
    memory = cost.peak_bytes(part)
    checkpoint = cost.fixed_bytes * 3 // 4  # no gradients on the disk
    previews = options["steps"] // options["preview_every_steps"] if options["preview_every_steps"] else 1
    disk = checkpoint * (options["keep_checkpoints"] + 0.4) + previews * PREVIEW_BYTES
    yield (
        f"cost        the time above (measured, where loading keeps up), {auto.readable_bytes(memory)} of memory, "
        f"{auto.readable_bytes(disk)} of disk"
    )
    free = auto.usable_memory(torch.device("cuda" if options["accelerator"] == "cuda" else "cpu"))
    if memory > free:
        yield (
            f"warning     that is more than the {auto.readable_bytes(free)} free here; the same batch in smaller "
            f"parts: --accumulate {options['accumulate'] * 2}"
        )


def advice_lines(options: Mapping[str, Any], images: int, data: str) -> Iterator[str]:
    """What a person with few steps or few images should know before the hours go by."""
    if options["init"] or options["overfit"] or data.startswith("builtin:"):
        return
    if options["steps"] < EARLY:
        yield (
            f"advice      {options['steps']:,} steps are few: little shows before {EARLY:,}; "
            "the same time holds more of them with a smaller"
        )
        yield "            --batch_size, --image_size or --backbone (freqmask recipes lists what suits one core)"
    if images < FEW_IMAGES:
        yield (
            f"advice      {images:,} image{' is' if images == 1 else 's are'} few: public weights are usually the "
            "better beginning, and pre-training can go on from them:"
        )
        yield (
            f"            freqmask pretrain {data} --method {options['method']} --init timm:{_public(options)}"
            "    (and your options for the images)"
        )
        if options["channels"] not in (1, 3):
            yield "            they know three channels and are adapted: compare with a run from the beginning"


def _public(options: Mapping[str, Any]) -> str:
    # who has chosen a CNN is not sent to a transformer
    name = str(options.get("backbone", PUBLIC_VIT))
    if "vit" in name or not timm.is_model(name):
        return PUBLIC_VIT
    return name if timm.is_model_pretrained(name) else PUBLIC_CNN


def length_lines(resolved: Resolved, given: Mapping[str, Any]) -> Iterator[str]:
    """The last word of a plan that takes hours though nobody named a length: why, and the command for an hour.

    Args:
        resolved: the training.
        given: the options as they were typed.
    """
    named = any(given.get(name) is not None for name in ("epochs", "steps", "hours", "overfit"))
    if named or resolved.cost is None or seconds_of(resolved) <= LONG_SECONDS:
        return
    words = command_words({**given, "hours": 1.0}, first="data")
    yield (
        f"length      you named none, so it is {resolved.reasons['epochs']}, about "
        f"{auto.readable_time(seconds_of(resolved))} here; an hour of it: freqmask pretrain {words}"
    )


def printable(name: str) -> str:
    """A file's name on one line of a terminal, whatever bytes it has."""
    return (
        name.encode("unicode_escape", "surrogateescape").decode("ascii") if not name.isprintable() else name
    )


def summary_lines(
    run: RunFolder, summary: Mapping[str, Any], preview: str | None, data: str
) -> Iterator[str]:
    """The end of a run: from where to where, how fast, where to look, what to type next."""
    yield ""
    took, speed = auto.readable_time(summary["seconds"]), summary["images_per_second"]
    yield f"done        {summary['steps']:,} steps in {took}, {speed:.0f} images/s"
    yield f"loss        from {summary['first_loss']:.4g} to {summary['loss']:.4g}"
    for name in ("reconstruction", "distillation"):
        if name in summary:
            yield f"            {name} from {summary[f'first_{name}']:.4g} to {summary[name]:.4g}"
    if "relative_loss" in summary:
        first, last = summary["first_relative_loss"], summary["relative_loss"]
        yield f"            relative loss from {first:.3f} to {last:.3f} (1 = zero prediction)"
    if "collapse" in summary:
        yield f"            collapse number {summary['collapse']:.2f} nat (healthy is above 0.1)"
    if "held_out_relative_loss" in summary:
        yield f"            on held-out images: {summary['held_out_relative_loss']:.3f}"
    for remark in features_remarks(read_run(run.path)):
        yield f"{'warning ' if remark.kind == 'warning' else 'features'}    {remark.text}"
    if preview is not None:
        yield f"look at     {preview}"
        yield f"            {run.path / 'plan.png'}"
        yield f"            {run.path / 'report.html'}    (open it in a browser)"
    yield f"backbone    {run.backbone}"
    yield f'            model = timm.create_model("local-dir:{run.backbone}", pretrained=True)'
    if summary.get("skipped"):
        yield f"skipped     {summary['skipped']:,} images that could not be read: {run.path / 'skipped.csv'}"


def next_lines(run: Path, data: str) -> Iterator[str]:
    """The commands to type next."""
    yield f"next        freqmask embed {run} {data} --neighbours    (what it finds alike)"
    if data.startswith("builtin:"):
        yield "            freqmask pretrain FOLDER_OF_YOUR_IMAGES"
    else:
        yield f"            freqmask pretrain {data} --init {run} --out {run}-continued    (trains on)"
