"""Weights to start from or to measure: public ones, a run's checkpoint taken apart, an exported folder (``--init``)."""

from __future__ import annotations

import logging
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from freqmask.console import counted
from freqmask.errors import UserError, brief, nearest
from freqmask.imports import named_by_user
from freqmask.interop.formats import (
    CONFIG,
    PUBLIC,
    WEIGHTS,
    architecture_in,
    check_reachable,
    find_backbone,
    read_config,
)
from freqmask.interop.weight_files import check_weights, load_fitting, read_tensors, write_tensors
from freqmask.methods import METHODS, Method, build_method, find_method
from freqmask.options.of_methods import BUILT_FROM, method_settings, options_of_class
from freqmask.rng import torch_seeded
from freqmask.timm_models import check_name, create_model
from freqmask.training.run_folder import LAST, RunFolder, load_safely

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def check_public(name: str, option: str) -> None:
    """Raises a UserError, which begins with ``option``, where timm has no weights of that name or none within reach."""
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UserError(f"{option}: timm has no public weights of {name}; random:{name} begins without")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the user's concern
    if config.hf_hub_id and not is_cached(str(config.hf_hub_id)):
        check_reachable(f"{option}: the public weights of {name}")


def is_cached(repository: str) -> bool:
    """Whether the weights of a repository lie in the hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache

    repository = repository.split("@")[0]
    return any(isinstance(try_to_load_from_cache(repository, name), str) for name in _HUB_FILES)


def load_method(run: str | Path) -> Method:
    """The whole method of a run as its last checkpoint left it: backbones, heads, filter.

    A method or filter that the run names by import path is imported where you have named it, too: within a command,
    in ``FREQMASK_TRUST``, or by having imported its module.

    Args:
        run: a run folder.

    Returns:
        The method on the CPU, in training mode.

    Raises:
        UserError: it is no run, has no checkpoint yet, or its method cannot be made here.
    """
    folder = RunFolder(Path(run).expanduser())
    if not folder.exists():
        raise UserError(
            f"run ({run}) must be a run folder of freqmask pretrain; there is no config.yaml in it"
        )
    config = folder.config()
    if config.get("method") in ("finetune", "segment"):
        raise UserError(f"run ({run}) must be of freqmask pretrain; it is of evaluate {config['method']}")
    with named_by_user((), folder.path / "config.yaml", imported_too=True), torch_seeded(0):
        method = method_of(config, folder.state().get("images"))
    weights = under(run_state(folder.path))
    try:
        method.load_state_dict(weights)  # torch's own check: distill makes its heads by the weights that come
    except RuntimeError as error:
        reason = brief(error, 300)
        raise UserError(f"run ({run}): its checkpoint does not fit its config.yaml: {reason}") from error
    return method


def method_of(options: Mapping[str, Any], images: int | None = None) -> Method:
    """The method, freshly initialized, that a run's config.yaml describes; ``images`` turn epochs into steps."""
    name = str(options.get("method"))
    known, steps_an_epoch = options_of_class(find_method(name)), images and images / options["batch_size"]
    settings = method_settings(known, options, steps_an_epoch) | {key: options[key] for key in BUILT_FROM}
    if isinstance(settings["image_size"], list):
        settings["image_size"] = tuple(settings["image_size"])
    return build_method(name, **settings)


def run_state(run: str | Path) -> dict[str, Tensor]:
    """The state dict in the run's last checkpoint; a UserError where there is none, or it is broken."""
    checkpoint = RunFolder(run).checkpoints / LAST
    if not checkpoint.is_file():
        raise UserError(f"run ({run}) has no checkpoint yet; let it train until its first one")
    return dict(load_safely(checkpoint)["state_dict"])


def under(state: Mapping[str, Tensor], prefix: str = "method.") -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@contextmanager
def with_weights(run: str | Path, exported: Path, weights: str) -> Iterator[Path]:
    """A temporary copy of a run's ``backbone`` with another of its backbones in it, such as ``"teacher"``.

    Raises:
        UserError: it is no run, or has no such backbone.
    """
    path = Path(run).expanduser()
    if not RunFolder(path).exists():
        raise UserError(f"weights ({weights}) can be chosen for a run folder only; {run} holds one backbone")
    backbones: dict[str, dict[str, Tensor]] = {}
    for name, tensor in under(run_state(path)).items():
        backbone, inside, rest = name.partition(".timm_model.")
        if inside and "." not in backbone:
            backbones.setdefault(backbone, {})[rest] = tensor
    if weights not in backbones:
        raise UserError(f"weights ({weights}) are not in run {run}; {nearest(weights, backbones)}")
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(exported / CONFIG, scratch)
        write_tensors(Path(scratch) / WEIGHTS, backbones[weights], {"format": "pt"})
        yield Path(scratch)


