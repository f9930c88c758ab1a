"""Photographs: bit for bit what Pillow shows, faster."""

import contextlib
import io
import os
import re
import struct
import subprocess
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

import freqmask
from freqmask.data.decode import jpeg_reduction, open_bytes, open_file, quiet_pillow, shorten_jpeg
from freqmask.errors import BadImage, UserError
from freqmask.evaluation.corruptions import _photographs as check_frost_photographs
from freqmask.evaluation.mask_files import read_mask
from freqmask.reporting import page as pictures

GENERATOR = np.random.default_rng(0)


def smooth(height, width, channels=3):
    """A picture with structure at every scale, so that a shifted row would show."""
    small = GENERATOR.integers(0, 256, (height // 7 + 2, width // 5 + 2, channels), np.uint8)
    mode = {1: "L", 3: "RGB"}[channels]
    return Image.fromarray(small.squeeze()).convert(mode).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pillow_pixels(data, mode="RGB"):
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(mode))
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3}], ids=str
)
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_pixels_equal_pillows_in_every_box(options, channels):
    data = encoded(smooth(203, 157, channels), quality=90, **options)
    whole = pillow_pixels(data, "L" if channels == 1 else "RGB")
    picture = open_bytes(data)
    assert (picture.size, picture.channels, picture.dtype) == ((203, 157), channels, "uint8")
    np.testing.assert_array_equal(picture.decode(), whole)
    for top in (0, 1, 15, 16, 31, 47, 100):
        for height in (1, 2, 17, 32, 64, 103):
            part = picture.decode((top, 3, height, 50))
            np.testing.assert_array_equal(part, whole[:, top : top + height, 3:53])


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_box_lies_in_the_rotated_image(number, kind):
    exif = Image.Exif()
    exif[274] = number
    data = encoded(smooth(60, 90), kind, exif=exif)
    picture, whole = open_bytes(data), pillow_pixels(data)
    assert picture.size == whole.shape[1:] == ((60, 90) if number < 5 else (90, 60))
    np.testing.assert_array_equal(picture.decode(), whole)
    np.testing.assert_array_equal(picture.decode((5, 9, 20, 31)), whole[:, 5:25, 9:40])


def test_a_jpeg_comes_back_reduced_where_the_box_keeps_enough_pixels():
    exif = Image.Exif()
    exif[274] = 6
    picture = open_bytes(encoded(smooth(800, 1201), exif=exif))
    assert picture.decode(at_least=(300, 200)).shape == (3, 300, 200)
    part = picture.decode((120, 40, 500, 640), at_least=(224, 224))
    assert part.shape == (3, 250, 320)
    reference = picture.decode((120, 40, 500, 640))
    averaged = reference.reshape(3, 250, 2, 320, 2).mean((2, 4))
    off = np.abs(part - averaged).mean()
    assert off < 6  # the same place of the picture: a shift by one pixel either way fits worse
    for shift, axis in ((-1, 1), (1, 1), (-1, 2), (1, 2)):
        assert np.abs(np.roll(part, shift, axis) - averaged).mean() > 1.5 * off


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("number", [1, 3, 5, 6])
@pytest.mark.parametrize("at_least", [None, (20, 20)])
def test_pixels_are_writable_and_channels_last(kind, number, at_least):
    exif = Image.Exif()
    exif[274] = number
    pixels = open_bytes(encoded(smooth(90, 120), kind, exif=exif)).decode((10, 20, 60, 50), at_least)
    assert pixels.flags.writeable and min(pixels.strides) > 0
    if number != 5:
        assert pixels.transpose(1, 2, 0).flags.c_contiguous


def test_a_reduced_jpeg_never_falls_below_what_was_asked():
    for side in (223, 224, 447, 448, 449, 1791, 1792, 5000):
        factor = jpeg_reduction((0, 0, side, side), (224, 224))
        assert side // factor >= min(side, 224) and (factor == 8 or side // (2 * factor) < 224)


def test_a_shortened_jpeg_keeps_every_row_asked_for():
    data = encoded(smooth(640, 64), subsampling=2)
    whole = pillow_pixels(data)
    for rows in (1, 31, 32, 33, 200):
        short = shorten_jpeg(data, rows, 640)
        pixels = pillow_pixels(short)
        assert rows <= pixels.shape[1] < 640
        np.testing.assert_array_equal(pixels[:, :rows], whole[:, :rows])
    assert shorten_jpeg(data, 600, 640) is data


def test_transparent_pixels_lie_over_white():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0], pixels[:2, :, 3] = 200, 255
    decoded = open_bytes(encoded(Image.fromarray(pixels), "PNG")).decode()
    assert decoded.shape == (3, 4, 4)
    assert decoded[:, 0, 0].tolist() == [200, 0, 0] and decoded[:, 3, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("mode", "kind", "channels"),
    [("1", "PNG", 1), ("P", "PNG", 3), ("P", "GIF", 3), ("CMYK", "JPEG", 3), ("LA", "PNG", 1),
     ("RGB", "WEBP", 3), ("RGB", "BMP", 3), ("L", "BMP", 1)],
)  # fmt: skip
def test_modes_become_grey_or_colour(mode, kind, channels):
    image = smooth(20, 30).convert(mode)
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    picture = open_bytes(data)
    decoded = picture.decode()
    assert picture.channels == channels and decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pillow_pixels(data, "L" if channels == 1 else "RGB"))


