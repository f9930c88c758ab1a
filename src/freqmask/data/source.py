"""What images there are: the contract of every source, those that lie many in a file, a part of one, several as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from freqmask.data.cache import PackedIndex, hash_of
from freqmask.data.decode import open_bytes
from freqmask.data.pixels import Picture, as_bad_image, is_empty, missing_pixels
from freqmask.errors import BadImage
from freqmask.rng import identity_of

if TYPE_CHECKING:
    from freqmask.data.storage import Files, State

# Images of a source without blocks that go together where it is mixed with one that has them.
LOCAL_BLOCK = 64
# Blocks whose images a worker mixes: 64 MB of 4 each that it keeps, about a thousand images.
WINDOW_BLOCKS = 16


@dataclass(frozen=True)
class BlockLayout:
    """Which images lie together."""

    numbers: np.ndarray  # (image,) number of the block that holds each image, from 0
    window: int = WINDOW_BLOCKS  # blocks whose images are mixed, which a worker keeps at once
    whole: bool = False  # True where one image cannot be had without all of its block


@dataclass
class SourceSummary:
    """What a source holds, for the lines printed before a run."""

    kind: str  # in a few words: ``folder``, ``numpy array``, ``parquet table`` ...
    found: int  # images
    used: int  # images, after a split was chosen
    ignored: dict[str, int] = field(default_factory=dict)  # suffix -> number of files that are not read
    notes: list[str] = field(default_factory=list)  # whole sentences for the user


class Source(ABC):
    """Images by number. Cheap to pickle: files are opened in the process that reads them."""

    kind: str = "images"  # what it is in a few words, for its summary
    notes: Sequence[str] = ()  # sentences for the user, for its summary
    class_names: list[str] | None = None  # of the labels 0, 1, ...; None where there are no classes
    why_unlabelled: str = ""  # why a folder has no classes, in half a sentence; empty: nothing to say
    _states: Mapping[str, State] = {}  # of its files when they were opened, by name
    _labels: np.ndarray | None = None  # int64 (image,), -1 where there is none; or `label` is overridden

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, index: int) -> Picture:
        """The image, its header read; raises `freqmask.errors.BadImage` where that fails."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What the image is called in lists: its path relative to DATA, or its row."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short hash that changes when images are added, removed, renamed or resized; cheap to compute."""

    def content_stamp(self) -> str:
        """As `fingerprint`, and another one where a file was rewritten under its name.

        What is computed from pixels is cached by it; the draws and splits of an image outlive its rewriting.
        """
        return hash_of(self.fingerprint(), repr(sorted(self._states.items())))

    def summary(self) -> SourceSummary:
        """What was found, used and ignored, and what the user should know of it."""
        return SourceSummary(self.kind, len(self), len(self), notes=list(self.notes))

    def label(self, index: int) -> int | None:
        """The number of the image's class, or None."""
        return None if self._labels is None or self._labels[index] < 0 else int(self._labels[index])

    def all_labels(self) -> np.ndarray:
        """The labels of all images, int64 (image,), -1 where there is none."""
        if self._labels is not None:
            return np.array(self._labels, np.int64)
        if type(self).label is Source.label:
            return np.full(len(self), -1, np.int64)
        numbers = (self.label(index) for index in range(len(self)))
        return np.array([-1 if label is None else label for label in numbers], np.int64)

    def check(self, index: int) -> None:
        """Raises IndexError for what is no image of this source: numpy and arrow take negative numbers."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")

    def group(self, index: int) -> str | None:
        """What the image must never be separated from in a split (patient, scene), or None."""
        return None

    def blocks(self) -> BlockLayout | None:
        """Which images lie so that reading them together is cheaper; None where it makes no difference."""
        return None

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        """The image's own file, as its bytes and its suffix; None where it is not one whole file.

        Raises:
            BadImage: it cannot be read.
        """
        return None

    def identity(self, index: int) -> int:
        """A 64-bit number that stays with the image when DATA moves or other images come and go."""
        return identity_of(self.name(index).encode(errors="surrogateescape"))

    def identities(self) -> np.ndarray:
        """Those of all images, int64 (image,)."""
        return np.array([self.identity(index) for index in range(len(self))], np.int64)


class PackedSource(Source):
    """Images by the index of what lies where in some files, here or behind a URL."""

    most_kept: int  # blocks that a process keeps

    def __init__(self, files: Files, index: PackedIndex, notes: Sequence[str] = ()) -> None:
        self.files, self.index, self.notes = files, index, list(notes)
        self.class_names, self._states = index.class_names, index.states
        self._begin()

    def _begin(self) -> None:
        self._kept: OrderedDict[int, Any] = OrderedDict()  # by number of the block
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_kept", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()  # each process reads or maps blocks itself

    def _keep(self, block: int, content: Any) -> None:
        self._kept[block] = content
        self._kept.move_to_end(block)
        while len(self._kept) > self.most_kept:
            self._kept.popitem(last=False)

    @property
    def _labels(self) -> np.ndarray | None:  # type: ignore[override]
        return None if self.class_names is None else self.index.arrays["labels"]

    def __len__(self) -> int:
        return len(self.index)

    @abstractmethod
    def _bytes(self, index: int) -> bytes:
        """The image's own file; raises BadImage."""

    def open(self, index: int) -> Picture:
        return open_bytes(self._bytes(index))

    def _summary(self, count: int, note_of_remote: str) -> SourceSummary:
        kind, notes = f"{count:,} {self.kind}{'s' * (count > 1)}", list(self.notes)
        if self.files.remote:
            kind += f" at {self.files.where}"
            notes.append(f"{note_of_remote}; the order depends on the number of processes and workers.")
        return SourceSummary(kind, len(self), len(self), notes=notes)


