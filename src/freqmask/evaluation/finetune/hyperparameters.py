"""Published ways to fine-tune, the numbers of one training, and what is wrong with the options that set them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from freqmask.errors import UserError
from freqmask.evaluation.eval_model import PIXELS
from freqmask.evaluation.fewshot import parse_shots
from freqmask.evaluation.finetune.classifier import NO_AUGMENT
from freqmask.evaluation.trainings import AUTO, TrainingNumbers
from freqmask.options.of_evaluation import FineTuned, FineTuning

SMALL_SIDE = 96  # pixels; below it, what was published for 224 hides too much of a picture


@dataclass(frozen=True)
class Published:
    """The numbers of a publication.

    Attributes:
        words: whose they are.
        optimizer: ``adamw`` or ``lamb``.
        loss: ``cross_entropy`` (soft targets) or ``binary`` (a yes or no for each class).
        lr: peak learning rate at ``lr_batch`` images a step.
        lr_batch: the batch that ``lr`` is stated for.
        lr_rule: how ``lr`` follows another batch: ``linear``, or ``sqrt`` as timm does for LAMB.
        min_lr: learning rate at the end, at that batch.
        warmup_lr: learning rate at the first step, at that batch.
        epochs: passes over the images.
        warmup_epochs: of linear warm-up.
        weight_decay: on weights with two dimensions or more.
        layer_decay: factor on the learning rate from a layer to the one below; 1 is none.
        drop_path: share of the residual branches that is dropped in the last block.
        mixup: alpha of mixup.
        cutmix: alpha of cutmix.
        smoothing: of the labels.
        augment: RandAugment, as timm writes it.
        erasing: probability that a rectangle is replaced by noise.
        crop_share: share of the side that the centred test window keeps.
        train_share: side of the training pictures over that of the test pictures.
    """

    words: str
    optimizer: str
    loss: str
    lr: float
    lr_batch: int
    lr_rule: str
    min_lr: float
    warmup_lr: float
    epochs: float
    warmup_epochs: float
    weight_decay: float
    layer_decay: float
    drop_path: float
    mixup: float
    cutmix: float
    smoothing: float
    augment: str
    erasing: float
    crop_share: float
    train_share: float = 1.0

    def scaled(self, rate: float, batch_size: int) -> float:
        """A learning rate of this recipe at another batch."""
        ratio = batch_size / self.lr_batch
        return rate * (math.sqrt(ratio) if self.lr_rule == "sqrt" else ratio)


# MFM's fine-tuning of a ViT (docs/evaluating.md, Fine-tuning); its ViT-S had 200 epochs.
_VIT = Published(
    "MFM's recipe for a ViT",
    "adamw",
    "cross_entropy",
    lr=2e-3,
    lr_batch=512,
    lr_rule="linear",
    min_lr=2.5e-7,
    warmup_lr=2.5e-7,
    epochs=100.0,
    warmup_epochs=5.0,
    weight_decay=0.05,
    layer_decay=0.8,
    drop_path=0.1,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    augment="rand-m9-mstd0.5-inc1",
    erasing=0.25,
    crop_share=224 / 256,
)
# ResNet strikes back (Wightman, Touvron, Jegou 2021), table 2, procedures A3 and A2.
_A3 = Published(
    "RSB A3",
    "lamb",
    "binary",
    lr=8e-3,
    lr_batch=2048,
    lr_rule="sqrt",
    min_lr=1e-6,
    warmup_lr=1e-4,
    epochs=100.0,
    warmup_epochs=5.0,
    weight_decay=0.02,
    layer_decay=1.0,
    drop_path=0.0,
    mixup=0.1,
    cutmix=1.0,
    smoothing=0.0,
    augment="rand-m6-mstd0.5-inc1",
    erasing=0.0,
    crop_share=0.95,
    train_share=160 / 224,
)
_A2 = Published(
    "RSB A2 (without its repeated augmentation)",
    "lamb",
    "binary",
    lr=5e-3,
    lr_batch=2048,
    lr_rule="sqrt",
    min_lr=1e-6,
    warmup_lr=1e-4,
    epochs=300.0,
    warmup_epochs=5.0,
    weight_decay=0.02,
    layer_decay=1.0,
    drop_path=0.05,
    mixup=0.1,
    cutmix=1.0,
    smoothing=0.0,
    augment="rand-m7-mstd0.5-inc1",
    erasing=0.0,
    crop_share=0.95,
)
PUBLISHED = {"vit": _VIT, "a3": _A3, "a2": _A2}
# What replaces the published numbers below SMALL_SIDE pixels (docs/evaluating.md, Fine-tuning).
SMALL_PICTURES = {
    "augment": "rand-m5-mstd0.5-inc1",
    "erasing": 0.1,
    "crop_scale": [0.5, 1.0],
    "crop_share": 1.0,
}
FEW_IMAGES = 10_000  # below it, small pictures are not mixed (docs/log.md, Fine-tuning)
# Experience (docs/log.md, Fine-tuning): networks smaller than this want more than the published learning rate.
TINY_WEIGHTS, TINY_LR_BATCH = 8_000_000, 128
CROP_SCALE = [0.08, 1.0]  # timm's, which all these recipes use


@dataclass(frozen=True, kw_only=True)
class Tuning(TrainingNumbers):
    """One fine-tuning without any ``auto``, as its ``config.yaml`` records it.

    Attributes:
        recipe: vit, a3 or a2.
        optimizer: adamw or lamb.
        loss: cross_entropy or binary.
        image_size: (height, width) that the classifier sees when it is tested.
        train_size: (height, width) that it sees while it learns.
        min_lr: at the end.
        warmup_lr: at the first step.
        mixup: alpha, 0 for none.
        cutmix: alpha, 0 for none.
        smoothing: of the labels.
        augment: RandAugment as timm writes it, or none.
        erasing: probability.
        crop_scale: smallest and largest share of the area in a random crop.
        crop_share: share of the side in the centred test window.
        ema: decay of the moving average that is tested instead of the weights themselves; None for none.
        held_out: share of the training images on which accuracy is watched.
        validate_every_steps: how often.
    """

    recipe: str
    optimizer: str
    loss: str
    image_size: list[int]
    train_size: list[int]
    min_lr: float
    warmup_lr: float
    mixup: float
    cutmix: float
    smoothing: float
    augment: str
    erasing: float
    crop_scale: list[float]
    crop_share: float
    ema: float | None
    held_out: float
    validate_every_steps: int

    @property
    def mixes(self) -> bool:
        """Whether pictures are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0


