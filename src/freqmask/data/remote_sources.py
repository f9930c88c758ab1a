"""What a URL names: shards, or a folder of images, each read over the network."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import cast
from urllib.parse import urlsplit

import numpy as np

from freqmask.data.decode import open_bytes, read_suffixes
from freqmask.data.folder import classes_of, nothing_to_read
from freqmask.data.index import FolderIndex, index_listing
from freqmask.data.pictures import Picture
from freqmask.data.prepare import MANIFEST
from freqmask.data.remote import RemoteFiles
from freqmask.data.shard_index import INDEX_NAME
from freqmask.data.shards import (
    PATTERN,
    ShardFiles,
    expand_braces,
    open_shards,
    split_pattern,
    splits_in_shards,
)
from freqmask.data.sources import Pages, Source, SourceSummary
from freqmask.data.splits import choose_split, split_note, split_of
from freqmask.errors import BadImage, UserError


def open_remote(text: str, pages: Pages, split: str) -> Source:
    """The images that a URL names.

    Args:
        text: of a folder, of a tar, of ``shards.index`` or ``prepare.json`` beside some, or a pattern.
        pages: what the pages of a TIFF are.
        split: as for `freqmask.data.sources.open_source`.

    Raises:
        UserError: it is not there, cannot be listed, or holds nothing to read.
    """
    if pages == "images":
        raise UserError(f"pages (images) is for files on this machine; copy {text} here first")
    shards = _shards(text)
    if shards is not None:
        return open_shards(*shards, split, text)
    return _open_folder(text, split)


def splits_behind(text: str) -> list[str]:
    """The names of the splits of what a URL names."""
    shards = _shards(text)
    if shards is not None:
        return splits_in_shards(*shards, text)
    return _split_folders(RemoteFiles(text).listing())


def _shards(text: str) -> tuple[ShardFiles, list[str] | None] | None:
    """Where the shards lie and which of them are meant; None for a folder of images."""
    name = PurePosixPath(urlsplit(text).path).name
    if name in (INDEX_NAME, MANIFEST):
        return _as_files(text.rpartition("/")[0]), None
    if text.endswith(".tar"):
        return _by_pattern(text)
    files = RemoteFiles(text)
    if files.index_file() is not None or files.names():
        return cast(ShardFiles, files), None
    return None


def _as_files(root: str) -> ShardFiles:
    return cast(ShardFiles, RemoteFiles(root))


def _by_pattern(text: str) -> tuple[ShardFiles, list[str]]:
    scheme, _, rest = text.partition("://")
    root, pattern = split_pattern(rest)
    files = RemoteFiles(f"{scheme}://{root}")
    names = [
        name
        for part in expand_braces(pattern)
        for name in (files.matching(part) if PATTERN.search(part) else [part])
    ]
    if not names:
        raise UserError(f"DATA ({text}): no file fits the pattern; quote it, and check its folder")
    return cast(ShardFiles, files), names


def _open_folder(text: str, split: str) -> Source:
    files = RemoteFiles(text)
    listing = files.listing()
    if not listing:
        raise UserError(
            f"DATA ({text}) is empty, not there, or cannot be listed; name shards by a pattern such as "
            f"{text.rstrip('/')}/shards-{{000000..000009}}.tar, or serve the {INDEX_NAME} of freqmask prepare"
        )
    splits = _split_folders(listing)
    chosen = choose_split(splits, split, text)
    notes = [split_note(chosen, splits)] if chosen and split == "auto" else []
    return RemoteFolder(files, listing, chosen, notes)


def _split_folders(listing: dict[str, int | None]) -> list[str]:
    return sorted({name.split("/")[0] for name in listing if "/" in name and split_of(name.split("/")[0])})


class RemoteFolder(Source):
    """A folder of images behind a URL: one request an image.

    Args:
        files: where they lie.
        listing: path -> bytes of each file there.
        split: the folder directly below that is used, or None for all.
        notes: sentences for the summary.
    """

    def __init__(
        self, files: RemoteFiles, listing: dict[str, int | None], split: str | None, notes: list[str]
    ) -> None:
        self.files = files
        self.prefix = f"{split}/" if split else ""
        used = {
            name.removeprefix(self.prefix): size
            for name, size in listing.items()
            if name.startswith(self.prefix)
        }
        self.index: FolderIndex = index_listing(files.root, used, read_suffixes())
        if len(self.index) == 0:
            raise UserError(nothing_to_read(files.root, self.index))
        self.class_names, self._class_of_folder = classes_of(self.index)
        self.notes = [
            *notes,
            "Each image is a request of its own; freqmask prepare makes shards, which are read in pieces of 4 MB.",
        ]

    def __len__(self) -> int:
        return len(self.index)

    def open(self, index: int) -> Picture:
        return open_bytes(self._bytes(index))

    def _bytes(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        try:
            return self.files.read(self.name(index))
        except FileNotFoundError as error:
            raise BadImage("the file is gone") from error

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        return self._bytes(index), PurePosixPath(self.name(index)).suffix.lower()

    def name(self, index: int) -> str:
        return self.prefix + self.index.relative(index)

    def label(self, index: int) -> int | None:
        return None if self.class_names is None else int(self._class_of_folder[self.index.folder_of(index)])

    def all_labels(self) -> np.ndarray:
        if self.class_names is None:
            return np.full(len(self), -1, np.int64)
        return np.repeat(self._class_of_folder, np.diff(self.index.starts))

    def fingerprint(self) -> str:
        return self.index.fingerprint

    def summary(self) -> SourceSummary:
        kind = f"folder on {urlsplit(self.files.root).scheme}"
        return SourceSummary(kind, len(self), len(self), dict(self.index.ignored), list(self.notes))
