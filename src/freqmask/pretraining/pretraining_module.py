"""The LightningModule, which only wires a method to the loop, and weights spread over devices seen whole."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from freqmask.images import as_float
from freqmask.methods import build_method
from freqmask.rng import combine
from freqmask.training.loop import ScheduledModule
from freqmask.training.optim import OptimConfig, Schedule, build_optimizer

SHARDED = ("fsdp", "model_parallel")


def sharding_strategy(processes: int) -> ModelParallelStrategy:
    """Weights, gradients and optimizer state over all processes; a checkpoint is still one file."""
    return ModelParallelStrategy(
        data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def shard(method: nn.Module, mesh: DeviceMesh) -> None:
    """Spread a method over the devices that share the data, in place: each block is gathered when its turn comes.

    Teacher and student are cut alike, so that the moving average needs no communication.
    """
    for part in method.modules():
        if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 1:
            for block in part:
                sharded = any(isinstance(inner, FSDPModule) for inner in block.modules())
                if any(parameter.ndim > 1 for parameter in block.parameters()) and not sharded:
                    fully_shard(block, mesh=mesh)
    fully_shard(method, mesh=mesh)


def whole_method(trainer: L.Trainer, module: Any) -> Any:
    """The method with all its weights; under sharding a copy on the CPU in the first process, in the others None.

    Every process has to call this.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return module.method
    state = trainer.strategy.lightning_module_state_dict()
    if not trainer.is_global_zero:
        return None
    copy = build_method(module.method.name, **module.method.settings)
    copy.load_state_dict({name.removeprefix("method."): value for name, value in state.items()})
    return copy.train(module.method.training)


class PretrainingModule(ScheduledModule):
    """Trains a method.

    Args:
        method: an ``nn.Module`` with the contract of :mod:`freqmask.methods`.
        optim: how the weights are moved.
        augmentation: photometric augmentation of one view each, ``(images, keys) -> images``; empty for none.
    """

    def __init__(
        self, method: nn.Module, optim: OptimConfig, augmentation: list[nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.method: Any = method
        self.optim = optim
        self.augmentation = nn.ModuleList(augmentation or [])
        self._sharded = False

    def training_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """One part of an optimizer step: the method's loss and its parts."""
        with torch.no_grad():
            views = [as_float(view) for view in batch["views"]]
            views = augmented(views, list(self.augmentation), batch["keys"])
        parts: dict[str, Tensor] = self.method(views, batch["keys"], details=self.want_details)
        self.check(parts["loss"])
        return parts

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, its learning rate set by the schedule at every step, after which FOLK's teacher follows."""
        optimizer = build_optimizer(self.method, self.optim)
        optimizer.register_step_post_hook(
            lambda *_: self.method.after_step(self.step, self.optim.total_steps)
        )
        self.schedule = Schedule(optimizer, self.optim)
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
        self.method.before_optimizer_step(self.step, self.optim.total_steps)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.optim.clip_grad if self.optim.clip_grad is not None else float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit).detach()
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm


def augmented(views: list[Tensor], augmentation: list[nn.Module], keys: Tensor) -> list[Tensor]:
    """Photometric augmentation of each view by its own module and keys; none where the list is empty."""
    if not augmentation:
        return views
    return [
        augment(view, combine(keys, number))
        for number, (augment, view) in enumerate(zip(augmentation, views, strict=True))
    ]
