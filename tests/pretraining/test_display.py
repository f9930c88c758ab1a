"""What the eye is shown: palettes, keep masks, PSNR, files."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freqmask.pretraining.figures import Palette, centered, new_sheet, show_image, spectrum_levels
from freqmask.spectrum import psnr
from freqmask.training.files import MARKER, save_figure


def random_images(channels: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(4, channels, 17, 24, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("channels", "shape"), [(1, (17, 24)), (2, (17, 24, 3)), (3, (17, 24, 3)), (12, (17, 24, 3))]
)
def test_any_number_of_channels_becomes_grey_or_colour(channels: int, shape: tuple[int, ...]) -> None:
    images = random_images(channels)
    colours, note = Palette.of(images).show(images[0])
    assert colours.shape == shape
    assert colours.min() >= 0 and colours.max() <= 1
    assert note == ""


@pytest.mark.parametrize("channels", [1, 3])
def test_an_ordinary_image_is_shown_as_it_is(channels: int) -> None:
    images = random_images(channels)
    colours, _ = Palette.of(images).show(images[1])
    expected = images[1].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(colours, expected.squeeze(-1) if channels == 1 else expected, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])  # eigenvectors have none of their own
def test_the_first_principal_component_shows_what_the_bands_share(
    monkeypatch: pytest.MonkeyPatch, sign: int
) -> None:
    eigh = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: (eigh(matrix)[0], sign * eigh(matrix)[1]))
    shared = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(2, 12, 32, 32, generator=torch.Generator().manual_seed(2))
    images = 0.8 * shared + 0.02 * noise
    colours, _ = Palette.of(images).show(images[0])
    correlation = np.corrcoef(colours[..., 0].ravel(), shared[0, 0].numpy().ravel())[0, 1]
    assert correlation > 0.99  # brighter is more: not minus 0.99


def test_a_faint_image_is_brightened_and_says_by_how_much() -> None:
    images = random_images(3)
    colours, note = Palette.of(images).show(0.1 * images[0])
    assert note.startswith("brightened x10")
    assert colours.max() > 0.99


def test_a_signed_image_is_shown_around_grey() -> None:
    images = random_images(3)
    colours, note = Palette.of(images).show(0.2 * (images[0] - 0.5))
    assert note == "around gray x5.1"
    assert abs(colours.mean() - 0.5) < 0.05


def test_a_black_or_broken_image_is_shown_black() -> None:
    images = random_images(3)
    for image in (torch.zeros(3, 17, 24), torch.full((3, 17, 24), float("nan"))):
        colours, note = Palette.of(images).show(image)
        assert colours.max() == 0 and note == ""


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("strength", [1e-8, 1e-7, 3e-6])
def test_what_float32_rounds_is_no_picture(channels: int, strength: float) -> None:
    images = random_images(channels)
    noise = torch.randn(images[0].shape, generator=torch.Generator().manual_seed(1))
    for part in (strength * noise.clamp(-1, 1), strength * noise.abs().clamp(max=1)):
        colours, note = Palette.of(images).show(part)
        nothing, _ = Palette.of(images).show(torch.zeros_like(part))
        assert note == "" and np.abs(colours - nothing).max() < 1e-4
    _, note = Palette.of(images).show(1e-3 * images[0])
    assert note.startswith("brightened")


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9), (6, 5), (5, 8)])
def test_a_centered_mask_is_the_whole_spectrums(height: int, width: int) -> None:
    magnitude = torch.fft.fft2(torch.rand(height, width, dtype=torch.float64)).abs()
    shown = centered(magnitude[:, : width // 2 + 1], width)
    torch.testing.assert_close(shown, torch.fft.fftshift(magnitude))


def test_spectrum_levels_are_decimal_logarithms_with_dc_in_the_centre() -> None:
    levels = spectrum_levels(torch.full((1, 3, 8, 8), 0.5))
    assert levels.shape == (1, 8, 8)
    assert levels[0, 4, 4] == pytest.approx(math.log10(4.0), abs=1e-3)  # ortho: 0.5 x sqrt(64)
    assert np.delete(levels[0].ravel(), 36).max() < -2.9


def test_psnr_is_decibels_of_the_clipped_image() -> None:
    target = torch.ones(3, 4, 4)
    assert psnr(torch.full((3, 4, 4), 0.9), target) == pytest.approx(20, abs=1e-3)
    assert psnr(target + 1, target) == math.inf
    assert math.isnan(psnr(target * float("nan"), target))


def test_a_sheet_is_whole_or_not_there(tmp_path: Path) -> None:
    figure, axes = new_sheet(1, 1, 1.0, "写真 $x_$")  # no font for it, and dollar signs around no formula
    show_image(axes[0, 0], np.zeros((4, 4)), "$a_$", "")
    path = save_figure(figure, tmp_path / "new" / "sheet.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
    assert [found.name for found in path.parent.iterdir() if found.name != MARKER] == ["sheet.png"]


def test_sheets_leave_pyplot_alone_and_are_drawn_from_any_thread(tmp_path: Path) -> None:
    thread = threading.Thread(target=lambda: save_figure(new_sheet(2, 2, 1.0, "")[0], tmp_path / "sheet.png"))
    thread.start()
    thread.join()
    assert (tmp_path / "sheet.png").stat().st_size > 0
