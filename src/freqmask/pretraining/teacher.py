"""The frozen teacher of a run: opened, checked, timed, and known again when the run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from freqmask.backbones import height_and_width
from freqmask.errors import UserError, brief
from freqmask.interop.models import OpenedModel, open_model
from freqmask.interop.weight_files import hash_weights
from freqmask.methods.distill import Teacher, teacher_size
from freqmask.training import auto


def open_teacher(options: Mapping[str, Any]) -> Teacher:
    """The teacher that resolved options name, at its size.

    Raises:
        UserError: there is none of that name, its weights cannot be had, or it cannot see these images.
    """
    name = str(options["teacher"])
    opened = _open(name)
    own = (opened.input_size[1], opened.input_size[2])
    student = height_and_width(options["image_size"])
    size = teacher_size(student, own, options.get("teacher_size") or "auto")
    if opened.backbone.fixed_size and size != opened.backbone.image_size:
        opened = _open(name, size)
    teacher = Teacher(opened.backbone, name, size, opened.mean, opened.std)
    _check(teacher)
    return teacher


def _open(name: str, size: tuple[int, int] | None = None) -> OpenedModel:
    try:
        return open_model(name, image_size=size)
    except UserError as error:
        at = f"; at --teacher_size {min(size)}" if size is not None else ""
        raise UserError(f"--teacher: {error}{at}") from error


def _check(teacher: Teacher) -> None:
    images = torch.rand(
        2, teacher.backbone.channels, *teacher.size, generator=torch.Generator().manual_seed(0)
    )
    try:
        teacher(images)
    except RuntimeError as error:
        reason = brief(error, 160)
        raise UserError(
            f"teacher_size ({min(teacher.size)}) is none at which {teacher.name} works ({reason}); try another"
        ) from error


def weights_of(method: Any) -> dict[str, str]:
    """What tells the teacher's weights from others, for the run's state; nothing where none teaches."""
    teacher = getattr(method, "teacher", None)
    return {"teacher": hash_weights(teacher.backbone)} if isinstance(teacher, Teacher) else {}


def check_same(method: Any, state: Mapping[str, Any]) -> None:
    """Refuse to resume with other weights than those that the run began with.

    Raises:
        UserError: the teacher's weights have changed.
    """
    now = weights_of(method)
    if now and state.get("teacher", now["teacher"]) != now["teacher"]:
        raise UserError(
            f"teacher ({method.teacher.name}) has other weights than when the run began; bring back the old ones, or "
            "begin anew with another --out"
        )


def share_of_step(method: Any, loss: Callable[[int], torch.Tensor], device: torch.device) -> float:
    """The share of a step's time that the teacher's passes take, the least of three measurements.

    Args:
        method: a trial, which is hooked into.
        loss: its loss of a number of images.
        device: where it runs.
    """
    clock: list[float] = []
    method.teacher.register_forward_pre_hook(lambda *_: clock.append(auto.seconds_now(device)))
    method.teacher.register_forward_hook(lambda *_: clock.append(auto.seconds_now(device)))
    shares = []
    for _ in range(4):
        clock.clear()
        began = auto.seconds_now(device)
        loss(4).backward()
        shares.append((clock[1] - clock[0]) / (auto.seconds_now(device) - began))
    return min(shares[1:])
