"""Which frequencies a model uses: accuracy on filtered test images, as a curve over the radius."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from freqmask.errors import UserError
from freqmask.evaluation import knn
from freqmask.evaluation.eval_model import EvalModel
from freqmask.evaluation.features import ImageChange
from freqmask.evaluation.labelled import Round
from freqmask.evaluation.linear import fit_head
from freqmask.evaluation.protocol import EvalContext, Protocol
from freqmask.evaluation.results import (
    Result,
    ResultTable,
    Summary,
    aligned,
    plain_texts,
    save_figure,
    shortened,
)
from freqmask.filters import BandPass, HighPass, LowPass
from freqmask.filters.filter import Filter

SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # of the highest frequency along an axis
KINDS = {"low": "low-pass: below", "high": "high-pass: from", "band": "band-pass: around"}
_NEIGHBORS = 20

Predictor = Callable[[dict[str, np.ndarray]], Int64[np.ndarray, " image"]]
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

    def change(self, images: Float[Tensor, "batch channel height width"]) -> Tensor:
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
        size, tested = context.model.input_size[1:], context.data.tested
        results: list[Result] = []
        for band in bands_of(size, self.radii):
            if band.kind == "whole":
                values = {name: rows[tested] for name, rows in context.table("end").values.items()}
            else:
                values = context.changed(tested, band).values
            parts = zip(heads, context.by_round(values), strict=True)
            predicted = np.concatenate([head(part) for head, part in parts])
            metadata = {"head": self.head, "radius": band.place, "cycles_per_pixel": band.place / min(size)}
            results.append(context.result(band.name, seed, predicted, **metadata))
        return results

    def _fit(self, context: EvalContext, one: Round, seed: int) -> Predictor:
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
    """A block a kind of filter: models down, radii across, accuracy in per cent."""
    models, lines = _curves(table), list[str]()
    for kind, words in KINDS.items():
        places = next((curves[kind] for curves in models.values() if kind in curves), [])
        rows = [[f"{words} (cycles per pixel)", *(f"{place:.3f}" for place, _ in places), "whole image"]]
        for name, curves in models.items():
            whole = curves["whole"][0][1]
            if whole.error:
                rows.append([name, whole.error])
            else:
                rows.append([name, *(one.percent() for _, one in curves.get(kind, [])), whole.percent()])
        lines += [*aligned(rows), ""]
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
    plain_texts(axes[0].legend(fontsize=7, frameon=False))
    save_figure(figure, path)