def test_a_gif_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_bytes(data).decode()[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3), (5, 6, 4)])
def test_a_16_bit_png_keeps_its_16_bits(shape):
    import imagecodecs

    pixels = GENERATOR.integers(0, 65536, shape, np.uint16)
    if shape[-1] == 4:
        pixels[..., 3] = 65535
    picture = open_bytes(imagecodecs.png_encode(pixels))
    planes = pixels.reshape(5, 6, -1)[..., :3].transpose(2, 0, 1)
    assert (picture.dtype, picture.channels) == ("uint16", len(planes))
    np.testing.assert_array_equal(picture.decode((1, 2, 3, 4)), planes[:, 1:4, 2:6])


def test_a_30_000_pixel_panorama_is_fine():
    data = encoded(Image.new("L", (30_000, 4)), "PNG")
    assert open_bytes(data).decode((0, 29_000, 4, 1000)).shape == (1, 4, 1000)


def huge_png():
    """A PNG whose header claims 100,000×100,000 pixels."""
    import zlib

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not an image"),
        (encoded(smooth(80, 80))[:2000], "truncated"),
        (encoded(smooth(80, 80), "PNG")[:2000], "truncated|damaged"),
        (encoded(smooth(80, 80), "WEBP")[:500], "damaged|truncated|not an image"),
        (encoded(smooth(80, 80), "GIF")[:900], "truncated|damaged"),
        (encoded(smooth(80, 80))[:30], "damaged|not an image|truncated"),
        (huge_png(), "bomb"),
        (b"\xff\x4f\xff\x51" + bytes(9), "damaged|not an image"),
    ],
    ids=["empty", "text", "jpeg", "png", "webp", "gif", "header", "bomb", "jpeg 2000"],
)
def test_a_bad_file_is_named_in_words(data, words):
    with pytest.raises(BadImage, match=words):
        open_bytes(data).decode()


def test_threads_that_decode_at_once_leave_the_warnings_as_they_were():
    filters, entered = list(warnings.filters), threading.Event()

    def second():
        with quiet_pillow:
            entered.set()
            leave.wait()

    leave, other = threading.Event(), threading.Thread(target=second)
    with quiet_pillow:
        other.start()
        entered.wait()
        warnings.warn("in silence", stacklevel=1)
    warnings.warn("in silence, too", stacklevel=1)
    leave.set()
    other.join()
    assert list(warnings.filters) == filters


def test_a_comment_right_behind_its_number_is_part_of_a_pgm():
    picture = open_bytes(b"P5# by hand\n2#and\n 1\n65535\n" + np.array([258, 772], ">u2").tobytes())
    assert picture.decode().tolist() == [[[258, 772]]]


def test_a_truncated_jpeg_is_noticed_even_for_a_box_above_the_cut():
    data = encoded(smooth(400, 400), quality=95)
    with pytest.raises(BadImage, match="truncated"):
        open_bytes(data[: len(data) * 3 // 4]).decode((0, 0, 10, 10))


def test_junk_after_the_end_of_a_jpeg_is_harmless():
    data = encoded(smooth(64, 64))
    np.testing.assert_array_equal(open_bytes(data + b"junk" * 50).decode(), pillow_pixels(data))


def test_one_pixel_is_an_image():
    assert open_bytes(encoded(Image.new("RGB", (1, 1)))).decode().shape == (3, 1, 1)


def test_a_box_outside_the_image_is_the_callers_mistake():
    with pytest.raises(ValueError, match="must lie inside"):
        open_bytes(encoded(smooth(20, 20))).decode((0, 0, 21, 20))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "NPY"])
def test_whatever_is_damaged_there_is_an_image_or_a_reason(kind):
    file = io.BytesIO()
    if kind == "NPY":
        np.save(file, np.zeros((20, 30), np.uint16))
        data = file.getvalue()
    else:
        data = encoded(smooth(40, 50), kind)
    generator = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(data[: generator.integers(1, len(data) * 2)])
        for position in generator.integers(0, min(len(damaged), 300), 4):
            damaged[position] = generator.integers(0, 256)
        try:
            picture = open_bytes(bytes(damaged))
            pixels = picture.decode((0, 0, picture.size[0] // 2 + 1, picture.size[1] // 2 + 1))
        except BadImage as bad:
            assert bad.reason and "\n" not in bad.reason
        else:
            assert (pixels.shape[0], pixels.dtype) == (picture.channels, picture.dtype)


def postscript():
    """A photograph's name does not make this harmless: Pillow would hand it to Ghostscript."""
    return encoded(smooth(20, 30), "EPS")


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program named gs that leaves a trace where it is started."""
    trace = tmp_path / "started"
    for name in ("gs", "gswin64c", "gswin32c"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit 0\ntouch {trace}\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for once
    with (
        contextlib.suppress(OSError, subprocess.CalledProcessError),
        Image.open(io.BytesIO(postscript())) as image,
    ):
        image.load()
    assert trace.exists()  # Pillow alone starts it
    trace.unlink()
    return trace


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.npy", "x.bmp", "x.heic"])
def test_no_image_under_any_name_starts_a_program(name, tmp_path, ghostscript):
    path = tmp_path / name
    path.write_bytes(postscript())
    with pytest.raises(BadImage):
        open_file(path).decode()
    with pytest.raises(BadImage):
        open_bytes(postscript()).decode()
    assert pictures.embed(path) is None
    with pytest.raises(BadImage):
        read_mask(path)
    if path.suffix in (".jpg", ".png"):
        with pytest.raises(UserError, match="frost"):
            check_frost_photographs(tmp_path)
    assert not ghostscript.exists()


def test_every_call_of_pillow_names_the_formats_that_it_may_open():
    for path in Path(freqmask.__file__).parent.rglob("*.py"):
        for call in re.findall(r"Image\.open\([^\n]*", path.read_text()):
            assert "formats=" in call, f"{path.name}: {call}"
