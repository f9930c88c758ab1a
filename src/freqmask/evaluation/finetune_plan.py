"""A fine-tuning before its first step: the classifier made of a backbone, and its numbers, resolved and printed."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import timm
import torch
from timm.models import get_model_args
from torch import Tensor, nn

from freqmask.backbones import batch_norms
from freqmask.data.augment import NO_AUGMENT
from freqmask.errors import UserError
from freqmask.evaluation.labelled import parse_shots
from freqmask.evaluation.trainings import AUTO, Plan, TrainingNumbers, train_reached
from freqmask.interop.models import OpenedModel
from freqmask.rng import torch_seeded
from freqmask.timm_models import REFUSED, cannot
from freqmask.training import auto
from freqmask.training.auto import check_single_image
from freqmask.training.loop import images_at_once

HEAD_STD, HEAD_SCALE = 0.02, 0.001  # docs/evaluating.md, Fine-tuning
_DROPPED = ("norm.", "attn_pool.")  # a ViT's own end, which the mean of its patches bypasses


@dataclass
class Network:
    """A classifier before its first step."""

    model: Any  # timm's
    image_size: tuple[int, int]  # (height, width) that it takes
    fresh: list[str]  # parameters that begin from nothing
    dropped: list[str]  # pre-trained parameters that have no place in it
    fixed_size: bool  # whether it takes this size only
    notes: list[str]  # sentences for the user


def make_classifier(opened: OpenedModel, classes: int, drop_path: float, seed: int) -> Network:
    """The model's own timm architecture with its weights and a fresh head.

    A ViT is read as MFM reads it: the mean of the patch tokens through a fresh normalization (``fc_norm``), its
    pre-trained final one left out; the head is normal with std 0.02, cut at two, times 0.001. Other families
    keep their own end, with timm's initialization of the head.

    Raises:
        UserError: the architecture has no classifier, or its weights do not fit.
    """
    with torch_seeded(seed):
        model, notes = _create(opened, classes, drop_path)
        head = model.get_classifier()
        if opened.backbone.is_vit and isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=HEAD_STD)
            with torch.no_grad():
                head.weight.mul_(HEAD_SCALE)
                head.bias.zero_()
    fresh, dropped = _load(model, opened)
    backbone = opened.backbone
    size = backbone.padded_size if backbone.fixed_size else backbone.image_size
    try:
        train_reached(model, lambda: [model(torch.zeros(1, backbone.channels, *size))])
    except (AssertionError, RuntimeError, ValueError) as error:
        raise cannot(opened.name, f"images of {tuple(size)}", error) from error
    return Network(model.train(), size, fresh, dropped, backbone.fixed_size, notes)


def _create(opened: OpenedModel, classes: int, drop_path: float) -> tuple[Any, list[str]]:
    module = opened.module
    architecture = str(module.pretrained_cfg["architecture"])
    taken = inspect.signature(type(module).__init__).parameters
    norm = next((name for name in ("fc_norm", "use_fc_norm") if name in taken), None)
    is_pooled = opened.backbone.is_vit and norm is not None and "global_pool" in taken
    pooling: dict[str, Any] = {"global_pool": "avg", str(norm): True} if is_pooled else {}
    arguments = {**get_model_args(module), **pooling, "num_classes": classes}
    try:
        return timm.create_model(architecture, drop_path_rate=drop_path, **arguments), []
    except TypeError as error:
        refused = REFUSED.search(str(error))
        if refused is None or refused[1] != "drop_path_rate":
            raise cannot(architecture, f"{classes} classes with {arguments}", error) from error
    except (AssertionError, RuntimeError, ValueError) as error:
        raise cannot(architecture, f"{classes} classes with {arguments}", error) from error
    notes = [f"drop path is off: {architecture} does not take it"] if drop_path else []
    return timm.create_model(architecture, **arguments), notes


def _load(model: Any, opened: OpenedModel) -> tuple[list[str], list[str]]:
    ours, theirs = model.state_dict(), opened.module.state_dict()
    end = model.get_classifier()  # one layer, or several
    ends = [part for part in (end if isinstance(end, tuple) else (end,)) if isinstance(part, nn.Module)]
    if not any(list(part.parameters()) for part in ends):
        raise UserError(f"model ({type(model).__name__}) has no classifier in timm; take another backbone")
    head = {id(tensor) for part in ends for tensor in part.state_dict(keep_vars=True).values()}
    heads = {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in head}
    fresh = [name for name in ours if name not in theirs]
    dropped = [name for name in theirs if name not in ours]
    lost = [name for name in fresh if name not in heads and not name.startswith("fc_norm.")]
    lost += [name for name in dropped if not name.startswith(_DROPPED)]
    lost += [name for name in ours if name in theirs and ours[name].shape != theirs[name].shape]
    if lost:
        shapes = ", ".join(f"{name} {_shape(theirs, name)} -> {_shape(ours, name)}" for name in lost[:3])
        raise UserError(
            f"model ({opened.name}): {len(lost)} of its parameters do not fit a classifier of the same "
            f"architecture ({shapes}); export it again, or take another model"
        )
    model.load_state_dict({name: tensor for name, tensor in theirs.items() if name in ours}, strict=False)
    return fresh, dropped


def standardize_features(model: Any) -> None:
    """Puts batch norm without weights before a classifier's linear head, in place."""
    name = model.pretrained_cfg["classifier"]
    head = model.get_submodule(name)
    model.set_submodule(name, nn.Sequential(nn.BatchNorm1d(head.in_features, affine=False), head))


