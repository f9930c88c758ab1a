"""Whatever is claimed to be read is right, whole, in a window and reduced; what cannot be read rightly is refused."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from odd_images import ARITHMETIC_JPEG, Case, all_cases, noise, planes, png_of, tiff_bytes
from PIL import Image

from freqmask.data import decode
from freqmask.data.decode import count_images, open_bytes, open_file, suffix_of
from freqmask.data.pixels import missing_pixels
from freqmask.errors import BadImage
from freqmask.evaluation.mask_files import read_mask

CASES = all_cases()


def check(pixels: np.ndarray, wanted: np.ndarray, within: float, what: str) -> None:
    assert pixels.shape == wanted.shape, what
    off = np.abs(pixels.astype(np.float64) - wanted)
    assert np.nanmax(off) <= within, f"{what}: off by up to {np.nanmax(off)}"


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_file_shows_what_other_readers_say_that_it_holds(case: Case) -> None:
    picture = open_bytes(case.data)
    whole = picture.decode()
    assert (whole.shape, whole.dtype) == ((picture.channels, *picture.size), picture.dtype)
    check(whole, case.pixels, case.within, "whole")
    height, width = picture.size
    for top, left, tall, wide in (
        (0, 0, 1, 1),
        (3, 7, 21, 30),
        (height // 2, width // 3, height // 3, width // 4),
    ):
        tall, wide = min(tall, height - top), min(wide, width - left)
        window = open_bytes(case.data).decode((top, left, tall, wide))
        np.testing.assert_array_equal(window, whole[:, top : top + tall, left : left + wide])
        assert window.flags.writeable


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_reduced_decoding_is_the_same_picture(case: Case) -> None:
    picture = open_bytes(case.data)
    height, width = picture.size
    small = picture.decode(None, (height // 4, width // 4))
    if not case.name.startswith(("jpeg ", "pillow MPO", "pillow JPEG turn")):
        np.testing.assert_array_equal(small, picture.decode())
        return
    assert small.shape == (picture.channels, height // 4, width // 4)
    image = Image.open(io.BytesIO(case.data))
    if not any(word in case.name for word in ("arithmetic", "lossless", "turn")):
        image.draft(image.mode, (image.width // 4, image.height // 4))
        shown = planes(np.asarray(image.convert("RGB" if picture.channels == 3 else "L")))
        np.testing.assert_array_equal(small, shown[:, : height // 4, : width // 4])
        return
    whole = case.pixels[:, : height // 4 * 4, : width // 4 * 4].astype(float)
    blocks = whole.reshape(-1, height // 4, 4, width // 4, 4).mean((2, 4))
    assert np.abs(small - blocks).mean() < 8
    assert abs(small.mean() - case.pixels.mean()) < 1


@pytest.mark.parametrize("page", [0, 3])
@pytest.mark.parametrize("options", [{}, {"tile": (16, 16), "compression": "zlib"}], ids=str)
def test_one_page_of_an_inverted_stack_is_an_image(page: int, options: dict[str, Any]) -> None:
    stack = noise(16, 4, 37, 50)
    picture = open_bytes(tiff_bytes(stack, photometric="miniswhite", **options), "images", page)
    assert picture.channels == 1
    np.testing.assert_array_equal(picture.decode((3, 4, 20, 21))[0], 65535 - stack[page, 3:23, 4:25])


def test_nodata_follows_its_values() -> None:
    tag = [(42113, "s", 0, "7", True)]
    assert open_bytes(tiff_bytes(noise(16, 9, 9), photometric="miniswhite", extratags=tag)).nodata == 65528
    assert open_bytes(tiff_bytes(noise(8, 9, 9), photometric="minisblack", extratags=tag)).nodata == 7


def test_nodata_of_float64_is_missing() -> None:
    """R and GDAL put the least number of the type where nothing was measured, which float32 lacks."""
    array = np.random.default_rng(0).normal(size=(9, 9))
    array[:3] = least = np.finfo(np.float64).min
    tag = [(42113, "s", 0, str(least), True)]
    picture = open_bytes(tiff_bytes(array, photometric="minisblack", extratags=tag))
    missing = missing_pixels(picture.decode(), picture.nodata)
    np.testing.assert_array_equal(missing, (array == least)[None])


def test_no_page_is_left_out_of_an_image_in_silence(tmp_path: Path) -> None:
    path, pages = tmp_path / "stack.tif", noise(16, 3, 20, 30)
    with tifffile.TiffWriter(path) as writer:
        for page, compression in zip(pages, ("zlib", None, "zlib"), strict=True):
            writer.write(page, photometric="minisblack", metadata=None, compression=compression)
    with pytest.raises(BadImage, match="--pages images"):
        open_file(path)
    read = [open_file(path, "images", page).decode()[0] for page in range(count_images(path, "images"))]
    assert sorted(page.tobytes() for page in read) == sorted(page.tobytes() for page in pages)


def test_every_file_of_a_series_counts_for_its_own_pixels(tmp_path: Path) -> None:
    """OME headers name all files of a series, and tifffile would open the others."""
    names = [f"plane{k}.ome.tif" for k in range(3)]
    ids = [f"urn:uuid:{k:08d}-0000-0000-0000-000000000000" for k in range(3)]
    data = "".join(
        f'<TiffData FirstZ="{k}" IFD="0" PlaneCount="1"><UUID FileName="{names[k]}">{ids[k]}</UUID></TiffData>'
        for k in range(3)
    )
    stack = noise(8, 3, 20, 30)
    for k, name in enumerate(names):
        header = (
            f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{ids[k]}">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="30" SizeY="20" '
            f'SizeZ="3" SizeC="1" SizeT="1"><Channel ID="Channel:0"/>{data}</Pixels></Image></OME>'
        )
        tifffile.imwrite(tmp_path / name, stack[k], description=header, metadata=None)
    assert tifffile.imread(tmp_path / names[0]).shape == (3, 20, 30)  # tifffile alone follows the header
    for k, name in enumerate(names):
        for pages in ("channels", "images"):
            np.testing.assert_array_equal(open_file(tmp_path / name, pages).decode()[0], stack[k])
        assert count_images(tmp_path / name, "images") == 1
        np.testing.assert_array_equal(read_mask(tmp_path / name), stack[k])


def test_pages_of_several_sizes_are_images_of_their_own(tmp_path: Path) -> None:
    path, pages = tmp_path / "letters.tif", [noise(8, 20, 30), noise(8, 25, 31), noise(16, 20, 30)]
    with tifffile.TiffWriter(path) as writer:
        for page in pages:
            writer.write(page, photometric="minisblack", metadata=None)
        writer.write(noise(8, 5, 7), photometric="minisblack", metadata=None, subfiletype=1)  # a preview
    assert count_images(path, "images") == 3
    for number, page in enumerate(pages):
        np.testing.assert_array_equal(open_file(path, "images", number).decode()[0], page)
    np.testing.assert_array_equal(open_file(path).decode()[0], pages[0])


DEEP = noise(16, 20, 30)
SIGNED = DEEP.astype(np.int16)
JP2 = imagecodecs.jpeg2k_encode(np.dstack([DEEP] * 3), level=0)
YCC = JP2.replace(b"colr\x01\0\0" + struct.pack(">I", 16), b"colr\x01\0\0" + struct.pack(">I", 18))
MOSAIC = [(33421, "H", 2, (2, 2), True), (33422, "B", 4, (0, 1, 1, 2), True)]


def turned_pages() -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for turn in (1, 6):
            writer.write(DEEP, metadata=None, extratags=[(274, 3, 1, turn, True)], contiguous=False)
    return file.getvalue()


REFUSED = {
    "12-bit JPEG": (imagecodecs.jpeg8_encode(DEEP >> 4, bitspersample=12), "12 bits"),
    "arithmetic JPEG, cut off": (ARITHMETIC_JPEG[:600], "truncated"),
    "PGM, cut off": (b"P5 30 20 4095\n" + bytes(600), "truncated"),
    "PGM above its maxval": (b"P5 2 1 300\n" + struct.pack(">2H", 5, 301), "above 300"),
    "PGM of 20 bits": (b"P5 2 1 1000000\n" + bytes(8), "65535"),
    "PGM, a bomb": (b"P5 99999 99999 4095\n", "bomb"),
    "PNG, cut off": (png_of(DEEP, 16, 0)[:100], "truncated|damaged"),
    "PNG without its palette": (png_of(noise(4, 9, 9), 4, 3), "damaged|truncated"),
    "JPEG 2000 in YCC": (YCC, "YCC"),
    "JPEG 2000, signed": (imagecodecs.jpeg2k_encode(SIGNED, level=0), "signed"),
    "signed MINISWHITE": (tiff_bytes(SIGNED, photometric="miniswhite"), "white"),
    "float MINISWHITE": (tiff_bytes(DEEP.astype(np.float32), photometric="miniswhite"), "white"),
    "signed alpha": (
        tiff_bytes(
            np.dstack([SIGNED] * 2), photometric="minisblack", planarconfig="contig", extrasamples=[2]
        ),
        "signed",
    ),
    "multiplied inks": (tiff_bytes(np.dstack([DEEP] * 5), photometric="separated", extrasamples=[1]), "inks"),
    "other inks": (
        tiff_bytes(np.dstack([DEEP] * 4), photometric="separated", extratags=[(332, "H", 1, 2, True)]),
        "SEPARATED",
    ),
    "raw sensor": (tiff_bytes(DEEP, photometric="cfa", extratags=MOSAIC), "CFA"),
    "16-bit Lab": (tiff_bytes(np.dstack([DEEP] * 3), photometric="cielab"), "CIELAB"),
    "pages turned differently": (turned_pages(), "turned differently"),
    "complex": (tiff_bytes(DEEP.astype(np.complex64)), "complex"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    "WMF": (b"\xd7\xcd\xc6\x9a" + bytes(100), "not an image"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_rightly_is_refused_with_its_reason(name: str) -> None:
    data, words = REFUSED[name]
    with pytest.raises(BadImage, match=words):
        open_bytes(data).decode()


@pytest.mark.parametrize(
    ("beginning", "avif", "reason"),
    [
        (b"\xff\x0a", True, "it is JPEG XL, which is not read; convert it to PNG or TIFF"),
        (
            b"\x00\x00\x00\x0cJXL \r\n\x87\n",
            True,
            "it is JPEG XL, which is not read; convert it to PNG or TIFF",
        ),
        (b"\x00\x00\x00\x18ftypheic", True, "it is HEIC, which needs a reader; pip install 'freqmask[data]'"),
        (
            b"\x00\x00\x00\x18ftypavif",
            False,
            "it is AVIF, which this Pillow lacks; pip install --upgrade pillow",
        ),
        (b"\x00\x00\x00\x18ftypavif", True, "its content is not an image of any known format"),
    ],
)
def test_formats_without_a_reader_are_named_whatever_the_file_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beginning: bytes, avif: bool, reason: str
) -> None:
    monkeypatch.setattr("freqmask.data.decode.AVIF", ("AVIF",) if avif else ())
    heif_free = frozenset(suffix for suffix in decode.read_suffixes() if "hei" not in suffix)
    monkeypatch.setattr(decode, "read_suffixes", lambda: heif_free)
    (tmp_path / "a.jpg").write_bytes(beginning + bytes(100))
    with pytest.raises(BadImage) as told:
        open_file(tmp_path / "a.jpg")
    assert told.value.reason == reason


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "TIFF"])
def test_bytes_without_a_name_get_the_suffix_of_their_format(format: str) -> None:
    if format not in Image.SAVE and format not in Image.registered_extensions().values():
        pytest.skip("this Pillow does not write it")
    Image.new("RGB", (20, 16), "red").save(file := io.BytesIO(), format)
    suffix = suffix_of(file.getvalue(), "")
    assert Image.registered_extensions()[suffix] == format
    assert suffix_of(file.getvalue(), "a/B.JPE") == ".jpe"
