"""What the report says of a run at a glance."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from freqmask.reporting.health import remarks
from freqmask.reporting.reading import Curve, Run


def curve(*values: float) -> Curve:
    return Curve(np.arange(1.0, len(values) + 1) * 1000, np.array(values))


def said(**curves: Curve) -> str:
    run = Run(Path("a"), "a", "finished", config={"steps": 9000}, curves=curves)
    return " ".join(f"{remark.kind}: {remark.text}" for remark in remarks(run))


def test_learning_and_not_learning_are_told_apart() -> None:
    assert "good: It learns" in said(loss_over_zero=curve(1.0, 0.7, 0.6, 0.6))
    assert "warning: Nothing learnt yet" in said(loss_over_zero=curve(1.2, 1.0, 1.0, 1.0))


def test_a_short_run_is_judged_by_its_end() -> None:
    assert "the loss is 0.900 of" in said(loss_over_zero=curve(2.0, 1.7, 1.5, 1.3, 1.2, 1.1, 1.0, 0.9, 0.9))


def test_a_collapsed_teacher_is_a_warning() -> None:
    assert "warning: The teacher has collapsed: 0.010 nats" in said(collapse=curve(0.5, 0.01, 0.01, 0.01))
    assert "good: No collapse" in said(collapse=curve(0.5, 2.0, 2.0))


def test_a_rising_held_out_loss_is_a_warning_that_names_the_step() -> None:
    text = said(held_out_loss_over_zero=curve(1.0, 0.8, 0.9, 1.0))
    assert "lowest at step 2,000 and has risen since by 25%" in text
    assert "held-out" not in said(held_out_loss_over_zero=curve(1.0, 0.8, 0.79, 0.8))


def test_bands_not_learnt_and_a_slow_loader_are_noted() -> None:
    text = said(
        **{"loss_over_zero/band_0_4": curve(0.5), "loss_over_zero/band_4_9": curve(1.0)},
        data_wait_share=curve(0.6),
    )
    assert "frequencies of 4 to 9 cycles" in text
    assert "waits for images 60% of its time" in text
