"""Test images of a part of their frequencies (the protocol of bands), and adversarial ones.

FGSM (arXiv 1412.6572) and PGD (arXiv 1706.06083) work in pixels, before normalization:

    x_0     = x + start                                     start: 0, or uniform in the ball of radius epsilon
    x_{t+1} = clip_[0,1](project(x_t + step * direction(grad loss(x_t))))

direction(g) is sign(g) for the maximum norm and g / |g| for the Euclidean one; loss is the cross-entropy with
the true class. FGSM is one step of epsilon from x itself. Of all iterates, x included, the one with the
largest loss is kept: no image ends easier than it was.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from freqmask.console import aligned, shortened
from freqmask.data.loader import ChosenSampler, make_loader
from freqmask.data.source import Source
from freqmask.errors import UserError
from freqmask.evaluation import knn
from freqmask.evaluation.eval_model import EvalModel
from freqmask.evaluation.features import ImageChange
from freqmask.evaluation.labelled import Round
from freqmask.evaluation.linear import ClassifierHead, fit_head
from freqmask.evaluation.protocol import EvalContext, Predict, Protocol
from freqmask.evaluation.results import Result, ResultTable, Summary
from freqmask.filters import BandPass, HighPass, LowPass
from freqmask.filters.filter import Filter
from freqmask.rng import Keys, normal, uniform
from freqmask.spectrum import Images, as_float
from freqmask.training.files import save_figure

SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # of the highest frequency along an axis
KINDS = {"low": "low-pass: below", "high": "high-pass: from", "band": "band-pass: around"}
_NEIGHBORS = 20

Curves = dict[str, list[tuple[float, Summary]]]  # kind -> (cycles per pixel, summary), by frequency


@dataclass(frozen=True)
class Band(ImageChange):
    """One filter of the curves."""

    kind: str  # whole, low, high or band
    low: float  # inner radius in bins of the image that the model sees
    high: float  # outer radius in bins

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

    def describe(self) -> str:
        return f"{self.filter().describe()} around the mean"

    def change(self, images: Images) -> Tensor:
        """Images in [0, 1] with this band alone, around their mean color, clamped.

        The mean stays where the filter would take it: without it half of every high-passed image is below
        zero and lost, and the curve would show darkness as much as frequencies.
        """
        filtered = self.filter()(images.float()).images
        if self.kind != "low":
            filtered = filtered + images.float().mean(dim=(2, 3), keepdim=True)
        return filtered.clamp(0, 1)


def bands_of(size: tuple[int, int], radii: Sequence[float] | None = None) -> list[Band]:
    """Low-, high- and band-passes for images of (height, width), the whole image first.

    Radii are in bins; None takes seven from a sixteenth of the highest frequency to all of it.

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


@dataclass
class Bands(Protocol):
    """Heads trained on whole images, tested on filtered ones."""

    head: str = "linear"  # linear or knn, trained on whole images; own, the model's own classifier
    radii: Sequence[float] | None = None  # in bins; None for the usual ones

    headline, seeds = "whole", (0,)

    def __post_init__(self) -> None:
        self.title = f"accuracy on filtered test images, {self.head} head"
        self.own_heads = self.head == "own"

    def check_model(self, model: EvalModel) -> None:
        bands_of(model.input_size[1:], self.radii)

    def evaluate(self, context: EvalContext, seed: int) -> list[Result]:
        """One row a band; the head of each round predicts its own test images."""
        if error := context.table("end").error:
            return [context.failed("whole", seed, error)]
        heads = [self._fit(context, one, seed) for one in context.data.rounds]
        results: list[Result] = []
        size = context.model.input_size[1:]
        for band in bands_of(size, self.radii):
            predicted = context.predicted(heads, None if band.kind == "whole" else band)
            metadata = {"head": self.head, "radius": band.place, "cycles_per_pixel": band.place / min(size)}
            results.append(context.result(band.name, seed, predicted, **metadata))
        return results

    def _fit(self, context: EvalContext, one: Round, seed: int) -> Predict:
        """What turns features into classes, trained on whole images."""
        if self.head != "knn":
            head = fit_head(context, self.head, one, seed)
            return functools.partial(head.predict, context)
        bank, labels = context.tensor(context.end("mean"), one.train), context.labels(one.train)
        k = min(_NEIGHBORS, len(one.train))
        return lambda values: (
            knn.predict(context.tensor(values["end/mean"]), bank, labels, context.classes, [k])[k]
            .cpu()
            .numpy()
        )

    def shown(self, tables: Mapping[str, ResultTable]) -> list[list[str]]:
        return [[self.title, *band_lines(table)] for table in tables.values()]

    def draw(self, tables: Mapping[str, ResultTable], folder: Path) -> list[Path]:
        (table,), figure = tables.values(), folder / "bands.png"
        draw_curves(figure, table)
        return [figure]


