"""Scientific TIFF: every band, page and bit arrives as it was stored."""

import io

import numpy as np
import pytest
import tifffile

from freqmask.data.decode import open_bytes
from freqmask.data.tiff import count_tiff_images, open_tiff
from freqmask.errors import BadImage

GENERATOR = np.random.default_rng(0)


def written(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def numbers(dtype, *shape):
    if np.dtype(dtype).kind == "f":
        return GENERATOR.normal(size=shape).astype(dtype)
    limits = np.iinfo(dtype)
    return GENERATOR.integers(limits.min, limits.max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
def test_grey_images_arrive_as_stored(dtype, compression):
    pixels = numbers(dtype, 20, 31)
    picture = open_bytes(written(pixels, compression=compression))
    assert (picture.size, picture.channels, picture.dtype) == ((20, 31), 1, dtype)
    np.testing.assert_array_equal(picture.decode((2, 3, 10, 20))[0], pixels[2:12, 3:23])


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_twelve_bands_arrive_planar_or_interleaved(planar):
    bands = numbers("uint16", 12, 20, 31)
    stored = bands if planar == "separate" else bands.transpose(1, 2, 0)
    picture = open_bytes(
        written(stored, photometric="minisblack", planarconfig=planar, compression="lzw", predictor=True)
    )
    assert (picture.size, picture.channels) == ((20, 31), 12)
    np.testing.assert_array_equal(picture.decode(), bands)
    np.testing.assert_array_equal(picture.decode((5, 6, 7, 8)), bands[:, 5:12, 6:14])


def test_twelve_bits_packed_in_bytes_are_unpacked():
    pixels = GENERATOR.integers(0, 4096, (20, 30), np.uint16)
    picture = open_bytes(written(pixels, bitspersample=12))
    assert picture.dtype == "uint16"
    np.testing.assert_array_equal(picture.decode()[0], pixels)


@pytest.mark.parametrize(
    ("stored", "handed_on"),
    [("float64", "float32"), ("uint32", "float32"), ("int8", "int16"), ("bool", "uint8")],
)
def test_other_sample_types_become_the_next_that_holds_them(stored, handed_on):
    pixels = GENERATOR.integers(0, 2, (8, 9)).astype(stored)
    picture = open_bytes(written(pixels, photometric="minisblack"))
    decoded = picture.decode()
    assert picture.dtype == decoded.dtype.name == handed_on
    np.testing.assert_array_equal(decoded[0], pixels.astype(handed_on) * (255 if stored == "bool" else 1))


def test_colour_and_its_alpha():
    pixels = numbers("uint8", 10, 12, 4)
    pixels[..., 3] = 255
    pixels[0, 0, 3] = 0
    decoded = open_bytes(written(pixels, photometric="rgb", extrasamples=["unassalpha"])).decode()
    assert decoded.shape == (3, 10, 12) and decoded[:, 0, 0].tolist() == [255] * 3
    np.testing.assert_array_equal(decoded[:, 1:], pixels[1:, :, :3].transpose(2, 0, 1))


def test_a_fourth_band_without_meaning_stays_a_band():
    pixels = numbers("uint8", 10, 12, 4)
    picture = open_bytes(written(pixels, photometric="rgb", extrasamples=["unspecified"]))
    assert picture.channels == 4
    np.testing.assert_array_equal(picture.decode(), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("colour", [False, True])
def test_pages_are_channels_or_images(tmp_path, colour):
    pages = numbers("uint16", 5, 20, 31, *([3] if colour else []))
    path = tmp_path / "stack.tif"
    path.write_bytes(written(pages, photometric="rgb" if colour else "minisblack", compression="lzw"))
    planes = pages.transpose(0, 3, 1, 2) if colour else pages[:, None]
    together = open_tiff(path, "channels")
    assert together.channels == (15 if colour else 5)
    np.testing.assert_array_equal(together.decode(), planes.reshape(-1, 20, 31))
    assert count_tiff_images(path) == 5
    for page in (0, 4):
        picture = open_tiff(path, "images", page)
        assert picture.channels == planes.shape[1]
        np.testing.assert_array_equal(picture.decode((1, 2, 3, 4)), planes[page, :, 1:4, 2:6])


def test_an_imagej_stack_keeps_named_channels_together():
    stack = numbers("uint16", 6, 2, 20, 31)  # slice, channel
    data = written(stack, imagej=True, metadata={"axes": "ZCYX"})
    assert count_tiff_images(data) == 6
    np.testing.assert_array_equal(open_tiff(data, "images", 4).decode(), stack[4])
    np.testing.assert_array_equal(open_tiff(data, "channels").decode(), stack.reshape(12, 20, 31))


def test_the_value_for_not_measured_is_known():
    data = written(numbers("float32", 8, 8), extratags=[(42113, "s", 0, "-9999", True)])
    assert open_bytes(data).nodata == -9999
    assert open_bytes(written(numbers("uint8", 8, 8))).nodata is None
    assert (
        open_bytes(written(numbers("uint8", 8, 8), extratags=[(42113, "s", 0, "none", True)])).nodata is None
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (written(np.full((8, 8), np.nan, np.float32)), "NaN"),
        (written(numbers("uint16", 200, 200), compression="lzw")[:5000], "truncated|damaged"),
        (b"II*\x00" + bytes(100), "truncated|damaged"),
        (written(np.zeros((8, 8), np.complex64)), "complex"),
    ],
    ids=["nan", "truncated", "no directory", "complex"],
)
def test_a_bad_tiff_is_named_in_words(data, words):
    with pytest.raises(BadImage, match=words):
        open_bytes(data).decode()


def test_a_single_nan_is_no_reason_to_refuse():
    pixels = numbers("float32", 8, 8)
    pixels[0] = np.nan
    np.testing.assert_array_equal(open_bytes(written(pixels)).decode()[0], pixels)


def test_a_tiff_that_claims_too_much_is_a_bomb(monkeypatch):
    monkeypatch.setattr("freqmask.data.pixels.MOST_SAMPLES", 100)
    assert open_bytes(written(numbers("uint8", 10, 10))).size == (10, 10)
    with pytest.raises(BadImage, match="bomb"):
        open_bytes(written(numbers("uint8", 10, 11)))
