"""What a window of one image costs, against decoding the whole file for it.

    python benchmarks/decode.py

Claim: a window of 224 pixels of a compressed TIFF of 8192 x 8192 x 3 in tiles takes under 20 ms; every window of a
TIFF, a PNG and a JPEG has the same bits as the other way, which takes longer.

Method: files are made here from one picture with structure at all scales. The other way decodes the file whole, by
tifffile or Pillow, and cuts the window out, which is what a loader without windows does. Both take turns over the same
windows; the median of wall-clock time, opening the file included, on one thread.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import tifffile
from PIL import Image
from record import write_record

from freqmask.data.decode import open_file
from freqmask.data.pixels import Box

WINDOW = 224
RESULTS = Path(__file__).parent / "results" / "decode.csv"


def picture(height: int, width: int) -> Image.Image:
    """Noise at two scales, so that neither compression nor prediction is trivial."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 64 + 1, width // 64 + 1, 3), np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((pixels + rng.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8))


def make_files(folder: Path, side: int) -> dict[str, Path]:
    """The files to be read, by what they are called in the table."""
    files = {name: folder / f"{number}.bin" for number, name in enumerate(("tiles", "strips", "plain TIFF"))}
    pixels = np.asarray(picture(side, side))
    deflate: dict[str, Any] = {"photometric": "rgb", "compression": "zlib", "predictor": True}
    files = {name: path.with_suffix(".tif") for name, path in files.items()}
    tifffile.imwrite(files["tiles"], pixels, tile=(256, 256), **deflate)
    tifffile.imwrite(files["strips"], pixels, rowsperstrip=16, **deflate)
    tifffile.imwrite(files["plain TIFF"], pixels, photometric="rgb")
    for name, size, options in (("PNG", (1200, 1600), {}), ("JPEG", (3000, 4000), {"quality": 90})):
        files[name] = folder / f"photograph.{name.lower()}"
        picture(*size).save(files[name], name, **options)
    return files


def whole(path: Path) -> np.ndarray:
    """All pixels (height, width, 3) by the reader that people use."""
    if path.suffix == ".tif":
        return np.asarray(tifffile.imread(path))
    return np.asarray(Image.open(io.BytesIO(path.read_bytes()), formats=["PNG", "JPEG"]))


def timed(function: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Milliseconds, and what came out."""
    start = time.perf_counter()
    result = function()
    return 1000 * (time.perf_counter() - start), result


def measure(name: str, path: Path, runs: int) -> dict[str, Any]:
    """One row: both ways over the same windows, and whether every one of them was equal."""
    rng, ours, others, equal = np.random.default_rng(1), [], [], True
    for _ in range(runs + 1):
        height, width = open_file(path).size
        top, left = (int(rng.integers(0, side - WINDOW)) for side in (height, width))
        box: Box = (top, left, WINDOW, WINDOW)
        fast, window = timed(lambda box=box: open_file(path).decode(box))
        slow, pixels = timed(lambda: whole(path))
        part = pixels[top : top + WINDOW, left : left + WINDOW]
        equal = equal and bool((window.transpose(1, 2, 0) == part).all())
        ours.append(fast)
        others.append(slow)
    ours_ms, others_ms = statistics.median(ours[1:]), statistics.median(others[1:])  # the first one warms up
    return {
        "file": name,
        "windows": runs,
        "window_ms": round(ours_ms, 2),
        "whole_ms": round(others_ms, 1),
        "equal": equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=8192, help="of the TIFFs in pixels")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder), options.side)
        rows = [measure(name, path, options.runs) for name, path in files.items()]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    write_record(options.out, rows, side=options.side, pillow=PIL.__version__, tifffile=tifffile.__version__)


if __name__ == "__main__":
    main()
