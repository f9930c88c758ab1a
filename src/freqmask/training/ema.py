"""A teacher that follows its student slowly."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Sets teacher = momentum teacher + (1 - momentum) student, for every parameter, in place.

    Buffers are left alone: a teacher in train mode gathers batch statistics from what it sees itself.

    Args:
        teacher: of the student's shape.
        student: any module.
        momentum: how much of the teacher remains, in [0, 1].
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