@torch.no_grad()
def without_head_norm(model: Any) -> Any:
    """A copy whose head takes the features as they are, as timm's does, to the logits by the running statistics."""
    model, name = copy.deepcopy(model), model.pretrained_cfg["classifier"]
    norm, head = model.get_submodule(name)
    head.weight.mul_((norm.running_var + norm.eps).rsqrt())
    head.bias.sub_(head.weight @ norm.running_mean)
    model.set_submodule(name, head)
    return model


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return "x".join(map(str, state[name].shape)) or "scalar" if name in state else "nothing"


@dataclass(frozen=True, kw_only=True)
class Published:
    """The numbers of a publication; the defaults are what both ResNet strikes back procedures below share."""

    words: str  # whose they are
    optimizer: str = "lamb"  # adamw or lamb
    loss: str = "binary"  # cross_entropy (soft targets) or binary (a yes or no for each class)
    lr: float  # peak learning rate at ``lr_batch`` images a step
    lr_batch: int = 2048
    lr_rule: str = "sqrt"  # how ``lr`` follows another batch: linear, or sqrt as timm does for LAMB
    min_lr: float = 1e-6  # at the end, at that batch
    warmup_lr: float = 1e-4  # at the first step, at that batch
    epochs: float
    warmup_epochs: float = 5.0
    weight_decay: float = 0.02
    layer_decay: float = 1.0  # 1 is none
    drop_path: float
    mixup: float = 0.1  # alpha
    cutmix: float = 1.0  # alpha
    smoothing: float = 0.0
    augment: str  # RandAugment, as timm writes it
    erasing: float = 0.0  # probability that a rectangle is replaced by noise
    crop_share: float = 0.95  # of the side that the centered test window keeps
    train_share: float = 1.0  # side of the training images over that of the test images

    def scaled(self, rate: float, batch_size: int) -> float:
        """A learning rate of this recipe at another batch."""
        ratio = batch_size / self.lr_batch
        return rate * (math.sqrt(ratio) if self.lr_rule == "sqrt" else ratio)


