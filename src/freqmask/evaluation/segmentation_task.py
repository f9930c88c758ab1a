"""Segmentation as a task of the loop: its numbers, its module, its data, and its job.

The published numbers are BEiT's for ADE20K with self-supervised weights
(https://github.com/microsoft/unilm, upernet_beit_base_12_512_slide_160k_ade20k_pt): 160,000 steps of 16 crops of
512 pixels out of 20,210 images, AdamW (0.9, 0.999), learning rate 7e-4, linear decay after 1,500 steps of warm-up,
weight decay 0.05, layer decay 0.65, drop path 0.1; windows of 512 every 341 pixels. CNNs and hierarchical networks
get 1e-4 and no layer decay (as UperNet on ConvNeXt, roughly), and fresh weights none either.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from timm.layers.drop import DropPath
from timm.models import get_model_args
from torch import Tensor, nn

from freqmask.backbones import Backbone
from freqmask.console import readable_time, say
from freqmask.data.source import Source
from freqmask.data.values import Survey, ValueRange
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import BackboneModel, open_eval_model
from freqmask.evaluation.mask_data import SegmentationData
from freqmask.evaluation.mask_files import PairDataset, RandomCrop
from freqmask.evaluation.trainings import (
    AUTO,
    CHECKPOINTS,
    Plan,
    TrainingJob,
    TrainingNumbers,
    check_no_problems,
    layer_groups,
    make_adamw,
    make_task,
)
from freqmask.evaluation.upernet import UperNet, segmentation_losses
from freqmask.images import as_float
from freqmask.interop.models import OpenedModel, open_model
from freqmask.interop.weight_files import check_weights, write_tensors
from freqmask.training.auto import Choice
from freqmask.training.loop import ScheduledModule, Task
from freqmask.training.optim import Schedule, parameter_groups, scaled_lr
from freqmask.training.run_folder import RunFolder, comparable

NETWORK = "network.safetensors"
BATCH, STEPS, IMAGES, WARMUP = 16, 160_000, 20_210, 1_500
LR, LR_OTHERS, WEIGHT_DECAY, LAYER_DECAY, DROP_PATH = 7e-4, 1e-4, 0.05, 0.65, 0.1
CROP, CROP_ON_CPU = 512, 224
SCALE = (0.5, 2.0)
STRIDE_SHARE = 341 / 512  # of the window
_BEIT = "as BEiT on ADE20K"
# The options that decide what a network becomes.
DECIDING = (
    *("crop", "image_size", "scale", "flip", "steps", "epochs", "batch_size", "lr", "warmup_steps"),
    *("weight_decay", "layer_decay", "drop_path", "decoder_channels", "precision", "value_range", "weights"),
)


@dataclass(frozen=True, kw_only=True)
class Training(TrainingNumbers):
    """Every number of one training."""

    crop: int  # side of the training samples, and of the windows of an evaluation, in pixels
    image_size: int | None  # shorter side that images are brought to first; None leaves them as they are
    scale: tuple[float, float]  # smallest and largest random factor on the image
    decoder_channels: int


def check_options(options: Mapping[str, Any]) -> None:
    """Raises a UserError with all that is wrong with the options."""
    check_no_problems(options["model"], "trained on", "baseline", _problems(options))


def _problems(options: Mapping[str, Any]) -> Iterator[str]:
    scale, crop, stride = options["scale"], options["crop"], options["stride"]
    if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1]):
        yield f"scale ({scale}) must be the smallest and the largest factor on the image, such as 0.5 2"
    if isinstance(stride, int) and isinstance(crop, int) and stride > crop:
        yield f"stride ({stride}) must be at most crop ({crop}), or windows would leave gaps"


def choose_crop(asked: Mapping[str, Any], survey: Survey) -> Choice:
    """Side of the samples: BEiT's 512, less for smaller images and on a CPU; a multiple of 32."""
    if asked["crop"] not in (None, AUTO):
        return Choice(int(asked["crop"]), "as asked")
    on_gpu = torch.cuda.is_available() and asked["accelerator"] != "cpu"
    shorter, most = min(survey.median_size), CROP if on_gpu else CROP_ON_CPU
    side = max(32, min(most, shorter) // 32 * 32)
    if side < most:
        return Choice(side, f"the median shorter side is {shorter}")
    return Choice(side, _BEIT if on_gpu else "training runs on the CPU")


def open_for_training(text: str, survey: Survey, seed: int, asked: Mapping[str, Any]) -> BackboneModel:
    """MODEL for samples of the crop's size, with drop path; one that takes any size stays able to."""
    rate = DROP_PATH if asked["drop_path"] in (None, AUTO) else float(asked["drop_path"])
    model = open_eval_model(
        text,
        survey,
        seed=seed,
        image_size=choose_crop(asked, survey).value,
        weights=asked["weights"],
        value_range=asked["value_range"],
        optional_model_args={"drop_path_rate": rate, "dynamic_img_size": True},
    )
    assert isinstance(model, BackboneModel)  # pixels were refused
    deep = len(model.opened.module.feature_info) > 1  # the first block of all never drops
    if rate and deep and asked["drop_path"] not in (None, AUTO) and not _drops_paths(model.opened.module):
        raise UserError(f"drop_path ({asked['drop_path']}) must be left out: {text} does not take it")
    return model


def _drops_paths(model: nn.Module) -> bool:
    return any(isinstance(part, DropPath) for part in model.modules())


@dataclass
class SegmentationPlan(Plan):
    """The numbers of one training as they come together."""

    def resolve(self) -> Training:
        """Every number.

        Raises:
            UserError: numbers do not fit each other.
        """
        values = self.values
        self.take_model()
        values["crop"], self.reasons["crop"] = choose_crop(self.asked, self.job.survey)
        values["image_size"] = self.asked["image_size"]
        values["decoder_channels"] = self.network.decoder_channels
        self.take("scale", SCALE, _BEIT)
        self.take_machine(num_nodes=1, strategy="auto")
        if int(values["devices"]) > 1:
            values["strategy"] = "ddp"
        self._take_length()
        self._take_rates()
        self.take_records(CHECKPOINTS)
        return Training.read(values)

    def _take_length(self) -> None:
        values, asked, side = self.values, self.asked, int(self.values["crop"])
        self.take_cost(self.network, (values["channels"], side, side), _trial_loss, images=2)
        part, rest = self.take_batch(lambda *_: Choice(BATCH, _BEIT))
        batch = int(values["batch_size"])
        if rest or part < 2:
            raise UserError(
                f"batch_size ({batch}) over {values['devices']} devices in {values['accumulate']} parts must leave two "
                "images or more at once, because the decoder has batch norm; take a larger batch_size or a smaller crop"
            )
        epochs = asked["epochs"] or STEPS * BATCH / IMAGES
        usual = min(math.ceil(epochs * self.images / batch), STEPS)
        self.take("steps", max(usual, 1), "" if asked["epochs"] else f"{epochs:.0f} epochs, {_BEIT}")
        warmup = max(round(values["steps"] * WARMUP / STEPS), 1)
        self.take("warmup_steps", warmup, f"{WARMUP:,} of {STEPS:,}, {_BEIT}")
        values["warmup_steps"] = min(values["warmup_steps"], values["steps"] - 1)

    def _take_rates(self) -> None:
        plain = self.network.pyramid.is_plain
        base = LR if plain else LR_OTHERS
        self.take("lr", scaled_lr(base, int(self.values["batch_size"]), BATCH), f"{base:g} x batch/{BATCH}")
        self.take("weight_decay", WEIGHT_DECAY, _BEIT)
        if self.job.model.kind == "random":
            self.take("layer_decay", 1.0, "fresh weights have nothing to keep")
        else:
            self.take("layer_decay", LAYER_DECAY if plain else 1.0, _BEIT if plain else "no plain ViT")
        self.take("drop_path", DROP_PATH, _BEIT)
        if not _drops_paths(self.network.pyramid.backbone.timm_model):
            self.values["drop_path"] = 0.0

    def lines(self, training: Training) -> Iterator[str]:
        """The plan of a new training."""
        pyramid, (low, high) = self.network.pyramid, training.scale
        stages = ", ".join(str(stage + 1) for stage in pyramid.stages)
        yield (
            f"model       {self.job.model.name}, {'blocks' if pyramid.is_plain else 'stages'} {stages}; UperNet of "
            f"{training.decoder_channels} channels"
        )
        size = (
            "as large as they are" if training.image_size is None else f"shorter side {training.image_size}"
        )
        mirrored = "mirrored half of the time" if training.flip else "never mirrored"
        yield (
            f"samples     crops of {training.crop} pixels{self.why('crop')}, images {size}, times {low:g} to {high:g}, "
            f"{mirrored}"
        )
        yield from self.length_lines(training, "samples", "AdamW", "linear to 0")
        yield from self.machine_lines(training)


def _trial_loss(network: UperNet, samples: Tensor) -> Tensor:
    masks = torch.zeros(len(samples), *samples.shape[2:], dtype=torch.int64, device=samples.device)
    return segmentation_losses(network(samples), masks)["loss"]


class SegmentationModule(ScheduledModule):
    """Trains backbone and decoder."""

    def __init__(self, network: UperNet, training: Training) -> None:
        super().__init__()
        self.network = network
        self.training_numbers = training

    def training_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """One part of an optimizer step: the losses of both heads."""
        images, masks = batch["views"]
        losses = segmentation_losses(self.network(as_float(images)), masks.long())
        self.check(losses["loss"])
        return losses

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW: the backbone's layers at learning rates of their own, all that is new at the whole one."""
        numbers = self.training_numbers
        optimizer = make_adamw(groups_of(self.network, numbers), numbers.lr, self.device)
        # linear warm-up, then linear decay to nothing (poly of power 1)
        self.schedule = Schedule(optimizer, numbers.optim(0.0, numbers.lr * 1e-6, power=1.0))
        return optimizer


def groups_of(network: UperNet, training: Training) -> list[dict[str, Any]]:
    """The backbone's parameters by layer, those of the decoder and the heads with the factor 1.

    timm gives a backbone without a head the factor 1 at its last block; here the decoder stands above it.
    """
    decay = training.layer_decay
    backbone = network.pyramid.backbone.timm_model
    new = nn.ModuleList([network.pyramid.rescale, network.decoder, network.classifier, network.auxiliary])
    fresh = [{**group, "lr_scale": 1.0} for group in parameter_groups(new, training.weight_decay)]
    old = layer_groups(backbone, training.weight_decay, decay)
    return [*({**group, "lr_scale": decay * group["lr_scale"]} for group in old), *fresh]


@dataclass
class SegmentationJob(TrainingJob):
    """The training of one network."""

    data: SegmentationData

    method, command, product = "segment", "evaluate segment", "network"
    metrics, numbers, decides = ["loss"], Training, DECIDING
    resumes_with = ("accumulate",)

    def __post_init__(self) -> None:
        channels = self.asked["decoder_channels"]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # that of CUDA is the user's
            width = None if channels in (None, AUTO) else int(channels)
            self.network = UperNet(self.model.opened, len(self.data.labels), width)

    def images_decide(self) -> dict[str, Any]:
        labels = self.data.labels
        return {
            "images": self.data.train.fingerprint(),
            "classes": list(labels.values),
            "ignored labels": list(labels.ignored),
        }

    def plan(self) -> tuple[Training, dict[str, Any], Source]:
        images, labels = self.data.train, self.data.labels
        plan = SegmentationPlan(self.asked, job=self, network=self.network, images=len(images))
        training = plan.resolve()
        say()
        for line in plan.lines(training):
            say(line)
        arguments = get_model_args(self.model.opened.module)
        made = ("img_size", "in_chans", "num_classes", "patch_size")
        about = {
            "data": self.data.name,
            "split": self.data.split,
            "patch_size": arguments.get("patch_size"),
            "model_args": comparable({k: v for k, v in arguments.items() if k not in made}),
            "classes": {int(value): name for value, name in zip(labels.values, labels.names, strict=True)},
            "ignore_label": list(labels.ignored),
        }
        return training, about, images

    def task(self, run: RunFolder, numbers: Training) -> Task:
        torch.manual_seed(numbers.seed)  # of dropout and drop path

        def export(trainer: L.Trainer, module: Any, step: int) -> None:
            # the whole network once it is done; until then the checkpoints hold it
            if trainer.is_global_zero and step == numbers.steps:
                write_tensors(run.path / NETWORK, module.network.state_dict())

        module = SegmentationModule(self.network.train(), numbers)
        dataset = make_pairs(self.data, self.data.train, numbers, cut=True)
        return make_task(run, numbers, module, dataset, export)

    def end(self, run: RunFolder, summary: Mapping[str, Any]) -> None:
        """Print how it ended; the checkpoints, three times the network, have served."""
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        say(f"done        {summary['steps']:,} steps in {readable_time(summary['seconds'])}")

    def trained(self, run: RunFolder) -> UperNet:
        """The network with the weights that a finished run ended with."""
        if not (run.path / NETWORK).is_file():
            raise UserError(
                f"run ({run.path}) is finished and its {NETWORK} is gone; delete it to train again"
            )
        self.network.load_state_dict(load_file(run.path / NETWORK))
        return self.network


def make_pairs(data: SegmentationData, source: Source, training: Training, cut: bool) -> PairDataset:
    """Images with masks: random crops of them where ``cut``, else whole."""
    crop = RandomCrop(training.crop, training.scale, training.image_size, 0.5 if training.flip else 0.0)
    return PairDataset(
        source,
        data.labels.lookup(),
        ValueRange.parse(training.value_range) or ValueRange(),
        training.channels,
        training.seed,
        crop if cut else None,
        training.image_size,
        training.mean,
    )


def open_network(run: RunFolder) -> tuple[UperNet, Training]:
    """The network of a finished run, from the run alone.

    Raises:
        UserError: it is not finished; of a run of 0.1.0, which knows MODEL's path only, MODEL is gone.
    """
    if not (run.path / NETWORK).is_file():
        raise UserError(f"model ({run.path}) has no network yet; its command resumes it")
    config = run.config()
    training = Training.read(config)
    optional = {"drop_path_rate": 0.0, "dynamic_img_size": True}
    if "model_args" in config:
        backbone = Backbone(
            config["backbone"],
            training.crop,
            training.channels,
            config.get("patch_size"),
            model_args=config["model_args"],
            optional_model_args=optional,
        )
        size = (training.channels, training.crop, training.crop)
        opened = OpenedModel(
            run.path.name, "random", backbone, size, tuple(training.mean), tuple(training.std)
        )
    else:
        try:
            opened = open_model(config["model"], image_size=training.crop, optional_model_args=optional)
        except UserError as error:
            raise UserError(
                f"model ({run.path}) was built on {config['model']}, whose architecture is needed: {error}"
            ) from error
    network = UperNet(opened, len(config["classes"]), training.decoder_channels)
    network.load_state_dict(load_file(run.path / NETWORK))
    check_weights(network.state_dict(), str(run.path))
    return network.eval(), training
