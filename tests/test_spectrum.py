"""Spectrum: the layout, radii decided in integers, conjugate pairs, precision."""

from fractions import Fraction

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freqmask.spectrum import (
    constant,
    frequency_radius,
    full_spectrum,
    inside,
    irfft2,
    log_magnitude,
    pair_weights,
    power,
    rfft2,
)

SIZES = [(224, 224), (225, 225), (96, 160), (32, 32), (7, 12), (5, 1), (1, 1)]
SIDES = st.integers(1, 24)


@pytest.mark.parametrize("size", SIZES)
def test_the_half_spectrum_is_half_of_the_full_one(size):
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    expected = np.fft.ifftshift(np.abs(reference.spectrum(images)), axes=(-2, -1))
    np.testing.assert_allclose(full_spectrum(rfft2(images).abs(), size[1]), expected, atol=1e-12)


@given(height=SIDES, width=SIDES)
@settings(max_examples=40, deadline=None)
def test_the_inverse_gives_the_images_back(height, width):
    images = torch.rand(1, 2, height, width, dtype=torch.float64)
    torch.testing.assert_close(irfft2(rfft2(images), (height, width)), images)


@given(height=SIDES, width=SIDES)
@settings(max_examples=40, deadline=None)
def test_pair_weights_make_the_half_spectrum_count_for_the_whole(height, width):
    images = torch.rand(1, 1, height, width, dtype=torch.float64)
    weights = pair_weights(height, width).double()
    assert weights.shape == (height, width // 2 + 1)
    assert weights.sum() == height * width
    torch.testing.assert_close((weights * power(rfft2(images))).sum(), images.square().sum())  # Parseval


@pytest.mark.parametrize("size", SIZES)
def test_the_radius_is_the_distance_from_dc(size):
    half = frequency_radius(*size)
    shifted = torch.fft.fftshift(full_spectrum(half, size[1]), dim=(-2, -1))
    assert half.shape == (size[0], size[1] // 2 + 1)
    np.testing.assert_allclose(shifted, reference.radius(*size), rtol=1e-6)


def test_hard_edges_are_exact_for_every_integer_radius_at_224():
    ky = np.minimum(np.arange(224), 224 - np.arange(224)).astype(np.int64)
    squares = ky[:, None] ** 2 + np.arange(113, dtype=np.int64) ** 2
    for radius in range(1, 113):
        assert np.array_equal(inside(224, 224, radius).numpy(), squares < radius**2), radius


@pytest.mark.parametrize(("size", "radius"), [((12, 20), 5), ((21, 15), "2.5"), ((9, 9), "0.1"), ((8, 6), 3)])
def test_hard_edges_are_exact_at_any_size_and_for_fractions(size, radius):
    half = inside(*size, Fraction(radius)).double()
    assert np.array_equal(reference.full_mask(half, size[1]), reference.low_pass(*size, radius))


@pytest.mark.parametrize(("radius", "bins"), [(16, 793), (5, 69)])
def test_the_published_counts_at_224(radius, bins):
    assert (inside(224, 224, radius) * pair_weights(224, 224)).sum() == bins


def test_large_sizes_without_a_common_factor_do_not_overflow():
    size, radius = (1999, 2000), 700  # min^2 ky^2 W^2 itself would need 65 bits here
    exact = inside(*size, radius)
    r = torch.from_numpy(np.fft.ifftshift(reference.radius(*size))[:, :1001].copy())
    off_the_circle = (r - radius).abs() > 1e-6
    assert torch.equal(exact[off_the_circle], (r < radius)[off_the_circle])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_spectra_are_single_precision_under_autocast_too(dtype):
    images = torch.full((1, 1, 300, 300), 60_000.0).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spectrum = rfft2(images)
    assert spectrum.dtype == torch.complex64
    assert spectrum.real.isfinite().all()  # DC is 1.8e7, far above what half precision holds


def test_log_magnitude_has_dc_in_the_centre_and_leaves_the_batch_in_order():
    images = torch.arange(1.0, 7.0).reshape(2, 3, 1, 1).expand(2, 3, 6, 5)
    picture = log_magnitude(images)
    torch.testing.assert_close(picture[:, :, 3, 2], torch.log1p(images[..., 0, 0] * 30**0.5))
    picture = picture.clone()
    picture[:, :, 3, 2] = 0
    assert picture.abs().max() < 1e-5


def test_a_constant_made_under_inference_mode_serves_training():
    @constant
    def table(length):
        return torch.ones(length)

    with torch.inference_mode():
        table(3)
    values = torch.zeros(3, requires_grad=True)
    (values * table(3)).sum().backward()
    assert table(3) is table(3)
