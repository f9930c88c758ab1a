"""What follows every evaluation: the pages of the runs that were measured."""

from __future__ import annotations

from typing import Any

__all__ = ["reported"]


def reported(model: list[str] | str, summaries: Any) -> Any:
    """Renew the page of every run that was measured: its new rows belong there.

    Args:
        model: MODEL as the command took it.
        summaries: what the evaluation found.

    Returns:
        The summaries.
    """
    from pathlib import Path

    from freqmask.reporting.page import refresh_report

    for name in [model] if isinstance(model, str) else model:
        if (Path(name) / "config.yaml").is_file():
            refresh_report(Path(name))
    return summaries
