"""Images on their way into shards: split by split, in which order, and how many of them make a shard."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from freqmask.data.cache import bytes_of
from freqmask.data.encode import EncodedImage, encode_picture
from freqmask.data.loader import as_bad_image
from freqmask.data.sampler import block_shuffle, some_images
from freqmask.data.shard_writer import Packed
from freqmask.data.source import JoinedSource, Pages, Source
from freqmask.data.sources import open_source, splits_there
from freqmask.errors import BadImage, UserError

AT_ONCE = 8  # images that a worker hands over together
SHARD_BYTES = 256_000_000  # what --shard_size auto aims at: few files, and little lost when one is cut off
MOST_IN_A_SHARD = 10_000
SAMPLED = 32  # images that are encoded to learn how large they come out
SAMPLED_BLOCKS = 4  # row groups that they come from where those are fetched whole
ORDER_SEED = 0

Item = tuple[int, int]  # number of the part, number of the image in it


@dataclass
class PlannedShard:
    """One shard to be written.

    Attributes:
        name: of its file.
        split: its split, or None.
        items: its images.
    """

    name: str
    split: str | None
    items: list[Item]


class Parts:
    """The images to be packed, split by split, with one numbering of classes.

    Args:
        parts: (split or None, its images), each with at least one image.
    """

    def __init__(self, parts: list[tuple[str | None, Source]]) -> None:
        self.parts = parts
        whole = JoinedSource([source for _, source in parts])
        self.class_names = whole.class_names
        self.content = _content(whole)
        self.blocks = whole.blocks()
        self.count = len(whole)

    def packed(self, item: Item, shorter_side: int | None) -> Packed:
        """One image, encoded, or the reason why it cannot be."""
        part, index = item
        source = self.parts[part][1]
        label, names = source.label(index), source.class_names
        class_name = None if label is None or names is None else names[label]
        number = None if class_name is None else (self.class_names or []).index(class_name)
        image = _encoded(source, index, shorter_side)
        return Packed(source.name(index), image, number, class_name, source.group(index))

    def shards(self, size: int, lanes: int = 1) -> list[PlannedShard]:
        """Every split's images, mixed once so that reading in order is reading in no order, cut into shards.

        Args:
            size: images of a shard.
            lanes: worker processes among which images that lie together far away are dealt out.
        """
        planned: list[PlannedShard] = []
        written = 0
        for number, (split, source) in enumerate(self.parts):
            order = _mixed(source, lanes, written)
            written += len(source)
            for shard, first in enumerate(range(0, len(order), size)):
                items = [(number, index) for index in order[first : first + size]]
                stem = re.sub(r"[^\w-]", "_", split or "shards")
                planned.append(PlannedShard(f"{stem}-{shard:06d}.tar", split, items))
        return planned


def open_parts(
    data: Sequence[str | Path | Source], pages: Pages, split: str, labels: str | Path | None
) -> tuple[Parts, list[str]]:
    """The images of DATA, split by split, and sentences on what is left out.

    Args:
        data: as for `open_source`; of several the splits are not kept.
        pages: what the pages of a TIFF are.
        split: ``all``, or the name of one.
        labels: a CSV table with the columns path and label, and optionally split and group.
    """
    one: Any = data[0] if len(data) == 1 else list(data)
    if split != "all":
        source = open_source(one, pages, split, labels)
        return Parts([(split, source)]), source.summary().notes
    source = open_source(one, pages, "all", labels)
    names = splits_there(one, labels) if len(data) == 1 and not isinstance(one, Source) else []
    notes = source.summary().notes
    if not names:
        return Parts([(None, source)]), notes
    parts = Parts([(name, open_source(one, pages, name, labels)) for name in names])
    left = len(source) - parts.count
    if left:
        notes = [*notes, f"{left:,} images outside of {', '.join(names)} are left out."]
    return parts, notes


def _mixed(source: Source, lanes: int, first: int) -> list[int]:
    """The order in which images are written, so many others having been written before them."""
    blocks = source.blocks()
    if blocks is None:
        return np.random.default_rng(ORDER_SEED).permutation(len(source)).tolist()
    return block_shuffle(blocks, ORDER_SEED, 0, AT_ONCE, lanes, first).tolist()


def _encoded(source: Source, index: int, shorter_side: int | None) -> EncodedImage | str:
    try:
        with as_bad_image():
            picture = source.open(index)
            return encode_picture(picture, source.encoded(index), shorter_side)
    except BadImage as error:
        return error.reason


def _content(source: Source) -> str:
    digest = hashlib.blake2b(source.fingerprint().encode(), digest_size=8)
    digest.update(repr(source.class_names).encode(errors="surrogateescape"))
    digest.update(bytes_of(source.all_labels()))
    return digest.hexdigest()


def choose_shard_size(parts: Parts, shorter_side: int | None) -> tuple[int, float]:
    """Images in a shard of about 256 MB, and the bytes of one image, from a few of them.

    Raises:
        UserError: none of those can be read.
    """
    places = some_images(SAMPLED, parts.count, parts.blocks, ORDER_SEED, SAMPLED_BLOCKS)
    starts = np.cumsum([0, *(len(source) for _, source in parts.parts)])
    numbers = np.searchsorted(starts, places, side="right") - 1
    tried = [
        parts.packed((int(n), place - int(starts[n])), shorter_side)
        for n, place in zip(numbers, places, strict=True)
    ]
    sizes = [len(one.image.data) for one in tried if isinstance(one.image, EncodedImage)]
    if not sizes:
        raise UserError(
            f"none of the {len(tried)} images looked at can be read; the first, {tried[0].name}: {tried[0].image}"
        )
    mean = sum(sizes) / len(sizes) + 1024  # a header, and half a block of padding
    most = min(max(int(SHARD_BYTES / mean), 1), MOST_IN_A_SHARD)
    return max(int(float(f"{most:.1g}")), 1), mean
