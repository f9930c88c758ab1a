"""Pre-training as a task of the loop: its step, its data, what is measured, and the backbone it exports."""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from freqmask import __version__
from freqmask.backbones import height_and_width, recalibrate_batch_norm
from freqmask.console import rank, say
from freqmask.data.augment import DINO_VIEWS, NO_CHANGE, PhotometricAugmentation, PhotometricSettings
from freqmask.data.in_memory import InMemoryBatches, InMemoryImages
from freqmask.data.loader import TrainDataset, deal, make_loader
from freqmask.data.source import Source
from freqmask.data.transforms import Geometry
from freqmask.data.values import ValueRange
from freqmask.evaluation.labelled import LabelledData
from freqmask.heads import ReconstructionHead
from freqmask.interop.weight_files import trained_feature, write_timm_folder
from freqmask.pretraining.resolve import (
    SHARDED,
    check_logger,
    is_channels_last,
    shorter_side,
)
from freqmask.pretraining.watch import (
    FEATURES_AT_ONCE,
    MOST_RANKED,
    MOST_TEST,
    MOST_TRAIN,
    HeldOut,
    Probe,
    calibration,
    own_labels,
    whole_method,
)
from freqmask.rng import combine
from freqmask.spectrum import as_float
from freqmask.training.auto import world_size
from freqmask.training.callbacks import Monitor, periods
from freqmask.training.loop import ScheduledModule, Task, ends, images_at_once, make_sampler
from freqmask.training.optim import BASE_WARMUP_LR, OptimConfig, Schedule, build_optimizer, scaled_lr
from freqmask.training.run_folder import Checkpoint, RunFolder

PROBES_A_RUN = 5
TINY_IMAGE = 96  # below it, blur and solarization leave too little
FIRST_AND_LAST = [  # in the summary, beside those parts
    *("loss", "relative_loss", "collapse"),
    *("probe_knn", "probe_linear", "rankme"),  # the first of each is of the weights that the run began with
]
LAST = ["held_out_loss", "held_out_relative_loss", "pixels_knn", "pixels_linear"]