PUBLISHED = {
    # MFM's fine-tuning of a ViT (docs/evaluating.md, Fine-tuning); its ViT-S had 200 epochs.
    "vit": Published(
        words="MFM's recipe for a ViT",
        optimizer="adamw",
        loss="cross_entropy",
        lr=2e-3,
        lr_batch=512,
        lr_rule="linear",
        min_lr=2.5e-7,
        warmup_lr=2.5e-7,
        epochs=100.0,
        weight_decay=0.05,
        layer_decay=0.8,
        drop_path=0.1,
        mixup=0.8,
        smoothing=0.1,
        augment="rand-m9-mstd0.5-inc1",
        erasing=0.25,
        crop_share=224 / 256,
    ),
    # ResNet strikes back (Wightman, Touvron, Jegou 2021), table 2, procedures A3 and A2.
    "a3": Published(
        words="RSB A3",
        lr=8e-3,
        epochs=100.0,
        drop_path=0.0,
        augment="rand-m6-mstd0.5-inc1",
        train_share=160 / 224,
    ),
    "a2": Published(
        words="RSB A2 (without its repeated augmentation)",
        lr=5e-3,
        epochs=300.0,
        drop_path=0.05,
        augment="rand-m7-mstd0.5-inc1",
    ),
}
SMALL_SIDE = 96  # pixels; below it, what was published for 224 hides too much of an image
# What replaces the published numbers below SMALL_SIDE pixels (docs/evaluating.md, Fine-tuning).
SMALL_IMAGES = {
    "augment": "rand-m5-mstd0.5-inc1",
    "erasing": 0.1,
    "crop_scale": [0.5, 1.0],
    "crop_share": 1.0,
}
# Below it a head begins as logistic regression, and a CNN learns as a ViT; its images and small ones are not mixed
# (docs/log.md, Fine-tuning).
FEW_IMAGES = 10_000
# Experience (docs/log.md, Fine-tuning): networks smaller than this want more than the published learning rate.
TINY_LR_BATCH = 128
# Their features differ a hundredfold in how much they vary, so they are standardized before the head. Fewer images at
# once say too little of that, and after fewer steps the running statistics are still those of the beginning.
STANDARDIZED_FROM_IMAGES, STANDARDIZED_FROM_STEPS = 16, 50
# Statistics of so few images at once are noise beside those of a pre-training (docs/log.md, Fine-tuning).
NORM_FROZEN_BELOW = 64
CROP_SCALE = [0.08, 1.0]  # timm's, which all these recipes use
HELD_OUT_FROM, HELD_OUT_SHARE, HELD_OUT_MOST = 2_000, 0.1, 2_000  # images
VALIDATIONS = 20  # a run
# The options that decide what a fine-tuning becomes; a run that is resumed must have been asked for the same.
DECIDING = (
    *("recipe", "shots", "epochs", "steps", "batch_size", "lr", "min_lr", "warmup_epochs", "weight_decay"),
    *("layer_decay", "drop_path", "mixup", "cutmix", "smoothing", "augment", "erasing", "crop_scale", "flip"),
    *("crop_share", "train_size", "ema", "held_out", "precision", "image_size", "value_range", "weights"),
)
_AUGMENT = re.compile(r"rand(-(mstd|mmax|inc|m|n|p)\d+(\.\d+)?)+")


@dataclass(frozen=True, kw_only=True)
class Tuning(TrainingNumbers):
    """One fine-tuning without any ``auto``, as its ``config.yaml`` records it."""

    recipe: str  # vit, a3 or a2
    optimizer: str  # adamw or lamb
    loss: str  # cross_entropy or binary
    image_size: list[int]  # (height, width) that the classifier is tested at
    train_size: list[int]  # (height, width) that it is trained at
    min_lr: float  # at the end
    warmup_lr: float  # at the first step
    mixup: float  # alpha, 0 for none
    cutmix: float  # alpha, 0 for none
    smoothing: float
    augment: str  # RandAugment as timm writes it, or none
    erasing: float  # probability
    crop_scale: list[float]  # smallest and largest share of the area in a random crop
    crop_share: float  # of the side in the centered test window
    ema: float | None  # decay of the moving average that is tested instead of the weights; None for none
    # None in runs of 0.1.0, which had none of them
    head_norm: bool | None  # features go through batch norm before the head
    head_fitted: bool | None  # the head begins as logistic regression on frozen features
    norm_frozen: bool | None  # batch norm keeps the statistics of its pre-training
    held_out: float  # share of the training images on which accuracy is measured
    validate_every_steps: int

    @staticmethod
    def check_parts(numbers: Mapping[str, Any]) -> None:
        batch, devices, parts = (int(numbers[name]) for name in ("batch_size", "devices", "accumulate"))
        images, rest = divmod(batch, devices * parts)
        if rest or (images % 2 and (numbers["mixup"] or numbers["cutmix"])):
            raise UserError(
                f"batch_size ({batch}) must give every device and part the same even number of images, because images "
                f"are mixed in pairs (devices {devices}, accumulate {parts}); change it, or give --mixup 0 --cutmix 0"
            )


