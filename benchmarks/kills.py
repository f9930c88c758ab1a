"""Claim: a run that is killed at any moment and started again ends with the weights of one that was not.

For MFM and FOLK, with 0 and with 2 loader workers: one run without interruption, then runs that are killed
(SIGKILL, the whole process group) after a random share of that time and started again with the same command.
Their exported backbones are compared bit by bit.

    python benchmarks/kills.py                # ten kills
    python benchmarks/kills.py --kills 40 --seed 1
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

RESULTS = Path(__file__).parent / "results" / "kills.csv"
WORDS = (
    "pretrain builtin:digits --image_size 16 --patch_size 8 --steps 120 --batch_size 16 --checkpoint_every_steps 7 "
    "--preview_every_steps 50 --accelerator cpu"
)
MODEL = ["--model_args", "{depth: 2, embed_dim: 64, num_heads: 2}"]
FOLK = ["--outputs", "64", "--hidden_size", "64", "--bottleneck_size", "32"]


def command(method: str, workers: int, out: Path) -> list[str]:
    extra = FOLK if method == "folk" else []
    words = [*WORDS.split(), *MODEL, *extra, "--method", method, "--workers", str(workers), "--out", str(out)]
    return [sys.executable, "-m", "freqmask", *words]


def finish(words: list[str]) -> float:
    """Run to the end; the seconds it took."""
    began = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def kill(words: list[str], after: float) -> None:
    """Start, and kill the whole group after some seconds, workers too."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def identical(one: Path, other: Path) -> bool:
    first, second = (load_file(run / "backbone" / "model.safetensors") for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def last_step(run: Path) -> str:
    saved = sorted((run / "checkpoints").glob("step-*.ckpt"))
    return str(int(saved[-1].stem.split("-")[1])) if saved else "none"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    kinds = [("mfm", 0), ("folk", 2), ("mfm", 2), ("folk", 0)]
    whole: dict[tuple[str, int], tuple[Path, float]] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.kills):
            method, workers = kind = kinds[number % len(kinds)]
            if kind not in whole:
                out = Path(folder) / f"{method}-{workers}"
                whole[kind] = out, finish(command(method, workers, out))
            reference, seconds = whole[kind]
            out = Path(folder) / f"kill-{number}"
            after = generator.uniform(0.3, 1.0) * seconds
            kill(command(method, workers, out), after)
            reached = "the end" if (out / "summary.json").exists() else last_step(out)
            finish(command(method, workers, out))
            same = identical(reference, out)
            row = {
                "method": method,
                "workers": workers,
                "killed_after_s": round(after, 1),
                "checkpoint": reached,
            }
            rows.append({**row, "identical": same})
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    print(f"{sum(row['identical'] for row in rows)} of {len(rows)} runs ended bit-identical")
    facts = {"device": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)


if __name__ == "__main__":
    main()
