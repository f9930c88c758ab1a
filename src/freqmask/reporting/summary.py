"""A run in words: what was run, in what several differ, and what somebody who knows these methods would say of it."""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from freqmask.console import counted, readable_bytes, readable_time, shell_word
from freqmask.options import options_of
from freqmask.options.of_methods import METHOD_OPTIONS, BackboneOptions, informative_from
from freqmask.options.of_training import GROUPS
from freqmask.reporting.reading import Curve, Run, number, whole_number

# Options that change how a run is recorded, computed or watched, not what it is; `command` and `options` repeat an
# evaluation that trains.
_INCIDENTAL = re.compile(
    r"out|workers|logger|keep_checkpoints|max_skipped_share|command|options|probe_.*"
    r"|(log|preview|checkpoint)_every_steps|checkpoint_every_minutes"
)

# options of every pre-training, whatever its method
_GENERAL = {name for group in (*GROUPS, BackboneOptions) for name in options_of(group)} | {"data"}

FLAT = 0.99  # relative loss
COLLAPSED = 0.1  # nats (docs/methods.md, small images)
WAITING = 0.2  # share of the time
ENOUGH = 100  # images below which a share of them says nothing: its standard error is up to 5 %
NOTABLE = 2.0  # standard errors
OVERFITTING = 1.03  # last held-out loss over its lowest
INSTEAD = (
    "Train longer (--hours), learn from public weights (--teacher timm:NAME), or compare another --method, before "
    "you use them."
)


def metadata(run: Run) -> dict[str, dict[str, str]]:
    """What a reader wants to know first, group -> name -> text; the whole configuration stands elsewhere."""
    return {**_training_metadata(run), **_cost_metadata(run)}


def _training_metadata(run: Run) -> dict[str, dict[str, str]]:
    config, state = run.config, run.state
    backbone = text_of(config.get("backbone") or run.summary.get("backbone"))
    backbone += f", patch {config['patch_size']}" if config.get("patch_size") else ""
    backbone += f", {text_of(config['model_args'])}" if config.get("model_args") else ""
    steps, batch, rate, lowest = (number(config.get(n)) for n in ("steps", "batch_size", "lr", "min_lr"))
    length = f"{counted(steps, 'step')} of {counted(batch, 'image')}" if steps > 0 and batch > 0 else ""
    if length and number(state.get("images")) > 0:
        length += f" = {counted(steps * batch / number(state['images']), 'epoch')}"
    decay = f", down to {lowest:.2g}" if lowest > 0 else ""
    scale: Any = config.get("crop_scale")
    is_pair = isinstance(scale, list) and len(scale) == 2
    area = f", {text_of(scale[0])} to {text_of(scale[1])} of the area" if is_pair else ""
    return {
        "Data": {
            "Images from": text_of(config.get("data") or run.given.get("data")),
            "Trained on": counted(state["images"], "image") if isinstance(state.get("images"), int) else "",
            "Skipped": f"{len(run.skipped):,}" if run.skipped else "none",
            "Input size": _input_size(config),
            "Value range": _value_range(config.get("value_range")),
        },
        "Method": {
            "Method": text_of(config.get("method") or run.summary.get("method")),
            "Settings": "; ".join(f"{name} {text_of(config[name])}" for name in _method_options(config)),
            "Backbone": backbone,
            "Started from": text_of(config.get("init")) or "random weights",
        },
        "Recipe": {
            "Length": length,
            "Learning rate": f"{rate:.3g}{decay}" if rate > 0 else "",
            "Warm-up, epochs": text_of(config.get("warmup_epochs")),
            "Weight decay": text_of(config.get("weight_decay")),
            "Crops": text_of(config.get("crop")) + area,
            "Seed": text_of(config.get("seed")),
        },
    }


