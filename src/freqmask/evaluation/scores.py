"""Numbers on predicted classes: accuracy, balanced accuracy, F1, and how sure of them one may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

RESAMPLES = 2000
EVERYTHING = 0.999  # share of the answers from which they count as one class


@dataclass(frozen=True)
class Scores:
    """In [0, 1], over the images of one prediction.

    Attributes:
        accuracy: share of right answers.
        balanced_accuracy: mean recall of the classes that are there.
        macro_f1: mean F1 of the classes that are there or were predicted.
    """

    accuracy: float
    balanced_accuracy: float
    macro_f1: float


@dataclass(frozen=True)
class ClassScores:
    """Of one class, in [0, 1]; nan where there is nothing to divide by."""

    name: str
    images: int
    precision: float
    recall: float
    f1: float


def margins(
    truth: Int64[np.ndarray, " image"], predicted: Int64[np.ndarray, " image"], classes: int
) -> Int64[np.ndarray, "3 classes"]:
    """Of each class how many are named right, how many there are, and how many are said to be.

    The diagonal and the sums of the confusion matrix, without the matrix: of 5,000 classes it would be 200 MB.
    """
    parts = (truth[truth == predicted], truth, predicted)
    return np.stack([np.bincount(part, minlength=classes) for part in parts])


def score(truth: Int64[np.ndarray, " image"], predicted: Int64[np.ndarray, " image"], classes: int) -> Scores:
    """The scores of a prediction.

    Args:
        truth: the class of each image.
        predicted: the class that each was taken for.
        classes: how many there are.
    """
    right, there, said = margins(truth, predicted, classes)
    recall = right[there > 0] / there[there > 0]
    counted = (there + said) > 0
    f1 = 2 * right[counted] / (there + said)[counted]
    return Scores(float(right.sum() / len(truth)), float(recall.mean()), float(f1.mean()))


def per_class(
    truth: Int64[np.ndarray, " image"], predicted: Int64[np.ndarray, " image"], names: Sequence[str]
) -> list[ClassScores]:
    """Precision, recall and F1 of every class."""
    right, there, said = margins(truth, predicted, len(names))
    with np.errstate(invalid="ignore"):
        precision, recall, f1 = right / said, right / there, 2 * right / (there + said)
    return [
        ClassScores(name, int(there[k]), float(precision[k]), float(recall[k]), float(f1[k]))
        for k, name in enumerate(names)
    ]


def one_class(said: Int64[np.ndarray, " class"], there: Int64[np.ndarray, " class"]) -> int | None:
    """The class that everything is taken for though there are others; None where answers differ.

    Args:
        said: how often each class is answered.
        there: how often each class is right.
    """
    most = int(said.argmax())
    alone = said[most] >= EVERYTHING * said.sum() and there[most] < EVERYTHING * there.sum()
    return most if said.sum() and alone else None


def bootstrap_interval(
    correct: Float[np.ndarray, " image"], groups: Sequence[str | None] | None = None, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the accuracy over test images, drawn again with replacement.

    Args:
        correct: share of right answers on each image (over seeds), in [0, 1].
        groups: where images belong together (patients, scenes), whole groups are drawn, since images of one
            group tell less than as many of several; None, or None for an image, where they do not.
        seed: of the draw.

    Returns:
        The 2.5 and 97.5 percentiles of the resampled accuracies.
    """
    sums, counts = np.asarray(correct, float), np.ones(len(correct))
    if groups is not None:
        keys = [object() if group is None else group for group in groups]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        members = np.array([numbers[key] for key in keys])
        sums, counts = np.bincount(members, sums), np.bincount(members).astype(float)
    generator = np.random.default_rng(seed)
    units, accuracies = len(sums), np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = generator.integers(0, units, units)
        accuracies[number] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.percentile(accuracies, [2.5, 97.5])
    return float(low), float(high)
