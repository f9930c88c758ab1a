"""What somebody who knows these methods would say of a run at a glance."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from freqmask.console import readable_time
from freqmask.reporting.curves import wording
from freqmask.reporting.reading import Curve, Run

FLAT = 0.99  # relative loss
COLLAPSED = 0.1  # nats (docs/methods.md, small pictures)
WAITING = 0.2  # share of the time
EARLY = 5_000  # steps before which nothing can be judged (docs/methods.md, small pictures)
ENOUGH = 100  # images below which a share of them says nothing: its standard error is up to 5 %
NOTABLE = 2.0  # standard errors
INSTEAD = (
    "Train longer (--hours), begin with public weights (--init timm:NAME), or compare another --method, before "
    "you use them."
)
OVERFITTING = 1.03  # last held-out loss over its lowest


class Remark(NamedTuple):
    """One sentence on a run; ``kind`` also says it in a word for those who see no colour."""

    kind: Literal["good", "note", "warning"]
    text: str


def remarks(run: Run) -> list[Remark]:
    """The state of a run, then what looks good and what does not, each with what to do about it."""
    return [
        *_state(run),
        *_learning(run),
        *features_remarks(run),
        *_bands(run),
        *_held_out(run),
        *_collapse(run),
        *_numbers(run),
        *_loading(run),
    ]


def _state(run: Run) -> Iterator[Remark]:
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    if run.status == "finished":
        seconds = run.summary.get("seconds")
        took = f" in {readable_time(float(seconds))}" if isinstance(seconds, (int, float)) else ""
        yield Remark("good", f"Finished: {run.last_step:,} steps{took}.")
    elif run.status == "going on":
        yield Remark("note", f"Still going on: step {run.last_step:,}{of} when this page was written.")
    else:
        yield Remark(
            "warning", f"Not finished: it stopped at step {run.last_step:,}{of}. The same command goes on."
        )
    if run.curves and run.last_step < EARLY:
        yield Remark("note", f"Little can be judged before about {EARLY:,} steps.")


def _learning(run: Run) -> Iterator[Remark]:
    curve = run.curves.get("relative_loss")
    if curve is None:
        return
    value = curve.tail()
    if value < FLAT:
        yield Remark(
            "note",
            f"It learns its task: relative loss {value:.3f} (1 = zero prediction). Whether its features are "
            "any good, only the probe tells.",
        )
    else:
        yield Remark(
            "warning",
            f"Nothing learned yet: relative loss {value:.3f} (1 = zero prediction). "
            "Try more --steps, a higher --lr, or --gamma 1.5; --overfit 8 tells whether it can learn at all.",
        )


def features_remarks(run: Run) -> Iterator[Remark]:
    """Whether the features are better than those that the run began with; nothing where row 0 is missing.

    A difference counts beyond two standard errors of the labelled images, one of RankMe beyond a tenth.
    """
    before, now, pixels = (
        {name: _at(run, f"{place}_{name}", start) for name in ("knn", "linear")}
        for place, start in (("probe", True), ("probe", False), ("pixels", True))
    )
    if any(value is None for value in (*before.values(), *now.values())):
        yield from _rank(run)
        return
    images = int(run.state.get("probe_images") or 0)
    told = "; ".join(
        f"{word} {now[name]:.1%}, before {before[name]:.1%}, raw pixels {_percent(pixels[name])}"
        for name, word in (("knn", "k-NN"), ("linear", "linear"))
    )
    told += f" ({images:,} images)" if images else ""
    if images < ENOUGH:
        yield Remark(
            "note", f"{told}: too few images to judge by; --probe_data wants {ENOUGH} or more to test."
        )
        return
    gains = {name: (now[name] - before[name]) / _error(before[name], images) for name in now}  # type: ignore[operator, arg-type]
    if min(gains.values()) < -NOTABLE and max(gains.values()) < NOTABLE:
        yield Remark("warning", f"Its features are worse than those it began with: {told}. {INSTEAD}")
    elif max(gains.values()) < NOTABLE:
        yield Remark("warning", f"Its features are no better than those it began with: {told}. {INSTEAD}")
    elif all(pixels[name] is None or now[name] > pixels[name] for name in now):  # type: ignore[operator]
        yield Remark(
            "good", f"Its features are better than those it began with, and than raw pixels: {told}."
        )
    else:
        yield Remark(
            "note", f"Better than what it began with, and not yet better than raw pixels: {told}. {INSTEAD}"
        )


def _rank(run: Run) -> Iterator[Remark]:
    before, now = _at(run, "rankme", True), _at(run, "rankme", False)
    if before is None or now is None:
        return
    told = f"Effective rank of the features (RankMe): {now:.1f}, before the first step {before:.1f}"
    if now < 0.9 * before:
        yield Remark("warning", f"{told}: it has fallen, the images look more alike to the model. {INSTEAD}")
    else:
        yield Remark(
            "note", f"{told}. Only labels tell what they are good for: --probe_data FOLDER_OF_CLASSES."
        )


def _at(run: Run, name: str, start: bool) -> float | None:
    curve = run.curves.get(name)
    if curve is None or curve.steps[0] != 0:
        return None
    return float(curve.values[0]) if start else curve.last


def _error(share: float, images: int) -> float:
    return max(math.sqrt(share * (1 - share) / images), 1 / images)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _bands(run: Run) -> Iterator[Remark]:
    bands = {
        name: curve
        for name, curve in run.curves.items()
        if re.fullmatch(r"relative_loss/band_[\d.]+_[\d.]+", name)
    }
    rising = sorted(bands, key=lambda name: float(re.findall(r"[\d.]+", name)[0]))
    flat = [wording(name).removeprefix("band ") for name in rising if bands[name].tail() >= FLAT]
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
    if curve is None or not _after_warmup(run):
        return
    if curve.tail() < COLLAPSED:
        yield Remark(
            "warning",
            f"The teacher has collapsed: {curve.tail():.3f} nats, healthy is above {COLLAPSED}. Try a lower "
            "--teacher_temperature, a lower --lr, or fewer --outputs.",
        )
    else:
        yield Remark("good", f"No collapse: {curve.tail():.2f} nats (below {COLLAPSED} would be one).")


def _after_warmup(run: Run) -> bool:
    epochs, images, batch = (
        run.config.get("warmup_epochs"),
        run.state.get("images"),
        run.config.get("batch_size"),
    )
    if not all(isinstance(number, (int, float)) and number for number in (epochs, images, batch)):
        return run.last_step > 0
    return run.last_step > float(epochs) * float(images) / float(batch)  # type: ignore[arg-type]


def _numbers(run: Run) -> Iterator[Remark]:
    for name in ("loss", "grad_norm"):
        curve: Curve | None = run.curves.get(name)
        if curve is not None and curve.not_finite:
            yield Remark("warning", f"{curve.not_finite:,} logged values of {wording(name)} are no numbers.")


def _loading(run: Run) -> Iterator[Remark]:
    curve = run.curves.get("data_wait_share")
    if curve is not None and curve.tail() > WAITING:
        yield Remark(
            "note",
            f"The training waits for images {curve.tail():.0%} of its time: more --workers, or smaller image files.",
        )
    if run.skipped:
        yield Remark(
            "note", f"{len(run.skipped):,} images could not be read; they are listed below with reasons."
        )
