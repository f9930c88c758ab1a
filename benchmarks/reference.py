"""Claim: the float32 half-spectrum code computes what the papers define, to float32's rounding.

Against the float64 full-spectrum numpy reference (tests/reference.py): largest relative difference of
SpectrumLoss and of the filtered image (over its largest value), bins of Com's mask that differ (float32 may
rank near-equal magnitudes otherwise), on noise with a natural 1/f spectrum; and hard edges for every integer
radius.

    python benchmarks/reference.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference
from record import write_record

from freqmask.filters import Com, LowPass
from freqmask.losses import SpectrumLoss
from freqmask.spectrum import inside

SIZES = [(224, 224), (225, 225), (96, 160), (32, 32)]
FRACTIONS = (0.005, 0.01, 0.05)
RESULTS = Path(__file__).parent / "results" / "reference.csv"


def natural_images(size: tuple[int, int], count: int = 2) -> np.ndarray:
    """Noise whose amplitude falls with the frequency, in [0, 1]; float32 values as float64."""
    noise = np.random.default_rng(0).standard_normal((count, 3, *size))
    spectrum = reference.spectrum(noise) / np.maximum(reference.radius(*size), 1)
    images = np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(-2, -1)), norm="ortho").real
    low, high = images.min((2, 3), keepdims=True), images.max((2, 3), keepdims=True)
    return ((images - low) / (high - low)).astype(np.float32).astype(np.float64)


def compare(size: tuple[int, int]) -> dict[str, object]:
    """One row: the differences at a size."""
    images = natural_images(size)
    single, keys = torch.tensor(images, dtype=torch.float32), torch.arange(len(images))
    result, keep = LowPass()(single, keys)
    full = reference.full_mask(keep, size[1])
    expected = reference.filtered(images, full)
    prediction = images[::-1].copy()
    loss = SpectrumLoss()(torch.tensor(prediction, dtype=torch.float32), single, keep).item()
    exact_loss = reference.spectrum_loss(prediction, images, full)
    differing = {
        f"com_{fraction}_bins_differing": com_difference(images, single, fraction) for fraction in FRACTIONS
    }
    return {
        "size": f"{size[0]}x{size[1]}",
        "loss_relative": abs(loss - exact_loss) / exact_loss,
        "image_relative": np.abs(result.numpy() - expected).max() / np.abs(expected).max(),
        **differing,
        "bins": len(images) * size[0] * size[1],
    }


def com_difference(images: np.ndarray, single: torch.Tensor, fraction: float) -> int:
    """How many bins of Com's full masks differ from the reference's."""
    keep = reference.full_mask(Com([fraction])(single).keep, images.shape[-1])
    return int((keep != np.stack([reference.com(image, fraction) for image in images])).sum())


def hard_edges_exact() -> bool:
    """Every integer radius from 1 to 112 at 224, against squares of integers."""
    ky = np.minimum(np.arange(224), 224 - np.arange(224)).astype(np.int64)
    squares = ky[:, None] ** 2 + np.arange(113) ** 2
    return all(
        np.array_equal(inside(224, 224, radius).numpy(), squares < radius**2) for radius in range(1, 113)
    )


def main() -> None:
    rows = [compare(size) | {"hard_edges_exact_1_to_112_at_224": hard_edges_exact()} for size in SIZES]
    write_record(RESULTS, rows, numpy=np.__version__)
    print(" | ".join(rows[0]))
    for row in rows:
        print(
            " | ".join(f"{row[name]:.2e}" if isinstance(row[name], float) else str(row[name]) for name in row)
        )


if __name__ == "__main__":
    main()
