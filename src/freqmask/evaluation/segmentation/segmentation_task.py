"""Segmentation as a task of the loop: its module, its data, its numbers, and its run folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from freqmask.console import rank, readable_time, say
from freqmask.data.loader import make_loader
from freqmask.data.source import Source
from freqmask.data.values import Survey, ValueRange
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import BackboneModel, open_eval_model
from freqmask.evaluation.finetune.tuning_task import layer_groups
from freqmask.evaluation.segmentation.crops import PairDataset, RandomCrop
from freqmask.evaluation.segmentation.mask_data import Labels, SegmentationData
from freqmask.evaluation.segmentation.segmentation_plan import (
    DECIDING,
    DROP_PATH,
    Training,
    choose_crop,
    drops_paths,
    resolve,
    say_plan,
    training_of,
)
from freqmask.evaluation.segmentation.upernet import UperNet, segmentation_losses
from freqmask.evaluation.trainings import AUTO, begin_run, check_same, held, numbers_to_resume, where_to_go_on
from freqmask.images import as_float
from freqmask.interop.timm_folder import write_tensors
from freqmask.training.loop import ScheduledModule, Task, ends, make_sampler, train
from freqmask.training.optim import OptimConfig, Schedule, parameter_groups
from freqmask.training.run_folder import RunFolder, comparable

BETAS = (0.9, 0.999)


class SegmentationModule(ScheduledModule):
    """Trains a network.

    Args:
        network: backbone and decoder.
        training: every number.
    """

    def __init__(self, network: UperNet, training: Training) -> None:
        super().__init__()
        self.network = network
        self.training_numbers = training

    def training_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """One part of an optimiser step: the losses of both heads."""
        images, masks = batch["views"]
        losses = segmentation_losses(self.network(as_float(images)), masks.long())
        self.check(losses["loss"])
        return losses

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW: the backbone's layers at learning rates of their own, all that is new at the whole one."""
        numbers = self.training_numbers
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(
            groups_of(self.network, numbers), lr=numbers.lr, betas=BETAS, fused=fused
        )
        self.schedule = Schedule(optimizer, recipe_of(numbers))
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


def recipe_of(training: Training) -> OptimConfig:
    """Linear warm-up, then linear decay to nothing (poly of power 1)."""
    return OptimConfig(
        lr=training.lr,
        min_lr=0.0,
        warmup_lr=training.lr * 1e-6,
        warmup_steps=training.warmup_steps,
        total_steps=training.steps,
        weight_decay=training.weight_decay,
        weight_decay_end=training.weight_decay,
        betas=BETAS,
        clip_grad=None,
        power=1.0,
    )


NETWORK = "network.safetensors"
SHOWN = {
    "images_per_second": "{:.1f} images/s",
    "data_wait_share": "{:.0%} waiting for data",
    "loss": "loss {:.4g}",
}


@dataclass
class Segmentation:
    """What the training of a segmentation network is made of.

    Attributes:
        run: the run folder, locked.
        training: every number.
        network: backbone and decoder.
        images: training images with masks.
        labels: the classes.
    """

    run: RunFolder
    training: Training
    network: UperNet
    images: Source
    labels: Labels

    def task(self) -> Task:
        """The same for the loop."""
        numbers = self.training
        torch.manual_seed(numbers.seed)  # of dropout and drop path
        return Task(
            self.run,
            asdict(numbers),
            SegmentationModule(self.network.train(), numbers),
            len(self.images),
            self._batches,
            self._export,
            shown=SHOWN,
            warmup_steps=numbers.warmup_steps,
            trainer={"sync_batchnorm": numbers.devices > 1 and numbers.accelerator == "cuda"},
        )

    def _batches(self, trainer: L.Trainer, done: int) -> Any:
        numbers = self.training
        sampler = make_sampler(asdict(numbers), len(self.images), trainer, done)
        dataset = pairs(self.images, self.labels, numbers, cut=True)
        return make_loader(dataset, sampler, numbers.images_at_once, numbers.workers)

    def _export(self, trainer: L.Trainer, module: Any, step: int) -> None:
        # the whole network once it is done; until then the checkpoints hold it
        if trainer.is_global_zero and step == self.training.steps:
            write_tensors(self.run.path / NETWORK, module.network.state_dict())

    def summary(self) -> dict[str, Any]:
        """The first and the last loss."""
        return {"method": "segment", **ends(self.run, ["loss"])}


def pairs(source: Source, labels: Labels, training: Training, cut: bool) -> PairDataset:
    """Images with masks as the network is to see them.

    Args:
        source: the images.
        labels: the classes.
        training: channels, value range, sizes, seed.
        cut: True gives random crops, False whole images.
    """
    crop = RandomCrop(training.crop, training.scale, training.image_size, 0.5 if training.flip else 0.0)
    return PairDataset(
        source,
        labels.lookup(),
        ValueRange.parse(training.value_range) or ValueRange(),
        training.channels,
        training.seed,
        crop if cut else None,
        training.image_size,
        training.mean,
    )


COMMAND = "evaluate segment"


