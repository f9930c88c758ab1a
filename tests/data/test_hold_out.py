from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from freqmask.data.source import BlockLayout, Subset
from freqmask.data.splits import hold_out
from freqmask.errors import UserError


@pytest.fixture
def source(memory_source: Any) -> Any:
    return memory_source(["never opened"] * 500, labels=list(range(500)))


def test_every_image_is_on_one_side(source: Any) -> None:
    train, held = hold_out(source, share=0.1)
    assert len(held) == 50
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(500))


def test_no_more_are_held_out_than_asked(source: Any) -> None:
    assert len(hold_out(source, share=0.5, at_most=7)[1]) == 7
    assert len(hold_out(source, share=0.0)[1]) == 0
    assert len(hold_out(source, at_most=0)[1]) == 0


@pytest.mark.parametrize(("count", "held"), [(1, 0), (9, 0), (10, 1), (100, 2)])
def test_small_sources_lose_at_most_one(memory_source: Any, count: int, held: int) -> None:
    assert len(hold_out(memory_source([""] * count))[1]) == held


def test_images_stay_on_their_side_when_others_come(memory_source: Any, source: Any) -> None:
    before = set(hold_out(source, share=0.1)[1].tolist())
    after = set(hold_out(memory_source([""] * 550), share=0.1)[1].tolist())
    assert len(before - after) <= 5
    assert set(hold_out(source, share=0.1, seed=1)[1].tolist()) != before


def test_a_share_out_of_range_is_refused(source: Any) -> None:
    with pytest.raises(UserError, match=r"held-out share \(1.5\)"):
        hold_out(source, share=1.5)


def test_a_part_speaks_for_its_images(source: Any) -> None:
    part = Subset(source, [7, 3])
    assert len(part) == 2
    assert (part.name(0), part.label(1), part.identity(0)) == ("image-7", 3, source.identity(7))
    assert part.fingerprint() != Subset(source, [3, 7]).fingerprint()
    assert part.summary().used == 2


def test_where_blocks_come_whole_few_of_them_are_held_out_and_stay_so(memory_source: Any) -> None:
    class Blocked(memory_source):  # type: ignore[misc, valid-type]
        def blocks(self) -> BlockLayout:
            return BlockLayout(np.arange(len(self)) // 20, whole=True)

    source = Blocked(["never opened"] * 1000)
    train, held = hold_out(source, share=0.11)
    assert len(held) == 110 and sorted([*train, *held]) == list(range(1000))
    counts = np.bincount(held // 20)
    assert sorted(counts[counts > 0]) == [10, 20, 20, 20, 20, 20]
    _, more = hold_out(Blocked(["never opened"] * 1100), share=0.11)
    assert len(np.intersect1d(held, more)) > 80
