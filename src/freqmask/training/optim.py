"""How weights are moved: learning rate, schedule, parameter groups, a teacher's average (docs/methods.md, MFM)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.poly_lr import PolyLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

REFERENCE_BATCH = 512  # the papers state learning rates for this many images a step
BASE_LR = 3e-4
BASE_MIN_LR = 2.5e-6
BASE_WARMUP_LR = 2.5e-7
NEVER_DECAYED = ("pos_embed", "cls_token", "reg_token", "dist_token", "relative_position_bias_table")


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are moved."""

    lr: float  # learning rate that the warm-up leads to
    min_lr: float  # learning rate at the last step
    warmup_lr: float  # learning rate at the first step
    warmup_steps: int  # optimizer steps of linear warm-up; the cosine runs underneath it, as in the release
    total_steps: int  # optimizer steps of the whole training
    # for weights with two or more dimensions; biases, norms, positions and tokens get none
    weight_decay: float = 0.05
    # where a cosine leads the weight decay; equal to ``weight_decay`` keeps it constant
    weight_decay_end: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's
    clip_grad: float | None = 3.0  # largest norm of the gradient; None does not clip
    power: float | None = (
        None  # None decays along half a cosine, a number as ``(1 - step / total_steps)^power``
    )


def scaled_lr(base: float, batch_size: int, reference: int = REFERENCE_BATCH) -> float:
    """The linear rule: ``base * batch_size / reference``.

    >>> round(scaled_lr(3e-4, 2048), 6)
    0.0012
    """
    return base * batch_size / reference


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with weight decay and without.

    Args:
        module: whose parameters are trained; those that need no gradient are left out.
        weight_decay: for the first group; vectors, positions and tokens form the second, with 0.

    Returns:
        Parameter groups for a torch optimizer, empty ones left out.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in NEVER_DECAYED
        (undecayed if exempt else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_adamw(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], precision: str = "32-true"
) -> torch.optim.AdamW:
    """AdamW, fused where the device has a fused kernel.

    In ``16-mixed`` it is not: a fused one unscales gradients inside its step, so what is clipped and logged before
    would be the loss scale's multiple of them (65,536 at first).
    """
    fused = precision != "16-mixed" and all(
        parameter.device.type in ("cpu", "cuda") and not isinstance(parameter, DTensor)
        for group in groups
        for parameter in group["params"]
    )
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def build_optimizer(module: nn.Module, optim: OptimConfig, precision: str = "32-true") -> torch.optim.AdamW:
    """AdamW over the module's parameter groups, as ``make_adamw`` makes it for a precision of Lightning's."""
    # any but 0 tells which weights decay; the schedule sets a step's own
    groups = parameter_groups(module, optim.weight_decay or optim.weight_decay_end)
    return make_adamw(groups, optim.lr, optim.betas, precision)


class Schedule:
    """Learning rate and weight decay as functions of the step; it has no state of its own to save."""

    def __init__(self, optimizer: torch.optim.Optimizer, optim: OptimConfig) -> None:
        self.optimizer = optimizer
        self.optim = optim
        for group in optimizer.param_groups:
            group["initial_lr"] = optim.lr
        # told apart once: on its way a weight decay may be 0, as it always is of the others
        self._is_decayed = [group["weight_decay"] > 0 for group in optimizer.param_groups]
        shared: dict[str, Any] = {
            "t_initial": max(optim.total_steps, 2),  # timm warns of a cosine over a single step
            "lr_min": optim.min_lr,
            "warmup_t": optim.warmup_steps,
            "warmup_lr_init": optim.warmup_lr,
            "t_in_epochs": False,
            "initialize": False,
        }
        self._decay = (
            CosineLRScheduler(optimizer, **shared)
            if optim.power is None
            else PolyLRScheduler(optimizer, power=optim.power, **shared)
        )

    def apply(self, step: int) -> None:
        """Set every group's learning rate and weight decay for optimizer step ``step``, counted from 0."""
        self._decay.step_update(step)
        if self.optim.weight_decay_end == self.optim.weight_decay:
            return
        start, end = self.optim.weight_decay, self.optim.weight_decay_end
        share = min(step / max(self.optim.total_steps, 1), 1.0)
        decay = end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))
        for group, is_decayed in zip(self.optimizer.param_groups, self._is_decayed, strict=True):
            if is_decayed:
                group["weight_decay"] = decay


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Sets teacher = momentum teacher + (1 - momentum) student, for every parameter, in place.

    Buffers are left alone: a teacher in train mode gathers batch statistics from what it sees itself.
    """
    followers: list[Tensor] = list(teacher.parameters())
    leaders: list[Tensor] = list(student.parameters())
    torch._foreach_lerp_(followers, leaders, 1.0 - momentum)  # one launch for all of them


def cosine_momentum(start: float, step: int, total_steps: int) -> float:
    """Momentum that rises from ``start`` at step 0 to 1 at ``total_steps`` along half a cosine.

    >>> cosine_momentum(0.996, 0, 100), cosine_momentum(0.996, 100, 100)
    (0.996, 1.0)
    """
    progress = min(step / max(total_steps, 1), 1.0)
    return 1.0 - (1.0 - start) * (math.cos(math.pi * progress) + 1.0) / 2.0
