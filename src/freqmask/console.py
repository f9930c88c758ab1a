"""The one place that prints for the user."""

from __future__ import annotations

import os
import sys

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # torchrun, Lightning, SLURM, LSF
_QUIET = "FREQMASK_QUIET"  # in the environment, so that processes started by us inherit it


def say(text: str = "") -> None:
    """Writes one text and a newline to standard output: by the first process only, and not when quiet.

    What the terminal's encoding cannot show (file names may hold anything) is escaped rather than raised.

    Args:
        text: what the user shall read; several lines are fine.
    """
    if is_quiet() or rank() != 0:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()  # a run's log is read while the run goes on


def be_quiet(quiet: bool = True) -> None:
    """Silences ``say`` in this process and in those that it starts.

    Args:
        quiet: False lets ``say`` speak again.
    """
    if quiet:
        os.environ[_QUIET] = "1"
    else:
        os.environ.pop(_QUIET, None)


def is_quiet() -> bool:
    """Whether ``say`` is silent: after ``be_quiet()`` or with ``FREQMASK_QUIET=1`` in the environment."""
    return os.environ.get(_QUIET, "") not in ("", "0")


def rank() -> int:
    """The number of this process among those of a distributed run, 0 without one.

    Read from the launcher's environment variables, because it is asked before anything is initialised.
    """
    for name in _RANKS:
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return 0


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