def _cost_metadata(run: Run) -> dict[str, dict[str, str]]:
    config, state, summary = run.config, run.state, run.summary
    on = text_of(config.get("accelerator"))
    count = f"{text_of(config.get('devices'))} × {on}" if on else ""
    cores = (
        f"{counted(state['cores'], 'core')}, threads: {state.get('threads', '?')}"
        if state.get("cores")
        else ""
    )
    seconds, speed = number(summary.get("seconds")), number(summary.get("images_per_second"))
    sizes: dict[tuple[int, int], int] = {}  # a checkpoint may have two names
    for path in run.path.rglob("*"):
        with suppress(OSError):  # a run in training renames its files
            file = path.lstat()
            sizes |= {(file.st_dev, file.st_ino): file.st_size} if stat.S_ISREG(file.st_mode) else {}
    versions = [f"{name} {state[name]}" for name in ("freqmask", "torch") if state.get(name)]
    return {
        "Machine": {
            "Devices": ", ".join(filter(None, [count, text_of(state.get("device"))])),
            "Processor": cores,
            "Precision": text_of(config.get("precision")),
            "Loader workers": text_of(config.get("workers")),
            "Versions": ", ".join(versions),
        },
        "Cost": {
            "Time": readable_time(seconds) if seconds >= 0 else "",
            "Speed": f"{speed:,.0f} images/s over all" if speed >= 0 else "",
            "Began": text_of(state.get("began")),
            "Ended": text_of(summary.get("ended")),
            "On the disk": readable_bytes(sum(sizes.values())),
        },
    }


def _value_range(value: Any) -> str:
    if isinstance(value, str) and ":" in value:  # several sample types, each with its own
        return value.replace(":", " ").replace(",", " to ").replace("/", ", ")
    return "full range of the sample type" if value == "dtype" else text_of(value)


def _input_size(config: Mapping[str, Any]) -> str:
    size, channels = config.get("image_size"), config.get("channels")
    if size is None:
        return ""
    sides = "×".join(str(side) for side in size) if isinstance(size, list) else f"{size}×{size}"
    return f"{sides} pixels" + (f", {channels} channel" + "s" * (channels != 1) if channels else "")


def _method_options(config: Mapping[str, Any]) -> list[str]:
    """The options of a pre-training that its method alone knows, also one of somebody's own."""
    method = str(config.get("method"))
    if method not in METHOD_OPTIONS and ":" not in method:
        return []
    return [name for name in config if name not in _GENERAL]


def settings_of(run: Run) -> dict[str, str]:
    """What makes a run what it is, each setting as a text.

    Runs of 0.1.0 recorded no option of the method that was left at its default.
    """
    method = METHOD_OPTIONS.get(str(run.config.get("method")))
    defaults = {name: option.default for name, option in options_of(method).items()} if method else {}
    values = {**run.config, **{name: value for name, value in defaults.items() if name not in run.config}}
    return {name: text_of(value) for name, value in values.items() if not _INCIDENTAL.fullmatch(name)}


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The recorded settings in which the runs are not all alike, each with its value in every run."""
    settings = [settings_of(run) for run in runs]
    names = sorted({name for run in runs for name in run.config})
    table = [(name, [texts_of_run.get(name, "–") for texts_of_run in settings]) for name in names]
    return [(name, texts) for name, texts in table if len(set(texts)) > 1]


def repeat_command(run: Run) -> str:
    """What to type to run it again."""
    command = text_of(run.config.get("command")) or "pretrain"
    return f"freqmask {command} --config {shell_word(run.path / 'config.yaml')} --out NEW_FOLDER"


def text_of(value: Any) -> str:
    """A value of a configuration as one line.

    >>> text_of([0.2, 1.0]), text_of({"depth": 4}), text_of(None)
    ('0.2, 1', '{"depth": 4}', '')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text_of, value))
    if isinstance(value, dict):
        return json.dumps(value, default=str, ensure_ascii=False)
    return "" if value is None else str(value)


class Remark(NamedTuple):
    """One sentence on a run; ``kind`` also says it in a word for those who see no color."""

    kind: Literal["good", "note", "warning"]
    text: str


def remarks(run: Run) -> list[Remark]:
    """The state of a run, then what looks good and what does not, each with what to do about it."""
    parts = (_state, _learning, features_remarks, _bands, _held_out, _collapse, _logged)
    return [remark for part in parts for remark in part(run)]


