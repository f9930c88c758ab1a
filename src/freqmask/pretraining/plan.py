"""What a run says before its first step and after its last.

Values and their reasons come from :mod:`.resolve`, those of any training from :mod:`freqmask.training.auto`, and where
images are read from :mod:`.cache_on_device`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from freqmask.backbones import height_and_width
from freqmask.console import (
    counted,
    plain_name,
    readable_bytes,
    readable_time,
    shell_path,
    shell_paths,
    shell_word,
)
from freqmask.data.source import SourceSummary
from freqmask.data.values import Survey
from freqmask.interop.weight_files import README
from freqmask.methods import find_method
from freqmask.options import as_typed, command_words, options_of
from freqmask.options.of_methods import BackboneOptions, informative_from, options_of_class
from freqmask.options.of_training import Images, Views
from freqmask.pretraining.resolve import STUDENT, Resolved, is_channels_last, shorter_side
from freqmask.reporting.reading import read_run
from freqmask.reporting.summary import features_remarks
from freqmask.training import auto
from freqmask.training.callbacks import periods
from freqmask.training.run_folder import RunFolder

PUBLIC_WEIGHTS_BELOW = 50_000  # images, of which public weights usually know more (docs/your-own-images.md)
PUBLIC = "vit_small_patch16_224"
TEACHER = "tf_efficientnet_lite0"  # of those that were measured, docs/results.md
SHRUNK = 6  # median side over that of the views from which small things are lost in resized crops
PREVIEW_BYTES = 500_000
LONG_SECONDS = 3600  # above it a plan whose length nobody named ends with how to name one
CROPS = {
    "resized": "crops of {:g} to {:g} of the area",
    "native": "crops of just this size, never resampled",
    "center": "the largest window in the middle",
    "whole": "whole images, distorted to this size",
}
CHANNELS_LAST = "channels last (a CNN: a step of ResNet-50 is 1.05 times as fast so on a CPU)"
# What a run was given of these it is continued with: which images, how they are parted (seed) and seen.
DESCRIBE_IMAGES = (*options_of(Images), "seed", "image_size", *options_of(Views), "mean", "std")
# Of a method's options these are always told, the others where they are not what they would be.
METHOD_LINE = ("filter", "radius", "low_pass_share", "com_fractions", "outputs")
TOLD_ELSEWHERE = (*options_of(BackboneOptions), "teacher", "teacher_size")


def plan_lines(resolved: Resolved, summary: SourceSummary, images: int, held_out: int) -> Iterator[str]:
    """The plan of a new run, a line each.

    Args:
        resolved: the training.
        summary: of the source.
        images: trained on.
        held_out: kept apart.
    """
    options = resolved.values
    # What matters stands first: the images, what is trained, for how long.
    yield (
        f"images      {summary.found:,} found ({summary.kind}), {images:,} to train on, {held_out:,} held out "
        "to measure the loss on"
    )
    yield f"backbone    {_with(resolved, 'backbone')}{_network(resolved)}"
    about = find_method(options["method"]).about
    yield f"method      {_with(resolved, 'method')}" + (f": {about}" if about else "")
    if "teacher" in resolved.reasons:
        yield (
            f"teacher     {options['teacher']}, frozen, sees whole images at {options['teacher_size']} pixels"
            f"{resolved.why('teacher')}"
        )
    epochs = options["steps"] * options["batch_size"] / images
    yield (
        f"training    {counted(options['steps'], 'step')} of {counted(options['batch_size'], 'image')} = "
        f"{counted(epochs, 'epoch')}{resolved.why('epochs')}{resolved.why('steps')}, "
        f"about {readable_time(_seconds(resolved))}"
    )
    yield ""
    yield from _data_lines(summary, resolved.survey)
    yield from _input_lines(resolved)
    yield from _training_lines(resolved)
    yield from _cost_lines(resolved)


def _seconds(resolved: Resolved) -> float:
    steps = resolved.values["steps"]
    return float(resolved.step_seconds() * steps + resolved.watching_seconds(steps))


def _with(resolved: Resolved, name: str, form: str = "{}") -> str:
    """A value and the reason for it."""
    return form.format(resolved.values[name]) + resolved.why(name)


def _network(resolved: Resolved) -> str:
    # model_args may leave little of what a name says
    patch = f", patch {_with(resolved, 'patch_size')}" if resolved.values["patch_size"] else ""
    backbone = resolved.method.backbones()[resolved.method.default_backbone]
    weights = sum(parameter.nelement() for parameter in backbone.parameters()) / 1e6
    depth = f" of {len(backbone.timm_model.blocks)} blocks" if backbone.is_vit else ""
    return f"{patch}; width {backbone.feature_dim}{depth}, {weights:.3g} million weights"


def _data_lines(summary: SourceSummary, survey: Survey) -> Iterator[str]:
    for suffix, count in sorted(summary.ignored.items()):
        yield f"files       {count:,} {suffix} not read"
    for note in summary.notes:
        yield f"data        {note}"
    low, high, middle = (
        "x".join(map(str, size)) for size in (survey.min_size, survey.max_size, survey.median_size)
    )
    yield f"sizes       {low} to {high}, median {middle}"
    yield f"            {_counts(survey.dtypes)}; channels {_counts(survey.channel_counts)}"
    for note in survey.notes:
        yield f"            {note}"
    for name, reason in survey.bad[:3]:
        yield f"            cannot be used: {plain_name(name)}: {reason}"
    if len(survey.bad) > 3:
        yield f"            ... and {len(survey.bad) - 3} more of the {survey.count} checked"
    if survey.bad:
        yield "            training passes over such images, which are counted above"


def _counts(counts: Mapping[Any, int]) -> str:
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{key} ({count})" for key, count in sorted(counts.items(), key=lambda item: -item[1]))


def _input_lines(resolved: Resolved) -> Iterator[str]:
    options, side = resolved.values, shorter_side(resolved.values)
    median = resolved.survey.shorter_side
    shown = "x".join(map(str, height_and_width(options["image_size"])))
    channels = counted(options["channels"], "channel") + resolved.why("channels")
    yield f"input size  {shown} pixels{resolved.why('image_size')}, {channels}"
    mean, std = (
        ", ".join([*(f"{value:.3g}" for value in options[name][:3]), *["..."] * (options["channels"] > 3)])
        for name in ("mean", "std")
    )
    yield f"            normalized by mean {mean} and std {std}{resolved.why('mean')}"
    if median < side:
        yield (
            f"            the median image has {median} pixels and is enlarged: its added frequencies are empty, and "
            "predicting nothing there teaches nothing; try --image_size auto"
        )
    if options["overfit"] is None:
        scale = (
            ""
            if "crop_scale" in resolved.reasons
            else " (crop_scale is for --crop resized and changes nothing here)"
        )
        if options["crop"] == "resized":
            scale = resolved.why("crop_scale")
        ways = {"flip": "left to right", "vertical_flip": "top to bottom"}
        mirrored = " and ".join(way for name, way in ways.items() if options[name])
        yield (
            f"            {CROPS[options['crop']].format(*options['crop_scale'])}{scale}, "
            + (f"mirrored {mirrored} half of the time" if mirrored else "never mirrored")
            + (", turned by quarters" if options["quarter_turns"] else "")
        )
        if options["crop"] == "resized" and median > SHRUNK * side:
            yield (
                f"            the median image has {median:,} pixels and its crops are shrunk: fine detail is lost; "
                "--crop native keeps it"
            )
    given = {name: options.get(name) for name in (*METHOD_LINE, *_changed(resolved))}
    words = [
        f"{name} {f'{value:.3g}' if isinstance(value, float) else as_typed(value)}{resolved.why(name)}"
        for name, value in given.items()
        if value not in (None, "auto")
    ]
    if words:
        yield f"options     {', '.join(words)}"


def _changed(resolved: Resolved) -> Iterator[str]:
    """Options of the method that were asked for and are not its defaults."""
    for own in options_of_class(find_method(resolved.values["method"])).values():
        asked = resolved.asked.get(own.typed)
        default = own.default if own.epochs is None else own.epochs
        if own.name not in TOLD_ELSEWHERE and asked is not None and as_typed(asked) != as_typed(default):
            yield own.typed


def _training_lines(resolved: Resolved) -> Iterator[str]:
    options, reasons = resolved.values, resolved.reasons
    if "batch_size" in reasons:
        yield f"batch       {reasons['batch_size']}"
    yield (
        f"optimizer   {_with(resolved, 'lr', 'learning rate {:.3g}')}, warm-up "
        f"{counted(options['warmup_epochs'], 'epoch')}, then cosine to "
        f"{options['min_lr']:.2g}; weight decay {options['weight_decay']:g}"
    )
    parts = f", batch in {options['accumulate']} parts ({reasons.get('accumulate', 'as asked')})"
    layout = f", {CHANNELS_LAST}" if is_channels_last(options, resolved.method) else ""
    yield (
        f"machine     {options['devices']} x {options['accelerator']}, {_with(resolved, 'precision')}{layout}, "
        f"{counted(options['workers'], 'loader worker')}{resolved.why('workers')}"
        f"{parts if options['accumulate'] > 1 else ''}"
    )
    if "threads" in reasons:
        yield f"threads     {reasons['threads']}"
    if options["images_from"] == "device":
        where = f"once: images stay on the {options['accelerator']}"
    else:
        where = "images are read anew at every step"
    yield f"loading     {where}{resolved.why('images_from')}"


def _cost_lines(resolved: Resolved) -> Iterator[str]:
    options, cost, method = resolved.values, resolved.cost, resolved.method
    part = options["batch_size"] // auto.world_size(options) // options["accumulate"]
    memory = cost.peak_bytes(part)
    moments = sum(2 * weight.nbytes for weight in method.parameters() if weight.requires_grad)  # AdamW's
    checkpoint = sum(tensor.nbytes for tensor in method.state_dict().values()) + moments
    previews = periods(options["steps"], options["preview_every_steps"])
    disk = checkpoint * (options["keep_checkpoints"] + 0.4) + previews * PREVIEW_BYTES
    watching = readable_time(resolved.watching_seconds(options["steps"]))
    yield (
        f"cost        the time above (measured, where loading keeps up; {watching} of it for measurements and "
        f"previews), {readable_bytes(memory)} of memory, {readable_bytes(disk)} of disk"
    )
    free = auto.usable_memory(torch.device("cuda" if options["accelerator"] == "cuda" else "cpu"))
    if memory > free:
        yield (
            f"warning     that is more than the {readable_bytes(free)} free here; the same batch in smaller "
            f"parts: --accumulate {options['accumulate'] * 2}"
        )


def advice_lines(options: Mapping[str, Any], images: int, data: str) -> Iterator[str]:
    """What a person with few steps or few images should know before the hours go by."""
    if options["init"] or options["overfit"] or data.startswith("builtin:"):
        return
    early = informative_from(options["method"])
    if options["steps"] < early:
        yield (
            f"advice      {counted(options['steps'], 'step is', 'steps are')} few: little shows before {early:,}; "
            "the same time holds more of them with a smaller"
        )
        yield "            --batch_size, --image_size or --backbone (freqmask recipes lists what suits one core)"
    if images < PUBLIC_WEIGHTS_BELOW and not options.get("teacher"):
        backbone, channels = str(options.get("backbone", PUBLIC)), options["channels"]
        few = f"advice      {images:,} image{' is' if images == 1 else 's are'} few: public weights usually know more"
        if channels in (1, 3):
            # who has chosen a CNN keeps it; a transformer learned more from words in the same time (docs/log.md)
            student = backbone if timm.is_model(backbone) and "vit" not in backbone else STUDENT
            gray = " --channels 3" if channels == 1 else ""
            yield f"{few} of them than they can teach; a small CNN learns what those see:"
            yield (
                f"            freqmask pretrain {data} --teacher timm:{TEACHER} --backbone {student}{gray}"
                "    (and your options for the images)"
            )
        else:
            public = backbone if timm.is_model(backbone) and timm.is_model_pretrained(backbone) else PUBLIC
            yield f"{few}; they know three channels and are adapted. Compare with a run from the beginning:"
            yield (
                f"            freqmask pretrain {data} --method {options['method']} --init timm:{public}"
                "    (and your options for the images)"
            )


def length_lines(resolved: Resolved, given: Mapping[str, Any]) -> Iterator[str]:
    """The last word of a plan that takes hours though nobody named a length: why, and the command for an hour.

    Args:
        resolved: the training.
        given: the options as they were typed.
    """
    named = any(given.get(name) is not None for name in ("epochs", "steps", "hours", "overfit"))
    if not named and _seconds(resolved) > LONG_SECONDS:
        words = command_words({**given, "hours": 1.0}, first="data")
        yield (
            f"length      you named none, so it is {resolved.reasons['epochs']}, about "
            f"{readable_time(_seconds(resolved))} here; an hour of it: freqmask pretrain {words}"
        )


def summary_lines(run: RunFolder, summary: Mapping[str, Any]) -> Iterator[str]:
    """The end of a run: from where to where, how fast, where its results are."""
    yield ""
    took, speed = readable_time(summary["seconds"]), summary["images_per_second"]
    yield f"done        {counted(summary['steps'], 'step')} in {took}, {speed:.0f} images/s"
    if "loss" in summary:
        yield f"loss        from {summary['first_loss']:.4g} to {summary['loss']:.4g}"
    else:  # of a run that was resumed behind its last step
        yield f"loss        unknown: {run.metrics} tells none"
    for name in getattr(find_method(summary["method"]), "parts", ()):
        if name in summary:
            yield f"            {name.replace('_', ' ')} from {summary[f'first_{name}']:.4g} to {summary[name]:.4g}"
    if "relative_loss" in summary:
        first, last = summary["first_relative_loss"], summary["relative_loss"]
        yield f"            relative loss from {first:.3f} to {last:.3f} (1 = zero prediction)"
    if "collapse" in summary:
        yield f"            collapse number {summary['collapse']:.2f} nat (healthy is above 0.1)"
    if "held_out_relative_loss" in summary:
        yield f"            on held-out images: {summary['held_out_relative_loss']:.3f}"
    told = read_run(run.path)
    for remark in features_remarks(told):
        yield f"{'warning ' if remark.kind == 'warning' else 'features'}    {remark.text}"
    if told.previews:
        yield f"figures     {told.previews[-1][1]}"
        yield f"            {run.path / 'plan.png'}"
        yield f"            {run.path / 'report.html'}    (open it in a browser)"
    yield f"backbone    {run.backbone}"
    yield f'            model = timm.create_model("local-dir:{run.backbone}", pretrained=True)'
    if (run.backbone / README).is_file():
        yield f"            its features take another call: {run.backbone / README}"
    if summary.get("skipped"):
        yield f"skipped     {counted(summary['skipped'], 'image')} that could not be read: {run.path / 'skipped.csv'}"


def data_words(options: Mapping[str, Any]) -> str:
    """DATA as it would be typed."""
    return shell_paths(options.get("data", ()), "DATA")


def _again(given: Mapping[str, Any], *names: str) -> str:
    """Some options as they were given, to follow other words of a command."""
    words = command_words({name: given[name] for name in names if name in given}, first="data")
    return f" {words}" if words else ""


def train_on(run: Path, options: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The command that trains on from a run, on its images as it saw them and by its method.

    Args:
        run: the folder.
        options: of the run, without any ``auto``; DATA as it is typed from here.
        given: the options that it was begun with.
    """
    name = "teacher" if options.get("teacher") else "method"
    way = f"--{name} {shell_word(options[name])} --init {shell_path(run)}{_again(given, *DESCRIBE_IMAGES)}"
    return f"freqmask pretrain {data_words(options)} {way} --out {shell_path(f'{run}-continued')}"


def next_lines(
    run: Path, options: Mapping[str, Any], given: Mapping[str, Any], labelled: bool
) -> Iterator[str]:
    """The commands to type next, as :func:`train_on`; with labels the first asks whether the run was worth it."""
    data, word = data_words(options), "next    "
    if labelled:
        known = [str(options[name]) for name in ("init", "teacher") if options.get(name)]
        models = shell_paths(("pixels", f"random:{run}", *known, str(run)), "MODEL")
        asked = f"freqmask evaluate knn {models} --data {data}{_again(given, 'pages')}"
        yield f"{word}    {asked}    (was it worth it?)"
        word = " " * len(word)
    alike = f"{shell_path(run)} {data}{_again(given, 'pages', 'split')}"
    yield f"{word}    freqmask embed {alike} --neighbours    (what it finds alike)"
    if data.startswith("builtin:"):
        yield "            freqmask pretrain FOLDER_OF_YOUR_IMAGES"
    else:
        yield f"            {train_on(run, options, given)}    (trains on)"
