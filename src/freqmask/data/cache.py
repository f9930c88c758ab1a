"""Arrays kept in the user's cache folder: one file, written atomically, mapped into memory when read; and the
index of images that lie many in a file.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from freqmask.errors import UserError

if TYPE_CHECKING:
    from freqmask.data.storage import Files, State

Arrays = dict[str, np.ndarray]
MAGIC = b"freqmask"
ALIGNMENT = 64
ABANDONED_SECONDS = 86_400  # after its last change; another machine that shares the folder may still write


def cache_folder() -> Path:
    """Where this user's caches live: ``$XDG_CACHE_HOME/freqmask``, or what the platform has for it."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "freqmask"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "freqmask"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "freqmask" / "cache"
    try:
        return Path.home() / ".cache" / "freqmask"
    except RuntimeError:  # a container's user without a name: nothing can be written there, and nothing is
        return Path(os.devnull) / "freqmask"


def cache_file(kind: str, *key: object) -> Path:
    """The file of a kind of cache, by everything that its content depends on."""
    digest = hashlib.blake2b(repr(key).encode(errors="surrogateescape"), digest_size=12).hexdigest()
    return cache_folder() / f"{kind}-{digest}.bin"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place when the block ends well, and goes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{glob.escape(path.name)}*.tmp"):  # by a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of an array, for hashes and files; not copied where they lie in one piece."""
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def hash_of(*parts: str | bytes | np.ndarray) -> str:
    """The first eight bytes, in hex, of the BLAKE2b of some texts and arrays, one behind the other."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        digest.update(bytes_of(data) if isinstance(data, np.ndarray) else data)
    return digest.hexdigest()


def write_arrays(path: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bool:
    """Writes arrays of any shape and plain type, and a JSON description of them; False where that is not possible."""
    places, end, checksum = {}, 0, 0
    for name, array in arrays.items():
        places[name] = (array.dtype.str, list(array.shape), end)
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        checksum = zlib.crc32(bytes_of(array), checksum)
    metadata = {"about": about, "arrays": places}
    sums = {"checksum": checksum, "header": _header_sum(metadata), "bytes": end}
    header = json.dumps({**metadata, **sums}).encode()
    start = -(-(len(MAGIC) + 8 + len(header)) // ALIGNMENT) * ALIGNMENT
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(MAGIC + len(header).to_bytes(8, "little") + header)
            for name, array in arrays.items():
                file.seek(start + places[name][2])
                file.write(bytes_of(array))
            file.truncate(start + end)
    except OSError:
        return False  # a read-only home or a full disk costs time at the next start, nothing else
    return True


def _header_sum(metadata: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(metadata).encode())


def read_arrays(
    path: Path, verify: bool = True, holding: Collection[str] = ()
) -> tuple[dict[str, Any], Arrays] | None:
    """What `write_arrays` wrote, the arrays mapped read-only; None where it is missing, damaged or something else.

    ``verify`` reads everything once and compares the checksum (about 1 GB/s); without the arrays of ``holding`` it is
    another kind of file.
    """
    try:
        whole = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        if whole[: len(MAGIC)].tobytes() != MAGIC:
            return None
        length = int.from_bytes(whole[len(MAGIC) : len(MAGIC) + 8].tobytes(), "little")
        header = json.loads(whole[len(MAGIC) + 8 : len(MAGIC) + 8 + length].tobytes())
        start = -(-(len(MAGIC) + 8 + length) // ALIGNMENT) * ALIGNMENT
        if len(whole) != start + header["bytes"]:
            return None
        arrays, checksum = {}, 0
        for name, (dtype, shape, offset) in header["arrays"].items():
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            part = whole[start + offset : start + offset + size]
            checksum = zlib.crc32(bytes_of(part), checksum) if verify else checksum
            arrays[name] = part.view(dtype).reshape(shape)
        metadata = {"about": header["about"], "arrays": header["arrays"]}
        intact = not verify or checksum == header["checksum"]  # 0.1.0 kept no checksum of the header
        intact = intact and header.get("header", _header_sum(metadata)) == _header_sum(metadata)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError):
        return None  # json's and numpy's errors on garbage are ValueErrors
    return (header["about"], arrays) if intact and arrays.keys() >= set(holding) else None


def stamp_of(file: Path | None) -> tuple[int, int] | None:
    """What tells a file from one that has taken its name."""
    with contextlib.suppress(OSError):
        if file is not None:
            state = file.stat()
            return state.st_ino, state.st_mtime_ns
    return None


def text_arrays(column: str, pieces: Sequence[bytes]) -> Arrays:
    """Texts or other pieces as one array of bytes and where each ends, for `write_arrays`."""
    return {
        column: np.frombuffer(b"".join(pieces), np.uint8),
        f"{column}_ends": np.cumsum([0, *map(len, pieces)], dtype=np.int64),
    }


def piece_of(arrays: Mapping[str, np.ndarray], column: str, number: int) -> bytes:
    """One piece of a column of `text_arrays`; nothing where the column is empty."""
    ends = arrays[f"{column}_ends"]
    return b"" if len(ends) == 1 else bytes(arrays[column][ends[number] : ends[number + 1]].tobytes())


class PackedIndex:
    """The images of some files, about a hundred bytes an image; arrays may be mapped from a file.

    ``about`` is plain JSON. ``arrays`` hold ``starts``, (parts + 1,) number of the first image of each shard or row
    group; ``labels`` (image,), -1 where there is none; and what else a kind of file needs.
    """

    kind: str  # of its cache file
    version: int
    columns: Collection[str]  # names of its arrays
    of_images: Collection[str] = ()  # of those that always hold a number of each image
    states: Mapping[str, State] = {}  # of the files when they were read, by name

    def __init__(self, about: dict[str, Any], arrays: Arrays, file: Path | None = None) -> None:
        self.about, self.arrays, self.file, self._stamp = about, arrays, file, stamp_of(file)
        self.starts: np.ndarray = arrays["starts"]
        self.class_names: list[str] | None = about["class_names"]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        if self.file is not None and stamp_of(self.file) == self._stamp:
            # workers that are not forked map the same file
            return _reopen, (type(self), self.file, self._stamp)
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
        # what any JSON may lead to
        with contextlib.suppress(AttributeError, ArithmeticError, LookupError, TypeError, ValueError):
            if read is not None and read[0]["version"] == cls.version and cls(*read).is_sound():
                return cls(*read, file)
        raise ValueError(f"{file} is damaged, or was written by another version")

    def is_sound(self) -> bool:
        """Whether the arrays fit each other, and the names."""
        plain = all(array.ndim == 1 and array.dtype.kind in "iu" for array in self.arrays.values())
        full = [*self.of_images, *(["labels"] if self.class_names is not None else [])]
        whole = all(len(self.arrays[column]) == len(self) for column in full)
        return plain and whole and self.arrays["labels"].max(initial=-1) < len(self.class_names or ())

    @classmethod
    def cached(cls, files: Files, names: Sequence[str], make: Callable[[], Self], *key: object) -> Self:
        """The index of some files, from the cache unless they or ``key`` changed; or a UserError if one is gone."""
        try:
            states = {name: files.state(name) for name in names}
            where = files.where if files.remote else str(Path(files.where).absolute())
            file = cache_file(cls.kind, cls.version, where, list(states.items()), *key)
            try:
                index = cls.load(file)
            except ValueError:
                index = make()
                index.file = file if index.save(file) else None
                index._stamp = stamp_of(index.file)
        except FileNotFoundError as error:
            gone = error.filename or error
            raise UserError(f"DATA ({files.where}): {gone} is not there; check it") from error
        index.states = states
        return index


def _reopen(kind: type[PackedIndex], file: Path, stamp: object) -> PackedIndex:
    """The index in a loader worker: the same memory as in the process that started it."""
    if stamp_of(file) == stamp:
        with contextlib.suppress(ValueError):
            return kind.load(file, verify=False)
    raise UserError(f"the index {file} was replaced while workers started; start again")
