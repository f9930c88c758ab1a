"""Scores against scikit-learn, and an interval that grows when images come in groups."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import scipy.stats
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from freqmask.evaluation.labelled import LabelledData
from freqmask.evaluation.results import (
    ClassificationResult,
    ResultTable,
    SegmentationResult,
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
    low, high = bootstrap_interval(accuracy_units(correct), ClassificationResult.statistic)
    error = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert np.allclose([low, high], [0.8 - error, 0.8 + error], atol=0.006)
    groups = [str(number // 10) for number in range(1000)]
    wide_low, wide_high = bootstrap_interval(accuracy_units(correct, groups), ClassificationResult.statistic)
    assert wide_high - wide_low > 2.5 * (high - low)


def test_images_of_no_group_stand_alone_beside_groups() -> None:
    truth, predicted = np.zeros(6, int), np.array([0, 0, 1, 1, 0, 1])
    groups = ["p", "p", "q", "q", None, None]
    data: Any = LabelledData(None, truth, groups, ["a", "b"], [], "d", "s")  # type: ignore[arg-type]
    found = ClassificationResult(Mock(), data, "v", 0, np.arange(6), predicted).own_interval
    units = np.array([[2, 2], [0, 2], [1, 1], [0, 1]])  # right predictions and images of each
    assert found == bootstrap_interval(units, ClassificationResult.statistic)


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


def predictions(right: np.ndarray, name: str, images: np.ndarray | None = None) -> ClassificationResult:
    """Of two classes, all of the first; right where `right` is."""
    numbers = np.arange(len(right)) if images is None else images
    truth = np.zeros(numbers.max() + 1, int)
    data: Any = LabelledData(None, truth, None, ["a", "b"], [], "d", "s")  # type: ignore[arg-type]
    model: Any = SimpleNamespace(name=name, text=name)
    return ClassificationResult(model, data, "plain", 0, numbers, (~right).astype(int))


def test_a_lead_is_that_of_scipys_paired_bootstrap_and_narrower_than_two_intervals() -> None:
    draw = np.random.default_rng(3)
    hard = draw.random(600) < 0.4  # for both models
    first, second = ~hard | (draw.random(600) < 0.1), ~hard & (draw.random(600) < 0.95)
    one, other = predictions(first, "one"), predictions(second, "other")
    found = ClassificationResult.lead([one], [other])
    assert found is not None
    expected = scipy.stats.bootstrap(
        (first.astype(float), second.astype(float)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        method="percentile",
    ).confidence_interval
    np.testing.assert_allclose(found, expected, atol=0.004)
    low, high = one.own_interval
    assert found[1] - found[0] < 0.6 * (high - low)


def test_a_lead_in_mean_iou_draws_the_same_pictures_for_both() -> None:
    draw = np.random.default_rng(0)
    counts = draw.integers(50, 100, (40, 3, 2)) + np.array([0, 100, 100])[None, :, None]
    better = counts + np.array([5, 0, 0])[None, :, None]
    data, model = Mock(), Mock()
    results = [SegmentationResult(model, data, "v", 0, np.arange(40), each) for each in (better, counts)]
    low, high = SegmentationResult.lead(results[:1], results[1:]) or (0.0, 0.0)
    assert SegmentationResult.lead([results[0]] * 3, results[1:]) == (
        low,
        high,
    )  # of other numbers of seeds, too
    assert 0 < low < high < 0.1  # of every picture five pixels more are right
    assert results[0].own_interval[0] < results[1].own_interval[1]  # which two intervals do not tell


def test_the_table_tells_how_far_each_model_is_behind_the_best() -> None:
    right = np.arange(100) < 80
    results = [predictions(right & (np.arange(100) % 4 > 0), "worse"), predictions(right, "best")]
    results.append(predictions(right[:50], "few"))
    lines = ResultTable("title", "plain", results[:2]).lines()
    low, high = (100 * end for end in ClassificationResult.lead([results[1]], [results[0]]) or ())
    assert "  behind the best  " in lines[1]
    assert f"20.0 ({low:.1f} to {high:.1f})" in lines[2] and 0 < low < 20 < high
    assert "behind the best" in lines[-1]
    assert "behind" not in "".join(ResultTable("title", "plain", results[1:2]).lines())
    mixed = ResultTable("title", "plain", [results[0], results[2]]).lines()
    assert " 40.0  " in mixed[2] and "(" not in mixed[2]  # other images: no interval of the difference


def test_of_a_model_that_failed_under_one_seed_nothing_is_behind() -> None:
    right = np.arange(100) < 80
    failed = predictions(right, "failed")
    results = [failed, replace(failed, seed=1, error="its loss is not finite"), predictions(right, "best")]
    worse = predictions(right & (np.arange(100) % 4 > 0), "worse")
    lines = ResultTable("title", "plain", [*results, worse]).lines()
    assert lines[2].endswith("its loss is not finite")
    assert "nan" not in "".join(lines) and "  20.0 (" in lines[4]
    assert "behind" not in "".join(ResultTable("title", "plain", results).lines())
