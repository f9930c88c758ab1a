"""The names of MFM's released checkpoints (docs/methods.md, exchange format), both ways.

A ViT has BEiT's names: queries and values with a bias of their own, keys with none. Dropping the keys' bias
changes nothing: it adds the same number to every score of a query, which softmax does not see.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from freqmask.errors import UserError
from freqmask.interop.timm_folder import differences

ENCODER, DECODER = "encoder.", "decoder."
_QKV_BIAS = re.compile(r"(.*\.attn\.)qkv\.bias")
_SPLIT_BIAS = re.compile(r"(.*\.attn\.)(q|v)_bias")


def to_beit_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A timm ViT's tensors under BEiT's names; what has no such name passes as it is."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = _QKV_BIAS.fullmatch(name)
        if found is None:
            renamed[name] = tensor
            continue
        query, _, value = tensor.chunk(3)
        renamed[f"{found[1]}q_bias"], renamed[f"{found[1]}v_bias"] = query, value
    return renamed


def from_beit_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BEiT's names to those of timm's ViT: the biases joined, the keys' zero.

    Raises:
        UserError: one of a block's two biases is missing.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = _SPLIT_BIAS.fullmatch(name)
        if found is None:
            renamed[name] = tensor
            continue
        query, value = state.get(f"{found[1]}q_bias"), state.get(f"{found[1]}v_bias")
        if query is None or value is None or query.shape != value.shape:
            raise UserError(
                f"{name} has no partner of its shape {tuple(tensor.shape)}; the file is incomplete"
            )
        renamed[f"{found[1]}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return renamed


def vit_shapes(
    dim: int, depth: int, hidden: int, patch: int, channels: int, tokens: int
) -> dict[str, tuple[int, ...]]:
    """The encoder's names and shapes of a ViT, without the prefix.

    Args:
        dim: width D of a token.
        depth: blocks.
        hidden: width of the MLPs.
        patch: side of a patch in pixels.
        channels: of the images.
        tokens: N + 1, with the class token.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, tokens, dim),
        "patch_embed.proj.weight": (dim, channels, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    for number in range(depth):
        block = {
            **{f"{norm}.{part}": (dim,) for norm in ("norm1", "norm2") for part in ("weight", "bias")},
            "attn.qkv.weight": (3 * dim, dim),
            "attn.q_bias": (dim,),
            "attn.v_bias": (dim,),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "mlp.fc1.weight": (hidden, dim),
            "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (dim, hidden),
            "mlp.fc2.bias": (dim,),
        }
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
    return shapes


def mfm_state(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an MFM checkpoint.

    Args:
        encoder: from :func:`mfm_encoder`.
        decoder: the reconstruction head's ``0.weight`` and ``0.bias``.
    """
    state = {ENCODER + name: tensor for name, tensor in encoder.items()}
    state |= {DECODER + name: tensor for name, tensor in decoder.items()}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def mfm_encoder(model: nn.Module) -> dict[str, Tensor]:
    """The encoder of an MFM checkpoint, without its prefix.

    Args:
        model: a timm ViT or ResNet.

    Raises:
        UserError: the layout cannot hold the model: its readers, who pass over what they do not know, would
            compute something else without a word.
    """
    return _vit_encoder(model) if type(model).__name__ == "VisionTransformer" else _resnet_encoder(model)


def _vit_encoder(model: Any) -> dict[str, Tensor]:
    encoder = to_beit_names(model.state_dict())
    hidden = model.blocks[0].mlp.fc1.out_features if hasattr(model.blocks[0].mlp, "fc1") else 0
    patch = model.patch_embed.proj.kernel_size[0] if hasattr(model.patch_embed, "proj") else 0
    tokens = 0 if getattr(model, "pos_embed", None) is None else model.pos_embed.shape[1]
    channels = model.patch_embed.proj.in_channels if patch else 0
    expected = vit_shapes(model.embed_dim, len(model.blocks), hidden, patch, channels, tokens)
    problems = differences(encoder, expected) + _unseen(model)
    if problems:
        raise _refusal(problems)
    return encoder


def _unseen(model: Any) -> list[str]:
    """What would compute differently though its tensors look the same."""
    problems = []
    heads = model.blocks[0].attn.num_heads
    if model.embed_dim != 64 * heads and (model.embed_dim, heads) != (1280, 16):
        problems.append(f"{heads} attention heads for width {model.embed_dim} (readers expect width / 64)")
    norm = model.norm
    if not isinstance(norm, nn.LayerNorm) or abs(norm.eps - 1e-6) > 1e-9:
        problems.append("a final normalisation that is no LayerNorm of epsilon 1e-6")
    block = type(model.blocks[0]).__name__
    if block != "Block":
        problems.append(f"blocks of kind {block}")
    activation = type(getattr(model.blocks[0].mlp, "act", None)).__name__
    if activation != "GELU":
        problems.append(f"the activation {activation}")
    return problems


def _resnet_encoder(model: Any) -> dict[str, Tensor]:
    import timm

    if type(model).__name__ != "ResNet":
        raise UserError(
            f"format (mfm-checkpoint) holds a plain ViT or ResNet, not {type(model).__name__}; "
            "--format timm holds every model"
        )
    bottleneck = type(model.layer1[0]).__name__ == "Bottleneck"
    layers = tuple(len(getattr(model, f"layer{number}")) for number in range(1, 5))
    plain = (
        timm.create_model(
            "resnet50" if bottleneck else "resnet18",
            num_classes=0,
            in_chans=model.conv1.in_channels,
            layers=layers,
        )
        if isinstance(model.conv1, nn.Conv2d)
        else None
    )
    if plain is None:
        raise _refusal(["a stem of several convolutions"])
    encoder = dict(model.state_dict())
    expected = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    problems = differences(encoder, expected)
    if not problems and repr(plain) != repr(model):
        problems = ["layers that differ from a plain ResNet's though their tensors look the same"]
    if problems:
        raise _refusal(problems)
    return encoder


def _refusal(problems: list[str]) -> UserError:
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    return UserError(
        "format (mfm-checkpoint) cannot hold this model, and its readers would drop the difference in silence: "
        f"{'; '.join(problems[:4])}{more}; --format timm holds every model"
    )
