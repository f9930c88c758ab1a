"""Canny's edges, at the very pixels where the drops of the published spatter have them.

scikit-image's finds them too, but half of them a pixel further out, and the shine of a drop is a matter of a
few pixels: drops would shine half as much.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, UInt8
from scipy.ndimage import sobel
from skimage.filters import apply_hysteresis_threshold

_FLAT = math.tan(math.pi / 8)


def find_edges(
    levels: UInt8[np.ndarray, "height width"], low: float, high: float
) -> Bool[np.ndarray, "height width"]:
    """Pixels whose gradient is the largest across the edge and hangs together with one above ``high``.

    Args:
        levels: 8-bit image.
        low: gradient (sum of the magnitudes of both Sobel derivatives) of an edge at least.
        high: that it must reach somewhere.
    """
    down, right = (sobel(levels.astype(np.int32), axis, mode="nearest") for axis in (0, 1))
    size = np.abs(down) + np.abs(right)
    padded = np.pad(size, 1)

    def beside(rows: int, columns: int) -> np.ndarray:
        height, width = size.shape
        return padded[1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    level, upright = np.abs(down) < _FLAT * np.abs(right), np.abs(right) < _FLAT * np.abs(down)
    falling = down * right > 0
    # of two equal neighbours the upper or left one is the edge
    largest = np.select(
        [level, upright, falling],
        [
            (size > beside(0, -1)) & (size >= beside(0, 1)),
            (size > beside(-1, 0)) & (size >= beside(1, 0)),
            (size > beside(-1, -1)) & (size > beside(1, 1)),
        ],
        (size > beside(-1, 1)) & (size > beside(1, -1)),
    )
    return apply_hysteresis_threshold(np.where(largest, size, 0), low, high)