class PretrainingModule(ScheduledModule):
    """Trains a method.

    Args:
        method: an ``nn.Module`` with the contract of :mod:`freqmask.methods`.
        optim: how the weights are moved.
        augmentation: photometric augmentation of one view each, ``(images, keys) -> images``; empty for none.
    """

    def __init__(
        self, method: nn.Module, optim: OptimConfig, augmentation: list[nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.method: Any = method
        self.optim = optim
        self.augmentation = nn.ModuleList(augmentation or [])
        self._sharded = False

    def training_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """One part of an optimizer step: the method's loss and its parts."""
        with torch.no_grad():
            views = [as_float(view) for view in batch["views"]]
            views = augmented(views, list(self.augmentation), batch["keys"])
        parts: dict[str, Tensor] = self.method(views, batch["keys"], details=self.want_details)
        self.check(parts["loss"])
        return parts

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, its learning rate set by the schedule at every step, after which FOLK's teacher follows."""
        optimizer = build_optimizer(self.method, self.optim, self.trainer.precision)
        optimizer.register_step_post_hook(
            lambda *_: self.method.after_step(self.step, self.optim.total_steps)
        )
        self.schedule = Schedule(optimizer, self.optim)
        return optimizer

    def configure_model(self) -> None:
        """Spread the method over the devices where the strategy asks for it."""
        mesh = getattr(self, "_device_mesh", None)  # set by Lightning's sharding strategy alone
        if mesh is not None and not self._sharded:
            shard(self.method, mesh["data_parallel"])
            self._sharded = True

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Let the method drop gradients (FOLK's frozen layer), then clip the rest by their norm."""
        self.method.before_optimizer_step(self.step, self.optim.total_steps)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.optim.clip_grad if self.optim.clip_grad is not None else float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit).detach()
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm


def augmented(views: list[Tensor], augmentation: list[nn.Module], keys: Tensor) -> list[Tensor]:
    """Photometric augmentation of each view by its own module and keys; none where the list is empty."""
    if not augmentation:
        return views
    return [
        augment(view, combine(keys, number))
        for number, (augment, view) in enumerate(zip(augmentation, views, strict=True))
    ]


@dataclass
class Images:
    """The images of a run, parted."""

    source: Source  # all of them
    train: Source  # training images
    held_out: Source | None  # what the loss is measured on; None where there are too few
    probed: LabelledData | None = None  # images with labels to measure features on, if asked for

    @property
    def ranked(self) -> Source:
        """What the features' rank is measured on: held-out images, or training images where those are few."""
        few = self.held_out is None or len(self.held_out) < MOST_RANKED
        return self.train if few or self.held_out is None else self.held_out

    @property
    def tested(self) -> int:
        """How many images with labels tell what the features are good for."""
        if self.probed is not None:
            return min(len(self.probed.rounds[0].test), MOST_TEST)
        return own_labels(self.ranked)

    def watched(self, options: Mapping[str, Any]) -> int:
        """How many images the measurements of a whole training look at, those of its first weights among them."""
        measured = min(len(self.ranked), MOST_RANKED)
        if self.probed is not None:
            measured += min(len(self.probed.rounds[0].train), MOST_TRAIN) + self.tested
        held_out = 0 if self.held_out is None else len(self.held_out)
        probes = 1 + periods(options["steps"], self.probe_every(options))
        return measured * probes + held_out * periods(options["steps"], options["preview_every_steps"])

    def probe_every(self, options: Mapping[str, Any]) -> int:
        """Steps from one measurement of the features to the next."""
        epochs = options.get("probe_every_epochs")
        if epochs in (None, "auto"):
            return math.ceil(options["steps"] / PROBES_A_RUN)
        return max(round(float(epochs) * len(self.train) / options["batch_size"]), 1)


@dataclass
class Pretraining:
    """What a pre-training is made of."""

    run: RunFolder  # the run folder, locked
    options: Mapping[str, Any]  # resolved options
    images: Images  # of the run
    method: Any  # what is trained
    state: dict[str, Any]  # the run's state, traced in the export
    kept: InMemoryImages | None = None  # the decoded training images where they stay on the device, or None
    checkpoint: Checkpoint | None = None  # what it resumes from

    def task(self) -> Task:
        """The same for the loop."""
        options, count = self.options, len(self.images.train)
        optim = make_optim(options, count)
        module = PretrainingModule(self.method, optim, make_augmentation(options, self.method.n_views))
        # layout and compilation, before the optimizer sees the parameters
        if is_channels_last(options, self.method):
            module.to(memory_format=torch.channels_last)
        if options["compile"]:
            reason = compile_failure(self.method, torch.device(options["accelerator"]))
            if reason is None:
                self.method.compile_parts()
            else:
                say(f"note: torch.compile cannot be used here ({reason}); training without it")
        trainer: dict[str, Any] = {"logger": _logger(options["logger"], self.run)}
        if options["strategy"] in SHARDED:
            # weights, gradients and optimizer state over all processes; a checkpoint is still one file
            trainer["strategy"] = ModelParallelStrategy(
                data_parallel_size=world_size(options),
                tensor_parallel_size=1,
                save_distributed_checkpoint=False,
            )
        return Task(
            self.run,
            options,
            module,
            count,
            self._batches,
            self._export,
            self._callbacks,
            shown_metrics(self.method),
            optim.warmup_steps,
            trainer=trainer,
        )

    def _batches(self, trainer: L.Trainer, done: int) -> Any:
        options, workers = self.options, int(self.options["workers"])
        geometries = make_geometries(options, self.method.n_views)
        blocks = (
            self.images.train.blocks() if self.kept is None else None
        )  # images in memory are equally near
        dealt = self._dealt(trainer, workers) if blocks is not None else None
        sampler = make_sampler(
            options, len(self.images.train), trainer, done, blocks=blocks, workers=workers, dealt=dealt
        )
        if self.kept is None:
            return make_loader(
                self._dataset(self.images.train, geometries), sampler, images_at_once(options), workers
            )
        images = self.kept.to(trainer.strategy.root_device)
        value_range = ValueRange.parse(options["value_range"]) or ValueRange()
        return InMemoryBatches(images, self.images.train, sampler, geometries, value_range, options["seed"])

    def _dealt(self, trainer: L.Trainer, workers: int) -> tuple[int, int]:
        """How images that are read in blocks were dealt out when the run began: their order depends on it."""
        if "dealt" not in self.state:
            self.state["dealt"] = list(deal(images_at_once(self.options), trainer.world_size, workers))
            if trainer.is_global_zero:
                self.run.write_state(self.run.state() | {"dealt": self.state["dealt"]})
        images, processes = self.state["dealt"]
        return int(images), int(processes)

    def _dataset(self, source: Source, geometries: list[Geometry]) -> TrainDataset:
        return make_dataset(self.options, source, geometries, bool(self.state["convert_channels"]))

    def _still(self, source: Source, views: int = 1) -> TrainDataset:
        # as an evaluation sees images: centered, unflipped
        geometry = Geometry(image_size=self.options["image_size"], crop="center", horizontal_flip=0.0)
        return self._dataset(source, [geometry] * views)

    def _callbacks(self, monitor: Monitor) -> list[L.Callback]:
        options, images, probed = self.options, self.images, self.images.probed
        held_out = images.train if images.held_out is None else images.held_out
        height, width = height_and_width(options["image_size"])
        at_once = min(images_at_once(options), 64)
        encoded_at_once = max(min(FEATURES_AT_ONCE // (height * width), 64), at_once)
        every = images.probe_every(options)
        labelled = None if probed is None else self._still(probed.source)
        first = None
        if rank() == 0 and not self.run.began_measured():
            # a resumed run's weights are those of its beginning, too, until Lightning reads the checkpoint
            first = copy.deepcopy(self.method.backbones()[self.method.default_backbone])
        watched = None if images.held_out is None else self._still(held_out, self.method.n_views)
        return [
            Probe(self._still(images.ranked), labelled, probed, first, monitor, every, encoded_at_once),
            HeldOut(
                self.run,
                watched,
                self._still(held_out),
                monitor,
                int(options["preview_every_steps"]),
                at_once,
            ),
        ]

    def _export(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        """Refresh ``backbone/``, what the method exports by default, its batch norm recalibrated on whole images."""
        method, options = whole_method(trainer, module), self.options
        if not trainer.is_global_zero:
            return
        backbone = copy.deepcopy(method.backbones()[method.default_backbone])
        device = next(backbone.parameters()).device
        # a loader draws its seed from torch's generator, whose state the checkpoint holds already
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            images = calibration(self._still(self.images.train), self.method)
            recalibrate_batch_norm(backbone, (batch.to(device) for batch in images))
        height, width = backbone.padded_size if backbone.fixed_size else backbone.image_size
        metadata = {
            "version": __version__,
            "run": self.run.path.name,
            **{name: options[name] for name in ("method", "value_range", "crop")},
            "data": self.state["data"],
            "step": step,
            "weights": method.default_backbone,
            "stage": backbone.stage,
        }
        write_timm_folder(
            backbone.timm_model,
            self.run.backbone,
            metadata=metadata,
            pooled=trained_feature(method, backbone),
            backbone=backbone,
            mean=options["mean"],
            std=options["std"],
            input_size=(backbone.channels, height, width),
        )

    def summary(self) -> dict[str, Any]:
        """Of the metrics the last values, and of some the first."""
        names = {name: self.options[name] for name in ("method", "backbone")}
        return {
            **names,
            **ends(self.run, [*FIRST_AND_LAST, *getattr(self.method, "parts", ())]),
            **ends(self.run, LAST, firsts=False),
        }


def shown_metrics(method: Any) -> dict[str, str]:
    """The metrics in the progress bar, each with its format."""
    return {
        "images_per_second": "{:.0f} images/s",
        "data_wait_share": "{:.0%} waiting for data",
        "loss": "loss {:.4g}",
        **{name: name.replace("_", " ") + " {:.4g}" for name in getattr(method, "parts", ())},
        "relative_loss": "relative loss {:.3f}",
        "collapse": "collapse number {:.2f}",
        "held_out_relative_loss": "held out {:.3f}",
        "probe_knn": "k-NN {:.1%}",
        "probe_linear": "linear {:.1%}",
        "rankme": "features of rank {:.1f}",
    }


def make_dataset(
    options: Mapping[str, Any], source: Source, geometries: list[Geometry], convert: bool
) -> TrainDataset:
    """The images of a run as views.

    Args:
        options: resolved options.
        source: the images.
        geometries: how each view is cut.
        convert: whether images with other channels are converted instead of skipped.
    """
    value_range = ValueRange.parse(options["value_range"]) or ValueRange()
    channels, seed = options["channels"], options["seed"]
    return TrainDataset(source, geometries, value_range, channels, convert_channels=convert, seed=seed)


def shard(method: nn.Module, mesh: DeviceMesh) -> None:
    """Spread a method over the devices that share the data, in place: each block is gathered when its turn comes.

    Teacher and student are cut alike, so that the moving average needs no communication. The decoder is gathered with
    the method: a loss may want its weights themselves.
    """
    method.to(memory_format=torch.contiguous_format)  # FSDP takes no other
    for part in method.modules():
        if isinstance(part, ReconstructionHead):
            continue
        if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 1:
            for block in part:
                sharded = any(isinstance(inner, FSDPModule) for inner in block.modules())
                if any(parameter.ndim > 1 for parameter in block.parameters()) and not sharded:
                    fully_shard(block, mesh=mesh)
    fully_shard(method, mesh=mesh)


def compile_failure(method: Any, device: torch.device) -> str | None:
    """Why a method cannot be compiled here, tried on a copy; None where it can."""
    trial = copy.deepcopy(method).to(device)
    trial.compile_parts()
    backbone = next(iter(trial.backbones().values()))
    images = torch.zeros(2, backbone.channels, *backbone.image_size, device=device)
    try:
        trial([images] * trial.n_views, torch.arange(2, device=device))["loss"].backward()
    except Exception as error:  # a missing compiler, an operator it does not know: anything may come
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    finally:
        torch._dynamo.reset()  # else the training's batch, another size, would be compiled for any size: slower
    return None


def _logger(name: str | None, run: RunFolder) -> Logger | bool:
    check_logger(name)
    if name is None:
        return False
    if name == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(run.path, name="tensorboard", version="")
    from lightning.pytorch.loggers import WandbLogger

    state = run.state()
    if "wandb" not in state and rank() == 0:
        state["wandb"] = secrets.token_hex(4)
        run.write_state(state)
    number = str(state.get("wandb", ""))
    return WandbLogger(name=run.path.name, save_dir=run.path, project="freqmask", id=number, resume="allow")


def make_geometries(options: Mapping[str, Any], views: int) -> list[Geometry]:
    """How each view is cut; a run that shall overfit sees every image whole, always the same."""
    still = options["overfit"] is not None
    geometry = Geometry(
        image_size=options["image_size"],
        scale=tuple(options["crop_scale"]),
        crop="center" if still else options["crop"],
        horizontal_flip=0.5 if options["flip"] and not still else 0.0,
        vertical_flip=0.5 if options["vertical_flip"] and not still else 0.0,
        quarter_turns=bool(options["quarter_turns"]) and not still,
    )
    return [geometry] * views


def make_augmentation(options: Mapping[str, Any], views: int) -> list[nn.Module]:
    """Photometric changes of each view: DINO's for FOLK, none for the others, unless asked otherwise."""
    usual: tuple[PhotometricSettings, ...] = DINO_VIEWS if options["method"] == "folk" else (NO_CHANGE,)
    if shorter_side(options) < TINY_IMAGE:
        usual = tuple(replace(view, blur=0.0, solarise=0.0) for view in usual)
    settings = []
    for view in range(views):
        given = {name: options[name] for name in ("blur", "solarise") if options[name]}
        asked = {name: values[min(view, len(values) - 1)] for name, values in given.items()}
        if options["colour_jitter"]:
            names = ("brightness", "contrast", "saturation", "hue", "jitter")
            asked |= dict(zip(names, options["colour_jitter"], strict=True))
        if options["grey"] is not None:
            asked["grey"] = options["grey"]
        settings.append(replace(usual[min(view, len(usual) - 1)], **asked))
    if options["overfit"] is not None or all(setting == NO_CHANGE for setting in settings):
        return []
    return [PhotometricAugmentation(setting) for setting in settings]


def make_optim(options: Mapping[str, Any], images: int) -> OptimConfig:
    """How resolved options move the weights."""
    batch, steps = int(options["batch_size"]), int(options["steps"])
    decay, end, lr = options["weight_decay"], options["weight_decay_end"], float(options["lr"])
    return OptimConfig(
        lr=lr,
        min_lr=float(options["min_lr"]),
        warmup_lr=min(scaled_lr(BASE_WARMUP_LR, batch), lr),
        warmup_steps=min(round(options["warmup_epochs"] * images / batch), max(steps - 1, 0)),
        total_steps=steps,
        weight_decay=float(decay),
        weight_decay_end=float(decay if end is None else end),
        betas=tuple(options["betas"] or (0.9, 0.95)),
        clip_grad=options["clip_grad"],
    )
