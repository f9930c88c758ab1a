"""Degradations: against the slow reference, reproducible by key, at any size."""

import numpy as np
import pytest
import reference
import torch

from freqmask.degradations import Blur, Downscale, Noise
from freqmask.errors import UserError
from freqmask.rng import fresh_keys

EVERY = [Downscale(), Downscale(3), Blur(), Blur([7, 9, 21], 5.0), Noise()]


@pytest.mark.parametrize(("size", "factor"), [((32, 32), 8), ((30, 41), 3), ((16, 24), 2.5)])
def test_downscale_agrees_with_the_reference(size, factor):
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    np.testing.assert_allclose(
        Downscale(factor)(images), reference.downscaled(images.numpy(), factor), atol=1e-12
    )


@pytest.mark.parametrize(("size", "taps"), [((30, 24), 7), ((30, 24), 21), ((12, 11), 21)])
def test_blur_agrees_with_the_reference(size, taps):
    images = torch.rand(1, 2, *size, dtype=torch.float64)
    np.testing.assert_allclose(
        Blur([taps], 5.0)(images)[0], reference.blurred(images[0].numpy(), taps, 5.0), atol=1e-6
    )


def test_blur_draws_every_kernel_size_for_some_image():
    images, sizes = torch.rand(1, 1, 30, 30, dtype=torch.float64), range(7, 22, 2)
    results = Blur(list(sizes), 5.0)(images.expand(400, -1, -1, -1), fresh_keys(400))
    expected = torch.stack(
        [torch.as_tensor(reference.blurred(images[0].numpy(), size, 5.0)) for size in sizes]
    )
    distance = (results[:, None] - expected).abs().amax((-3, -2, -1))
    assert distance.min(1).values.max() < 1e-6
    assert distance.argmin(1).bincount(minlength=8).min() > 16


def test_the_automatic_strengths_are_the_papers_at_224():
    blur = Blur()
    assert Downscale().factor_at(224, 224) == 8
    assert blur.sizes_at(224, 300) == (7, 9, 11, 13, 15, 17, 19, 21)
    assert blur.sigma_at(224, 224) == 5
    assert (Downscale().factor_at(112, 112), blur.sigma_at(112, 112)) == (4, 2.5)
    assert all(size % 2 == 1 for side in range(1, 300, 7) for size in blur.sizes_at(side, side))


def test_noise_has_the_papers_strength_is_not_clamped_and_is_apart_in_every_channel():
    noise = Noise()(torch.full((4, 3, 64, 64), 0.5)) - 0.5
    assert abs(noise.std() - 75 / 255) < 0.005
    assert noise.max() > 0.5 and noise.min() < -0.5
    assert abs(torch.corrcoef(noise.transpose(0, 1).flatten(1))[0, 1]) < 0.05


@pytest.mark.parametrize("degradation", EVERY, ids=repr)
def test_an_images_result_does_not_depend_on_its_batch(degradation):
    images, keys = torch.rand(5, 3, 24, 20), fresh_keys(5)
    result = degradation(images, keys)
    order = torch.tensor([3, 1])
    torch.testing.assert_close(degradation(images[order], keys[order]), result[order])


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 40), (33, 32)])
@pytest.mark.parametrize("degradation", EVERY, ids=repr)
def test_any_size_and_channels(degradation, size):
    for channels in (1, 4):
        result = degradation(torch.rand(2, channels, *size))
        assert result.shape == (2, channels, *size)
        assert result.isfinite().all()


@pytest.mark.parametrize("degradation", EVERY, ids=repr)
def test_precision_is_float32_at_least(degradation):
    images, keys = torch.rand(2, 3, 16, 16), fresh_keys(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(degradation(images, keys), degradation(images, keys).float())
        under_autocast = degradation(images, keys)
    assert torch.equal(under_autocast, degradation(images, keys))
    assert degradation(images.bfloat16(), keys).dtype == torch.float32
    assert degradation(images.double(), keys).dtype == torch.float64


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Downscale(1),
        lambda: Downscale("small"),
        lambda: Blur([8]),
        lambda: Blur([]),
        lambda: Blur("all"),
        lambda: Blur(sigma=0),
        lambda: Noise(0),
        lambda: Noise(float("nan")),
    ],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(UserError, match="must be"):
        wrong()
