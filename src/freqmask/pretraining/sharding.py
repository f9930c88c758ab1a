"""A method whose weights are spread over devices, and how to look at it whole."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from freqmask.methods import build_method

SHARDED = ("fsdp", "model_parallel")


def sharding_strategy(processes: int) -> ModelParallelStrategy:
    """Weights, gradients and optimiser state over all processes; a checkpoint is still one file.

    Args:
        processes: devices times nodes.
    """
    return ModelParallelStrategy(
        data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def shard(method: nn.Module, mesh: DeviceMesh) -> None:
    """Spread a method over the mesh, in place: each block of a backbone is gathered by itself when its turn comes.

    Args:
        method: teacher and student are cut alike, so that the moving average needs no communication.
        mesh: the devices that share the data.
    """
    for part in method.modules():
        if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 1:
            for block in part:
                if any(parameter.ndim > 1 for parameter in block.parameters()) and not _is_sharded(block):
                    fully_shard(block, mesh=mesh)
    fully_shard(method, mesh=mesh)


def _is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


def whole_method(trainer: L.Trainer, module: Any) -> Any:
    """The method with all its weights in this process.

    Without sharding that is the method itself. With it every process has to call this; the first gets a copy on
    the CPU, the others None.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return module.method
    state = trainer.strategy.lightning_module_state_dict()
    if not trainer.is_global_zero:
        return None
    copy = build_method(module.method.name, **module.method.settings)
    copy.load_state_dict({name.removeprefix("method."): value for name, value in state.items()})
    return copy.train(module.method.training)
