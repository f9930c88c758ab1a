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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from freqmask import __version__
from freqmask.console import LINES_A_RUN, Progress, launched_processes, rank, say
from freqmask.data.loader import TrainSampler, worker_failure
from freqmask.errors import UserError
from freqmask.training.auto import (
    is_out_of_memory,
    threads_are_asked,
    translate_lone_image,
    usable_cores,
    world_size,
)
from freqmask.training.callbacks import (
    AtomicCheckpointIO,
    ExactResume,
    Export,
    Monitor,
    NotFiniteError,
    Saver,
    ShowStep,
    Skipped,
    StopSignals,
)
from freqmask.training.files import WriteError, cut_back, read_rows
from freqmask.training.optim import Schedule
from freqmask.training.run_folder import Checkpoint, RunFolder, heading, newest_usable, now

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # the largest that glibc takes
_NEVER = 2**31 - 1


class ScheduledModule(L.LightningModule):
    """A module whose optimizer follows a schedule by optimizer steps.

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
        """Optimizer steps made so far."""
        return int(self.trainer.global_step)

    def check(self, loss: Tensor) -> None:
        """Raises a NotFiniteError at once on a CPU; elsewhere reading it would be a wait, and the monitor reads it."""
        if self.device.type == "cpu" and not torch.isfinite(loss):
            raise NotFiniteError(self.step)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Set the learning rates of this step."""
        assert self.schedule is not None  # Lightning asks for the optimizer before the first batch
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
    """One training as the loop takes it."""

    run: RunFolder  # the run folder, locked
    # resolved options: steps, batch_size, accumulate, seed, lr; accelerator, devices, num_nodes, strategy,
    # precision; log_every_steps, checkpoint_every_steps, checkpoint_every_minutes, keep_checkpoints,
    # max_skipped_share
    numbers: Mapping[str, Any]
    module: ScheduledModule  # what is trained
    images: int  # how many are trained on
    # the loader of this process, given the Trainer and the optimizer steps that were made before
    batches: Callable[[L.Trainer, int], Any]
    export: Export  # writes what others load, at every checkpoint
    # further ones, given the monitor that takes their numbers into the metrics
    callbacks: Callable[[Monitor], Sequence[L.Callback]] = lambda monitor: ()
    shown: Mapping[str, str] = field(
        default_factory=dict
    )  # metrics in the progress bar, each with its format
    warmup_steps: int = 0  # no warning of a collapse before their end
    lines: int = LINES_A_RUN  # of a run where there is no terminal
    # further arguments of Lightning's Trainer: strategy, logger, sync_batchnorm
    trainer: Mapping[str, Any] = field(default_factory=dict)
    # the signal that came too late to stop it, in its last step: what follows it shall not begin
    interrupted: int | None = field(default=None, init=False)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return int(self.numbers["steps"])


