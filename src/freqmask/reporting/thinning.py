"""Fewer points and pictures for the eye, without cutting anything off."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def thin(steps: np.ndarray, values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The curve with at most ``most`` points: of each stretch its lowest and its highest, and both ends.

    A spike of a single step survives, which a mean or every n-th point would lose.

    Args:
        steps: rising.
        values: as many, finite.
        most: at least 4.
    """
    if len(steps) <= most:
        return steps, values
    bounds = np.linspace(0, len(steps), (most - 2) // 2 + 1).astype(int)
    chosen = {0, len(steps) - 1}
    for start, stop in pairwise(bounds):
        chosen.add(start + int(np.argmin(values[start:stop])))
        chosen.add(start + int(np.argmax(values[start:stop])))
    picked = np.array(sorted(chosen))
    return steps[picked], values[picked]


def trend(steps: np.ndarray, values: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """The curve's mean over each of ``parts`` stretches, at the stretch's mean step."""
    stretches = np.array_split(np.arange(len(steps)), min(parts, len(steps)))
    return (
        np.array([steps[stretch].mean() for stretch in stretches]),
        np.array([values[stretch].mean() for stretch in stretches]),
    )


def spread_out(items: Sequence[Item], most: int) -> list[Item]:
    """At most ``most`` of the items, evenly spaced, the first and the last among them.

    >>> spread_out(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= most:
        return list(items)
    if most <= 1:
        return [items[-1]][:most]
    places = np.linspace(0, len(items) - 1, most).round().astype(int)
    return [items[place] for place in places]
