"""Claim: what `auto` chooses is what is faster here: layout, fused AdamW, compiled blocks, bf16, each on its own.

Steps of MFM of ViT-S and ResNet-50 at 224 pixels in turns in one run: as torch does it unasked (float32, NCHW, AdamW
as a loop over tensors, nothing compiled), then with one change each, then with all. On a CPU with one thread and
processor time, so that other programs disturb little. `faster` is the first over the changed one, medians.

    python benchmarks/choices.py
    python benchmarks/choices.py --device cuda --batch 256
    python benchmarks/choices.py --backbone resnet50 --batch 2 --ways channels_last fused bf16    # compiles for minutes
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import show, write_record
from torch import nn

from freqmask.methods import build_method
from freqmask.training.optim import parameter_groups

RESULTS = Path(__file__).parent / "results" / "choices.csv"
PLAIN = {"channels_last": False, "fused": False, "compile": False, "bf16": False}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", nargs="+", default=["vit_small_patch16_224", "resnet50"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=list(PLAIN), default=list(PLAIN))
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    rows = [row for backbone in arguments.backbone for row in compare(backbone, arguments)]
    show(rows)
    write_record(RESULTS, rows, arguments.device, batch=arguments.batch, size=arguments.size)


def compare(backbone: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way to make the same step."""
    ways = {
        "as it is": PLAIN,
        **{name: {**PLAIN, name: True} for name in arguments.ways},
        "all": {**PLAIN, **dict.fromkeys(arguments.ways, True)},
    }
    steps = {name: make_step(backbone, way, arguments) for name, way in ways.items()}
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.rounds + 2):
        for name, step in steps.items():
            wait(arguments.device)
            start = clock()
            step()
            wait(arguments.device)
            if number > 1:
                times[name].append(clock() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "backbone": backbone,
            "with": name,
            "ms_a_step": round(1000 * seconds, 1),
            "faster": round(medians["as it is"] / seconds, 3),
            "range_ms": f"{1000 * min(times[name]):.0f}-{1000 * max(times[name]):.0f}",
        }
        for name, seconds in medians.items()
    ]


def make_step(backbone: str, way: dict[str, bool], arguments: argparse.Namespace) -> Callable[[], None]:
    """A whole step of MFM, made in one way."""
    torch.manual_seed(0)
    method: Any = build_method("mfm", backbone=backbone, image_size=arguments.size).to(arguments.device)
    if way["channels_last"]:
        method.to(memory_format=torch.channels_last)
    if way["compile"]:
        method.compile_parts()
    optimizer = torch.optim.AdamW(
        parameter_groups(method, 0.05),
        lr=1e-4,
        fused=way["fused"],
        foreach=False if not way["fused"] else None,
    )
    views = [torch.rand(arguments.batch, 3, arguments.size, arguments.size, device=arguments.device)]
    keys = torch.arange(arguments.batch, device=arguments.device)

    def step() -> None:
        with torch.autocast(arguments.device, torch.bfloat16, enabled=way["bf16"]):
            loss = method(views, keys)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(method.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
