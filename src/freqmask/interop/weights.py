"""Weights to start from: ``--init`` takes public weights, a run, or an exported folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from freqmask.errors import UserError
from freqmask.interop.public import check_public
from freqmask.interop.timm_folder import CONFIG, WEIGHTS
from freqmask.timm_models import check_name
from freqmask.training.checkpoint import LAST, load_safely

PUBLIC = "timm:"


def initial_backbone(
    init: str, model_args: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any] | None, int | None]:
    """The architecture behind ``--init``, for when no backbone is named.

    Args:
        init: ``timm:NAME``, a run folder, or an exported folder.
        model_args: those that were given; they go first.

    Returns:
        The timm name, its arguments, and the side of its patches where it is not the name's own.

    Raises:
        UserError: there is nothing of that name.
    """
    if init.startswith(PUBLIC):
        name = init.removeprefix(PUBLIC)
        check_name(name)
        return name, dict(model_args) if model_args else None, None
    config = _config(init)
    ours = {"img_size", "in_chans", "num_classes", "global_pool", "fc_norm", "use_fc_norm"}
    arguments = {name: value for name, value in config.get("model_args", {}).items() if name not in ours}
    arguments |= dict(model_args or {})
    patch = arguments.pop("patch_size", None)
    return str(config["architecture"]), arguments or None, patch if isinstance(patch, int) else None


def check_init(init: str) -> None:
    """Raises a UserError where ``--init`` names nothing; no network is asked."""
    if init.startswith(PUBLIC):
        check_name(init.removeprefix(PUBLIC))
    else:
        _folder(init)


def load_initial(method: Any, init: str) -> list[str]:
    """Put the weights into a method's backbones, in place.

    From a run of the same method the heads come along.

    Args:
        method: a method of :mod:`freqmask.methods`.
        init: as for :func:`initial_backbone`.

    Returns:
        Sentences on what was taken.

    Raises:
        UserError: the weights are missing or do not fit; shapes are named.
    """
    whole = Path(init) / "checkpoints" / LAST
    if not init.startswith(PUBLIC) and whole.is_file() and _load_method(method, whole):
        return [f"the whole method of {init}"]
    weights = _public(init, method) if init.startswith(PUBLIC) else _exported(init)
    notes: list[str] = []
    for backbone in method.backbones().values():
        notes = _load_backbone(backbone.timm_model, weights, init)
    return [f"the backbone of {init}; the heads begin anew", *notes]


def _load_method(method: nn.Module, checkpoint: Path) -> bool:
    state = load_safely(checkpoint)["state_dict"]
    state = {
        name.removeprefix("method."): value for name, value in state.items() if name.startswith("method.")
    }
    own = method.state_dict()
    if set(state) != set(own) or any(state[name].shape != own[name].shape for name in own):
        return False
    method.load_state_dict(state)
    return True


def _public(init: str, method: Any) -> dict[str, Tensor]:
    """Timm's weights, its positions and first layer already brought to the method's size and channels."""
    from freqmask.timm_models import create_model

    check_public(init.removeprefix(PUBLIC), f"init ({init})")
    backbone = next(iter(method.backbones().values()))
    settings = backbone.settings
    model, _ = create_model(
        init.removeprefix(PUBLIC),
        backbone.image_size,
        backbone.channels,
        settings["patch_size"],
        settings["model_args"],
        pretrained=True,
    )
    return dict(model.state_dict())


def _exported(init: str) -> dict[str, Tensor]:
    folder = _folder(init)
    try:
        return dict(load_file(folder / WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise UserError(f"init ({init}): {folder / WEIGHTS} cannot be read: {error}") from error


def _load_backbone(model: nn.Module, given: Mapping[str, Tensor], init: str) -> list[str]:
    own = model.state_dict()
    weights, notes = resampled(given, model)
    missing = sorted(set(own) - set(weights))
    differing = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if missing or differing:
        problems = [*(f"{name} is missing" for name in missing), *differing]
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"init ({init}) does not fit the backbone: {', '.join(problems[:3])}{more}")
    model.load_state_dict({name: weights[name] for name in own})
    return notes


def resampled(weights: Mapping[str, Tensor], model: Any) -> tuple[dict[str, Tensor], list[str]]:
    """A ViT's weights for another image or patch size, as timm resamples its own public ones.

    Args:
        weights: of a square grid; the others pass as they are.
        model: the timm module that they are for.

    Returns:
        The weights, and a sentence for each tensor that was resampled.
    """
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    changed, notes, own = dict(weights), [], model.state_dict()
    old, new = weights.get("patch_embed.proj.weight"), own.get("patch_embed.proj.weight")
    is_patch = old is not None and new is not None and old.dim() == 4 and old.shape[:2] == new.shape[:2]
    if is_patch and old.shape != new.shape:
        changed["patch_embed.proj.weight"] = resample_patch_embed(old, list(new.shape[2:]))
        notes.append(f"patches were resampled from {old.shape[-1]} to {new.shape[-1]} pixels")
    old, new = weights.get("pos_embed"), own.get("pos_embed")
    is_grid = hasattr(getattr(model, "patch_embed", None), "grid_size") and hasattr(
        model, "num_prefix_tokens"
    )
    if old is not None and new is not None and is_grid and old.dim() == 3 and old.shape != new.shape:
        before = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        cells = old.shape[1] - before
        if old.shape[2] == new.shape[2] and cells > 0 and math.isqrt(cells) ** 2 == cells:
            changed["pos_embed"] = resample_abs_pos_embed(
                old, list(model.patch_embed.grid_size), num_prefix_tokens=before
            )
            rows, columns = model.patch_embed.grid_size
            side = math.isqrt(cells)
            notes.append(f"positions were resampled from {side}x{side} to {rows}x{columns} patches")
    return changed, notes


def _folder(init: str) -> Path:
    for folder in (Path(init), Path(init) / "backbone"):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    raise UserError(
        f"init ({init}) must be timm:NAME, a run folder, or an exported folder; {_what_is_wrong(init)}"
    )


def _what_is_wrong(init: str) -> str:
    """Why there is nothing of that name: the likely slips."""
    prefix, colon, bare = init.partition(":")
    name = bare.removeprefix("timm/") if colon else init
    if prefix == "random":
        return "leave it out to begin with random weights"
    if timm.is_model(name.split(".")[0]):
        return f"public weights are timm:{name}"
    return "there is no backbone in it" if Path(init).is_dir() else "there is no such folder"


def _config(init: str) -> dict[str, Any]:
    path = _folder(init) / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"init ({init}): {path} is not valid JSON") from error
    return config
