"""From the options of a pre-training to its numbers: what is wrong between them, and every `auto` with its reason.

What a single option may be is read from its declaration (:mod:`freqmask.options`).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from freqmask.backbones import height_and_width
from freqmask.data.source import Source
from freqmask.data.values import Survey, survey
from freqmask.errors import UserError, brief
from freqmask.interop.models import OpenedModel, open_model
from freqmask.interop.weights import check_init, initial_backbone
from freqmask.methods import FOLK, METHODS, Distill, Method, build_method, find_method
from freqmask.methods.distill import Teacher, teacher_size
from freqmask.methods.folk import OUTPUTS
from freqmask.options import Option
from freqmask.options.of_methods import (
    BUILT_FROM,
    FROM_DATA,
    method_settings,
    options_of_class,
    typed_options,
)
from freqmask.pretraining.cache_on_device import choose_place
from freqmask.spectrum import IMAGENET_MEAN, IMAGENET_STD
from freqmask.training import auto
from freqmask.training.callbacks import periods
from freqmask.training.optim import BASE_MIN_LR, scaled_lr
from freqmask.training.run_folder import RunFolder

SHARDED = ("fsdp", "model_parallel")  # strategies that spread weights over the devices
SMALL_IMAGE = 160  # below it, crops of a fifth of the area empty the upper band (docs/methods.md)
FEW_OUTPUTS, ALL_OUTPUTS_FROM = 4_096, 100_000  # FOLK's prototypes; images from which on they are DINO's
GPU_BACKBONE, CPU_BACKBONE = "vit_small_patch16_224", "vit_tiny_patch16_224"
STUDENT = "resnet10t"  # of a public teacher; of those that were measured, docs/results.md
# In equal time a ViT that sees fewer images learned less than a smaller one (docs/results.md, which network).
ENOUGH_IMAGES = 200_000
SMALLER = ({"depth": 4}, {"embed_dim": 96, "depth": 4, "num_heads": 3})
OVERFIT_STEPS = 300
CHECKPOINTS_A_RUN, PREVIEWS_A_RUN, PREVIEW_SECONDS = 50, 10, 0.6
LOGGERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
}  # what each needs, one of them
LEARNS_MOST = "learned most in equal time, docs/results.md; the papers' own: --method mfm, --method folk"
PAPERS_OWN = {"words": {"filter", "radius"}}  # who names a filter and no method means MFM's


def check_options(options: Mapping[str, Any]) -> None:
    """What can be told to be wrong with options beside each other, before looking at a single image.

    Raises:
        UserError: all problems in one message.
    """
    problems = []
    try:
        if options["method"] == "auto":
            options = {**options, "method": choose_method(options).value}
        problems += _unused(options)
        if options["method"] == FOLK.name and options["precision"] == "bf16-true":
            problems.append(
                "precision (bf16-true) would lose most steps of folk's moving average; try --precision bf16-mixed"
            )
        is_resumed = options["out"] is not None and RunFolder(options["out"]).exists()
        if options["init"] is not None and not is_resumed:  # else it may be gone
            check_init(options["init"])
        check_logger(options.get("logger"))
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))


def check_logger(name: str | None) -> None:
    """Raises a UserError unless the package of a logger is there."""
    if name in LOGGERS and not any(map(find_spec, LOGGERS[name])):
        raise UserError(f"logger ({name}) is not installed; pip install 'freqmask[log]'")


def choose_method(options: Mapping[str, Any]) -> auto.Choice:
    """What trains where no method is named: words, or the first method that takes the options that were given."""
    given = {name for name, homes in _given(options).items() if len(homes) < len(METHODS)}
    if "teacher" in given:
        return auto.Choice(Distill.name, "there is a teacher")
    for name in dict.fromkeys(("words", "mfm", "folk", *METHODS)):
        if given <= set(typed_options(options_of_class(METHODS[name]))) - PAPERS_OWN.get(name, set()):
            why = "it takes " + ", ".join(f"--{option}" for option in sorted(given))
            return auto.Choice(name, why if given else LEARNS_MOST)
    return auto.Choice("mfm", "")


def _given(options: Mapping[str, Any]) -> dict[str, list[str]]:
    """The methods' options that were given, and which methods take each."""
    homes: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        for option in typed_options(options_of_class(method)):
            homes.setdefault(option, []).append(name)
    return {name: homes[name] for name in homes if options.get(name) is not None and name not in FROM_DATA}


