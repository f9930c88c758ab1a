"""What the report says of a run at a glance."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from freqmask.options import options_of
from freqmask.options.of_methods import METHOD_OPTIONS
from freqmask.options.of_training import GROUPS
from freqmask.reporting.reading import Curve, Run
from freqmask.reporting.summary import remarks

PRETRAIN = {"method", *(name for group in GROUPS for name in options_of(group))}
ONE = np.ones(1)


def curve(*values: float) -> Curve:
    return Curve(np.arange(1.0, len(values) + 1) * 1000, np.array(values))


def said(**curves: Curve) -> str:
    run = Run(Path("a"), "a", "finished", config={"steps": 9000}, curves=curves)
    return " ".join(f"{remark.kind}: {remark.text}" for remark in remarks(run))


def test_learning_and_not_learning_are_told_apart() -> None:
    assert "note: It learns its task" in said(relative_loss=curve(1.0, 0.7, 0.6, 0.6))
    assert "warning: Nothing learned yet" in said(relative_loss=curve(1.2, 1.0, 1.0, 1.0))


def test_advice_names_only_options_that_the_method_has() -> None:
    flat = {"relative_loss": curve(1.2, 1.0, 1.0), "collapse": curve(0.5, 0.01, 0.01)}
    for name, method in METHOD_OPTIONS.items():
        run = Run(Path("a"), "a", "finished", config={"steps": 9000, "method": name}, curves=flat)
        text = " ".join(remark.text for remark in remarks(run))
        assert "Try ," not in text
        named = set(re.findall(r"--(\w+)", text))
        assert {"steps", "lr", "overfit"} <= named <= {*options_of(method), *PRETRAIN}, (name, text)
        assert ("--gamma" in text) == ("gamma" in options_of(method))


@pytest.mark.parametrize(("method", "early"), [("mfm", "5,000"), ("folk", "5,000"), ("words", "500")])
def test_how_early_is_too_early_depends_on_the_method(method: str, early: str) -> None:
    run = Run(Path("a"), "a", "stopped", config={"method": method}, curves={"loss": Curve(ONE, ONE)})
    assert f"Little can be judged before about {early} steps." in [remark.text for remark in remarks(run)]


def test_a_short_run_is_judged_by_its_end() -> None:
    assert "relative loss 0.900" in said(relative_loss=curve(2.0, 1.7, 1.5, 1.3, 1.2, 1.1, 1.0, 0.9, 0.9))


def test_a_collapsed_teacher_is_a_warning() -> None:
    assert "warning: The teacher has collapsed: 0.010 nats" in said(collapse=curve(0.5, 0.01, 0.01, 0.01))
    assert "good: No collapse" in said(collapse=curve(0.5, 2.0, 2.0))


def test_a_rising_held_out_loss_is_a_warning_that_names_the_step() -> None:
    text = said(held_out_relative_loss=curve(1.0, 0.8, 0.9, 1.0))
    assert "lowest at step 2,000 and has risen since by 25%" in text
    assert "held-out" not in said(held_out_relative_loss=curve(1.0, 0.8, 0.79, 0.8))


def test_bands_not_learnt_and_a_slow_loader_are_noted() -> None:
    text = said(
        **{"relative_loss/band_0_4": curve(0.5), "relative_loss/band_4_9": curve(1.0)},
        data_wait_share=curve(0.6),
    )
    assert "frequencies of 4 to 9 cycles" in text
    assert "waits for images 60% of its time" in text


def probes(images: int, pixels: float, *accuracies: float) -> str:
    measured = Curve(np.arange(float(len(accuracies))), np.array(accuracies))
    curves = {
        "probe_knn": measured,
        "probe_linear": measured,
        **{name: Curve(np.zeros(1), np.array([pixels])) for name in ("pixels_knn", "pixels_linear")},
    }
    run = Run(Path("a"), "a", "finished", state={"probe_images": images}, curves=curves)
    return " ".join(f"{remark.kind}: {remark.text}" for remark in remarks(run))


def test_features_are_judged_beside_those_of_the_beginning_and_raw_pixels() -> None:
    assert "warning: Its features are worse" in probes(2000, 0.95, 0.93, 0.9, 0.89)
    assert "warning: Its features are no better" in probes(2000, 0.5, 0.93, 0.9, 0.931)
    assert "good: Its features are better" in probes(2000, 0.40, 0.39, 0.46)
    assert "not yet better than raw pixels" in probes(2000, 0.60, 0.39, 0.46)
    few = probes(40, 0.3, 0.3, 0.9)
    assert "too few images" in few and "good" not in few.replace("good: Finished", "")


def own(before: float, after: float, pixels: float = 0.3, images: int = 1000) -> str:
    measured = {
        "probe_knn": Curve(np.array([0.0, 9.0]), np.array([before, after])),
        "pixels_knn": Curve(np.zeros(1), np.array([pixels])),
        "rankme": Curve(np.array([0.0, 9.0]), np.array([9.0, 9.0])),
    }
    run = Run(Path("a"), "a", "finished", state={"probe_images": images}, curves=measured)
    return " ".join(f"{remark.kind}: {remark.text}" for remark in remarks(run))


def test_labels_of_the_images_themselves_warn_of_a_loss_alone() -> None:
    """They may be names of folders that say nothing, such as years."""
    assert "warning: Its features are worse" in own(0.62, 0.50)
    same = own(0.50, 0.50)
    assert "warning" not in same and "as good as at the beginning: k-NN 50.0%, before 50.0%" in same
    assert "good: Its features are better" in own(0.5, 0.62)
    assert "(by the images' own labels, 1,000 images)" in own(0.5, 0.62)


def test_without_labels_a_fallen_rank_is_a_warning() -> None:
    assert "warning: Effective rank" in said(rankme=Curve(np.array([0.0, 9.0]), np.array([9.0, 4.0])))
    assert "note: Effective rank" in said(rankme=Curve(np.array([0.0, 9.0]), np.array([4.0, 9.0])))
    assert "Effective rank" not in said(rankme=Curve(np.array([5.0, 9.0]), np.array([4.0, 9.0])))


def test_a_held_out_loss_of_few_images_says_nothing() -> None:
    run = Run(
        Path("a"),
        "a",
        "finished",
        state={"held_out_images": 4},
        curves={"held_out_loss": curve(1.0, 0.8, 0.9, 1.0)},
    )
    text = " ".join(f"{remark.kind}: {remark.text}" for remark in remarks(run))
    assert "of 4 images, too few" in text and "risen" not in text
