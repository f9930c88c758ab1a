"""What goes wrong by the user's hand or by a broken file, told in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A sentence for the user: what was given, the rule it breaks, the way out. The command line exits with 2."""


class CallError(UserError, TypeError):
    """An option is missing or unknown: a sentence for the command line, a TypeError for those who call from Python."""


class BadImage(Exception):  # noqa: N818 - it names a thing, and no mistake of the user
    """An image that cannot be read. The run goes on without it and lists it with this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str]]:
        return type(self), (self.reason,)  # survives the trip from a loader worker


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint that names the nearest valid name, or lists all of them.

    Args:
        name: what was typed.
        names: the valid names.

    Returns:
        ``did you mean 'folk'?`` or ``choose from 'mfm', 'folk'``.

    >>> nearest("fokl", ["mfm", "folk"])
    "did you mean 'folk'?"
    """
    valid = list(names)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "choose from " + ", ".join(repr(known) for known in valid)
