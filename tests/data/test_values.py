from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest

from freqmask.data.pixels import ArrayPicture
from freqmask.data.values import ValueRange, survey
from freqmask.errors import UserError


def test_eight_bits_stay_as_they_are_unless_a_range_is_given() -> None:
    image = np.array([[[0, 51, 255]]], dtype=np.uint8)
    assert ValueRange().apply(image) is image
    assert ValueRange(0, 255).apply(image) is image
    np.testing.assert_allclose(ValueRange(0, 102).apply(image), [[[0, 0.5, 1]]])


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("uint16", 0, 65535), ("int16", -32768, 32767), ("float32", 0, 1)]
)
def test_the_range_of_a_type_becomes_zero_to_one(dtype: str, low: float, high: float) -> None:
    scaled = ValueRange().apply(np.array([[[low, (low + high) / 2, high]]], dtype=dtype))
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, [[[0, 0.5, 1]]], atol=1e-5)


def test_values_outside_a_range_are_clamped() -> None:
    scaled = ValueRange(100, 200).apply(np.array([[[50, 150, 900]]], dtype=np.uint16))
    np.testing.assert_allclose(scaled, [[[0, 0.5, 1]]])


@pytest.mark.parametrize("text", ["dtype", "0,4095", "-1.5,2.25", "uint8:0,255/float32:-1.5,2"])
def test_a_range_describes_itself_as_it_is_typed(text: str) -> None:
    parsed = ValueRange.parse(text)
    assert parsed is not None
    assert parsed.describe() == text
    assert ValueRange.parse(parsed.describe()) == parsed


def test_two_numbers_and_auto_are_read() -> None:
    assert ValueRange.parse([0, 10]) == ValueRange(0.0, 10.0)
    assert ValueRange.parse("auto") is None


@pytest.mark.parametrize(
    "text",
    ["automatic", "1", "5,5", "7,3", "1,2,3", "0,nan", "0,inf", "-inf,5", "uint8:5,5", "uint8:1", "word:0,1"],
)
def test_what_is_no_range_is_refused_with_the_way_out(text: str) -> None:
    with pytest.raises(UserError, match="value_range"):
        ValueRange.parse(text)


def test_a_survey_of_photographs_tells_sizes_mean_and_std(memory_source: Any, photographs: Any) -> None:
    images = photographs(6) + photographs(1, height=48, width=20)
    found = survey(memory_source(images))
    assert (found.median_size, found.min_size, found.max_size) == ((24, 32), (24, 20), (48, 32))
    assert found.shorter_side == statistics.median([24] * 6 + [20])
    assert (found.channel_counts, found.dtypes, found.channels) == ({3: 7}, {"uint8": 7}, 3)
    assert found.value_range == ValueRange()
    np.testing.assert_allclose(found.mean, 0.5, atol=0.02)
    np.testing.assert_allclose(found.std, 12**-0.5, atol=0.02)


def test_twelve_bits_in_sixteen_are_found_by_their_percentiles(memory_source: Any) -> None:
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 4096, (1, 30, 30), dtype=np.uint16) for _ in range(20)]
    images[0][0, 0, 0] = 65535  # one hot pixel must not decide
    found = survey(memory_source(images)).value_range
    assert found.low == pytest.approx(4, abs=4)
    assert found.high == pytest.approx(4091, abs=4)


@pytest.mark.parametrize(
    ("dtype", "factor", "high"),
    [
        ("uint16", 1, 255),
        ("uint16", 16, 4095),
        ("uint16", 257, 65535),
        ("float32", 1, 255),
        ("float32", 1 / 255, 1),
    ],
)
def test_mixed_sample_types_get_a_range_each(
    memory_source: Any, photographs: Any, dtype: str, factor: float, high: float
) -> None:
    """An 8-bit image and the same one in another type and scale come out alike, never white or black."""
    images = [*photographs(6), *((image.astype(float) * factor).astype(dtype) for image in photographs(6))]
    seen = survey(memory_source(images))
    assert seen.value_range.limits(np.dtype("uint8")) == (0, 255)
    assert seen.value_range.limits(np.dtype(dtype)) == (0, high)
    assert "sample types" in seen.notes[1] and len(seen.notes) == 2
    photograph = photographs(1)[0].astype(float)
    other = seen.value_range.apply((photograph * factor).astype(dtype))
    np.testing.assert_allclose(other, photograph / 255, atol=0.005)
    assert ValueRange.parse(seen.value_range.describe()) == seen.value_range
    np.testing.assert_allclose(seen.mean, 0.5, atol=0.03)


