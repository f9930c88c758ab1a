"""Which image files a folder holds: walked once, kept as compact arrays, refreshed where folders changed."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from freqmask.data.cache import bytes_of, cache_file, read_arrays, write_arrays
from freqmask.errors import UserError

VERSION = 1
# A folder changed within this time before it was read may change again without a new time stamp.
SETTLED_NANOSECONDS = 2_000_000_000
# Above this the index travels to loader workers as the name of its cache file, which they map and share.
SENT_WHOLE_BYTES = 8_000_000
JUNK = (b"thumbs.db", b"desktop.ini")


@dataclass
class _Folder:
    """One folder: its image files in the order of their bytes, and what leads further."""

    modified: int
    settled: bool
    names: bytes = b""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    children: list[bytes] = field(default_factory=list)
    links: list[bytes] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    unreadable: bool = False


class FolderIndex:
    """The image files below a folder, about 30 bytes a file.

    Attributes:
        root: the folder.
        folders: relative paths of the folders, sorted; ``b""`` is the root itself.
        starts: (folders + 1,) number of the first file of each folder.
        ignored: suffix -> number of files that are not read.
        unreadable: relative paths of folders that may not be opened.
        fingerprint: hash of all relative paths and sizes.
        cached_in: the file that holds the same arrays, or None.
    """

    def __init__(self, root: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.root = root
        self.folders = [os.fsencode(folder) for folder in about["folders"]]
        self.ignored: dict[str, int] = about["ignored"]
        self.unreadable: list[str] = about["unreadable"]
        self.fingerprint: str = about["fingerprint"]
        self.cached_in: Path | None = None
        self._about, self._arrays = about, arrays
        self.starts, self._names = arrays["starts"], arrays["names"]
        self._offsets, self._sizes = arrays["offsets"], arrays["sizes"]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def folder_of(self, number: int) -> int:
        """The number of the folder that holds a file."""
        return int(np.searchsorted(self.starts, number, side="right")) - 1

    def relative(self, number: int) -> str:
        """The path of a file relative to the root, with ``/`` on every platform."""
        name = self._names[self._offsets[number] : self._offsets[number + 1]].tobytes()
        folder = self.folders[self.folder_of(number)]
        return os.fsdecode(folder + b"/" + name if folder else name)

    def path(self, number: int) -> Path:
        """The path of a file."""
        return self.root / self.relative(number)

    def __reduce__(self) -> tuple[Callable[..., FolderIndex], tuple[Any, ...]]:
        if self.cached_in is not None and sum(a.nbytes for a in self._arrays.values()) > SENT_WHOLE_BYTES:
            return _reopen, (self.root, self.cached_in, self.fingerprint)
        return _rebuild, (self.root, self._about, {k: np.array(a) for k, a in self._arrays.items()})


def _rebuild(root: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> FolderIndex:
    return FolderIndex(root, about, arrays)


def _reopen(root: Path, cached_in: Path, fingerprint: str) -> FolderIndex:
    """The index in a loader worker: the same memory as in the process that started it."""
    cached = read_arrays(cached_in, verify=False)
    if cached is None or cached[0]["fingerprint"] != fingerprint:
        raise UserError(f"the index of {root} ({cached_in}) was replaced while workers started; start again")
    return FolderIndex(root, *cached)


def index_folder(root: Path, suffixes: frozenset[str], use_cache: bool = True) -> FolderIndex:
    """The index of a folder, from the cache as far as folders have kept their time of change.

    A file that is rewritten in place under its name is not noticed, since its folder does not change.

    Args:
        root: the folder.
        suffixes: of the files to list, in lower case with their dot.
        use_cache: False to walk everything and write nothing.

    Raises:
        UserError: the folder may not be opened.
    """
    root = root.absolute()
    file = cache_file("index", VERSION, str(root), sorted(suffixes))
    cached = read_arrays(file) if use_cache else None
    known = _known_folders(cached) if cached else {}
    found, changed = _walk(root, suffixes, known)
    if cached and not changed and found.keys() == known.keys():
        index = FolderIndex(root, *cached)
        index.cached_in = file
        return index
    about, arrays = _assemble(found)
    index = FolderIndex(root, about, arrays)
    if use_cache and write_arrays(file, about, arrays):
        index.cached_in = file
    return index


def index_listing(root: str, files: Mapping[str, int | None], suffixes: frozenset[str]) -> FolderIndex:
    """The index of files that a server listed.

    Args:
        root: what their paths are relative to.
        files: path with ``/`` -> bytes, None where unknown.
        suffixes: of the files to list, in lower case with their dot.
    """
    found: dict[bytes, _Folder] = {}
    members: dict[bytes, list[tuple[bytes, int]]] = {}
    for path, size in files.items():
        parent, _, name = os.fsencode(path).rpartition(b"/")
        if name.lower() in JUNK or any(part.startswith(".") for part in path.split("/")):
            continue  # as in a folder here
        folder = found.setdefault(parent, _Folder(0, settled=False))
        suffix = os.fsdecode(_suffix(name))
        if suffix in suffixes:
            members.setdefault(parent, []).append((name, min(size or 0, 2**32 - 1)))
        else:
            folder.ignored[suffix] = folder.ignored.get(suffix, 0) + 1
    for parent, folder in found.items():
        _fill(folder, members.get(parent, []))
    return FolderIndex(Path(root), *_assemble(found or {b"": _Folder(0, settled=False)}))


def _walk(
    root: Path, suffixes: frozenset[str], known: dict[bytes, _Folder]
) -> tuple[dict[bytes, _Folder], bool]:
    """Every folder below the root by its relative path, and True where one had to be read anew.

    Each folder is entered once, whatever links lead to it: links wait until all real paths are done.
    """
    found: dict[bytes, _Folder] = {}
    seen: set[tuple[int, int]] = set()
    changed = False
    real, links = deque([b""]), deque[bytes]()
    base = os.fsencode(root)
    while real or links:
        relative = real.popleft() if real else links.popleft()
        path = base + b"/" + relative if relative else base
        try:
            state = os.stat(path)  # noqa: PTH116  bytes, which pathlib does not take
        except OSError:
            changed = True
            continue
        identity = (state.st_dev, state.st_ino)
        if identity in seen:
            continue
        seen.add(identity)
        folder = known.get(relative)
        if folder is None or not folder.settled or folder.modified != state.st_mtime_ns:
            folder, changed = _read_folder(path, state.st_mtime_ns, suffixes), True
        if folder.unreadable and not relative:
            raise UserError(f"DATA ({root}) may not be opened: no permission; check its access rights")
        found[relative] = folder
        prefix = relative + b"/" if relative else b""
        real.extend(prefix + child for child in folder.children)
        links.extend(prefix + child for child in folder.links)
    return found, changed


def _read_folder(path: bytes, modified: int, suffixes: frozenset[str]) -> _Folder:
    """One folder as it is now."""
    folder = _Folder(modified, settled=time.time_ns() - modified > SETTLED_NANOSECONDS)
    ignored: Counter[str] = Counter()
    files: list[tuple[bytes, int]] = []
    wanted = {os.fsencode(suffix) for suffix in suffixes}
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(b".") or entry.name.lower() in JUNK:
                    continue
                if _is_folder(entry):
                    (folder.links if entry.is_symlink() else folder.children).append(entry.name)
                elif not (entry.is_symlink() or entry.is_file()):
                    continue  # a pipe or socket, which to open may wait for ever
                elif (suffix := _suffix(entry.name)) in wanted:
                    files.append((entry.name, _size(entry)))
                else:
                    ignored[os.fsdecode(suffix)] += 1
    except OSError:
        folder.unreadable = True
    folder.children.sort()
    folder.links.sort()
    _fill(folder, files)
    folder.ignored = dict(ignored)
    return folder


def _fill(folder: _Folder, files: list[tuple[bytes, int]]) -> None:
    """Gives a folder its files, (name, bytes) each, in the order of the names."""
    files.sort()
    folder.names = b"".join(name for name, _ in files)
    folder.lengths = np.fromiter((len(name) for name, _ in files), np.int64, len(files))
    folder.sizes = np.fromiter((size for _, size in files), np.uint32, len(files))


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _suffix(name: bytes) -> bytes:
    """The suffix in lower case with its dot, or nothing."""
    stem, dot, suffix = name.rpartition(b".")
    return dot + suffix.lower() if stem else b""


def _size(entry: os.DirEntry[bytes]) -> int:
    """The size in bytes; 0 for a broken link, which is listed as unreadable when its turn comes."""
    try:
        state = entry.stat()
    except OSError:
        return 0
    return min(state.st_size, 2**32 - 1) if stat.S_ISREG(state.st_mode) else 0


def _assemble(found: dict[bytes, _Folder]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The folders as a JSON description and arrays."""
    paths = sorted(found)
    folders = [found[path] for path in paths]
    lengths = np.concatenate([folder.lengths for folder in folders])
    arrays: dict[str, np.ndarray] = {
        "starts": np.cumsum([0, *(len(folder.lengths) for folder in folders)], dtype=np.int64),
        "names": np.frombuffer(b"".join(folder.names for folder in folders), np.uint8),
        "offsets": np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
        "sizes": np.concatenate([folder.sizes for folder in folders]),
        "modified": np.array([folder.modified for folder in folders], np.int64),
        "settled": np.array([folder.settled for folder in folders], np.bool_),
    }
    ignored: Counter[str] = Counter()
    for folder in folders:
        ignored.update(folder.ignored)
    about = {
        "folders": [os.fsdecode(path) for path in paths],
        "tree": [_tree_entry(folder) for folder in folders],
        "ignored": dict(ignored.most_common()),
        "unreadable": [os.fsdecode(path) for path in paths if found[path].unreadable],
        "fingerprint": _fingerprint(paths, arrays),
    }
    return about, arrays


