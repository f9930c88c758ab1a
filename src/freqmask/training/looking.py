"""Looks that interrupt a training every so often."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning as L


class Look(L.Callback, ABC):
    """Calls :meth:`look` every so many optimiser steps, and at the end.

    Args:
        every_steps: optimiser steps between two looks; 0 looks at the end only.
    """

    def __init__(self, every_steps: int) -> None:
        """Nothing is read before it is needed."""
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
