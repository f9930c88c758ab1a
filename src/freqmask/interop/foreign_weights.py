"""Other people's checkpoints: MFM's, BEiT's, DINOv2's or plain state dicts become timm models, and back to MFM's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from freqmask import __version__
from freqmask.console import counted
from freqmask.errors import UserError, brief
from freqmask.interop.formats import check_file, fitted
from freqmask.interop.weight_files import Inert, differences, read_tensors, read_torch_file, tensors_in
from freqmask.interop.weights import resampled, under
from freqmask.spectrum import IMAGENET_MEAN, IMAGENET_STD
from freqmask.timm_models import SIGNATURES, architecture_of, as_timm_names, ratio_of

_CONTAINERS = ("model", "state_dict", "model_state", "module", "teacher", "student", "backbone", "net")
_COPIES = ("momentum", "ema", "teacher", "target", "encoder_k", "key_")  # of a method's online network
# how a training is resumed, not what it gave
_STATES = ("optim", "sched", "scaler", "callbacks", "loops", "amp")
_DEEPEST = 5  # parts of a prefix, such as student.module.backbone.0.
# tensors of tasks and of pre-training, without which the backbone is the same
_LEFT_OUT = re.compile(
    r"mask_token|decoder.*|lm_head\..*|.*relative_position_index|queue.*|norm\..*"
    r"|(fc|heads?|classifier|projector|projection\w*|predict\w*|contrast\w*)\..*"
)
_LISTED = 8  # names in a sentence
_ENCODER, _DECODER = "encoder.", "decoder."  # of MFM's files


@dataclass
class Weights:
    """The tensors of a file, sorted."""

    encoder: dict[str, Tensor]  # the backbone's, by names as they stand in the file without prefixes
    # the reconstruction head's, ``0.weight`` and ``0.bias``; empty where there is none
    decoder: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # whole sentences on what was left out
    architecture: str | None = None  # the timm name that the file gives, if it does
    epoch: int | None = None  # that the file gives


@dataclass
class Converted:
    """A model made from a file."""

    model: Any  # the timm module with the weights in it
    architecture: str  # its timm name
    image_size: tuple[int, int]  # height and width in pixels
    mean: tuple[float, ...]  # of the channels that the weights expect
    std: tuple[float, ...]  # of the channels
    decoder: dict[str, Tensor]  # tensors of the reconstruction head; empty where there is none
    notes: list[str]  # whole sentences on what was assumed, left out or interpolated
    metadata: dict[str, Any]  # for config.json


def convert_file(
    path: str | Path,
    backbone: str | None = None,
    image_size: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> Converted:
    """A checkpoint as a timm model; nothing in the file is run.

    Args:
        path: a file of ``torch.save`` or safetensors.
        backbone: the timm architecture; None tells it from names and shapes (ViT, BEiT, ResNet).
        image_size: side in pixels; positions are interpolated to it. None is the file's own.
        model_args: timm's arguments that the file cannot tell, such as ``{"num_heads": 8}``.
        key: which weights, where the file holds several, such as ``"state_dict_ema"`` or ``"teacher.backbone"``.

    Raises:
        UserError: the file is broken or refused, or does not fit; tensors that do not are named.
    """
    weights = read_weights(path, key, backbone)
    known = backbone or weights.architecture
    name, arguments, notes = architecture_of(weights.encoder, known, dict(model_args or {}))
    model = _model(name, arguments)
    has_own_biases = any(tensor.endswith(".attn.q_bias") for tensor in model.state_dict())  # BEiT, EVA-02
    state = weights.encoder if has_own_biases else from_beit_names(weights.encoder)
    notes += _load(model, state, name, known is None)
    if known is not None and "embed_dim" in arguments:
        with torch.device("meta"):
            plain = _model(name, {})
        shape, usual = ((one.embed_dim, len(one.blocks)) for one in (model, plain))
        if shape != usual:
            by = f"width {shape[0]} of {counted(shape[1], 'block')}"
            notes.append(f"{by}, as in the file; {name} by itself has {usual[0]} of {usual[1]}")
    size = _image_size(model)
    if image_size is not None and (image_size, image_size) != size:
        model, note = _resized(model, name, arguments, image_size)
        notes.append(note)
        size = (image_size, image_size)
    metadata = {"version": __version__, "converted_from": Path(path).name, "value_range": "dtype"}
    epoch = {} if weights.epoch is None else {"epoch": weights.epoch}
    mean, std, note = _statistics(model, weights, has_own_biases)
    notes = [*weights.notes, note, *notes]
    return Converted(model, name, size, mean, std, weights.decoder, notes, metadata | epoch)


def read_weights(path: str | Path, key: str | None = None, backbone: str | None = None) -> Weights:
    """The weights in a file, and what is left out; arguments and errors are those of :func:`convert_file`."""
    content, foreign = _read(Path(path))
    architecture = content.get("arch", content.get("architecture"))
    if not (isinstance(architecture, str) and timm.is_model(architecture)):
        architecture = None
    chosen, notes = _choose(content, path, key, backbone or architecture)
    if chosen.prefix.startswith("method.") and "pytorch-lightning_version" in content:
        raise UserError(f"file ({path}) is a training state of freqmask; name its run folder instead")
    if foreign:
        notes.append(f"pickled objects of {_some(foreign)} were left out; nothing in the file was run")
    prefix, beside, epoch = chosen.prefix, set(content), None
    if chosen.container:
        beside = {chosen.container.split(".")[0], "epoch", "arch", "architecture"}
        epoch = content.get("epoch")
    head = prefix.removesuffix(_ENCODER) + _DECODER if prefix.endswith(_ENCODER) else None
    encoder, decoder = under(chosen.state, prefix), {} if head is None else under(chosen.state, head)
    others = [name for name in chosen.state if not name.startswith((prefix, head or prefix))]
    if decoder and decoder.keys() != {"0.weight", "0.bias"}:
        notes.append(f"the decoder ({_some(sorted(decoder))}) is not MFM's and was left out")
        decoder = {}
    for left in (others, [str(name) for name in content if name not in beside]):
        notes += [f"not taken: {_some(sorted(left))}"] if left else []
    try:
        encoder, decoder = as_timm_names(tensors_in(encoder)), tensors_in(decoder)
    except UserError as error:
        raise UserError(f"file ({path}) was refused: {error}") from error
    return Weights(encoder, decoder, notes, architecture, epoch if isinstance(epoch, int) else None)


def _read(path: Path) -> tuple[dict[Any, Any], list[str]]:
    check_file(path)
    if path.suffix == ".safetensors":
        return dict(read_tensors(path, "file")), []
    read = read_torch_file(path)
    if isinstance(read.content, dict):
        return read.content, read.foreign
    what = read.content.origin if isinstance(read.content, Inert) else type(read.content).__name__
    raise UserError(f"file ({path}) holds a {what} instead of a dictionary; save model.state_dict() instead")


@dataclass
class _Candidate:
    """A backbone's weights in a file: the dictionary, where it stands, how its names begin, how many of them fit."""

    state: dict[str, Any]
    container: str
    prefix: str
    fit: int

    @property
    def key(self) -> str:
        return ".".join(filter(None, [self.container, self.prefix.removesuffix(".")]))

    @property
    def order(self) -> tuple[Any, ...]:
        """Best first: by fit, known containers, no moving average or other copy, the shortest prefix."""
        first = self.container.split(".")[0]
        place = _CONTAINERS.index(first) if first in _CONTAINERS else len(_CONTAINERS)
        is_copy = any(word in self.prefix for word in _COPIES)
        return -self.fit, place, is_copy, len(self.prefix), self.key


