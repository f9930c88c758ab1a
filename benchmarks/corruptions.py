"""Claim: our corruptions move images as far as the published ones do, in every corruption and severity.

Method: photographs that come with scikit-image, cut to 224 pixels, are corrupted by us and by `imagecorruptions`
(bethgelab's package of ImageNet-C's program, with the authors' constants). Compared are means over images and
draws: how far the image moved (mean absolute and root mean square, of 1), and the energy above a quarter of a cycle
per pixel (decimal logarithm). The draws are not the same, so random corruptions agree on average only. Where the
package is known to differ from ImageNet-C, the record says so.

    pip install 'freqmask[bench]'
    python benchmarks/corruptions.py [FOLDER of photographs]
"""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from imagecorruptions import corrupt
from PIL import Image
from record import write_record

from freqmask.data.sources import open_source
from freqmask.data.transforms import Geometry, decode_windows
from freqmask.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corruption, strengths_for

RESULTS = Path(__file__).parent / "results" / "corruptions.csv"
SIDE, DRAWS = 224, 3
NOTES = {
    "elastic_transform": "the package has constants of its own",
    "frost": "ours is drawn; the package draws from six photographs, ImageNet-C from five",
}


def main(data: str = "builtin:photos") -> None:
    warnings.simplefilter("ignore")
    images, strengths, rows = photographs(data), strengths_for(SIDE), []
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            ours, theirs = measure(images, *pair(name, severity, strengths))
            row = {"corruption": name, "severity": severity}
            for number, what in enumerate(("moved", "moved_rms", "log10_high")):
                row |= {f"{what}_ours": f"{ours[number]:.4f}", f"{what}_theirs": f"{theirs[number]:.4f}"}
            rows.append(row | {"ratio": f"{ours[0] / theirs[0]:.3f}", "note": NOTES.get(name, "")})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items() if value), flush=True)
    write_record(
        RESULTS,
        [{"data": Path(data).name, "images": len(images), **row} for row in rows],
        imagecorruptions=importlib.metadata.version("imagecorruptions"),
        numpy=np.__version__,
    )


def photographs(data: str) -> list[np.ndarray]:
    """Middle squares (side, side, 3) uint8 of at most 24 images of three channels."""
    source, found = open_source(data), []
    window = Geometry(SIDE, crop="center", horizontal_flip=0.0)
    for index in range(len(source)):
        picture = source.open(index)
        if picture.channels == 3 and len(found) < 24:
            (pixels,) = decode_windows(picture, [window.box(picture.size, 0)], [window.at_least()])
            square = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            found.append(np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    return found


def pair(name: str, severity: int, strengths: Any) -> tuple[Callable, Callable]:
    corruption = Corruption(name, severity, strengths)

    def ours(image: np.ndarray, key: int) -> np.ndarray:
        return corruption(torch.from_numpy(image.copy()).permute(2, 0, 1), key).permute(1, 2, 0).numpy()

    def theirs(image: np.ndarray, key: int) -> np.ndarray:
        np.random.seed(key)
        return np.asarray(corrupt(image, corruption_name=name, severity=severity))

    return ours, theirs


def measure(images: list[np.ndarray], *ways: Callable) -> list[np.ndarray]:
    return [
        np.mean(
            [
                statistics(image, way(image, 1000 * draw + number))
                for draw in range(DRAWS)
                for number, image in enumerate(images)
            ],
            axis=0,
        )
        for way in ways
    ]


def statistics(image: np.ndarray, corrupted: np.ndarray) -> list[float]:
    moved = (corrupted.astype(float) - image) / 255
    power = np.abs(np.fft.fft2(corrupted.mean(axis=2) / 255)) ** 2
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE))
    return [
        np.abs(moved).mean(),
        np.sqrt((moved**2).mean()),
        np.log10(power[frequency > 0.25].mean() + 1e-9),
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
