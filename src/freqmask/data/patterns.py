"""Several files by one text: ``shards-{000000..000009}.tar``, ``tables-*.parquet``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from freqmask.errors import UserError

UNPACKERS = {
    ".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".tbz2": "bunzip2", ".xz": "unxz", ".txz": "unxz",
    ".zst": "unzstd", ".zip": "unzip",
}  # fmt: skip
"""Suffix of what is packed as a whole -> the program that unpacks it."""
PATTERN = re.compile(r"[*?{\[]")


def unpacker_of(suffixes: Iterable[str]) -> str | None:
    """The program that unpacks the first of some suffixes that is one of a packed file; None where none is."""
    return next((UNPACKERS[suffix] for suffix in suffixes if suffix in UNPACKERS), None)


def refuse_packed(text: str) -> None:
    """Refuse a compressed tar or an archive: no single image can be read out of the middle of it.

    Args:
        text: DATA as it was typed.

    Raises:
        UserError: it is one; the message names the program that unpacks it.
    """
    program = unpacker_of([f".{text.lower().rpartition('.')[2]}"])
    if program is not None:
        raise UserError(
            f"DATA ({text}) is compressed, and no single image can be read out of it; unpack it with {program} "
            "(a .tar is read as it is), then freqmask prepare makes large images fast to read"
        )


def is_pattern(text: str) -> bool:
    """Whether a text stands for several files."""
    return bool(PATTERN.search(text))


def split_pattern(text: str) -> tuple[str, str]:
    """The folder before the first part with a sign of a pattern, and the rest.

    >>> split_pattern("data/train/shards-{0..3}.tar")
    ('data/train', 'shards-{0..3}.tar')
    """
    parts = text.split("/")
    first = next((k for k, part in enumerate(parts) if PATTERN.search(part)), len(parts) - 1)
    root = "/".join(parts[:first])
    return (root or "/" if text.startswith("/") and first else root), "/".join(parts[first:])


def expand_braces(pattern: str) -> list[str]:
    """Every text that a pattern with ranges and lists in braces stands for, in order.

    >>> expand_braces("{train,val}-{08..10}.tar")[:4]
    ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-08.tar']
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    first, last, words = found.groups()
    if words is None:
        width = len(first) if len(first) == len(last) or first.startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = words.split(",")
    rest = expand_braces(pattern[found.end() :])
    return [f"{pattern[: found.start()]}{choice}{tail}" for choice in choices for tail in rest]


def names_of(pattern: str, matching: Callable[[str], list[str]]) -> list[str]:
    """The files of a pattern; what its braces name is kept, whether it is there or not, to be missed by its name.

    Args:
        pattern: relative to where the files lie.
        matching: finds the files whose names fit ``*``, ``?`` and ``[]``.
    """
    return [
        name
        for part in expand_braces(pattern)
        for name in (matching(part) if re.search(r"[*?\[]", part) else [part])
    ]
