"""The order of images that are read in blocks: split by process and worker, nothing twice, nothing left out."""

import io
import json
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from freqmask.data.loader import TrainSampler, deal
from freqmask.data.source import BlockLayout, JoinedSource, Subset, block_shuffle, runs_of_images, some_images

# 103 images in shards of very different sizes, 4 images a block
SIZES = (41, 3, 30, 1, 28)
BLOCKS = np.concatenate([100 * shard + np.arange(size) // 4 for shard, size in enumerate(SIZES)])
TOGETHER = BlockLayout(BLOCKS)
COUNT, BATCH = len(BLOCKS), 3


def streams(world, workers, steps, start=0, seed=0):
    """(rank, worker) -> the items that it reads, in order."""
    found = defaultdict(list)
    for rank in range(world):
        sampler = TrainSampler(COUNT, seed, BATCH, rank, world, start, steps, TOGETHER, workers)
        for number, item in enumerate(sampler):
            found[rank, number // BATCH % max(workers, 1)].append(item)
    return found


@pytest.mark.parametrize(("world", "workers"), [(2, 2), (1, 0), (1, 3), (4, 1)])
def test_every_pass_holds_every_image_once(world, workers):
    steps = 3 * COUNT // (BATCH * world)
    items = [item for stream in streams(world, workers, steps).values() for item in stream]
    for epoch in (0, 1):
        indices = [index for e, _, index in items if e == epoch]
        assert sorted(indices) == list(range(COUNT))


@pytest.mark.parametrize(("world", "workers", "batch"), [(1, 4, BATCH), (3, 0, 2), (6, 2, 1)])
def test_a_run_resumes_with_other_workers_and_processes_without_an_image_twice(world, workers, batch):
    def stream(sizes, start=0, dealt=None):
        """The items of all processes in the order of their places."""
        ranks, loaders, images = sizes
        first, last = start // (ranks * images), 180 // (ranks * images)
        parts = [
            list(TrainSampler(COUNT, 0, images, rank, ranks, first, last, TOGETHER, loaders, dealt))
            for rank in range(ranks)
        ]
        return [
            item for k in range(0, len(parts[0]), images) for part in parts for item in part[k : k + images]
        ]

    whole = stream((2, 2, BATCH))
    assert stream((world, workers, batch), 30, deal(BATCH, 2, 2)) == whole[30:]


def test_the_remainder_opens_the_next_pass():
    world, workers = 2, 2
    steps = COUNT // (BATCH * world)  # an epoch: as many whole steps as there are, on every process
    first = streams(world, workers, steps)
    assert {sum(len(s) for (r, _), s in first.items() if r == rank) for rank in (0, 1)} == {steps * BATCH}
    assert {item[0] for stream in first.values() for item in stream} == {0}
    seen = {item[2] for stream in first.values() for item in stream}
    after = [item for stream in streams(world, workers, steps + 1, start=steps).values() for item in stream]
    left = {index for epoch, _, index in after if epoch == 0}
    assert left == set(range(COUNT)) - seen and len(left) == COUNT % (BATCH * world)
    assert {epoch for epoch, _, _ in after} == {0, 1}


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_workers_of_all_processes_share_the_blocks_among_them(epoch):
    readers = defaultdict(set)
    for who, stream in streams(2, 2, 3 * COUNT // (BATCH * 2)).items():
        for found, _, index in stream:
            if found == epoch:
                readers[BLOCKS[index]].add(who)
    shared = [block for block, who in readers.items() if len(who) > 1]
    assert len(shared) <= 3  # four pieces have three cuts between them
    assert max(len(who) for who in readers.values()) == 2


def test_a_block_is_read_within_its_window():
    blocks = np.repeat(np.arange(200), 5)
    order = block_shuffle(BlockLayout(blocks), 0, 0, 4, 1)
    places = defaultdict(list)
    for place, index in enumerate(order):
        places[blocks[index]].append(place)
    assert max(max(p) - min(p) for p in places.values()) < 16 * 5
    assert max(max(p) - min(p) for p in places.values()) > 5  # and mixed with its neighbours


def test_passes_and_seeds_differ_and_repeat():
    orders = [
        block_shuffle(TOGETHER, seed, epoch, 4, 2).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert orders[0] == orders[3] and orders[0] != orders[1] and orders[0] != orders[2]


def test_some_images_come_from_few_blocks_only_where_those_come_whole():
    spread = some_images(50, COUNT, TOGETHER, 0, 3)
    assert spread == sorted(set(spread)) and len(spread) == 50 and len(np.unique(BLOCKS[spread])) > 10
    near = some_images(50, COUNT, BlockLayout(BLOCKS, whole=True), 0, 3)
    assert len(np.unique(BLOCKS[near])) == 3 and near != some_images(
        50, COUNT, BlockLayout(BLOCKS, whole=True), 1, 3
    )


def test_runs_hold_every_image_once_and_cut_no_block():
    assert runs_of_images(5, None, 2) == [(0, 2), (2, 4), (4, 5)]
    runs = runs_of_images(COUNT, TOGETHER, 2)
    assert [k for first, after in runs for k in range(first, after)] == list(range(COUNT))
    assert len(runs) == len(np.unique(BLOCKS))


def test_a_restart_goes_on_where_it_was():
    whole, rest = [list(TrainSampler(COUNT, 0, BATCH, 1, 2, start, 40, TOGETHER, 2)) for start in (0, 23)]
    assert whole[23 * BATCH :] == rest


def test_parts_keep_their_blocks(memory_source, photographs):
    class Blocked(memory_source):
        def blocks(self):
            return BlockLayout(np.arange(len(self)) // 4, window=3, whole=True)

    source = Blocked(photographs(10))
    assert Subset(source, [9, 0, 5]).blocks().numbers.tolist() == [2, 0, 1]
    joined = JoinedSource([source, memory_source(photographs(2))]).blocks()
    assert joined.numbers.tolist() == [*[0] * 4, *[1] * 4, *[2] * 2, 3, 3]
    assert (joined.window, joined.whole) == (3, True)
    assert JoinedSource([memory_source(photographs(2))] * 2).blocks() is None


def pack_unevenly(folder, sizes):
    """Shards of so many images each, served with the index that their headers give."""
    folder.mkdir()
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for number in range(size):
                pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                info = tarfile.TarInfo(f"{number}.png")
                info.size = len(file.getvalue())
                tar.addfile(info, io.BytesIO(file.getvalue()))
    return sum(sizes)


PROCESS = """
import json, sys
from freqmask.data.loader import TrainDataset, TrainSampler, make_loader
from freqmask.data.sources import open_source
from freqmask.data.transforms import Geometry
from freqmask.data import shards as blocks
blocks.BLOCK_BYTES = 3000
rank = int(sys.argv[1])
source = open_source(sys.argv[2], split="all")
steps = len(source) // 6
sampler = TrainSampler(len(source), 0, 3, rank, 2, 0, steps, source.blocks(), 2)
batches = make_loader(TrainDataset(source, [Geometry(8)]), sampler, 3, workers=2)
print(json.dumps([batch["indices"].tolist() for batch in batches]))
"""


@pytest.mark.slow
def test_two_processes_with_two_workers_each_read_uneven_shards(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp", reason="https:// needs aiohttp (freqmask[data])")
    from web_server import serving

    count = pack_unevenly(tmp_path / "shards", (19, 2, 1, 16))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving(tmp_path) as server:
        command = [sys.executable, "-c", PROCESS]
        processes = [
            subprocess.Popen([*command, str(rank), f"{server.url}/shards"], stdout=subprocess.PIPE, text=True)
            for rank in (0, 1)
        ]
        outputs = [process.communicate()[0] for process in processes]
    batches = [json.loads(output.splitlines()[-1]) for output in outputs]
    steps = count // 6
    assert [len(part) for part in batches] == [steps, steps]
    seen = Counter(index for part in batches for batch in part for index in batch)
    assert len(seen) == 6 * steps and set(seen.values()) == {1}
