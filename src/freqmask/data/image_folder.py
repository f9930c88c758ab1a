"""A folder of images, here or behind a URL: how people lay them out (splits, classes, masks, folders that wrap
everything), and its images.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import numpy as np

from freqmask.data.cache import cache_file, hash_of, read_arrays, write_arrays
from freqmask.data.decode import EXTRAS, count_images, open_bytes, open_file, read_file, read_suffixes
from freqmask.data.index import MASK_FILE, FolderIndex, has_few_colors, index_folder, index_listing
from freqmask.data.pixels import Pages, Picture
from freqmask.data.source import Source, SourceSummary
from freqmask.data.splits import Located, split_of
from freqmask.data.storage import RemoteFiles, nearest_path, unpacker_of
from freqmask.errors import BadImage, UserError
from freqmask.rng import identity_of

EACH_A_REQUEST = (
    "Each image is a request of its own; freqmask prepare makes shards, which are read in pieces of 4 MB."
)
IMAGE_WORDS = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit", "rgb", "photos", "pictures")
MASK_WORDS = (
    "segmentationclass", "segmentationobject", "segmentations", "segmentation", "annotations", "annotation", "annot",
    "labelmaps", "labels", "label", "masks", "mask", "groundtruth", "gtfine", "gtcoarse", "gts", "gt", "trimaps",
    "trimap", "mattes", "segs", "seg",
)  # fmt: skip
_SIBLINGS = 8
_LOOKED_AT = 3  # files of a folder that may hold masks


@dataclass
class Layout:
    """How a folder is laid out."""

    index: FolderIndex  # the images, masks passed over
    base: bytes = b""  # the folder below which classes or splits begin; empty for the root
    splits: list[str] = field(default_factory=list)  # names of the folders below the base that are splits
    certain: bool = False  # False where those may as well be classes, such as ``test`` beside ``apple``
    notes: list[str] = field(default_factory=list)  # sentences for the user


def lay_out(index: FolderIndex, is_mask: Callable[[bytes], bool] | None = None) -> Layout:
    """How the images of a folder are laid out; ``is_mask`` tells of a file, None where none can be looked at."""
    masks = _mask_folders(index, is_mask)
    notes = [
        f"{os.fsdecode(mask)} holds masks of {os.fsdecode(images)} and is passed over."
        for mask, images in masks.items()
    ]
    if masks:
        passed_over = {number for mask in masks for number in index.within(mask)}
        index = index.select(number for number in range(len(index.folders)) if number not in passed_over)
    if index.masks:
        notes.append(f"{index.masks:,} masks beside their images (such as a_mask.png) are passed over.")
    base, splits, certain = _find_splits(index)
    children = _children(index)
    inner = {
        os.fsdecode(name)
        for child in children.get(base, [])
        for name in children.get(_joined(base, child), [])
    }
    if not splits and {"train"} < {split_of(name) for name in inner} - {None}:
        some = " and ".join(sorted(name for name in inner if split_of(name)))
        notes.append(
            f"{some} lie in folders side by side, and all are used; --labels with a column split parts them."
        )
    return Layout(index, base, splits, certain, notes)


def _find_splits(index: FolderIndex) -> tuple[bytes, list[str], bool]:
    """Where classes or splits begin, the splits there, and whether they can be nothing else."""
    children, base = _children(index), b""
    while True:
        names = children.get(base, [])
        kinds = {os.fsdecode(name): split_of(os.fsdecode(name)) for name in names}
        splits = sorted(name for name, kind in kinds.items() if kind)
        if splits:
            usual = {kinds[name] for name in splits}
            return base, splits, len(splits) == len(names) or ("train" in usual and len(usual) > 1)
        if len(names) != 1 or _files_in(index, base):
            return base, [], False
        base = _joined(base, names[0])


def _children(index: FolderIndex) -> dict[bytes, list[bytes]]:
    """Relative path of each folder -> the names of those in it."""
    names: dict[bytes, list[bytes]] = {}
    for folder in index.folders:
        if folder:
            parent, _, name = folder.rpartition(b"/")
            names.setdefault(parent, []).append(name)
    return names


def _files_in(index: FolderIndex, folder: bytes) -> int:
    number = index.folders.index(folder)
    return int(index.starts[number + 1] - index.starts[number])


def _joined(*parts: bytes) -> bytes:
    return b"/".join(part for part in parts if part)


def _mask_folders(index: FolderIndex, is_mask: Callable[[bytes], bool] | None) -> dict[bytes, bytes]:
    """Folder of masks -> the folder beside it that holds their images."""
    masks = {}
    for parent, names in _children(index).items():
        for name in names:
            word = _mask_word(name)
            if word is None:
                continue
            siblings = [other for other in names if other != name and _mask_word(other) is None]
            named = [other for other in siblings if _belongs(name, word, other)]
            # Among very many folders a mask is a class like the others (ImageNet has three of them).
            for other in named or (siblings if len(siblings) <= _SIBLINGS else []):
                pair = _joined(parent, name), _joined(parent, other)
                if other in named or _looks_like_masks(index, *pair, is_mask):
                    masks[pair[0]] = pair[1]
                    break
    return masks


def _plain(name: bytes) -> str:
    return "".join(letter for letter in os.fsdecode(name).lower() if letter.isalnum())


def _mask_word(name: bytes) -> str | None:
    plain = _plain(name)
    return next((word for word in MASK_WORDS if plain.startswith(word) or plain.endswith(word)), None)


def _belongs(mask: bytes, word: str, images: bytes) -> bool:
    """Whether names alone say so: masks/images, train_masks/train, labelsTr/imagesTr."""
    rest, plain = _without(_plain(mask), word), _plain(images)
    if rest and rest == plain:
        return split_of(os.fsdecode(images)) is not None
    return any(
        (plain.startswith(image) or plain.endswith(image)) and _without(plain, image) == rest
        for image in IMAGE_WORDS
    )


def _without(plain: str, word: str) -> str:
    return plain.removeprefix(word) if plain.startswith(word) else plain.removesuffix(word)


def _looks_like_masks(
    index: FolderIndex, masks: bytes, images: bytes, is_mask: Callable[[bytes], bool] | None
) -> bool:
    """Whether a folder's files have the names of those beside it, and few colors where those have many."""
    by_stem, images_by_stem = dict(_stems_below(index, masks)), dict(_stems_below(index, images))
    partners = [stem for stem in by_stem if stem in images_by_stem]
    if is_mask is None or len(partners) < 0.9 * len(by_stem):
        return False
    some = partners[:_LOOKED_AT]
    return all(is_mask(by_stem[stem]) and not is_mask(images_by_stem[stem]) for stem in some)


