"""Methods small enough for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from freqmask.backbones import Backbone
from freqmask.methods import build_method
from freqmask.methods.distill import Teacher

VIT: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "image_size": 32,
    "patch_size": 8,
    "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
}
CNN: dict[str, Any] = {
    "backbone": "resnet18",
    "image_size": 32,
    "model_args": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "output_stride": 8},
}
HEADS: dict[str, Any] = {"outputs": 16, "hidden_size": 32, "bottleneck_size": 8}


def tiny_method(name: str, network: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A method that runs in a few milliseconds, the same each time."""
    heads = HEADS if name == "folk" else {"words": 16} if name == "words" else {}
    if name == "distill" and "teacher" not in settings:
        settings["teacher"] = tiny_teacher(settings.get("channels", 3))
    torch.manual_seed(0)
    return build_method(name, **{**(network or VIT), **heads, **settings})


def tiny_teacher(channels: int = 3) -> Teacher:
    """A small network with weights drawn at random, which sees images at 40 pixels."""
    torch.manual_seed(1)
    small = {"layers": (1, 1, 1, 1), "channels": (4, 8, 8, 12)}
    backbone = Backbone("resnet18", 40, channels, model_args=small)
    return Teacher(backbone, "random:resnet18", size=40)


def photographs(count: int = 4, channels: int = 3, size: tuple[int, int] = (32, 32), seed: int = 1) -> Tensor:
    """Smooth random images in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


def views_for(method: Any, **options: Any) -> list[Tensor]:
    """As many different views as the method takes."""
    return [photographs(seed=number + 1, **options) for number in range(method.n_views)]
