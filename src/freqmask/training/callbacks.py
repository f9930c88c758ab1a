"""What happens beside the steps of a training: metrics, skipped images, checkpoints, stop signals, exact resume."""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as distributed
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from freqmask import imports
from freqmask.backbones import eval_no_grad
from freqmask.console import Progress
from freqmask.errors import UserError
from freqmask.training.files import append_row, read_rows, write_rows
from freqmask.training.run_folder import (
    Checkpoint,
    RunFolder,
    load_safely,
    publish,
    save_atomically,
    step_file,
)

COLLAPSE_WARNING = 0.1  # nats, docs/methods.md, small pictures
Export = Callable[[L.Trainer, L.LightningModule, int], None]


class NotFiniteError(UserError):
    """The loss became infinite or not a number at a step; the loop adds what to do."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is no longer finite at step {step + 1}")


def periods(steps: int, every_steps: int) -> int:
    """How often a :class:`Measurement` is made in a training."""
    return math.ceil(steps / (every_steps or steps))


class Monitor(L.Callback):
    """Writes metrics.csv, warns of collapse, stops at a loss that is not finite.

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
        # parts that told a name: details come with the logged steps alone
        self._counts: dict[str, Tensor] = {}
        self._parts = self._steps_at_row = self._steps_before = 0
        self._waited = self._batch_ended = self._row_began = self._seconds_before = 0.0
        # of all rows of all starts, without what is measured and saved between the steps
        self.steps, self.seconds = 0, 0.0
        self._warned = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clocks, where a checkpoint has left them."""
        self._batch_ended = time.perf_counter()
        self._row_began = self._batch_ended - self._seconds_before
        self._steps_at_row = trainer.global_step - self._steps_before
        self._ask_for_details(trainer, module)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """What passed since the last batch ended was spent waiting for this one."""
        self._waited += time.perf_counter() - self._batch_ended

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up; at the end of some optimizer steps write a row."""
        if not self._parts:
            self._sums, self._counts = {}, {}
        self._parts += 1
        whole = {"loss": outputs["loss"] * trainer.accumulate_grad_batches}  # Lightning divides it
        for name, value in {**outputs, **whole}.items():
            value = value.detach().float()
            # a filter that no image of a part drew has no value there, but in others; a loss always has
            counts = ~value.isnan() if name != "loss" else torch.ones_like(value, dtype=torch.bool)
            self._sums[name] = self._sums.get(name, 0.0) + torch.where(counts, value, 0.0)
            self._counts[name] = self._counts.get(name, 0.0) + counts.float()
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            step = trainer.global_step
            if self._is_logged(trainer, step):
                self._write_row(trainer, module, step)
            self._ask_for_details(trainer, module)
        self._batch_ended = time.perf_counter()

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what the row under way has gathered, and the speed so far."""
        checkpoint["row"] = {
            "totals": self._totals(trainer, module) if self._parts else {},
            "parts": self._parts,
            "waited": self._waited,
            "steps": trainer.global_step - self._steps_at_row,
            "seconds": time.perf_counter() - self._row_began,
            "before": [self.steps, self.seconds],
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with that row; checkpoints of 0.1.0 have none, and the speed is that of the steps made since."""
        if row := checkpoint.get("row"):
            self._sums = {name: torch.tensor(total) for name, (total, _) in row["totals"].items()}
            self._counts = {name: torch.tensor(count) for name, (_, count) in row["totals"].items()}
            self._parts, self._waited = row["parts"], row["waited"]
            self._steps_before, self._seconds_before = row["steps"], row["seconds"]
            self.steps, self.seconds = row["before"]

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

    def _totals(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, list[float]]:
        """The sum of each value since the last row, and of how many, the mean of all processes."""
        names = sorted(self._sums)
        pairs = [(self._sums[name], self._counts[name]) for name in names]
        values = torch.stack([torch.stack(pair).to(module.device) for pair in pairs])
        values = trainer.strategy.reduce(values, reduce_op="mean") if trainer.world_size > 1 else values
        return dict(zip(names, values.tolist(), strict=True))

    def _write_row(self, trainer: L.Trainer, module: Any, step: int) -> None:
        totals = self._totals(trainer, module).items()
        means = {name: total / count if count else math.nan for name, (total, count) in totals}
        if not math.isfinite(means["loss"]):
            raise NotFiniteError(step - 1)
        now = time.perf_counter()
        steps, elapsed = step - self._steps_at_row, max(now - self._row_began, 1e-9)
        self.steps, self.seconds = self.steps + steps, self.seconds + elapsed
        groups = trainer.optimizers[0].param_groups
        self.latest = {
            **means,
            "lr": max(float(group["lr"]) for group in groups),  # of the last layer
            "weight_decay": max(float(group["weight_decay"]) for group in groups),
            "grad_norm": float("nan") if module.gradient_norm is None else float(module.gradient_norm),
            "images_per_second": steps * self.batch_size / elapsed,
            "data_wait_share": min(self._waited / elapsed, 1.0),
        }
        row = {"epoch": step * self.batch_size / self.images, **self.latest}
        if trainer.is_global_zero:
            append_row(self.run.metrics, {"step": step, **row})
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        self._warn_of_collapse(step)
        self._parts, self._waited, self._row_began, self._steps_at_row = 0, 0.0, now, step

    def _warn_of_collapse(self, step: int) -> None:
        number = self.latest.get("collapse")
        if number is None or self._warned or step <= self.warmup_steps or number >= COLLAPSE_WARNING:
            return
        self._warned = True
        self.progress.note(
            f"warning: the teacher gives nearly all images the same answer (collapse number {number:.3f} nat, "
            f"healthy is above {COLLAPSE_WARNING}); try a lower --teacher_temperature, a lower --lr, or fewer --outputs"
        )


