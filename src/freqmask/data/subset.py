"""A part of a source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from freqmask.data.cache import bytes_of
from freqmask.data.lanes import Blocks
from freqmask.data.pictures import Picture
from freqmask.data.sources import Source, SourceSummary


class Subset(Source):
    """Some images of a source, in the order given; names and identities are those of the source.

    Args:
        source: the whole.
        indices: (image,) which of its images.
    """

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.source, self.indices = source, np.asarray(indices, np.int64)
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Picture:
        return self.source.open(int(self.indices[index]))

    def label(self, index: int) -> int | None:
        return self.source.label(int(self.indices[index]))

    def all_labels(self) -> np.ndarray:
        return self.source.all_labels()[self.indices]

    def group(self, index: int) -> str | None:
        return self.source.group(int(self.indices[index]))

    def blocks(self) -> Blocks | None:
        blocks = self.source.blocks()
        return None if blocks is None else replace(blocks, numbers=blocks.numbers[self.indices])

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        return self.source.encoded(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def identity(self, index: int) -> int:
        return self.source.identity(int(self.indices[index]))

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(self.source.fingerprint().encode(), digest_size=8)
        digest.update(bytes_of(self.indices))
        return digest.hexdigest()

    def summary(self) -> SourceSummary:
        whole = self.source.summary()
        return SourceSummary(whole.kind, whole.found, len(self), whole.ignored, whole.notes)
