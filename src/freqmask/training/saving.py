"""Checkpoints while a run goes on, and stopping when it is asked to."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L

from freqmask.training.checkpoint import publish, step_file
from freqmask.training.monitor import Monitor
from freqmask.training.runs import RunFolder

Export = Callable[[L.Trainer, L.LightningModule, int], None]


class StopSignals:
    """Ctrl-C and SIGTERM become a wish that the training grants after the step it is in.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        """Nothing is changed before the ``with`` block begins."""
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Take the handlers over, where Python lets us: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self.take()
        return self

    def take(self) -> None:
        """Take the handlers over again: Lightning puts its own over ours, which end a run without a checkpoint."""
        for number in self._before:
            signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        """Give the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.received = number


class Saver(L.Callback):
    """Writes a checkpoint and what is exported by steps, by minutes, at the end and when asked to stop.

    Args:
        run: the run folder.
        signals: who wants the training to stop.
        monitor: whose clock leaves out the time that saving takes.
        every_steps: optimiser steps between checkpoints.
        every_minutes: minutes between checkpoints, whichever comes first.
        keep: step files that stay on the disk.
        export: writes what others load, given the trainer, the module and the step; called by every process.
    """

    def __init__(
        self,
        run: RunFolder,
        signals: StopSignals,
        monitor: Monitor,
        every_steps: int,
        every_minutes: float,
        keep: int,
        export: Export,
    ) -> None:
        """Nothing is written before the training."""
        self.run = run
        self.signals = signals
        self.monitor = monitor
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.keep = keep
        self.export = export
        self._saved_step = -1
        self._saved_time = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock; from now on a signal is granted after a step."""
        self.signals.take()
        self._saved_time = time.monotonic()
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is time; stop where somebody asked."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        stop, due = self._wishes(trainer, step)
        if stop or due or step % self.every_steps == 0 or step == trainer.max_steps:
            self.save(trainer, module)
        if stop:
            trainer.should_stop = True

    def save(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the checkpoint of this step and refresh what is exported."""
        step = trainer.global_step
        if step == self._saved_step:
            return
        began = time.perf_counter()
        trainer.save_checkpoint(step_file(self.run.checkpoints, step))
        if trainer.is_global_zero:
            publish(self.run.checkpoints, step, self.keep)
        self.export(trainer, module, step)
        trainer.strategy.barrier("export")
        self._saved_step, self._saved_time = step, time.monotonic()
        self.monitor.pause(time.perf_counter() - began)

    def _wishes(self, trainer: L.Trainer, step: int) -> tuple[bool, bool]:
        """Whether to stop and whether minutes are over: one process's clock decides for all."""
        stop = self.signals.received is not None
        due = time.monotonic() - self._saved_time > 60 * self.every_minutes
        if trainer.world_size == 1:
            return stop, due
        if (
            step % self.monitor.log_every
        ):  # agreeing costs a round trip, so several processes do it now and then
            return False, False
        stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        return stop, bool(trainer.strategy.broadcast(due))
