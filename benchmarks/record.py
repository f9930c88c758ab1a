"""The one writer of every benchmark: tables under results/, and claims (with aim, met or missed) beside each other.

python benchmarks/record.py OUT          # the table of the claims that the parts of gpu.sh have recorded in OUT
"""

from __future__ import annotations

import csv
import operator
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

CLAIMS = "claims.csv"
_MEETS = {">=": operator.ge, "<=": operator.le, "==": operator.eq}


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


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of one form as a table."""
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in rows[0]}
    print("  ".join(name.ljust(widths[name]) for name in rows[0]).rstrip())
    for row in rows:
        print("  ".join(str(row[name]).ljust(widths[name]) for name in row).rstrip())


class Claims:
    """Rows of what a part measured, each written at once: a part that is cut short leaves those before.

    Args:
        out: folder of the table.
        part: whose measurements they are.
        device: that is measured.
    """

    def __init__(self, out: Path, part: str, device: str) -> None:
        self.path, self.part = out / CLAIMS, part
        self.about = {
            "card": device_name(device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "command": shlex.join(["python", *sys.argv]),
        }
        out.mkdir(parents=True, exist_ok=True)

    def add(self, what: str, value: float | str, unit: str = "", aim: str = "") -> None:
        """Record a value, and whether it is what was aimed at, such as ``">= 0.45"``."""
        met = ""
        if aim:
            sign, limit = aim.split()
            met = "yes" if not isinstance(value, str) and _MEETS[sign](value, float(limit)) else "no"
        shown = value if isinstance(value, str) else float(f"{value:.4g}")
        row = {"part": self.part, "what": what, "value": shown, "unit": unit, "aim": aim, "met": met}
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, [*row, *self.about])
            if new:
                table.writeheader()
            table.writerow({**row, **self.about})
        print(f"[{self.part}] {what}: {shown} {unit}" + (f" (aim {aim}: {met})" if aim else ""), flush=True)


def show_claims(out: Path) -> int:
    """Print all claims of a folder, then how many were met and missed."""
    path = out / CLAIMS
    if not path.exists():
        print(f"{path} is not there: no part has measured anything")
        return 1
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = ("part", "what", "value", "unit", "aim", "met")
    print(f"\n{rows[0]['card']}, torch {rows[0]['torch']}, Python {rows[0]['python']}\n")
    show([{name: row[name] for name in names} for row in rows])
    missed = [f"{row['part']}: {row['what']}" for row in rows if row["met"] == "no"]
    print(f"\n{sum(row['met'] == 'yes' for row in rows)} claims met, {len(missed)} missed")
    print("".join(f"missed  {name}\n" for name in missed), end="")
    return 0


if __name__ == "__main__":
    sys.exit(show_claims(Path(sys.argv[1])))
