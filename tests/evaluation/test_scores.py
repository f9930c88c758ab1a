"""Scores against scikit-learn, and an interval that grows when images come in groups."""

from typing import Any
from unittest.mock import Mock

import numpy as np
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from freqmask.evaluation.labelled import LabelledData
from freqmask.evaluation.results import (
    ClassificationResult,
    accuracy_of,
    accuracy_units,
    bootstrap_interval,
    class_scores,
    margins,
    one_class,
    score,
)


def test_scores_are_scikit_learn_s() -> None:
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(0, 4, 200), generator.integers(0, 4, 200)
    scores = score(margins(truth, predicted, 6))  # two classes are neither there nor said
    assert np.isclose(scores.accuracy, accuracy_score(truth, predicted))
    assert np.isclose(scores.balanced_accuracy, balanced_accuracy_score(truth, predicted))
    assert np.isclose(scores.macro_f1, f1_score(truth, predicted, average="macro"))


def test_a_class_that_was_never_there_has_no_recall() -> None:
    found = class_scores(margins(np.array([0, 0, 1]), np.array([0, 1, 1]), 3))
    assert (found["recall"][0], *found["precision"][:2]) == (0.5, 1.0, 0.5)
    assert np.isnan(found["recall"][2])


def test_the_interval_is_the_binomial_one_and_wider_for_groups() -> None:
    correct = np.repeat(np.arange(100) % 10 < 8, 10).astype(float)  # 100 groups of 10 that agree
    low, high = bootstrap_interval(accuracy_units(correct), accuracy_of)
    error = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert np.allclose([low, high], [0.8 - error, 0.8 + error], atol=0.006)
    groups = [str(number // 10) for number in range(1000)]
    wide_low, wide_high = bootstrap_interval(accuracy_units(correct, groups), accuracy_of)
    assert wide_high - wide_low > 2.5 * (high - low)


def test_images_of_no_group_stand_alone_beside_groups() -> None:
    truth, predicted = np.zeros(6, int), np.array([0, 0, 1, 1, 0, 1])
    groups = ["p", "p", "q", "q", None, None]
    data: Any = LabelledData(None, truth, groups, ["a", "b"], [], "d", "s")  # type: ignore[arg-type]
    found = ClassificationResult(Mock(), data, "v", 0, np.arange(6), predicted).own_interval
    units = np.array([[2, 2], [0, 2], [1, 1], [0, 1]])  # right predictions and images of each
    assert found == bootstrap_interval(units, accuracy_of)


def test_five_thousand_classes_take_no_table_of_25_million() -> None:
    import tracemalloc

    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(0, 5000, 20_000), generator.integers(0, 5000, 20_000)
    tracemalloc.start()
    scores = score(margins(truth, predicted, 5000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000  # the table would be 200 MB
    assert np.isclose(scores.macro_f1, f1_score(truth, predicted, average="macro"))


def test_a_prediction_of_one_class_is_noticed_where_there_are_others() -> None:
    truth = np.arange(90) % 3
    for predicted, expected in ((np.full(90, 1), 1), (truth, None), (np.where(truth == 2, 2, 1), None)):
        assert one_class(margins(truth, predicted, 3)) == expected
    assert one_class(np.array([[9, 0]] * 3)) is None  # all of them are of that class
