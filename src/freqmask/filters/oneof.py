"""One filter drawn for each image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from freqmask.errors import UserError
from freqmask.filters.filter import Filter, mix
from freqmask.rng import uniform
from freqmask.spectrum import constant


@constant
def _thresholds(weights: tuple[float, ...], device: torch.device) -> Tensor:
    return (torch.tensor(weights, dtype=torch.float64).cumsum(0)[:-1] / sum(weights)).float().to(device)


class OneOf(Filter):
    """Draws one of several filters for each image; a batch still has one FFT and one inverse FFT."""

    name = "oneof"

    def __init__(self, filters: Sequence[Filter], weights: Sequence[float] | None = None) -> None:
        """Checks the settings.

        Args:
            filters: at least one.
            weights: chances of being drawn, in any unit, at least 0; ``None``: equal.

        Raises:
            UserError: for a list of another length or weights that cannot be chances.
        """
        super().__init__()
        weights = tuple(float(weight) for weight in (weights or [1.0] * len(filters)))
        if not len(filters) or len(weights) != len(filters):
            raise UserError(
                f"filters ({len(filters)}) and weights ({len(weights)}) must be equally many, at least one"
            )
        if min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise UserError(f"weights ({list(weights)}) must be at least 0 and not all 0; try equal ones")
        self.filters = nn.ModuleList(filters)
        self.weights = weights
        self._filters = tuple(filters)  # the same, typed
        self._selections, self._plan = _shared_selections(filters)
        names = [getattr(filter, "name", "") or type(filter).__name__.lower() for filter in filters]
        # for logs, numbered where two are alike
        self.names = [f"{name}{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]

    def draw(self, keys: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """Which filter each image gets.

        Args:
            keys: one an image.

        Returns:
            Indices into ``filters``; the very draw that ``keep`` makes.
        """
        numbers = uniform(keys, "oneof")
        return (numbers[:, None] >= _thresholds(self.weights, keys.device)).sum(-1)

    def keep(self, spectrum: Tensor, size: tuple[int, int], keys: Tensor) -> Tensor:
        """Each image's map from its own filter, see ``Filter.keep``."""
        maps = [selection.keep(spectrum, size, keys) for selection in self._selections]
        keeps = [1.0 - maps[number] if reverse else maps[number] for number, reverse in self._plan]
        return mix(self.draw(keys), keeps)

    def check(self, image_size: tuple[int, int]) -> None:
        """Every filter's own check."""
        for filter in self._filters:
            filter.check(image_size)

    def settings(self) -> dict[str, Any]:
        """The filters' descriptions and the weights."""
        return {"filters": [filter.describe() for filter in self._filters], "weights": list(self.weights)}


def _shared_selections(filters: Sequence[Filter]) -> tuple[tuple[Filter, ...], tuple[tuple[int, bool], ...]]:
    """What must be computed: Com and RCom, low-pass and high-pass of one radius share one selection.

    Returns:
        The distinct filters and, for every given one, (which of these, whether it is the complement).
    """
    selections: dict[str, Filter] = {}
    plan: list[tuple[str, bool]] = []
    for filter in filters:
        opposite = getattr(filter, "opposite", None)
        selection = filter if opposite is None else opposite
        try:
            name = selection.describe()
        except UserError:  # a filter that does not tell its settings equals none but itself
            name = str(id(selection))
        selections.setdefault(name, selection)
        plan.append((name, opposite is not None))
    places = {name: number for number, name in enumerate(selections)}
    return tuple(selections.values()), tuple((places[name], reverse) for name, reverse in plan)
