"""Several indexes of shards as one, and classes told from the folders of their members."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from freqmask.data.labels import in_order
from freqmask.data.shard_index import NUMBERS, TEXTS, ShardIndex, about_shards, text_arrays
from freqmask.data.splits import split_of


def join_indexes(parts: Sequence[ShardIndex], class_names: list[str] | None = None) -> ShardIndex:
    """Several indexes as one; classes of the same name are the same class.

    Args:
        parts: in order, at least one.
        class_names: the classes in order; None: those of the parts.
    """
    classes = class_names or _united([part.class_names for part in parts])
    groups = _united([part.group_names for part in parts])
    arrays = {column: np.concatenate([part.arrays[column] for part in parts]) for column in NUMBERS}
    arrays["labels"] = _renumbered(parts, "labels", [part.class_names for part in parts], classes)
    arrays["groups"] = _renumbered(parts, "groups", [part.group_names for part in parts], groups)
    arrays["starts"] = _joined_ends([part.starts for part in parts])
    named = any(len(part.arrays["names_ends"]) > 1 for part in parts)
    for column in TEXTS if named else TEXTS[:1]:
        own = [column if len(part.arrays[f"{column}_ends"]) == len(part) + 1 else "members" for part in parts]
        arrays[column] = np.concatenate([p.arrays[c] for p, c in zip(parts, own, strict=True)])
        arrays[f"{column}_ends"] = _joined_ends(
            [p.arrays[f"{c}_ends"] for p, c in zip(parts, own, strict=True)]
        )
    if not named:
        arrays |= text_arrays("names", [])
    ignored = sum((Counter(part.ignored) for part in parts), Counter[str]())
    notes = [note for part in parts for note in part.notes]
    shards = [shard for part in parts for shard in part.shards]
    return ShardIndex(about_shards(shards, classes, groups, dict(ignored), notes), arrays)


def _united(names: list[list[str] | None]) -> list[str] | None:
    """The names of all parts: in their order where they agree."""
    known = [part for part in names if part]
    if not known:
        return None
    return (
        known[0] if all(part == known[0] for part in known) else in_order({n for part in known for n in part})
    )


def _renumbered(
    parts: Sequence[ShardIndex], column: str, names: list[list[str] | None], whole: list[str] | None
) -> np.ndarray:
    """A column of numbers by the names of the whole."""
    places = {name: number for number, name in enumerate(whole or ())}
    found = []
    for part, own in zip(parts, names, strict=True):
        new = np.array([*(places[name] for name in own or ()), -1], np.int32)
        found.append(new[part.arrays[column]])
    return np.concatenate(found)


def _joined_ends(ends: list[np.ndarray]) -> np.ndarray:
    """Running totals one behind the other."""
    starts = np.cumsum([0, *(part[-1] for part in ends)])
    joined = [part[1:] + start for part, start in zip(ends, starts, strict=False)]
    return np.concatenate([np.zeros(1, np.int64), *joined])


def with_folder_classes(index: ShardIndex) -> ShardIndex:
    """Where no image has a label, the first folder in the members' names is the class, as in a folder.

    Args:
        index: as headers tell.
    """
    if index.class_names is not None or len(index) == 0:
        return index
    folders = [
        index.text("members", number).removeprefix("./").split("/")[:-1] for number in range(len(index))
    ]
    depth = int(all(parts and split_of(parts[0]) for parts in folders))
    if min(map(len, folders)) <= depth:
        return index
    names = in_order({parts[depth] for parts in folders})
    if len(names) < 2:
        return index
    numbers = {name: number for number, name in enumerate(names)}
    index.arrays["labels"] = np.array([numbers[parts[depth]] for parts in folders], np.int32)
    about = about_shards(index.shards, names, index.group_names, index.ignored, index.notes)
    return ShardIndex(about, index.arrays)