class Measurement(L.Callback, ABC):
    """Measures now and then and at the end, and writes the numbers into the metrics.

    Nothing of it reaches the training: modes are put back, no generator is moved (a loader draws its seed from
    torch's), and its time is left out of the speed.

    Args:
        monitor: takes the numbers.
        every_steps: optimizer steps between two measurements; 0 measures at the end only.
        batch_size: images at once.
    """

    def __init__(self, monitor: Monitor, every_steps: int, batch_size: int) -> None:
        self.monitor, self.every_steps, self.batch_size = monitor, every_steps, batch_size

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where it is time, measure in every process, and record what the first one has measured."""
        step = trainer.global_step
        is_due = step == trainer.max_steps or (self.every_steps and step % self.every_steps == 0)
        if not is_due or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        began = time.perf_counter()
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), eval_no_grad(module):
            values = self.measure(trainer, module, step)
        if values and trainer.is_global_zero:
            self.monitor.record(step, values)
        self.monitor.pause(time.perf_counter() - began)

    @abstractmethod
    def measure(self, trainer: L.Trainer, module: Any, step: int) -> dict[str, float]:
        """The numbers by their names in the metrics."""


class ShowStep(L.Callback):
    """Moves the progress bar at the end of an optimizer step; behind every measurement, whose numbers it shows."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the newest numbers."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            newest = {**self.monitor.recorded, **self.monitor.latest}
            self.monitor.progress.update(trainer.global_step, newest)