def problems(options: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the options of a fine-tuning."""
    if options.get("shots") is not None:
        parse_shots([str(options["shots"])])
    if options["augment"] not in (AUTO, NO_AUGMENT) and not _AUGMENT.fullmatch(str(options["augment"])):
        yield f"augment ({options['augment']}) must be auto, none, or as timm writes it: rand-m9-mstd0.5-inc1"
    scale = options["crop_scale"]
    if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        yield f"crop_scale ({scale}) must be two shares of the area, such as 0.08 1"


def held_out_share(asked: Any, images: int) -> float:
    """The share of the training images on which accuracy is measured: a tenth, at most 2,000, none of few."""
    if asked not in (None, AUTO):
        return float(asked)
    return 0.0 if images < HELD_OUT_FROM else round(min(HELD_OUT_SHARE, HELD_OUT_MOST / images), 4)


@dataclass
class FinetunePlan(Plan):
    """The numbers of one fine-tuning as they come together."""

    held_out: float = field(kw_only=True)  # share of the training images

    def resolve(self) -> Tuning:
        """Every number.

        Raises:
            UserError: options that do not fit the model, the images or the machine.
        """
        asked, size = self.asked, self.network.image_size
        opened = self.job.model.opened
        self.small = min(size) < SMALL_SIDE
        few, cnn = self.images < FEW_IMAGES, opened.backbone.is_cnn
        why_few = f"fewer than {FEW_IMAGES:,} images"
        usual = ("a3", "a CNN") if cnn and not few else ("vit", why_few if cnn else "it has attention")
        self.take("recipe", *usual)
        published = self.published = PUBLISHED[self.values["recipe"]]
        self.values |= {
            "optimizer": published.optimizer,
            "loss": published.loss,
            "held_out": self.held_out,
            "ema": asked["ema"],
            "image_size": list(size),
        }
        self.take_model()
        self._take_views()
        device = self.take_machine(num_nodes=1, strategy=asked["strategy"])
        light = max(self.job.survey.median_size) <= SMALL_SIDE and auto.usable_cores() <= 4
        if self.values["workers"] and asked["workers"] == AUTO and device.type == "cpu" and light:
            self.values["workers"] = 0
            self.reasons["workers"] = "small images load faster than they travel"
        unmixed = few and (self.small or cnn) and published is PUBLISHED["vit"]
        for name in ("weight_decay", "layer_decay", "drop_path", "mixup", "cutmix", "smoothing"):
            if unmixed and name in ("mixup", "cutmix"):
                self.take(name, 0.0, why_few)
            else:
                self.take(name, getattr(published, name), published.words)
        self._take_length()
        self._take_rates()
        head = self.network.model.get_classifier()
        is_linear = isinstance(head, nn.Linear) and head.bias is not None
        self.values["head_norm"] = is_linear and self._standardizes()
        norms, fresh = batch_norms(self.network.model), opened.kind == "random"
        # fresh weights with batch norm learn less from a fitted head than from a fresh one (docs/log.md, Fine-tuning)
        fitted = is_linear and self.images < FEW_IMAGES and not (norms and fresh)
        little = images_at_once(self.values) < NORM_FROZEN_BELOW
        self.values |= {"head_fitted": fitted, "norm_frozen": fitted and little and bool(norms)}
        every, steps = asked["validate_every_epochs"], self.values["steps"] // VALIDATIONS
        if every not in (None, AUTO):
            steps = round(every * self.images / self.values["batch_size"])
        self.values["validate_every_steps"] = max(steps, 1)
        self.take_records(self.CHECKPOINTS)
        return Tuning(**self.values)

    def _take_views(self) -> None:
        """How training images are cut and changed."""
        published, values = self.published, self.values
        for name in ("augment", "erasing", "crop_scale", "crop_share"):
            usual = CROP_SCALE if name == "crop_scale" else getattr(published, name)
            if self.small and not (name in ("augment", "erasing") and usual in (NO_AUGMENT, 0.0)):
                self.take(name, SMALL_IMAGES[name], f"images below {SMALL_SIDE} pixels")
            else:
                self.take(name, usual, published.words)
        values["crop_scale"] = list(values["crop_scale"])
        fixed, size = self.network.fixed_size, list(self.network.image_size)
        share = 1.0 if self.small or fixed else published.train_share
        usual = [max(32, round(side * share / 32) * 32) for side in size] if share < 1 else size
        self.take("train_size", usual, published.words if share < 1 else "that of the test")
        chosen = values["train_size"]
        values["train_size"] = [chosen, chosen] if isinstance(chosen, int) else list(chosen)
        if fixed and values["train_size"] != size:
            raise UserError(
                f"train_size ({chosen}) must be the {size[0]}x{size[1]} pixels that {self.job.model.name} is built "
                "for; leave it out, or give --image_size"
            )
        colors = set(self.job.survey.dtypes) == {"uint8"} and values["value_range"] in ("dtype", "0,255")
        if values["augment"] == NO_AUGMENT or (colors and values["channels"] == 3):
            return
        if self.asked["augment"] not in (None, AUTO):
            raise UserError(
                f"augment ({values['augment']}) must be none: RandAugment is for 8-bit color images, and these have "
                f"{values['channels']} channels of {'/'.join(map(str, self.job.survey.dtypes))}"
            )
        values["augment"] = NO_AUGMENT
        self.reasons["augment"] = "RandAugment is for 8-bit color images"

    def _take_length(self) -> None:
        """Batch, parts and steps, from what an image costs."""
        values, asked, published = self.values, self.asked, self.published
        shape, images = (values["channels"], *values["train_size"]), self.images
        largest = auto.largest_batch(values["accelerator"], images)
        _, trial = self.take_cost(self.network.model, shape, _trial_loss, largest)
        part, rest = self.take_batch(lambda cost, *machine: auto.choose_batch_size(cost, images, *machine))
        batch = int(values["batch_size"])
        if part == 1 and not rest:
            check_single_image(trial, str(self.job.model.opened.name))
        Tuning.check_parts(values)
        epochs = published.epochs if asked["epochs"] is None else float(asked["epochs"])
        steps = max(math.ceil(epochs * images / batch), 1)
        self.take("steps", steps, f"{epochs:g} epochs, {published.words}" if asked["epochs"] is None else "")
        epochs = values["steps"] * batch / images
        usual = min(published.warmup_epochs, epochs / 20)
        warmup = usual if asked["warmup_epochs"] in (None, AUTO) else float(asked["warmup_epochs"])
        if warmup == usual:
            whole = f"{published.warmup_epochs:g} epochs, as published"
            self.reasons["warmup_steps"] = "a twentieth" if usual < published.warmup_epochs else whole
        values["warmup_steps"] = min(round(warmup * images / batch), values["steps"] - 1)

    @cached_property
    def _is_tiny(self) -> bool:
        return sum(parameter.nelement() for parameter in self.network.model.parameters()) < auto.TINY_WEIGHTS

    def _standardizes(self) -> bool:
        is_known = self.published is PUBLISHED["vit"] and self.job.model.opened.backbone.is_vit
        enough = images_at_once(self.values) >= STANDARDIZED_FROM_IMAGES
        return is_known and self._is_tiny and enough and self.values["steps"] >= STANDARDIZED_FROM_STEPS

    def _take_rates(self) -> None:
        values, published, batch = self.values, self.published, int(self.values["batch_size"])
        rate, of = published.scaled(published.lr, batch), f"batch/{published.lr_batch}"
        if published.lr_rule == "sqrt":
            self.take("lr", rate, f"{published.lr:g} x sqrt({of})")
        elif not self._is_tiny:
            self.take("lr", rate, f"{published.lr:g} x {of}")
        else:
            rate = published.lr * batch / TINY_LR_BATCH
            self.take("lr", rate, f"{published.lr:g} x batch/{TINY_LR_BATCH}, {auto.MORE_FOR_TINY}")
        peak = float(values["lr"])
        self.take("min_lr", min(published.scaled(published.min_lr, batch), peak), published.words)
        values["warmup_lr"] = min(published.scaled(published.warmup_lr, batch), peak)
        if self.asked["min_lr"] not in (None, AUTO) and float(values["min_lr"]) > peak:
            raise UserError(f"min_lr ({values['min_lr']:g}) must be at most lr ({peak:g})")

    def lines(self, tuning: Tuning, network: Network, held_out: int) -> Iterator[str]:
        """The plan of a new fine-tuning: its numbers, its classifier with drop path, images held out."""
        why, (height, width) = self.why, tuning.image_size
        left_out = f"; left out: {_names(network.dropped)}" if network.dropped else ""
        yield f"model       {self.job.model.name} at {height}x{width} pixels, fresh: {_names(network.fresh)}{left_out}"
        for note in network.notes:
            yield f"            {note}"
        held = f"{held_out:,} held out to be watched" if held_out else "none held out"
        yield f"images      {self.images:,} for training, {held}; the test images are used once, at the end"
        yield f"recipe      {self.published.words}{why('recipe')}"
        if tuning.head_norm:
            yield f"            features standardized before the head ({auto.MORE_FOR_TINY})"
        if tuning.head_fitted:
            why_fitted = f"fewer than {FEW_IMAGES:,} images"
            yield f"            the head begins as logistic regression on frozen features ({why_fitted})"
        if tuning.norm_frozen:
            why_frozen = f"fewer than {NORM_FROZEN_BELOW} images at once"
            yield f"            batch norm keeps the statistics of its pre-training ({why_frozen})"
        optimizer = "AdamW" if tuning.optimizer == "adamw" else "LAMB"
        average = f", moving average {tuning.ema:g}" if tuning.ema else ""
        end = f"cosine to {tuning.min_lr:.2g}{average}"
        yield from self.length_lines(tuning, "images", optimizer, end)
        (low, high), size = tuning.crop_scale, "x".join(map(str, tuning.train_size))
        mirrored = f"{'mirrored half of the time' if tuning.flip else 'never mirrored'}{why('flip')}"
        yield f"views       crops of {low:g} to {high:g} of the area{why('crop_scale')} at {size}, {mirrored}"
        augment = "no RandAugment" if tuning.augment == NO_AUGMENT else tuning.augment
        yield f"            {augment}{why('augment')}, erasing {tuning.erasing:g}{why('erasing')}"
        yield (
            f"            mixup {tuning.mixup:g}{why('mixup')}, cutmix {tuning.cutmix:g}{why('cutmix')}, "
            f"smoothing {tuning.smoothing:g}"
        )
        yield f"            tested on the centered {tuning.crop_share:.3g} of the side{why('crop_share')}"
        yield from self.machine_lines(tuning)


def _trial_loss(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    logits = model(images)
    classes = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return torch.nn.functional.cross_entropy(logits, classes, reduction="sum")


def _names(parameters: list[str]) -> str:
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[0] for name in parameters)) or "nothing"