def _choose(
    content: Mapping[Any, Any], path: str | Path, key: str | None, known: str | None
) -> tuple[_Candidate, list[str]]:
    """The weights that are meant: those asked for, else those whose names fit best; and a sentence on others."""
    containers = list(_containers(content))
    if not containers:
        raise _no_weights(content, path)
    names = set(_model(known, {}).state_dict()) if known is not None and timm.is_model(known) else None
    candidates = [candidate for state, at in containers for candidate in _prefixed(state, at, names)]
    candidates.sort(key=lambda candidate: candidate.order)
    if key is not None:
        asked = [one for one in candidates if f"{one.key}.".startswith(f"{key}.")]
        asked += [_Candidate(state, at, "", 0) for state, at in containers if at == key]
        if not asked:
            keys = dict.fromkeys([*(one.key for one in candidates), *(at for _, at in containers)])
            there = _some(list(filter(None, keys))) or "one set of weights, without a key"
            raise UserError(f"key ({key}) is not in {path}; it has {there}")
        return asked[0], []
    if not candidates:  # of a family that we do not know
        whole = [_Candidate(state, at, _shared_prefix(state), len(state)) for state, at in containers]
        return min(whole, key=lambda candidate: candidate.order), []
    best = candidates[0]
    others = [candidate.key for candidate in candidates[1:] if 2 * candidate.fit >= best.fit]
    taken = f"taken: {best.key or 'the weights without a key'}; --key takes others: {_some(others)}"
    return best, [taken] if others else []


