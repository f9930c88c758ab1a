"""Thinning for the eye."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from freqmask.reporting.page import spread_out
from freqmask.reporting.reading import Curve


@given(st.integers(1, 400), st.integers(4, 60), st.integers(0, 1000))
def test_a_thinned_curve_keeps_its_ends_and_its_extremes(count: int, most: int, seed: int) -> None:
    steps = np.arange(count) * 10.0
    values = np.random.default_rng(seed).normal(size=count)
    thin = Curve(steps, values).thinned(most)
    thin_steps, thin_values = thin.steps, thin.values
    assert len(thin_steps) <= max(most, 4)
    assert (np.diff(thin_steps) > 0).all()
    assert (thin_steps[0], thin_steps[-1]) == (steps[0], steps[-1])
    assert (thin_values.min(), thin_values.max()) == (values.min(), values.max())
    assert all(values[int(step / 10)] == value for step, value in zip(thin_steps, thin_values, strict=True))


def test_a_trend_goes_through_the_means() -> None:
    trend = Curve(np.arange(6.0), np.array([0.0, 2, 4, 6, 8, 10])).trend(3)
    np.testing.assert_allclose(trend.steps, [0.5, 2.5, 4.5])
    np.testing.assert_allclose(trend.values, [1, 5, 9])


@pytest.mark.parametrize(("count", "most"), [(1, 5), (5, 5), (200, 24), (3, 2), (9, 1)])
def test_spread_out_items_hold_the_last_one(count: int, most: int) -> None:
    chosen = spread_out(range(count), most)
    assert len(chosen) == min(count, most)
    assert chosen[-1] == count - 1
    assert most == 1 or chosen[0] == 0
    assert len(set(chosen)) == len(chosen)