def _state(run: Run) -> Iterator[Remark]:
    asked = f" of {run.total_steps:,}" if run.total_steps else ""
    if run.status == "finished":
        seconds = number(run.summary.get("seconds"))
        took = f" in {readable_time(seconds)}" if seconds >= 0 else ""
        yield Remark("good", f"Finished: {run.last_step:,} steps{took}.")
    elif run.status == "running":
        yield Remark("note", f"Still running: step {run.last_step:,}{asked} when this page was written.")
    else:
        stopped = f"Not finished: it stopped at step {run.last_step:,}{asked}"
        yield Remark("warning", f"{stopped}. The same command resumes it.")
    early = informative_from(run.config.get("method"))
    if run.curves and run.last_step < early:
        yield Remark("note", f"Little can be judged before about {early:,} steps.")


def _learning(run: Run) -> Iterator[Remark]:
    curve = run.curves.get("relative_loss")
    if curve is None:
        return
    loss = f"relative loss {curve.tail():.3f} (1 = zero prediction)"
    if curve.tail() < FLAT:
        yield Remark(
            "note", f"It learns its task: {loss}. Whether its features are any good, only the probe tells."
        )
    else:
        yield Remark(
            "warning",
            f"Nothing learned yet: {loss}. {_try(run, 'more --steps', 'a higher --lr', '--gamma 1.5')}; --overfit 8 "
            "tells whether it can learn at all.",
        )


def _try(run: Run, *tries: str) -> str:
    """What to try, by those options alone that the run's method has beside the general ones."""
    own = METHOD_OPTIONS.get(str(run.config.get("method")))
    known = {*run.config, *_GENERAL, *(options_of(own) if own else ())}
    fitting = [text for text in tries if text.partition("--")[2].split()[0] in known]
    return "Try " + ", or ".join(filter(None, [", ".join(fitting[:-1]), *fitting[-1:]]))


def features_remarks(run: Run) -> Iterator[Remark]:
    """Whether the features are better than those that the run began with; nothing where row 0 is missing.

    A difference counts beyond two standard errors of the labelled images, one of RankMe beyond a tenth. Without
    ``probe_data`` k-NN may be by the images' own labels; these can be names of folders that say nothing (years), so
    that no gain is no warning.
    """
    measured = {"knn": "k-NN", "linear": "linear"}
    before = {name: _at(run, f"probe_{name}", 0) for name in measured}
    now = {name: _at(run, f"probe_{name}", -1) for name in measured}
    pixels = {name: _at(run, f"pixels_{name}", 0) for name in measured}
    names = [name for name in measured if not math.isnan(before[name] + now[name])]
    own_labels = "probe_linear" not in run.curves
    if "knn" not in names or not (own_labels or "linear" in names):
        yield from _rank(run)
        return
    images = whole_number(run.state.get("probe_images")) or 0
    scores = "; ".join(
        f"{measured[name]} {now[name]:.1%}, before {before[name]:.1%}, raw pixels "
        + ("-" if math.isnan(pixels[name]) else f"{pixels[name]:.1%}")
        for name in names
    )
    whose = "by the images' own labels, " if own_labels else ""
    scores += f" ({whose}{images:,} images)" if images else ""
    if images < ENOUGH:
        few = f"too few images to judge by; --probe_data wants {ENOUGH} or more to test"
        yield Remark("note", f"{scores}: {few}.")
        return
    errors = {name: max(math.sqrt(p * (1 - p) / images), 1 / images) for name, p in before.items()}
    gains = [(now[name] - before[name]) / errors[name] for name in names]
    if max(gains) < NOTABLE and own_labels and min(gains) >= -NOTABLE:
        yield from _rank(run, f" By labels the features are as good as at the beginning: {scores}.")
    elif max(gains) < NOTABLE:
        how = "worse" if min(gains) < -NOTABLE else "no better"
        yield Remark("warning", f"Its features are {how} than those it began with: {scores}. {INSTEAD}")
    elif any(now[name] <= pixels[name] for name in names):  # never of a missing one
        begun = "Better than what it began with, and not yet better than raw pixels"
        yield Remark("note", f"{begun}: {scores}. {INSTEAD}")
    else:
        begun = "Its features are better than those it began with, and than raw pixels"
        yield Remark("good", f"{begun}: {scores}.")


