"""How the text that a user types for DATA becomes a source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from freqmask.data.patterns import is_pattern, refuse_packed
from freqmask.data.source import JoinedSource, Pages, Source, SourceSummary, Subset
from freqmask.errors import UserError, nearest

__all__ = ["JoinedSource", "Pages", "Source", "SourceSummary", "Subset", "open_source", "splits_there"]

IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
REMOTE = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
ARRAY_SUFFIXES = (".npy", ".npz")


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
    if isinstance(data, (str, Path, Source)):
        return _open_one(data, pages, split)
    if not data:
        raise UserError("DATA must name at least one folder or file of images; try builtin:photos")
    if len(data) == 1:
        return _open_one(data[0], pages, split)
    return JoinedSource([_open_one(one, pages, split) for one in data])


def _open_one(data: str | Path | Source, pages: Pages, split: str) -> Source:
    """A source from one DATA."""
    if isinstance(data, Source):
        return data
    text = str(data).removeprefix("file://")
    if text.startswith("builtin:"):
        from freqmask.data.builtin import open_builtin

        return open_builtin(text)
    if text.startswith("hf:") and not REMOTE.match(text):
        from freqmask.data.huggingface import open_hugging_face

        return open_hugging_face(text, split)
    path = Path(text).expanduser()
    if not path.is_dir():
        refuse_packed(text)
    if path.exists() or _names_shards(text) or _names_tables(text):
        return _open_path(path, pages, split)
    if REMOTE.match(text):
        from freqmask.data.remote_sources import open_remote

        return open_remote(text, pages, split)
    if IMPORT_PATH.fullmatch(text):
        from freqmask.data.imported import import_source

        return import_source(text)
    raise UserError(f"DATA ({text}) does not exist; {_nearest_sibling(path)}")


def _open_path(path: Path, pages: Pages, split: str) -> Source:
    """A source from a folder or a file that exists, or from a pattern of shards."""
    if _names_shards(str(path)) or (path.is_dir() and _has_shards(path)):
        from freqmask.data.shards import open_local_shards

        if pages == "images":
            raise UserError(
                f"pages (images) is for files, DATA ({path}) is shards; freqmask prepare --pages images makes "
                "an image of each page"
            )
        return open_local_shards(str(path), split)
    if path.is_dir() and _is_saved_dataset(path):
        from freqmask.data.huggingface import open_hugging_face

        return open_hugging_face(path, split)
    if path.is_dir():
        from freqmask.data.folder import open_folder

        return open_folder(path, pages, split)
    if path.suffix.lower() in ARRAY_SUFFIXES:
        from freqmask.data.arrays import open_array

        return open_array(path, split)
    if path.suffix.lower() == ".parquet":
        from freqmask.data.tables import ParquetSource, open_pattern

        return open_pattern(str(path), split) if _names_tables(str(path)) else ParquetSource([path])
    raise UserError(
        f"DATA ({path}) must be a folder, a .tar, .npy, .npz or .parquet file; "
        f"for one image name its folder: {path.parent}"
    )


def _names_shards(text: str) -> bool:
    """Whether a text is a tar or a pattern of some, on this machine."""
    if not text.lower().endswith(".tar") or REMOTE.match(text):
        return False
    return is_pattern(text) or Path(text).expanduser().is_file()


def _names_tables(text: str) -> bool:
    """Whether a text is a pattern of parquet files of this machine."""
    return text.lower().endswith(".parquet") and is_pattern(text) and not REMOTE.match(text)


def _has_shards(path: Path) -> bool:
    from freqmask.data.shards import has_shards

    return has_shards(path)


def _is_saved_dataset(path: Path) -> bool:
    from freqmask.data.huggingface import is_saved_dataset

    return is_saved_dataset(path)


def splits_there(data: str | Path, labels: str | Path | None = None) -> list[str]:
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
    if isinstance(data, str) and REMOTE.match(data):
        from freqmask.data.remote_sources import splits_behind

        return splits_behind(data)
    path = Path(data).expanduser()
    if str(data).startswith("hf:") or (path.is_dir() and _is_saved_dataset(path)):
        from freqmask.data.huggingface import splits_of_dataset

        return splits_of_dataset(data if str(data).startswith("hf:") else path)
    if _names_shards(str(path)) or (path.is_dir() and _has_shards(path)):
        from freqmask.data.shard_files import local_files
        from freqmask.data.shards import splits_in_shards

        return splits_in_shards(*local_files(str(path)), str(path))
    if path.is_dir():
        from freqmask.data.folder import split_folders, tables_in
        from freqmask.data.table_layout import files_by_split

        tables = [table.relative_to(path).as_posix() for table in tables_in(path)]
        return sorted(files_by_split(tables)) if tables else split_folders(path)
    if path.suffix.lower() in ARRAY_SUFFIXES and path.exists():
        from freqmask.data.arrays import splits_in_array

        return sorted(splits_in_array(path))
    return []


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
