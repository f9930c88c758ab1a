"""Image files of every kind that is claimed to be read, each with the pixels that somebody else's code says it holds.

The pixels are made here, or come from tifffile, imagecodecs or Pillow; how they are shown is worked out in float64.
"""

from __future__ import annotations

import base64
import io
import itertools
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, ImageOps

HEIGHT, WIDTH = 37, 50
COLORS = {"minisblack": 1, "miniswhite": 1, "palette": 1, "rgb": 3, "separated": 4}
TURNS: dict[int, Any] = {
    1: lambda a: a,
    3: lambda a: np.rot90(a, 2),
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
}


class Case(NamedTuple):
    """A file, and (channel, height, width) as shown; off by as much as ``within`` where two rules of rounding meet."""

    name: str
    data: bytes
    pixels: np.ndarray
    within: float = 0


@contextmanager
def missing_for_now(path: Path) -> Iterator[None]:
    """A file that cannot be read meanwhile, as where a right or a disk is missing: size and times tell nothing."""
    data, state = path.read_bytes(), path.stat()
    for content in (b"\0" * len(data), data):
        path.write_bytes(content)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        if content != data:
            yield


def noise(bits: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Whole numbers of so many bits, neighbours alike, so that a shifted row shows and a JPEG can hold it."""
    dtype = np.uint8 if bits <= 8 else (np.uint16 if bits <= 16 else np.uint32)
    values = np.random.default_rng(seed + bits).integers(
        0, 2**bits, (*shape[:-2], -(-shape[-2] // 5), -(-shape[-1] // 5))
    )
    return values.repeat(5, -2).repeat(5, -1)[..., : shape[-2], : shape[-1]].astype(dtype)


def planes(array: np.ndarray) -> np.ndarray:
    """(height, width[, channel]) as (channel, height, width)."""
    return array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)


def over_white(colors: np.ndarray, alpha: np.ndarray, white: float, multiplied: bool = False) -> np.ndarray:
    share = alpha.astype(np.float64) / white
    return colors * (1.0 if multiplied else share) + white * (1 - share)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of(samples: np.ndarray, depth: int, kind: int, *extra: bytes) -> bytes:
    """A PNG of raw samples (height, width[, sample]), written chunk by chunk."""
    height, width = samples.shape[:2]
    if depth < 8:
        bits = (samples[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    else:
        rows = samples.astype(">u2" if depth == 16 else np.uint8).reshape(height, -1).view(np.uint8)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def png_cases() -> Iterator[Case]:
    for depth, key in itertools.product((1, 2, 4, 8, 16), (False, True)):
        gray = noise(depth, HEIGHT, WIDTH)
        top, white = 2**depth - 1, 255 if depth <= 8 else 65535
        shown = gray.astype(float) / top * white
        extra = []
        if key:
            extra = [chunk(b"tRNS", struct.pack(">H", int(gray[9, 9])))]
            shown[gray == gray[9, 9]] = white
        yield Case(f"png gray {depth} key={key}", png_of(gray, depth, 0, *extra), planes(shown))
    for depth, key in itertools.product((8, 16), (False, True)):
        rgb = np.moveaxis(noise(depth, 3, HEIGHT, WIDTH), 0, 2)
        shown, extra = rgb.astype(float), []
        if key:
            extra = [chunk(b"tRNS", struct.pack(">3H", *rgb[9, 9].tolist()))]
            shown[(rgb == rgb[9, 9]).all(2)] = 2**depth - 1
        yield Case(f"png rgb {depth} key={key}", png_of(rgb, depth, 2, *extra), planes(shown))
        alpha = noise(depth, HEIGHT, WIDTH, seed=5)
        for kind, colors in ((4, rgb[..., :1]), (6, rgb)):
            if not key:
                data = png_of(np.dstack([colors, alpha]), depth, kind)
                shown = over_white(np.moveaxis(colors, 2, 0), alpha, 2**depth - 1)
                yield Case(f"png type {kind} {depth}", data, np.rint(shown), 1)
    for depth, clear in itertools.product((1, 2, 4, 8), (False, True)):
        number = noise(depth, HEIGHT, WIDTH)
        table = np.random.default_rng(depth).integers(0, 256, (2**depth, 3))
        extra = [chunk(b"PLTE", table.astype(np.uint8).tobytes())]
        shown = np.moveaxis(table[number].astype(float), 2, 0)
        if clear:
            share = np.arange(2**depth)[::-1] % 256
            extra.append(chunk(b"tRNS", share.astype(np.uint8).tobytes()))
            shown = np.rint(over_white(shown, share[number], 255))
        yield Case(f"png palette {depth} clear={clear}", png_of(number, depth, 3, *extra), shown, int(clear))
    for turn, late in itertools.product(TURNS, (False, True)):
        exif = Image.Exif()
        exif[274] = turn
        block = chunk(b"eXIf", exif.tobytes()[6:])
        gray = noise(16, HEIGHT, WIDTH)
        data = png_of(gray, 16, 0, *([] if late else [block]))
        data = data.replace(chunk(b"IEND", b""), block + chunk(b"IEND", b"")) if late else data
        yield Case(f"png turn {turn} late={late}", data, planes(TURNS[turn](gray)))


def pillow_cases() -> Iterator[Case]:
    """Formats of 8 bits; what Pillow shows over white is right."""
    color = Image.fromarray(np.moveaxis(noise(8, 3, HEIGHT, WIDTH), 0, 2))
    alpha = Image.fromarray(noise(8, HEIGHT, WIDTH, seed=3))
    clear = color.copy()
    clear.putalpha(alpha)
    palette = color.quantize(32)
    gray = color.convert("L")
    images: list[tuple[str, Image.Image, str, dict[str, Any]]] = [
        *((kind, color, kind, {}) for kind in ("BMP", "PPM", "JPEG2000")),
        *((f"{kind} gray", gray, kind, {}) for kind in ("BMP", "PPM", "JPEG2000", "GIF")),
        *((f"{kind} bilevel", color.convert("1"), kind, {}) for kind in ("BMP", "PPM")),
        ("BMP palette", palette, "BMP", {}), ("GIF", palette, "GIF", {}),
        ("GIF key", palette, "GIF", {"transparency": 3}),
        ("GIF gray key", gray, "GIF", {"transparency": gray.getpixel((9, 9))}),
        ("GIF frames", palette, "GIF", {"save_all": True, "append_images": [palette.rotate(180)]}),
        ("WEBP", color, "WEBP", {"lossless": True}), ("WEBP alpha", clear, "WEBP", {"lossless": True, "exact": True}),
        ("BMP alpha", clear, "BMP", {}), ("JPEG2000 alpha", clear, "JPEG2000", {}),
        ("JPEG2000 gray alpha", clear.convert("LA"), "JPEG2000", {}),
        ("AVIF", color, "AVIF", {}), ("AVIF alpha", clear, "AVIF", {}),
        ("APNG", color, "PNG", {"save_all": True, "append_images": [color.rotate(180)]}),
        ("MPO", color, "MPO", {"save_all": True, "append_images": [color.rotate(180)]}),
    ]  # fmt: skip
    for turn in TURNS:
        exif = Image.Exif()
        exif[274] = turn
        for kind, options in (
            ("WEBP", {"lossless": True}),
            ("AVIF", {}),
            ("PNG", {}),
            ("JPEG", {"quality": 95}),
        ):
            images.append((f"{kind} turn {turn}", color, kind, {**options, "exif": exif}))
    for name, image, kind, options in images:
        data = saved(image, kind, **options)
        opened = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        white = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened.convert("RGBA"))
        shown = white.convert("L" if opened.mode in ("L", "1", "LA") else "RGB")
        yield Case(f"pillow {name}", data, planes(np.asarray(shown)), int("alpha" in name))


def jpeg_cases() -> Iterator[Case]:
    """By imagecodecs and, for inks, by Pillow."""
    rgb = np.ascontiguousarray(np.moveaxis(noise(8, 3, 8 * HEIGHT, 8 * WIDTH), 0, 2))
    inks = Image.fromarray(rgb).convert("CMYK")
    options: list[dict[str, Any]] = [
        {}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_blocks": 3},
        {"keep_rgb": True},
    ]  # fmt: skip
    for option, mode in itertools.product(options, ("RGB", "L")):
        if mode == "L" and ("subsampling" in option or "keep_rgb" in option):
            continue
        data = saved(Image.fromarray(rgb).convert(mode), "JPEG", quality=90, **option)
        yield Case(f"jpeg {mode} {option}", data, planes(imagecodecs.jpeg8_decode(data)))
        yield Case(f"jpeg {mode} {option} trailer", data + b"more", planes(imagecodecs.jpeg8_decode(data)))
    for name, data in (
        ("arithmetic", ARITHMETIC_JPEG),
        ("lossless", imagecodecs.jpeg8_encode(rgb, lossless=True)),
        ("lossless gray", imagecodecs.jpeg8_encode(np.ascontiguousarray(rgb[..., 0]), lossless=True)),
    ):
        yield Case(f"jpeg {name}", data, planes(imagecodecs.jpeg8_decode(data)))
    for name, data in (
        ("cmyk", saved(inks, "JPEG", quality=95)),
        (
            "ycck",
            imagecodecs.jpeg8_encode(
                np.ascontiguousarray(255 - np.asarray(inks)),
                level=95,
                colorspace="CMYK",
                outcolorspace="YCCK",
            ),
        ),
    ):
        yield Case(f"jpeg {name}", data, planes(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))))


# 96x72 pixels with arithmetic coding, by libjpeg; neither Pillow nor imagecodecs writes such files.
ARITHMETIC_JPEG = base64.b64decode("""
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpR
Uk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//yQARCABIAGADASIAAhEB
AxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwDRB53FQNnsql9tau1UDvb7h7qwRe8kSi89SJU9+y5KL87xrO7NlEFddICdmxL9F2gmWsdcFZeb25uX
g30SgYn7HZC60x1CprYCVWavNoUEqrKOLKCKkAzfdqpzv7dqo2A05BjFxCQB+7V6bOfaMUZPqICGhHVigf8AQrho6xmPYpp+FRj6PLyBiQo9z3/pw0s8
dpRQ5tlRRondJmQ4KX8KpzO50L8YD3N1LIzRla49VAxDQbi1pTgnv/sj4VeSQThNmuURALNFXYnebqlbbAi2hmxepG6ythF0x6UkIsAMeS+GOFNZ4izG
n6gZEnss91SakuEIOEf1m/jR8Mq/oD7LDCew3MPeKf6ih7RXTpbLLZnSK+3QJrg0lHYvlKAwuVXbqDnqIecC/wB0B2PxC2mEZ2JPsXDRLCEWpHjX+cZI
wwEzbwpPMTBHksQ+eJLcP7/2LaRzmyqUwEXF7Bnpdf3RseqcBZB9QkX+eOFC6eidFdmg5MdhQovm0lp+PjSc76ptIYYddhtp1QCHuFAykKpu3Q7Fppat
kTw2xmDKAXelsupEK4nnu3VSxaZ3EduoTJ7X0BpMVFfPqLiqZUrRRVFCIqa3c82kECXIV2Ex2rrolJSjW2HdiRllbJqdKBBNrfz+NdZVRQsjk8jAZ85l
OfEVzip2JPBga91wSM4JzI4C7LEpv6ColL69PF2uKsC97fo6bXgm26JMEHn0P/dwUpl7VE4ADZD34eDgvFKWitmJjihwot8EJztQkrPo5ZBeOkjrMFDm
Bm4Usp/+8CblfqLSpiTG4e/euE74zWKa/wDf7H5+gUZN+GyYLKuOO43/ADP9ZuKY4mzIhCzU5/W4hgLfw6VKSRlXnOROCmaEzb/3dDzadfIxrrx9CIF8
yfLmlfovoAOJXtwa3YcX/tqC026lDSMK83Pc+PxgQuFOUaQQ/9k=
""")


def netpbm_cases() -> Iterator[Case]:
    for top, channels, plain in itertools.product((255, 300, 4095, 65535), (1, 3), (False, True)):
        values = noise(16, HEIGHT, WIDTH * channels).astype(int) % (top + 1)
        kind = {(1, True): 2, (3, True): 3, (1, False): 5, (3, False): 6}[channels, plain]
        header = f"P{kind}\n# a comment\n{WIDTH} # and another\n{HEIGHT}\n{top}\n".encode()
        if plain:
            body = b"\n".join(b" ".join(b"%d" % v for v in row) for row in values)
        else:
            body = values.astype(">u2" if top > 255 else np.uint8).tobytes()
        yield Case(f"netpbm P{kind} {top}", header + body, planes(values.reshape(HEIGHT, WIDTH, channels)))
    floats = np.random.default_rng(0).normal(size=(HEIGHT, WIDTH)).astype("<f4")
    yield Case("netpbm Pf", f"Pf\n{WIDTH} {HEIGHT}\n-1.0\n".encode() + floats[::-1].tobytes(), floats[None])


def jpeg2000_cases() -> Iterator[Case]:
    for bits, count, codec in itertools.product((8, 10, 12, 16), (1, 3, 4, 6), ("jp2", "j2k")):
        values = np.moveaxis(noise(bits, count, HEIGHT, WIDTH), 0, 2).squeeze()
        if count == 4 and codec == "jp2":
            continue  # imagecodecs calls the fourth one alpha then, see below
        data = imagecodecs.jpeg2k_encode(
            np.ascontiguousarray(values), level=0, codecformat=codec, bitspersample=bits
        )
        yield Case(f"jpeg2000 {codec} {bits} bits {count}", data, planes(values))


def npy_cases() -> Iterator[Case]:
    for dtype, shape in itertools.product(
        ("u1", "<u2", ">u2", "i1", "<i2", "<f2", "<f4", ">f8", "?", "<u4"), ((), (3,), (12,))
    ):
        values = (noise(7, HEIGHT, WIDTH * max(1, *shape, 1)).reshape(HEIGHT, WIDTH, *shape) > 63).astype(
            dtype
        )
        file = io.BytesIO()
        np.save(file, values)
        yield Case(
            f"npy {dtype} {shape}",
            file.getvalue(),
            planes(values.astype(float) * (255 if dtype == "?" else 1)),
        )


def tiff_bytes(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **{"metadata": None, **options})
    return file.getvalue()


def shown_tiff(
    photometric: str, bits: int, stored: np.ndarray, alpha: str, table: np.ndarray | None
) -> np.ndarray:
    """Samples (height, width, sample) of a TIFF as TIFF 6.0 says that they are shown, in float64."""
    white = float(2**bits - 1)
    colors = stored[..., : COLORS[photometric]].astype(np.float64)
    if photometric == "miniswhite":
        colors = white - colors
    if photometric == "separated":
        colors = np.rint(white - colors[..., 3:]) - np.rint(
            colors[..., :3] * (white - colors[..., 3:]) / white
        )
    if table is not None:
        colors, white = (table[:, stored[..., 0]] // 256).transpose(1, 2, 0).astype(float), 255.0
    opacity = stored[..., -1:] / float(2**bits - 1)
    if alpha == "unassalpha":
        colors = colors * opacity + white * (1 - opacity)
    if alpha == "assocalpha":
        colors = colors + white * (1 - opacity)
    return colors * (255 / white if bits < 8 and table is None else 1)


def tiff_cases() -> Iterator[Case]:
    layouts: list[dict[str, Any]] = [
        {}, {"tile": (16, 16), "compression": "zlib", "predictor": True}, {"rowsperstrip": 5, "compression": "lzw"},
        {"byteorder": ">"}, {"bigtiff": True, "tile": (16, 32)}, {"planarconfig": "separate", "rowsperstrip": 7},
        {"planarconfig": "separate", "tile": (16, 16), "compression": "zlib"},
    ]  # fmt: skip
    for photometric, bits, alpha, pages, number in itertools.product(
        COLORS, (1, 2, 4, 8, 12, 16, 32), ("", "unassalpha", "assocalpha"), (1, 3), range(len(layouts))
    ):
        layout, samples = layouts[number], COLORS[photometric] + bool(alpha)
        multiplied_inks = alpha == "assocalpha" and photometric in ("miniswhite", "separated", "palette")
        packed = bits not in (8, 16, 32)
        if (
            multiplied_inks
            or (packed and (number or alpha or samples > 1))
            or (photometric == "palette" and (alpha or bits not in (8, 16)))
        ):
            continue
        if bits == 32 and (alpha or photometric in ("palette", "separated")):
            continue
        if samples == 1 and "planarconfig" in layout:
            continue
        stored = np.moveaxis(noise(bits, pages, samples, HEIGHT, WIDTH), 1, 3)
        if alpha == "assocalpha":
            share = stored[..., -1:] / (2**bits - 1)
            stored[..., :-1] = np.rint(stored[..., :-1] * share)
        table = (
            np.random.default_rng(1).integers(0, 65536, (3, 2**bits)).astype(np.uint16)
            if photometric == "palette"
            else None
        )
        separate = layout.get("planarconfig") == "separate"
        array = np.moveaxis(stored, 3, 1) if separate else stored
        options: dict[str, Any] = {**layout, "photometric": photometric}
        if samples == 1:
            array = array[:, 0] if separate else array[..., 0]
        elif not separate:
            options["planarconfig"] = "contig"
        options |= {"extrasamples": [alpha]} if alpha else {}
        options |= {"colormap": table} if table is not None else {}
        options |= {"bitspersample": bits} if packed and bits > 1 else {}
        if bits == 1:
            array = array.astype(bool)
        data = b""
        file = io.BytesIO()
        with tifffile.TiffWriter(
            file, bigtiff=options.pop("bigtiff", False), byteorder=options.pop("byteorder", None)
        ) as writer:
            for page in array:
                writer.write(page, **options, metadata=None, contiguous=False)
        data = file.getvalue()
        shown = [np.moveaxis(shown_tiff(photometric, bits, page, alpha, table), 2, 0) for page in stored]
        name = f"tiff {photometric} {bits} {alpha or 'opaque'} pages={pages} {layout}"
        yield Case(name, data, np.concatenate(shown), 1 if alpha else (0 if bits < 32 else 256))


def more_tiff_cases() -> Iterator[Case]:
    rgb = np.moveaxis(noise(8, 3, HEIGHT, WIDTH), 0, 2)
    for turn, compressed, separate in itertools.product(TURNS, (None, "zlib"), (False, True)):
        tag = [(274, 3, 1, turn, True)]
        array = np.moveaxis(rgb, 2, 0) if separate else rgb
        options = {"planarconfig": "separate" if separate else "contig", "compression": compressed}
        data = tiff_bytes(array, photometric="rgb", extratags=tag, rowsperstrip=5, **options)
        yield Case(f"tiff turn {turn} {options}", data, planes(TURNS[turn](rgb)))
    for dtype in ("int8", "int16", "int32", "float16", "float32", "float64"):
        values = (noise(8, HEIGHT, WIDTH).astype(float) - 100).astype(dtype)
        for options in ({}, {"compression": "zlib", "rowsperstrip": 5}, {"tile": (16, 16)}):
            yield Case(f"tiff {dtype} {options}", tiff_bytes(values, **options), planes(values.astype(float)))
    bands = noise(16, 6, HEIGHT, WIDTH)
    for extras, kept in (((0,) * 5, 6), ((0, 0, 0, 0, 2), 5), ((0, 0, 0, 0, 1), 5)):
        for options in (
            {"planarconfig": "separate"},
            {"planarconfig": "contig", "tile": (16, 16), "compression": "zlib"},
        ):
            array = bands if options["planarconfig"] == "separate" else np.moveaxis(bands, 0, 2)
            data = tiff_bytes(array, photometric="minisblack", extrasamples=extras, **options)
            yield Case(f"tiff bands {extras} {options}", data, bands[:kept])
    for kind in ("jpeg", "jpeg2000", "webp", "zstd", "packbits", "lzma"):
        for options in ({"tile": (32, 32)}, {"rowsperstrip": 16}):
            if kind == "webp" and "tile" not in options:
                continue
            data = tiff_bytes(rgb, photometric="rgb", compression=kind, **options)
            yield Case(f"tiff {kind} {options}", data, planes(tifffile.imread(io.BytesIO(data))))
    stack = noise(16, 4, 2, HEIGHT, WIDTH)
    yield Case(
        "tiff imagej",
        tiff_bytes(stack, imagej=True, metadata={"axes": "ZCYX"}),
        stack.reshape(8, HEIGHT, WIDTH),
    )
    yield Case(
        "tiff ome", tiff_bytes(stack, ome=True, metadata={"axes": "ZCYX"}), stack.reshape(8, HEIGHT, WIDTH)
    )
    yield Case(
        "tiff ome tiles",
        tiff_bytes(stack, ome=True, metadata={"axes": "ZCYX"}, tile=(16, 16), compression="zlib"),
        stack.reshape(8, HEIGHT, WIDTH),
    )
    for bits, pages in itertools.product((1, 2, 4), (1, 3)):
        numbers = noise(bits, pages, HEIGHT, WIDTH)
        table = np.random.default_rng(2).integers(0, 65536, (3, 2**bits)).astype(np.uint16)
        tag = [(320, "H", table.size, table.ravel().tolist(), True)]
        array = numbers.astype(bool) if bits == 1 else numbers
        data = tiff_bytes(
            array, photometric="minisblack", extratags=tag, **({} if bits == 1 else {"bitspersample": bits})
        )
        plain, color = (struct.pack("<HHIHH", 262, 3, 1, kind, 0) for kind in (1, 3))  # tifffile wants 8 bits
        shown = (table // 256)[:, numbers].transpose(1, 0, 2, 3).reshape(-1, HEIGHT, WIDTH)
        yield Case(f"tiff palette {bits} pages={pages}", data.replace(plain, color), shown)
    image = Image.fromarray(rgb)
    for mode in ("LAB", "CMYK", "1", "P", "YCbCr"):
        for compression in ("raw", "tiff_lzw"):
            if mode == "YCbCr" and compression != "raw":
                continue
            converted = lab(image) if mode == "LAB" else image.convert(mode)
            data = saved(converted, "TIFF", compression=compression)
            shown = Image.open(io.BytesIO(data))
            shown = shown.convert("L" if mode == "1" else "RGB")
            yield Case(f"tiff Pillow {mode} {compression}", data, planes(np.asarray(shown)))


def lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    return ImageCms.applyTransform(
        image,
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )


def all_cases() -> list[Case]:
    makers = (
        png_cases,
        pillow_cases,
        jpeg_cases,
        netpbm_cases,
        jpeg2000_cases,
        npy_cases,
        tiff_cases,
        more_tiff_cases,
    )
    return [case for maker in makers for case in maker()]
