"""The results of an examination on one set of images, over models and seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from freqmask.evaluation.corruptions import CORRUPTIONS
from freqmask.evaluation.labelled import LabelledData
from freqmask.evaluation.results import Result, Summary, summarise

Points = dict[tuple[str, int], float]  # (corruption, severity) -> accuracy


@dataclass
class Board:
    """All results on one set of images.

    Attributes:
        name: ``data``, ``tree`` (ImageNet-C files) or that of a test set.
        data: the images; those of a tree have the same labels in each of its folders.
        side: of the images that were corrupted, in pixels.
        is_read: whether corrupted images were read rather than made.
        results: with the images that each is on.
    """

    name: str
    data: LabelledData
    side: int = 0
    is_read: bool = False
    results: list[tuple[LabelledData, Result]] = field(default_factory=list)

    def add(self, data: LabelledData, result: Result) -> None:
        """One more result."""
        self.results.append((data, result))

    @cached_property
    def summaries(self) -> list[Summary]:
        """Over seeds; asked for when all results are there."""
        return summarise([result for _, result in self.results], self.data)

    @cached_property
    def models(self) -> dict[str, dict[str, Summary]]:
        """Model -> variant -> summary."""
        found: dict[str, dict[str, Summary]] = {}
        for one in self.summaries:
            found.setdefault(one.name, {})[one.variant] = one
        return found

    @cached_property
    def points(self) -> dict[str, Points]:
        """Model -> its accuracies on corrupted images."""
        return {name: points_of(summaries) for name, summaries in self.models.items()}

    @property
    def corruptions(self) -> list[str]:
        """Those that were measured, in the order of the list."""
        measured = {name for points in self.points.values() for name, _ in points}
        return [name for name in CORRUPTIONS if name in measured]


def corruption_of(variant: str) -> tuple[str, int] | None:
    """Corruption and severity of a variant such as ``fog 3``; None of any other."""
    name, _, severity = variant.rpartition(" ")
    return (name, int(severity)) if name in CORRUPTIONS and severity.isdecimal() else None


def points_of(summaries: dict[str, Summary]) -> Points:
    """The accuracies of a model by corruption and severity."""
    known = {corruption_of(variant): one for variant, one in summaries.items() if one.accuracies}
    return {point: float(np.mean(one.accuracies)) for point, one in known.items() if point is not None}


def headlines(board: Board, summaries: dict[str, Summary]) -> dict[str, Summary]:
    """What stands in the main table, by the title of its column: all but single corruptions."""
    rest = {variant: one for variant, one in summaries.items() if corruption_of(variant) is None}
    return {"imagenet-c" if board.is_read else variant: one for variant, one in rest.items()}
