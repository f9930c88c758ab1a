"""Fine-tuning as a task of the loop: its module, its data, its numbers, and its run folder."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
from timm.optim.lamb import Lamb
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from freqmask import __version__
from freqmask.backbones import eval_no_grad
from freqmask.console import LINES_A_RUN, rank, say
from freqmask.data.loader import TrainDataset, make_loader
from freqmask.data.sampler import OrderedSampler
from freqmask.data.source import Source
from freqmask.data.splits import split_indices
from freqmask.data.transforms import Geometry
from freqmask.data.values import Survey, ValueRange
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import BackboneModel
from freqmask.evaluation.finetune.classifier import AugmentedGeometry, Mixer, Network, make_classifier
from freqmask.evaluation.finetune.hyperparameters import DECIDING, Tuning, tuning_of
from freqmask.evaluation.finetune.tuning_plan import held_out_share, resolve, say_briefly, say_end, say_plan
from freqmask.evaluation.labelled import LabelledData, subset
from freqmask.evaluation.trainings import AUTO, begin_run, check_same, held, numbers_to_resume, where_to_go_on
from freqmask.images import as_float
from freqmask.interop.timm_folder import CLASSIFIER, write_timm_folder
from freqmask.rng import sample_key
from freqmask.training.loop import ScheduledModule, Task, ends, make_sampler, train
from freqmask.training.monitor import Monitor, PeriodicCallback
from freqmask.training.optim import OptimConfig, Schedule, update_ema
from freqmask.training.run_folder import RunFolder, comparable

BETAS = (0.9, 0.999)
_PRESENT = 0.2  # a class that is that much of a mixed picture counts as there, as timm's RSB trainings do


class FinetuneModule(ScheduledModule):
    """Trains a classifier.

    Args:
        model: a timm classifier.
        tuning: every number.
        classes: of the data.
    """

    def __init__(self, model: nn.Module, tuning: Tuning, classes: int) -> None:
        super().__init__()
        self.model: Any = model
        self.average: Any = (
            copy.deepcopy(model).requires_grad_(False).eval() if tuning.ema is not None else None
        )
        self.tuning = tuning
        self.mixer = Mixer(classes, tuning.mixup, tuning.cutmix, tuning.smoothing, tuning.erasing)
        binary = tuning.loss == "binary"
        self.loss = BinaryCrossEntropy(target_threshold=_PRESENT) if binary else SoftTargetCrossEntropy()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(tuning.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(tuning.std)[:, None, None], persistent=False)

    @property
    def tested(self) -> Any:
        """The classifier that is judged: the moving average where there is one."""
        return self.model if self.average is None else self.average

    def normalise(self, view: Tensor) -> Tensor:
        """A view (B, C, H, W), uint8 or in [0, 1], as the classifier takes it."""
        return (as_float(view) - self.mean) / self.std

    def training_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """One part of an optimiser step."""
        with torch.no_grad():
            part = batch_index % self.tuning.accumulate
            key = sample_key(self.tuning.seed, self.step, self.trainer.global_rank, part)
            images, targets = self.mixer(self.normalise(batch["views"][0]), batch["labels"], key)
        loss = self.loss(self.model(images).float(), targets)
        self.check(loss)
        return {"loss": loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW or LAMB, the layers at learning rates of their own."""
        tuning = self.tuning
        groups = layer_groups(self.model, tuning.weight_decay, tuning.layer_decay)
        optimizer: torch.optim.Optimizer
        if tuning.optimizer == "lamb":
            optimizer = Lamb(groups, lr=tuning.lr, weight_decay=tuning.weight_decay)
        else:
            fused = self.device.type in ("cpu", "cuda")
            optimizer = torch.optim.AdamW(groups, lr=tuning.lr, betas=BETAS, fused=fused)
        self.schedule = Schedule(optimizer, recipe_of(tuning))
        return optimizer

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then let the moving average follow."""
        optimizer.step(closure=optimizer_closure)
        if self.average is None:
            return
        # young averages follow faster, or a short training would be judged by its beginning
        update_ema(
            self.average, self.model, min(float(self.tuning.ema or 0), (1 + self.step) / (10 + self.step))
        )
        for mine, its in zip(self.average.buffers(), self.model.buffers(), strict=True):
            mine.copy_(its)


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameters by layer, each with the factor on its learning rate (``lr_scale``) and its weight decay.

    Vectors, positions and tokens get no weight decay. The head's factor is 1, that of the layer below it
    ``layer_decay``, and so on down to the patch embedding.
    """
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    return list(
        param_groups_layer_decay(model, weight_decay, no_weight_decay_list=spared, layer_decay=layer_decay)
    )