def train(
    task: Task,
    checkpoint: Checkpoint | None,
    summarize: Callable[[], Mapping[str, Any]],
    stopped: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train from a checkpoint, or from the beginning, to the end, and write what the run ended with.

    A signal stops it after a step, with a checkpoint, and then ends the process as the signal would have.

    Args:
        task: what is trained.
        checkpoint: to resume from.
        summarize: what the summary holds beside steps, speed and times.
        stopped: called when a signal has stopped it.

    Returns:
        The summary.

    Raises:
        UserError: what a training may die of, with the way out.
    """
    run, numbers = task.run, task.numbers
    _take_threads(run.state())
    done, path = (checkpoint.step, checkpoint.path) if checkpoint else (0, None)
    batch, every = int(numbers["batch_size"]), int(numbers["log_every_steps"])
    with translate_errors(run, numbers), StopSignals() as signals:
        cut_back(run.metrics, "step", done if checkpoint else -1)  # rows of steps that will be made again
        progress = Progress(task.steps, done, task.shown, lines=task.lines)
        monitor = Monitor(run, progress, every, batch, task.images, task.warmup_steps)
        # rows of a step are written before its checkpoint: a restart from there will not make them again
        resume = ExactResume(int(numbers["accumulate"]))
        callbacks = [
            resume,
            Skipped(run.skipped, task.images, float(numbers["max_skipped_share"]), every),
            monitor,
            *task.callbacks(monitor),
            ShowStep(monitor),
            Saver(run, signals, monitor, numbers, task.export),
        ]
        trainer = make_trainer(task, callbacks, checkpoint)
        progress.start()
        try:
            trainer.fit(task.module, task.batches(trainer, done), ckpt_path=path, weights_only=True)
        finally:
            progress.close()
    step, seconds = int(trainer.global_step), resume.seconds
    rate = monitor.steps * batch / max(monitor.seconds, 1e-9)
    if signals.received is not None and step < task.steps:
        say(f"stopped at step {step:,} of {task.steps:,}, saved in {run.path}; the same command resumes it")
        if stopped is not None:
            stopped()
        leave(signals.received)
    if trainer.world_size == 1 or trainer.should_stop:  # of several processes all know of it then
        task.interrupted = signals.received
    counts = {"steps": step, "images_per_second": rate, "skipped": len(read_rows(run.skipped))}
    summary = {**counts, **summarize(), "seconds": round(seconds, 1), "ended": now()}
    if rank() == 0:
        run.finish(summary)
    return summary


def make_trainer(task: Task, callbacks: Sequence[L.Callback], resumed: Checkpoint | None) -> L.Trainer:
    """Lightning's Trainer, counting optimizer steps; sampler, checkpoints, progress and validation are ours."""
    numbers = task.numbers
    if numbers["accelerator"] == "cpu":
        tune_malloc()
    # Lightning takes the mere presence of SLURM's variables for having been started by srun; a shell has them, too
    alone = launched_processes() == 1 and "SLURM_NTASKS" in os.environ
    return L.Trainer(
        accelerator=numbers["accelerator"],
        devices=numbers["devices"],
        num_nodes=numbers["num_nodes"],
        precision=numbers["precision"],
        max_steps=task.steps,
        max_epochs=-1,
        accumulate_grad_batches=numbers["accumulate"],
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO(resumed), *([LightningEnvironment()] if alone else [])],
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


def tune_malloc() -> bool:
    """Let the allocator keep what is freed instead of handing it back to the system; whether it was told to.

    A step frees its memory in pieces and takes it again, and glibc hands back whatever lies at the end of its heap:
    9,800 page faults a step of a ViT of width 128, about a tenth of its time (docs/log.md). The process stays as
    large as it was at the height of a step. Other systems than Linux have other habits.
    """
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        # Setting one of the two ends glibc's own adjustment of the other.
        return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, _NEVER))
    return False


