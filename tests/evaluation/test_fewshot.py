"""Draws of few labels: the same for every model, so many of each class."""

from pathlib import Path

import numpy as np
import pytest

import freqmask
from freqmask.errors import UserError
from freqmask.evaluation import fewshot
from freqmask.evaluation.labelled import draw_shots, parse_shots


def test_draws_hold_the_number_of_each_class() -> None:
    labels = np.array([0] * 50 + [1] * 30 + [2] * 3)
    drawn = draw_shots(labels, "5", seed=0)
    assert np.bincount(labels[drawn]).tolist() == [5, 5, 3]
    assert np.bincount(labels[draw_shots(labels, "10%", 0)]).tolist() == [5, 3, 1]


def test_draws_depend_on_the_seed_alone() -> None:
    labels = np.arange(100) % 2
    assert np.array_equal(draw_shots(labels, "5", 1), draw_shots(labels, "5", 1))
    assert not np.array_equal(draw_shots(labels, "5", 1), draw_shots(labels, "5", 2))


@pytest.mark.parametrize("shot", ["0", "x", "1.5", "200%", "-3"])
def test_impossible_shots_are_refused(shot: str) -> None:
    with pytest.raises(UserError, match="shots"):
        parse_shots([shot])


def test_logistic_regression_separates_what_can_be_separated() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = generator.standard_normal((60, 8)) + 6 * np.eye(8)[labels]
    predicted = fewshot.logistic_regression(features[:15], labels[:15], features[15:], features)
    assert (predicted == labels[15:]).mean() > 0.9


def test_a_shot_that_no_class_has_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    labels = np.array([0] * 4 + [1] * 2)
    arrays = {
        "train_images": images[:6],
        "train_labels": labels,
        "test_images": images[6:],
        "test_labels": labels,
    }
    np.savez(tmp_path / "few.npz", **arrays)
    freqmask.evaluate.fewshot(
        "pixels", data=str(tmp_path / "few.npz"), shots=["4", "5", "100%"], workers=0, out=str(tmp_path)
    )
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: No class")]
    assert notes == ["note: No class has 5 training images: 5 a class is all 6 training images."]
