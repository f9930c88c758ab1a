"""What was run, in words; and in what several runs differ."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from freqmask.console import readable_bytes, readable_time
from freqmask.options import options_of
from freqmask.options.of_methods import METHOD_OPTIONS, BackboneOptions
from freqmask.options.of_pretraining import GROUPS
from freqmask.reporting.reading import Run

# Options that change how a run is recorded or computed, not what it is.
_INCIDENTAL = frozenset(
    {
        "out",
        "workers",
        "logger",
        "log_every_steps",
        "preview_every_steps",
        "checkpoint_every_steps",
        "checkpoint_every_minutes",
        "keep_checkpoints",
        "max_skipped_share",
        *("command", "options"),  # what repeats an evaluation that trains
    }
)
_PROBING = "probe_"  # options of the probes that watch a run

Fact = tuple[str, str, str]


def facts(run: Run) -> list[Fact]:
    """Group, name and text of what a reader wants to know first; the whole configuration stands elsewhere."""
    told = [*_data(run), *_method(run), *_recipe(run), *_machine(run), *_cost(run)]
    return [(group, name, text) for group, name, text in told if text]


def _data(run: Run) -> list[Fact]:
    config, state = run.config, run.state
    data = config.get("data") or given(run).get("data")
    images = state.get("images")
    skipped = f"{len(run.skipped):,}" if run.skipped else "none"
    return [
        ("Data", "Images from", text_of(data)),
        ("Data", "Trained on", f"{images:,} images" if isinstance(images, int) else ""),
        ("Data", "Passed over", skipped),
        ("Data", "Network sees", _seen(config)),
        ("Data", "Value range", _value_range(config.get("value_range"))),
    ]


def _value_range(value: Any) -> str:
    if isinstance(value, str) and ":" in value:  # several sample types, each with its own
        return value.replace(":", " ").replace(",", " to ").replace("/", ", ")
    return "full range of the sample type" if value == "dtype" else text_of(value)


def _seen(config: Mapping[str, Any]) -> str:
    size, channels = config.get("image_size"), config.get("channels")
    if size is None:
        return ""
    shown = "×".join(str(side) for side in size) if isinstance(size, list) else f"{size}×{size}"
    return f"{shown} pixels" + (f", {channels} channel" + "s" * (channels != 1) if channels else "")


def _method(run: Run) -> list[Fact]:
    config = run.config
    settings = [f"{name} {text_of(config[name])}" for name in method_options(config)]
    patch = f", patch {config['patch_size']}" if config.get("patch_size") else ""
    model_args = f", {text_of(config['model_args'])}" if config.get("model_args") else ""
    return [
        ("Method", "Method", text_of(config.get("method") or run.summary.get("method"))),
        ("Method", "Settings", "; ".join(settings)),
        (
            "Method",
            "Backbone",
            text_of(config.get("backbone") or run.summary.get("backbone")) + patch + model_args,
        ),
        ("Method", "Started from", text_of(config.get("init")) or "random weights"),
    ]


def method_options(config: Mapping[str, Any]) -> list[str]:
    """The options of a pre-training that its method alone knows, also one of somebody's own."""
    method = str(config.get("method"))
    if method not in METHOD_OPTIONS and ":" not in method:
        return []
    general = {name for group in (*GROUPS, BackboneOptions) for name in options_of(group)} | {"data"}
    return [name for name in config if name not in general]


def _recipe(run: Run) -> list[Fact]:
    config = run.config
    steps, batch = number(config.get("steps")), number(config.get("batch_size"))
    images, rate = number(run.state.get("images")), number(config.get("lr"))
    length = f"{steps:,.0f} steps of {batch:,.0f} images" if steps and batch else ""
    if steps and batch and images:
        length += f" = {steps * batch / images:,.1f} epochs"
    lowest = number(config.get("min_lr"))
    return [
        ("Recipe", "Length", length),
        (
            "Recipe",
            "Learning rate",
            (f"{rate:.3g}" if rate else "") + (f", down to {lowest:.2g}" if rate and lowest else ""),
        ),
        ("Recipe", "Warm-up, epochs", text_of(config.get("warmup_epochs"))),
        ("Recipe", "Weight decay", text_of(config.get("weight_decay"))),
        ("Recipe", "Crops", text_of(config.get("crop")) + _of_area(config.get("crop_scale"))),
        ("Recipe", "Seed", text_of(config.get("seed"))),
    ]


