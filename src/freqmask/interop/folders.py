"""Finding and reading exported folders and runs; every complaint about them is one sentence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from freqmask.errors import UserError, nearest
from freqmask.interop.timm_folder import CONFIG, WEIGHTS
from freqmask.training.run_folder import RunFolder

CLASSIFIER = "classifier"  # the folder of a fine-tuning's run that timm loads
LOCAL = "local-dir:"  # how timm writes a folder where a model's name is asked
_LARGEST_CONFIG = 10_000_000  # bytes; a real one has a few thousand


def find_backbone(text: str | Path, option: str = "model") -> Path:
    """The folder with config.json and model.safetensors behind a run or an exported folder.

    Args:
        text: the run (of a pre-training or a fine-tuning), the exported folder, or the run's ``backbone``.
        option: what the complaint calls it.

    Raises:
        UserError: there is none.
    """
    path = Path(text).expanduser()
    for folder in (path, path / "backbone", path / CLASSIFIER):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    if path.is_file():
        raise UserError(
            f"{option} ({text}) is a file; freqmask convert {text} --out FOLDER makes a model of it"
        )
    if RunFolder(path).exists():
        raise UserError(f"{option} ({text}) has no model yet: its run has not reached a checkpoint")
    forms = "a run folder, an exported folder, timm:NAME or random:NAME"
    if path.is_dir():
        raise UserError(
            f"{option} ({text}) must be {forms}; there is no {CONFIG} with {WEIGHTS} in that folder"
        )
    raise UserError(f"{option} ({text}) must be {forms}; nothing of that name exists{_similar(path)}")


def read_config(folder: Path, option: str = "model") -> dict[str, Any]:
    """The config.json of an exported folder, its weights looked at but not loaded.

    Raises:
        UserError: it is no JSON of timm's, or the weights are cut short.
    """
    path = folder / CONFIG
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise UserError(f"{option}: {path} is far larger than any config.json; it is refused")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{option}: {path} is not valid JSON; export the model again") from error
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read ({error.strerror})") from error
    _check_config(config, path, option)
    try:
        with safe_open(folder / WEIGHTS, "pt") as weights:
            weights.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{option}: {folder / WEIGHTS} cannot be read, it may be cut short ({_line(error)}); export it again"
        ) from error
    return dict(config)


def run_options(text: str | Path) -> dict[str, Any]:
    """The options of the run behind a run folder or that of its weights; empty where there is none."""
    path = Path(text).expanduser()
    inside = path.resolve().name in ("backbone", CLASSIFIER)
    for folder in (path, path.resolve().parent if inside else path):
        run = RunFolder(folder)
        if run.exists():
            return run.config()
    return {}


def fitted(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Statistics of colour images for another number of channels: their mean for each."""
    if len(values) == channels:
        return tuple(float(value) for value in values)
    return (sum(values) / len(values),) * channels


def _check_config(config: Any, path: Path, option: str) -> None:
    pretrained = config.get("pretrained_cfg") if isinstance(config, dict) else None
    if not isinstance(pretrained, dict) or not isinstance(config.get("architecture"), str):
        raise UserError(f"{option}: {path} must be a timm config with architecture and pretrained_cfg")
    size = pretrained.get("input_size")
    if not (isinstance(size, list) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)):
        raise UserError(f"{option}: {path} must give input_size as channels, height and width")
    for name in ("mean", "std"):
        values = pretrained.get(name)
        if not isinstance(values, list) or len(values) != size[0]:
            raise UserError(f"{option}: {path} must give {name} as {size[0]} numbers, one a channel")


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    hint = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    return f"; {hint}" if hint.startswith("did you mean") else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
