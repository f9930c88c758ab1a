"""A source that lives in memory, for tests that want to say exactly what the images are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from freqmask.data.pixels import ArrayPicture, Picture
from freqmask.data.source import Source, SourceSummary
from freqmask.errors import BadImage


class MemorySource(Source):
    """Arrays (channel, height, width) as images; a text in place of one is a bad image with that reason."""

    def __init__(self, images: Sequence[Any], labels: Sequence[int | None] | None = None) -> None:
        self.images = list(images)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> Picture:
        image = self.images[index]
        if callable(image):
            image = image()
        if isinstance(image, str):
            raise BadImage(image)
        if isinstance(image, Picture):
            return image
        return ArrayPicture(np.ascontiguousarray(image.transpose(1, 2, 0)))

    def name(self, index: int) -> str:
        return f"image-{index}"

    def label(self, index: int) -> int | None:
        return None if self.labels is None else self.labels[index]

    def fingerprint(self) -> str:
        return f"memory-{len(self)}"

    def summary(self) -> SourceSummary:
        return SourceSummary("memory", len(self), len(self))


@pytest.fixture
def memory_source() -> type[MemorySource]:
    return MemorySource


@pytest.fixture
def photographs() -> Callable[..., list[np.ndarray]]:
    """Make uint8 images of noise, each with its own seed: (count, height, width, channels)."""

    def make(count: int, height: int = 24, width: int = 32, channels: int = 3) -> list[np.ndarray]:
        return [
            np.random.default_rng(seed).integers(0, 256, (channels, height, width), dtype=np.uint8)
            for seed in range(count)
        ]

    return make