def recipe_of(tuning: Tuning) -> OptimConfig:
    """The learning rate over the steps."""
    return OptimConfig(
        lr=tuning.lr,
        min_lr=tuning.min_lr,
        warmup_lr=tuning.warmup_lr,
        warmup_steps=tuning.warmup_steps,
        total_steps=tuning.steps,
        weight_decay=tuning.weight_decay,
        weight_decay_end=tuning.weight_decay,
        betas=BETAS,
        clip_grad=None,
    )


class HeldOutAccuracy(PeriodicCallback):
    """Every so often, and at the end: how many held-out images the classifier gets right.

    Args:
        monitor: takes it into the metrics.
        images: the held-out images as a test sees them.
        every_steps: optimiser steps between two looks.
        batch_size: images at once.
    """

    def __init__(self, monitor: Monitor, images: TrainDataset, every_steps: int, batch_size: int) -> None:
        super().__init__(every_steps)
        self.monitor = monitor
        self.images = images
        self.batch_size = batch_size

    def look(self, trainer: L.Trainer, module: Any, step: int) -> None:
        """Measure and record the accuracy of this step."""
        began = time.perf_counter()
        devices = [module.device] if module.device.type == "cuda" else []
        # a loader draws its seed from torch's generator, which belongs to the training
        with torch.random.fork_rng(devices=devices), eval_no_grad(module):
            right, seen = self._count(trainer, module)
        if trainer.is_global_zero:
            self.monitor.record(step, {"held_out_accuracy": float(right / seen)})
        self.monitor.pause(time.perf_counter() - began)

    def _count(self, trainer: L.Trainer, module: Any) -> tuple[Tensor, Tensor]:
        sampler = OrderedSampler(len(self.images), trainer.global_rank, trainer.world_size)
        counts = torch.zeros(2, device=module.device)
        for batch in make_loader(self.images, sampler, min(self.batch_size, len(sampler)), workers=0):
            images = module.normalise(batch["views"][0].to(module.device))
            labels = batch["labels"].to(module.device)
            with trainer.precision_plugin.forward_context():
                answers = module.tested(images).argmax(dim=1)
            counts += torch.stack([(answers == labels).sum(), torch.ones_like(labels).sum()])
        counts = trainer.strategy.reduce(counts, reduce_op="sum") if trainer.world_size > 1 else counts
        return counts[0], counts[1]


SHOWN = {
    "images_per_second": "{:.0f} images/s",
    "data_wait_share": "{:.0%} waiting for data",
    "loss": "loss {:.4g}",
    "held_out_accuracy": "held out {:.1%}",
}


