"""Claim: a run that is killed at any moment and started again ends with the weights of one that was not.

For MFM and FOLK, with 0 and with 2 loader workers: one run without interruption, then runs that are killed
(SIGKILL, the whole process group) up to two seconds after a checkpoint drawn at random was there, or their folder,
and started again with the same command. Their exported backbones are compared bit by bit. A run that had come to
its end when it was to be killed proves nothing and is drawn anew.

    python benchmarks/kills.py                # ten kills
    python benchmarks/kills.py --kills 40 --seed 1
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import write_record
from safetensors.torch import load_file

RESULTS = Path(__file__).parent / "results" / "kills.csv"
STEPS, EVERY = 120, 7  # optimiser steps, and those between checkpoints
WORDS = (
    f"pretrain builtin:digits --image_size 16 --patch_size 8 --steps {STEPS} --batch_size 16 "
    f"--checkpoint_every_steps {EVERY} --preview_every_steps 50 --accelerator cpu"
)
MODEL = ["--model_args", "{depth: 2, embed_dim: 64, num_heads: 2}"]
FOLK = ["--outputs", "64", "--hidden_size", "64", "--bottleneck_size", "32"]


def command(method: str, workers: int, out: Path) -> list[str]:
    extra = FOLK if method == "folk" else []
    words = [*WORDS.split(), *MODEL, *extra, "--method", method, "--workers", str(workers), "--out", str(out)]
    return [sys.executable, "-m", "freqmask", *words]


def kill(words: list[str], out: Path, step: int, after: float) -> None:
    """Start, and kill the whole group some seconds after the checkpoint of a step is there, workers too."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not reached(out, step):
        time.sleep(0.01)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def reached(run: Path, step: int) -> bool:
    """Whether a run has begun (step 0), or has written the checkpoint of a step, or a later one."""
    return run.is_dir() if step == 0 else last_step(run) >= step


def identical(one: Path, other: Path) -> bool:
    first, second = (load_file(run / "backbone" / "model.safetensors") for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def last_step(run: Path) -> int:
    steps = [int(path.stem.split("-")[1]) for path in (run / "checkpoints").glob("step-*.ckpt")]
    return max(steps, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    kinds = [("mfm", 0), ("folk", 2), ("mfm", 2), ("folk", 0)]
    whole: dict[tuple[str, int], Path] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(rows) < arguments.kills:
            method, workers = kind = kinds[len(rows) % len(kinds)]
            if kind not in whole:
                whole[kind] = Path(folder) / f"{method}-{workers}"
                subprocess.run(command(method, workers, whole[kind]), check=True, stdout=subprocess.DEVNULL)
            out = Path(tempfile.mkdtemp(dir=folder)) / "run"
            step, after = EVERY * generator.randrange(STEPS // EVERY), generator.uniform(0, 2)
            kill(command(method, workers, out), out, step, after)
            if (out / "summary.json").exists():
                continue
            found = last_step(out)
            subprocess.run(command(method, workers, out), check=True, stdout=subprocess.DEVNULL)
            row = {
                "method": method,
                "workers": workers,
                "seconds_after": round(after, 2),
                "checkpoint": found,
            }
            rows.append({**row, "identical": identical(whole[kind], out)})
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    print(f"{sum(row['identical'] for row in rows)} of {len(rows)} runs ended bit-identical")
    write_record(RESULTS, rows)


if __name__ == "__main__":
    main()
