"""Images that lie many in a file, in shards or tables: an index of what lies where, and a source that reads by it."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np

from freqmask.data.cache import cache_file, piece_of, read_arrays, stamp_of, write_arrays
from freqmask.data.decode import open_bytes
from freqmask.data.pixels import Picture
from freqmask.data.source import Source, SourceSummary
from freqmask.data.storage import Files, State
from freqmask.errors import UserError


class PackedIndex:
    """The images of some files, about a hundred bytes an image; arrays may be mapped from a file.

    ``about`` is plain JSON. ``arrays`` hold ``starts``, (parts + 1,) number of the first image of each shard or row
    group; ``labels`` (image,), -1 where there is none; and what else a kind of file needs.
    """

    kind: str  # of its cache file
    version: int
    columns: Collection[str]  # names of its arrays
    of_images: Collection[str] = ("labels",)  # of those that hold a number of each image
    states: Mapping[str, State] = {}  # of the files when they were read, by name

    def __init__(
        self, about: dict[str, Any], arrays: dict[str, np.ndarray], file: Path | None = None
    ) -> None:
        self.about, self.arrays, self.file, self._stamp = about, arrays, file, stamp_of(file)
        self.starts: np.ndarray = arrays["starts"]
        self.class_names: list[str] | None = about["class_names"]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        if self.file is not None and stamp_of(self.file) == self._stamp:
            return _reopen, (
                type(self),
                self.file,
                self._stamp,
            )  # workers that are not forked map the same file
        return type(self), (self.about, {name: np.array(array) for name, array in self.arrays.items()})

    def part_of(self, image: int) -> int:
        """The number of the shard or row group that holds an image."""
        return int(self.starts.searchsorted(image, side="right")) - 1

    def text(self, column: str, image: int) -> str:
        """A text of an image, empty where it has none."""
        return piece_of(self.arrays, column, image).decode("utf-8", "surrogateescape")

    def save(self, file: Path, **extra: Any) -> bool:
        """Write it atomically, with anything JSON as `extra`; False where the place cannot be written."""
        return write_arrays(file, self.about | {"extra": extra}, self.arrays)

    @classmethod
    def load(cls, file: Path, verify: bool = True) -> Self:
        """An index from the file that `save` wrote, its checksum compared with ``verify``.

        Raises:
            ValueError: it is damaged, of another version, or of something else.
        """
        read = read_arrays(file, verify, cls.columns)
        with suppress(
            AttributeError, IndexError, KeyError, TypeError, ValueError
        ):  # what any JSON may lead to
            if read is not None and read[0]["version"] == cls.version and cls(*read).is_sound():
                return cls(*read, file)
        raise ValueError(f"{file} is damaged, or was written by another version")

    def is_sound(self) -> bool:
        """Whether the arrays fit each other, and the names."""
        plain = all(array.ndim == 1 and array.dtype.kind in "iu" for array in self.arrays.values())
        whole = all(len(self.arrays[column]) == len(self) for column in self.of_images)
        return plain and whole and self.arrays["labels"].max(initial=-1) < len(self.class_names or ())

    @classmethod
    def cached(cls, files: Files, names: Sequence[str], make: Callable[[], Self]) -> Self:
        """The index of some files from the cache, or made where they have changed; a UserError where one is missing."""
        try:
            states = {name: files.state(name) for name in names}
            file = cache_file(cls.kind, cls.version, files.where, list(states.items()))
            try:
                index = cls.load(file)
            except ValueError:
                index = make()
                index.file = file if index.save(file) else None
                index._stamp = stamp_of(index.file)
        except FileNotFoundError as error:
            raise UserError(
                f"DATA ({files.where}): {error.filename or error} is not there; check it"
            ) from error
        index.states = states
        return index


def _reopen(kind: type[PackedIndex], file: Path, stamp: object) -> PackedIndex:
    """The index in a loader worker: the same memory as in the process that started it."""
    if stamp_of(file) == stamp:
        with suppress(ValueError):
            return kind.load(file, verify=False)
    raise UserError(f"the index {file} was replaced while workers started; start again")


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