@dataclass(frozen=True)
class SegmentationJob:
    """What is to be trained.

    Attributes:
        text: MODEL as it was typed.
        data: images with masks.
        seen: what the images are like.
        seed: of the training.
        folder: of the run.
        asked: the command's options.
    """

    text: str
    data: SegmentationData
    seen: Survey
    seed: int
    folder: Path
    asked: Mapping[str, Any]

    def open(self, side: int) -> BackboneModel:
        """The model for samples of a size, with drop path; one that takes any size stays able to."""
        drop_path = self.asked["drop_path"]
        rate = DROP_PATH if drop_path in (None, AUTO) else float(drop_path)
        subject = open_eval_model(
            self.text,
            self.seen,
            seed=self.seed,
            image_size=side,
            weights=self.asked["weights"],
            value_range=self.asked["value_range"],
            optional_model_args={"drop_path_rate": rate, "dynamic_img_size": True},
        )
        assert isinstance(subject, BackboneModel)  # pixels were refused
        deep = len(subject.opened.module.feature_info) > 1  # the first block of all never drops
        if rate and deep and drop_path not in (None, AUTO) and not drops_paths(subject.opened.module):
            raise UserError(f"drop_path ({drop_path}) must be left out: {self.text} does not take it")
        return subject

    def deciding(self, subject: BackboneModel) -> dict[str, Any]:
        """Plain values on which the network depends."""
        values = {name: self.asked[name] for name in DECIDING if name in self.asked}
        data, labels = self.data, self.data.labels
        return dict(
            comparable(
                {
                    **values,
                    "seed": self.seed,
                    "weights of the model": subject.key()["weights"],
                    "images": data.train.fingerprint(),
                    "classes": list(labels.values),
                    "ignored labels": list(labels.ignored),
                }
            )
        )


@dataclass
class Trained:
    """A network at the end of its training.

    Attributes:
        subject: the model that it began from.
        network: with the weights that it ended with.
        training: every number.
        run: its folder.
    """

    subject: BackboneModel
    network: UperNet
    training: Training
    run: RunFolder


def train_network(job: SegmentationJob) -> Trained | None:
    """Train, or go on, or find that all is done.

    Returns:
        The network; None after a dry run, for which nothing is written.

    Raises:
        UserError: the folder holds another run, or the training cannot go on.
    """
    run = RunFolder(job.folder)
    if rank() > 0:
        run.begun()
    on_gpu = torch.cuda.is_available() and job.asked["accelerator"] != "cpu"
    crop = choose_crop(job.asked["crop"], job.seen, on_gpu)
    subject = job.open(crop.value)
    if run.exists():
        check_same(run, job.deciding(subject))
    network = _network(subject, job)
    subject.key()  # remembers the hash of the weights; later it would be that of what was learnt
    with held(run, job.asked["dry_run"]):
        if run.finished():
            return _finished(run, subject, network)
        checkpoint = None
        if run.exists():
            training = training_of(numbers_to_resume(run, job.asked, "log_every_steps", "accumulate"))
            checkpoint = where_to_go_on(run)
        else:
            training = _begin(run, job, subject, network, crop)
        if job.asked["dry_run"]:
            return None
        segmentation = Segmentation(run, training, network, job.data.train, job.data.labels)
        summary = train(segmentation.task(), checkpoint, segmentation.summary)
        if rank() == 0:
            shutil.rmtree(run.checkpoints, ignore_errors=True)  # three times the network, which is written
            say(f"done        {summary['steps']:,} steps in {readable_time(summary['seconds'])}")
    return Trained(subject, network, training, run)


def _network(subject: BackboneModel, job: SegmentationJob) -> UperNet:
    channels = job.asked["decoder_channels"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        wanted = None if channels in (None, AUTO) else int(channels)
        return UperNet(subject.opened, len(job.data.labels), wanted)


def _finished(run: RunFolder, subject: BackboneModel, network: UperNet) -> Trained:
    if not (run.path / NETWORK).is_file():
        raise UserError(f"run ({run.path}) is finished and its {NETWORK} is gone; delete it to train again")
    say(f"run {run.path} is finished; its network is taken")
    network.load_state_dict(load_file(run.path / NETWORK))
    return Trained(subject, network, training_of(run.config()), run)


def _begin(
    run: RunFolder, job: SegmentationJob, subject: BackboneModel, network: UperNet, crop: Any
) -> Training:
    training, numbers = resolve(job.asked, subject, network, crop, len(job.data.train), job.seed)
    say_plan(subject, training, numbers, network, len(job.data.train))
    labels = job.data.labels
    about = {
        "method": "segment",
        "model": job.text,
        "data": job.data.name,
        "split": job.data.split,
        "backbone": str(subject.opened.module.pretrained_cfg["architecture"]),
        "classes": {int(value): name for value, name in zip(labels.values, labels.names, strict=True)},
        "ignore_label": list(labels.ignored),
    }
    who, train, deciding = (job.text, job.seed), job.data.train, job.deciding(subject)
    numbers_written = asdict(training)
    begin_run(run, COMMAND, who, job.asked, numbers_written, about, deciding, train, train.fingerprint())
    return training
