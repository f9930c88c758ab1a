"""Hugging Face datasets: a name on the hub, fetched whole into its cache, or a copy saved on this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from freqmask.console import say
from freqmask.data.cache import hash_of
from freqmask.data.decode import open_bytes, read_file, suffix_of
from freqmask.data.labels import number_classes
from freqmask.data.parquet import Columns
from freqmask.data.pixels import Picture
from freqmask.data.source import JoinedSource, Source
from freqmask.data.splits import Located
from freqmask.errors import BadImage, UserError, brief

HUB = "hf:"
SAVED = (
    "dataset_dict.json",
    "state.json",
)  # what datasets.save_to_disk leaves, with several splits and with one


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by ``datasets.save_to_disk``."""
    return any((folder / name).is_file() for name in SAVED)


def locate_dataset(data: str | Path) -> Located:
    """The images of ``hf:NAME``, ``hf:NAME:CONFIG``, or a folder of ``datasets.save_to_disk``; else a UserError."""
    splits = _load(data)

    def open_split(chosen: str | None, notes: list[str]) -> Source:
        if chosen is not None:
            return HuggingFaceSource(splits[chosen], chosen, str(data), notes)
        sources = [HuggingFaceSource(split, name, str(data)) for name, split in splits.items()]
        return sources[0] if len(sources) == 1 else JoinedSource(sources)

    return Located(str(data), open_split, sorted(name for name in splits if name))


def _load(data: str | Path) -> dict[str, Any]:
    """Split (or "") -> dataset."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"DATA ({data}) needs datasets; pip install 'freqmask[data]'") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every try
    try:
        if isinstance(data, Path):
            loaded = datasets.load_from_disk(str(data))
        else:
            name, _, config = data.removeprefix(HUB).partition(":")
            say(
                f"data        fetching {data} into Hugging Face's cache (hf://datasets/{name} would read it where "
                "it is)"
            )
            loaded = datasets.load_dataset(*([name, config] if config else [name]))
    except Exception as error:  # the hub, the network, the file system and scripts each raise their own
        raise UserError(
            f"DATA ({data}) cannot be opened ({brief(error, 300)}); check name and connection"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        return {str(name): split for name, split in loaded.items()}
    return {"": loaded}


class HuggingFaceSource(Source):
    """One split of a ``datasets.Dataset``; its images stay encoded until they are asked for.

    A UserError where there is no column of images, or no row; it names DATA as it was typed in ``where``.
    """

    kind = "Hugging Face dataset"

    def __init__(self, dataset: Any, split: str, where: str, notes: list[str] | None = None) -> None:
        from datasets import Image

        self.split, self.notes = split, list(notes or [])
        columns = Columns.of(dataset.features.arrow_schema, where)
        column = columns.image
        if len(dataset) == 0:
            raise UserError(f"DATA ({where}) holds no rows; check how it was written")
        self._fingerprint = f"{dataset._fingerprint} {column} {len(dataset)}"
        if columns.label is not None:
            labels = dataset.select_columns([columns.label]).with_format(None)[:][columns.label]
            self._labels, self.class_names = number_classes(list(labels), columns.class_names)
        images = dataset.select_columns([column]).with_format(None)
        if isinstance(dataset.features[column], Image):
            images = images.cast_column(column, Image(decode=False))
        self._images, self._column = images, column

    def __len__(self) -> int:
        return len(self._images)

    def open(self, index: int) -> Picture:
        return open_bytes(self.encoded(index)[0])

    def encoded(self, index: int) -> tuple[bytes, str]:
        self.check(index)
        cell = self._images[index][self._column]
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if data is None:
            if path is None:
                raise BadImage("its row holds no image")
            data = read_file(Path(path))
        return data, suffix_of(data, path or "")

    def name(self, index: int) -> str:
        return f"{self.split}-{index}" if self.split else str(index)

    def fingerprint(self) -> str:
        return hash_of(self._fingerprint)