def _unused(options: Mapping[str, Any]) -> list[str]:
    """Options that the chosen method or filter would pass over in silence."""
    given = _given(options)
    accepted, chosen = typed_options(method_options(options)), filter_of(options)
    problems = []
    for name in sorted(given):
        if name not in accepted:
            method, known = options["method"], ", ".join(given[name])
            problems.append(f"option --{name} is not used by method {method}; it belongs to {known}")
        elif accepted[name].filter not in (None, chosen):
            home = accepted[name].filter
            problems.append(f"option --{name} is not used by filter {chosen}; it belongs to --filter {home}")
    return problems


def method_options(options: Mapping[str, Any]) -> dict[str, Option]:
    """What the method of a run takes, by the names of its constructor."""
    return options_of_class(find_method(options["method"]))


def filter_of(options: Mapping[str, Any]) -> str:
    """The filter that is named, or that a method gets where none is."""
    own = method_options(options).get("filter")
    return str(options.get("filter") or ("" if own is None else own.default))


def method_defaults(options: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a method has beside the options that were given: recorded, so that a changed default changes no repeat.

    Args:
        options: of the run.
        settings: the method's own, plain values.
    """
    chosen, defaults = filter_of(options), {}
    for name, own in method_options(options).items():
        value = settings.get(name) if own.epochs is None else own.epochs
        if options.get(own.typed) in (None, "auto") and value is not None and own.filter in (None, chosen):
            defaults[own.typed] = value
    return defaults


def parse_image_size(value: int | str | Sequence[int]) -> int | tuple[int, int]:
    """224, ``"96x160"`` (height x width), or both as a ``config.yaml`` has them.

    Raises:
        UserError: it is neither.
    """
    text = str(value) if isinstance(value, (int, str)) else "x".join(map(str, value))
    match = re.fullmatch(r"\s*(\d+)(?:\s*[xX]\s*(\d+))?\s*", text)
    sides = [int(side) for side in match.groups() if side] if match else []
    if not sides or min(sides) < 1:
        raise UserError(f"image_size ({value}) must be a number of pixels, HEIGHTxWIDTH, or auto")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


@dataclass
class Resolved(auto.Plan):
    """A pre-training without any `auto` left: its values are those of every option of ``pretrain``, plain."""

    survey: Survey = field(init=False)  # what the images are like
    method: Any = field(init=False)  # freshly initialized
    # images that the measurements of a training look at
    watched: Callable[[Mapping[str, Any]], int] = field(init=False)

    def make_method(self) -> None:
        """The method by today's values, which get what it chose itself."""
        torch.manual_seed(self.values["seed"])
        before = getattr(self, "method", None)
        self.method = make_method(
            self.values, teacher=before.teacher if isinstance(before, Distill) else None
        )
        self.values |= method_defaults(self.values, getattr(self.method, "settings", {}))

    def watching_seconds(self, steps: int) -> float:
        """What is measured and drawn between so many steps: a fifth of the first training that anybody starts."""
        asked = self.asked.get("preview_every_steps")
        every = _preview_every(steps) if asked in (None, "auto") else int(asked)
        looked = self.watched({**self.values, "steps": steps, "preview_every_steps": every})
        # looking at an image takes about what it costs in a step: no gradients, but float32, all patches, read anew
        return looked * self.cost.seconds(1, 1) + periods(steps, every) * PREVIEW_SECONDS

    def steps_within(self, seconds: float) -> int:
        """How many steps fit a time together with what is measured between them, which gets half at most."""
        a_step = self.step_seconds()

        def taken(steps: int) -> float:
            return steps * a_step + min(self.watching_seconds(steps), steps * a_step)

        most = int(min(seconds / a_step, 2**62))  # a range can hold no more
        return max(bisect_right(range(1, most + 1), seconds, key=taken), 1)


def resolve(
    options: Mapping[str, Any], source: Source, images: int, watched: Callable[[Mapping[str, Any]], int]
) -> Resolved:
    """Resolve every `auto`, by the data, the method and a measurement on this machine.

    Args:
        options: the options of ``pretrain``, checked.
        source: the images.
        images: how many of them are trained on.
        watched: how many are looked at for measurements, by the options.

    Raises:
        UserError: the data or the method cannot be what the options ask.
    """
    resolved = Resolved(options, dict(options))
    resolved.watched = watched
    resolved.take("method", *choose_method(options))
    _resolve_images(resolved, source)
    device = resolved.take_machine()
    _resolve_method(resolved, images, device)
    _resolve_length(resolved, images)
    backbone, batch = next(iter(resolved.method.backbones().values())), int(resolved.values["batch_size"])
    weights = sum(parameter.nelement() for parameter in backbone.parameters())
    tiny_lr = getattr(resolved.method, "tiny_lr", Method.tiny_lr)
    resolved.take("lr", *auto.choose_lr(batch, weights, tiny_lr, trained=bool(resolved.values["init"])))
    least = min(scaled_lr(BASE_MIN_LR, batch), resolved.values["lr"])
    resolved.take("min_lr", least, "2.5e-6 x batch/512")
    place = choose_place(resolved.values, resolved.survey, images)
    resolved.values["images_from"], resolved.reasons["images_from"] = place
    return resolved


def _resolve_images(resolved: Resolved, source: Source) -> None:
    options = resolved.values
    seen = resolved.survey = survey(source, options["value_range"], options["channels"], options["seed"])
    options["value_range"] = seen.value_range.describe()
    resolved.take("convert_channels", options["channels"] != "auto", "whether channels is given")
    resolved.take("channels", seen.channels, "the commonest count")
    resolved.take("image_size", *auto.choose_image_size(seen.shorter_side))
    options["image_size"] = parse_image_size(options["image_size"])
    photographs = options["channels"] == 3 and set(seen.dtypes) == {"uint8"}
    for name, published in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        measured = [round(value, 5) for value in getattr(seen, name)]
        usual = (list(published), "ImageNet's, as published")
        resolved.take(name, *(usual if photographs else (measured, "measured on these images")))
        if len(options[name]) != options["channels"]:
            given = " ".join(map(str, options[name]))
            raise UserError(
                f"{name} ({given}) must be {options['channels']} numbers, one a channel; try --{name} auto"
            )
    if shorter_side(options) < SMALL_IMAGE:
        resolved.take("crop_scale", [0.5, 1.0], "small images: smaller crops would empty the upper band")
    else:
        resolved.take("crop_scale", [0.25 if options["method"] == "folk" else 0.2, 1.0], "as published")


def shorter_side(options: Mapping[str, Any]) -> int:
    """The shorter side of the input, in pixels."""
    return min(height_and_width(options["image_size"]))


def _resolve_method(resolved: Resolved, images: int, device: torch.device) -> None:
    options, side = resolved.values, shorter_side(resolved.values)
    if options["backbone"] == "auto" and options["init"]:
        options["backbone"], options["model_args"], patch = initial_backbone(
            options["init"], options["model_args"]
        )
        resolved.reasons["backbone"] = "that of --init"
        options["patch_size"] = patch if options["patch_size"] == "auto" else options["patch_size"]
    else:
        resolved.take("backbone", *_choose_backbone(options, device))
    patches = auto.choose_patch_size(side, options["backbone"])
    if options["patch_size"] in ("auto", None):
        options["patch_size"] = None
        if patches is not None:
            options["patch_size"], resolved.reasons["patch_size"] = patches
    if "outputs" in method_options(options):
        outputs = FEW_OUTPUTS if images < ALL_OUTPUTS_FROM else OUTPUTS
        resolved.take("outputs", outputs, f"{images:,} images")
    resolved.make_method()


def _choose_backbone(options: Mapping[str, Any], device: torch.device) -> auto.Choice:
    if device.type == "cuda":
        return auto.Choice(GPU_BACKBONE, "a GPU is at hand; any timm name will do")
    of_a_vit = any(
        options.get(name) not in (None, "auto") for name in ("patch_size", "model_args", "token_share")
    )
    if device.type == "cpu" and issubclass(find_method(options["method"]), Distill) and not of_a_vit:
        why = "a small CNN learned more from a teacher than a ViT, docs/results.md; any timm name will do"
        return auto.Choice(STUDENT, why)
    where = "the CPU" if device.type == "cpu" else device.type
    return auto.Choice(CPU_BACKBONE, f"training runs on {where}; any timm name will do")


def _take_cost(resolved: Resolved, images: int) -> tuple[Any, Callable[[int], Tensor]]:
    """What an image costs, and a smaller network where the hours hold too few images for the usual one."""
    options = resolved.values
    shape = (options["channels"], *height_and_width(options["image_size"]))
    how = (shape, _trial_loss, auto.largest_batch(options["accelerator"], images))
    measured = resolved.take_cost(resolved.method, *how)
    is_ours = options["backbone"] == CPU_BACKBONE and "backbone" in resolved.reasons and not options["init"]
    is_free = (
        is_ours and options["accelerator"] == "cpu" and not options["model_args"] and not options["overfit"]
    )
    whole = None
    for smaller in SMALLER if options["hours"] is not None and is_free else ():
        held = options["hours"] * 3600 / resolved.cost.seconds(1, 1) * auto.world_size(options)
        if held >= ENOUGH_IMAGES:
            break
        whole = whole or held
        options["model_args"] = dict(smaller)
        resolved.reasons["backbone"] = (
            f"made smaller: in {_hours(options)} the whole one would see {whole:,.0f} images, and with fewer "
            f"than {ENOUGH_IMAGES:,} a smaller one learns more, docs/results.md; any timm name will do"
        )
        resolved.make_method()
        measured = resolved.take_cost(resolved.method, *how)
    return measured


def make_method(
    options: Mapping[str, Any], steps_an_epoch: float | None = None, teacher: Teacher | None = None
) -> nn.Module:
    """The method that resolved options ask for, with its own defaults where they are silent.

    Args:
        options: resolved options.
        steps_an_epoch: turns options in epochs into steps; None leaves them out, where it is not known yet.
        teacher: where it has been opened already; its weights may be large.
    """
    settings = method_settings(method_options(options), options, steps_an_epoch)
    settings |= {name: options[name] for name in (*BUILT_FROM, *FROM_DATA)}
    if settings.get("teacher") is not None and issubclass(find_method(options["method"]), Distill):
        settings["teacher"] = teacher or open_teacher(options)
    return build_method(options["method"], **settings)


def open_teacher(options: Mapping[str, Any]) -> Teacher:
    """The teacher that resolved options name, at its size.

    Raises:
        UserError: there is none of that name, its weights cannot be had, or it cannot see these images.
    """
    name = str(options["teacher"])
    opened = _open(name)
    own = (opened.input_size[1], opened.input_size[2])
    student = height_and_width(options["image_size"])
    size = teacher_size(student, own, options.get("teacher_size") or "auto")
    if opened.backbone.fixed_size and size != opened.backbone.image_size:
        opened = _open(name, size)
    teacher = Teacher(opened.backbone, name, size, opened.mean, opened.std)
    images = torch.rand(
        2, teacher.backbone.channels, *teacher.size, generator=torch.Generator().manual_seed(0)
    )
    try:
        teacher(images)
    except RuntimeError as error:
        reason = brief(error, 160)
        raise UserError(
            f"teacher_size ({min(teacher.size)}) is none at which {teacher.name} works ({reason}); try another"
        ) from error
    return teacher


def _open(name: str, size: tuple[int, int] | None = None) -> OpenedModel:
    try:
        return open_model(name, image_size=size)
    except UserError as error:
        at = f"; at --teacher_size {min(size)}" if size is not None else ""
        raise UserError(f"--teacher: {error}{at}") from error


def _resolve_length(resolved: Resolved, images: int) -> None:
    """Batch and parts by the cost of an image; steps, whatever the length was given in; what happens how often."""
    options = resolved.values
    trial, loss = _take_cost(resolved, images)
    if isinstance(trial, Distill):
        share = share_of_step(trial, lambda: loss(resolved.cost.images), torch.device(options["accelerator"]))
        resolved.reasons["teacher"] = f"its passes are {share:.0%} of a step"
    seconds = None if options["hours"] is None else options["hours"] * 3600
    part, rest = resolved.take_batch(
        lambda cost, device, count, memory: auto.choose_batch_size(
            cost, images, device, count, memory, seconds
        )
    )
    batch, parts = int(options["batch_size"]), int(options["accumulate"])
    if rest:
        of_device = batch // auto.world_size(options)
        fitting = next((n for n in range(parts, of_device) if of_device % n == 0), of_device)
        raise UserError(
            f"accumulate ({parts}) must divide the {of_device} images of a device's batch; try --accumulate {fitting}"
        )
    if part == 1:
        auto.check_single_image(loss, str(options["backbone"]))
    if options["overfit"] and not any(options[name] for name in ("steps", "epochs", "hours")):
        options["steps"] = OVERFIT_STEPS
    if seconds is not None:
        why = f"{_hours(options)} at {resolved.step_seconds():.2g} seconds a step, measured now"
        resolved.take("steps", resolved.steps_within(seconds), why)
    if options["steps"] is None:
        resolved.take("epochs", *auto.choose_epochs(images, batch))
        options["steps"] = max(math.ceil(options["epochs"] * images / batch), 1)
    options["hours"] = options["epochs"] = None  # from here on steps say it, exactly
    steps = int(options["steps"])
    resolved.take(
        "warmup_epochs", round(steps * batch / images / 15, 3), "a fifteenth, as published (20 of 300)"
    )
    resolved.take_records(CHECKPOINTS_A_RUN)
    resolved.take("preview_every_steps", _preview_every(steps), "ten times a run")


def _preview_every(steps: int) -> int:
    return math.ceil(steps / PREVIEWS_A_RUN)


def _hours(options: Mapping[str, Any]) -> str:
    return f"{options['hours']:g} hour{'' if options['hours'] == 1 else 's'}"


def _trial_loss(method: Any, images: Tensor) -> Tensor:
    views = [images, *(torch.rand_like(images) for _ in range(method.n_views - 1))]
    loss: Tensor = method(views, torch.arange(len(images), device=images.device))["loss"]
    return loss


def share_of_step(method: Any, loss: Callable[[], Tensor], device: torch.device) -> float:
    """The share of a step's time that the teacher's passes take, the least of three measurements.

    Args:
        method: a trial, which is hooked into.
        loss: its loss of some images.
        device: where it runs.
    """
    clock: list[float] = []
    method.teacher.register_forward_pre_hook(lambda *_: clock.append(auto.seconds_now(device)))
    method.teacher.register_forward_hook(lambda *_: clock.append(auto.seconds_now(device)))
    shares = []
    for _ in range(4):
        clock.clear()
        began = auto.seconds_now(device)
        loss().backward()
        shares.append((clock[1] - clock[0]) / (auto.seconds_now(device) - began))
    method.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return min(shares[1:])


def is_channels_last(options: Mapping[str, Any], method: Any) -> bool:
    """Whether weights and images lie channels last in memory: where all backbones are CNNs, and none is sharded."""
    return (
        options["accelerator"] in ("cpu", "cuda")
        and options["strategy"] not in SHARDED
        and all(backbone.is_cnn for backbone in method.backbones().values())
    )
