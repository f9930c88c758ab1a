"""``freqmask runs``: what has been trained, and how it came out."""

from __future__ import annotations

from pathlib import Path

from freqmask.commands.given import command
from freqmask.console import say


@command()
def runs(folder: str = "runs") -> list[str]:
    """Lists runs: state, method, steps, time, loss, best probe.

    Args:
        folder: where the run folders are.

    Returns:
        The names of the runs.

    Raises:
        UserError: the folder does not exist or holds no run.
    """
    from freqmask.reporting.listing import list_runs, table_lines

    found = list_runs(Path(folder))
    for line in table_lines(found):
        say(line)
    return [run.name for run in found]