def _containers(content: Mapping[Any, Any], at: str = "") -> Iterator[tuple[dict[str, Any], str]]:
    """Every dictionary of tensors in a file, and under which keys it stands."""
    tensors = sum(isinstance(value, Tensor) for value in content.values())
    if tensors and 2 * tensors >= len(content):  # fewer are the state of a generator beside the weights
        if all(isinstance(name, str) for name in content):
            yield dict(content), at
        return
    for name, value in content.items():
        is_state = isinstance(name, str) and not name.lower().startswith(_STATES)
        if is_state and isinstance(value, dict) and at.count(".") < 2:
            yield from _containers(value, f"{at}.{name}" if at else name)


def _prefixed(state: Mapping[str, Any], container: str, names: set[str] | None) -> Iterator[_Candidate]:
    """The prefixes behind which a backbone stands, with how many of its names do."""
    anchors = names if names is not None else {first for first, _ in SIGNATURES}
    fits: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for depth in range(min(len(parts), _DEEPEST + 1)):
            if ".".join(parts[depth:]) in anchors:
                fits["".join(f"{part}." for part in parts[:depth])] += 1
    for prefix, fit in fits.items():
        if names is None:
            if not any(all(prefix + name in state for name in pair) for pair in SIGNATURES):
                continue
            fit = sum(name.startswith(prefix) for name in state)
        elif 2 * fit < max(fits.values()):
            continue  # a name or two by chance
        yield _Candidate(dict(state), container, prefix, fit)


def _shared_prefix(state: Mapping[str, Any]) -> str:
    """What every name begins with, in whole parts."""
    shared: Any = commonprefix([name.split(".")[:-1] for name in state])  # noqa: RUF071  # lists of parts
    return "".join(f"{part}." for part in shared)


def _no_weights(content: Mapping[Any, Any], path: str | Path) -> UserError:
    for name in _CONTAINERS:
        if isinstance(content.get(name), Inert):
            return UserError(
                f"file ({path}) was refused: its weights ({name}) are a pickled "
                f"{content[name].origin or 'object'}; save model.state_dict() instead"
            )
    return UserError(
        f"file ({path}) holds no weights under {', '.join(_CONTAINERS[:4])}; it has "
        f"{_some(sorted(map(str, content))) or 'nothing'}"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _model(name: str, arguments: Mapping[str, Any]) -> Any:
    try:
        return timm.create_model(name, pretrained=False, **arguments).eval()
    except Exception as error:  # timm raises whatever it pleases
        reason = brief(error, 200)
        raise UserError(f"backbone ({name}) cannot be made with {dict(arguments)}: {reason}") from error


def _load(model: nn.Module, state: dict[str, Tensor], name: str, guessed: bool) -> list[str]:
    """Put the tensors in; what is missing or of another shape is an error, what is too many a sentence."""
    own = model.state_dict()
    unwanted = sorted(set(state) - set(own))
    problems = differences({key: value for key, value in state.items() if key in own}, own)
    strange = [key for key in unwanted if not _LEFT_OUT.fullmatch(key)]
    problems += [f"{key} {tuple(state[key].shape)} has no place" for key in strange]
    if problems:
        hint = "name the architecture with --backbone" if guessed else "is it of another architecture?"
        more = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise UserError("\n  ".join([f"the file does not fit {name}, {hint}", *problems[:_LISTED], *more]))
    model.load_state_dict({key: state[key].to(own[key].dtype) for key in own})
    listed = _some([f"{key} {tuple(state[key].shape)}" for key in unwanted])
    return [f"not part of {name} and left out: {listed}"] if unwanted else []


def _image_size(model: Any) -> tuple[int, int]:
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None) or model.pretrained_cfg.get("input_size", (3, 224, 224))[1:]
    return int(size[0]), int(size[1])


