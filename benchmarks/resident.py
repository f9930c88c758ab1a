"""Claim: of a training on small images, data take at most 3 % of a step where images stay on the device.

    python benchmarks/resident.py --data cifar10/train.parquet                      # one core of a CPU
    python benchmarks/resident.py --data cifar10/train.parquet --device cuda --batch 1024 --workers 16

Method: MFM steps (forward, backward, clip, AdamW) of a small ViT, fed by each path in turns in one run: batches cut
on the device from images decoded once (on a CPU window by window, and beside it by matrices as on a GPU), and the
loader's. On the CPU with one thread and without workers, so that
nothing that data cost is hidden: processor time of getting batches, and of all. On a GPU, where the two overlap: wall
time of steps that get a batch each over that of the same steps on one batch, synchronised before and after. Medians
over rounds after one that warms up. Views are of 0.5 to 1 of the area, mirrored half of the time, as
`freqmask pretrain` has them below 160 pixels; freed memory is kept, as there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from record import write_record
from torch import nn

from freqmask.data import in_memory
from freqmask.data.in_memory import InMemoryBatches, Limits, read_images
from freqmask.data.loader import TrainDataset, TrainSampler, make_loader
from freqmask.data.source import Source
from freqmask.data.sources import open_source
from freqmask.data.transforms import Geometry
from freqmask.methods import build_method
from freqmask.spectrum import as_float
from freqmask.training.loop import tune_malloc
from freqmask.training.optim import OptimConfig, build_optimizer

RESULTS = Path(__file__).parent / "results" / "resident.csv"
ENOUGH = 2**40
Batch = dict[str, Any]
Step = Callable[[Batch], None]


def main() -> None:
    arguments = parse()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
        tune_malloc()
    rows = [row for size in arguments.size for row in compare(size, arguments)]
    show(rows)
    write_record(RESULTS, rows, arguments.device, timm=timm.__version__)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="small images, three channels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, nargs="+", default=[32], help="side of the views in pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0, help="of the loader; with a GPU")
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=8, help="of a round")
    return parser.parse_args()


def compare(size: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each of the paths."""
    source = open_source(arguments.data)
    geometries = [Geometry(size, scale=(0.5, 1.0))]
    began = time.perf_counter()
    images = read_images(source, geometries, Limits(ENOUGH, ENOUGH), workers=arguments.workers)
    reading = time.perf_counter() - began
    images.to(torch.device(arguments.device))
    batches = InMemoryBatches(images, source, sampler(source, arguments), geometries)
    ways: dict[str, Iterator[Batch]] = {
        "device": iter(batches),
        **({"matrices": as_on_a_gpu(iter(batches))} if arguments.device == "cpu" else {}),
        "loader": loaded(source, geometries, arguments),
    }
    step = make_step(size, arguments)
    rows = []
    for name, times in in_turns(ways, step, arguments).items():
        data, whole = (statistics.median(column) for column in zip(*times, strict=True))
        shares = [part / all_of_it for part, all_of_it in times]
        rows.append(
            {
                "images_from": name,
                "size": size,
                "batch": arguments.batch,
                "data_ms": round(1000 * data, 2),
                "whole_ms": round(1000 * whole, 1),
                "data_share": round(statistics.median(shares), 4),
                "range": f"{min(shares):.4f}-{max(shares):.4f}",
                "images_per_second": round(arguments.batch / whole, 1),
                "read_once_s": round(reading, 1) if name != "loader" else "",
                "MB_on_device": round(images.bytes / 1e6, 1) if name != "loader" else "",
            }
        )
    return rows


def as_on_a_gpu(batches: Iterator[Batch]) -> Iterator[Batch]:
    """All windows of a batch at once by matrix products, which a GPU wants: until 0.2.0 so on a CPU, too."""
    by_window = in_memory._cut_on_host
    while True:
        in_memory._cut_on_host = in_memory.cut_on_device
        batch = next(batches)
        in_memory._cut_on_host = by_window
        yield batch


def sampler(source: Source, arguments: argparse.Namespace) -> TrainSampler:
    return TrainSampler(len(source), 0, arguments.batch, total_steps=10**8)


def loaded(source: Source, geometries: list[Geometry], arguments: argparse.Namespace) -> Iterator[Batch]:
    """The loader's batches, moved to the device as Lightning moves them."""
    dataset = TrainDataset(source, geometries)
    for batch in make_loader(dataset, sampler(source, arguments), arguments.batch, arguments.workers):
        yield {
            **batch,
            "views": [view.to(arguments.device, non_blocking=True) for view in batch["views"]],
            "keys": batch["keys"].to(arguments.device, non_blocking=True),
        }


def make_step(size: int, arguments: argparse.Namespace) -> Step:
    """An optimiser step of MFM on a batch."""
    shape = {
        "embed_dim": arguments.width,
        "depth": arguments.depth,
        "num_heads": max(arguments.width // 64, 1),
    }
    more = {"model_args": shape, "patch_size": arguments.patch} if "vit" in arguments.backbone else {}
    method: Any = build_method("mfm", backbone=arguments.backbone, image_size=size, **more)
    method = method.to(arguments.device)
    recipe = OptimConfig(lr=1e-4, min_lr=0.0, warmup_lr=0.0, warmup_steps=0, total_steps=1)
    optimizer = build_optimizer(method, recipe)
    half = torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.precision == "bf16")

    def step(batch: Batch) -> None:
        with half:
            loss = method([as_float(view) for view in batch["views"]], batch["keys"])["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(method.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def in_turns(
    ways: dict[str, Iterator[Batch]], step: Step, arguments: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    """(seconds for data, seconds for all) of a step, one pair a round after one that warms up."""
    measure = on_cpu if arguments.device == "cpu" else on_gpu
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(arguments.rounds + 1):
        for name, batches in ways.items():
            pair = measure(batches, step, arguments.steps)
            if number:
                times[name].append(pair)
    return times


def on_cpu(batches: Iterator[Batch], step: Step, steps: int) -> tuple[float, float]:
    data, began = 0.0, time.process_time()
    for _ in range(steps):
        start = time.process_time()
        batch = next(batches)
        data += time.process_time() - start
        step(batch)
    return data / steps, (time.process_time() - began) / steps


def on_gpu(batches: Iterator[Batch], step: Step, steps: int) -> tuple[float, float]:
    batch = next(batches)
    alone = synchronised(lambda: [step(batch) for _ in range(steps)])
    whole = synchronised(lambda: [step(next(batches)) for _ in range(steps)])
    return (whole - alone) / steps, whole / steps


def synchronised(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def show(rows: list[dict[str, Any]]) -> None:
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in rows[0]}
    print("  ".join(name.ljust(widths[name]) for name in rows[0]))
    for row in rows:
        print("  ".join(str(row[name]).ljust(widths[name]) for name in row))


if __name__ == "__main__":
    main()