def band_lines(table: ResultTable) -> list[str]:
    """A block a kind of filter: models down, radii across, accuracy in per cent; models of one input size together."""
    models, lines = _curves(table), list[str]()
    for kind, words in KINDS.items():
        groups: dict[tuple[str, ...], list[list[str]]] = {}  # by what stands above their numbers
        rows, failed = list[list[str]](), list[list[str]]()
        for name, curves in models.items():
            whole, points = curves["whole"][0][1], curves.get(kind, [])
            if whole.error:
                failed.append([name, whole.error])
                continue
            places = tuple(f"{place:.3f}" for place, _ in points)
            row = [name, *(one.percent() for _, one in points), whole.percent()]
            groups.setdefault(places, []).append(row)
        title = f"{words} (cycles per pixel)"
        for places in groups or [()]:
            rows += [[title, *places, "whole image"], *groups.get(places, [])]
        lines += [*aligned([*rows, *failed]), ""]
    return lines[:-1]


def _curves(table: ResultTable) -> dict[str, Curves]:
    """Model -> kind -> curve."""
    place = {
        (one.model.name, one.variant): float(one.metadata.get("cycles_per_pixel", 0.0))
        for one in table.results
    }
    models: dict[str, Curves] = {}
    for one in table.summaries:
        kind = one.variant.split(" ")[0]
        models.setdefault(one.name, {}).setdefault(kind, []).append((place[one.name, one.variant], one))
    return models


