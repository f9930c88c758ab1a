"""How the text that a user types for DATA becomes a source."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from freqmask.data.source import JoinedSource, Pages, Source, SourceSummary, Subset
from freqmask.data.splits import choose_split, split_note
from freqmask.data.storage import (
    INDEX_NAME,
    MANIFEST,
    Files,
    RemoteFiles,
    is_pattern,
    local_files,
    remote_files,
    unpacker_of,
)
from freqmask.errors import UserError, nearest

__all__ = ["JoinedSource", "Pages", "Source", "SourceSummary", "Subset", "open_source", "splits_there"]

IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
REMOTE = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
ARRAY_SUFFIXES = (".npy", ".npz")
HUB = "hf://"
ON_HUB = (f"{HUB}datasets/", f"{HUB}buckets/")


class Located(NamedTuple):
    """What a text names.

    Attributes:
        splits: lists the names of its splits.
        open: the source of a split; also of ``auto`` and ``all``.
    """

    splits: Callable[[], Iterable[str]]
    open: Callable[[str], Source]


def open_source(
    data: str | Path | Source | Sequence[str | Path | Source],
    pages: Pages = "channels",
    split: str = "auto",
    labels: str | Path | None = None,
) -> Source:
    """The images that DATA names.

    Args:
        data: a folder of images or of shards, a ``.tar`` or a pattern of them (``shards-{000..009}.tar``),
            ``.parquet`` tables alike, each here or behind a URL (``s3://``, ``gs://``, ``https://``,
            ``hf://datasets/NAME``); a ``.npy`` or ``.npz``
            file; ``hf:NAME`` of a Hugging Face dataset or a saved copy of one; ``builtin:photos``,
            ``builtin:digits``; an import path ``package.module:name`` of a `Source` (or of something that
            returns one when called); a `Source`; or several of these.
        pages: what the pages of a TIFF are: the channels of one image, or images of their own.
        split: ``auto`` takes ``train`` where there is one beside ``val`` or ``test``; ``all`` takes
            everything; or the name of a split.
        labels: a CSV table with the columns path and label, and optionally split and group.

    Raises:
        UserError: nothing readable there; the message names the way out.
    """
    if pages not in ("channels", "images"):
        raise UserError(
            f"pages ({pages}) must be channels or images; {nearest(pages, ['channels', 'images'])}"
        )
    if labels is not None:
        from freqmask.data.labels import LabelledSource

        return LabelledSource(open_source(data, pages, "all"), Path(labels), split)
    several = [data] if isinstance(data, (str, Path, Source)) else list(data)
    if not several:
        raise UserError("DATA must name at least one folder or file of images; try builtin:photos")
    opened = [one if isinstance(one, Source) else locate(one, pages).open(split) for one in several]
    return opened[0] if len(opened) == 1 else JoinedSource(opened)


def splits_there(data: str | Path | Source, labels: str | Path | None = None) -> list[str]:
    """The names of the splits that ``open_source(data, split=...)`` takes, sorted; maybe none.

    Args:
        data: as for `open_source`; several DATA or a `Source` have no splits.
        labels: a table with a column split, which then decides.

    Raises:
        UserError: the file or the table cannot be read.
    """
    if labels is not None:
        from freqmask.data.labels import read_labels

        return sorted({row.split for row in read_labels(Path(labels)) if row.split})
    return [] if isinstance(data, Source) else sorted(locate(data, "channels").splits())


def locate(data: str | Path, pages: Pages) -> Located:
    """What a text names, before any image is read.

    Args:
        data: one DATA.
        pages: what the pages of a TIFF are.

    Raises:
        UserError: it names nothing.
    """
    text = str(data).removeprefix("file://")
    if text.startswith("builtin:"):
        from freqmask.data.builtin import open_builtin

        return Located(tuple, lambda split: open_builtin(text))
    if text.startswith("hf:") and not REMOTE.match(text):
        return _dataset(text)
    path = Path(text).expanduser()
    if not path.is_dir():
        _refuse_packed(text)
    here = path.exists() or (is_pattern(text) and not REMOTE.match(text))
    if here and text.lower().endswith((".tar", ".parquet")) and not path.is_dir():
        return _named_files(*local_files(text), text, pages)
    if path.exists():
        return _path(path, pages)
    if REMOTE.match(text):
        return _remote(text, pages)
    if IMPORT_PATH.fullmatch(text):
        return Located(tuple, lambda split: import_source(text))
    raise UserError(f"DATA ({text}) does not exist; {_nearest_sibling(path)}")


def _refuse_packed(text: str) -> None:
    """A compressed tar or an archive: no single image can be read out of the middle of it."""
    program = unpacker_of([f".{text.lower().rpartition('.')[2]}"])
    if program is not None:
        raise UserError(
            f"DATA ({text}) is compressed, and no single image can be read out of it; unpack it with {program} "
            "(a .tar is read as it is), then freqmask prepare makes large images fast to read"
        )


def _path(path: Path, pages: Pages) -> Located:
    """A folder, or a file of arrays."""
    if path.is_dir():
        return _folder(path, pages)
    if path.suffix.lower() in ARRAY_SUFFIXES:
        from freqmask.data.arrays import open_array, splits_in_array

        return Located(lambda: splits_in_array(path), lambda split: open_array(path, split))
    raise UserError(
        f"DATA ({path}) must be a folder, a .tar, .npy, .npz or .parquet file; "
        f"for one image name its folder: {path.parent}"
    )


def _folder(path: Path, pages: Pages) -> Located:
    """A folder of this machine: of shards, of a saved dataset, of tables, or of images."""
    from freqmask.data.huggingface import is_saved_dataset
    from freqmask.data.image_folder import open_folder, split_folders, tables_in
    from freqmask.data.shards import has_shards

    if has_shards(path):
        return _shards(*local_files(str(path)), str(path), pages)
    if is_saved_dataset(path):
        return _dataset(path)
    tables = tables_in(path)
    if tables:
        return _tables(local_files(str(path))[0], str(path), tables)
    return Located(lambda: split_folders(path), lambda split: open_folder(path, pages, split))


def _remote(text: str, pages: Pages) -> Located:
    """What a URL names: shards, tables, or a folder of images."""
    if pages == "images":
        raise UserError(f"pages (images) is for files on this machine; copy {text} here first")
    if text.startswith(HUB) and not text.startswith(ON_HUB):
        raise UserError(
            f"DATA ({text}) is no data set; Hugging Face's are {HUB}datasets/NAME, read where they are, and hf:NAME, "
            "fetched first"
        )
    name = PurePosixPath(urlsplit(text).path).name
    if text.endswith((".tar", ".parquet")):
        return _named_files(*remote_files(text), text, pages)
    files = RemoteFiles(text.rpartition("/")[0] if name in (INDEX_NAME, MANIFEST) else text)
    if name in (INDEX_NAME, MANIFEST) or files.index_file() is not None or files.names():
        return _shards(files, None, text, pages)
    return _remote_folder(files, text)


def _remote_folder(files: RemoteFiles, text: str) -> Located:
    from freqmask.data.decode import read_suffixes
    from freqmask.data.image_folder import chosen_part, remote_layout

    listing = files.listing()
    if not listing:
        raise UserError(
            f"DATA ({text}) is empty, not there, or cannot be listed; name shards by a pattern such as "
            f"{text.rstrip('/')}/shards-{{000000..000009}}.tar, or serve the {INDEX_NAME} of freqmask prepare"
        )
    suffixes = {PurePosixPath(path).suffix.lower() for path in listing}
    if ".parquet" in suffixes and not suffixes & read_suffixes():
        from freqmask.data.parquet_index import tables_of_one

        return _tables(files, text, tables_of_one(listing, text))
    layout = remote_layout(files, listing)
    return Located(
        lambda: layout.splits if layout.certain else [], lambda split: chosen_part(files, layout, split)
    )


def _named_files(files: Files, names: list[str] | None, text: str, pages: Pages) -> Located:
    if text.lower().endswith(".tar"):
        return _shards(files, names, text, pages)
    return _tables(files, text, names or [])


def _shards(files: Files, names: list[str] | None, text: str, pages: Pages) -> Located:
    from freqmask.data.shards import open_shards, splits_in_shards

    if pages == "images":
        raise UserError(
            f"pages (images) is for files, DATA ({text}) is shards; freqmask prepare --pages images makes "
            "an image of each page"
        )
    return Located(
        lambda: splits_in_shards(files, names, text), lambda split: open_shards(files, names, split, text)
    )


def _tables(files: Files, text: str, tables: Sequence[str]) -> Located:
    from freqmask.data.parquet import open_tables
    from freqmask.data.parquet_index import files_by_split

    by_split = files_by_split(tables)

    def open_split(split: str) -> Source:
        chosen = choose_split(by_split, split, text)
        notes = [split_note(chosen, by_split)] if chosen and split == "auto" else []
        return open_tables(files, list(tables) if chosen is None else by_split[chosen], notes)

    return Located(lambda: by_split, open_split)


def _dataset(data: str | Path) -> Located:
    from freqmask.data.huggingface import open_hugging_face, splits_of_dataset

    return Located(lambda: splits_of_dataset(data), lambda split: open_hugging_face(data, split))


def import_source(text: str) -> Source:
    """The source that an import path names: an object, or a class or function that returns one.

    Args:
        text: ``package.module:name``.

    Raises:
        UserError: it cannot be imported, or is no `Source`.
    """
    module_name, _, name = text.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"DATA ({text}) is neither a folder nor importable ({error}); check its spelling or PYTHONPATH"
        ) from error
    if not hasattr(module, name):
        hint = nearest(name, [known for known in vars(module) if not known.startswith("_")])
        raise UserError(f"DATA ({text}): {module_name} has no {name}; {hint}")
    found = getattr(module, name)
    source = found() if not isinstance(found, Source) and callable(found) else found
    if not isinstance(source, Source):
        raise UserError(f"DATA ({text}) must be a freqmask.data.sources.Source, or return one when called")
    return source


def _nearest_sibling(path: Path) -> str:
    """A way out of a mistyped path: the most similar entry of the deepest folder on it that exists."""
    existing = next(parent for parent in path.absolute().parents if parent.is_dir())
    try:
        names = [entry.name for entry in existing.iterdir() if not entry.name.startswith(".")]
    except OSError:
        names = []
    wanted = path.absolute().relative_to(existing).parts[0]
    hint = nearest(wanted, names) if names else ""
    if hint.startswith("did you mean"):
        return f"did you mean {str(existing / hint.split(chr(39))[1])!r}?"
    return f"the folder {existing} holds nothing of a similar name"
