"""Durations and sizes as a person says them."""

from __future__ import annotations


def readable_time(seconds: float) -> str:
    """A duration as a person says it.

    >>> readable_time(5400)
    '1.5 hours'
    """
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 1.5 * size or (unit == "minutes" and seconds >= size):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def readable_bytes(count: float) -> str:
    """A size in decimal units.

    >>> readable_bytes(12_300_000)
    '12.3 MB'
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
