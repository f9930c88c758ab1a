"""Remote shards read in blocks: one request for some sixty images that a training takes one after the other."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Any

import numpy as np

from freqmask.data.shard_files import ShardFiles
from freqmask.data.shard_index import ShardIndex
from freqmask.data.source import WINDOW_BLOCKS

BLOCK_BYTES = 4_000_000
# What a lane's window needs, and a few more for a window that ends while the next one begins.
KEPT_BLOCKS = WINDOW_BLOCKS + 8


def block_numbers(index: ShardIndex) -> np.ndarray:
    """(image,) which block each image belongs to: pieces of about 4 MB, none over the end of a shard."""
    shards = np.repeat(np.arange(len(index.shards)), np.diff(index.starts))
    pieces = index.arrays["offsets"] // BLOCK_BYTES
    changes = (np.diff(shards, prepend=-1) != 0) | (np.diff(pieces, prepend=-1) != 0)
    return np.cumsum(changes, dtype=np.int32) - np.int32(1)


class BlockReader:
    """Reads images of remote shards, and whole blocks where one image of a block is not all that is wanted.

    The first look into a block fetches its image alone, the second one the whole block, which is then kept. So
    pictures here and there cost what they weigh, and reading in order two requests a block.

    Args:
        files: where the shards lie.
        index: what lies where in them.
    """

    def __init__(self, files: ShardFiles, index: ShardIndex) -> None:
        self.files, self.index = files, index
        self.numbers = block_numbers(index)
        self._kept: OrderedDict[int, tuple[int, bytes] | None] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "index": self.index, "numbers": self.numbers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kept, self._lock = OrderedDict(), Lock()

    def read(self, image: int, shard: str, start: int, stop: int) -> bytes:
        """The bytes of an image.

        Args:
            image: its number.
            shard: where it lies.
            start: its first byte there.
            stop: the byte after its last.
        """
        block = int(self.numbers[image])
        with self._lock:
            seen = block in self._kept
            kept = self._kept.setdefault(block, None)
        if not seen:
            return self.files.read(shard, start, stop)
        kept = kept or self._fetch(block, shard)
        self._keep(block, kept)
        first, data = kept
        return data[start - first : stop - first]

    def _fetch(self, block: int, shard: str) -> tuple[int, bytes]:
        """Where a block begins in its shard, and its bytes."""
        first, last = np.searchsorted(self.numbers, [block, block + 1])
        offsets, sizes = self.index.arrays["offsets"], self.index.arrays["sizes"]
        start = int(offsets[first])
        return start, self.files.read(shard, start, int(offsets[last - 1] + sizes[last - 1]))

    def _keep(self, block: int, content: tuple[int, bytes]) -> None:
        """Put a block in front; the one not used for longest goes."""
        with self._lock:
            self._kept[block] = content
            self._kept.move_to_end(block)
            while len(self._kept) > KEPT_BLOCKS:
                self._kept.popitem(last=False)