def _rank(run: Run, by_labels: str = "") -> Iterator[Remark]:
    """What RankMe says, and beside it what labels say, where there are any."""
    before, now = _at(run, "rankme", 0), _at(run, "rankme", -1)
    if math.isnan(before):
        return
    rank = f"Effective rank of the features (RankMe): {now:.1f}, before the first step {before:.1f}"
    if now < 0.9 * before:
        fallen = "it has fallen, the images look more alike to the model"
        yield Remark("warning", f"{rank}: {fallen}.{by_labels} {INSTEAD}")
    else:
        hint = " Only labels tell what they are good for: --probe_data FOLDER_OF_CLASSES."
        yield Remark("note", f"{rank}.{by_labels or hint}")


def _at(run: Run, name: str, place: int) -> float:
    """The first (0) or last (-1) value of a curve that was measured before the first step, else NaN."""
    curve = run.curves.get(name)
    return float(curve.values[place]) if curve is not None and curve.steps[0] == 0 else math.nan


def _bands(run: Run) -> Iterator[Remark]:
    bands = {
        tuple(map(float, re.findall(r"[\d.]+", name))): (wording(name).removeprefix("band "), curve.tail())
        for name, curve in run.curves.items()
        if re.fullmatch(r"relative_loss/band_[\d.]+_[\d.]+", name)
    }
    flat = [name for _, (name, loss) in sorted(bands.items()) if loss >= FLAT]
    if flat and len(flat) < len(bands):
        yield Remark(
            "note",
            f"Not learned yet: frequencies of {', '.join(flat)} cycles a side. Fine detail comes last.",
        )


def _held_out(run: Run) -> Iterator[Remark]:
    curve = run.curves.get("held_out_relative_loss") or run.curves.get("held_out_loss")
    if curve is None or len(curve.values) < 4:
        return
    images = run.state.get("held_out_images")
    if isinstance(images, int) and images < ENOUGH:
        yield Remark("note", f"The held-out loss is of {images} images, too few to say anything.")
        return
    lowest = float(curve.values.min())
    if lowest > 0 and curve.last > OVERFITTING * lowest:
        step = int(curve.steps[int(curve.values.argmin())])
        yield Remark(
            "warning",
            f"The loss on held-out images was lowest at step {step:,} and has risen since by "
            f"{curve.last / lowest - 1:.0%}: more images, or fewer epochs.",
        )


def _collapse(run: Run) -> Iterator[Remark]:
    curve = run.curves.get("collapse")
    epochs, batch = number(run.config.get("warmup_epochs")), number(run.config.get("batch_size"))
    warmup = epochs * number(run.state.get("images")) / batch if batch else 0.0
    if curve is None or run.last_step <= (0.0 if math.isnan(warmup) else warmup):
        return
    if curve.tail() < COLLAPSED:
        yield Remark(
            "warning",
            f"The teacher has collapsed: {curve.tail():.3f} nats, healthy is above {COLLAPSED}. "
            + _try(run, "a lower --teacher_temperature", "a lower --lr", "fewer --outputs")
            + ".",
        )
    else:
        yield Remark("good", f"No collapse: {curve.tail():.2f} nats (below {COLLAPSED} would be one).")


def _logged(run: Run) -> Iterator[Remark]:
    """Values that are no numbers, time spent waiting, images left out."""
    for name in ("loss", "grad_norm"):
        curve: Curve | None = run.curves.get(name)
        if curve is not None and curve.not_finite:
            yield Remark("warning", f"{curve.not_finite:,} logged values of {wording(name)} are no numbers.")
    wait = run.curves.get("data_wait_share")
    if wait is not None and wait.tail() > WAITING:
        share = f"The training waits for images {wait.tail():.0%} of its time"
        yield Remark("note", f"{share}: more --workers, or smaller image files.")
    if run.skipped:
        yield Remark(
            "note", f"{counted(len(run.skipped), 'image')} could not be read; see below, with reasons."
        )


def wording(column: str) -> str:
    """A column's name as a person says it.

    >>> wording("relative_loss/band_4_8"), wording("held_out_relative_loss")
    ('band 4 to 8', 'held-out images')
    """
    special = {
        "held_out_relative_loss": "held-out images",
        "held_out_loss": "held-out images",
        "relative_loss": "training, all filters",
        "loss": "training",
        "data_wait_share": "waiting",
    }
    plain = special.get(column, column.removeprefix("relative_loss/"))
    return re.sub(r"^band_(\w+)_(\w+)$", r"band \1 to \2", plain).replace("_", " ")