def _statistics(
    model: Any, weights: Weights, has_own_biases: bool
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """What images are normalized by: ImageNet's for MFM's files, else what timm notes for the architecture."""
    # of the images: those of the first convolution
    channels = next(part for part in model.modules() if isinstance(part, nn.Conv2d)).in_channels
    by_mfm = bool(weights.decoder) or any(name.endswith(".attn.q_bias") for name in weights.encoder)
    config = model.pretrained_cfg
    mean, std, whose = config["mean"], config["std"], f"timm's for {config['architecture']}"
    if by_mfm and not has_own_biases:
        mean, std, whose = IMAGENET_MEAN, IMAGENET_STD, "ImageNet's, as MFM's authors use"
    note = f"mean and std: {whose} (the file does not tell)"
    if not has_own_biases and mean != IMAGENET_MEAN and channels == 3:  # as of the ViTs that Google trained
        note += f"; DINO's, MAE's and DeiT's are {[*IMAGENET_MEAN]} and {[*IMAGENET_STD]}: put them into config.json"
    return fitted(mean, channels), fitted(std, channels), note


def _resized(model: Any, name: str, arguments: Mapping[str, Any], side: int) -> tuple[Any, str]:
    """The same weights for another image size, by timm's own interpolation of positions."""
    if not getattr(model, "patch_embed", None):
        return model, f"{name} takes any image size; {side} pixels are noted as its own"
    old, state = _image_size(model), model.state_dict()
    if "pos_embed" not in state or any("relative_position" in key for key in state):
        raise UserError(
            f"image_size ({side}): the positions of {name} are not interpolated; leave it out ({old[0]})"
        )
    other = _model(name, {**arguments, "img_size": [side, side]})
    other.load_state_dict(resampled(state, other)[0])
    return other, f"positions were interpolated from {old[0]}x{old[1]} to {side}x{side} pixels"


def from_beit_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BEiT's names to those of timm's ViT: the biases of queries and values joined, the keys' zero.

    Raises:
        UserError: one of a block's two biases is missing.
    """
    renamed = dict(state)
    for name in [name for name in state if name.endswith((".attn.q_bias", ".attn.v_bias"))]:
        block = name[: -len("q_bias")]
        query, value = state.get(f"{block}q_bias"), state.get(f"{block}v_bias")
        if query is None or value is None or query.shape != value.shape:
            raise UserError(
                f"{name} has no partner of its shape {tuple(state[name].shape)}; the file is incomplete"
            )
        del renamed[name]
        renamed[f"{block}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return renamed


def mfm_encoder(model: Any) -> dict[str, Tensor]:
    """The encoder of an MFM checkpoint, without its prefix: timm's names of a ResNet, BEiT's of a ViT.

    Args:
        model: a timm ViT or ResNet.

    Raises:
        UserError: it is no plain one. Readers pass over what they do not know, and would compute something else without
            a word.
    """
    kind = type(model).__name__
    if kind not in ("VisionTransformer", "ResNet"):
        raise UserError(
            f"format (mfm-checkpoint) holds a plain ViT or ResNet, not {kind}; --format timm holds every model"
        )
    if kind == "ResNet" and not isinstance(model.conv1, nn.Conv2d):
        problems = ["a stem of several convolutions"]
    else:
        plain = _plain_vit(model) if kind == "VisionTransformer" else _plain_resnet(model)
        layers = zip(_layers(model), _layers(plain), strict=False)
        problems = differences(to_beit_names(model.state_dict()), to_beit_names(plain.state_dict())) or [
            f"{own.strip()} instead of {theirs.strip()}" for own, theirs in layers if own != theirs
        ]
        if kind == "VisionTransformer" and model.blocks[0].attn.num_heads != plain.blocks[0].attn.num_heads:
            heads = f"{model.blocks[0].attn.num_heads} attention heads for width {model.embed_dim}"
            problems.append(f"{heads} (readers expect {plain.blocks[0].attn.num_heads})")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            "format (mfm-checkpoint) cannot hold this model, and its readers would drop the difference in silence: "
            f"{'; '.join(problems[:4])}{more}; --format timm holds every model"
        )
    return to_beit_names(model.state_dict())


def _layers(model: Any) -> list[str]:
    """A line a layer, without those that drop something in training alone."""
    return [line for line in repr(model).splitlines() if not re.search(r"\(\w*drop\w*\):", line)]


def _plain_vit(model: Any) -> Any:
    """What readers of an MFM checkpoint make of a ViT's tensors."""
    dim, patches, mlp = model.embed_dim, model.patch_embed, model.blocks[0].mlp
    hidden = mlp.fc1.out_features if hasattr(mlp, "fc1") else 4 * dim
    return timm.create_model(
        "vit_base_patch16_224",
        num_classes=0,
        img_size=patches.img_size,
        patch_size=patches.patch_size,
        in_chans=patches.proj.in_channels,
        embed_dim=dim,
        depth=len(model.blocks),
        num_heads=16 if dim == 1280 else max(1, dim // 64),
        mlp_ratio=ratio_of(hidden, dim),
    )


def _plain_resnet(model: Any) -> Any:
    return timm.create_model(
        "resnet50" if type(model.layer1[0]).__name__ == "Bottleneck" else "resnet18",
        num_classes=0,
        in_chans=model.conv1.in_channels,
        layers=tuple(len(getattr(model, f"layer{number}")) for number in range(1, 5)),
    )


def to_beit_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A timm ViT's tensors under BEiT's names: queries and values with a bias of their own, keys with none.

    Dropping the keys' bias changes nothing: it adds the same number to every score of a query, which softmax does not
    see. What has no such name passes as it is.
    """
    renamed = dict(state)
    for name in [name for name in state if name.endswith(".attn.qkv.bias")]:
        query, _, value = renamed.pop(name).chunk(3)
        block = name.removesuffix("qkv.bias")
        renamed |= {f"{block}q_bias": query, f"{block}v_bias": value}
    return renamed
