"""Names and shapes of tensors: MFM's released checkpoints both ways, BEiT's and DINOv2's, and the timm architecture
that tensors belong to (ViT, BEiT, ResNet).

In MFM's files (docs/methods.md, exchange format) a ViT has BEiT's names: queries and values with a bias of their own,
keys with none. Dropping the keys' bias changes nothing: it adds the same number to every score of a query, which
softmax does not see.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from freqmask.errors import UserError
from freqmask.interop.timm_folder import differences
from freqmask.timm_models import check_name

ENCODER, DECODER = "encoder.", "decoder."
_QKV_BIAS = re.compile(r"(.*\.attn\.)qkv\.bias")
_SPLIT_BIAS = re.compile(r"(.*\.attn\.)(q|v)_bias")
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
}


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
    heads, block = model.blocks[0].attn.num_heads, type(model.blocks[0]).__name__
    activation = type(getattr(model.blocks[0].mlp, "act", None)).__name__
    has_usual_heads = model.embed_dim == 64 * heads or (model.embed_dim, heads) == (1280, 16)
    has_usual_norm = isinstance(model.norm, nn.LayerNorm) and abs(model.norm.eps - 1e-6) <= 1e-9
    unusual = {
        f"{heads} attention heads for width {model.embed_dim} (readers expect width / 64)": not has_usual_heads,
        "a final normalization that is no LayerNorm of epsilon 1e-6": not has_usual_norm,
        f"blocks of kind {block}": block != "Block",
        f"the activation {activation}": activation != "GELU",
    }
    return [what for what, is_unusual in unusual.items() if is_unusual]


def _resnet_encoder(model: Any) -> dict[str, Tensor]:
    if type(model).__name__ != "ResNet":
        raise UserError(
            f"format (mfm-checkpoint) holds a plain ViT or ResNet, not {type(model).__name__}; "
            "--format timm holds every model"
        )
    if not isinstance(model.conv1, nn.Conv2d):
        raise _refusal(["a stem of several convolutions"])
    plain = timm.create_model(
        "resnet50" if type(model.layer1[0]).__name__ == "Bottleneck" else "resnet18",
        num_classes=0,
        in_chans=model.conv1.in_channels,
        layers=tuple(len(getattr(model, f"layer{number}")) for number in range(1, 5)),
    )
    encoder = dict(model.state_dict())
    problems = differences(
        encoder, {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    )
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


def architecture_of(
    state: Mapping[str, Tensor], backbone: str | None, model_args: dict[str, Any]
) -> tuple[str, dict[str, Any], list[str]]:
    """The timm name and arguments, and sentences on what was assumed.

    Args:
        state: the backbone's tensors.
        backbone: the timm name where it is known; None tells it from the tensors.
        model_args: timm's arguments that were given; they go first.

    Raises:
        UserError: neither is the name known nor can it be told.
    """
    if "layer1.0.conv1.weight" in state and backbone is None:
        name, arguments = _resnet(state)
        return name, {**arguments, **model_args}, []
    is_vit = backbone is None or _module_of(backbone) in ("vision_transformer", "beit", "deit")
    if is_vit and "patch_embed.proj.weight" in state and "blocks.0.attn.qkv.weight" in state:
        name, arguments, notes = _vit(state, backbone, model_args)
        return name, {**arguments, **model_args}, notes
    if backbone is None:
        raise UserError(
            "the architecture cannot be told from the file (it is no plain ViT, BEiT or ResNet: "
            f"{', '.join(sorted(state)[:3])} ...); name it with --backbone, as timm does"
        )
    check_name(backbone)
    return backbone, {"num_classes": _classes(state), **model_args}, []


def _module_of(backbone: str) -> str:
    check_name(backbone)
    return str(timm.model_entrypoint(backbone.split(".")[0]).__module__).split(".")[-1]


def _vit(
    state: Mapping[str, Tensor], backbone: str | None, given: Mapping[str, Any]
) -> tuple[str, dict[str, Any], list[str]]:
    dim = state["patch_embed.proj.weight"].shape[0]
    _, channels, patch, _ = state["patch_embed.proj.weight"].shape
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0] if "blocks.0.mlp.fc1.weight" in state else 4 * dim
    is_beit = any("relative_position_bias_table" in name for name in state)
    has_layer_scale = "blocks.0.gamma_1" in state
    size = _SIZES.get(dim, "base")
    family = "beit" if is_beit or has_layer_scale else "vit"
    name = backbone or (
        f"beit_{size if size == 'large' else 'base'}_patch16_224"
        if family == "beit"
        else f"vit_{size}_patch{14 if size == 'huge' else 16}_224"
    )
    check_name(name)
    heads = given.get("num_heads") or (16 if dim == 1280 else max(1, dim // 64))
    arguments: dict[str, Any] = {
        "img_size": _vit_image_size(state, patch, given),
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": dim,
        "depth": 1
        + max(int(block[1]) for block in map(re.compile(r"blocks\.(\d+)\.").match, state) if block),
        "num_heads": heads,
        "mlp_ratio": hidden / dim,
        "num_classes": _classes(state),
    }
    if family == "beit" and name.startswith("beit"):
        shared = "rel_pos_bias.relative_position_bias_table" in state
        arguments |= {
            "use_abs_pos_emb": "pos_embed" in state,
            "use_rel_pos_bias": any(".attn.relative_position_bias_table" in key for key in state),
            "use_shared_rel_pos_bias": shared,
            "global_pool": "avg" if "fc_norm.weight" in state else "token",
        }
    elif "fc_norm.weight" in state:
        arguments |= {"global_pool": "avg", "fc_norm": True}
    if family == "vit":
        arguments |= _vit_extras(state)
    note = f"attention heads: {heads} (width / 64; the file does not tell: --model_args '{{num_heads: N}}')"
    return name, arguments, [] if "num_heads" in given else [note]


def _vit_extras(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a ViT may have or lack beside BEiT's and MFM's."""
    extras: dict[str, Any] = {}
    if "cls_token" not in state:
        extras |= {"class_token": False, "global_pool": "avg"}
    if "reg_token" in state:
        extras["reg_tokens"] = state["reg_token"].shape[1]
    if "pos_embed" in state and _places_before(state) == 0 and _prefix_tokens(state) > 0:
        extras["no_embed_class"] = True
    if "blocks.0.ls1.gamma" in state:
        extras["init_values"] = 1e-5  # the values themselves are in the file
    if not any(name in state for name in ("blocks.0.attn.qkv.bias", "blocks.0.attn.q_bias")):
        extras["qkv_bias"] = False
    return extras


