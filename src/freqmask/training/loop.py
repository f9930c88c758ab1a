"""The loop of every training: pre-training, fine-tuning and segmentation are tasks on it.

A task brings its module, its batches and its numbers. Lightning's Trainer carries the steps (DDP, sharding, precision,
SLURM); order, checkpoints, metrics, stop signals and progress are ours, and the same for all tasks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, nn

from freqmask.console import rank, say
from freqmask.data.sampler import TrainSampler
from freqmask.training.auto import launched_processes
from freqmask.training.checkpoint import load_safely
from freqmask.training.failures import NotFiniteError, translate_errors
from freqmask.training.files import cut_back, read_rows
from freqmask.training.monitor import Monitor, Skipped
from freqmask.training.optim import Schedule
from freqmask.training.progress import LINES_A_RUN, Progress
from freqmask.training.run_folder import RunFolder, now
from freqmask.training.saving import AtomicCheckpointIO, ExactResume, Export, Saver, StopSignals

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # the largest that glibc takes
_NEVER = 2**31 - 1


def tune_malloc() -> bool:
    """Let the allocator keep what is freed instead of handing it back to the system.

    A step frees its memory in pieces and takes it again, and glibc hands back whatever lies at the end of its heap:
    9,800 page faults a step of a ViT of width 128, about a tenth of its time (docs/log.md). The process stays as
    large as it was at the height of a step.

    Returns:
        Whether this system's allocator was told; other systems have other habits.
    """
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        # Setting one of the two ends glibc's own adjustment of the other.
        return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, _NEVER))
    return False


class ScheduledModule(L.LightningModule):
    """A module whose optimiser follows a schedule by optimiser steps.

    Attributes:
        schedule: set by ``configure_optimizers``.
        gradient_norm: of the last step, for the monitor.
        want_details: whether the monitor is about to read the parts of the loss.
    """

    def __init__(self) -> None:
        super().__init__()
        self.schedule: Schedule | None = None
        self.gradient_norm: Tensor | None = None
        self.want_details = False

    @property
    def step(self) -> int:
        """Optimiser steps made so far."""
        return int(self.trainer.global_step)

    def check(self, loss: Tensor) -> None:
        """Raises a NotFiniteError at once on a CPU; elsewhere a look would be a wait, and the monitor looks later."""
        if self.device.type == "cpu" and not torch.isfinite(loss):
            raise NotFiniteError(self.step)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Set the learning rates of this step."""
        assert self.schedule is not None  # Lightning asks for the optimiser before the first batch
        self.schedule.apply(self.step)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Nothing is clipped; the norm goes into the metrics."""
        groups = optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        self.gradient_norm = nn.utils.get_total_norm(gradients)


@dataclass
class Task:
    """One training as the loop takes it.

    Attributes:
        run: the run folder, locked.
        numbers: resolved options: steps, batch_size, accumulate, seed, lr; accelerator, devices, num_nodes, strategy,
            precision; log_every_steps, checkpoint_every_steps, checkpoint_every_minutes, keep_checkpoints,
            max_skipped_share.
        module: what is trained.
        images: how many are trained on.
        batches: the loader of this process, given the Trainer and the optimiser steps that were made before.
        export: writes what others load, at every checkpoint.
        callbacks: further ones, given the monitor that takes their numbers into the metrics.
        shown: metrics in the progress bar, each with its words.
        warmup_steps: no warning of a collapse before their end.
        lines: how often a run speaks where there is no terminal.
        trainer: further arguments of Lightning's Trainer: strategy, logger, sync_batchnorm.
    """

    run: RunFolder
    numbers: Mapping[str, Any]
    module: ScheduledModule
    images: int
    batches: Callable[[L.Trainer, int], Any]
    export: Export
    callbacks: Callable[[Monitor], Sequence[L.Callback]] = lambda monitor: ()
    shown: Mapping[str, str] = field(default_factory=dict)
    warmup_steps: int = 0
    lines: int = LINES_A_RUN
    trainer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return int(self.numbers["steps"])


def train(
    task: Task,
    checkpoint: Path | None,
    summarize: Callable[[], Mapping[str, Any]],
    stopped: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train from a checkpoint, or from the beginning, to the end, and write what the run ended with.

    A signal stops it after a step, with a checkpoint, and then ends the process as the signal would have.

    Args:
        task: what is trained.
        checkpoint: to go on from.
        summarize: what the summary holds beside steps, speed and times.
        stopped: called with the step when a signal has stopped it.

    Returns:
        The summary.

    Raises:
        UserError: what a training may die of, with the way out.
    """
    began = time.time()
    with translate_errors(task.run, task.numbers):
        step, rate, stopped_by = fit(task, checkpoint)
    if stopped_by is not None:
        say(f"stopped at step {step:,} of {task.steps:,}, saved in {task.run.path}; the same command goes on")
        if stopped is not None:
            stopped(step)
        leave(stopped_by)
    counts = {"steps": step, "images_per_second": rate, "skipped": len(read_rows(task.run.skipped))}
    seconds = round(time.time() - began, 1)
    summary = {**counts, **summarize(), "seconds": seconds, "ended": now()}
    if rank() == 0:
        task.run.finish(summary)
    return summary