def test_one_quantity_in_two_types_keeps_one_scale(memory_source: Any) -> None:
    heights = [np.random.default_rng(k).integers(-20, 3000, (1, 30, 30)) for k in range(6)]
    images = [height.astype(("int16", "float32")[k % 2]) for k, height in enumerate(heights)]
    found = survey(memory_source(images)).value_range
    assert found.by_type == () and found.low == pytest.approx(-17, abs=5)


def test_images_that_a_range_makes_black_are_pointed_out(memory_source: Any) -> None:
    """Twelve bits among sixteen in one type, as cameras of two makes write them."""
    generator = np.random.default_rng(0)
    dark = [(generator.random((1, 20, 20)) * 3000).astype(np.uint16) for _ in range(8)]
    full = [(generator.random((1, 20, 20)) * 65000).astype(np.uint16) for _ in range(8)]
    notes = survey(memory_source([*dark, *full])).notes
    assert "8 of 16 images are nearly black" in notes[2] and "--value_range" in notes[2]
    assert len(survey(memory_source(full)).notes) == 2


def test_missing_values_count_neither_for_the_range_nor_for_the_mean(memory_source: Any) -> None:
    image = np.random.default_rng(0).random((1, 20, 20), dtype=np.float32)
    image[0, :10] = np.nan
    found = survey(memory_source([image]), value_range="0,1")
    assert found.mean[0] == pytest.approx(float(np.nanmean(image)), abs=0.02)


def test_nodata_counts_neither_for_the_range_nor_for_the_mean(memory_source: Any) -> None:
    values = np.random.default_rng(0).integers(100, 200, (20, 20, 1), dtype=np.uint16)
    values[:10] = 9999
    picture = ArrayPicture(values)
    picture.nodata = 9999.0
    found = survey(memory_source([picture]))
    assert found.value_range.high == pytest.approx(199, abs=2)
    assert found.mean[0] == pytest.approx(0.5, abs=0.05)


def test_auto_makes_grey_and_color_into_the_commonest_and_skips_other_bands(
    memory_source: Any, photographs: Any
) -> None:
    images = photographs(5) + photographs(2, channels=1)
    found = survey(memory_source([*images, *photographs(1, channels=4)]))
    assert found.channels == 3
    assert [name for name, _ in found.bad] == ["image-7"]
    assert "2 gray images become color, 1 of another count are skipped" in found.notes[0]
    grey = survey(memory_source([*photographs(1), *photographs(3, channels=1)]))
    assert (grey.channels, grey.bad) == (1, []) and "1 color images become gray" in grey.notes[0]
    asked = survey(memory_source(images), channels=1)
    assert (asked.channels, asked.bad, len(asked.mean)) == (1, [], 1)


def test_bad_images_are_listed_with_their_reasons(memory_source: Any, photographs: Any) -> None:
    def broken() -> None:
        raise SyntaxError("broken chunk")

    images = [*photographs(2), "cut off", broken, np.zeros((3, 8, 8), np.uint8)]
    bad = dict(survey(memory_source(images)).bad)
    assert bad["image-2"] == "cut off"
    assert "broken chunk" in bad["image-3"]
    assert "same value" in bad["image-4"]


def test_a_source_of_bad_images_is_refused_with_the_first_reason(memory_source: Any) -> None:
    with pytest.raises(UserError, match="cut off"):
        survey(memory_source(["cut off"] * 3))
    with pytest.raises(UserError, match="12 channels"):
        survey(memory_source([np.random.default_rng(0).random((12, 16, 16))]), channels=3)


def test_a_survey_looks_at_no_more_than_asked_and_at_the_same_ones(
    memory_source: Any, photographs: Any
) -> None:
    source = memory_source(photographs(30))
    first, again = survey(source, count=5, seed=1), survey(source, count=5, seed=1)
    assert first == again
    assert first.count == 5
    assert survey(source, count=5, seed=2).mean != first.mean


@pytest.mark.parametrize("channels", ["three", 0, -1])
def test_channels_must_be_auto_or_a_number(memory_source: Any, photographs: Any, channels: Any) -> None:
    with pytest.raises(UserError, match="channels"):
        survey(memory_source(photographs(1)), channels=channels)


def test_portraits_and_landscapes_have_the_shorter_side_of_each(memory_source: Any, photographs: Any) -> None:
    images = photographs(5, height=20, width=60) + photographs(5, height=60, width=20)
    found = survey(memory_source(images))
    assert found.median_size == (40, 40)
    assert found.shorter_side == statistics.median(min(image.shape[1:]) for image in images)
