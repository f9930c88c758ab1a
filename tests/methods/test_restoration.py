"""The restoration tasks against mean(d) over the full spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import photographs, tiny_method

from freqmask.rng import combine

TASKS = ["sr", "deblur", "denoise"]
KEYS = torch.arange(4)


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_is_the_mean_distance_over_the_full_spectrum(name: str) -> None:
    method = tiny_method(name).eval()
    images = photographs()
    degraded = method.degradation(images, combine(KEYS, 0))
    assert not torch.equal(degraded, images)
    difference = (method.predict(degraded) - method.normalise(images)).detach().double().numpy()
    expected = np.abs(np.fft.fft2(difference, norm="ortho")).mean()
    assert method([images], KEYS)["loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_the_network_never_sees_the_original(name: str) -> None:
    method = tiny_method(name)
    seen = []
    method.backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    method([photographs()], KEYS)
    assert torch.equal(seen[0], method.normalise(method.degradation(photographs(), combine(KEYS, 0))))


@pytest.mark.parametrize(
    ("name", "weak", "strong"),
    [
        ("sr", {"factor": 2}, {"factor": 8}),
        ("deblur", {"sigma": 0.5, "kernel_sizes": [3]}, {"sigma": 5.0, "kernel_sizes": [21]}),
        ("denoise", {"sigma": 0.01}, {"sigma": 0.5}),
    ],
)
def test_strengths_are_options(name: str, weak: dict[str, object], strong: dict[str, object]) -> None:
    images = photographs()
    errors = [
        (tiny_method(name, **options).reconstruct(images)["filtered"] - images).abs().mean()
        for options in (weak, strong)
    ]
    assert errors[1] > 1.3 * errors[0]


def test_no_frequency_counts_as_given() -> None:
    seen = tiny_method("deblur").reconstruct(photographs())
    assert not seen["keep"].any()
    assert torch.allclose(seen["filled"], seen["prediction"], atol=1e-5)
