"""A backbone becomes a classifier: the same timm model with a head."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import get_model_args
from torch import Tensor, nn

from freqmask.errors import UserError
from freqmask.interop.models import OpenedModel
from freqmask.timm_models import REFUSED, cannot, parameters_behind

HEAD_STD, HEAD_SCALE = 0.02, 0.001  # docs/evaluating.md, Fine-tuning
_DROPPED = ("norm.", "attn_pool.")  # a ViT's own end, which the mean of its patches goes round


@dataclass
class Network:
    """A classifier before its first step.

    Attributes:
        model: a timm model.
        image_size: (height, width) that it takes.
        fresh: parameters that begin from nothing.
        dropped: pre-trained parameters that have no place in it.
        fixed_size: whether it takes this size only.
        notes: sentences for the user.
    """

    model: Any
    image_size: tuple[int, int]
    fresh: list[str]
    dropped: list[str]
    fixed_size: bool
    notes: list[str]


def make_classifier(opened: OpenedModel, classes: int, drop_path: float, seed: int) -> Network:
    """The model's own timm architecture with its weights and a fresh head.

    A ViT is read as MFM reads it: the mean of the patch tokens through a fresh normalisation (``fc_norm``), its
    pre-trained final one left out; the head is normal with std 0.02, cut at two, times 0.001. Other families
    keep their own end, with timm's initialisation of the head.

    Args:
        opened: the backbone.
        classes: of the data.
        drop_path: share of residual branches that is dropped in the last block.
        seed: of the fresh parameters.

    Raises:
        UserError: the architecture has no classifier, or its weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, notes = _create(opened, classes, drop_path)
        head = model.get_classifier()
        if opened.backbone.is_vit and isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=HEAD_STD)
            with torch.no_grad():
                head.weight.mul_(HEAD_SCALE)
                head.bias.zero_()
    fresh, dropped = _load(model, opened)
    backbone = opened.backbone
    size = backbone.padded_size if backbone.fixed_size else backbone.image_size
    _leave_out_unreached(model, torch.zeros(1, backbone.channels, *size), opened.name)
    return Network(model, size, fresh, dropped, backbone.fixed_size, notes)


def _create(opened: OpenedModel, classes: int, drop_path: float) -> tuple[Any, list[str]]:
    """The architecture as it was made for the backbone, with a head; what cannot drop paths does without."""
    module = opened.module
    architecture = str(module.pretrained_cfg["architecture"])
    arguments = {**get_model_args(module), **_pooling(opened), "num_classes": classes}
    try:
        return timm.create_model(architecture, drop_path_rate=drop_path, **arguments), []
    except TypeError as error:
        refused = REFUSED.search(str(error))
        if refused is None or refused[1] != "drop_path_rate":
            raise cannot(architecture, f"{classes} classes with {arguments}", error) from error
    except (AssertionError, RuntimeError, ValueError) as error:
        raise cannot(architecture, f"{classes} classes with {arguments}", error) from error
    notes = [f"drop path is off: {architecture} does not take it"] if drop_path else []
    return timm.create_model(architecture, **arguments), notes


def _pooling(opened: OpenedModel) -> dict[str, Any]:
    """Arguments by which a ViT averages its patch tokens and normalises afterwards."""
    taken = inspect.signature(type(opened.module).__init__).parameters
    norm = next((name for name in ("fc_norm", "use_fc_norm") if name in taken), None)
    if not opened.backbone.is_vit or norm is None or "global_pool" not in taken:
        return {}
    return {"global_pool": "avg", norm: True}


def _load(model: Any, opened: OpenedModel) -> tuple[list[str], list[str]]:
    """Take the backbone's weights over; names of what stays fresh and of what has no place."""
    ours, theirs = model.state_dict(), opened.module.state_dict()
    head = {id(tensor) for part in _heads(model) for tensor in part.state_dict(keep_vars=True).values()}
    heads = {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in head}
    fresh = [name for name in ours if name not in theirs]
    dropped = [name for name in theirs if name not in ours]
    lost = [name for name in fresh if name not in heads and not name.startswith("fc_norm.")]
    lost += [name for name in dropped if not name.startswith(_DROPPED)]
    lost += [name for name in ours if name in theirs and ours[name].shape != theirs[name].shape]
    if lost:
        shapes = ", ".join(
            f"{name} {_shape(theirs.get(name))} -> {_shape(ours.get(name))}" for name in lost[:3]
        )
        raise UserError(
            f"model ({opened.name}): {len(lost)} of its parameters do not fit a classifier of the same "
            f"architecture ({shapes}); export it again, or take another model"
        )
    model.load_state_dict({name: tensor for name, tensor in theirs.items() if name in ours}, strict=False)
    return fresh, dropped


def _heads(model: Any) -> list[nn.Module]:
    head = model.get_classifier()
    found = [part for part in (head if isinstance(head, tuple) else (head,)) if isinstance(part, nn.Module)]
    if not any(list(part.parameters()) for part in found):
        raise UserError(f"model ({type(model).__name__}) has no classifier in timm; take another backbone")
    return found


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else "x".join(map(str, tensor.shape)) or "scalar"


def _leave_out_unreached(model: Any, image: Tensor, name: str) -> None:
    """Parameters that the answer does not depend on need no gradient: DDP refuses to wait for them."""
    model.requires_grad_(True).eval()
    try:
        with torch.enable_grad():
            reached = parameters_behind([model(image)])
    except (AssertionError, RuntimeError, ValueError) as error:
        raise cannot(name, f"images of {tuple(image.shape[-2:])}", error) from error
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in reached)
    model.train()