def _prefix_tokens(state: Mapping[str, Tensor]) -> int:
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    return int("cls_token" in state) + registers


def _places_before(state: Mapping[str, Tensor]) -> int:
    places, tokens = state["pos_embed"].shape[1], _prefix_tokens(state)
    return next((n for n in (tokens, 1, 0) if math.isqrt(places - n) ** 2 == places - n > 0), min(tokens, 1))


def _vit_image_size(state: Mapping[str, Tensor], patch: int, given: Mapping[str, Any]) -> Any:
    if "img_size" in given:
        return given["img_size"]
    if "pos_embed" in state:
        cells = state["pos_embed"].shape[1] - _places_before(state)
    else:
        table = next((state[name] for name in state if name.endswith("relative_position_bias_table")), None)
        # a table of a window n x n has (2n - 1)^2 + 3 rows, the three for the class token
        cells = 196 if table is None else ((math.isqrt(table.shape[0] - 3) + 1) // 2) ** 2
    side = math.isqrt(cells)
    if side * side != cells or side == 0:
        raise UserError(
            f"pos_embed has {cells} places, which is no square; give the size with --model_args "
            "'{img_size: [HEIGHT, WIDTH]}'"
        )
    return [side * patch, side * patch]


def as_timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's tensors with DINOv2's registers as timm has them: no place of the class token in ``pos_embed``."""
    if "register_tokens" not in state:
        return dict(state)
    renamed = {**state, "reg_token": state["register_tokens"]}
    del renamed["register_tokens"]
    if _places_before(renamed) == 1:
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


def _resnet(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    layers = tuple(
        1 + max((int(name.split(".")[1]) for name in state if name.startswith(f"layer{number}.")), default=-1)
        for number in range(1, 5)
    )
    bottleneck = "layer1.0.conv3.weight" in state
    name = _RESNETS.get((bottleneck, layers))
    arguments: dict[str, Any] = {"num_classes": _classes(state)}
    if "conv1.weight" in state:
        arguments["in_chans"] = state["conv1.weight"].shape[1]
    if name is None:
        name, arguments["layers"] = ("resnet50" if bottleneck else "resnet18"), list(layers)
    return name, arguments


def _classes(state: Mapping[str, Tensor]) -> int:
    for name in ("head.weight", "fc.weight", "head.fc.weight", "classifier.weight"):
        if name in state and state[name].dim() == 2:
            return int(state[name].shape[0])
    return 0
