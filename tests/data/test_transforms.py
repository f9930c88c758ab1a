from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from freqmask.data.pixels import ArrayPicture, Box
from freqmask.data.transforms import CROPS, Geometry, decode_windows, resize
from freqmask.errors import UserError


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (channels, height, width), dtype=np.uint8)


class CountingPicture(ArrayPicture):
    """Remembers every box that was decoded."""

    def __init__(self, image: np.ndarray) -> None:
        super().__init__(np.ascontiguousarray(image.transpose(1, 2, 0)))
        self.boxes: list[Box | None] = []

    def decode(self, box: Box | None = None, at_least: tuple[int, int] | None = None) -> np.ndarray:
        self.boxes.append(box)
        return super().decode(box, at_least)


@pytest.mark.parametrize("size", [(24, 24), (7, 40), (100, 90)])
def test_resizing_bytes_is_pillows_bicubic_to_one_level(size: tuple[int, int]) -> None:
    image = noise(61, 83)
    pillow = Image.fromarray(image.transpose(1, 2, 0)).resize(size[::-1], Image.Resampling.BICUBIC)
    ours = resize(torch.from_numpy(image), size).numpy().astype(int)
    assert np.abs(ours - np.asarray(pillow).transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize("size", [(24, 24), (100, 90)])
def test_resizing_floats_is_pillows_bicubic_clamped(size: tuple[int, int]) -> None:
    image = noise(61, 83, channels=1).astype(np.float32)[0] / 255
    pillow = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
    ours = resize(torch.from_numpy(image)[None], size)[0]
    np.testing.assert_allclose(ours, np.asarray(pillow).clip(0, 1), atol=2e-5)


def test_windows_are_distributed_as_torchvisions() -> None:
    picture, count = (375, 500), 1500
    geometry = Geometry(224, scale=(0.2, 1.0))
    ours = np.array([geometry.box(picture, key) for key in range(count)], dtype=float)
    blank = torch.empty(3, *picture)
    torch.manual_seed(0)
    theirs = np.array(
        [RandomResizedCrop.get_params(blank, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], dtype=float
    )
    for statistic in (
        lambda boxes: boxes[:, 2] * boxes[:, 3] / (375 * 500),
        lambda boxes: np.log(boxes[:, 3] / boxes[:, 2]),
        lambda boxes: boxes[:, 0] / 375,
        lambda boxes: boxes[:, 1] / 500,
    ):
        quartiles = [np.quantile(statistic(boxes), [0.1, 0.25, 0.5, 0.75, 0.9]) for boxes in (ours, theirs)]
        np.testing.assert_allclose(quartiles[0], quartiles[1], atol=0.035)


@settings(max_examples=60, deadline=None)
@given(
    picture=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    view=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    key=st.integers(-(2**63), 2**63 - 1),
    crop=st.sampled_from(CROPS),
)
def test_a_window_lies_inside_the_picture(
    picture: tuple[int, int], view: tuple[int, int], key: int, crop: str
) -> None:
    top, left, height, width = Geometry(view, crop=crop).box(picture, key)
    assert min(top, left) >= 0
    assert min(height, width) >= 1
    assert top + height <= picture[0]
    assert left + width <= picture[1]


def test_a_window_is_the_same_in_every_release() -> None:
    assert Geometry(224).box((375, 500), 12345) == (3, 1, 372, 396)


def test_a_picture_that_no_window_fits_gives_its_largest_centred_one() -> None:
    assert Geometry(10, scale=(1.0, 1.0)).box((10, 300), key=1) == (0, 145, 10, 10)


def test_a_view_hangs_on_its_key_alone() -> None:
    geometry, image = Geometry(16), torch.from_numpy(noise(40, 50))
    boxes = {geometry.box((40, 50), key) for key in (1, 1, 1)}
    assert len(boxes) == 1
    assert torch.equal(geometry.finish(image, 5), geometry.finish(image, 5))
    assert len({geometry.box((40, 50), key) for key in range(20)}) > 15
    assert geometry.box((40, 50), 1, attempt=1) != geometry.box((40, 50), 1)


def test_half_of_the_views_are_mirrored() -> None:
    geometry, image = Geometry(4), torch.arange(16, dtype=torch.uint8).reshape(1, 4, 4)
    mirrored = [torch.equal(geometry.finish(image, key), image.flip(-1)) for key in range(400)]
    straight = [torch.equal(geometry.finish(image, key), image) for key in range(400)]
    assert sum(mirrored) + sum(straight) == 400
    assert 160 < sum(mirrored) < 240


def test_quarter_turns_and_vertical_flips_reach_all_eight_attitudes() -> None:
    geometry = Geometry(4, vertical_flip=0.5, quarter_turns=True)
    image = torch.arange(16, dtype=torch.uint8).reshape(1, 4, 4)
    assert len({tuple(geometry.finish(image, key).flatten().tolist()) for key in range(200)}) == 8


def test_native_windows_are_cut_without_resampling() -> None:
    image = noise(50, 70)
    geometry = Geometry((16, 20), crop="native", horizontal_flip=0.0)
    top, left, height, width = geometry.box((50, 70), key=3)
    view = geometry.finish(torch.from_numpy(image[:, top : top + height, left : left + width].copy()), 3)
    assert np.array_equal(view, image[:, top : top + 16, left : left + 20])
    assert geometry.at_least() is None
    tops = {geometry.box((18, 20), key)[0] for key in range(60)}
    assert tops == {0, 1, 2}


@pytest.mark.parametrize("crop", CROPS)
def test_a_picture_smaller_than_the_view_is_enlarged(crop: str) -> None:
    image, geometry = noise(5, 9), Geometry((16, 12), crop=crop)
    (window,) = decode_windows(CountingPicture(image), [geometry.box((5, 9), 1)], [geometry.at_least()])
    assert geometry.finish(torch.from_numpy(window), 1).shape == (3, 16, 12)


def test_the_centred_window_has_the_shape_of_the_view() -> None:
    assert Geometry((10, 20), crop="center").box((100, 100), 0) == (25, 0, 50, 100)
    assert Geometry(10, crop="whole").box((30, 50), 0) == (0, 0, 30, 50)


def test_overlapping_windows_are_decoded_together_and_alike() -> None:
    image = noise(40, 60)
    boxes = [(2, 3, 30, 40), (8, 10, 32, 45)]
    picture = CountingPicture(image)
    windows = decode_windows(picture, boxes, [(32, 32), (32, 32)])
    assert len(picture.boxes) == 1
    for (top, left, height, width), window in zip(boxes, windows, strict=True):
        assert np.array_equal(window, image[:, top : top + height, left : left + width])


def test_windows_far_apart_are_decoded_one_by_one() -> None:
    picture = CountingPicture(noise(100, 100))
    boxes = [(0, 0, 10, 10), (90, 90, 10, 10)]
    decode_windows(picture, boxes, [None, None])
    assert picture.boxes == boxes


def test_windows_cut_out_of_a_reduced_decoding_keep_the_pixels_asked_for() -> None:
    class Reduced(CountingPicture):
        def decode(self, box: Box | None = None, at_least: tuple[int, int] | None = None) -> np.ndarray:
            assert at_least is not None
            assert box is not None
            assert box[2] // 2 >= at_least[0]
            assert box[3] // 2 >= at_least[1]
            return super().decode(box)[:, ::2, ::2]

    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (3, 200, 200))
    windows = decode_windows(Reduced(ramp), [(0, 0, 160, 160), (20, 20, 160, 170)], [(40, 40), (40, 40)])
    assert windows[0].shape == (3, 80, 80)
    assert windows[1].shape == (3, 80, 85)
    assert abs(int(windows[1][0, 0, 0]) - 20) <= 1


def test_all_wrong_settings_are_named_in_one_message() -> None:
    with pytest.raises(UserError) as caught:
        Geometry((16, 8), scale=(0.5, 0.2), crop="natve", horizontal_flip=2.0, quarter_turns=True)
    for word in ("crop_scale", "'native'", "horizontal_flip", "quarter_turns"):
        assert word in str(caught.value)
