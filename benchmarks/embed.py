"""Figure 4: images a second that `freqmask embed` writes, against the bare timm forward pass.

    python benchmarks/embed.py                                   # vit_small at 224 on the CPU
    python benchmarks/embed.py --data FOLDER --device cuda --batch 256 --workers 16

Claim: reading, cropping, computing and writing a parquet file runs at 0.9 times the bare forward pass or better.

Method: the bare pass is `model(batch)` of the same timm module, in float32 and inference mode, on one batch that
lies on the device already. The two take turns in this process after a warm-up; a GPU is synchronised. The table
gives median and range of the runs, and the median of the ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch

from freqmask.commands.inference import Embedding, compute_parts, plan_parts
from freqmask.data.source import Subset
from freqmask.data.sources import open_source
from freqmask.evaluation.features import ComputeConfig
from freqmask.interop.feature_files import join_parts
from freqmask.interop.models import OpenedModel, open_model

RESULTS = Path(__file__).parent / "results" / "embed.csv"


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@torch.inference_mode()
def bare(opened: OpenedModel, images: int, batch_size: int, device: str) -> float:
    """Images a second of the forward pass alone."""
    batch = torch.rand(batch_size, *opened.input_size, device=device)
    synchronise(device)
    began = time.perf_counter()
    for _ in range(images // batch_size):
        opened.module(batch)
    synchronise(device)
    return images / (time.perf_counter() - began)


def embed(opened: OpenedModel, source: Subset, config: ComputeConfig) -> float:
    """Images a second from files to a parquet file."""
    with tempfile.TemporaryDirectory() as scratch:
        task = Embedding(opened)
        parts = plan_parts(task, source, Path(scratch) / "out.parquet")
        began = time.perf_counter()
        compute_parts(task, source, parts, config)
        rows, _ = join_parts(parts)
        return rows / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="random:vit_small_patch16_224")
    parser.add_argument("--data", default="builtin:photos")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    opened = open_model(arguments.model)
    opened.backbone.to(arguments.device)
    whole = open_source(arguments.data, split="all")
    images = min(arguments.images, len(whole)) // arguments.batch * arguments.batch
    source = Subset(whole, [number * len(whole) // images for number in range(images)])
    config = ComputeConfig(torch.device(arguments.device), arguments.batch, arguments.workers)
    bare(opened, arguments.batch, arguments.batch, arguments.device)
    rates: dict[str, list[float]] = {"bare timm": [], "embed": []}
    for _ in range(arguments.repeats):
        rates["bare timm"].append(bare(opened, images, arguments.batch, arguments.device))
        rates["embed"].append(embed(opened, source, config))
    ratio = statistics.median(e / b for e, b in zip(rates["embed"], rates["bare timm"], strict=True))
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.machine()
    facts = f"torch {torch.__version__}, timm {timm.__version__}, {device}, {torch.get_num_threads()} threads"
    rows = [
        [
            name,
            arguments.model,
            images,
            f"{statistics.median(r):.1f}",
            f"{min(r):.1f}",
            f"{max(r):.1f}",
            facts,
        ]
        for name, r in rates.items()
    ]
    rows.append(["embed / bare", arguments.model, images, f"{ratio:.3f}", "", "", facts])
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        csv.writer(file).writerows([["what", "model", "images", "median", "least", "most", "with"], *rows])
    for row in rows:
        print("  ".join(f"{cell!s:>14}" for cell in row[:6]))
    print(facts)


if __name__ == "__main__":
    main()
