"""Runs and photographs as small as they come, written by hand: training for every test would take minutes."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from freqmask.interop.weight_files import trained_feature, write_timm_folder
from freqmask.interop.weights import method_of
from freqmask.training.loop import ScheduledModule
from freqmask.training.run_folder import RunFolder

# a whole pre-training in a second or two
TINY: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "backbone": "vit_tiny_patch16_224",
    "model_args": {"depth": 1, "embed_dim": 32, "num_heads": 2},
    "batch_size": 8,
    "steps": 6,
    "workers": 0,
    "preview_every_steps": 0,
    "probe_every_epochs": 1.0,  # at the end only: a thousand images take longer than all the steps
    "accelerator": "cpu",
}
TINY_VIT = {"depth": 2, "embed_dim": 64, "num_heads": 1}


def fused_backwards(output: torch.Tensor) -> int:
    """How many of the CPU's fused attention kernels a gradient of ``output`` goes through."""
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return sum("FlashAttention" in node.name() for node in seen if node is not None)


def fused_in_training(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Their number in the loss of every step from now on."""
    found: list[int] = []
    monkeypatch.setattr(ScheduledModule, "check", lambda _, loss: found.append(fused_backwards(loss)))
    return found


def close(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a folder of somebody else's with the rights 700; root, as whom tests may run, could still look into it."""
    stat, may, read = os.stat, os.access, Path.read_bytes

    def refuse(path: Any) -> None:
        if folder in Path(os.fsdecode(path)).parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def closed_stat(path: Any, **options: Any) -> os.stat_result:
        if isinstance(path, (str, bytes, os.PathLike)):
            refuse(path)
        return stat(path, **options)

    def closed_read(path: Path) -> bytes:
        refuse(path)
        return read(path)

    monkeypatch.setattr(os, "stat", closed_stat)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and may(path, mode))
    monkeypatch.setattr(Path, "read_bytes", closed_read)


def spawned(parent: psutil.Process, least_bytes: float = 0.0) -> list[psutil.Process]:
    """The Python processes that one has spawned; any child may end while it is looked at."""
    found = []
    for child in parent.children():
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()) and child.memory_info().rss >= least_bytes:
                found.append(child)
    return found


def make_run(folder: Path, **options: Any) -> RunFolder:
    """A run folder as ``freqmask pretrain`` leaves it, its weights random."""
    options = {
        "data": ["/home/somebody/secret holiday"],
        "method": "mfm",
        "backbone": "vit_small_patch16_224",
        "image_size": 32,
        "channels": 3,
        "patch_size": 8,
        "value_range": "dtype",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "batch_size": 4,
        "model_args": TINY_VIT,
        **options,
    }
    options = {name: value for name, value in options.items() if value is not None}
    torch.manual_seed(0)
    method: Any = method_of(options, 40)
    for name, tensor in method.state_dict().items():  # zero biases and equal tokens would hide mistakes
        if tensor.is_floating_point() and "running_var" not in name and "normalise" not in name:
            tensor.add_(0.05 * torch.randn_like(tensor))
    run = RunFolder(folder)
    run.begin(options, {"images": 40, "data": "abc123"}, "a test's run")
    run.checkpoints.mkdir()
    state = {f"method.{name}": tensor for name, tensor in method.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 20}, run.checkpoints / "last.ckpt")
    backbone = method.backbones()[method.default_backbone]
    height, width = backbone.image_size
    write_timm_folder(
        backbone.timm_model,
        run.backbone,
        input_size=(options["channels"], height, width),
        mean=options["mean"],
        std=options["std"],
        metadata={
            "run": folder.name,
            "method": options["method"],
            "value_range": options["value_range"],
            "data": "abc123",
            "step": 20,
            "weights": method.default_backbone,
        },
        pooled=trained_feature(method, backbone),
    )
    run.finish({"steps": 20, "loss": 0.5, "held_out_relative_loss": 0.9})
    return run


def make_photographs(folder: Path) -> Path:
    """Seven small images in two classes, one of them broken."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        pixels = torch.rand(5, 5, 3, generator=generator)
        large = torch.nn.functional.interpolate(pixels.permute(2, 0, 1)[None], size=(48, 40), mode="bicubic")
        path = folder / ("cats" if number % 2 else "dogs") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((255 * large[0].clamp(0, 1)).byte().permute(1, 2, 0).numpy()).save(path)
    (folder / "cats" / "9.png").write_bytes(b"no image at all")
    return folder


def steps_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by every optimiser step from now on."""
    from freqmask.training.callbacks import Monitor

    whole, steps = Monitor.on_train_batch_end, []

    def noting(self: Any, trainer: Any, *rest: Any) -> None:
        steps.append(trainer.global_step)
        whole(self, trainer, *rest)

    monkeypatch.setattr(Monitor, "on_train_batch_end", noting)
    return steps


def train_until(step: int, options: dict[str, Any], out: Path, data: Any = "builtin:digits") -> None:
    """Break off after a step as a kill would: nothing is saved any more."""
    import freqmask
    from freqmask.training.callbacks import Monitor

    whole = Monitor.on_train_batch_end

    def broken(self: Any, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == step:
            raise RuntimeError("killed here")
        whole(self, trainer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "on_train_batch_end", broken)
        freqmask.pretrain(data, **options, out=str(out))
