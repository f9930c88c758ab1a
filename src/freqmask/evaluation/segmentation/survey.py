"""What all masks hold, looked at before any training: a wrong label must not end it after hours."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from freqmask.console import say
from freqmask.data.cache import cache_file, read_arrays, write_arrays
from freqmask.errors import BadImage, UserError
from freqmask.evaluation.segmentation.labels import UNKNOWN, Labels
from freqmask.evaluation.segmentation.masks import read_mask
from freqmask.evaluation.segmentation.pairs import PairSource

_LAYOUT = 1  # raised when the cached arrays would mean something else


@dataclass
class MaskSurvey:
    """What the masks of a source hold.

    Attributes:
        source: images and masks.
        pixels: (entry, 3) of image number, label, and how many pixels of the mask have it.
        unreadable: number of an image that cannot be opened -> reason.
    """

    source: PairSource
    pixels: Int64[np.ndarray, "entry 3"]
    unreadable: dict[int, str]

    def labels(self) -> Int64[np.ndarray, " label"]:
        """Labels that some mask holds, sorted."""
        return np.unique(self.pixels[:, 1])

    def share(self, label: int) -> float:
        """Of all pixels."""
        return float(self.pixels[self.pixels[:, 1] == label, 2].sum() / max(self.pixels[:, 2].sum(), 1))

    def usable(self) -> Int64[np.ndarray, " image"]:
        """Numbers of the images that can be opened."""
        return np.array([n for n in range(len(self.source)) if n not in self.unreadable], np.int64)


def survey_masks(source: PairSource) -> MaskSurvey:
    """Read every mask and the header of every image, once; kept in the cache.

    Raises:
        UserError: a mask is broken, or has another size than its image.
    """
    file = cache_file("masks", _LAYOUT, source.fingerprint(), len(source), str(source.part.masks.absolute()))
    cached = read_arrays(file)
    if cached is not None:
        about, arrays = cached
        return MaskSurvey(source, np.array(arrays["pixels"]), {int(n): r for n, r in about["unreadable"]})
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders let go of the interpreter's lock
        looks = list(pool.map(lambda index: _look(source, index), range(len(source))))
    unreadable = {number: look for number, look in enumerate(looks) if isinstance(look, str)}
    found = [
        np.column_stack([np.full(len(look), number), look])
        for number, look in enumerate(looks)
        if not isinstance(look, str)
    ]
    if not found:
        number, reason = next(iter(unreadable.items()))
        raise UserError(f"none of the {len(source)} images can be opened; {source.name(number)}: {reason}")
    pixels = np.concatenate(found).astype(np.int64)
    write_arrays(file, {"unreadable": list(unreadable.items())}, {"pixels": pixels})
    return MaskSurvey(source, pixels, unreadable)


def _look(source: PairSource, index: int) -> np.ndarray | str:
    """(label, 2) of labels and pixels of one mask, or why its image cannot be opened."""
    try:
        size = source.images.open(index).size
    except BadImage as error:
        return error.reason
    path = source.mask_path(index)
    try:
        mask = read_mask(path)
    except BadImage as error:
        raise UserError(
            f"mask ({path}): {error.reason}; save one class number a pixel, such as an 8-bit PNG"
        ) from error
    if mask.shape != size:
        raise UserError(
            f"mask ({path}) is {mask.shape[1]}x{mask.shape[0]} pixels and its image {size[1]}x{size[0]}; both must "
            "have the same size"
        )
    counts = np.bincount(mask.ravel())
    there = np.flatnonzero(counts)
    return np.column_stack([there, counts[there]])


def check_labels(survey: MaskSurvey, labels: Labels) -> None:
    """Raises a UserError where a mask holds a label that is neither a class nor ignored; says what is left out."""
    table = labels.lookup()
    unknown = survey.pixels[table[survey.pixels[:, 1]] == UNKNOWN]
    if len(unknown):
        number, label, pixels = (int(value) for value in unknown[0])
        why = "the classes" if labels.named else "what the training masks hold"
        raise UserError(
            f"mask ({survey.source.mask_path(number)}) holds the label {label} ({pixels:,} pixels), which is not "
            f"among {why} ({labels.values[0]} to {labels.values[-1]}) and not ignored "
            f"({labels.describe_ignored()}); mend it, name the class, or give --ignore_label "
            f"{' '.join(map(str, [*labels.ignored, label]))}"
        )
    for number, reason in survey.unreadable.items():
        say(f"left out    {survey.source.name(number)}: {reason}")
