"""The LightningModule: it wires a method to the recipe and knows nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from freqmask.images import as_float
from freqmask.pretraining.sharding import shard
from freqmask.rng import combine
from freqmask.training.loop import ScheduledModule
from freqmask.training.optim import OptimConfig, Schedule, build_optimizer


class PretrainingModule(ScheduledModule):
    """Trains a method by a recipe.

    Args:
        method: an ``nn.Module`` with the contract of :mod:`freqmask.methods`.
        recipe: how the weights are moved.
        augmentation: photometric augmentation of one view each, ``(images, keys) -> images``; empty for none.
    """

    def __init__(
        self, method: nn.Module, recipe: OptimConfig, augmentation: list[nn.Module] | None = None
    ) -> None:
        """Wire the parts; the optimiser is made when Lightning asks for it."""
        super().__init__()
        self.method: Any = method
        self.recipe = recipe
        self.augmentation = nn.ModuleList(augmentation or [])
        self._sharded = False

    def views(self, batch: dict[str, Any]) -> list[Tensor]:
        """The batch's views as the method takes them: float in [0, 1], augmented on the device.

        Args:
            batch: from :func:`freqmask.data.loader.make_loader`.

        Returns:
            A list of (B, C, H, W).
        """
        return augmented([as_float(view) for view in batch["views"]], list(self.augmentation), batch["keys"])

    def training_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """One part of an optimiser step: the method's loss and its parts."""
        with torch.no_grad():
            views = self.views(batch)
        parts: dict[str, Tensor] = self.method(views, batch["keys"], details=self.want_details)
        self.check(parts["loss"])
        return parts

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, its learning rate set by the schedule at every step."""
        optimizer = build_optimizer(self.method, self.recipe)
        self.schedule = Schedule(optimizer, self.recipe)
        return optimizer

    def configure_model(self) -> None:
        """Spread the method over the devices where the strategy asks for it."""
        mesh = getattr(self, "_device_mesh", None)  # set by Lightning's sharding strategy alone
        if mesh is not None and not self._sharded:
            shard(self.method, mesh["data_parallel"])
            self._sharded = True

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Let the method drop gradients (FOLK's frozen layer), then clip the rest by their norm."""
        self.method.before_optimizer_step(self.step, self.recipe.total_steps)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.recipe.clip_grad if self.recipe.clip_grad is not None else float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit).detach()
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then what the method does after a step (FOLK's moving average)."""
        optimizer.step(closure=optimizer_closure)
        self.method.after_step(self.step, self.recipe.total_steps)


def augmented(views: list[Tensor], augmentation: list[nn.Module], keys: Tensor) -> list[Tensor]:
    """Photometric augmentation of each view by its own module and keys; none where the list is empty."""
    if not augmentation:
        return views
    return [
        augment(view, combine(keys, number))
        for number, (augment, view) in enumerate(zip(augmentation, views, strict=True))
    ]
