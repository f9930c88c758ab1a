"""EXIF orientation: how the stored pixels are turned and mirrored to be shown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from freqmask.data.pictures import Box


@dataclass(frozen=True)
class Orientation:
    """First transposed, then mirrored in the frame that is shown.

    Attributes:
        transposed: True where rows and columns change places.
        upside_down: True where rows run from below.
        mirrored: True where columns run from the right.
    """

    transposed: bool = False
    upside_down: bool = False
    mirrored: bool = False

    def shown_size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """(height, width) as shown, of (height, width) as stored; the other way round too."""
        return (stored[1], stored[0]) if self.transposed else stored

    def stored_box(self, box: Box, shown_size: tuple[int, int]) -> Box:
        """The box among the stored pixels that is shown as ``box`` in an image of ``shown_size``."""
        top, left, height, width = box
        if self.upside_down:
            top = shown_size[0] - top - height
        if self.mirrored:
            left = shown_size[1] - left - width
        return (left, top, width, height) if self.transposed else (top, left, height, width)

    def show(self, pixels: np.ndarray) -> np.ndarray:
        """Stored pixels (channel, height, width) as they are shown."""
        if self.transposed:
            pixels = pixels.transpose(0, 2, 1)
        if self.upside_down:
            pixels = pixels[:, ::-1]
        if self.mirrored:
            pixels = pixels[:, :, ::-1]
        if not (self.upside_down or self.mirrored):
            return pixels
        # torch refuses negative strides and resamples fastest what lies channels-last
        return np.ascontiguousarray(pixels.transpose(1, 2, 0)).transpose(2, 0, 1)


UPRIGHT = Orientation()
ORIENTATIONS = {
    1: UPRIGHT,
    2: Orientation(mirrored=True),
    3: Orientation(upside_down=True, mirrored=True),
    4: Orientation(upside_down=True),
    5: Orientation(transposed=True),
    6: Orientation(transposed=True, mirrored=True),
    7: Orientation(transposed=True, upside_down=True, mirrored=True),
    8: Orientation(transposed=True, upside_down=True),
}
"""By the number in EXIF tag 274; anything else counts as upright."""
EXIF_TAG = 274


def orientation_of(number: object) -> Orientation:
    """The orientation that an EXIF value names; upright for a missing or invalid one."""
    return ORIENTATIONS.get(number, UPRIGHT) if isinstance(number, int) else UPRIGHT