def initial_backbone(
    init: str, model_args: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any] | None, int | None]:
    """The architecture behind ``--init``, for when no backbone is named; ``model_args`` go before its own.

    Returns:
        The timm name, its arguments, and the side of its patches where it is not the name's own.

    Raises:
        UserError: there is nothing of that name.
    """
    check_init(init)
    if init.startswith(PUBLIC):
        return init.removeprefix(PUBLIC), dict(model_args) if model_args else None, None
    name, arguments, patch = architecture_in(read_config(find_backbone(init, "init"), "init"))
    return name, arguments | dict(model_args or {}) or None, patch if isinstance(patch, int) else None


def check_init(init: str) -> None:
    """Raises a UserError where ``--init`` names nothing; no network is asked."""
    if init.startswith(PUBLIC):
        check_name(init.removeprefix(PUBLIC))
    else:
        find_backbone(init, "init")


def load_initial(method: Any, init: str) -> list[str]:
    """Put the weights into a method's backbones, in place; from a run of the same method the heads come along.

    Returns:
        Sentences on what was taken.

    Raises:
        UserError: the weights are missing or do not fit; shapes are named.
    """
    is_public, run = init.startswith(PUBLIC), RunFolder(Path(init).expanduser())
    whole = run.checkpoints / LAST
    learned = str(run.config().get("method")) if not is_public and run.exists() and whole.is_file() else ""
    # shapes do not tell: some methods differ only in what they learn; a method of one's own is named by its path
    if getattr(METHODS.get(learned), "__name__", re.split("[:.]", learned)[-1]) == type(method).__name__:
        state, own = under(load_safely(whole)["state_dict"]), method.state_dict()
        if {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in own.items()}:
            check_weights(state, f"init ({init})")
            method.load_state_dict(state)
            return [f"the whole method of {init}"]
    if is_public:  # positions and the first layer as timm brings them to this size and these channels
        name, first = init.removeprefix(PUBLIC), next(iter(method.backbones().values()))
        check_public(name, f"init ({init})")
        patch, model_args = first.settings["patch_size"], first.settings["model_args"]
        model, _ = create_model(name, first.image_size, first.channels, patch, model_args, pretrained=True)
        weights = model.state_dict()
    else:
        weights = read_tensors(find_backbone(init, "init") / WEIGHTS, "init")
    notes: list[str] = []
    for backbone in method.backbones().values():
        (fitted, notes), own = resampled(weights, backbone.timm_model), backbone.timm_model.state_dict()
        fitted = {name: tensor for name, tensor in fitted.items() if name in own}
        if "fc_norm.weight" in weights and "norm.weight" in own.keys() - fitted.keys():
            fitted |= {name: tensor for name, tensor in own.items() if name.startswith("norm.")}
            notes.append("its last normalization begins anew: fine-tuning had one behind the pooling instead")
        unlike = [(w.shape, own[name].shape) for name, w in fitted.items() if w.shape != own[name].shape]
        what = f"init ({init})"
        if len(unlike) == 1 and len(unlike[0][0]) == 4 and unlike[0][0][1] != unlike[0][1][1]:
            seen = unlike[0][0][1]  # a first layer of other channels, and nothing else
            what += f" is of {counted(seen, 'channel')} (--channels {seen}) and"
        load_fitting(backbone.timm_model, fitted, f"{what} does not fit the backbone")
        check_weights(fitted, f"init ({init})")
    return [f"the backbone of {init}; the heads begin anew", *notes]


def resampled(weights: Mapping[str, Tensor], model: Any) -> tuple[dict[str, Tensor], list[str]]:
    """A ViT's weights of a square grid for a model's image and patch size, as timm resamples its own public ones.

    Returns:
        The weights, and a sentence for each tensor that was resampled.
    """
    changed, notes = dict(weights), []
    own: Mapping[str, Any] = model.state_dict()
    old: Any = weights.get("patch_embed.proj.weight")
    new: Any = own.get("patch_embed.proj.weight")
    is_filter = old is not None and new is not None and old.dim() == 4 and old.shape[:2] == new.shape[:2]
    if is_filter and old.shape != new.shape:
        changed["patch_embed.proj.weight"] = resample_patch_embed(old, list(new.shape[2:]))
        notes.append(f"patches were resampled from {old.shape[-1]} to {new.shape[-1]} pixels")
    grid: Any = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    old, new = weights.get("pos_embed"), own.get("pos_embed")
    is_grid = old is not None and new is not None and grid is not None and hasattr(model, "num_prefix_tokens")
    if is_grid and old.dim() == 3 and old.shape != new.shape and old.shape[2] == new.shape[2]:
        before = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        cells = old.shape[1] - before
        side = math.isqrt(max(cells, 0))
        if cells > 0 and side**2 == cells:
            changed["pos_embed"] = resample_abs_pos_embed(old, list(grid), num_prefix_tokens=before)
            notes.append(f"positions were resampled from {side}x{side} to {grid[0]}x{grid[1]} patches")
    return changed, notes