def _stems_below(index: FolderIndex, folder: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(path relative to the folder without suffix and without what marks a mask, path) of each file below."""
    for number in index.within(folder):
        path = index.folders[number]
        for name in index.names_in(number):
            stem = name.rpartition(b".")[0]
            marked = MASK_FILE.fullmatch(stem)
            yield _joined(path[len(folder) + 1 :], marked[1] if marked else stem), _joined(path, name)


def classes_of(index: FolderIndex) -> tuple[list[str] | None, np.ndarray, str]:
    """Names of the classes, or None; the class of each folder (folder,), -1 without; why there are none."""
    base, splits, certain = _find_splits(index)
    tops = [_joined(base, os.fsencode(split)) for split in splits] if certain else [base]
    # Where all of train/, val/ and test/ are asked for, classes lie further down, in each of them at its own depth.
    parts = [_class_folders(index, top) for top in tops]
    names = sorted({name for part, _ in parts for name in part.values()})
    reason = next((reason for _, reason in parts if reason), "")
    labels = np.full(len(index.folders), -1, np.int64)
    if len(names) < 2:
        return None, labels, reason
    numbers = {name: number for number, name in enumerate(names)}
    for part, _ in parts:
        for folder, name in part.items():
            labels[folder] = numbers[name]
    return [os.fsdecode(name) for name in names], labels, reason


def _class_folders(index: FolderIndex, top: bytes) -> tuple[dict[int, bytes], str]:
    """Number of a folder with images -> its class; or none, and why."""
    children, base = _children(index), top
    while len(children.get(base, [])) == 1 and not _files_in(index, base):
        base = _joined(base, children[base][0])
    depth = base.count(b"/") + 1 if base else 0
    sizes = np.diff(index.starts)
    used = {number: index.folders[number].split(b"/") for number in index.within(base) if sizes[number]}
    where = os.fsdecode(base) or "the folder itself"
    classes = {  # composed: a Mac's name of a class is that of other systems
        number: os.fsencode(unicodedata.normalize("NFC", os.fsdecode(levels[depth])))
        for number, levels in used.items()
        if len(levels) > depth and levels[depth]
    }
    loose = [number for number in used if number not in classes]
    if not classes:
        return {}, f"its images lie in {where}, and not in a folder a class"
    if loose:
        names = index.names_in(loose[0])
        first = os.fsdecode(_joined(index.folders[loose[0]], names[0]))
        beside = ", ".join(os.fsdecode(name) for name in sorted(set(classes.values()))[:3])
        where = f"beside the class folders ({beside}); move them into one"
        return {}, f"{len(names):,} images (first {first!r}) lie {where}"
    return classes, ""


def locate_folder(root: Path | RemoteFiles, index: FolderIndex, pages: Pages = "channels") -> Located:
    """The images of a folder, here or behind a URL; its splits are the folders below that are named so.

    Behind a URL masks are told by names alone.
    """
    if isinstance(root, Path):
        layout = lay_out(index, lambda relative: has_few_colors(root / os.fsdecode(relative)))
    else:
        layout = lay_out(index)

    def open_split(split: str | None, notes: list[str]) -> Source:
        part = os.fsdecode(_joined(layout.base, os.fsencode(split))) if split else None
        return FolderSource(root, pages, part, notes, layout)

    where = str(root) if isinstance(root, Path) else root.root
    return Located(where, open_split, layout.splits, layout.certain)


def is_image_file(text: str | Path) -> bool:
    """Whether it names one image here; a ``.npy`` alone is a stack of them."""
    path = Path(text).expanduser()
    return path.suffix.lower() in read_suffixes() - {".npy"} and path.is_file()


@contextmanager
def named_image(file: str | Path) -> Iterator[Path]:
    """The path of an image that a person named alone; where it is missing or cannot be read, a UserError says so."""
    path = Path(file).expanduser()
    try:
        yield path
    except BadImage as error:
        if isinstance(error.__cause__, FileNotFoundError) and not path.is_symlink():
            raise UserError(f"image ({file}) does not exist; {nearest_path(path)}") from error
        raise UserError(f"image ({file}) cannot be read: {error.reason}; name another file") from error


def locate_files(paths: Sequence[Path], pages: Pages) -> Located:
    """Images that are named one by one, as a shell's ``*.jpg`` does: all of them, whatever they are called."""
    # names stay those of links, unless ``..`` hides what they lie in
    files = [(p.parent.resolve() / p.name if ".." in p.parts else p).absolute() for p in paths]
    root = Path(os.path.commonpath([path.parent for path in files]))
    sizes: dict[str, int | None] = {str(path.relative_to(root)): path.stat().st_size for path in files}
    index = index_listing(str(root), sizes, read_suffixes(), named=True)
    return Located(str(root), lambda split, notes: FolderSource(root, pages, None, notes, Layout(index)))


class FolderSource(Source):
    """The images below a folder, here or behind a URL, where an image is a request.

    Where several folders lie beside each other below the one that holds everything, and no image beside them,
    those are classes. ``split`` is the folder below that is used, as a relative path; without a ``layout`` all images
    are.
    """

    def __init__(
        self,
        root: Path | RemoteFiles,
        pages: Pages = "channels",
        split: str | None = None,
        notes: Sequence[str] = (),
        layout: Layout | None = None,
    ) -> None:
        self.pages, self.files = pages, root if isinstance(root, RemoteFiles) else None
        self._last = (-1, b"")  # the image that was fetched last: `prepare` wants its pixels, then its file
        self.root = Path(root.root) if isinstance(root, RemoteFiles) else root
        self.prefix = f"{split}/" if split else ""
        layout = layout or Layout(index_folder(self.root, read_suffixes()))
        self.index = layout.index
        if split:
            self.index = layout.index.select(layout.index.within(os.fsencode(split)), os.fsencode(split))
        self.notes = [*notes, *layout.notes, *_index_notes(self.index)]
        self.notes += [EACH_A_REQUEST] if self.files else []
        if len(self.index) == 0:
            where = self.files.url(split or "") if self.files else self.index.root
            raise UserError(nothing_to_read(where, self.index))
        self.class_names, self._class_of_folder, self.why_unlabelled = classes_of(self.index)
        # (files + 1,) number of the first image of each file; None where every file is one image
        self._first_images = _first_images(self.index) if pages == "images" else None

    def __len__(self) -> int:
        return len(self.index) if self._first_images is None else int(self._first_images[-1])

    def _file_and_page(self, index: int) -> tuple[int, int | None]:
        """The number of its file; that of its page where the file has several that are images."""
        self.check(index)
        if self._first_images is None:
            return index, None
        file = int(np.searchsorted(self._first_images, index, side="right")) - 1
        first, after = self._first_images[file : file + 2].tolist()
        return file, index - first if after - first > 1 else None

    def open(self, index: int) -> Picture:
        file, page = self._file_and_page(index)
        if self.files is not None:
            return open_bytes(self._fetched(index))
        return open_file(self.index.path(file), self.pages, page or 0)

    def _fetched(self, index: int) -> bytes:
        assert self.files is not None
        fetched, data = self._last
        if fetched != index:
            try:
                data = self.files.read(self.name(index))
            except FileNotFoundError as error:
                raise BadImage("the file is gone") from error
            self._last = index, data
        return data

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        if self._first_images is not None:
            return None  # a page is not a file
        if self.files is not None:
            return self._fetched(index), PurePosixPath(self.name(index)).suffix.lower()
        path = self.path(index)
        return read_file(path), path.suffix.lower()

    def path(self, index: int) -> Path:
        """The file that holds the image."""
        return self.index.path(self._file_and_page(index)[0])

    def name(self, index: int) -> str:
        file, page = self._file_and_page(index)
        name = self.prefix + self.index.relative(file)
        return name if page is None else f"{name}#{page}"

    def group(self, index: int) -> str | None:
        """The file of a page: slices of one scan are near copies of each other."""
        file, page = self._file_and_page(index)
        return None if page is None else self.prefix + self.index.relative(file)

    def identities(self) -> np.ndarray:
        if self._first_images is not None:
            return super().identities()
        prefix = os.fsencode(self.prefix)
        return np.array([identity_of(prefix + path) for path in self.index.paths()], np.int64)

    def label(self, index: int) -> int | None:
        number = int(self._class_of_folder[self.index.folder_of(self._file_and_page(index)[0])])
        return None if number < 0 else number

    def all_labels(self) -> np.ndarray:
        per_file = np.repeat(self._class_of_folder, np.diff(self.index.starts))
        return per_file if self._first_images is None else np.repeat(per_file, np.diff(self._first_images))

    def fingerprint(self) -> str:
        return self.index.fingerprint

    def content_stamp(self) -> str:
        return self.index.content_stamp if self.files is None else self._listed_stamp

    @cached_property
    def _listed_stamp(self) -> str:  # asked for at every corruption of `robustness`
        assert self.files is not None
        states = [self.files.listed_state(os.fsdecode(path)) for path in self.index.paths()]
        return hash_of(self.fingerprint(), repr(states))

    def summary(self) -> SourceSummary:
        kind = "folder" if self.files is None else f"folder on {urlsplit(self.files.root).scheme}"
        return SourceSummary(kind, len(self), len(self), dict(self.index.ignored), list(self.notes))


def _first_images(index: FolderIndex) -> np.ndarray:
    """(files + 1,) number of the first image of each file, counting pages; cached."""
    file = cache_file("pages", 2, str(index.root), index.content_stamp)
    cached = read_arrays(file, holding=["first_images"])
    if cached:
        return cached[1]["first_images"]
    counts = [count_images(index.path(number), "images") for number in range(len(index))]
    first_images = np.cumsum([0, *counts], dtype=np.int64)
    write_arrays(file, {}, {"first_images": first_images})
    return first_images


def _index_notes(index: FolderIndex) -> list[str]:
    notes = [
        f"{index.ignored[suffix]:,} {suffix} files are not read; pip install '{extra}' reads them."
        for suffix, extra in EXTRAS.items()
        if suffix in index.ignored
    ]
    if index.own:
        some = ", ".join([*index.own[:3], *(["..."] if len(index.own) > 3 else [])])
        notes.append(f"What freqmask wrote here itself is passed over ({some}).")
    if index.unreadable:
        some = ", ".join(index.unreadable[:3])
        notes.append(f"{len(index.unreadable):,} folders may not be opened and are left out ({some}).")
    return notes


def nothing_to_read(path: Path | str, index: FolderIndex) -> str:
    """Why a folder without images is refused."""
    if index.own and not index.ignored:
        return f"DATA ({path}) holds nothing but what freqmask wrote itself; name a folder with images"
    if not index.ignored:
        return f"DATA ({path}) holds no images; name a folder with JPEG, PNG, TIFF or .npy files"
    counts = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in index.ignored.items())
    extras = sorted({EXTRAS[suffix] for suffix in index.ignored if suffix in EXTRAS})
    program = unpacker_of(index.ignored)
    if extras:
        way_out = f"pip install '{extras[0]}'"
    elif program is not None:
        way_out = f"unpack them with {program} (a .tar is read as it is)"
    elif ".tar" in index.ignored:
        way_out = "name the folder that holds the .tar files, or the files by a pattern"
    else:
        way_out = "convert them to PNG or TIFF"
    return f"DATA ({path}) holds only files that are not read ({counts}); {way_out}"
