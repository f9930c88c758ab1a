"""MFM against its equations, written out in numpy over the full spectrum."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CNN, photographs, tiny_method

from freqmask.methods.mfm import band_edges
from freqmask.rng import combine
from freqmask.spectrum import IMAGENET_MEAN, IMAGENET_STD

KEYS = torch.arange(2, 6)  # draws two low-passes and two high-passes


def fixed_keep(height: int, width: int, radius: float, low_pass: bool) -> np.ndarray[Any, Any]:
    """The full, unshifted mask of the paper for a square image."""
    ky, kx = np.fft.fftfreq(height, 1 / height), np.fft.fftfreq(width, 1 / width)
    inside = ky[:, None] ** 2 + kx**2 < radius**2
    return (inside if low_pass else ~inside).astype(float)


@pytest.mark.parametrize("reduce", ["batch", "image"])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (2.0, 1.0)])
def test_the_loss_is_the_papers_equation(reduce: str, weights: tuple[float, float]) -> None:
    method = tiny_method(
        "mfm", radius=5, reduce=reduce, masked_weight=weights[0], kept_weight=weights[1]
    ).eval()
    images = photographs()
    drawn = method.filter.draw(combine(KEYS, 0)).tolist()
    assert {method.filter.names[number] for number in drawn} == {"lowpass", "highpass"}

    mean, std = (np.array(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    sums = []
    for image, number in zip(images.double().numpy(), drawn, strict=True):
        keep = fixed_keep(32, 32, 5, method.filter.names[number] == "lowpass")
        filtered = np.clip(np.fft.ifft2(np.fft.fft2(image) * keep).real, 0, 1)
        network_input = torch.from_numpy((filtered - mean) / std).float()[None]
        prediction = method.decoder(method.backbone(network_input).feature_map)[0].detach().double().numpy()
        difference = np.fft.fft2(prediction - (image - mean) / std, norm="ortho")
        weight = np.broadcast_to(weights[0] * (1 - keep) + weights[1] * keep, image.shape)
        sums.append(((weight * np.abs(difference)).sum(), weight.sum()))
    total = np.array(sums)
    expected = (
        total[:, 0].sum() / total[:, 1].sum() if reduce == "batch" else (total[:, 0] / total[:, 1]).mean()
    )
    assert method([images], KEYS)["loss"].item() == pytest.approx(expected, rel=2e-5)


def test_the_network_sees_only_what_the_filter_leaves() -> None:
    method = tiny_method("mfm")
    seen = []
    method.backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    images = photographs()
    method([images], KEYS)
    filtered = method.filter(images, combine(KEYS, 0)).images.clamp(0, 1)
    assert torch.equal(seen[0], method.normalise(filtered))


def test_clamp_is_an_option() -> None:
    clamped, free = (tiny_method("mfm", filter="highpass(radius=2)", clamp=clamp) for clamp in (True, False))
    assert clamped.reconstruct(photographs())["filtered"].min() == 0
    assert free.reconstruct(photographs())["filtered"].min() < -0.1


@pytest.mark.parametrize(("network", "share"), [(None, 0.5), (CNN, 0.3)])
def test_a_cnn_is_low_passed_less_often_than_a_vit(network: dict[str, Any] | None, share: float) -> None:
    drawn = tiny_method("mfm", network).filter.draw(torch.arange(20000))
    assert (drawn == 0).float().mean().item() == pytest.approx(share, abs=0.01)


def test_auto_is_recorded_as_the_number_it_became() -> None:
    settings = tiny_method("mfm", CNN).settings
    assert settings["radius"] == pytest.approx(16 * 32 / 224)
    assert settings["low_pass_share"] == 0.3
    assert tiny_method("mfm", filter="com").settings["radius"] == "auto"


@pytest.mark.parametrize("name", ["mfm", "folk"])
@pytest.mark.parametrize(("filter", "names"), [("fixed", ["lowpass", "highpass"]), ("com", ["com", "rcom"])])
def test_all_four_cells_of_filter_and_teacher_are_reached_by_options(
    name: str, filter: str, names: list[str]
) -> None:
    assert tiny_method(name, filter=filter).filter.names == names


def test_the_filled_image_has_the_originals_kept_frequencies_and_the_predicted_others() -> None:
    seen = tiny_method("mfm").reconstruct(photographs())
    filled, target, predicted = (torch.fft.rfft2(seen[part]) for part in ("filled", "target", "prediction"))
    keep = seen["keep"].expand_as(filled).bool()
    assert torch.allclose(filled[keep], target[keep], atol=1e-3)
    inner = ~keep
    inner[..., [0, -1]] = False  # self-conjugate columns are made Hermitian by the inverse
    assert torch.allclose(filled[inner], predicted[inner], atol=1e-3)


def test_a_zero_prediction_scores_one_in_every_part() -> None:
    method = tiny_method("mfm")
    torch.nn.init.zeros_(method.decoder[0].weight)
    torch.nn.init.zeros_(method.decoder[0].bias)
    parts = method([photographs()], KEYS, details=True)
    health = {name: value.item() for name, value in parts.items() if name.startswith("relative_loss")}
    edges = band_edges(32, 32)
    bands = {f"relative_loss/band_{low}_{high}" for low, high in pairwise(edges)}
    assert set(health) == {"relative_loss", "relative_loss/lowpass", "relative_loss/highpass"} | bands
    assert list(health.values()) == pytest.approx([1.0] * len(health), abs=1e-5)


def test_health_tells_filters_and_bands_apart() -> None:
    method = tiny_method("mfm", radius=5)
    method.predict = lambda filtered: method.normalise(images * low_passed)  # knows the low-passed images
    images = photographs()
    low_passed = (method.filter.draw(combine(KEYS, 0)) == 0)[:, None, None, None]
    health = method([images], KEYS, details=True)
    assert health["relative_loss/lowpass"] < 1e-4
    assert health["relative_loss/highpass"] > 0.5
    outer = [value for name, value in health.items() if "band_16" in name]
    assert outer[0] < 1e-4  # hidden in low-passed images only


def test_a_filter_that_no_image_drew_has_no_number() -> None:
    method = tiny_method("mfm", low_pass_share=1.0)
    parts = method([photographs()], KEYS, details=True)
    assert torch.isnan(parts["relative_loss/highpass"])
    assert torch.isfinite(parts["relative_loss/lowpass"])


def test_mean_and_std_are_imagenets_for_colour_and_plain_otherwise() -> None:
    assert tiny_method("mfm").normalise.mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    grey = tiny_method("mfm", channels=1).normalise
    assert (grey.mean.item(), grey.std.item()) == (0.5, 0.25)
    images = photographs()
    method = tiny_method("mfm")
    assert torch.allclose(method.normalise.inverse(method.normalise(images)), images, atol=1e-6)


def test_the_loss_is_in_single_precision_under_autocast() -> None:
    method = tiny_method("mfm")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method([photographs()], KEYS)["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(method([photographs()], KEYS)["loss"].item(), rel=0.02)
