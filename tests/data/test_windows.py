"""The windows of a batch are those of its images one by one, which are those of a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freqmask.data.transforms import CROPS, TRIES, Geometry, draw_flips, smallest_side
from freqmask.rng import uniform_numbers

KEYS = st.integers(-(2**63), 2**63 - 1)
SIDES = st.integers(1, 300)


def one_by_one(geometry: Geometry, sizes: torch.Tensor, keys: torch.Tensor, attempt: int) -> list[list[int]]:
    pairs = zip(sizes.tolist(), keys.tolist(), strict=True)
    boxes = [list(geometry.box((height, width), key, attempt)) for (height, width), key in pairs]
    if geometry.crop == "resized":
        pairs = zip(sizes.tolist(), keys.tolist(), strict=True)
        assert boxes == [plainly(geometry, height, width, key, attempt) for (height, width), key in pairs]
    return boxes


def plainly(geometry: Geometry, height: int, width: int, key: int, attempt: int) -> list[int]:
    """torchvision's RandomResizedCrop.get_params, number by number, with the key's draws."""
    top, left, *numbers = uniform_numbers(key, f"crop/{attempt}", 2 * TRIES + 2)
    tall, wide = geometry.size
    low, high = (math.log(ratio) for ratio in geometry.ratio)
    for first, second in zip(numbers[::2], numbers[1::2], strict=True):
        area = height * width * (geometry.scale[0] + first * (geometry.scale[1] - geometry.scale[0]))
        aspect = wide / tall * math.exp(low + second * (high - low))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return [int(top * (height - h + 1)), int(left * (width - w + 1)), h, w]
    factor = min(height / tall, width / wide)
    h, w = max(1, min(height, round(tall * factor))), max(1, min(width, round(wide * factor)))
    return [(height - h) // 2, (width - w) // 2, h, w]


@settings(max_examples=100, deadline=None)
@given(
    pictures=st.lists(st.tuples(SIDES, SIDES, KEYS), min_size=1, max_size=8),
    view=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    smallest=st.floats(0.01, 1),
    ratio=st.floats(1, 4),
    crop=st.sampled_from(CROPS),
    attempt=st.integers(0, 3),
    center_share=st.floats(0.1, 1),
)
def test_windows_are_those_drawn_one_by_one(
    pictures: list[tuple[int, int, int]],
    view: tuple[int, int],
    smallest: float,
    ratio: float,
    crop: str,
    attempt: int,
    center_share: float,
) -> None:
    geometry = Geometry(view, (smallest, 1.0), (1 / ratio, ratio), crop, center_share=center_share)
    sizes = torch.tensor([picture[:2] for picture in pictures])
    keys = torch.tensor([picture[2] for picture in pictures])
    boxes = geometry.boxes(sizes, keys, attempt)
    assert boxes.tolist() == one_by_one(geometry, sizes, keys, attempt)
    for (height, width), box in zip(sizes.tolist(), boxes.tolist(), strict=True):
        assert min(box[2:]) >= smallest_side(geometry, (height, width)) >= 1


def test_many_usual_windows_are_those_drawn_one_by_one() -> None:
    geometry = Geometry(32, scale=(0.5, 1.0))
    keys = torch.arange(3000)
    sizes = torch.stack((20 + keys % 77, 20 + keys % 61), dim=1)
    assert geometry.boxes(sizes, keys).tolist() == one_by_one(geometry, sizes, keys, 0)


@pytest.mark.parametrize("turns", [False, True])
def test_views_are_mirrored_and_turned_as_one_by_one(turns: bool) -> None:
    geometry = Geometry(4, horizontal_flip=0.7, vertical_flip=0.3, quarter_turns=turns)
    image = torch.arange(16, dtype=torch.uint8).reshape(1, 4, 4)
    keys = torch.arange(200)
    for key, (mirrored, upside_down, exchanged) in zip(
        keys, draw_flips(geometry, keys).tolist(), strict=True
    ):
        view = image.flip(-1) if mirrored else image
        view = view.flip(-2) if upside_down else view
        assert torch.equal(view.mT if exchanged else view, geometry.finish(image, int(key)))
