"""How the text that a user types for DATA becomes a source."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from freqmask.data.arrays import locate_array
from freqmask.data.builtin import open_builtin
from freqmask.data.decode import read_suffixes
from freqmask.data.image_folder import locate_folder
from freqmask.data.index import index_folder
from freqmask.data.source import JoinedSource, Pages, Source, SourceSummary, Subset
from freqmask.data.splits import Located, locate_labelled
from freqmask.data.storage import (
    INDEX_NAME,
    MANIFEST,
    Files,
    LocalFiles,
    RemoteFiles,
    files_of,
    is_pattern,
    unpacker_of,
)
from freqmask.errors import UserError, nearest
from freqmask.imports import IMPORT_PATH, import_object
from freqmask.training.files import marked_in

__all__ = ["JoinedSource", "Pages", "Source", "SourceSummary", "Subset", "open_source", "splits_there"]

SAVED = ("dataset_dict.json", "state.json")  # what datasets.save_to_disk leaves, of several splits and of one
REMOTE = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
HUB = "hf://"
ON_HUB = (f"{HUB}datasets/", f"{HUB}buckets/")


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
        return locate_labelled(Path(labels), lambda: open_source(data, pages, "all")).source(split)
    several = [data] if isinstance(data, (str, Path, Source)) else list(data)
    if not several:
        raise UserError("DATA must name at least one folder or file of images; try builtin:photos")
    opened = [part if isinstance(part, Source) else locate(part, pages).source(split) for part in several]
    return opened[0] if len(opened) == 1 else JoinedSource(opened)


def splits_there(data: str | Path | Source, labels: str | Path | None = None) -> list[str]:
    """The names of the splits that ``open_source(data, split=...)`` takes, sorted; maybe none.

    Several DATA or a `Source` have no splits; a table of labels with a column split decides.
    """
    if labels is not None:
        located = locate_labelled(Path(labels), lambda: open_source(data))
    elif isinstance(data, Source):
        return []
    else:
        located = locate(data, "channels")
    return sorted(located.splits or ()) if located.certain else []


def locate(data: str | Path, pages: Pages) -> Located:
    """What a text names, before any image is read; a UserError where it names nothing."""
    text = str(data).removeprefix("file://")
    far = bool(REMOTE.match(text))
    if text.startswith("builtin:"):
        return Located(text, lambda split, notes: open_builtin(text))
    if text.startswith("hf:") and not far:
        from freqmask.data.parquet import locate_dataset

        return locate_dataset(text)
    path = Path(text).expanduser()
    if path.is_dir():
        return _locate_folder(path, pages)
    program = unpacker_of([f".{text.lower().rpartition('.')[2]}"])
    if program is not None:
        raise UserError(
            f"DATA ({text}) is compressed, and no single image can be read out of it; unpack it with {program} "
            "(a .tar is read as it is), then freqmask prepare makes large images fast to read"
        )
    if text.lower().endswith((".tar", ".parquet")) and (path.exists() or (is_pattern(text) and not far)):
        return _named_files(text, pages)
    if path.suffix.lower() in (".npy", ".npz") and path.exists():
        return locate_array(path)
    if path.exists():
        raise UserError(
            f"DATA ({path}) must be a folder, a .tar, .npy, .npz or .parquet file; "
            f"for one image name its folder: {path.parent}"
        )
    if far:
        return _locate_remote(text, pages)
    if IMPORT_PATH.fullmatch(text):
        return Located(text, lambda split, notes: import_source(text))
    raise UserError(f"DATA ({text}) does not exist; {_nearest_sibling(path)}")


def _locate_folder(path: Path, pages: Pages) -> Located:
    files = LocalFiles(path)
    if files.index_file() is not None or (files.names() and not len(index_folder(path, read_suffixes()))):
        return _shards(files, None, str(path), pages)
    if any((path / name).is_file() for name in SAVED):
        from freqmask.data.parquet import locate_dataset

        return locate_dataset(path)
    tables = []
    for folder in (path, path / "data"):
        features = marked_in(folder)  # that we wrote
        tables += sorted(t for t in folder.glob("*.parquet") if t.name not in features and t.is_file())
    if tables and not len(index_folder(path, read_suffixes())):
        return _tables(files, [table.relative_to(path).as_posix() for table in tables], str(path))
    return locate_folder(path, pages)


def _locate_remote(text: str, pages: Pages) -> Located:
    """What a URL names: shards, tables, or a folder of images."""
    if pages == "images":
        raise UserError(f"pages (images) is for files on this machine; copy {text} here first")
    if text.startswith(HUB) and not text.startswith(ON_HUB):
        raise UserError(
            f"DATA ({text}) is no data set; Hugging Face's are {HUB}datasets/NAME, read where they are, and hf:NAME, "
            "fetched first"
        )
    if text.endswith((".tar", ".parquet")):
        return _named_files(text, pages)
    of_prepare = PurePosixPath(urlsplit(text).path).name in (INDEX_NAME, MANIFEST)
    files = RemoteFiles(text.rpartition("/")[0] if of_prepare else text)
    if of_prepare or files.index_file() is not None or files.names():
        return _shards(files, None, text, pages)
    listing = files.listing()
    if not listing:
        raise UserError(
            f"DATA ({text}) is empty, not there, or cannot be listed; name shards by a pattern such as "
            f"{text.rstrip('/')}/shards-{{000000..000009}}.tar, or serve the {INDEX_NAME} of freqmask prepare"
        )
    suffixes = {PurePosixPath(path).suffix.lower() for path in listing}
    if ".parquet" in suffixes and not suffixes & read_suffixes():
        from freqmask.data.parquet import tables_of_one

        return _tables(files, tables_of_one(listing, text), text)
    return locate_folder(files, listing=listing)


def _named_files(text: str, pages: Pages) -> Located:
    """One or several tars or tables, here or behind a URL."""
    files, names = files_of(text)
    if text.lower().endswith(".tar"):
        return _shards(files, names, text, pages)
    return _tables(files, names or [], text)


def _tables(files: Files, names: list[str], text: str) -> Located:
    from freqmask.data.parquet import locate_tables  # pyarrow comes with it, which most data does not need

    return locate_tables(files, names, text)


def _shards(files: Files, names: list[str] | None, text: str, pages: Pages) -> Located:
    if pages == "images":
        raise UserError(
            f"pages (images) is for files, DATA ({text}) is shards; freqmask prepare --pages images makes "
            "an image of each page"
        )
    from freqmask.data.shards import locate_shards  # and with these

    return locate_shards(files, names, text)


def import_source(text: str) -> Source:
    """The source that an import path names: an object, or a class or function that returns one; else a UserError."""
    module_name, _, name = text.partition(":")
    try:
        found = import_object(text, "data")
    except ImportError as error:
        raise UserError(
            f"DATA ({text}) is neither a folder nor importable ({error}); check its spelling or PYTHONPATH"
        ) from error
    except AttributeError as error:
        known = [one for one in dir(sys.modules.get(module_name)) if not one.startswith("_")]
        raise UserError(f"DATA ({text}): {module_name} has no {name}; {nearest(name, known)}") from error
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
