from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from freqmask.commands.inference import _WholeImages
from freqmask.data.pixels import (
    check_channels,
    convert_channels,
    fill_missing,
    is_empty,
    missing_pixels,
)
from freqmask.data.sources import open_source
from freqmask.data.transforms import Geometry
from freqmask.data.values import ValueRange, survey
from freqmask.errors import BadImage


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def colour(dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 9, 11)).astype(dtype)


def test_colour_becomes_grey_by_pillows_luma() -> None:
    pillow = Image.fromarray(colour().transpose(1, 2, 0)).convert("L")
    ours = convert_channels(colour(), 1)
    assert ours.dtype == np.uint8
    assert np.abs(ours[0].astype(int) - np.asarray(pillow)).max() <= 1
    assert convert_channels(colour("uint16"), 1).dtype == np.uint16


def test_grey_is_repeated_and_a_fourth_channel_dropped() -> None:
    grey = colour()[:1]
    assert np.array_equal(convert_channels(grey, 3), np.repeat(grey, 3, axis=0))
    four = np.concatenate([colour(), grey])
    assert np.array_equal(convert_channels(four, 3), colour())
    assert np.array_equal(convert_channels(four, 1), convert_channels(colour(), 1))


@pytest.mark.parametrize(
    ("found", "wanted", "convert"), [(12, 3, True), (3, 12, True), (2, 1, True), (4, 3, False), (4, 1, False)]
)
def test_other_channels_are_refused_with_both_counts(found: int, wanted: int, convert: bool) -> None:
    with pytest.raises(BadImage, match=rf"{found} channels.*{wanted}"):
        check_channels(found, wanted, convert)


def test_missing_values_become_their_channels_mean() -> None:
    image = np.array([[[1.0, 3.0, np.nan]], [[-9999.0, 5.0, np.inf]]], dtype=np.float32)
    missing = missing_pixels(image, -9999.0)
    filled = fill_missing(image, missing)
    assert filled.dtype == np.float32
    assert np.array_equal(filled, [[[1, 3, 2]], [[5, 5, 5]]])


def test_a_channel_without_any_value_gets_the_images_mean() -> None:
    image = np.array([[[1.0, 3.0]], [[np.nan, np.nan]]], dtype=np.float32)
    assert np.array_equal(fill_missing(image, missing_pixels(image, None))[1], [[2, 2]])


def test_nodata_in_whole_numbers_is_filled_in_their_type() -> None:
    image = np.array([[[0, 10, 20]]], dtype=np.uint16)
    filled = fill_missing(image, missing_pixels(image, 0))
    assert filled.dtype == np.uint16
    assert filled.tolist() == [[[15, 10, 20]]]


def test_an_image_without_values_is_no_image(tmp_path: Path) -> None:
    """A tile beside the satellite's track: predict wrote a mask of it, of a network that was shown NaN."""
    values = np.random.default_rng(0).normal(size=(3, 40, 50)).astype(np.float32)
    values[1] = -9999
    for number, plane in enumerate(values):
        tifffile.imwrite(tmp_path / f"{number}.tif", plane, extratags=[(42113, "s", 0, "-9999", True)])
    geometry = Geometry(32, crop="whole", horizontal_flip=0.0)
    images = _WholeImages(open_source(tmp_path), [geometry], ValueRange(-3, 3), 1)
    sample = images[(0, 0, 1)]
    assert set(sample.skipped) == {("1.tif", "all its values are missing (NaN or nodata)")}
    assert sample.index != 1 and bool(torch.isfinite(sample.views[0]).all())


def test_a_survey_passes_over_what_was_measured_between_its_pixels(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2, 8, 400)).astype(np.float32)
    seen = np.linspace(0, 399, 32).astype(int)
    values[1][:, seen] = np.nan
    values[1][:, np.arange(400) % 6 != (seen[1] + 1) % 6] = np.nan
    for number, plane in enumerate(values):
        np.save(tmp_path / f"{number}.npy", plane)
    found = survey(open_source(tmp_path))
    assert np.isfinite(found.mean).all() and np.isfinite(found.std).all()


def test_a_full_image_is_not_copied() -> None:
    image = colour()
    assert missing_pixels(image, None) is None
    assert fill_missing(image, None) is image


@pytest.mark.parametrize(("missing_rows", "empty"), [(95, True), (85, False)])
def test_nine_tenths_missing_are_too_many(missing_rows: int, empty: bool) -> None:
    image = np.random.default_rng(0).random((2, 100, 10), dtype=np.float32)
    image[:, :missing_rows] = np.nan
    reason = is_empty(image, missing_pixels(image, None))
    assert (reason is not None) == empty
    assert reason is None or "95%" in reason


def test_a_constant_image_is_empty_and_one_other_pixel_is_content() -> None:
    image = np.full((3, 20, 20), 7, dtype=np.uint8)
    assert is_empty(image, None) == "every pixel has the same value"
    image[1, 13, 13] = 8
    assert is_empty(image, None) is None
