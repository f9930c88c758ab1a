"""Clouds by midpoint displacement: the density of fog."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def plasma(side: int, decay: float, random: np.random.Generator) -> Float[np.ndarray, "side side"]:
    """A random surface in [0, 1], by the diamond-square algorithm on a torus.

    A grid is halved until its step is one pixel. Every new point is the mean of its four neighbours plus a
    uniform displacement, which begins at 1 and is divided by decay^2 at every halving.

    Args:
        side: of the surface in pixels; the algorithm works on the next power of two, of which this is a part.
        decay: the larger, the smoother.
        random: where the displacements come from.
    """
    whole = 1 << max(1, (side - 1).bit_length())
    surface = np.zeros((whole, whole))
    step, size = whole, 1.0
    while step >= 2:
        _halve(surface, step, size, random)
        step, size = step // 2, size / decay**2
    surface -= surface.min()
    return (surface / surface.max())[:side, :side]


def _halve(surface: np.ndarray, step: int, size: float, random: np.random.Generator) -> None:
    """Fill in the points between those of a grid, in place: middles of squares, then middles of sides."""
    half, count = step // 2, len(surface) // step
    moved = size * random.uniform(-1, 1, (3, count, count))
    corners = surface[::step, ::step]
    pairs = corners + np.roll(corners, -1, axis=0)
    middles = (pairs + np.roll(pairs, -1, axis=1)) / 4 + moved[0]
    surface[half::step, half::step] = middles
    across = corners + np.roll(corners, -1, axis=1) + middles + np.roll(middles, 1, axis=0)
    surface[::step, half::step] = across / 4 + moved[1]
    along = corners + np.roll(corners, -1, axis=0) + middles + np.roll(middles, 1, axis=1)
    surface[half::step, ::step] = along / 4 + moved[2]
