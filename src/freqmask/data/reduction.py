"""What reducing images once does to the spectra that a training sees later, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

VIEW, SCALE = 224, (0.2, 1.0)  # MFM's usual view: its side in pixels, its share of the image's area
RIVAL = 256  # the side that images are often reduced to


def empty_octave_share(side: int, view: int = VIEW, scale: tuple[float, float] = SCALE) -> float:
    """How much of a crop's uppermost octave is empty, on average, because the crop had to be enlarged.

    A window of the share s of a square image of ``side`` pixels is enlarged by z = view / (side sqrt(s)) where
    that is above 1. Its frequencies then end at 0.5 / z cycles a pixel instead of 0.5, which takes
    2 (1 - 1 / z) of the octave from 0.25 to 0.5. The share s is uniform in ``scale``.

    Args:
        side: shorter side of the stored images in pixels.
        view: side of the crop in pixels.
        scale: smallest and largest share of the area.

    >>> round(empty_octave_share(448), 2), round(empty_octave_share(256), 2)
    (0.01, 0.31)
    """
    shares = np.linspace(*scale, 10_001)
    enlargement = np.maximum(view / (side * np.sqrt(shares)), 1)
    return float(np.minimum(2 * (1 - 1 / enlargement), 1).mean())


def spectrum_words(reductions: Sequence[float], images: int, side: int | None) -> list[str]:
    """Sentences on what became of the images' frequencies.

    Args:
        reductions: sides over those of the original, of the images that were reduced.
        images: all of them.
        side: what the shorter side was brought down to; None where nothing was.
    """
    if not len(reductions) or side is None:
        return ["untouched: no image was reduced, and every one keeps all its bits"]
    median = float(np.median(reductions))
    kept, rival = 1 - empty_octave_share(side), 1 - empty_octave_share(RIVAL)
    others = "" if len(reductions) == images else "; the others keep every bit"
    words = [
        f"{len(reductions):,} of {images:,} images ({len(reductions) / images:.0%}) were reduced, the median one to "
        f"{median:.2f} of its sides:",
        f"what lay above {0.5 * median:.2g} cycles a pixel of the original is gone from it{others}",
        f"a {VIEW}-pixel crop of {SCALE[0]:.0%} to {SCALE[1]:.0%} of such an image has {kept:.0%} of its upper octave",
    ]
    if side > RIVAL:
        words[-1] += f" (from {RIVAL} pixels: {rival:.0%})"
    return [*words, "--crop native sees the reduced pixels: for signals in single pixels take --resize none"]
