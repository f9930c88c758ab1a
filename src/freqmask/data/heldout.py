"""The few images that are kept out of training to watch a run."""

from __future__ import annotations

import numpy as np
import torch

from freqmask.data.sources import Source
from freqmask.errors import UserError
from freqmask.rng import combine, uniform

_FEWEST = 10  # of fewer images none can be spared


def hold_out(
    source: Source, share: float = 0.02, at_most: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Choose images to keep out of training, by the hash of their identity.

    Whether an image is held out depends on itself: when images are added or removed, nearly all of the others
    stay on their side. Where one image cannot be had without all of its block, blocks are held out by the hash of
    their first images, and only the last of them is divided.

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
    drawn = uniform(combine(identities, "hold out", seed), 0).numpy()
    blocks = source.blocks()
    if blocks is None or not blocks.whole:
        order = np.argsort(drawn, kind="stable")
    else:
        _, first, block = np.unique(blocks.numbers, return_index=True, return_inverse=True)
        order = np.lexsort((drawn, drawn[first][block]))
    return np.sort(order[wanted:]), np.sort(order[:wanted])
