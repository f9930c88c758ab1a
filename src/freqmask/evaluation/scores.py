"""Numbers on predicted classes: accuracy, F1, mean IoU, and how sure of them one may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64, Shaped

RESAMPLES = 2000
EVERYTHING = 0.999  # share of the predictions from which they count as one class
Margins = Int64[np.ndarray, "3 classes"]  # of each class how many are predicted rightly, exist, are predicted


@dataclass(frozen=True)
class Scores:
    """In [0, 1], over the images of one prediction."""

    accuracy: float  # share of right predictions
    balanced_accuracy: float  # mean recall of the classes that exist
    macro_f1: float  # mean F1 of the classes that exist or were predicted


@dataclass(frozen=True)
class SegmentationScores:
    """In [0, 1], over all pixels of all images together."""

    mean_iou: float  # mean over the classes of intersection over union
    pixel_accuracy: float  # share of pixels named right
    mean_accuracy: float  # mean over the classes of the share of their pixels named right


def margins(
    truth: Int64[np.ndarray, " image"], predicted: Int64[np.ndarray, " image"], classes: int
) -> Margins:
    """Of each class how many are predicted rightly, how many there are, and how many are predicted.

    The diagonal and the sums of the confusion matrix, without the matrix: of 5,000 classes it would be 200 MB.
    """
    parts = (truth[truth == predicted], truth, predicted)
    return np.stack([np.bincount(part, minlength=classes) for part in parts])


def image_margins(
    truth: Shaped[np.ndarray, "height width"], predicted: Shaped[np.ndarray, "height width"], classes: int
) -> Margins:
    """The margins over the pixels of an image; pixels whose truth is negative do not count."""
    counted = truth >= 0
    return margins(truth[counted].astype(np.int64), predicted[counted].astype(np.int64), classes)


def score(counts: Margins) -> Scores:
    """The scores of a prediction from its margins."""
    right, total, predicted = counts
    counted = (total + predicted) > 0
    f1 = 2 * right[counted] / (total + predicted)[counted]
    return Scores(*_accuracies(counts), float(f1.mean()))


def segmentation_score(counts: Margins) -> SegmentationScores:
    """The scores of a data set from the margins over all its pixels.

    A class that neither exists nor is predicted anywhere is left out of the means, as mmsegmentation does.
    """
    return SegmentationScores(float(mean_iou(counts)), *_accuracies(counts))


def _accuracies(counts: Margins) -> tuple[float, float]:
    """The share of right predictions, and the mean recall of the classes that exist."""
    right, total, _ = counts
    if not total.any():
        return float("nan"), float("nan")
    return float(right.sum() / total.sum()), float((right[total > 0] / total[total > 0]).mean())


def mean_iou(counts: Shaped[np.ndarray, "*rest 3 classes"]) -> Float[np.ndarray, "*rest"]:
    """Mean over the classes of right / (existing + predicted - right), empty classes left out."""
    right, total, predicted = np.moveaxis(counts, -2, 0)
    union = total + predicted - right
    with np.errstate(invalid="ignore", divide="ignore"):
        ious = np.where(union > 0, right / union, 0.0)
        return np.asarray(ious.sum(-1) / (union > 0).sum(-1))


def class_scores(counts: Margins) -> dict[str, Shaped[np.ndarray, " classes"]]:
    """Of every class how many there are, and its scores in [0, 1]; nan where there is nothing to divide by."""
    right, total, predicted = counts
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "total": total,
            "precision": right / predicted,
            "recall": right / total,
            "f1": 2 * right / (total + predicted),
            "iou": right / (total + predicted - right),
        }


def one_class(counts: Margins) -> int | None:
    """The class that everything is taken for though others exist; None where predictions differ."""
    _, total, predicted = counts
    most = int(predicted.argmax())
    alone = predicted[most] >= EVERYTHING * predicted.sum() and total[most] < EVERYTHING * total.sum()
    return most if predicted.sum() and alone else None


def accuracy_units(
    correct: Float[np.ndarray, " image"], groups: Sequence[object] | None = None
) -> Float[np.ndarray, "unit 2"]:
    """What the interval of an accuracy draws: right predictions and images of each unit.

    Args:
        correct: share of right predictions on each image (over seeds), in [0, 1].
        groups: where images belong together (patients, scenes), whole groups are drawn, since images of one
            group tell less than as many of several; None, or None for an image, where they do not.
    """
    correct = np.asarray(correct, float)
    if groups is None:
        return np.stack([correct, np.ones(len(correct))], axis=1)
    keys = [object() if group is None else group for group in groups]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    members = np.array([numbers[key] for key in keys])
    return np.stack([np.bincount(members, correct), np.bincount(members).astype(float)], axis=1)


def accuracy_of(sums: Float[np.ndarray, " 2"]) -> float:
    """The accuracy of summed units."""
    return float(sums[0] / sums[1])


def bootstrap_interval(
    units: Shaped[np.ndarray, "unit ..."], statistic: Callable[[np.ndarray], float]
) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of a statistic over test images (or groups), drawn again with replacement.

    Kept beside scipy.stats.bootstrap, which takes 0.36 s for 10,000 images and 0.44 s for mean IoU of 500 (this:
    0.50 and 0.22 s): it draws other numbers, so that results of earlier versions would not repeat.

    Args:
        units: counts of each image or group, which are summed over those drawn.
        statistic: of the sum.
    """
    generator = np.random.default_rng(0)
    flat, count = units.reshape(len(units), -1).astype(np.float64), len(units)  # exact up to 2^53 pixels
    values = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        times = np.bincount(generator.integers(0, count, count), minlength=count)
        values[number] = statistic((times @ flat).reshape(units.shape[1:]))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
