"""A part of a source, and the few images that are kept out of training to watch a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from freqmask.data.pictures import Picture
from freqmask.data.sources import Source, SourceSummary
from freqmask.draws import combine, identity_of, uniform
from freqmask.errors import UserError

_FEWEST = 10  # of fewer images none can be spared


class Subset(Source):
    """Some images of a source, in the given order.

    Args:
        source: the whole.
        indices: which of its images.
    """

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Picture:
        """The image at that place of the part."""
        return self.source.open(int(self.indices[index]))

    def name(self, index: int) -> str:
        """Its name in the whole."""
        return self.source.name(int(self.indices[index]))

    def label(self, index: int) -> int | None:
        """Its label in the whole."""
        return self.source.label(int(self.indices[index]))

    def group(self, index: int) -> str | None:
        """Its group in the whole."""
        return self.source.group(int(self.indices[index]))

    def identity(self, index: int) -> int:
        """Its identity in the whole, so that its key is the same wherever it is used."""
        return self.source.identity(int(self.indices[index]))

    def fingerprint(self) -> str:
        """The whole's fingerprint and a hash of which images were taken."""
        taken = identity_of(self.indices.tobytes()) & 0xFFFFFFFF
        return f"{self.source.fingerprint()}-{taken:08x}"

    def summary(self) -> SourceSummary:
        """The whole's summary with the number of images taken."""
        whole = self.source.summary()
        return SourceSummary(whole.kind, whole.found, len(self), whole.ignored, whole.notes)


def hold_out(
    source: Source, share: float = 0.02, at_most: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Choose images to keep out of training, by the hash of their identity.

    Whether an image is held out depends on itself: when images are added or removed, nearly all of the others
    stay on their side.

    Args:
        source: the images.
        share: share of the images, in [0, 1).
        at_most: the largest number of them.
        seed: another seed holds out others.

    Returns:
        Indices to train on and indices held out, both increasing. Below ten images none is held out, from
        ten on at least one, unless ``share`` or ``at_most`` is 0.

    Raises:
        UserError: the share is out of its range.
    """
    if not 0 <= share < 1:
        raise UserError(f"held-out share ({share}) must be from 0 to below 1; try 0.02")
    total = len(source)
    wanted = min(at_most, max(1, round(share * total))) if share > 0 and total >= _FEWEST else 0
    if wanted == 0:
        return np.arange(total), np.arange(0)
    identities = torch.tensor([source.identity(index) for index in range(total)], dtype=torch.int64)
    order = np.argsort(uniform(combine(identities, "hold out", seed), 0).numpy(), kind="stable")
    return np.sort(order[wanted:]), np.sort(order[:wanted])
