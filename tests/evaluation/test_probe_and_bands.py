"""RankMe, the probe of a run, and the bands that test images are reduced to."""

import pytest
import torch

from freqmask.errors import UserError
from freqmask.evaluation.bands_and_attacks import Band, bands_of
from freqmask.pretraining.watch import probe, rankme
from freqmask.spectrum import rfft2


def test_rankme_counts_independent_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    full = torch.linalg.qr(torch.randn(64, 8, generator=generator))[0]
    assert rankme(full) == pytest.approx(8, rel=1e-3)
    assert rankme(full[:, :1].expand(-1, 8)) == pytest.approx(1, rel=1e-2)
    assert rankme(torch.full((3, 2), float("nan"))) != rankme(full)


def test_a_probe_of_separable_features_is_right() -> None:
    labels = torch.arange(80) % 4
    features = torch.eye(4)[labels] + 0.01 * torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    values = probe(features[:60], labels[:60], features[60:], labels[60:], 4)
    assert values == {"probe_knn": 1.0, "probe_linear": 1.0}


def test_features_that_are_not_finite_are_reported() -> None:
    broken = torch.full((4, 2), float("inf"))
    values = probe(broken, torch.zeros(4, dtype=torch.int64), broken, torch.zeros(4, dtype=torch.int64), 1)
    assert all(value != value for value in values.values())


def test_bands_leave_their_frequencies_around_the_mean() -> None:
    images = 0.5 + 0.02 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    changed = Band("high", 4, 16).change(images)
    before, after = rfft2(images), rfft2(changed)
    assert torch.allclose(after[..., 0, 0], before[..., 0, 0], atol=1e-3)
    assert after[..., 0, 1:4].abs().max() < 1e-3
    assert torch.allclose(after[..., 0, 5:], before[..., 0, 5:], atol=1e-3)


def test_a_radius_outside_the_spectrum_is_refused() -> None:
    assert {band.kind for band in bands_of((32, 32))} == {"whole", "low", "high", "band"}
    with pytest.raises(UserError, match="radii"):
        bands_of((32, 32), [40])