@dataclass
class Finetuning:
    """What a fine-tuning is made of.

    Attributes:
        run: the run folder, locked.
        tuning: every number.
        model: a timm classifier.
        is_cnn: whether it is one of convolutions alone.
        train: training images.
        held_out: training images to watch, or None.
        class_names: by output.
        metadata: on where the weights come from, for the exported folder.
        lines: of progress, where there is no terminal.
    """

    run: RunFolder
    tuning: Tuning
    model: Any
    is_cnn: bool
    train: Source
    held_out: Source | None
    class_names: Sequence[str]
    metadata: Mapping[str, Any]
    lines: int = LINES_A_RUN

    def task(self) -> Task:
        """The same for the loop."""
        tuning = self.tuning
        torch.manual_seed(tuning.seed)  # of drop path
        module = FinetuneModule(self.model, tuning, len(self.class_names))
        if tuning.accelerator in ("cpu", "cuda") and self.is_cnn:
            module.to(memory_format=torch.channels_last)
        normed = any(isinstance(part, _BatchNorm) for part in self.model.modules())
        several = tuning.devices > 1 and tuning.accelerator == "cuda"
        return Task(
            self.run,
            asdict(tuning),
            module,
            len(self.train),
            self._batches,
            self._export,
            self._callbacks,
            SHOWN,
            tuning.warmup_steps,
            self.lines,
            {"sync_batchnorm": several and normed},
        )

    def _batches(self, trainer: L.Trainer, done: int) -> Any:
        tuning = self.tuning
        dataset = self._dataset(self.train, training_geometry(tuning))
        sampler = make_sampler(asdict(tuning), len(self.train), trainer, done)
        return make_loader(dataset, sampler, tuning.images_at_once, tuning.workers)

    def _callbacks(self, monitor: Monitor) -> list[L.Callback]:
        if self.held_out is None:
            return []
        tuning = self.tuning
        still = Geometry(
            image_size=_size(tuning.image_size),
            crop="center",
            horizontal_flip=0.0,
            center_share=tuning.crop_share,
        )
        images, at_once = self._dataset(self.held_out, still), max(tuning.images_at_once, 64)
        return [HeldOutAccuracy(monitor, images, tuning.validate_every_steps, at_once)]

    def _export(self, trainer: L.Trainer, module: Any, step: int) -> None:
        if not trainer.is_global_zero:
            return
        tuning = self.tuning
        height, width = tuning.image_size
        write_timm_folder(
            module.tested,
            self.run.path / CLASSIFIER,
            input_size=(tuning.channels, height, width),
            mean=tuning.mean,
            std=tuning.std,
            metadata={**self.metadata, "value_range": tuning.value_range, "step": step},
            crop_pct=tuning.crop_share,
            label_names=self.class_names,
        )

    def _dataset(self, source: Source, geometry: Geometry) -> TrainDataset:
        tuning = self.tuning
        values = ValueRange.parse(tuning.value_range)
        return TrainDataset(
            source, [geometry], values, tuning.channels, convert_channels=True, seed=tuning.seed
        )

    def summary(self) -> dict[str, Any]:
        """Of the metrics the first and the last values."""
        return {"method": "finetune", **ends(self.run, ["loss", "held_out_accuracy"])}


def training_geometry(tuning: Tuning) -> AugmentedGeometry:
    """How a training picture is cut and changed before it becomes part of a batch."""
    fill = tuple(min(255, round(255 * value)) for value in tuning.mean) if tuning.channels == 3 else (0, 0, 0)
    return AugmentedGeometry(
        image_size=_size(tuning.train_size),
        scale=(tuning.crop_scale[0], tuning.crop_scale[1]),
        horizontal_flip=0.5 if tuning.flip else 0.0,
        augment=tuning.augment,
        fill=fill,  # type: ignore[arg-type]
    )


def _size(sides: Sequence[int]) -> tuple[int, int]:
    return sides[0], sides[1]


_LINES_BRIEFLY = 4  # without a terminal a series of runs would be all progress
COMMAND = "evaluate finetune"


@dataclass(frozen=True)
class FinetuneJob:
    """What is to be fine-tuned.

    Attributes:
        subject: the model.
        data: the images.
        seen: what they are like.
        train: numbers of the images with the labels to learn from.
        seed: of the training.
        folder: of the run.
        asked: the command's options.
        briefly: whether the plan of such a run was shown already, with another seed or other labels.
    """

    subject: BackboneModel
    data: LabelledData
    seen: Survey
    train: np.ndarray
    seed: int
    folder: Path
    asked: Mapping[str, Any]
    briefly: bool = False

    def network(self, drop_path: float) -> Network:
        """A classifier with a fresh head."""
        return make_classifier(self.subject.opened, len(self.data.class_names), drop_path, self.seed)

    @property
    def deciding(self) -> dict[str, Any]:
        """Plain values on which the result depends."""
        values = {name: self.asked[name] for name in DECIDING if name in self.asked}
        start = self.subject.key()["weights"]
        images = subset(self.data, self.train).fingerprint()
        return dict(
            comparable({**values, "seed": self.seed, "weights of the model": start, "images": images})
        )


