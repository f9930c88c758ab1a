"""Claim: memory and open files of a training stay what they are, in the main process and in its workers.

    python benchmarks/memory.py                          # 3,000 steps
    python benchmarks/memory.py --steps 20000 --batch 2      # less to decode: a step of 17 ms of processor time

A training of a tiny ViT on a folder of JPEGs through the loader (two workers), with checkpoints, previews and logged
steps on the way. At some steps: the resident memory of the main process, what the workers have for themselves (USS),
open files of all. The last row is the growth from step 100 to the last.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import psutil
from record import show, write_record
from start import make_files

import freqmask
from freqmask.training.callbacks import Monitor

RESULTS = Path(__file__).parent / "results" / "memory.csv"
TINY = {"depth": 1, "embed_dim": 32, "num_heads": 2}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    last = arguments.steps
    end = max(last - 10, 1)  # before the workers, which have nothing left to read, go
    looks = sorted({min(100, end), end} | {step for step in (300, 1000, 3000, 10_000) if step < end})
    rows: list[dict[str, Any]] = []
    ended = Monitor.on_train_batch_end

    def looking(self: Any, trainer: Any, *rest: Any) -> None:
        ended(self, trainer, *rest)
        if trainer.global_step in looks and (not rows or rows[-1]["step"] != trainer.global_step):
            rows.append({"step": trainer.global_step, **held()})

    Monitor.on_train_batch_end = looking  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as work:
        freqmask.pretrain(
            str(make_files(Path(work) / "photos", arguments.files)), out=str(Path(work) / "run"),
            backbone="vit_tiny_patch16_224", model_args=TINY, image_size=32, patch_size=8, batch_size=arguments.batch,
            steps=last, workers=arguments.workers, images_from="loader", accelerator="cpu",
            preview_every_steps=max(last // 10, 1), checkpoint_every_steps=max(last // 20, 1), log_every_steps=20,
        )  # fmt: skip
    first, final = rows[0], rows[-1]
    growth = {name: round(final[name] / max(first[name], 1), 3) for name in final if name != "step"}
    rows.append({"step": f"{final['step']} over {first['step']}", **growth})
    show(rows)
    write_record(RESULTS, rows, workers=arguments.workers)


def held() -> dict[str, float]:
    """What this process and its children hold now."""
    me = psutil.Process()
    children = me.children(recursive=True)
    return {
        "main_MB": round(me.memory_info().rss / 1e6, 1),
        "workers_MB": round(sum(child.memory_full_info().uss for child in children) / 1e6, 1),
        "main_files": me.num_fds(),
        "workers_files": sum(child.num_fds() for child in children),
        "processes": 1 + len(children),
    }


if __name__ == "__main__":
    main()
