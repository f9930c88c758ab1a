from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from freqmask.data.loader import OrderedSampler, TrainSampler, epoch_order
from freqmask.errors import UserError


def steps(sampler: TrainSampler) -> list[list[tuple[int, int, int]]]:
    items, size = list(sampler), sampler.batch_size_per_process
    return [items[first : first + size] for first in range(0, len(items), size)]


def test_every_epoch_shows_every_image_once_in_another_order() -> None:
    items = list(TrainSampler(10, seed=1, batch_size_per_process=4, total_steps=5))
    epochs = [[index for epoch, _, index in items if epoch == number] for number in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_batches_straddle_epochs_and_none_is_shorter() -> None:
    batches = steps(TrainSampler(3, seed=0, batch_size_per_process=4, total_steps=6))
    assert [len(batch) for batch in batches] == [4] * 6
    assert [epoch for epoch, _, _ in batches[0]] == [0, 0, 0, 1]
    assert set(Counter(index for batch in batches for _, _, index in batch).values()) == {8}


def test_one_image_is_enough() -> None:
    assert [index for _, _, index in TrainSampler(1, 0, 2, total_steps=3)] == [0] * 6


def test_a_restart_begins_where_the_training_stopped() -> None:
    whole = list(TrainSampler(7, seed=3, batch_size_per_process=4, total_steps=9))
    rest = list(TrainSampler(7, seed=3, batch_size_per_process=4, start_step=5, total_steps=9))
    assert rest == whole[20:]


def test_the_length_is_that_of_the_whole_training() -> None:
    assert len(TrainSampler(7, 3, 4, start_step=5, total_steps=9)) == 36


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_processes_together_see_what_one_would(world_size: int) -> None:
    alone = steps(TrainSampler(11, seed=5, batch_size_per_process=6, total_steps=4))
    share = 6 // world_size
    apart = [steps(TrainSampler(11, 5, share, rank, world_size, total_steps=4)) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        assert [item for process in apart for item in process[step]] == batch


def test_the_order_hangs_on_seed_and_epoch() -> None:
    assert np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 1, 2))
    assert not np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 2, 1))
    assert not np.array_equal(epoch_order(50, -1, 2), epoch_order(50, 1, 2))


def test_an_order_takes_four_bytes_an_image_and_waits_for_its_epoch() -> None:
    assert epoch_order(1000, 0, 0).dtype == np.int32
    huge = TrainSampler(10**12, 0, 2, total_steps=10)  # its permutation would not fit any memory
    assert len(huge) == 20


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"length": 0}, "no image"),
        ({"batch_size_per_process": 0}, "batch size"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"start_step": 3, "total_steps": 2}, "start step"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, int], word: str) -> None:
    with pytest.raises(UserError, match=word):
        TrainSampler(**{"length": 5, "seed": 0, "batch_size_per_process": 2} | settings)


def test_held_out_images_come_in_order_and_evenly() -> None:
    assert [index for _, _, index in OrderedSampler(3)] == [0, 1, 2]
    ranks = [[index for _, _, index in OrderedSampler(5, rank, 2)] for rank in (0, 1)]
    assert ranks == [[0, 2, 4], [1, 3, 0]]
    assert [len(OrderedSampler(5, rank, 2)) for rank in (0, 1)] == [3, 3]
