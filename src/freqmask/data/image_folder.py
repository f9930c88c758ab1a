"""A folder of images, here or behind a URL: flat or nested, with or without a folder for each class."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import numpy as np

from freqmask.data.cache import cache_file, read_arrays, write_arrays
from freqmask.data.decode import EXTRAS, count_images, open_bytes, open_file, read_file, read_suffixes
from freqmask.data.folder_layout import Layout, below, choose_folder, classes_of, lay_out
from freqmask.data.index import FolderIndex, has_few_colors, index_folder, index_listing
from freqmask.data.pixels import Picture
from freqmask.data.source import Pages, Source, SourceSummary
from freqmask.data.splits import split_note
from freqmask.data.storage import RemoteFiles, unpacker_of
from freqmask.errors import BadImage, UserError


def open_folder(path: Path, pages: Pages = "channels", split: str = "auto") -> Source:
    """The images of a folder of this machine.

    Args:
        path: the folder.
        pages: what the pages of a TIFF are.
        split: ``auto``, ``all``, or the name of a folder of a split.

    Raises:
        UserError: it holds nothing that can be read, or no such split.
    """
    return chosen_part(path, local_layout(path), split, pages)


def chosen_part(
    root: Path | RemoteFiles, layout: Layout, split: str, pages: Pages = "channels"
) -> FolderSource:
    """The images of a split of a folder.

    Args:
        root: the folder.
        layout: how it is laid out.
        split: ``auto``, ``all``, or the name of a folder of a split.
        pages: what the pages of a TIFF are.

    Raises:
        UserError: it holds no image, or no such split.
    """
    chosen = choose_folder(layout, split, str(root if isinstance(root, Path) else root.root))
    notes = [split_note(chosen, layout.splits)] if chosen and split == "auto" else []
    return FolderSource(root, pages, layout.part(chosen) if chosen else None, notes, layout)


def local_layout(path: Path) -> Layout:
    """The layout of a folder of this machine."""
    return lay_out(
        index_folder(path, read_suffixes()), lambda relative: has_few_colors(path / os.fsdecode(relative))
    )


def remote_layout(files: RemoteFiles, listing: Mapping[str, int | None]) -> Layout:
    """The layout of a folder behind a URL, of which all files are listed: by names alone."""
    return lay_out(index_listing(files.root, listing, read_suffixes()))


def split_folders(path: Path) -> list[str]:
    """The folders below that are splits and nothing else."""
    layout = local_layout(path)
    return layout.splits if layout.certain else []


def tables_in(path: Path) -> list[str]:
    """The parquet files of a folder without images, directly in it or in its ``data``; else none."""
    found = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    if not found or len(index_folder(path, read_suffixes())):
        return []
    return [table.relative_to(path).as_posix() for table in found]


EACH_A_REQUEST = (
    "Each image is a request of its own; freqmask prepare makes shards, which are read in pieces of 4 MB."
)


class FolderSource(Source):
    """The images below a folder.

    Where several folders lie beside each other below the one that holds everything, and no image beside them,
    those are classes.

    Args:
        root: the folder, here or behind a URL, where an image is a request.
        pages: what the pages of a TIFF are.
        split: the folder below that is used, as a relative path, or None for all.
        notes: sentences for the summary.
        layout: of the root; None reads all of its images.
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
        self.root = Path(root.root) if isinstance(root, RemoteFiles) else root
        self.prefix = f"{split}/" if split else ""
        layout = layout or Layout(index_folder(self.root, read_suffixes()))
        self.index = below(layout.index, split or "")
        self.notes = [
            *notes,
            *layout.notes,
            *_index_notes(self.index),
            *([EACH_A_REQUEST] if self.files else []),
        ]
        if len(self.index) == 0:
            raise UserError(
                nothing_to_read(self.files.url(split or "") if self.files else self.index.root, self.index)
            )
        self.class_names, self._class_of_folder, self.why_unlabelled = classes_of(self.index)
        # (files + 1,) number of the first image of each file; None where every file is one image
        self._first_images = _first_images(self.index) if pages == "images" else None

    def __len__(self) -> int:
        return len(self.index) if self._first_images is None else int(self._first_images[-1])

    def _file_and_page(self, index: int) -> tuple[int, int]:
        self.check(index)
        if self._first_images is None:
            return index, 0
        file = int(np.searchsorted(self._first_images, index, side="right")) - 1
        return file, index - int(self._first_images[file])

    def open(self, index: int) -> Picture:
        file, page = self._file_and_page(index)
        if self.files is not None:
            return open_bytes(self._fetched(index))
        return open_file(self.index.path(file), self.pages, page)

    def _fetched(self, index: int) -> bytes:
        assert self.files is not None
        try:
            return self.files.read(self.name(index))
        except FileNotFoundError as error:
            raise BadImage("the file is gone") from error

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
        pages = 1 if self._first_images is None else self._first_images[file + 1] - self._first_images[file]
        return f"{name}#{page}" if pages > 1 else name

    def label(self, index: int) -> int | None:
        number = int(self._class_of_folder[self.index.folder_of(self._file_and_page(index)[0])])
        return None if number < 0 else number

    def all_labels(self) -> np.ndarray:
        per_file = np.repeat(self._class_of_folder, np.diff(self.index.starts))
        return per_file if self._first_images is None else np.repeat(per_file, np.diff(self._first_images))

    def fingerprint(self) -> str:
        return self.index.fingerprint

    def summary(self) -> SourceSummary:
        kind = "folder" if self.files is None else f"folder on {urlsplit(self.files.root).scheme}"
        return SourceSummary(kind, len(self), len(self), dict(self.index.ignored), list(self.notes))


def _first_images(index: FolderIndex) -> np.ndarray:
    """(files + 1,) number of the first image of each file, counting pages; cached by fingerprint."""
    file = cache_file("pages", 2, str(index.root), index.fingerprint)
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
    else:
        way_out = "convert them to PNG or TIFF"
    return f"DATA ({path}) holds only files that are not read ({counts}); {way_out}"