def _of_area(scale: Any) -> str:
    return (
        f", {text_of(scale[0])} to {text_of(scale[1])} of the area"
        if isinstance(scale, list) and len(scale) == 2
        else ""
    )


def _machine(run: Run) -> list[Fact]:
    config, state = run.config, run.state
    devices = (
        f"{text_of(config.get('devices'))} × {text_of(config['accelerator'])}"
        if "accelerator" in config
        else ""
    )
    named = text_of(state.get("device"))
    versions = [f"{name} {state[name]}" for name in ("freqmask", "torch") if state.get(name)]
    cores = f"{state['cores']} cores, threads: {state.get('threads', '?')}" if state.get("cores") else ""
    return [
        ("Machine", "Devices", ", ".join(filter(None, [devices, named]))),
        ("Machine", "Processor", cores),
        ("Machine", "Precision", text_of(config.get("precision"))),
        ("Machine", "Loader workers", text_of(config.get("workers"))),
        ("Machine", "Versions", ", ".join(versions)),
    ]


def _cost(run: Run) -> list[Fact]:
    seconds, speed = number(run.summary.get("seconds")), number(run.summary.get("images_per_second"))
    return [
        ("Cost", "Time", readable_time(seconds) if seconds is not None else ""),
        ("Cost", "Speed", f"{speed:,.0f} images/s over all" if speed is not None else ""),
        ("Cost", "Began", text_of(run.state.get("began"))),
        ("Cost", "Ended", text_of(run.summary.get("ended"))),
        ("Cost", "On the disk", readable_bytes(_bytes(run))),
    ]


def _bytes(run: Run) -> int:
    """Bytes of the run folder; a checkpoint that has two names counts once."""
    files = {}
    for path in run.path.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            files[(status.st_dev, status.st_ino)] = status.st_size
    return sum(files.values())


def is_incidental(name: str) -> bool:
    """Whether an option changes only how a run is recorded or computed."""
    return name in _INCIDENTAL or name.startswith(_PROBING)


def given(run: Run) -> Mapping[str, Any]:
    """The options that were typed, as against those that were chosen by auto."""
    words = run.state.get("given")
    return words if isinstance(words, dict) else {}


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which the runs are not all alike, each with its value in every run."""
    names = sorted(name for name in {name for run in runs for name in run.config} if not is_incidental(name))
    table = [(name, [_setting(run, name) for run in runs]) for name in names]
    return [(name, values) for name, values in table if len(set(values)) > 1]


def _setting(run: Run, name: str) -> str:
    """A value of a run; runs of 0.1.0 recorded no option of the method that was left at its default."""
    method = METHOD_OPTIONS.get(str(run.config.get("method")))
    default = options_of(method).get(name) if method else None
    if name not in run.config and default is not None:
        return text_of(default.default)
    return text_of(run.config[name]) if name in run.config else "–"


def repeat_command(run: Run) -> str:
    """What to type to run it again."""
    command = text_of(run.config.get("command")) or "pretrain"
    return f"freqmask {command} --config {shlex.quote(str(run.path / 'config.yaml'))} --out NEW_FOLDER"


def number(value: Any) -> float | None:
    """The value where it is a number: a file may have been edited by hand."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def text_of(value: Any) -> str:
    """A value of a configuration as one line.

    >>> text_of([0.2, 1.0]), text_of({"depth": 4}), text_of(None)
    ('0.2, 1', '{"depth": 4}', '')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(text_of(one) for one in value)
    if isinstance(value, dict):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)
