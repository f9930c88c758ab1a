"""Which frequencies a model uses: accuracy on filtered test images, as a curve over the radius."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from freqmask.console import say
from freqmask.data.values import Survey
from freqmask.errors import UserError
from freqmask.evaluation import knn
from freqmask.evaluation.answers import learn_answers, on_device
from freqmask.evaluation.classifier import ClassifierSubject
from freqmask.evaluation.features import not_finite
from freqmask.evaluation.job import Setting, begin, open_one, prepare
from freqmask.evaluation.labelled import LabelledData, Round
from freqmask.evaluation.protocol import Bench
from freqmask.evaluation.results import Result, Summary, aligned, append_results, shortened, summarise
from freqmask.evaluation.subjects import Subject
from freqmask.filters import BandPass, HighPass, LowPass
from freqmask.filters.filter import Filter
from freqmask.training.checkpoint import replace_atomically

SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # of the highest frequency along an axis
HEADS = ("linear", "knn", "own")
KINDS = {"low": "low-pass: below", "high": "high-pass: from", "band": "band-pass: around"}
_NEIGHBOURS = 20

Answer = Callable[[dict[str, np.ndarray]], Int64[np.ndarray, " image"]]


@dataclass(frozen=True)
class Band:
    """One filter of the curves.

    Attributes:
        kind: whole, low, high or band.
        low: inner radius in bins of the image that the model sees.
        high: outer radius in bins.
    """

    kind: str
    low: float
    high: float

    @property
    def name(self) -> str:
        """For the records, such as ``low 8`` or ``band 4-8``."""
        edges = {"whole": "", "low": f" {self.high:g}", "high": f" {self.low:g}"}
        return self.kind + edges.get(self.kind, f" {self.low:g}-{self.high:g}")

    @property
    def place(self) -> float:
        """Where it is drawn: its edge, or the middle of the band, in bins."""
        return {"low": self.high, "high": self.low}.get(self.kind, (self.low + self.high) / 2)

    def filter(self) -> Filter:
        """The filter that leaves this band."""
        if self.kind == "low":
            return LowPass(self.high)
        return HighPass(self.low) if self.kind == "high" else BandPass(self.low, self.high)

    def change(self, images: Float[Tensor, "batch channel height width"]) -> Tensor:
        """Images in [0, 1] with this band alone, around their mean colour, clamped.

        The mean stays where the filter would take it: without it half of every high-passed image is below
        zero and lost, and the curve would show darkness as much as frequencies.
        """
        filtered = self.filter()(images.float()).images
        if self.kind != "low":
            filtered = filtered + images.float().mean(dim=(2, 3), keepdim=True)
        return filtered.clamp(0, 1)


def bands_of(size: tuple[int, int], radii: Sequence[float] | None = None) -> list[Band]:
    """Low-, high- and band-passes for images of a size, the whole image first.

    Args:
        size: (height, width) in pixels.
        radii: in bins; None takes seven from a sixteenth of the highest frequency to all of it.

    Raises:
        UserError: a radius is out of its range.
    """
    side = min(size)
    edges = sorted({round(side / 2 * share, 2) for share in SHARES} if radii is None else set(radii))
    if not edges or edges[0] <= 0 or edges[-1] > side / math.sqrt(2):
        raise UserError(
            f"radii ({' '.join(f'{edge:g}' for edge in edges)}) must be above 0 and at most "
            f"{side / math.sqrt(2):.1f}, the largest in images of {side} pixels; leave them out"
        )
    inner = [Band("band", low, high) for low, high in itertools.pairwise(edges)]
    low = [Band("low", 0, edge) for edge in edges]
    return [Band("whole", 0, side), *low, *(Band("high", edge, side) for edge in edges), *inner]


def evaluate_bands(head: str, radii: Sequence[float] | None, setting: Setting) -> list[Summary]:
    """Measure all models on filtered test images; table, rows, and ``bands.png``.

    Args:
        head: ``linear`` or ``knn``, learnt from whole images; ``own``, the model's own classifier.
        radii: in bins; None for the usual ones.
        setting: what, on what, where.

    Returns:
        One summary a model and band.

    Raises:
        UserError: something cannot be opened, or a radius does not fit.
    """
    models, data, seen = prepare(setting, check=head != "own")
    subjects = [_open(text, head, data, seen, setting, setting.seeds[0]) for text in models]
    for subject in subjects:
        bands_of(_size(subject), radii)  # a radius that does not fit shows before hours of work
    results = []
    with closing(setting.place):
        for subject in subjects:
            for seed in setting.seeds:
                if seed != setting.seeds[0]:
                    subject = _open(subject.text, head, data, seen, setting, seed)
                results += _measure(begin(subject, data, setting.place), head, radii, seed)
    return _tell(setting, data, results, head)


def _open(text: str, head: str, data: LabelledData, seen: Survey, setting: Setting, seed: int) -> Subject:
    if head == "own":
        return ClassifierSubject(text, data.class_names, setting.crop)
    return open_one(text, seen, setting, seed)


def _size(subject: Subject) -> tuple[int, int]:
    _, height, width = subject.key()["input_size"]
    return height, width


def _measure(bench: Bench, head: str, radii: Sequence[float] | None, seed: int) -> list[Result]:
    """One result a band; the head of each round answers for its own test images."""
    tested = bench.data.tested
    size = _size(bench.subject)
    trouble = ""
    whole = bench.table("end").values
    if any(not_finite(values) for values in whole.values()):
        trouble = "features are not finite; no result"
        return [Result(bench.subject, "whole", seed, tested, np.empty(0), trouble=trouble)]
    answers = [_head(bench, head, one, seed) for one in bench.data.rounds]
    parts = np.split(np.arange(len(tested)), np.cumsum([len(one.test) for one in bench.data.rounds])[:-1])
    results = []
    for band in bands_of(size, radii):
        values = _values(bench, tested, band)
        said = [
            answer({name: rows[part] for name, rows in values.items()})
            for answer, part in zip(answers, parts, strict=True)
        ]
        facts = {"head": head, "radius": band.place, "cycles_per_pixel": band.place / min(size)}
        results.append(Result(bench.subject, band.name, seed, tested, np.concatenate(said), facts))
    return results


def _values(bench: Bench, tested: np.ndarray, band: Band) -> dict[str, np.ndarray]:
    if band.kind == "whole":
        return {name: values[tested] for name, values in bench.table("end").values.items()}
    return bench.changed(tested, band.change, f"{band.filter().describe()} around the mean").values


def _head(bench: Bench, head: str, one: Round, seed: int) -> Answer:
    """What turns features into classes, learnt from whole training images."""
    if head != "knn":
        answers = learn_answers(bench, head, one, seed)
        return lambda values: answers.logits(bench.place, values).argmax(dim=1).cpu().numpy()
    bank, labels = bench.tensor(bench.table("end").values["end/mean"], one.train), bench.labels(one.train)
    k = min(_NEIGHBOURS, len(one.train))
    return lambda values: (
        knn.predict(on_device(bench.place, values["end/mean"]), bank, labels, bench.classes, [k])[k]
        .cpu()
        .numpy()
    )


def _tell(setting: Setting, data: LabelledData, results: list[Result], head: str) -> list[Summary]:
    summaries = summarise(results, data)
    for line in ["", f"accuracy on filtered test images, {head} head", *table_lines(results, summaries)]:
        say(line)
    tables = append_results(results, data, "bands", setting.options, setting.out)
    folder = setting.out or next((r.subject.results for r in results if r.subject.results), None) or Path()
    draw_curves(folder / "bands.png", results, summaries, data)
    say()
    say(f"rows        {', '.join(map(str, tables))}")
    say(f"look at     {folder / 'bands.png'}")
    return summaries


def table_lines(results: Sequence[Result], summaries: Sequence[Summary]) -> list[str]:
    """A block a kind of filter: models down, radii across, accuracy in per cent."""
    points = _points(results, summaries)
    lines: list[str] = []
    for kind, words in KINDS.items():
        rows: list[list[str]] = []
        for name, curves in points.items():
            whole = curves["whole"][0][1] if "whole" in curves else float("nan")
            curve = curves.get(kind, [])
            if not rows:
                rows.append([f"{words} (cycles per pixel)", *(f"{x:.3f}" for x, *_ in curve), "whole image"])
            rows.append([name, *(f"{100 * y:.1f}" for _, y, *_ in curve), f"{100 * whole:.1f}"])
        lines += [*aligned(rows), ""]
    return lines[:-1]


def _points(
    results: Sequence[Result], summaries: Sequence[Summary]
) -> dict[str, dict[str, list[tuple[float, float, float, float]]]]:
    """Model -> kind -> (cycles per pixel, accuracy, lower end, upper end), by frequency."""
    where = {(r.subject.name, r.variant): float(r.facts.get("cycles_per_pixel", 0.0)) for r in results}
    points: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for one in summaries:
        kind = one.variant.split(" ")[0]
        accuracy = float(np.mean(one.accuracies)) if one.accuracies else float("nan")
        point = (where[one.name, one.variant], accuracy, *one.interval)
        points.setdefault(one.name, {}).setdefault(kind, []).append(point)
    return points


def draw_curves(
    path: Path, results: Sequence[Result], summaries: Sequence[Summary], data: LabelledData
) -> None:
    """Three panels, a curve a model with its 95 % interval; the dotted line is the whole image, the grey one chance."""
    from matplotlib.figure import Figure

    points = _points(results, summaries)
    figure = Figure(figsize=(10, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (kind, words) in zip(axes, KINDS.items(), strict=True):
        for number, (name, curves) in enumerate(points.items()):
            x, y, low, high = np.array(curves.get(kind, [(np.nan,) * 4])).T
            axis.plot(x, 100 * y, "o-", ms=3, color=f"C{number}", label=shortened(name))
            axis.fill_between(x, 100 * low, 100 * high, color=f"C{number}", alpha=0.2, lw=0)
            if "whole" in curves:
                axis.axhline(100 * curves["whole"][0][1], color=f"C{number}", ls=":", lw=1)
        axis.axhline(100 / len(data.class_names), color="0.7", lw=1)
        axis.set_xlabel(f"{words}, cycles per pixel", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy in %")
    for text in axes[0].legend(fontsize=7, frameon=False).get_texts():
        text.set_parse_math(False)
    replace_atomically(path, lambda unfinished: figure.savefig(unfinished, format="png"))
