from __future__ import annotations

import colorsys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from freqmask.data.augment import (
    DINO_VIEWS,
    NO_CHANGE,
    PhotometricAugmentation,
    PhotometricSettings,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    blur_reach,
    gaussian_blur,
)
from freqmask.errors import UserError


def batch(count: int = 4, channels: int = 3, height: int = 20, width: int = 26) -> Tensor:
    images = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))
    images[0, :, :4, :4] = 0.25  # grey pixels have no hue
    return images


KEYS = torch.arange(4)


@pytest.mark.parametrize(
    ("ours", "theirs", "numbers"),
    [
        (adjust_brightness, reference.adjust_brightness, (0.0, 0.6, 1.0, 1.4)),
        (adjust_contrast, reference.adjust_contrast, (0.0, 0.6, 1.0, 1.4)),
        (adjust_saturation, reference.adjust_saturation, (0.0, 0.8, 1.0, 1.2)),
        (adjust_hue, reference.adjust_hue, (-0.5, -0.1, 0.0, 0.37)),
    ],
)
def test_colour_changes_are_torchvisions_with_a_strength_for_each_image(
    ours: Callable[[Tensor, Tensor], Tensor],
    theirs: Callable[[Tensor, float], Tensor],
    numbers: tuple[float, ...],
) -> None:
    changed = ours(batch(), torch.tensor(numbers))
    expected = torch.stack([theirs(image, number) for image, number in zip(batch(), numbers, strict=True)])
    torch.testing.assert_close(changed, expected, atol=2e-6, rtol=0)


def test_hue_turns_the_circle_of_hsv() -> None:
    red, green, blue = 0.9, 0.3, 0.5
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    expected = colorsys.hsv_to_rgb((hue + 0.25) % 1, saturation, value)
    pixel = torch.tensor([red, green, blue]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(adjust_hue(pixel, torch.tensor([0.25])).flatten(), torch.tensor(expected))


@pytest.mark.parametrize("channels", [1, 3, 12])
def test_the_blur_is_torchvisions_with_a_sigma_for_each_image(channels: int) -> None:
    images, sigmas = batch(channels=channels, height=64, width=100), (0.1, 0.5, 1.3, 2.0)
    kernel = [2 * blur_reach(100) + 1, 2 * blur_reach(64) + 1]
    expected = [
        reference.gaussian_blur(image, kernel, [s, s]) for image, s in zip(images, sigmas, strict=True)
    ]
    blurred = gaussian_blur(images, torch.tensor(sigmas))
    torch.testing.assert_close(blurred, torch.stack(expected), atol=2e-6, rtol=0)


def test_images_that_are_not_chosen_stay_sharp_to_the_bit() -> None:
    chosen = torch.tensor([True, False, True, False])
    blurred = gaussian_blur(batch(), torch.full((4,), 1.0), chosen)
    assert torch.equal(blurred[~chosen], batch()[~chosen])
    assert not torch.allclose(blurred[chosen], batch()[chosen], atol=1e-2)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3)])
def test_the_smallest_images_can_be_blurred(size: tuple[int, int]) -> None:
    constant = torch.full((2, 3, *size), 0.5)
    torch.testing.assert_close(gaussian_blur(constant, torch.tensor([0.5, 2.0])), constant)


def test_the_blur_is_exact_under_autocast() -> None:
    plain = gaussian_blur(batch(), torch.full((4,), 1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gaussian_blur(batch(), torch.full((4,), 1.0)), plain)


@pytest.mark.parametrize("view", DINO_VIEWS)
def test_an_image_is_changed_by_its_key_alone(view: PhotometricSettings) -> None:
    augment = PhotometricAugmentation(view)
    together = augment(batch(), KEYS)
    alone = torch.cat([augment(batch()[i : i + 1], KEYS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert not torch.allclose(together, augment(batch(), KEYS + 100))
    assert together.min() >= 0
    assert together.max() <= 1


def test_nothing_changes_without_probabilities() -> None:
    assert torch.equal(PhotometricAugmentation(NO_CHANGE)(batch(), KEYS), batch())


@pytest.mark.parametrize("name", ["grey", "solarise", "blur", "jitter"])
def test_a_change_meets_its_share_of_the_images(name: str) -> None:
    settings = PhotometricSettings(**{"jitter": 0.0, "grey": 0.0, "blur": 0.0} | {name: 0.3})
    images = batch(1, height=6, width=6).expand(600, -1, -1, -1)
    changed = PhotometricAugmentation(settings)(images, torch.arange(600)) != images
    assert 0.22 < changed.flatten(1).any(1).float().mean() < 0.38


def test_grey_and_solarised_images_are_torchvisions() -> None:
    grey = PhotometricAugmentation(PhotometricSettings(jitter=0.0, grey=1.0, blur=0.0))(batch(), KEYS)
    torch.testing.assert_close(grey, reference.rgb_to_grayscale(batch(), 3), atol=1e-6, rtol=0)
    settings = PhotometricSettings(jitter=0.0, grey=0.0, blur=0.0, solarise=1.0)
    solarised = PhotometricAugmentation(settings)(batch(), KEYS)
    torch.testing.assert_close(solarised, reference.solarize(batch(), 0.5))


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_other_channels_are_blurred_and_lit_but_not_coloured(channels: int) -> None:
    settings = PhotometricSettings(jitter=1.0, grey=1.0, solarise=1.0, blur=1.0)
    augment = PhotometricAugmentation(settings)
    colourless = PhotometricSettings(jitter=1.0, saturation=0.0, hue=0.0, grey=0.0, solarise=0.0, blur=1.0)
    expected = PhotometricAugmentation(colourless)(batch(channels=channels), KEYS)
    assert torch.equal(augment(batch(channels=channels), KEYS), expected)
    (note,) = augment.notes(channels)
    assert note.startswith("saturation, hue, grey, solarise off")
    assert augment.notes(3) == []


def test_without_keys_the_global_generator_decides() -> None:
    augment = PhotometricAugmentation()
    torch.manual_seed(0)
    first = augment(batch())
    torch.manual_seed(0)
    assert torch.equal(augment(batch()), first)


def test_it_compiles_without_a_graph_break() -> None:
    augment = PhotometricAugmentation(DINO_VIEWS[1])
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch(), KEYS), augment(batch(), KEYS), atol=1e-6, rtol=0)


def test_all_wrong_settings_are_named_in_one_message() -> None:
    with pytest.raises(UserError) as caught:
        PhotometricSettings(jitter=1.5, hue=0.7, blur_sigma=(2.0, 1.0))
    for word in ("jitter (1.5)", "hue (0.7)", "blur_sigma"):
        assert word in str(caught.value)