def fine_tune(job: FinetuneJob) -> RunFolder:
    """Train, or go on, or find that all is done.

    Returns:
        The run, its ``classifier/`` written; for a dry run nothing is written.

    Raises:
        UserError: the folder holds another run, or the training cannot go on.
    """
    run = RunFolder(job.folder)
    if rank() > 0:
        run.begun()
    _check_folder(run)
    if run.exists():
        check_same(run, job.deciding)
        if run.finished():
            say(f"run {run.path} is finished; its classifier is taken")
            return run
    dry_run = job.asked["dry_run"]
    with held(run, dry_run):
        if run.exists():
            tuning, checkpoint = tuning_of(numbers_to_resume(run, job.asked)), where_to_go_on(run)
            network = job.network(tuning.drop_path)
        else:
            checkpoint = None
            tuning, network = _begin(run, job)
        if not dry_run:
            summary = train(*_prepare(run, job, tuning, network.model, checkpoint))
            say_end(run, summary)
    return run


def _check_folder(run: RunFolder) -> None:
    if run.path.is_file():
        raise UserError(f"out: {run.path} is a file; give the path of a folder that may be made")
    if not run.exists() and (run.path / "model.safetensors").exists():
        raise UserError(f"out: {run.path} holds a model and no fine-tuning; give another --out")


def _begin(run: RunFolder, job: FinetuneJob) -> tuple[Tuning, Network]:
    opened, data, asked = job.subject.opened, job.data, job.asked
    share = held_out_share(asked["held_out"], len(job.train)).value
    train, held_out = _part(job, share)
    classes, drop_path = len(data.class_names), asked["drop_path"]
    tuning, numbers = resolve(asked, opened, job.network(0.0), job.seen, len(train), classes, job.seed, share)
    network = job.network(tuning.drop_path)
    if network.notes and drop_path not in (None, AUTO):
        raise UserError(f"drop_path ({drop_path}) must be left out: {network.notes[0]}")
    if job.briefly:
        say_briefly(tuning, len(train))
    else:
        say_plan(job.subject.name, tuning, numbers, network, len(train), len(held_out))
    about = {
        "method": "finetune",
        "model": job.subject.text,
        "data": comparable(asked["data"]),
        **{name: asked[name] for name in ("labels", "pages")},
        "split": asked["train_split"],
        "backbone": str(opened.module.pretrained_cfg["architecture"]),
    }
    who, fingerprint = (job.subject.text, job.seed), data.source.fingerprint()
    begin_run(run, COMMAND, who, asked, asdict(tuning), about, job.deciding, subset(data, train), fingerprint)
    return tuning, network


def _part(job: FinetuneJob, share: float) -> tuple[np.ndarray, np.ndarray]:
    if share == 0:
        return job.train, job.train[:0]
    data = job.data
    groups = None if data.groups is None else [data.groups[int(index)] for index in job.train]
    parts = split_indices(data.labels[job.train], groups, (1 - share, share), job.seed)
    return job.train[parts[0]], job.train[parts[1]]


def _prepare(
    run: RunFolder, job: FinetuneJob, tuning: Tuning, model: Any, checkpoint: Path | None
) -> tuple[Task, Path | None, Callable[[], dict[str, Any]]]:
    train, held_out = _part(job, tuning.held_out)
    metadata = {
        "version": __version__,
        "method": "finetune",
        "model": job.subject.text,
        "run": run.path.name,
        "recipe": tuning.recipe,
        "data": job.data.source.fingerprint(),
    }
    finetuning = Finetuning(
        run,
        tuning,
        model,
        job.subject.opened.backbone.is_cnn,
        subset(job.data, train),
        subset(job.data, held_out) if len(held_out) else None,
        job.data.class_names,
        metadata,
        _LINES_BRIEFLY if job.briefly else LINES_A_RUN,
    )
    return finetuning.task(), checkpoint, finetuning.summary
