"""A run's checkpoint taken apart: the whole method, or one of its backbones that is not exported."""

from __future__ import annotations

import inspect
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from freqmask.console import say
from freqmask.errors import UserError, nearest
from freqmask.interop.timm_folder import CONFIG, WEIGHTS
from freqmask.methods import Method, build_method, find_method
from freqmask.training.checkpoint import LAST, load_safely
from freqmask.training.run_folder import RunFolder

_METHOD = "method."  # how the names of a checkpoint begin, and how those of a backbone in it go on
_MODULE = ".timm_model."


def load_method(run: str | Path) -> Method:
    """The whole method of a run as its last checkpoint left it: backbones, heads, filter.

    A method or filter that the run names by import path is imported from what is installed here.

    Args:
        run: a run folder.

    Returns:
        The method on the CPU, in training mode.

    Raises:
        UserError: it is no run, has no checkpoint yet, or its method cannot be made here.
    """
    folder = RunFolder(run)
    options = folder.config() if folder.exists() else None
    if options is None:
        raise UserError(
            f"run ({run}) must be a run folder of freqmask pretrain; there is no config.yaml in it"
        )
    method = method_of(options, folder.state().get("images"))
    state = run_state(run)
    weights = {name.removeprefix(_METHOD): value for name, value in state.items() if name.startswith(_METHOD)}
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"run ({run}): its checkpoint does not fit its config.yaml: {first}") from error
    return method


def method_of(options: Mapping[str, Any], images: int | None = None) -> Method:
    """The method, freshly initialised, that a run's resolved options describe.

    Args:
        options: from the run's config.yaml.
        images: trained on; turns the epochs of FOLK's frozen layer into steps.

    Raises:
        UserError: the method is unknown here, or an option is.
    """
    name = str(options.get("method"))
    for option in ("method", "filter"):
        word = str(options.get(option) or "")
        if ":" in word:
            say(
                f"note: the run names code of its own, {option} {word}: it is imported now from what is installed here"
            )
    accepted = set(inspect.signature(find_method(name)).parameters)
    settings = {key: value for key, value in options.items() if key in accepted and value is not None}
    if isinstance(settings.get("image_size"), list):
        settings["image_size"] = tuple(settings["image_size"])
    if "freeze_last_layer_steps" in accepted and images:
        epochs = options.get("freeze_last_layer_epochs")
        steps = images / options["batch_size"] * (1.0 if epochs is None else epochs)
        settings["freeze_last_layer_steps"] = round(steps)
    return build_method(name, **settings)


def run_state(run: str | Path) -> dict[str, Tensor]:
    """The state dict in the run's last checkpoint.

    Raises:
        UserError: there is none, or it is broken.
    """
    checkpoint = RunFolder(run).checkpoints / LAST
    if not checkpoint.is_file():
        raise UserError(f"run ({run}) has no checkpoint yet; let it train until its first one")
    return dict(load_safely(checkpoint)["state_dict"])


@contextmanager
def with_weights(run: str | Path, exported: Path, weights: str) -> Iterator[Path]:
    """A passing copy of an exported folder with another of the run's backbones in it.

    Args:
        run: the run folder.
        exported: the run's ``backbone``.
        weights: the backbone's name in the method, such as ``"teacher"``.

    Raises:
        UserError: it is no run, or has no such backbone.
    """
    path = Path(run).expanduser()
    if not RunFolder(path).exists():
        raise UserError(f"weights ({weights}) can be chosen for a run folder only; {run} holds one backbone")
    found = backbones_in(run_state(path))
    if weights not in found:
        raise UserError(f"weights ({weights}) are not in run {run}; {nearest(weights, found)}")
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(exported / CONFIG, scratch)
        tensors = {name: tensor.contiguous() for name, tensor in found[weights].items()}
        save_file(tensors, Path(scratch) / WEIGHTS, metadata={"format": "pt"})
        yield Path(scratch)


def backbones_in(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The backbones of a checkpoint by name, each with timm's own names of its tensors."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        backbone, inside, rest = name.removeprefix(_METHOD).partition(_MODULE)
        if name.startswith(_METHOD) and inside and "." not in backbone:
            found.setdefault(backbone, {})[rest] = tensor
    return found