def begin_run(run: RunFolder, command: str, config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write down what a run was told: its resolved options, and beside them what they were resolved from."""
    versions = {"freqmask": __version__, "torch": str(torch.__version__), "began": now()}
    machine = {"cores": usable_cores()}
    if world_size(config) == 1:  # else Lightning deals the cores out, later
        machine["threads"] = torch.get_num_threads()
    run.begin(config, {**state, **machine, **versions}, heading(command))


@contextlib.contextmanager
def keep_threads() -> Iterator[None]:
    """A training inside may take fewer threads than the process has; afterwards they are as many as before.

    Lightning writes ``OMP_NUM_THREADS`` where it shares the cores among processes, and leaves it there.
    """
    before, asked = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if asked is None:
            os.environ.pop("OMP_NUM_THREADS", None)


def _take_threads(state: Mapping[str, Any]) -> None:
    """As many threads as the run began with, where there are as many cores: with others the last bits are others."""
    threads, here = state.get("threads"), torch.get_num_threads()
    if not isinstance(threads, int) or threads < 1 or threads == here or state.get("cores") != usable_cores():
        return
    if not threads_are_asked():
        torch.set_num_threads(threads)
        say(f"note: threads: {threads}, as the run began, not {here}; OMP_NUM_THREADS decides otherwise")


def find_checkpoint(run: RunFolder, notes: Sequence[str] = ()) -> Checkpoint | None:
    """The newest checkpoint that can be used, or None; says from where the run resumes, and what is worth a note."""
    checkpoint, warnings = newest_usable(run.checkpoints)
    where = f"from {checkpoint.path.name}" if checkpoint else "from its beginning, no checkpoint yet"
    say(f"run {run.path} resumes {where}; the plan is in {run.path / 'config.yaml'}")
    for note in (*warnings, *notes):
        say(f"note: {note}")
    return checkpoint


def images_at_once(numbers: Mapping[str, Any]) -> int:
    """Images of one part of a step on one device."""
    return int(numbers["batch_size"]) // world_size(numbers) // int(numbers["accumulate"])


def check_parts(numbers: Mapping[str, Any]) -> None:
    """Raises a UserError where a resumed run's batch cannot be dealt out to its devices and parts evenly."""
    batch, processes, parts = int(numbers["batch_size"]), world_size(numbers), int(numbers["accumulate"])
    if batch % (processes * parts):
        raise UserError(
            f"devices x num_nodes ({processes}) times accumulate ({parts}) must divide the run's batch_size ({batch}); "
            "try the --devices that it was begun with"
        )


def make_sampler(
    numbers: Mapping[str, Any], images: int, trainer: L.Trainer, done: int, **more: Any
) -> TrainSampler:
    """The order of images for this process, from the optimizer step after ``done`` on."""
    parts = int(numbers["accumulate"])
    return TrainSampler(
        images,
        numbers["seed"],
        images_at_once(numbers),
        rank=trainer.global_rank,
        world_size=world_size(numbers),
        start_step=done * parts,
        total_steps=int(numbers["steps"]) * parts,
        **more,
    )


def ends(run: RunFolder, names: list[str], firsts: bool = True) -> dict[str, float]:
    """The last value of each metric that has one, and its first as ``first_NAME``."""
    rows = read_rows(run.metrics)
    last_and_first: dict[str, float] = {}
    for name in names:
        values = []
        for row in rows:
            with contextlib.suppress(ValueError):  # an empty cell, or one that was edited
                values.append(float(row.get(name) or ""))
        if values:
            last_and_first |= {name: values[-1]} | ({f"first_{name}": values[0]} if firsts else {})
    return last_and_first


def leave(stopped_by: int) -> NoReturn:
    """End the process as its signal would have: with Ctrl-C's exception, or with the exit code 128 + signal."""
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + stopped_by)


@contextlib.contextmanager
def translate_errors(run: RunFolder, numbers: Mapping[str, Any]) -> Iterator[None]:
    """Turn what a training dies of into a UserError with the way out; what is unknown passes as it is."""
    try:
        with translate_lone_image(str(numbers.get("backbone", "the backbone"))):
            yield
    except NotFiniteError as error:
        raise UserError(
            f"{error} (learning rate {numbers['lr']:.3g}, precision {numbers['precision']}, "
            f"batch {numbers['batch_size']}); {_last_good(run)}; try --lr {numbers['lr'] / 2:.2g} "
            "or --precision 32-true with another --out"
        ) from error
    except WriteError as error:
        raise UserError(f"{error}; {_last_good(run)}; with room made, the same command resumes it") from error
    except MisconfigurationException as error:  # devices or nodes that do not fit a launcher or a machine
        raise UserError(" ".join(str(error).split())) from error
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if is_out_of_memory(error):
            peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
            raise UserError(
                f"out of memory with {images_at_once(numbers)} images at once; "
                + (f"the peak was {peak:.1f} GB; " if peak else "")
                + f"the same batch in smaller parts: --batch_size {numbers['batch_size']} --accumulate "
                f"{numbers['accumulate'] * 2}"
            ) from error
        if "loading state_dict" in str(error):
            first = str(error).splitlines()[1].strip()[:200]
            raise UserError(
                f"the newest checkpoint in {run.checkpoints} is of another network ({first}); delete it to resume "
                "from the one before it, or give another --out"
            ) from error
        if "--ntasks" in str(error):  # Lightning's rule for srun
            raise UserError(f"SLURM: {' '.join(str(error).split())}") from error
        failure = worker_failure(error)
        if failure is None:
            raise
        raise failure from error


def _last_good(run: RunFolder) -> str:
    kept = sorted(run.checkpoints.glob("step-*.ckpt"))
    return f"the last good checkpoint is {kept[-1]}" if kept else "there was no checkpoint yet"
