"""One start of a training, new or continued: Lightning's Trainer with our sampler, checkpoints and monitors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from freqmask.data.loader import make_loader
from freqmask.data.sampler import TrainSampler
from freqmask.data.source import Source
from freqmask.data.values import ValueRange
from freqmask.evaluation.segmentation.crops import PairDataset, RandomCrop
from freqmask.evaluation.segmentation.mask_data import Labels
from freqmask.evaluation.segmentation.module import SegmentationModule
from freqmask.evaluation.segmentation.settings import Training
from freqmask.evaluation.segmentation.upernet import UperNet
from freqmask.interop.timm_folder import write_tensors
from freqmask.training.checkpoint import ExactResume, Saver, StopSignals
from freqmask.training.loop import Outcome, Start, ends, make_trainer
from freqmask.training.monitor import Monitor, Skipped
from freqmask.training.progress import Progress
from freqmask.training.run_folder import RunFolder

NETWORK = "network.safetensors"
SHOWN = {
    "images_per_second": "{:.1f} images/s",
    "data_wait_share": "{:.0%} waiting for data",
    "loss": "loss {:.4g}",
}


@dataclass
class Fit:
    """What a training needs.

    Attributes:
        run: the run folder, locked.
        training: every number.
        network: backbone and decoder.
        images: with masks, to learn from.
        labels: the classes.
    """

    run: RunFolder
    training: Training
    network: UperNet
    images: Source
    labels: Labels

    def go(self, checkpoint: Path | None) -> Outcome:
        """Train from the checkpoint, or from the beginning, to the end or to a signal."""
        numbers = self.training
        start = Start(self.run, checkpoint, numbers.steps, numbers.batch_size)
        torch.manual_seed(numbers.seed)  # of dropout and drop path
        progress = Progress(numbers.steps, start.done, SHOWN)
        outcome = start.fit(
            progress,
            SegmentationModule(self.network.train(), numbers),
            lambda signals: make_trainer(
                self.run,
                asdict(numbers),
                numbers.steps,
                self._callbacks(progress, signals),
                sync_batchnorm=numbers.devices > 1 and numbers.accelerator == "cuda",
            ),
            lambda trainer: self._loader(trainer, start.done),
        )
        outcome.summary |= {"method": "segment", **ends(self.run, ["loss"])}
        return outcome

    def _callbacks(self, progress: Progress, signals: StopSignals) -> list[L.Callback]:
        numbers, monitor = self.training, self._monitor(progress)
        # rows of a step are written before its checkpoint: a restart from there will not make them again
        return [
            ExactResume(numbers.accumulate),
            Skipped(self.run.skipped, len(self.images), numbers.max_skipped_share),
            monitor,
            self._saver(signals, monitor),
        ]

    def _monitor(self, progress: Progress) -> Monitor:
        numbers = self.training
        return Monitor(
            self.run,
            progress,
            numbers.log_every_steps,
            numbers.batch_size,
            len(self.images),
            numbers.warmup_steps,
        )

    def _saver(self, signals: StopSignals, monitor: Monitor) -> Saver:
        numbers = self.training
        return Saver(
            self.run,
            signals,
            monitor,
            numbers.checkpoint_every_steps,
            numbers.checkpoint_every_minutes,
            numbers.keep_checkpoints,
            self._export,
        )

    def _export(self, trainer: L.Trainer, module: Any, step: int) -> None:
        """Write the whole network once it is done; until then the checkpoints hold it."""
        if trainer.is_global_zero and step == self.training.steps:
            write_tensors(self.run.path / NETWORK, module.network.state_dict())

    def _loader(self, trainer: L.Trainer, done: int) -> Any:
        numbers = self.training
        sampler = TrainSampler(
            len(self.images),
            numbers.seed,
            numbers.images_at_once,
            rank=trainer.global_rank,
            world_size=numbers.devices * numbers.num_nodes,
            start_step=done * numbers.accumulate,
            total_steps=numbers.steps * numbers.accumulate,
        )
        dataset = pairs(self.images, self.labels, numbers, cut=True)
        return make_loader(dataset, sampler, numbers.images_at_once, numbers.workers)


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
