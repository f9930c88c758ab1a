"""What a URL names: shards, parquet tables, or a folder of images, each read over the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import numpy as np

from freqmask.data.decode import open_bytes, read_suffixes
from freqmask.data.folder import Layout, below, choose_folder, classes_of, lay_out, nothing_to_read
from freqmask.data.index import FolderIndex, index_listing
from freqmask.data.patterns import names_of, split_pattern
from freqmask.data.pictures import Picture
from freqmask.data.prepare import MANIFEST
from freqmask.data.remote import RemoteFiles
from freqmask.data.remote_tables import RemoteTables
from freqmask.data.shard_index import INDEX_NAME
from freqmask.data.shards import open_shards, splits_in_shards
from freqmask.data.source import Pages, Source, SourceSummary
from freqmask.data.splits import choose_split, split_note
from freqmask.data.table_layout import files_by_split, tables_of_one
from freqmask.errors import BadImage, UserError

Listing = dict[str, int | None]
HUB = "hf://"
ON_HUB = (f"{HUB}datasets/", f"{HUB}buckets/")


def open_remote(text: str, pages: Pages, split: str) -> Source:
    """The images that a URL names.

    Args:
        text: of a folder, of a ``.tar`` or ``.parquet``, of ``shards.index`` or ``prepare.json`` beside shards, or a
            pattern.
        pages: what the pages of a TIFF are.
        split: as for `freqmask.data.sources.open_source`.

    Raises:
        UserError: it is not there, cannot be listed, or holds nothing to read.
    """
    if pages == "images":
        raise UserError(f"pages (images) is for files on this machine; copy {text} here first")
    if text.startswith(HUB) and not text.startswith(ON_HUB):
        raise UserError(
            f"DATA ({text}) is no data set; Hugging Face's are {HUB}datasets/NAME, read where they are, and hf:NAME, "
            "fetched first"
        )
    if text.endswith(".parquet"):
        files, names = _by_pattern(text)
        return _open_tables(files, names, split, text)
    shards = _shards(text)
    if shards is not None:
        return open_shards(*shards, split, text)
    files, listing = _listed(text)
    tables = _tables(listing, text)
    return _open_tables(files, tables, split, text) if tables else _open_folder(files, listing, split)


def splits_behind(text: str) -> list[str]:
    """The names of the splits of what a URL names."""
    if text.endswith(".parquet"):
        return sorted(files_by_split(_by_pattern(text)[1]))
    shards = _shards(text)
    if shards is not None:
        return splits_in_shards(*shards, text)
    files = RemoteFiles(text)
    listing = files.listing()
    tables = _tables(listing, text)
    if tables:
        return sorted(files_by_split(tables))
    layout = _layout(files, listing)
    return layout.splits if layout.certain else []


def _shards(text: str) -> tuple[RemoteFiles, list[str] | None] | None:
    """Where the shards lie and which of them are meant; None where there are none."""
    name = PurePosixPath(urlsplit(text).path).name
    if name in (INDEX_NAME, MANIFEST):
        return RemoteFiles(text.rpartition("/")[0]), None
    if text.endswith(".tar"):
        return _by_pattern(text)
    files = RemoteFiles(text)
    return (files, None) if files.index_file() is not None or files.names() else None


def _by_pattern(text: str) -> tuple[RemoteFiles, list[str]]:
    scheme, _, rest = text.partition("://")
    root, pattern = split_pattern(rest)
    files = RemoteFiles(f"{scheme}://{root}")
    names = names_of(pattern, files.matching)
    if not names:
        raise UserError(f"DATA ({text}): no file fits the pattern; quote it, and check its folder")
    return files, names


def _listed(text: str) -> tuple[RemoteFiles, Listing]:
    """All files below a URL, at least one."""
    files = RemoteFiles(text)
    listing = files.listing()
    if listing:
        return files, listing
    raise UserError(
        f"DATA ({text}) is empty, not there, or cannot be listed; name shards by a pattern such as "
        f"{text.rstrip('/')}/shards-{{000000..000009}}.tar, or serve the {INDEX_NAME} of freqmask prepare"
    )


def _tables(listing: Listing, text: str) -> list[str]:
    """The parquet files of a folder without images; else none."""
    suffixes = {PurePosixPath(name).suffix.lower() for name in listing}
    return [] if suffixes & read_suffixes() else tables_of_one(listing, text)


def _open_tables(files: RemoteFiles, names: Sequence[str], split: str, text: str) -> Source:
    by_split = files_by_split(names)
    chosen = choose_split(by_split, split, text)
    notes = [split_note(chosen, by_split)] if chosen and split == "auto" else []
    return RemoteTables(files, list(names) if chosen is None else by_split[chosen], notes)


def _open_folder(files: RemoteFiles, listing: Listing, split: str) -> Source:
    layout = _layout(files, listing)
    chosen = choose_folder(layout, split, files.root)
    notes = [split_note(chosen, layout.splits)] if chosen and split == "auto" else []
    return RemoteFolder(files, layout, layout.part(chosen) if chosen else None, notes)


def _layout(files: RemoteFiles, listing: Listing) -> Layout:
    return lay_out(index_listing(files.root, listing, read_suffixes()))


class RemoteFolder(Source):
    """A folder of images behind a URL: one request an image.

    Args:
        files: where they lie.
        layout: of what lies there.
        split: the folder below that is used, as a relative path, or None for all.
        notes: sentences for the summary.
    """

    def __init__(self, files: RemoteFiles, layout: Layout, split: str | None, notes: list[str]) -> None:
        self.files = files
        self.prefix = f"{split}/" if split else ""
        self.index: FolderIndex = below(layout.index, split or "")
        if len(self.index) == 0:
            raise UserError(nothing_to_read(files.root, self.index))
        self.class_names, self._class_of_folder, self.why_unlabelled = classes_of(self.index)
        self.notes = [
            *notes,
            *layout.notes,
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
        number = int(self._class_of_folder[self.index.folder_of(index)])
        return None if number < 0 else number

    def all_labels(self) -> np.ndarray:
        return np.repeat(self._class_of_folder, np.diff(self.index.starts))

    def fingerprint(self) -> str:
        return self.index.fingerprint

    def summary(self) -> SourceSummary:
        kind = f"folder on {urlsplit(self.files.root).scheme}"
        return SourceSummary(kind, len(self), len(self), dict(self.index.ignored), list(self.notes))
