"""Which image files a folder holds: walked once, kept as compact arrays, refreshed where folders changed."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from freqmask.data.cache import cache_file, hash_of, read_arrays, stamp_of, write_arrays
from freqmask.errors import UserError
from freqmask.training.files import MARKER, is_own_folder, is_part_of_run, marked

VERSION = 3
# A folder changed within this time before it was read may change again without a new time stamp.
SETTLED_NANOSECONDS = 2_000_000_000
# Above this the index travels to loader workers as the name of its cache file, which they map and share.
SENT_WHOLE_BYTES = 8_000_000
# What systems, archives and photo managers leave; thumbnails in them would be images twice.
JUNK = frozenset({
    b"thumbs.db", b"ehthumbs.db", b"desktop.ini", b"picasa.ini", b"icon\r", b"@eadir", b"#recycle", b"@recycle",
    b"@recently-snapshot", b"__macosx", b"lost+found", b"$recycle.bin", b"system volume information", b"__pycache__",
})  # fmt: skip
# What tools put behind the name of an image's mask; CamVid's own masks end in _L.
MASK_FILE = re.compile(
    rb"(?s)(.+)(?:[_-](?i:masks?|labels?|labelids|seg|segmentation|gt|groundtruth|trimap|matte|annotation)|_L)"
)

COLORS_OF_MASKS = 64  # at most; a photograph of 64 x 64 pixels has hundreds
PHOTOGRAPHS = frozenset({".jpg", ".jpeg"})


@dataclass
class _Folder:
    """One folder: its image files in the order of their bytes, and what leads further."""

    modified: int
    settled: bool
    # as the system saw it: archives and copies give a folder the time of change that it had elsewhere
    changed_here: int = 0
    names: bytes = b""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    children: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    own: list[str] = field(default_factory=list)
    masks: int = 0
    unreadable: bool = False


class FolderIndex:
    """The image files below a folder, or in some of its folders; about 30 bytes a file."""

    def __init__(
        self,
        root: Path,
        about: dict[str, Any],
        arrays: dict[str, np.ndarray],
        chosen: np.ndarray | None = None,
        below: bytes = b"",
        cached_in: Path | None = None,
    ) -> None:
        self.root, self.cached_in, self._stamp = root, cached_in, stamp_of(cached_in)
        self._about, self._arrays, self._below = about, arrays, below
        every = [os.fsencode(folder) for folder in about["folders"]]
        counts = np.diff(arrays["starts"])
        # Empty folders come and go (a run makes some) and say nothing about the images.
        self._chosen = _leading_to_files(every, counts) if chosen is None else chosen
        cut = len(below) + 1 if below else 0
        # relative paths, sorted, of those that lead to images; b"" is the root itself
        self.folders = [every[number][cut:] for number in self._chosen]
        # (folders + 1,) number of the first file of each folder
        self.starts = np.cumsum([0, *counts[self._chosen]], dtype=np.int64)
        entries = about["tree"] if chosen is None else [about["tree"][number] for number in self._chosen]
        ignored: Counter[str] = Counter()
        for entry in entries:
            ignored.update(entry["ignored"])
        self.ignored = dict(ignored.most_common())  # suffix -> number of files that are not read
        self.masks = sum(entry["masks"] for entry in entries)
        paths = list(zip(about["folders"], about["tree"], strict=True))
        self.own = sorted(f"{path}/{name}".strip("/") for path, entry in paths for name in entry["own"])
        self.unreadable = [path for path, entry in paths if entry["unreadable"]]
        self.fingerprint = self._hash()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def folder_of(self, number: int) -> int:
        """The number of the folder that holds a file."""
        return int(np.searchsorted(self.starts, number, side="right")) - 1

    def relative(self, number: int) -> str:
        """The path of a file relative to the root, with ``/`` on every platform."""
        folder, offsets = self.folder_of(number), self._arrays["offsets"]
        place = self._arrays["starts"][self._chosen[folder]] + number - self.starts[folder]
        name = self._arrays["names"][offsets[place] : offsets[place + 1]].tobytes()
        return os.fsdecode(self.folders[folder] + b"/" + name if self.folders[folder] else name)

    def path(self, number: int) -> Path:
        """The path of a file."""
        return self.root / self.relative(number)

    @cached_property
    def content_stamp(self) -> str:
        """A hash of the files and of their bytes and times of change now; every file is asked, once."""
        root, states = os.fsencode(self.root) + b"/", np.zeros((len(self), 2), np.int64)
        for number, path in enumerate(self.paths()):
            with contextlib.suppress(OSError):  # gone since: told when its turn comes
                state = os.stat(root + path)  # noqa: PTH116  bytes, which pathlib does not take
                states[number] = state.st_size, state.st_mtime_ns
        return hash_of(self.fingerprint, states)

    def names_in(self, folder: int) -> list[bytes]:
        """The names of the files of a folder, by its number."""
        first = self._arrays["starts"][self._chosen[folder]]
        count = self.starts[folder + 1] - self.starts[folder]
        offsets = self._arrays["offsets"][first : first + count + 1]
        names = self._arrays["names"][offsets[0] : offsets[-1]].tobytes()
        return [names[start:end] for start, end in pairwise((offsets - offsets[0]).tolist())]

    def within(self, folder: bytes) -> list[int]:
        """The numbers of a folder, by its relative path, and of those in it."""
        inside = folder + b"/" if folder else b""
        return [number for number, path in enumerate(self.folders) if (path + b"/").startswith(inside)]

    def paths(self) -> Iterator[bytes]:
        """The relative paths of all files, in a tenth of the time of one by one."""
        for number, folder in enumerate(self.folders):
            prefix = folder + b"/" if folder else b""
            yield from (prefix + name for name in self.names_in(number))

    def select(self, folders: Iterable[int], below: bytes = b"") -> FolderIndex:
        """Some folders by their numbers, increasing, sharing the arrays; the one ``below`` becomes the root."""
        chosen = self._chosen[np.asarray(list(folders), np.int64)]
        root = self.root / os.fsdecode(below) if below else self.root
        joined = b"/".join(part for part in (self._below, below) if part)
        return FolderIndex(root, self._about, self._arrays, chosen, joined, self.cached_in)

    def _hash(self) -> str:
        arrays = self._arrays
        places = np.concatenate([
            np.zeros(0, np.int64),
            *(np.arange(*arrays["starts"][k : k + 2]) for k in self._chosen),
        ])  # fmt: skip
        ends, starts = arrays["offsets"][1:][places], arrays["offsets"][:-1][places]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(ends - starts)])
        pieces = (arrays["offsets"][arrays["starts"][k : k + 2]] for k in self._chosen)
        names = (arrays["names"][first:last] for first, last in pieces)
        return hash_of(b"\0".join(self.folders), self.starts, offsets, *names, arrays["sizes"][places])

    def __reduce__(self) -> tuple[Callable[..., FolderIndex], tuple[Any, ...]]:
        view = (self._chosen, self._below)
        large = sum(a.nbytes for a in self._arrays.values()) > SENT_WHOLE_BYTES
        # Another process may have written a newer index under the name; ours is still mapped here.
        if self.cached_in is not None and large and stamp_of(self.cached_in) == self._stamp:
            return _reopen, (self.root, self.cached_in, self.fingerprint, *view)
        arrays = {name: np.array(array) for name, array in self._arrays.items()}
        return FolderIndex, (self.root, self._about, arrays, *view)


def _leading_to_files(folders: list[bytes], counts: np.ndarray) -> np.ndarray:
    """Numbers of the folders with files in them or further below, and of the root."""
    lead = {b""}
    for folder, count in zip(folders, counts, strict=True):
        while count and folder not in lead:
            lead.add(folder)
            folder = folder.rpartition(b"/")[0]
    return np.array([number for number, folder in enumerate(folders) if folder in lead], np.int64)


def _reopen(root: Path, cached_in: Path, fingerprint: str, chosen: np.ndarray, below: bytes) -> FolderIndex:
    """The index in a loader worker: the same memory as in the process that started it."""
    cached = read_arrays(cached_in, verify=False)
    index = None if cached is None else FolderIndex(root, *cached, chosen, below, cached_in)
    if index is None or index.fingerprint != fingerprint:
        raise UserError(f"the index of {root} ({cached_in}) was replaced while workers started; start again")
    return index


def index_folder(root: Path, suffixes: frozenset[str], use_cache: bool = True) -> FolderIndex:
    """The index of a folder, from the cache where folders have kept their times of change; a UserError without access.

    A file that is rewritten in place under its name is not noticed, since its folder does not change;
    `content_stamp` asks every file. What freqmask wrote itself is passed over, unless the folder holds nothing
    else. Suffixes are in lower case with their dot; ``use_cache=False`` walks everything and writes nothing.
    """
    root = root.absolute()
    file = cache_file("index", VERSION, str(root), sorted(suffixes))
    cached = read_arrays(file) if use_cache else None
    try:
        known = _known_folders(cached) if cached else {}
    except (KeyError, ValueError, TypeError, IndexError):
        known, cached = {}, None  # a file of the right form with something else in it
    folders, changed = _walk(root, suffixes, known)
    if cached and not changed and folders.keys() == known.keys():
        index = FolderIndex(root, *cached, cached_in=file)
    else:
        about, arrays = _assemble(folders)
        written = use_cache and write_arrays(file, about, arrays)
        index = FolderIndex(root, about, arrays, cached_in=file if written else None)
    if len(index) == 0 and any(folder.own for folder in folders.values()):
        return FolderIndex(root, *_assemble(_walk(root, suffixes, {}, own_too=True)[0]))
    return index


def index_listing(
    root: str, files: Mapping[str, int | None], suffixes: frozenset[str], named: bool = False
) -> FolderIndex:
    """The index of the files (path with ``/`` -> bytes, None where unknown) that a server listed below ``root``.

    Files that somebody ``named`` one by one are taken all, be they masks, hidden, or of a run.
    """
    members: dict[bytes, dict[bytes, int]] = {b"": {}}
    for path, size in files.items():
        parent, _, name = os.fsencode(path).rpartition(b"/")
        members.setdefault(parent, {})[name] = min(size or 0, 2**32 - 1)
    runs = {parent for parent, names in members.items() if parent and is_own_folder(names) and not named}
    folders = {b"": _Folder(0, settled=False)}
    for parent, names in members.items():
        parts = parent.split(b"/") if parent else []
        above = {b"/".join(parts[: k + 1]) for k in range(len(parts))}
        if above & runs:
            folders[b""].own += [os.fsdecode(parent)] if parent in runs else []
        elif named or not any(_is_junk(part) for part in parts):
            for folder in above:
                folders.setdefault(folder, _Folder(0, settled=False))
            _fill(folders.setdefault(parent, _Folder(0, settled=False)), names, suffixes, named)
    return FolderIndex(Path(root), *_assemble(folders))


def _walk(
    root: Path, suffixes: frozenset[str], known: dict[bytes, _Folder], own_too: bool = False
) -> tuple[dict[bytes, _Folder], bool]:
    """Every folder below the root by its relative path, and True where one had to be read anew.

    Each folder is entered once, whatever links lead to it: links wait until all real paths are done.
    """
    folders: dict[bytes, _Folder] = {}
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
        times = state.st_mtime_ns, state.st_ctime_ns
        as_known = folder is not None and folder.settled and (folder.modified, folder.changed_here) == times
        if folder is None or not as_known or folder.unreadable:  # rights change without a new time
            folder = _read_folder(path, state.st_mtime_ns, suffixes, not relative, own_too)
            folder.changed_here = state.st_ctime_ns
            changed |= not (as_known and folder.unreadable)
        if folder.unreadable and not relative:
            raise UserError(f"DATA ({root}) may not be opened: no permission; check its access rights")
        folders[relative] = folder
        prefix = relative + b"/" if relative else b""
        real.extend(prefix + os.fsencode(child) for child in folder.children)
        links.extend(prefix + os.fsencode(child) for child in folder.links)
    return folders, changed


def _read_folder(
    path: bytes, modified: int, suffixes: frozenset[str], is_root: bool = False, own_too: bool = False
) -> _Folder:
    folder = _Folder(modified, settled=time.time_ns() - modified > SETTLED_NANOSECONDS)
    files: dict[bytes, int] = {}
    names: list[bytes] = []
    children: list[bytes] = []
    links: list[bytes] = []
    own: set[bytes] = set()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                names.append(entry.name)
                if _is_junk(entry.name):
                    continue
                if _is_folder(entry):
                    (links if entry.is_symlink() else children).append(entry.name)
                elif entry.is_symlink() or entry.is_file():  # to open a pipe or a socket may wait for ever
                    files[entry.name] = _size(entry)
        if MARKER.encode() in names:
            own = marked(Path(os.fsdecode(path), MARKER).read_bytes())
    except OSError:
        folder.unreadable = True
    if is_own_folder(names):
        if not is_root:
            return _Folder(folder.modified, folder.settled, own=[""])
        own |= {name for name in names if is_part_of_run(name)}
    passed_over = set() if own_too else own & {*files, *children}
    folder.own = [os.fsdecode(name) for name in sorted(passed_over)]
    folder.children = [os.fsdecode(name) for name in sorted(children) if name not in passed_over]
    folder.links = [os.fsdecode(name) for name in sorted(links)]
    files = {name: size for name, size in files.items() if name not in passed_over}
    masks = _masks_of_photographs(path, files) if suffixes & PHOTOGRAPHS else set()
    _fill(folder, {name: size for name, size in files.items() if name not in masks}, suffixes)
    folder.masks += len(masks)
    return folder


def _fill(
    folder: _Folder, sizes: Mapping[bytes, int], suffixes: Collection[str], named: bool = False
) -> None:
    """Gives a folder its files, name -> bytes, those to list in the order of their names, and counts the others."""
    wanted = {os.fsencode(suffix) for suffix in suffixes}
    ignored: Counter[str] = Counter()
    files = []
    for name in sizes:
        if _suffix(name) in wanted:
            files.append(name)
        elif not _is_junk(name):
            ignored[os.fsdecode(_suffix(name))] += 1
    masks = set()
    if not named:  # those of others in the folder: ``a_mask.png`` beside ``a.jpg``
        stems = {_stem(name) for name in files}
        masks = {name for name in files if (mask := MASK_FILE.fullmatch(_stem(name))) and mask[1] in stems}
    files = sorted(name for name in files if named or not (name in masks or _is_junk(name)))
    folder.masks = len(masks)
    folder.names = b"".join(files)
    folder.lengths = np.fromiter(map(len, files), np.int64, len(files))
    folder.sizes = np.fromiter((sizes[name] for name in files), np.uint32, len(files))
    folder.ignored = dict(ignored)


def _masks_of_photographs(path: bytes, names: Collection[bytes]) -> set[bytes]:
    """PNG files of the names of JPEG files beside them, with as few colors as masks have."""
    by_stem = {_stem(name): name for name in names if os.fsdecode(_suffix(name)) in PHOTOGRAPHS}
    masks = {_stem(name): name for name in names if _suffix(name) == b".png"}
    both = sorted(by_stem.keys() & masks.keys())
    if len(both) < max(1, 0.9 * len(masks)):
        return set()
    for stem in both[:3]:
        mask, photograph = (Path(os.fsdecode(path + b"/" + files[stem])) for files in (masks, by_stem))
        if not has_few_colors(mask) or has_few_colors(photograph):
            return set()
    return {masks[stem] for stem in both}


def has_few_colors(path: Path) -> bool:
    """Whether an image has as few different colors as a mask; False where it cannot be read."""
    from freqmask.data.decode import open_file

    try:
        image = open_file(path).decode()
    except Exception:  # decoders raise anything on broken files
        return False
    rows, columns = (max(1, side // 64) for side in image.shape[1:])
    sample = image[:, ::rows, ::columns].reshape(len(image), -1)
    return len(np.unique(sample, axis=1).T) <= COLORS_OF_MASKS


def _stem(name: bytes) -> bytes:
    return name.rpartition(b".")[0] or name


def _is_junk(name: bytes) -> bool:
    return name.startswith(b".") or name.lower() in JUNK


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _suffix(name: bytes) -> bytes:
    stem, dot, suffix = name.rpartition(b".")
    return dot + suffix.lower() if stem else b""


def _size(entry: os.DirEntry[bytes]) -> int:
    """The size in bytes; 0 for a broken link, which is listed as unreadable when its turn comes."""
    try:
        state = entry.stat()
    except OSError:
        return 0
    return min(state.st_size, 2**32 - 1) if stat.S_ISREG(state.st_mode) else 0


def _assemble(folders: dict[bytes, _Folder]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    paths = sorted(folders)
    ordered = [folders[path] for path in paths]
    lengths = np.concatenate([folder.lengths for folder in ordered])
    arrays: dict[str, np.ndarray] = {
        "starts": np.cumsum([0, *(len(folder.lengths) for folder in ordered)], dtype=np.int64),
        "names": np.frombuffer(b"".join(folder.names for folder in ordered), np.uint8),
        "offsets": np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
        "sizes": np.concatenate([folder.sizes for folder in ordered]),
    }
    tree = [
        {name: value for name, value in vars(folder).items() if name not in ("names", "lengths", "sizes")}
        for folder in ordered
    ]
    return {"folders": [os.fsdecode(path) for path in paths], "tree": tree}, arrays


def _known_folders(cached: tuple[dict[str, Any], dict[str, np.ndarray]]) -> dict[bytes, _Folder]:
    """The folders of a cached index, to be reused one by one."""
    about, arrays = cached
    offsets, spans = arrays["offsets"], pairwise(arrays["starts"].tolist())
    known = {}
    for path, entry, (first, last) in zip(about["folders"], about["tree"], spans, strict=True):
        known[os.fsencode(path)] = _Folder(
            names=arrays["names"][offsets[first] : offsets[last]].tobytes(),
            lengths=np.diff(offsets[first : last + 1]),
            sizes=arrays["sizes"][first:last],
            **entry,
        )
    return known
