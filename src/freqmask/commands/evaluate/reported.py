"""What comes before and after an evaluation: options as they were meant, the pages of the runs measured."""

from __future__ import annotations

from typing import Any

__all__ = ["listed", "reported"]


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


def listed(options: dict[str, Any]) -> dict[str, Any]:
    """The options with MODEL and DATA as lists, also where a twin was called with one of each."""
    from pathlib import Path

    for name in ("model", "data"):
        value = options[name]
        options[name] = [value] if isinstance(value, (str, Path)) else list(value)
    return {**options, "model": [str(one) for one in options["model"]]}
