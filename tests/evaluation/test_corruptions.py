"""Corruptions: the published constants and operations, the same images for every model, any size and channels."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom
from skimage.color import hsv2rgb, rgb2hsv
from skimage.data import astronaut

from freqmask.data.loader import TrainDataset
from freqmask.data.sources import open_source
from freqmask.data.transforms import Geometry
from freqmask.errors import UserError
from freqmask.evaluation import corruption_functions as functions
from freqmask.evaluation import corruptions
from freqmask.evaluation.corruptions import (
    COMMON,
    CORRUPTIONS,
    EXTRA,
    PUBLISHED,
    Corruption,
    choose_corruptions,
    strengths_for,
)


def photograph(side: int) -> torch.Tensor:
    """A real image, uint8."""
    small = Image.fromarray(astronaut()).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)


def unit(side: int) -> np.ndarray:
    """The same, (height, width, channel) in [0, 1]."""
    return (photograph(side).permute(1, 2, 0).numpy() / 255).astype(np.float32)


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_lists_are_the_published_ones() -> None:
    assert (len(COMMON), len(EXTRA), len(CORRUPTIONS)) == (15, 4, 19)
    for published in PUBLISHED.values():
        assert set(published.table) == set(CORRUPTIONS)
        assert {len(values) for values in published.table.values()} == {5}


def test_constants_at_published_sizes_are_as_published() -> None:
    assert strengths_for(224).of("gaussian_noise", 5) == (0.38,)
    assert strengths_for(224).of("motion_blur", 5) == (20, 15)
    assert strengths_for(224).of("elastic_transform", 1) == pytest.approx((244 * 2, 244 * 0.7, 244 * 0.1))
    assert strengths_for(32).of("gaussian_noise", 5) == (0.10,)
    assert strengths_for(32).of("elastic_transform", 2) == pytest.approx((32 * 0.05, 32 * 0.2, 32 * 0.07))
    assert strengths_for(64).of("jpeg_compression", 5) == (25,)


@pytest.mark.parametrize(
    ("name", "factors"), [("imagenet-c", (12, 16, 11, 13, 11)), ("cifar-10-c", (7, 12, 16, 21, 26))]
)
def test_zoom_factors_are_those_that_arange_gives(name: str, factors: tuple[int, ...]) -> None:
    ends = {"imagenet-c": (1.11, 1.16, 1.21, 1.26, 1.31), "cifar-10-c": (1.06, 1.11, 1.16, 1.21, 1.26)}[name]
    steps = {"imagenet-c": (0.01, 0.01, 0.02, 0.02, 0.03), "cifar-10-c": (0.01,) * 5}[name]
    table = PUBLISHED[name].table["zoom_blur"]
    assert tuple(len(values) for values in table) == factors
    for values, end, step in zip(table, ends, steps, strict=True):
        assert np.allclose(values, np.arange(1, end, step))


def test_between_the_published_sizes_lengths_are_scaled_and_nothing_else() -> None:
    assert [strengths_for(side).published for side in (28, 45, 46, 119, 120, 512)] == [
        "cifar-10-c", "cifar-10-c", "tiny-imagenet-c", "tiny-imagenet-c", "imagenet-c", "imagenet-c",
    ]  # fmt: skip
    half = strengths_for(112, "imagenet-c")
    assert half.of("defocus_blur", 3) == (3, 0.25)
    assert half.of("glass_blur", 5) == (0.75, 2, 2)
    assert half.of("fog", 1) == (1.5, 2)
    # of water the fifth number is its shine, of mud the blur of its edge in pixels
    assert half.of("spatter", 1) == (0.65, 0.3, 2, 0.69, 0.6, 0)
    assert half.of("spatter", 5) == (0.67, 0.4, 0.5, 0.65, 0.75, 1)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_draws_follow_from_the_key_alone(name: str) -> None:
    image, corruption = photograph(32), Corruption(name, 3, strengths_for(32))
    first = corruption(image, 5)
    assert first.dtype == torch.uint8 and first.shape == image.shape
    assert torch.equal(first, corruption(image, 5))
    still = {
        "defocus_blur",
        "zoom_blur",
        "brightness",
        "contrast",
        "pixelate",
        "jpeg_compression",
        "gaussian_blur",
        "saturate",
    }
    assert torch.equal(first, corruption(image, 6)) == (name in still)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_takes_any_size_channels_and_type(name: str) -> None:
    for shape in ((1, 33, 20), (5, 24, 40)):
        image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        for severity in (1, 5):
            out = Corruption(name, severity, strengths_for(min(shape[1:])))(image, 1)
            assert out.shape == image.shape and out.dtype == image.dtype
            assert torch.isfinite(out).all() and out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("side", [32, 64])
def test_severity_five_is_farther_from_the_image_than_severity_one(side: int) -> None:
    image = photograph(side)

    def away(name: str, severity: int) -> float:
        corruption = Corruption(name, severity, strengths_for(side))
        changes = [(corruption(image, key).float() - image).abs().mean() for key in range(4)]
        return float(torch.stack(changes).mean())

    # the published severities of these three change in kind: less colour, then more; one turn, then waves;
    # more copies, then more blur
    in_kind = {"saturate", "elastic_transform", "glass_blur"}
    assert [name for name in CORRUPTIONS if name not in in_kind and away(name, 5) <= away(name, 1)] == []


def test_noise_has_the_stated_size() -> None:
    grey = np.full((200, 200, 3), 0.5, np.float32)
    assert functions.gaussian_noise(grey, random(), 0.1).std() == pytest.approx(0.1, rel=0.02)
    assert functions.shot_noise(grey, random(), 50).var() == pytest.approx(0.5 / 50, rel=0.03)
    assert functions.speckle_noise(grey, random(), 0.2).std() == pytest.approx(0.1, rel=0.02)
    struck = functions.impulse_noise(grey, random(), 0.1)
    assert [float((struck == value).mean()) for value in (0, 1)] == pytest.approx([0.05, 0.05], rel=0.06)


def test_brightness_and_saturation_are_those_of_hsv() -> None:
    image = unit(48)
    image[:5, :5] = 0.4  # grey
    image[5:8, :5] = 0  # black
    for added in (0.1, 0.5):
        hsv = rgb2hsv(image)
        hsv[..., 2] = np.clip(hsv[..., 2] + added, 0, 1)
        assert np.allclose(functions.brightness(image, random(), added), hsv2rgb(hsv), atol=1e-5)
    for factor, added in ((0.1, 0), (5, 0.1), (20, 0.2)):
        hsv = rgb2hsv(image)
        hsv[..., 1] = np.clip(hsv[..., 1] * factor + added, 0, 1)
        assert np.allclose(functions.saturate(image, random(), factor, added), hsv2rgb(hsv), atol=1e-4)


def test_zoom_is_scipy_s() -> None:
    image = unit(40)
    for factor in (1.0, 1.05, 1.3, 2.5):
        size = math.ceil(40 / factor)
        top = (40 - size) // 2
        whole = zoom(image[top : top + size, top : top + size], (factor, factor, 1), order=1)
        trim = (len(whole) - 40) // 2
        assert np.allclose(
            functions.enlarged(image, factor), whole[trim : trim + 40, trim : trim + 40], atol=1e-5
        )


def test_wide_gaussians_are_scipy_s() -> None:
    plane = random().uniform(-1, 1, (30, 41))
    for deviation in (0.0, 0.7, 6.0, 33.0):
        expected = gaussian_filter(plane, deviation, mode="reflect", truncate=3)
        assert np.allclose(functions.smoothed(plane, deviation), expected, atol=1e-12)


def test_a_disc_out_of_focus_is_round_and_flat() -> None:
    kernel = functions.disc(6, 0.5)
    assert kernel.sum() == pytest.approx(1)
    assert np.allclose(kernel, kernel.T) and np.allclose(kernel, kernel[::-1])
    assert (kernel > 0.5 * kernel.max()).sum() == pytest.approx(math.pi * 36, rel=0.05)
    flat = np.full((30, 30, 3), 0.3, np.float32)
    assert np.allclose(functions.defocus_blur(flat, random(), 6, 0.5), flat, atol=1e-6)


def test_motion_draws_a_point_out_to_one_side() -> None:
    point = np.zeros((41, 41, 1), np.float32)
    point[20, 20] = 1
    streak = functions.streaked(point, 10, 5, 0)[..., 0]
    assert streak.sum() == pytest.approx(1, abs=1e-5)
    assert streak[20, :20].sum() > 0.8 and streak[20, 21:].sum() == 0 and streak[:20].sum() == 0
    falling = functions.streaked(point, 10, 5, -90)[..., 0]
    assert falling[21:, 20].sum() > 0.8  # snow falls down


def test_glass_takes_pixels_from_near_by_and_copies_them() -> None:
    places = np.stack(np.mgrid[:20, :20], axis=2).astype(np.float32)
    moved = functions.glass_blur(places, random(), 0, 2, 1)
    assert np.array_equal(moved[:2], places[:2])  # the border stays, as published
    farthest = np.abs(moved - places)
    assert farthest.max() >= 2 and len(np.unique(moved.reshape(-1, 2), axis=0)) < 400


def test_plasma_is_smoother_where_displacements_decay_faster() -> None:
    rough, smooth = (functions.plasma(64, decay, random(3)) for decay in (1.4, 3.0))
    for surface in (rough, smooth):
        assert surface.shape == (64, 64) and surface.min() >= 0 and surface.max() <= 1
    assert np.abs(np.diff(rough)).mean() > 1.5 * np.abs(np.diff(smooth)).mean()


def test_an_edge_of_a_step_is_one_pixel_wide_and_lies_on_its_dark_side() -> None:
    step = np.zeros((12, 12), np.uint8)
    step[:, 6:] = 200
    found = functions.find_edges(step, 50, 150)
    assert found[:, 5].all() and found.sum() == 12
    step[:, 6:] = 10
    assert not functions.find_edges(step, 50, 150).any()


def test_jpeg_is_pillow_s_and_pixels_are_boxes() -> None:
    image = photograph(32)
    stored = Corruption("jpeg_compression", 5, strengths_for(32))(image, 0)
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=40)
    assert np.array_equal(stored.permute(1, 2, 0).numpy(), np.asarray(Image.open(file)))
    halved = functions.pixelate(unit(32), random(), 0.5)
    assert np.allclose(halved[::2, ::2], halved[1::2, 1::2])


def test_drawn_frost_is_the_same_everywhere_and_bluish() -> None:
    panes = corruptions.frost_pictures(None, 1.0, 224)
    assert len(panes) == 5 and all(min(pane.shape[:2]) >= 224 for pane in panes)
    for pane in panes:
        red, _, blue = pane.mean(axis=(0, 1))
        assert blue > red and 0.04 < pane.std() < 0.25
    corruptions._drawn_panes.cache_clear()
    assert np.array_equal(corruptions._drawn_panes()[0], panes[0])


def test_frost_photographs_are_used_and_their_absence_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a folder of photographs"):
        corruptions.check_frost(str(tmp_path))
    Image.new("RGB", (50, 40), (255, 0, 0)).save(tmp_path / "ice.png")
    frosted = Corruption("frost", 5, strengths_for(32), str(tmp_path))(torch.zeros(3, 32, 32), 0)
    assert frosted[0].min() == pytest.approx(0.45) and frosted[1:].max() == 0


def test_other_photographs_of_frost_are_other_images_wherever_they_lie(tmp_path: Path) -> None:
    np.save(tmp_path / "dark.npy", np.tile(np.uint8([0, 1]), 1536).reshape(1, 32, 32, 3))
    source, seen = open_source(tmp_path / "dark.npy"), list[tuple[str, float]]()
    for folder, red in (("one", 255), ("one", 100), ("two", 100)):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (50, 40), (red, 0, 0)).save(tmp_path / folder / "ice.png")
        frost = Corruption("frost", 5, strengths_for(32), str(tmp_path / folder))
        view = frost.in_loader(TrainDataset(source, [Geometry(32)]))[(0, 0, 0)].views[0]
        seen.append((frost.describe(), float(view[0].max())))
    assert seen[0] != seen[1] == seen[2]
    assert seen[0][0] != seen[1][0] and seen[0][1] > 2 * seen[1][1]


def test_water_shines_and_mud_covers() -> None:
    image = np.full((96, 96, 3), 0.5, np.float32)
    water = functions.spatter(image, random(), 0.65, 0.3, 2, 0.68, 0.5, 0)
    assert water.min() == 0.5 and 0.9 < water.max() <= 1
    mud = functions.spatter(image, random(), 0.65, 0.3, 1, 0.65, 1.5, 1)
    assert mud.max() <= 0.5 + 1e-6 and mud[..., 2].min() < mud[..., 0].min()


def test_words_become_names_and_mistakes_sentences() -> None:
    assert choose_corruptions(["common"]) == list(COMMON)
    assert choose_corruptions(["extra", "jpeg-compression"]) == ["jpeg_compression", *EXTRA]
    with pytest.raises(UserError, match="did you mean 'gaussian_noise'"):
        choose_corruptions(["gausian_noise"])


def test_a_dataset_shows_the_same_corrupted_image_to_every_model(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", random().integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    source = open_source(tmp_path / "images.npy", split="all")
    corruption = Corruption("snow", 2, strengths_for(16))
    views = []
    for seed in (0, 1):
        clean = TrainDataset(source, [Geometry(16, crop="center", horizontal_flip=0.0)], seed=seed)
        corrupted = corruption.in_loader(clean)
        views.append([corrupted[(0, 0, index)].views[0] for index in range(3)])
        assert not torch.equal(views[-1][0], clean[(0, 0, 0)].views[0])
    assert all(torch.equal(one, other) for one, other in zip(*views, strict=True))
