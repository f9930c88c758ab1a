"""One start of a training, whatever is trained: from a checkpoint to the end or a signal."""

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
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from torch import Tensor, nn

from freqmask.training.auto import launched_processes
from freqmask.training.checkpoint import AtomicCheckpointIO, StopSignals, load_safely
from freqmask.training.failures import NotFiniteError
from freqmask.training.files import cut_back, read_rows
from freqmask.training.optim import Schedule
from freqmask.training.progress import Progress
from freqmask.training.run_folder import RunFolder

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


def make_trainer(
    run: RunFolder,
    options: Mapping[str, Any],
    total_steps: int,
    callbacks: Sequence[L.Callback],
    *,
    strategy: Any = None,
    logger: Any = False,
    sync_batchnorm: bool = False,
) -> L.Trainer:
    """A Trainer that counts optimiser steps and leaves sampler, checkpoints, progress and validation to us.

    On the CPU it also tells the allocator to keep what a step frees.

    Args:
        run: whose folder it works in.
        options: resolved: accelerator, devices, num_nodes, strategy, precision, accumulate.
        total_steps: optimiser steps of the whole training.
        callbacks: in the order in which they are called.
        strategy: instead of the option.
        logger: Lightning's, or False.
        sync_batchnorm: whether batch norm gathers its statistics over all devices.
    """
    if options["accelerator"] == "cpu":
        tune_malloc()
    return L.Trainer(
        accelerator=options["accelerator"],
        devices=options["devices"],
        num_nodes=options["num_nodes"],
        strategy=options["strategy"] if strategy is None else strategy,
        precision=options["precision"],
        max_steps=total_steps,
        max_epochs=-1,
        accumulate_grad_batches=options["accumulate"],
        callbacks=list(callbacks),
        logger=logger,
        plugins=[AtomicCheckpointIO(), *_environment()],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=1,
        sync_batchnorm=sync_batchnorm,
        default_root_dir=run.path,
    )


def _environment() -> list[ClusterEnvironment]:
    return [LightningEnvironment()] if launched_processes() == 1 and "SLURM_NTASKS" in os.environ else []


@dataclass
class Outcome:
    """How a fit ended.

    Attributes:
        step: optimiser steps made in all.
        stopped_by: the signal that stopped it, None at its proper end.
        summary: what goes into summary.json: of every training steps, images/s since this start, images skipped.
    """

    step: int
    stopped_by: int | None
    summary: dict[str, Any]


@dataclass
class Start:
    """One start of a training, new or continued.

    Attributes:
        run: the run folder, locked.
        checkpoint: to go on from, or None.
        total_steps: optimiser steps of the whole training.
        step_images: images of an optimiser step over all devices.
        done: optimiser steps behind the checkpoint.
    """

    run: RunFolder
    checkpoint: Path | None
    total_steps: int
    step_images: int
    done: int = field(init=False)

    def __post_init__(self) -> None:
        self.done = int(load_safely(self.checkpoint)["global_step"]) if self.checkpoint else 0
        cut_back(self.run.metrics, "step", self.done)

    def fit(
        self,
        progress: Progress,
        module: L.LightningModule,
        make: Callable[[StopSignals], L.Trainer],
        load: Callable[[L.Trainer], Any],
    ) -> Outcome:
        """Train to the end or to a signal.

        Args:
            progress: not started yet.
            module: what is trained.
            make: the Trainer, with callbacks that grant the signals' wishes.
            load: its batches.
        """
        with StopSignals() as signals:
            trainer = make(signals)
            progress.start()
            began = time.perf_counter()
            try:
                trainer.fit(module, load(trainer), ckpt_path=self.checkpoint, weights_only=True)
            finally:
                progress.close()
        step = int(trainer.global_step)
        rate = (step - self.done) * self.step_images / max(time.perf_counter() - began, 1e-9)
        summary = {
            "steps": step,
            "images_per_second": rate,
            "skipped": len(read_rows(self.run.skipped)),
        }
        return Outcome(step, signals.received if step < self.total_steps else None, summary)


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
