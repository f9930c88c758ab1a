"""Several sources as one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from freqmask.data.lanes import Blocks
from freqmask.data.pictures import Picture
from freqmask.data.sources import Source, SourceSummary

LOCAL_BLOCK = (
    64  # images of a source without blocks that go together where it is mixed with one that has them
)


class JoinedSource(Source):
    """Sources one after the other. Classes of the same name are the same class.

    Args:
        sources: at least one.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._starts = np.cumsum([0, *(len(source) for source in self.sources)])
        names = {name for source in self.sources for name in source.class_names or ()}
        in_order = [source.class_names for source in self.sources if source.class_names]
        # The order of the parts where they agree (digits: 0 to 10 do not sort as text), else the alphabet's.
        same = bool(in_order) and all(names_of == in_order[0] for names_of in in_order)
        self.class_names = (in_order[0] if same else sorted(names)) if names else None

    def _place(self, index: int) -> tuple[int, int]:
        """Which source, and which image of it."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def open(self, index: int) -> Picture:
        part, inner = self._place(index)
        return self.sources[part].open(inner)

    def label(self, index: int) -> int | None:
        part, inner = self._place(index)
        label, names = self.sources[part].label(inner), self.sources[part].class_names
        if label is None or names is None or self.class_names is None:
            return None
        return self.class_names.index(names[label])

    def all_labels(self) -> np.ndarray:
        return np.concatenate([self._labels_of(source) for source in self.sources])

    def _labels_of(self, source: Source) -> np.ndarray:
        """The labels of a part, by the numbers of the whole."""
        labels = source.all_labels()
        if source.class_names is None or self.class_names is None:
            return np.full(len(source), -1, np.int64)
        numbers = np.array([self.class_names.index(name) for name in source.class_names] + [-1])
        return numbers[labels]

    def group(self, index: int) -> str | None:
        part, inner = self._place(index)
        return self.sources[part].group(inner)

    def blocks(self) -> Blocks | None:
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
        return Blocks(np.concatenate(joined), window, whole)

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        part, inner = self._place(index)
        return self.sources[part].encoded(inner)

    def name(self, index: int) -> str:
        part, inner = self._place(index)
        return f"{part}:{self.sources[part].name(inner)}"

    def fingerprint(self) -> str:
        prints = "\0".join(source.fingerprint() for source in self.sources)
        return hashlib.blake2b(prints.encode(), digest_size=8).hexdigest()

    def summary(self) -> SourceSummary:
        parts = [source.summary() for source in self.sources]
        kinds = Counter(part.kind for part in parts)
        ignored: Counter[str] = Counter()
        for part in parts:
            ignored.update(part.ignored)
        return SourceSummary(
            kind=", ".join(f"{count} × {kind}" if count > 1 else kind for kind, count in kinds.items()),
            found=sum(part.found for part in parts),
            used=sum(part.used for part in parts),
            ignored=dict(ignored),
            notes=[note for part in parts for note in part.notes],
        )