def tuning_of(config: dict[str, Any]) -> Tuning:
    """The training that a run's ``config.yaml`` records."""
    return Tuning(**{name: config.get(name) for name in Tuning.__dataclass_fields__})  # type: ignore[arg-type]


# The options that decide what a fine-tuning becomes; a run that goes on must have been asked for the same.
DECIDING = (
    *("recipe", "shots", "epochs", "steps", "batch_size", "lr", "min_lr", "warmup_epochs", "weight_decay"),
    *("layer_decay", "drop_path", "mixup", "cutmix", "smoothing", "augment", "erasing", "crop_scale", "flip"),
    *("crop_share", "train_size", "ema", "held_out", "precision", "image_size", "value_range", "weights"),
)
_AUGMENT = re.compile(r"rand(-(mstd|mmax|inc|m|n|p)\d+(\.\d+)?)+")


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a fine-tuning where a command has some of them only: the others are ``auto``."""
    return {**asdict(FineTuning()), **asdict(FineTuned()), "shots": None, "keep_checkpoints": 1, **options}


def check_tuning(options: Mapping[str, Any]) -> None:
    """Raises a UserError with all that is wrong with the options."""
    problems = list(_problems(options))
    if problems:
        raise UserError("; ".join(problems))


def _problems(options: Mapping[str, Any]) -> Iterator[str]:
    if PIXELS in options["model"]:
        yield "model (pixels) must have weights to be fine-tuned; random:NAME is the supervised baseline"
    if options.get("shots") is not None:
        parse_shots([str(options["shots"])])
    if options["augment"] not in (AUTO, NO_AUGMENT) and not _AUGMENT.fullmatch(str(options["augment"])):
        yield f"augment ({options['augment']}) must be auto, none, or as timm writes it: rand-m9-mstd0.5-inc1"
    scale = options["crop_scale"]
    if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        yield f"crop_scale ({scale}) must be two shares of the area, such as 0.08 1"
