"""Few labels: a handful a class, or a small share, and logistic regression on frozen features."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from freqmask.errors import UserError
from freqmask.evaluation.labelled import Round
from freqmask.evaluation.protocol import EvalContext, Prediction, Protocol

SHOTS = ("1", "5", "10", "1%", "10%")
INVERSE_STRENGTH = 1.0  # scikit-learn's C, on features of mean squared length 1 x sqrt(number of features)


def parse_shots(shots: Sequence[str]) -> list[str]:
    """``5`` (images a class) or ``10%`` (of the training images), checked.

    Raises:
        UserError: one is neither.
    """
    for shot in shots:
        number = shot.removesuffix("%")
        if not re.fullmatch(r"\d+(\.\d+)?", number) or float(number) <= 0 or (number == shot and "." in shot):
            raise UserError(f"shots ({shot}) must be images a class such as 5, or a share such as 10%")
        if number != shot and float(number) > 100:
            raise UserError(f"shots ({shot}) must be at most 100%")
    return list(dict.fromkeys(shots))


def shot_name(shot: str) -> str:
    """A number of labels as tables say it.

    >>> shot_name("5"), shot_name("10%")
    ('5 a class', '10%')
    """
    return shot if shot.endswith("%") else f"{shot} a class"


def draw(labels: Int64[np.ndarray, " image"], shot: str, seed: int) -> Int64[np.ndarray, " drawn"]:
    """Which images are trained on, sorted: it depends on labels, shot and seed alone, so all models get the same.

    A shot of ``5`` is that many of each class, all where there are fewer; ``10%`` is that share of each class, at
    least one image.
    """
    share, is_share = float(shot.removesuffix("%")), shot.endswith("%")
    generator = np.random.default_rng([seed, int(share * 1000), is_share])
    chosen = []
    for number in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == number))
        wanted = max(1, round(share / 100 * len(members))) if is_share else int(share)
        chosen.append(members[:wanted])
    return np.sort(np.concatenate(chosen))


def logistic_regression(
    train: Float[np.ndarray, "image dim"],
    labels: Int64[np.ndarray, " image"],
    test: Float[np.ndarray, "query dim"],
    unlabelled: Float[np.ndarray, "other dim"],
    strength: float = INVERSE_STRENGTH,
) -> Int64[np.ndarray, " query"]:
    """Classes of test images by L2-regularized multinomial logistic regression on a few training images.

    The mean and spread of ``unlabelled``, the features of all training images, standardize; their labels stay unseen.
    ``strength`` is C, the inverse of the regularization.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, spread = unlabelled.mean(axis=0, dtype=np.float64), unlabelled.std(axis=0, dtype=np.float64)
    scale = np.where(spread > 1e-5 * spread.max(), 1 / np.maximum(spread, 1e-12), 0.0)
    scale = scale / train.shape[1] ** 0.25
    model = LogisticRegression(C=strength, max_iter=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 500 steps are close enough to the end
        model.fit((train - mean) * scale, labels)
    predicted: np.ndarray = model.predict((test - mean) * scale)
    return predicted.astype(np.int64)


@dataclass
class Fewshot(Protocol):
    """Logistic regression on few labels."""

    shots: Sequence[str] = SHOTS  # images a class, or shares in per cent
    feature: str = "mean"  # mean or class_token
    strength: float = INVERSE_STRENGTH  # scikit-learn's C

    title = "few labels, logistic regression on frozen features"

    def __post_init__(self) -> None:
        self.shots = parse_shots(self.shots)
        self.headline = shot_name("10" if "10" in self.shots else self.shots[-1])

    def predict(self, context: EvalContext, one: Round, seed: int) -> dict[str, Prediction]:
        """One prediction a number of labels; the draw is the same for every model."""
        values, labels = context.end(self.feature), context.data.labels
        predictions = {}
        for shot in self.shots:
            drawn = one.train[draw(labels[one.train], shot, seed)]
            predicted = logistic_regression(
                values[drawn], labels[drawn], values[one.test], values[one.train], self.strength
            )
            predictions[shot_name(shot)] = Prediction(predicted, n_train=len(drawn))
        return predictions
