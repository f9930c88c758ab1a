"""A folder of images, flat or nested, with or without a folder for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from freqmask.data.cache import cache_file, read_arrays, write_arrays
from freqmask.data.decode import EXTRAS, count_images, open_file, read_file, read_suffixes
from freqmask.data.index import FolderIndex, index_folder
from freqmask.data.patterns import unpacker_of
from freqmask.data.pictures import Picture
from freqmask.data.sources import Pages, Source, SourceSummary
from freqmask.data.splits import choose_split, split_note, split_of
from freqmask.errors import UserError


def open_folder(path: Path, pages: Pages = "channels", split: str = "auto") -> Source:
    """The images of a folder; parquet files in it count as one table, where there are no images.

    Args:
        path: the folder.
        pages: what the pages of a TIFF are.
        split: ``auto``, ``all``, or the name of a folder directly below.

    Raises:
        UserError: it holds nothing that can be read, or no such split.
    """
    tables = tables_in(path)
    if tables:
        from freqmask.data.tables import open_tables

        return open_tables(path, tables, split)
    splits = split_folders(path)
    chosen = choose_split(splits, split, str(path))
    notes = [split_note(chosen, splits)] if chosen and split == "auto" else []
    return FolderSource(path, pages, chosen, notes)


def tables_in(path: Path) -> list[Path]:
    """The parquet files of a folder without images, directly in it or in its ``data``; else none."""
    tables = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    return tables if tables and len(index_folder(path, read_suffixes())) == 0 else []


def split_folders(path: Path) -> list[str]:
    """Folders directly below whose names are those of splits."""
    try:
        return sorted(entry.name for entry in path.iterdir() if split_of(entry.name) and entry.is_dir())
    except PermissionError:
        return []  # the index says so in a sentence


class FolderSource(Source):
    """The images below a folder.

    The first level of folders are classes, where there are several and no image lies beside them.

    Args:
        root: the folder.
        pages: what the pages of a TIFF are.
        split: the folder directly below that is used, or None for all.
        notes: sentences for the summary.
    """

    def __init__(
        self, root: Path, pages: Pages = "channels", split: str | None = None, notes: Sequence[str] = ()
    ) -> None:
        self.root, self.pages = root, pages
        self.prefix = f"{split}/" if split else ""
        self.index: FolderIndex = index_folder(root / (split or ""), read_suffixes())
        self.notes = [*notes, *_index_notes(self.index)]
        if len(self.index) == 0:
            raise UserError(nothing_to_read(root / (split or ""), self.index))
        self.class_names, self._class_of_folder = classes_of(self.index)
        # (files + 1,) number of the first image of each file; None where every file is one image
        self._first_images = _first_images(self.index) if pages == "images" else None

    def __len__(self) -> int:
        return len(self.index) if self._first_images is None else int(self._first_images[-1])

    def _file_and_page(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        if self._first_images is None:
            return index, 0
        file = int(np.searchsorted(self._first_images, index, side="right")) - 1
        return file, index - int(self._first_images[file])

    def open(self, index: int) -> Picture:
        file, page = self._file_and_page(index)
        return open_file(self.index.path(file), self.pages, page)

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        if self._first_images is not None:
            return None  # a page is not a file
        path = self.path(index)
        return read_file(path), path.suffix.lower()

    def path(self, index: int) -> Path:
        """The file that holds the image."""
        return self.index.path(self._file_and_page(index)[0])

    def name(self, index: int) -> str:
        file, page = self._file_and_page(index)
        name = self.prefix + self.index.relative(file)
        pages = 1 if self._first_images is None else self._first_images[file + 1] - self._first_images[file]
        return f"{name}#{page}" if pages > 1 else name

    def label(self, index: int) -> int | None:
        if self.class_names is None:
            return None
        return int(self._class_of_folder[self.index.folder_of(self._file_and_page(index)[0])])

    def all_labels(self) -> np.ndarray:
        if self.class_names is None:
            return np.full(len(self), -1, np.int64)
        per_file = np.repeat(self._class_of_folder, np.diff(self.index.starts))
        return per_file if self._first_images is None else np.repeat(per_file, np.diff(self._first_images))

    def fingerprint(self) -> str:
        return self.index.fingerprint

    def summary(self) -> SourceSummary:
        return SourceSummary("folder", len(self), len(self), dict(self.index.ignored), list(self.notes))


def classes_of(index: FolderIndex) -> tuple[list[str] | None, np.ndarray]:
    """Names of the classes, or None, and the class of each folder (folder,), -1 where it has no images."""
    used = np.diff(index.starts) > 0
    levels = [folder.split(b"/") for folder in index.folders]
    # Where all of train/, val/ and test/ are asked for, classes lie one level further down.
    below_splits = all(split_of(os.fsdecode(level[0])) for level, k in zip(levels, used, strict=True) if k)
    depth = int(below_splits)
    per_folder = [level[depth] if len(level) > depth else b"" for level in levels]
    names = sorted({name for name, k in zip(per_folder, used, strict=True) if k})
    if len(names) < 2 or b"" in names:
        return None, np.full(len(levels), -1, np.int64)
    numbers = {name: number for number, name in enumerate(names)}
    classes = [numbers[name] if k else -1 for name, k in zip(per_folder, used, strict=True)]
    return [os.fsdecode(name) for name in names], np.array(classes, np.int64)


def _first_images(index: FolderIndex) -> np.ndarray:
    """(files + 1,) number of the first image of each file, counting pages; cached by fingerprint."""
    file = cache_file("pages", str(index.root), index.fingerprint)
    cached = read_arrays(file)
    if cached:
        return cached[1]["first_images"]
    counts = [count_images(index.path(number), "images") for number in range(len(index))]
    first_images = np.cumsum([0, *counts], dtype=np.int64)
    write_arrays(file, {}, {"first_images": first_images})
    return first_images


def _index_notes(index: FolderIndex) -> list[str]:
    """Sentences on what the index left out."""
    notes = [
        f"{index.ignored[suffix]:,} {suffix} files are not read; pip install '{extra}' reads them."
        for suffix, extra in EXTRAS.items()
        if suffix in index.ignored
    ]
    if index.unreadable:
        some = ", ".join(index.unreadable[:3])
        notes.append(f"{len(index.unreadable):,} folders may not be opened and are left out ({some}).")
    return notes


def nothing_to_read(path: Path | str, index: FolderIndex) -> str:
    """Why a folder without images is refused."""
    if not index.ignored:
        return f"DATA ({path}) holds no images; name a folder with JPEG, PNG, TIFF or .npy files"
    counts = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in index.ignored.items())
    extras = sorted({EXTRAS[suffix] for suffix in index.ignored if suffix in EXTRAS})
    program = unpacker_of(index.ignored)
    if extras:
        way_out = f"pip install '{extras[0]}'"
    elif program is not None:
        way_out = f"unpack them with {program} (a .tar is read as it is)"
    else:
        way_out = "convert them to PNG or TIFF"
    return f"DATA ({path}) holds only files that are not read ({counts}); {way_out}"