def is_usable(source: Source, index: int) -> bool:
    """Whether an image can be read, and has more than one value."""
    with suppress(BadImage), as_bad_image():
        picture = source.open(index)
        image = picture.decode()
        return is_empty(image, missing_pixels(image, picture.nodata)) is None
    return False


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


class _Selection(Source):
    """Images of other sources, whose own methods answer."""

    @abstractmethod
    def at(self, index: int) -> tuple[Source, int]:
        """The source that holds an image, and its number there."""

    def open(self, index: int) -> Picture:
        source, inner = self.at(index)
        return source.open(inner)

    def label(self, index: int) -> int | None:
        source, inner = self.at(index)
        return source.label(inner)

    def group(self, index: int) -> str | None:
        source, inner = self.at(index)
        return source.group(inner)

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        source, inner = self.at(index)
        return source.encoded(inner)


class Subset(_Selection):
    """Some images of a source, in the order given; names and identities are those of the source."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.source, self.indices = source, np.asarray(indices, np.int64)
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def at(self, index: int) -> tuple[Source, int]:
        return self.source, int(self.indices[index])

    def all_labels(self) -> np.ndarray:
        return self.source.all_labels()[self.indices]

    def blocks(self) -> BlockLayout | None:
        blocks = self.source.blocks()
        return None if blocks is None else replace(blocks, numbers=blocks.numbers[self.indices])

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def identity(self, index: int) -> int:
        return self.source.identity(int(self.indices[index]))

    def identities(self) -> np.ndarray:
        return self.source.identities()[self.indices]

    def fingerprint(self) -> str:
        return hash_of(self.source.fingerprint(), self.indices)

    def content_stamp(self) -> str:
        return hash_of(self.source.content_stamp(), self.indices)

    def summary(self) -> SourceSummary:
        return replace(self.source.summary(), used=len(self))


class JoinedSource(_Selection):
    """Sources one after the other, at least one. Classes of the same name are the same class."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._starts = np.cumsum([0, *(len(source) for source in self.sources)])
        names = [source.class_names for source in self.sources if source.class_names]
        # the parts' own order where they agree
        same = all(names_of == names[0] for names_of in names)
        self.class_names = (names[0] if same else in_order({*chain(*names)})) if names else None

    def _place(self, index: int) -> tuple[int, int]:
        self.check(index)
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])

    def at(self, index: int) -> tuple[Source, int]:
        part, inner = self._place(index)
        return self.sources[part], inner

    def __len__(self) -> int:
        return int(self._starts[-1])

    def label(self, index: int) -> int | None:
        source, inner = self.at(index)
        label, names = source.label(inner), source.class_names
        if label is None or names is None or self.class_names is None:
            return None
        return self.class_names.index(names[label])

    def group(self, index: int) -> str | None:
        """As its source has it; of a page its file, which in each of the sources is another one of that name."""
        source, inner = self.at(index)
        group = source.group(inner)
        is_file = group is not None and source.name(inner).startswith(f"{group}#")
        return self.name(index).rpartition("#")[0] if is_file else group

    def all_labels(self) -> np.ndarray:
        parts = []
        for source in self.sources:
            names = source.class_names if self.class_names is not None else None
            numbers = [*((self.class_names or []).index(name) for name in names or ()), -1]
            labels = source.all_labels() if names is not None else np.full(len(source), -1)
            parts.append(np.array(numbers, np.int64)[labels])  # the last of them where there is none
        return np.concatenate(parts)

    def blocks(self) -> BlockLayout | None:
        parts = [source.blocks() for source in self.sources]
        known = [part for part in parts if part is not None]
        if not known:
            return None
        joined, first = [], 0
        for source, part in zip(self.sources, parts, strict=True):
            own = np.arange(len(source)) // LOCAL_BLOCK if part is None else part.numbers
            joined.append(own + first)
            first += int(own.max()) + 1
        window, whole = min(part.window for part in known), any(part.whole for part in known)
        return BlockLayout(np.concatenate(joined), window, whole)

    def name(self, index: int) -> str:
        part, inner = self._place(index)
        return f"{part}:{self.sources[part].name(inner)}"

    def fingerprint(self) -> str:
        return hash_of("\0".join(source.fingerprint() for source in self.sources))

    def content_stamp(self) -> str:
        return hash_of("\0".join(source.content_stamp() for source in self.sources))

    def summary(self) -> SourceSummary:
        parts = [source.summary() for source in self.sources]
        kinds = Counter(part.kind for part in parts)
        return SourceSummary(
            kind=", ".join(f"{count} × {kind}" if count > 1 else kind for kind, count in kinds.items()),
            found=sum(part.found for part in parts),
            used=sum(part.used for part in parts),
            ignored=dict(sum((Counter(part.ignored) for part in parts), Counter[str]())),
            notes=[note for part in parts for note in part.notes],
        )


def in_order(labels: set[str]) -> list[str]:
    """Class names: numbers by value, anything else by the alphabet.

    >>> in_order({"10", "9", "09"}), in_order({"10", "9", "x"})
    (['09', '9', '10'], ['10', '9', 'x'])
    """
    ordered = sorted(labels)  # 01 and 1 are one number: without an order a set's own, another in each process
    return sorted(ordered, key=int) if all(label.isdecimal() for label in labels) else ordered


def spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most so many of them, evenly taken."""
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).round().astype(np.int64)]


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
