"""Which image comes when: one stream over the whole training, cut into steps and processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from freqmask.data.source import BlockLayout
from freqmask.errors import UserError

Item = tuple[int, int, int]  # epoch, position in the epoch, index in the source


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the images in one epoch: a permutation that depends on (length, seed, epoch) alone.

    ``(length,)`` int32, or int64 from 2^31 images on; about a second for 14 million.
    """
    kind = np.int32 if length < 2**31 else np.int64
    order = np.arange(length, dtype=kind)
    np.random.default_rng([seed % 2**64, epoch]).shuffle(order)
    return order


def block_shuffle(
    blocks: BlockLayout,
    seed: int,
    epoch: int,
    batch_size_per_process: int,
    workers: int,
    first: int | None = None,
) -> np.ndarray:
    """The order of the images in one epoch, int64, where images that lie together are cheap to read together.

    Blocks are mixed and put one behind the other, and that row is cut into as many pieces as there are worker
    processes on all nodes together. Each worker takes its piece from its beginning to its end, images mixed
    within windows of a few blocks. So every image comes once, all workers have equally many batches however
    uneven the shards are, and a block is read by one worker, or by the two between which it was cut.

    Batches go to the workers of all processes in turn. ``first`` images were dealt out before; None: those of the
    epochs before.
    """
    generator = np.random.default_rng([seed % 2**64, epoch])
    count = len(blocks.numbers)
    before = epoch * count if first is None else first
    worker = (before + np.arange(count)) // batch_size_per_process % workers
    turn = generator.permutation(int(blocks.numbers.max()) + 1)[blocks.numbers]
    row = np.argsort(turn, kind="stable")
    mixed = np.lexsort((generator.random(count), turn[row] // blocks.window, np.sort(worker)))
    order = np.empty(count, np.int64)
    order[np.argsort(worker, kind="stable")] = row[mixed]
    return order


def deal(batch_size_per_process: int, world_size: int, workers: int) -> tuple[int, int]:
    """(images of a batch, workers of all processes) that deal blocks out so that each is read by one worker."""
    return batch_size_per_process, world_size * max(workers, 1)


@dataclass(eq=False)
class TrainSampler(Sampler[Item]):
    """One stream of images over the whole training, for one of several processes.

    The permutations of successive epochs stand one behind the other. Step ``s`` of ``R`` processes with ``b``
    images each takes the positions ``[s b R, (s + 1) b R)`` of that stream, process ``r`` the r-th ``b``.
    A batch may straddle two epochs; none is shorter than the others, and any number of images works, one too.
    A restart begins at its step without going through those before it. A UserError where a number is out of range.
    """

    length: int  # images in the source, at least 1
    seed: int  # the run's
    batch_size_per_process: int  # images of one process in one step of the loader
    rank: int = 0  # this process
    world_size: int = 1  # processes
    start_step: int = 0  # the first to deliver
    total_steps: int = 1  # of the whole training
    blocks: BlockLayout | None = (
        None  # which images are cheap to read together; None where it does not matter
    )
    workers: int = 0  # loader processes of each process, which matter where blocks do
    # By which blocks were dealt out when the run began, see `deal`. A run that resumes with other numbers keeps its
    # order; its workers then share blocks, which costs requests.
    dealt: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError("the source holds no image to train on; name a folder with images")
        if self.batch_size_per_process < 1:
            raise UserError(
                f"batch size ({self.batch_size_per_process}) must be at least 1 image per process"
            )
        if not 0 <= self.rank < self.world_size:
            raise UserError(
                f"rank ({self.rank}) must be from 0 to {self.world_size - 1}, one below the number of processes"
            )
        if not 0 <= self.start_step <= self.total_steps:
            raise UserError(
                f"start step ({self.start_step}) must be from 0 to the {self.total_steps} steps of the training"
            )

    def __len__(self) -> int:
        return self.total_steps * self.batch_size_per_process

    def __iter__(self) -> Iterator[Item]:
        entered, order = -1, np.empty(0, dtype=np.int32)
        for step in range(self.start_step, self.total_steps):
            first = (step * self.world_size + self.rank) * self.batch_size_per_process
            for place in range(first, first + self.batch_size_per_process):
                epoch, position = divmod(place, self.length)
                if epoch != entered:  # an order is made when its epoch is entered, and only one is held
                    entered, order = epoch, self._order(epoch)
                yield epoch, position, int(order[position])

    def _order(self, epoch: int) -> np.ndarray:
        if self.blocks is None:
            return epoch_order(self.length, self.seed, epoch)
        dealt = self.dealt or deal(self.batch_size_per_process, self.world_size, self.workers)
        return block_shuffle(self.blocks, self.seed, epoch, *dealt)


class ChosenSampler(Sampler[Item]):
    """The images at given places once, in that order, as epoch 0: for pictures."""

    def __init__(self, places: Sequence[int]) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Item]:
        return ((0, place, place) for place in self.places)


class OrderedSampler(ChosenSampler):
    """Every image once, in the source's order, always as epoch 0: for held-out images and previews.

    Every process gets the same number, so that all make the same number of steps; where the images do not
    divide evenly, a process that has one too few sees one of the first images again.
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        turns = range(-(-length // world_size))
        super().__init__([(turn * world_size + rank) % length for turn in turns])


def some_images(count: int, of: int, blocks: BlockLayout | None, seed: int, most_blocks: int) -> list[int]:
    """Numbers of up to ``count`` of so many images, drawn at random to be looked at, increasing.

    Where each look fetches a whole block, they come from ``most_blocks`` at most.
    """
    generator = np.random.default_rng(seed % 2**64)
    places = np.arange(of)
    if blocks is not None and blocks.whole:
        numbers = np.unique(blocks.numbers)
        chosen = generator.choice(numbers, min(most_blocks, len(numbers)), replace=False)
        places = np.flatnonzero(np.isin(blocks.numbers, chosen))
    drawn = generator.choice(len(places), min(count, len(places)), replace=False)
    return [int(index) for index in np.sort(places[drawn])]


def runs_of_images(count: int, blocks: BlockLayout | None, at_once: int) -> list[tuple[int, int]]:
    """All images in order, cut where they can be shared out among workers: (first, the one after the last).

    Blocks are not cut; where nothing lies together, a run has ``at_once`` images.
    """
    if blocks is None:
        return [(first, min(first + at_once, count)) for first in range(0, count, at_once)]
    starts = np.flatnonzero(np.diff(blocks.numbers, prepend=-1))
    return list(zip(starts.tolist(), [*starts[1:].tolist(), count], strict=True))
