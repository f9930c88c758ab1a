"""Checkpoints: written atomically, running nothing when read. Evaluations need this, and no Lightning."""

from __future__ import annotations

import os
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from freqmask.errors import UserError, brief
from freqmask.training.files import replace_atomically

LAST = "last.ckpt"
_OF_A_TRAINING = {"state_dict": dict, "global_step": int, "optimizer_states": list, "loops": dict}


@dataclass
class Checkpoint:
    """A training state on the disk, read once."""

    path: Path
    content: dict[str, Any]  # emptied by whoever takes it over, or the weights would lie twice in memory
    step: int  # optimizer steps that had been made


def load_safely(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The dictionary in a file of ``torch.save``, of plain tensors, numbers and containers; nothing in it is run.

    Raises:
        UserError: the file is missing, cut short, or holds objects that would need code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint ({path}) does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wonders aloud about odd files before it refuses them
            loaded = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        _, runs, rest = str(error).partition("GLOBAL ")
        why = f"reading it would run code ({rest.split(' was not', 1)[0].strip()})"
        if not runs and "Unsupported global" not in str(error):
            why = f"it is no plain torch file ({brief(error, 200)})"
        raise UserError(f"checkpoint ({path}) was refused: {why}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"checkpoint ({path}) cannot be read, it may be cut short: {brief(error, 200)}"
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"checkpoint ({path}) holds a {type(loaded).__name__} instead of a dictionary")
    return loaded


def save_atomically(content: dict[str, Any], path: str | Path) -> None:
    """Write to a temporary neighbor, flush it to the disk, rename it: a full disk leaves the old file whole."""
    replace_atomically(Path(path), lambda temporary: torch.save(content, temporary))


def step_file(folder: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lives."""
    return folder / f"step-{step:08d}.ckpt"


def publish(folder: Path, step: int, keep: int) -> None:
    """Point ``last.ckpt`` at the checkpoint of ``step``, just written, and drop all but the ``keep`` newest."""
    newest = step_file(folder, step)
    temporary = folder / f".{LAST}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        os.link(newest, temporary)  # the same bytes under two names: no second copy on the disk
    except OSError:
        temporary.symlink_to(newest.name)
    temporary.replace(folder / LAST)
    files = sorted(folder.glob("step-*.ckpt"))
    for old in [file for file in files if file != newest][: max(len(files) - keep, 0)]:
        old.unlink(missing_ok=True)


def newest_usable(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint, read whole, and a sentence for each newer one that had to be passed over.

    Raises:
        UserError: a file would run code when read; that is never passed over in silence.
    """
    warnings: list[str] = []
    candidates = sorted(folder.glob("step-*.ckpt"), reverse=True)
    last = folder / LAST
    if last.exists() and not any(last.samefile(file) for file in candidates):
        candidates.insert(0, last)
    for file in candidates:
        try:
            found = load_safely(file)
            lacking = [name for name, kind in _OF_A_TRAINING.items() if not isinstance(found.get(name), kind)]
            if lacking:
                raise UserError(f"checkpoint ({file}) is none of a training, it lacks {', '.join(lacking)}")
        except UserError as error:
            if "would run code" in str(error):
                raise
            warnings.append(f"{error}; using the one before it")
            continue
        return Checkpoint(file, found, found["global_step"]), warnings
    return None, warnings
