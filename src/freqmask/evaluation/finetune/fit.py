"""One start of a fine-tuning, new or continued: Lightning's Trainer with our sampler, checkpoints and monitors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from freqmask.data.loader import TrainDataset, make_loader
from freqmask.data.sampler import TrainSampler
from freqmask.data.source import Source
from freqmask.data.transforms import Geometry
from freqmask.data.values import ValueRange
from freqmask.evaluation.finetune.augment import AugmentedGeometry
from freqmask.evaluation.finetune.module import FinetuneModule
from freqmask.evaluation.finetune.recipes import Tuning
from freqmask.evaluation.finetune.watching import HeldOutAccuracy
from freqmask.interop.folders import CLASSIFIER
from freqmask.interop.timm_folder import write_timm_folder
from freqmask.training.checkpoint import ExactResume, Saver, StopSignals
from freqmask.training.loop import Outcome, Start, ends, make_trainer
from freqmask.training.monitor import Monitor, Skipped
from freqmask.training.progress import LINES_A_RUN, Progress
from freqmask.training.run_folder import RunFolder

SHOWN = {
    "images_per_second": "{:.0f} images/s",
    "data_wait_share": "{:.0%} waiting for data",
    "loss": "loss {:.4g}",
    "held_out_accuracy": "held out {:.1%}",
}


@dataclass
class Fit:
    """What a training needs.

    Attributes:
        run: the run folder, locked.
        tuning: every number.
        model: a timm classifier.
        is_cnn: whether it is one of convolutions alone.
        train: images to learn from.
        held_out: training images to watch, or None.
        class_names: by output.
        facts: on where the weights come from, for the exported folder.
        lines: of progress, where there is no terminal.
    """

    run: RunFolder
    tuning: Tuning
    model: Any
    is_cnn: bool
    train: Source
    held_out: Source | None
    class_names: Sequence[str]
    facts: Mapping[str, Any]
    lines: int = LINES_A_RUN

    def go(self, checkpoint: Path | None) -> Outcome:
        """Train from the checkpoint, or from the beginning, to the end or to a signal."""
        tuning = self.tuning
        start = Start(self.run, checkpoint, tuning.steps, tuning.batch_size)
        torch.manual_seed(tuning.seed)  # of drop path
        module = FinetuneModule(self.model, tuning, len(self.class_names))
        if tuning.accelerator in ("cpu", "cuda") and self.is_cnn:
            module.to(memory_format=torch.channels_last)
        progress = Progress(tuning.steps, start.done, SHOWN, lines=self.lines)
        outcome = start.fit(
            progress,
            module,
            lambda signals: make_trainer(
                self.run,
                asdict(tuning),
                tuning.steps,
                self._callbacks(progress, signals),
                sync_batchnorm=self._synchronises(),
            ),
            lambda trainer: self._loader(trainer, start.done),
        )
        outcome.summary |= {"method": "finetune", **ends(self.run, ["loss", "held_out_accuracy"])}
        return outcome

    def _callbacks(self, progress: Progress, signals: StopSignals) -> list[L.Callback]:
        monitor = self._monitor(progress)
        # rows of a step are written before its checkpoint: a restart from there will not make them again
        return [
            ExactResume(self.tuning.accumulate),
            self._skipped(),
            monitor,
            *self._looks(monitor),
            self._saver(signals, monitor),
        ]

    def _synchronises(self) -> bool:
        several = self.tuning.devices > 1 and self.tuning.accelerator == "cuda"
        return several and any(isinstance(module, _BatchNorm) for module in self.model.modules())

    def _monitor(self, progress: Progress) -> Monitor:
        tuning = self.tuning
        images = len(self.train)
        return Monitor(
            self.run, progress, tuning.log_every_steps, tuning.batch_size, images, tuning.warmup_steps
        )

    def _skipped(self) -> Skipped:
        return Skipped(self.run.skipped, len(self.train), self.tuning.max_skipped_share)

    def _looks(self, monitor: Monitor) -> list[L.Callback]:
        if self.held_out is None:
            return []
        still = Geometry(
            image_size=_size(self.tuning.image_size),
            crop="center",
            horizontal_flip=0.0,
            center_share=self.tuning.crop_share,
        )
        images = self._dataset(self.held_out, still)
        return [
            HeldOutAccuracy(
                monitor, images, self.tuning.validate_every_steps, max(self.tuning.images_at_once, 64)
            )
        ]

    def _saver(self, signals: StopSignals, monitor: Monitor) -> Saver:
        tuning = self.tuning
        return Saver(
            self.run,
            signals,
            monitor,
            tuning.checkpoint_every_steps,
            tuning.checkpoint_every_minutes,
            tuning.keep_checkpoints,
            self._export,
        )

    def _export(self, trainer: L.Trainer, module: Any, step: int) -> None:
        """Write ``classifier/``."""
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
            facts={**self.facts, "value_range": tuning.value_range, "step": step},
            crop_pct=tuning.crop_share,
            label_names=self.class_names,
        )

    def _loader(self, trainer: L.Trainer, done: int) -> Any:
        tuning = self.tuning
        sampler = TrainSampler(
            len(self.train),
            tuning.seed,
            tuning.images_at_once,
            rank=trainer.global_rank,
            world_size=tuning.devices * tuning.num_nodes,
            start_step=done * tuning.accumulate,
            total_steps=tuning.steps * tuning.accumulate,
        )
        return make_loader(
            self._dataset(self.train, training_geometry(tuning)),
            sampler,
            tuning.images_at_once,
            tuning.workers,
        )

    def _dataset(self, source: Source, geometry: Geometry) -> TrainDataset:
        tuning = self.tuning
        values = ValueRange.parse(tuning.value_range)
        return TrainDataset(
            source, [geometry], values, tuning.channels, convert_channels=True, seed=tuning.seed
        )


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
