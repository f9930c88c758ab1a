"""What the start of every training has in common, whatever is trained: where it goes on, its end, its stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import lightning as L

from freqmask.training.checkpoint import load_safely
from freqmask.training.progress import Progress
from freqmask.training.runs import RunFolder
from freqmask.training.saving import StopSignals
from freqmask.training.tables import cut_back, read_rows


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
        """Read how far the checkpoint is, and forget the metrics beyond it: they come again."""
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
