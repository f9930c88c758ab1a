"""The record of a benchmark: its table as CSV under results/, each row with what it ran on."""

from __future__ import annotations

import csv
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def device_name(device: str | torch.device = "cpu") -> str:
    """The GPU's name, or the CPU's as far as the system tells it."""
    if str(device).startswith("cuda"):
        return str(torch.cuda.get_device_name(torch.device(device)))
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def write_record(
    path: Path, rows: Sequence[Mapping[str, Any]], device: str | torch.device = "cpu", **facts: Any
) -> dict[str, Any]:
    """Write the table, every row followed by device, threads, versions and further facts.

    Args:
        path: of the CSV; replaced.
        rows: of one form.
        device: that was measured.
        facts: what else one has to know to measure it again.

    Returns:
        The facts.
    """
    about = {
        **facts,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*rows[0], *about])
        table.writeheader()
        table.writerows({**row, **about} for row in rows)
    return about
