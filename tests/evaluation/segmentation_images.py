"""Made-up images with masks, small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = np.array([[200, 40, 40], [40, 40, 200]], np.uint8)


def blocks(seed: int, size: tuple[int, int] = (32, 40), block: int = 8) -> np.ndarray:
    """A map of two classes in blocks."""
    rows, columns = -(-size[0] // block), -(-size[1] // block)
    coarse = np.random.default_rng(seed).integers(0, 2, (rows, columns)).astype(np.uint8)
    return np.kron(coarse, np.ones((block, block), np.uint8))[: size[0], : size[1]]


def write(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_pairs(
    images: Path, masks: Path, count: int, first: int = 0, size: tuple[int, int] = (32, 40)
) -> None:
    """Images whose colour is their class, with a little noise."""
    for number in range(first, first + count):
        classes = blocks(number, size)
        noise = np.random.default_rng(number).integers(0, 30, (*size, 3)).astype(np.uint8)
        write(images / f"{number:03d}.png", COLOURS[classes] + noise)
        write(masks / f"{number:03d}.png", classes)


def make_data(folder: Path, train: int = 8, test: int = 3) -> Path:
    """images/train beside masks/train, and test."""
    make_pairs(folder / "images" / "train", folder / "masks" / "train", train)
    make_pairs(folder / "images" / "test", folder / "masks" / "test", test, first=100)
    return folder
