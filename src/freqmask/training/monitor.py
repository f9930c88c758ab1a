"""What a run tells of itself while it trains: metrics, health, skipped images; callbacks that come now and then."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from freqmask.console import Progress
from freqmask.errors import UserError
from freqmask.training.files import append_row, read_rows, write_rows
from freqmask.training.run_folder import RunFolder

COLLAPSE_WARNING = 0.1  # nats, docs/methods.md, small pictures


class NotFiniteError(UserError):
    """The loss became infinite or not a number at a step; the loop adds what to do."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is no longer finite at step {step + 1}")


class PeriodicCallback(L.Callback, ABC):
    """Calls :meth:`look` every so many optimizer steps (0: never), and at the end."""

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, where it is time."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        if step == trainer.max_steps or (self.every_steps and step % self.every_steps == 0):
            self.look(trainer, module, step)

    @abstractmethod
    def look(self, trainer: L.Trainer, module: Any, step: int) -> None:
        """What is done; called by every process."""


class Monitor(L.Callback):
    """Writes metrics.csv, moves the progress bar, warns of collapse, stops at a loss that is not finite.

    The module that it watches returns its losses by name from ``training_step``, has the attribute
    ``gradient_norm`` (a scalar, or None), and may look at ``want_details``, which says that this step is logged.

    Args:
        run: the run folder.
        progress: the bar.
        log_every: optimizer steps between rows.
        batch_size: images per optimizer step over all devices.
        images: images in an epoch.
        warmup_steps: no warning before their end.
    """

    def __init__(
        self,
        run: RunFolder,
        progress: Progress,
        log_every: int,
        batch_size: int,
        images: int,
        warmup_steps: int,
    ) -> None:
        self.run, self.progress, self.log_every = run, progress, log_every
        self.batch_size, self.images, self.warmup_steps = batch_size, images, warmup_steps
        self.latest: dict[str, float] = {}
        self.recorded: dict[str, float] = {}  # stays in the bar until it is measured again
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}  # parts that told a name: details come with the logged steps alone
        self._parts = self._steps_at_row = 0
        self._waited = self._batch_ended = self._row_began = 0.0
        self._warned = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clocks."""
        self._batch_ended = self._row_began = time.perf_counter()
        self._steps_at_row = trainer.global_step
        self._ask_for_details(trainer, module)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """What passed since the last batch ended was spent waiting for this one."""
        self._waited += time.perf_counter() - self._batch_ended

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up; at the end of an optimizer step move the bar, at some of them write a row."""
        if not self._parts:
            self._sums, self._counts = {}, {}
        self._parts += 1
        whole = {"loss": outputs["loss"] * trainer.accumulate_grad_batches}  # Lightning divides it
        for name, value in {**outputs, **whole}.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            step = trainer.global_step
            if self._is_logged(trainer, step):
                self._write_row(trainer, module, step)
            self.progress.update(step, {**self.recorded, **self.latest})
            self._ask_for_details(trainer, module)
        self._batch_ended = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Take time spent on previews and checkpoints out of the speed."""
        self._row_began += seconds
        self._batch_ended = time.perf_counter()

    def record(self, step: int, values: dict[str, float]) -> None:
        """Write values that are measured now and then (held-out loss) as a row of their own; row 0 goes first."""
        self.recorded.update(values)
        append_row(self.run.metrics, {"step": step, **values})
        if step == 0:
            *rows, first = read_rows(self.run.metrics)
            write_rows(self.run.metrics, list(first), [first, *rows])

    def _is_logged(self, trainer: L.Trainer, step: int) -> bool:
        return step % self.log_every == 0 or step == trainer.max_steps or step == 1

    def _ask_for_details(self, trainer: L.Trainer, module: Any) -> None:
        module.want_details = self._is_logged(trainer, trainer.global_step + 1)

    def _write_row(self, trainer: L.Trainer, module: Any, step: int) -> None:
        means = self._means(trainer, module)
        if not math.isfinite(means["loss"]):
            raise NotFiniteError(step - 1)
        now = time.perf_counter()
        elapsed = max(now - self._row_began, 1e-9)
        groups = trainer.optimizers[0].param_groups
        self.latest = {
            **means,
            "lr": max(float(group["lr"]) for group in groups),  # of the last layer
            "weight_decay": max(float(group["weight_decay"]) for group in groups),
            "grad_norm": float("nan") if module.gradient_norm is None else float(module.gradient_norm),
            "images_per_second": (step - self._steps_at_row) * self.batch_size / elapsed,
            "data_wait_share": min(self._waited / elapsed, 1.0),
        }
        row = {"epoch": step * self.batch_size / self.images, **self.latest}
        if trainer.is_global_zero:
            append_row(self.run.metrics, {"step": step, **row})
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        self._warn_of_collapse(step)
        self._parts, self._waited, self._row_began, self._steps_at_row = 0, 0.0, now, step

    def _means(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, float]:
        names = sorted(self._sums)
        values = torch.stack([self._sums[name].to(module.device) for name in names])
        values = trainer.strategy.reduce(values, reduce_op="mean") if trainer.world_size > 1 else values
        return {name: value / self._counts[name] for name, value in zip(names, values.tolist(), strict=True)}

    def _warn_of_collapse(self, step: int) -> None:
        number = self.latest.get("collapse")
        if number is None or self._warned or step <= self.warmup_steps or number >= COLLAPSE_WARNING:
            return
        self._warned = True
        self.progress.note(
            f"warning: the teacher gives nearly all images the same answer (collapse number {number:.3f} nat, "
            f"healthy is above {COLLAPSE_WARNING}); try a lower --teacher_temperature, a lower --lr, or fewer --outputs"
        )


class Skipped(L.Callback):
    """Writes skipped.csv, and stops the run once ``max_share`` of the ``images`` trained on stand in it."""

    def __init__(self, path: Path, images: int, max_share: float) -> None:
        self.path, self.images, self.max_share = path, images, max_share
        self.known = {row.get("name") for row in read_rows(path)}

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """List what the loader passed over in this batch."""
        for name, reason in batch["skipped"]:
            if name not in self.known:
                self.known.add(name)
                if trainer.is_global_zero:
                    append_row(self.path, {"name": name, "reason": reason})
        if len(self.known) > self.max_share * self.images:
            raise UserError(
                f"{len(self.known):,} of {self.images:,} images cannot be read, more than max_skipped_share "
                f"({self.max_share:g}); {self.path} lists them with reasons"
            )
