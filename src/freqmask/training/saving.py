"""When a training writes checkpoints and stops, and how it resumes exactly where it was."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from freqmask.training.checkpoint import Checkpoint, load_safely, publish, save_atomically, step_file
from freqmask.training.monitor import Monitor
from freqmask.training.run_folder import RunFolder

Export = Callable[[L.Trainer, L.LightningModule, int], None]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's way to disk, made atomic on writing and safe on reading.

    Args:
        resumed: what the training resumes from, read already.
    """

    def __init__(self, resumed: Checkpoint | None = None) -> None:
        self.resumed = resumed

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint atomically."""
        save_atomically(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read plain tensors and numbers only, whatever the caller asked for."""
        if self.resumed is not None and self.resumed.content and Path(path) == self.resumed.path:
            content, self.resumed.content = self.resumed.content, {}
            return content
        return load_safely(path, "cpu" if map_location is None else map_location)


class StopSignals:
    """Ctrl-C and SIGTERM stop the training after the step it is in; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self.take()
        return self

    def take(self) -> None:
        """Take the handlers over again: Lightning puts its own over ours, which end a run without a checkpoint."""
        for number in self._before:
            signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
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
        signals: say whether the training shall stop.
        monitor: its clock leaves out the time that saving takes.
        numbers: checkpoint_every_steps and checkpoint_every_minutes (whichever comes first), keep_checkpoints.
        export: writes what others load, given the trainer, the module and the step; called by every process.
    """

    def __init__(
        self,
        run: RunFolder,
        signals: StopSignals,
        monitor: Monitor,
        numbers: Mapping[str, Any],
        export: Export,
    ) -> None:
        self.run, self.signals, self.monitor, self.export = run, signals, monitor, export
        self.every_steps = int(numbers["checkpoint_every_steps"])
        self.every_minutes = float(numbers["checkpoint_every_minutes"])
        self.keep = int(numbers["keep_checkpoints"])
        self._saved_step = -1
        self._saved_time = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock; from now on a signal stops the training after a step."""
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
        stop, due = self._stop_and_due(trainer, step)
        if stop or due or step % self.every_steps == 0 or step == trainer.max_steps:
            self.save(trainer, module)
        if stop:
            trainer.should_stop = True

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Export what a kill right after the last checkpoint left out: from there no step is made any more."""
        if self._saved_step < 0 and trainer.global_step == trainer.max_steps:
            self.export(trainer, module, trainer.global_step)

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

    def _stop_and_due(self, trainer: L.Trainer, step: int) -> tuple[bool, bool]:
        stop = self.signals.received is not None
        due = time.monotonic() - self._saved_time > 60 * self.every_minutes
        if trainer.world_size == 1:
            return stop, due
        # agreeing costs a round trip, so several processes do it now and then
        if step % self.monitor.log_every:
            return False, False
        stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        return stop, bool(trainer.strategy.broadcast(due))


class ExactResume(L.Callback):
    """Keeps what Lightning's checkpoints leave out: torch's generator (dropout, drop path) and the batches seen.

    Args:
        batches_a_step: parts that an optimizer step is made of now; it may differ from what it was.
    """

    def __init__(self, batches_a_step: int) -> None:
        self.batches_a_step = batches_a_step
        self._random_state: Tensor | None = None
        self._gpu_random_state: Tensor | None = None

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state of the global generator, and of that of the GPU, where dropout draws."""
        checkpoint["random_state"] = torch.get_rng_state()
        if module.device.type == "cuda":
            checkpoint["gpu_random_state"] = torch.cuda.get_rng_state(module.device)

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the generator's state until the training starts: setting up draws numbers, too."""
        self._random_state = checkpoint.get("random_state")
        self._gpu_random_state = checkpoint.get("gpu_random_state")
        batches = int(checkpoint["global_step"]) * self.batches_a_step
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for name in ("total", "current"):  # the batch may be cut into other parts than before
            progress[name].update(ready=batches, started=batches, processed=batches, completed=batches - 1)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the generator after a restart, only now: the loader has drawn its seed for the first batch."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            if self._gpu_random_state is not None and module.device.type == "cuda":
                torch.cuda.set_rng_state(self._gpu_random_state, module.device)
            self._random_state = self._gpu_random_state = None
