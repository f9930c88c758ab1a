"""Which columns of a parquet table hold images and classes, and which split a file belongs to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from freqmask.data.splits import split_of
from freqmask.errors import UserError, nearest

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "y")
MOST_NUMBERED = (
    100_000  # numbers up to there are classes by their value; ids beyond are classes by their order
)


def image_column(schema: pa.Schema, where: object) -> str:
    """The first column of encoded images: a struct with bytes, or plain bytes.

    Args:
        schema: of the table.
        where: the file, for the message.

    Raises:
        UserError: there is none.
    """
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return str(field.name)
    for field in schema:
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            return str(field.name)
    hint = nearest("image", schema.names) if schema.names else "it has no columns"
    raise UserError(
        f"DATA ({where}) must hold a column of encoded images (a struct of bytes and path, or bytes); {hint}"
    )


def has_paths(schema: pa.Schema, column: str) -> bool:
    """Whether the column of images names the files that they were."""
    kind = schema.field(column).type
    return bool(pa.types.is_struct(kind) and kind.get_field_index("path") >= 0)


def label_column(schema: pa.Schema) -> str | None:
    """The column of classes: by its type in the metadata, else by its name."""
    features = _features(schema)
    named = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    plain = [name for name in LABEL_COLUMNS if name in schema.names and _is_class(schema.field(name).type)]
    return next(iter([*named, *plain]), None)


def _is_class(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's metadata says of the columns, or nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: about for name, about in features.items() if isinstance(about, dict)}


def class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """The names of the classes 0, 1, ..., as the metadata has them; None where it has not."""
    names = _features(schema).get(column, {}).get("names")
    return [str(name) for name in names] if isinstance(names, list) else None


def number_classes(
    values: Sequence[int | str | None], names: list[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Labels counted from 0, and what they are called.

    Args:
        values: of each image a name or a number; None or a negative number where there is none.
        names: of the classes 0, 1, ... where that is known.

    Returns:
        int64 (image,), -1 where there is none, and the names.

    >>> number_classes(["dog", None, "cat"])[1], number_classes([2, -1, 0])[0].tolist()
    (['cat', 'dog'], [2, -1, 0])
    """
    known = {value for value in values if value is not None and not (isinstance(value, int) and value < 0)}
    if names is None and all(isinstance(value, int) for value in known):
        largest = max((int(value) for value in known), default=-1)
        names = [str(number) for number in range(largest + 1)] if largest < MOST_NUMBERED else None
    if names is not None:
        fits = {number: number for number in range(len(names))}
        places: dict[Any, int] = fits
    else:
        ordered = sorted(known, key=lambda value: (isinstance(value, str), value))
        places, names = {value: place for place, value in enumerate(ordered)}, [str(v) for v in ordered]
    return np.array([places.get(value, -1) for value in values], np.int64), names


def files_by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Files by the split that their folder is named after, or else by how their names begin.

    >>> files_by_split(["data/train-00000-of-00002.parquet", "default/test/0000.parquet"])
    {'train': ['data/train-00000-of-00002.parquet'], 'test': ['default/test/0000.parquet']}
    """
    by_split: dict[str, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        split = path.parent.name if split_of(path.parent.name) else re.split(r"[-_.]", path.name)[0]
        by_split.setdefault(split, []).append(name)
    return by_split


def tables_of_one(names: Iterable[str], where: str) -> list[str]:
    """The parquet files among some names, all of one data set.

    Args:
        names: relative to the root.
        where: the root, for the message.

    Raises:
        UserError: they lie in several folders, which are the configurations of a data set.
    """
    found = sorted(name for name in names if name.lower().endswith(".parquet"))
    folders = {_configuration(name) for name in found}
    if len(folders) > 1:
        some = sorted(folder or "the folder itself" for folder in folders)
        raise UserError(
            f"DATA ({where}) holds tables of {len(folders)} data sets ({', '.join(some[:8])}); name one: "
            f"{where.rstrip('/')}/{max(folders)}"
        )
    return found


def _configuration(name: str) -> str:
    """The folders that a table lies in, but for those named ``data`` or as a split."""
    parts = PurePosixPath(name).parts[:-1]
    return "/".join(part for part in parts if part != "data" and not split_of(part))
