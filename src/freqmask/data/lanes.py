"""Images that lie together and are cheap to read together: which they are, and an order that reads them so."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WINDOW_BLOCKS = (
    16  # blocks whose images a lane mixes: 64 MB of 4 each that a worker keeps, about a thousand images
)


@dataclass(frozen=True)
class Blocks:
    """Which images lie together.

    Attributes:
        numbers: (image,) number of the block that holds each image, from 0.
        window: blocks whose images are mixed, which a worker keeps at once.
        whole: True where one image cannot be had without all of its block.
    """

    numbers: np.ndarray
    window: int = WINDOW_BLOCKS
    whole: bool = False


def lane_order(
    blocks: Blocks,
    seed: int,
    epoch: int,
    batch_size_per_process: int,
    lanes: int,
    first: int | None = None,
) -> np.ndarray:
    """The order of the images in one epoch where images that lie together are cheap to read together.

    Blocks are mixed and put one behind the other, and that row is cut into as many pieces as there are lanes:
    worker processes of all nodes together. Each lane takes its piece from its beginning to its end, images mixed
    within windows of a few blocks. So every image comes once, all lanes have equally many batches however
    uneven the shards are, and a block is read by one worker, or by the two between which it was cut.

    Args:
        blocks: what lies together.
        seed: the run's seed.
        epoch: number of the epoch, from 0.
        batch_size_per_process: images of a batch; batches go to the lanes in turn.
        lanes: processes times the workers of each.
        first: images that were dealt out in batches before; None: those of the epochs before.

    Returns:
        (image,) int64: a permutation.
    """
    generator = np.random.default_rng([seed % 2**64, epoch])
    count = len(blocks.numbers)
    lane = ((epoch * count if first is None else first) + np.arange(count)) // batch_size_per_process % lanes
    turn = generator.permutation(int(blocks.numbers.max()) + 1)[blocks.numbers]
    row = np.argsort(turn, kind="stable")
    mixed = np.lexsort((generator.random(count), turn[row] // blocks.window, np.sort(lane)))
    order = np.empty(count, np.int64)
    order[np.argsort(lane, kind="stable")] = row[mixed]
    return order


def some_images(count: int, of: int, blocks: Blocks | None, seed: int, most_blocks: int) -> list[int]:
    """Images drawn at random, to be looked at; from few blocks where each look fetches a whole one.

    Args:
        count: how many are wanted.
        of: how many there are.
        blocks: what lies together, or None.
        seed: decides the draw.
        most_blocks: blocks that may be looked into where they come whole.

    Returns:
        Their numbers, increasing; fewer than asked where there are not as many.
    """
    generator = np.random.default_rng(seed % 2**64)
    places = np.arange(of)
    if blocks is not None and blocks.whole:
        there = np.unique(blocks.numbers)
        chosen = generator.choice(there, min(most_blocks, len(there)), replace=False)
        places = np.flatnonzero(np.isin(blocks.numbers, chosen))
    drawn = generator.choice(len(places), min(count, len(places)), replace=False)
    return [int(index) for index in np.sort(places[drawn])]


def runs_of_images(count: int, blocks: Blocks | None, at_once: int) -> list[tuple[int, int]]:
    """All images in order, cut where they can be shared out among workers: (first, the one after the last).

    Args:
        count: how many there are.
        blocks: what lies together, which is not cut; or None.
        at_once: images of a run where nothing lies together.
    """
    if blocks is None:
        return [(first, min(first + at_once, count)) for first in range(0, count, at_once)]
    starts = np.flatnonzero(np.diff(blocks.numbers, prepend=-1))
    return list(zip(starts.tolist(), [*starts[1:].tolist(), count], strict=True))
