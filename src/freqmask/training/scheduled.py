"""What our LightningModules have in common: a schedule that is applied, a gradient norm, a loss that is finite."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from freqmask.training.failures import NotFiniteError
from freqmask.training.recipe import Schedule


class ScheduledModule(L.LightningModule):
    """A module whose optimiser follows a schedule by optimiser steps.

    Attributes:
        schedule: set by ``configure_optimizers``.
        gradient_norm: of the last step, for the monitor.
        want_details: whether the monitor is about to read the parts of the loss.
    """

    def __init__(self) -> None:
        """The optimiser is made when Lightning asks for it."""
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