def draw_curves(path: Path, table: ResultTable) -> None:
    """Three panels, a curve a model with its 95 % interval; the dotted line is the whole image, the gray one chance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (kind, words) in zip(axes, KINDS.items(), strict=True):
        for number, (name, curves) in enumerate(_curves(table).items()):
            points = [(x, one.mean, *one.interval) for x, one in curves.get(kind, [])] or [(np.nan,) * 4]
            x, y, low, high = np.array(points).T
            axis.plot(x, 100 * y, "o-", ms=3, color=f"C{number}", label=shortened(name))
            axis.fill_between(x, 100 * low, 100 * high, color=f"C{number}", alpha=0.2, lw=0)
            axis.axhline(100 * curves["whole"][0][1].mean, color=f"C{number}", ls=":", lw=1)
        axis.axhline(100 / len(table.results[0].class_names), color="0.7", lw=1)
        axis.set_xlabel(f"{words}, cycles per pixel", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy in %")
    axes[0].legend(fontsize=7, frameon=False)
    save_figure(figure, path)


Norm = Literal["linf", "l2"]
Classifier = Callable[[Images], Float[Tensor, "batch class"]]

ATTACKS = ("fgsm", "pgd")
EPSILONS: dict[Norm, str] = {"linf": "4/255", "l2": "1/2"}
_REACH = 2.5  # PGD's steps together over epsilon (arXiv 1706.06083): 10 steps of 1/255 for 4/255


@dataclass(frozen=True)
class Attack:
    """One attack and its budget."""

    kind: str  # fgsm or pgd
    norm: Norm = "linf"  # of the budget: linf (largest change of a value) or l2 (Euclidean, over the image)
    epsilon: float = 4 / 255  # budget, images being in [0, 1]
    steps: int = 10  # of PGD
    step: float = 1 / 255  # length of a step of PGD, in the norm
    random_start: bool = True  # whether PGD begins at a random point of the ball

    @property
    def name(self) -> str:
        """For tables and records, such as ``pgd linf 4/255``."""
        return f"{self.kind} {self.norm} {format_level(self.epsilon)}"

    def describe(self) -> str:
        """Everything that defines it, in words."""
        budget = f"{self.kind.upper()}: {self.norm}, epsilon {format_level(self.epsilon)}"
        if self.kind == "fgsm":
            return budget
        start = "random start" if self.random_start else "start at the image"
        return f"{budget}, {self.steps} steps of {format_level(self.step)}, {start}"

    def run(
        self, classify: Classifier, images: Images, labels: Int64[Tensor, " batch"], keys: Keys
    ) -> Images:
        """The adversarial images, in [0, 1] and within the budget: of each the iterate of the largest loss.

        Args:
            classify: images in [0, 1] -> logits, differentiable.
            images: in [0, 1].
            labels: their true classes.
            keys: one an image, of the random start.
        """
        one_step = self.kind == "fgsm"
        steps, step = (1, self.epsilon) if one_step else (self.steps, self.step)
        best, best_loss = images, torch.full((len(images),), -math.inf, device=images.device)
        now = images
        if self.random_start and not one_step:
            now = (images + random_point(images, keys, self.norm, self.epsilon)).clamp(0, 1)
            best_loss, _ = _slope(classify, images, labels, with_gradient=False)
        for number in range(steps + 1):
            loss, gradient = _slope(classify, now, labels, with_gradient=number < steps)
            better = loss > best_loss
            best = torch.where(better[:, None, None, None], now, best)
            best_loss = torch.where(better, loss, best_loss)
            if gradient is not None:
                moved = now + step * direction(gradient, self.norm)
                now = (images + projected(moved - images, self.norm, self.epsilon)).clamp(0, 1)
        return best


def _slope(
    classify: Classifier, images: Images, labels: Tensor, with_gradient: bool
) -> tuple[Float[Tensor, " batch"], Images | None]:
    """The loss of each image and its gradient."""
    with torch.set_grad_enabled(with_gradient):
        leaf = images.detach().requires_grad_(with_gradient)
        losses = F.cross_entropy(classify(leaf).float(), labels, reduction="none")
        gradient = torch.autograd.grad(losses.sum(), leaf)[0] if with_gradient else None
    return losses.detach(), gradient


def direction(gradient: Images, norm: Norm) -> Images:
    """The step of length 1 in which the loss grows most; 0 where the gradient is 0."""
    if norm == "linf":
        return gradient.sign()
    return gradient / _lengths(gradient).clamp_min(1e-30)


def projected(change: Images, norm: Norm, epsilon: float) -> Images:
    """The nearest change within the budget."""
    if norm == "linf":
        return change.clamp(-epsilon, epsilon)
    return change * (epsilon / _lengths(change).clamp_min(1e-30)).clamp_max(1)


def random_point(images: Images, keys: Keys, norm: Norm, epsilon: float) -> Images:
    """A point of the ball for each image, uniform over its volume; a function of the keys."""
    shape = images.shape[1:]
    if norm == "linf":
        return ((2 * uniform(keys, "attack/start", shape) - 1) * epsilon).to(images.dtype)
    way = normal(keys, "attack/start", shape)
    length = uniform(keys, "attack/length", (1, 1, 1)) ** (1 / math.prod(shape))
    return (way / _lengths(way) * length * epsilon).to(images.dtype)


def _lengths(change: Images) -> Float[Tensor, "batch 1 1 1"]:
    # the largest value taken out first: squares of gradients of 1e-25 would be 0 in float32
    largest = change.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
    return (change / largest).square().sum(dim=(1, 2, 3), keepdim=True).sqrt() * largest


def size_of_change(change: Images, norm: Norm) -> Float[Tensor, " batch"]:
    """How much of the budget each change takes, in image units."""
    return change.abs().amax(dim=(1, 2, 3)) if norm == "linf" else _lengths(change).flatten()


def make_attacks(
    kinds: list[str], norm: Norm, epsilon: str | float, steps: int, step: str | float, random_start: bool
) -> list[Attack]:
    """Attacks from what a user typed: numbers also as fractions such as 4/255, or auto.

    Raises:
        UserError: one of them is out of its range.
    """
    kinds = [] if kinds == ["none"] else list(dict.fromkeys(kinds))
    for kind in kinds:
        if kind not in ATTACKS:
            raise UserError(f"attacks ({kind}) must be fgsm, pgd, or none alone")
    radius = _number("epsilon", EPSILONS[norm] if epsilon == "auto" else epsilon)
    if norm == "linf" and radius > 1:
        raise UserError(f"epsilon ({epsilon}) must be at most 1, images being in [0, 1]; try 4/255")
    length = _REACH * radius / steps if step == "auto" else _number("step_size", step)
    return [Attack(kind, norm, radius, steps, length, random_start) for kind in kinds]


def _number(name: str, text: str | float) -> float:
    """A positive number, also as a fraction such as 4/255."""
    try:
        value = float(Fraction(str(text).replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not (0 < value < math.inf):
        raise UserError(f"{name} ({text}) must be a number above 0 such as 4/255 or 0.5, or auto")
    return value


def format_level(value: float) -> str:
    """A number of 255ths where it is one below 1, else with three digits.

    >>> format_level(4 / 255), format_level(0.5)
    ('4/255', '0.5')
    """
    levels = round(255 * value)
    return f"{levels}/255" if 0 < levels < 255 and abs(255 * value - levels) < 1e-6 else f"{value:.3g}"


def attack_images(
    device: torch.device,
    images: range,
    attack: Attack,
    model: EvalModel,
    head: ClassifierHead,
    source: Source,
    labels: Tensor,
    size: int,
    workers: int,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """A batch's first number; its predictions, losses before and after, sizes of the changes; in whatever process."""

    def classify(batch: Tensor) -> Tensor:
        return head.logits(model.features(batch, "end"))

    first = images.start
    for batch in make_loader(model.dataset(source), ChosenSampler(images), size, workers):
        clean, keys = as_float(batch["views"][0].to(device)), batch["keys"].to(device)
        truth = labels[first : first + len(clean)].to(device)
        harder = attack.run(classify, clean, truth, keys)
        with torch.no_grad():
            before, after = classify(clean).float(), classify(harder).float()
        losses = (F.cross_entropy(logits, truth, reduction="none") for logits in (before, after))
        change = size_of_change(harder - clean, attack.norm)
        yield first, [part.cpu().numpy() for part in (after.argmax(dim=1), *losses, change)]
        first += len(clean)