def fit(task: Task, checkpoint: Path | None) -> tuple[int, float, int | None]:
    """One start of a training.

    Returns:
        The optimiser steps made in all, images a second since this start, and the signal that stopped it (None at
        its proper end).
    """
    numbers, done = task.numbers, int(load_safely(checkpoint)["global_step"]) if checkpoint else 0
    cut_back(task.run.metrics, "step", done if checkpoint else -1)  # rows of steps that will be made again
    progress = Progress(task.steps, done, task.shown, lines=task.lines)
    images_a_step = int(numbers["batch_size"])
    with StopSignals() as signals:
        monitor = Monitor(
            task.run,
            progress,
            int(numbers["log_every_steps"]),
            images_a_step,
            task.images,
            task.warmup_steps,
        )
        # rows of a step are written before its checkpoint: a restart from there will not make them again
        callbacks = [
            ExactResume(int(numbers["accumulate"])),
            Skipped(task.run.skipped, task.images, float(numbers["max_skipped_share"])),
            monitor,
            *task.callbacks(monitor),
            Saver(task.run, signals, monitor, numbers, task.export),
        ]
        trainer = make_trainer(task, callbacks)
        progress.start()
        began = time.perf_counter()
        try:
            trainer.fit(task.module, task.batches(trainer, done), ckpt_path=checkpoint, weights_only=True)
        finally:
            progress.close()
    step = int(trainer.global_step)
    rate = (step - done) * images_a_step / max(time.perf_counter() - began, 1e-9)
    return step, rate, signals.received if step < task.steps else None


def make_trainer(task: Task, callbacks: Sequence[L.Callback]) -> L.Trainer:
    """Lightning's Trainer, counting optimiser steps; sampler, checkpoints, progress and validation are ours.

    Args:
        task: what is trained.
        callbacks: in the order in which they are called.
    """
    numbers = task.numbers
    if numbers["accelerator"] == "cpu":
        tune_malloc()
    return L.Trainer(
        accelerator=numbers["accelerator"],
        devices=numbers["devices"],
        num_nodes=numbers["num_nodes"],
        precision=numbers["precision"],
        max_steps=task.steps,
        max_epochs=-1,
        accumulate_grad_batches=numbers["accumulate"],
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO(), *_environment()],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=1,
        default_root_dir=task.run.path,
        **{"strategy": numbers["strategy"], "logger": False, **task.trainer},
    )


def _environment() -> list[LightningEnvironment]:
    # Lightning takes the mere presence of SLURM's variables for having been started by srun; a shell has them, too
    return [LightningEnvironment()] if launched_processes() == 1 and "SLURM_NTASKS" in os.environ else []


def images_at_once(numbers: Mapping[str, Any]) -> int:
    """Images of one part of a step on one device."""
    processes = int(numbers["devices"]) * int(numbers["num_nodes"])
    return int(numbers["batch_size"]) // processes // int(numbers["accumulate"])


def make_sampler(
    numbers: Mapping[str, Any], images: int, trainer: L.Trainer, done: int, **more: Any
) -> TrainSampler:
    """The order of images for this process, from the optimiser step after ``done`` on."""
    parts = int(numbers["accumulate"])
    return TrainSampler(
        images,
        numbers["seed"],
        images_at_once(numbers),
        rank=trainer.global_rank,
        world_size=int(numbers["devices"]) * int(numbers["num_nodes"]),
        start_step=done * parts,
        total_steps=int(numbers["steps"]) * parts,
        **more,
    )


def ends(run: RunFolder, names: list[str], firsts: bool = True) -> dict[str, float]:
    """The last value of each metric that has one, and its first as ``first_NAME``."""
    rows = read_rows(run.metrics)
    found: dict[str, float] = {}
    for name in names:
        values = [float(row[name]) for row in rows if row.get(name)]
        if values:
            found |= {name: values[-1]} | ({f"first_{name}": values[0]} if firsts else {})
    return found


def leave(stopped_by: int) -> NoReturn:
    """End the process as its signal would have: with Ctrl-C's exception, or with the exit code 128 + signal."""
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + stopped_by)