class Skipped(L.Callback):
    """Writes skipped.csv, and stops the run once ``max_share`` of the ``images`` trained on stand in it.

    Several processes tell each other every ``every_steps`` optimizer steps, and at the end, what theirs passed over.
    """

    def __init__(self, path: Path, images: int, max_share: float, every_steps: int) -> None:
        self.path, self.images, self.max_share, self.every_steps = path, images, max_share, every_steps
        self.known = {row.get("name") for row in read_rows(path)}
        self._passed: list[tuple[str, str]] = []  # not told yet

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """List what the loaders passed over."""
        self._passed += batch["skipped"]
        if trainer.world_size == 1 or trainer.global_step % self.every_steps == 0:
            self._list(trainer)
            if len(self.known) > self.max_share * self.images:
                raise UserError(
                    f"{len(self.known):,} of {self.images:,} images cannot be read, more than max_skipped_share "
                    f"({self.max_share:g}); {self.path} lists them with reasons"
                )

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """List what the other processes' loaders have passed over since; all steps are made and saved."""
        self._list(trainer)

    def _list(self, trainer: L.Trainer) -> None:
        told = [self._passed] * trainer.world_size
        if trainer.world_size > 1:
            distributed.all_gather_object(told, self._passed)
        self._passed = []
        for name, reason in itertools.chain.from_iterable(told):
            if name not in self.known:
                self.known.add(name)
                if trainer.is_global_zero:
                    append_row(self.path, {"name": name, "reason": reason})


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
    """Ctrl-C and SIGTERM stop the training after the step it is in; a second Ctrl-C ends it at once.

    In a command's own process that is the process; a program that called us (a notebook) gets KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._insisted = False
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
        if self._insisted:  # Lightning has made sys.exit(1) of it
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            if imports.own_process:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)
            self._insisted = True
            raise KeyboardInterrupt
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
        if step % self.monitor.log_every and step != trainer.max_steps:
            return False, False
        stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop and self.signals.received is None:
            self.signals.received = signal.SIGTERM  # by what another process was told
        return stop, bool(trainer.strategy.broadcast(due))


class ExactResume(L.Callback):
    """Keeps what Lightning's checkpoints leave out: torch's generator (dropout, drop path) and the batches seen.

    Every process has a generator of its own, or all would drop the same. One that has none in the checkpoint, made by
    fewer processes, begins with the seed, its rank and the step.

    Args:
        batches_a_step: parts that an optimizer step is made of now; it may differ from what it was.
    """

    def __init__(self, batches_a_step: int) -> None:
        self.batches_a_step = batches_a_step
        self._states: list[tuple[Tensor, Tensor | None]] = []  # of the CPU and of the GPU, by process
        self._is_set = False
        self.seconds_before, self._began = 0.0, time.time()  # what earlier starts took

    @property
    def seconds(self) -> float:
        """What the training has taken, all its starts together."""
        return self.seconds_before + time.time() - self._began

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the states of the global generators, and of those of the GPUs, where dropout draws."""
        on_gpu = module.device.type == "cuda"
        own = (torch.get_rng_state(), torch.cuda.get_rng_state(module.device) if on_gpu else None)
        checkpoint["seconds"] = self.seconds
        checkpoint["random_states"] = [own] * trainer.world_size
        if trainer.world_size > 1:
            distributed.all_gather_object(checkpoint["random_states"], own)

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the generator's state until the training starts: setting up draws numbers, too."""
        self.seconds_before = float(checkpoint.get("seconds", 0.0))
        of_one = (checkpoint.get("random_state"), checkpoint.get("gpu_random_state"))  # as 0.1.0 wrote it
        self._states = checkpoint.get("random_states") or [of_one]
        batches = int(checkpoint["global_step"]) * self.batches_a_step
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for name in ("total", "current"):  # the batch may be cut into other parts than before
            progress[name].update(ready=batches, started=batches, processed=batches, completed=batches - 1)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the generator at the first batch, only now: the loader has drawn its seed for it."""
        if self._is_set:
            return
        self._is_set, rank = True, trainer.global_rank
        state, gpu_state = self._states[rank] if rank < len(self._states) else (None, None)
        if state is not None:
            torch.set_rng_state(state)
        elif rank:
            torch.manual_seed(hash((torch.initial_seed(), rank, trainer.global_step)))
        if gpu_state is not None and module.device.type == "cuda":
            torch.cuda.set_rng_state(gpu_state, module.device)
