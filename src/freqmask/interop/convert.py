"""Somebody else's checkpoint becomes an exported folder: MFM's, BEiT's, or a state dict with timm's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from freqmask import __version__
from freqmask.errors import UserError
from freqmask.interop.architecture import architecture_of
from freqmask.interop.folders import IMAGENET_MEAN, IMAGENET_STD, fitted
from freqmask.interop.inert_pickle import Inert, StoredTensor, tensors_in
from freqmask.interop.mfm_layout import DECODER, ENCODER, differences, from_beit_names
from freqmask.interop.torch_file import read_torch_file

_CONTAINERS = ("model", "state_dict", "model_state", "module", "teacher", "student", "backbone", "net")
_WRAPPERS = (
    "module.",
    "_orig_mod.",
    "model.",
    "backbone.",
)  # what DDP, compilation and others put before names
# tasks' own tensors, without which the backbone is the same
_PASSED_OVER = re.compile(r"(mask_token|lm_head\..*|.*relative_position_index|fc\..*|head\..*|norm\..*)")


@dataclass
class Weights:
    """The tensors of a file, sorted.

    Attributes:
        encoder: the backbone's, by names as they stand in the file without prefixes.
        decoder: the reconstruction head's, ``0.weight`` and ``0.bias``; empty where there is none.
        notes: whole sentences on what was left out.
        architecture: the timm name that the file gives, if it does.
        epoch: that the file gives.
    """

    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    architecture: str | None = None
    epoch: int | None = None


@dataclass
class Converted:
    """A model made from a file.

    Attributes:
        model: the timm module with the weights in it.
        architecture: its timm name.
        image_size: height and width in pixels.
        mean: of the channels that the weights expect.
        std: of the channels.
        decoder: tensors of the reconstruction head; empty where there is none.
        notes: whole sentences on what was assumed, left out or interpolated.
        facts: for config.json.
    """

    model: Any
    architecture: str
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    decoder: dict[str, Tensor]
    notes: list[str]
    facts: dict[str, Any]


def convert_file(
    path: str | Path,
    backbone: str | None = None,
    image_size: int | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> Converted:
    """A checkpoint as a timm model; nothing in the file is run.

    Args:
        path: a file of ``torch.save`` or safetensors.
        backbone: the timm architecture; None tells it from names and shapes (ViT, BEiT, ResNet).
        image_size: side in pixels; positions are interpolated to it. None is the file's own.
        model_args: timm's arguments that the file cannot tell, such as ``{"num_heads": 8}``.

    Raises:
        UserError: the file is broken or refused, or does not fit; every tensor that does not is named.
    """
    weights = read_weights(path)
    known = backbone or weights.architecture
    name, arguments, notes = architecture_of(weights.encoder, known, dict(model_args or {}))
    is_beit = name.startswith("beit")
    state = weights.encoder if is_beit else from_beit_names(weights.encoder)
    model = _model(name, arguments)
    notes += _load(model, state, name, known is None)
    size = _image_size(model)
    if image_size is not None and (image_size, image_size) != size:
        model, said = _resized(model, name, arguments, image_size)
        notes.append(said)
        size = (image_size, image_size)
    facts: dict[str, Any] = {
        "version": __version__,
        "converted_from": Path(path).name,
        "value_range": "dtype",
    }
    if weights.epoch is not None:
        facts["epoch"] = weights.epoch
    mean, std, said = _statistics(model, weights)
    return Converted(model, name, size, mean, std, weights.decoder, [*weights.notes, said, *notes], facts)


def read_weights(path: str | Path) -> Weights:
    """The weights in a file, and what of the file is left out.

    Raises:
        UserError: it cannot be read, or holds no weights.
    """
    content, foreign = _read(Path(path))
    container, held = _weights_in(content, path)
    rest = {name: value for name, value in content.items() if name != container} if container else {}
    unused = sorted(str(name) for name in rest if name not in ("epoch", "arch", "architecture"))
    notes = []
    if foreign:
        names = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        notes.append(f"pickled objects of {names} were left out; nothing in the file was run")
    if unused:
        notes.append(f"not taken: {', '.join(unused)}")
    try:
        tensors = tensors_in(held)
    except UserError as error:
        raise UserError(f"file ({path}) was refused: {error}") from error
    weights = _sorted(tensors)
    weights.notes = notes + weights.notes
    epoch, architecture = rest.get("epoch"), rest.get("arch", rest.get("architecture"))
    weights.epoch = epoch if isinstance(epoch, int) else None
    weights.architecture = (
        architecture if isinstance(architecture, str) and timm.is_model(architecture) else None
    )
    return weights


def _read(path: Path) -> tuple[dict[Any, Any], list[str]]:
    if path.is_dir():
        raise UserError(f"file ({path}) is a folder; an exported folder needs no converting")
    if path.suffix == ".safetensors" and path.is_file():
        try:
            return dict(load_file(path)), []
        except (SafetensorError, OSError) as error:
            raise UserError(f"file ({path}) cannot be read, it may be cut short ({error})") from error
    read = read_torch_file(path)
    if not isinstance(read.content, dict):
        what = read.content.origin if isinstance(read.content, Inert) else type(read.content).__name__
        raise UserError(
            f"file ({path}) holds a {what} instead of a dictionary; save model.state_dict() instead"
        )
    return read.content, read.foreign


def _weights_in(content: Mapping[Any, Any], path: str | Path) -> tuple[str | None, dict[str, Any]]:
    """The state dict in a file, and under which name it stands."""
    if "pytorch-lightning_version" in content:
        raise UserError(
            f"file ({path}) is a training state; if freqmask wrote it, name its run folder instead"
        )
    for name in _CONTAINERS:
        held = content.get(name)
        if isinstance(held, Inert):
            raise UserError(
                f"file ({path}) was refused: its weights ({name}) are a pickled {held.origin or 'object'}; save "
                "model.state_dict() instead"
            )
        if isinstance(held, dict) and held:
            return name, held
    if content and all(isinstance(value, StoredTensor | Tensor | Inert) for value in content.values()):
        return None, dict(content)
    raise UserError(
        f"file ({path}) holds no weights under {', '.join(_CONTAINERS[:4])}; it has "
        f"{', '.join(sorted(map(str, content))[:8]) or 'nothing'}"
    )


def _sorted(tensors: Mapping[str, Tensor]) -> Weights:
    """Encoder and decoder apart, prefixes taken off."""
    names = dict(tensors)
    while (
        prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in names)), None)
    ) is not None:
        names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    encoder = {n.removeprefix(ENCODER): t for n, t in names.items() if n.startswith(ENCODER)}
    if not encoder:
        return Weights(names)
    decoder = {n.removeprefix(DECODER): t for n, t in names.items() if n.startswith(DECODER)}
    others = sorted(n for n in names if not n.startswith((ENCODER, DECODER)))
    notes = [f"not taken: {', '.join(others[:8])}"] if others else []
    if set(decoder) != {"0.weight", "0.bias"}:
        notes += (
            [f"the decoder ({', '.join(sorted(decoder)[:4])}) is not MFM's and was left out"]
            if decoder
            else []
        )
        decoder = {}
    return Weights(encoder, decoder, notes)


def _model(name: str, arguments: Mapping[str, Any]) -> Any:
    try:
        return timm.create_model(name, pretrained=False, **arguments).eval()
    except Exception as error:  # timm raises whatever it pleases
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"backbone ({name}) cannot be made with {dict(arguments)}: {reason}") from error


def _load(model: nn.Module, state: dict[str, Tensor], name: str, guessed: bool) -> list[str]:
    """Put the tensors in; what is missing or of another shape is an error, what is too many a sentence."""
    own = model.state_dict()
    expected = {key: tuple(tensor.shape) for key, tensor in own.items()}
    unwanted = sorted(set(state) - set(expected))
    problems = differences({key: value for key, value in state.items() if key in expected}, expected)
    strange = [key for key in unwanted if not _PASSED_OVER.fullmatch(key)]
    problems += [f"{key} {tuple(state[key].shape)} has no place" for key in strange]
    if problems:
        hint = "name the architecture with --backbone" if guessed else "is it of another architecture?"
        raise UserError(f"the file does not fit {name}, {hint}\n  " + "\n  ".join(problems))
    model.load_state_dict({key: state[key].to(own[key].dtype) for key in own})
    if not unwanted:
        return []
    listed = ", ".join(f"{key} {tuple(state[key].shape)}" for key in unwanted)
    return [f"not part of {name} and left out: {listed}"]


def _image_size(model: Any) -> tuple[int, int]:
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None) or model.pretrained_cfg.get("input_size", (3, 224, 224))[1:]
    return int(size[0]), int(size[1])


def _statistics(model: Any, weights: Weights) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """What images are normalised by: ImageNet's for MFM's files, else what timm notes for the architecture."""
    channels = channels_of(model)
    by_mfm = bool(weights.decoder) or any(name.endswith(".attn.q_bias") for name in weights.encoder)
    config = model.pretrained_cfg
    if by_mfm and type(model).__name__ != "Beit":
        mean, std, whose = IMAGENET_MEAN, IMAGENET_STD, "ImageNet's, as MFM's authors use"
    else:
        mean, std, whose = config["mean"], config["std"], f"timm's for {config['architecture']}"
    said = f"mean and std: {whose} (the file does not tell)"
    return fitted(mean, channels), fitted(std, channels), said


def channels_of(model: nn.Module) -> int:
    """Channels of the images that a timm module takes: those of its first convolution."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return first.in_channels


def _resized(model: Any, name: str, arguments: Mapping[str, Any], side: int) -> tuple[Any, str]:
    """The same weights for another image size, by timm's own interpolation of positions."""
    if not getattr(model, "patch_embed", None):
        return model, f"{name} takes any image size; {side} pixels are noted as its own"
    old = _image_size(model)
    resized = _model(name, {**arguments, "img_size": [side, side]})
    state = dict(model.state_dict())
    if "pos_embed" not in state or any("relative_position" in key for key in state):
        raise UserError(
            f"image_size ({side}): the positions of {name} are not interpolated; leave it out ({old[0]})"
        )
    from timm.layers.pos_embed import resample_abs_pos_embed

    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], list(resized.patch_embed.grid_size), num_prefix_tokens=model.num_prefix_tokens
    )
    resized.load_state_dict(state)
    return resized, f"positions were interpolated from {old[0]}x{old[1]} to {side}x{side} pixels"
