"""Scores of segmentation, all from one confusion matrix over the data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64, Shaped

from freqmask.evaluation.scores import RESAMPLES, margins


@dataclass(frozen=True)
class SegmentationScores:
    """In [0, 1], over all pixels of all images together.

    Attributes:
        mean_iou: mean over the classes of intersection over union.
        pixel_accuracy: share of pixels named right.
        mean_accuracy: mean over the classes of the share of their pixels named right.
    """

    mean_iou: float
    pixel_accuracy: float
    mean_accuracy: float


@dataclass(frozen=True)
class SegmentedClass:
    """Of one class, in [0, 1]; nan where there is nothing to divide by."""

    name: str
    pixels: int
    iou: float
    accuracy: float
    precision: float


def image_margins(
    truth: Shaped[np.ndarray, "height width"], predicted: Shaped[np.ndarray, "height width"], classes: int
) -> Int64[np.ndarray, "3 classes"]:
    """Pixels of each class named right, there, and said; pixels whose truth is negative do not count."""
    counted = truth >= 0
    return margins(truth[counted].astype(np.int64), predicted[counted].astype(np.int64), classes)


def score(counts: Int64[np.ndarray, "3 classes"]) -> SegmentationScores:
    """The scores of the confusion matrix of a data set.

    A class that is neither there nor predicted anywhere is left out of the means, as mmsegmentation does.

    Args:
        counts: the margins of the matrix.
    """
    right, there, said = counts
    return SegmentationScores(
        float(_mean_iou(right, there, said)),
        float(right.sum() / there.sum()) if there.any() else float("nan"),
        float((right[there > 0] / there[there > 0]).mean()) if there.any() else float("nan"),
    )


def _mean_iou(right: np.ndarray, there: np.ndarray, said: np.ndarray) -> np.ndarray:
    """Mean over the last axis of right / (there + said - right), empty classes left out."""
    union = there + said - right
    with np.errstate(invalid="ignore", divide="ignore"):
        ious = np.where(union > 0, right / union, 0.0)
        return np.asarray(ious.sum(-1) / (union > 0).sum(-1))


def per_class(counts: Int64[np.ndarray, "3 classes"], names: Sequence[str]) -> list[SegmentedClass]:
    """IoU, accuracy (recall) and precision of every class, from the margins of the confusion matrix."""
    right, there, said = counts
    with np.errstate(invalid="ignore", divide="ignore"):
        ious, recalls, precisions = right / (there + said - right), right / there, right / said
    return [
        SegmentedClass(name, int(there[k]), float(ious[k]), float(recalls[k]), float(precisions[k]))
        for k, name in enumerate(names)
    ]


def bootstrap_interval(
    counts: Sequence[Int64[np.ndarray, "image 3 classes"]], seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean IoU over test images, drawn again with replacement.

    Args:
        counts: of each training (seed), the margins of every image, the same images in the same order.
        seed: of the draw.

    Returns:
        The 2.5 and 97.5 percentiles of the mean over trainings of the resampled mean IoU.
    """
    images = len(counts[0])
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), RESAMPLES)
    means = np.mean([_resampled(one, draws) for one in counts], axis=0)
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return float(low), float(high)


def _resampled(
    counts: Int64[np.ndarray, "image 3 classes"], draws: Int64[np.ndarray, "resample image"]
) -> Float[np.ndarray, " resample"]:
    """The mean IoU of every resample: sums over images are matrix products."""
    weights = draws.astype(np.float64)  # exact up to 2^53 pixels, and much faster than integers
    right, there, said = (weights @ counts[:, place] for place in range(3))
    return _mean_iou(right, there, said)