def _tree_entry(folder: _Folder) -> list[Any]:
    names = [[os.fsdecode(child) for child in children] for children in (folder.children, folder.links)]
    return [*names, folder.ignored, folder.unreadable]


def _fingerprint(paths: list[bytes], arrays: dict[str, np.ndarray]) -> str:
    """A hash of all relative paths and sizes."""
    digest = hashlib.blake2b(b"\0".join(paths), digest_size=8)
    for name in ("starts", "offsets", "names", "sizes"):
        digest.update(bytes_of(arrays[name]))
    return digest.hexdigest()


def _known_folders(cached: tuple[dict[str, Any], dict[str, np.ndarray]]) -> dict[bytes, _Folder]:
    """The folders of a cached index, to be reused one by one."""
    about, arrays = cached
    starts, offsets = arrays["starts"].tolist(), arrays["offsets"]
    known = {}
    for k, (path, entry) in enumerate(zip(about["folders"], about["tree"], strict=True)):
        first, last = starts[k], starts[k + 1]
        known[os.fsencode(path)] = _Folder(
            modified=int(arrays["modified"][k]),
            settled=bool(arrays["settled"][k]),
            names=arrays["names"][offsets[first] : offsets[last]].tobytes(),
            lengths=np.diff(offsets[first : last + 1]),
            sizes=arrays["sizes"][first:last],
            children=[os.fsencode(child) for child in entry[0]],
            links=[os.fsencode(child) for child in entry[1]],
            ignored=entry[2],
            unreadable=entry[3],
        )
    return known
