"""Claim: a training step spreads over processes at the price of its gradients' sum and little else.

Each process count trains the same method with the same number of images a process (weak scaling), one thread
or one GPU a process, under DDP as `freqmask pretrain --devices N` does. `summing` is what the step takes more
than the same step whose gradients stay at home (DDP's `no_sync`), in the same run. The last lines extrapolate by
a stated model: step(n) = alone + max(0, 2 (n - 1) / n x gradient bytes / bandwidth - overlap x backward), with
bandwidth as given (default: measured here at the largest count), backward as measured alone, and overlap 0 on a
CPU, 0.5 elsewhere.

    python benchmarks/scaling.py                                  # 1 and 2 processes, CPU sizes
    python benchmarks/scaling.py --device cuda --processes 1 2 4 8 --batch 256 --precision bf16
    python benchmarks/scaling.py --bandwidth 25                   # what a 200 Gbit/s network would do, in GB/s
    python benchmarks/scaling.py --bandwidth 25 --record          # of the GPU's step in results/gpu.csv; nothing is run

`--record` also holds against that record what the model takes for granted: that a step costs the network's own step
plus mask and loss, and a method the passes that it makes. Only the network's part has a backward pass to hide behind.
"""

from __future__ import annotations

import argparse
import csv
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from record import write_record
from step import METHODS, Row, show
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from freqmask.methods import build_method
from freqmask.training.optim import OptimConfig, build_optimizer

RESULTS = Path(__file__).parent / "results" / "scaling.csv"
OVERLAP = {"cpu": 0.0, "cuda": 0.5}  # of the backward pass, during which gradients already travel
# The backward pass's share of a network's own step, where it was not measured: two products for one forward.
BACKWARD = 2 / 3
RECORD, RECORDED = RESULTS.parent / "gpu.csv", "ViT-B/16"
RECORDED_BATCH, RECORDED_WEIGHTS = 256, 86.4  # images; millions, the decoder's with them
# In forward passes: three with gradient, FOLK's two views and two of the teacher.
PASSES = {"MFM": 3, "FOLK": 8}
EXPECTED = (8, 64)


def main() -> None:
    arguments = parse()
    if arguments.record:
        show_record(arguments)
        return
    rows = [measured(count, arguments) for count in arguments.processes]
    alone = rows[0]
    for one in rows:
        one["efficiency"] = round(one["images_per_second"] / one["processes"] / alone["images_per_second"], 3)
    rows += [expected(count, rows, arguments) for count in EXPECTED]
    show(rows)
    if not OVERLAP[arguments.device]:  # nothing hides behind it
        for one in rows:
            del one["backward_ms"]
    write_record(
        RESULTS,
        rows,
        arguments.device,
        method=arguments.method,
        backbone=arguments.backbone,
        batch_a_process=arguments.batch,
        precision=arguments.precision,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--method", default="mfm", choices=list(METHODS))
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=4, help="images of one process")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--bandwidth", type=float, help="GB/s of a device to the others, for the extrapolation"
    )
    parser.add_argument("--record", action="store_true", help="of results/gpu.csv instead of measuring")
    arguments = parser.parse_args()
    if arguments.record and not arguments.bandwidth:
        parser.error("--record needs --bandwidth: one GPU sends nothing")
    if arguments.processes[0] != 1:
        parser.error("--processes must begin with 1, which the others are compared with")
    return arguments


def measured(count: int, arguments: argparse.Namespace) -> Row:
    """A row of one process count; the processes end with it."""
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_process, (count, port, arguments, answers), nprocs=count)
    step, at_home, backward, gradient_bytes = answers.get()
    return {
        "processes": count,
        "by": "measured",
        "ms_a_step": round(1000 * step, 1),
        "images_per_second": round(count * arguments.batch / step, 1),
        "efficiency": 1.0,
        "summing": round((step - at_home) / step, 4),
        "gradient_MB": round(gradient_bytes / 1e6, 1),
        "backward_ms": round(1000 * backward, 1),
    }


def run_process(rank: int, count: int, port: int, arguments: argparse.Namespace, answers: Any) -> None:
    """One process: steps with and without the sum of gradients, in turns."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    device = torch.device(arguments.device, rank) if arguments.device == "cuda" else torch.device("cpu")
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=count)
    step, parallel = stepper(arguments, device)

    def at_home() -> None:
        with parallel.no_sync():
            step()

    times: dict[str, list[float]] = {"step": [], "home": [], "backward": []}
    for number in range(arguments.rounds + 1):
        seconds = {"step": timed(step, device), "home": timed(at_home, device)}
        with parallel.no_sync():
            seconds["backward"] = step(True)
        for name, values in times.items():
            if number:
                values.append(seconds[name])
    if rank == 0:
        trained = (p for p in parallel.parameters() if p.requires_grad)
        size = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        medians = map(statistics.median, times.values())
        answers.put((*medians, size))
    distributed.barrier()
    distributed.destroy_process_group()


def stepper(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[Callable[..., float], DistributedDataParallel]:
    """A step, which gives the seconds of its backward pass where it is asked to wait for it; and its module."""
    kind, filter_name = METHODS[arguments.method]
    method: Any = build_method(
        kind, backbone=arguments.backbone, image_size=arguments.size, filter=filter_name
    ).to(device)
    optimizer = build_optimizer(method, OptimConfig(1e-4, 0.0, 0.0, 0, 1))
    parallel = DistributedDataParallel(method, gradient_as_bucket_view=True)
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    views = [torch.rand(shape, device=device) for _ in range(method.n_views)]
    keys = torch.arange(arguments.batch, device=device)

    def step(wait: bool = False) -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
            loss: Tensor = parallel(views, keys)["loss"]
        began = now(device) if wait else 0.0
        loss.backward()
        backward = now(device) - began if wait else 0.0
        nn.utils.clip_grad_norm_(method.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(0, 1000)
        return backward

    return step, parallel


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a step that all processes begin together."""
    distributed.barrier()
    began = now(device)
    work()
    return now(device) - began


def expected(count: int, rows: list[Row], arguments: argparse.Namespace) -> Row:
    """What the model of the module's docstring says of a process count."""
    alone, most = rows[0], max((one for one in rows if one["by"] == "measured"), key=lambda r: r["processes"])
    sent = 2 * (count - 1) / count * alone["gradient_MB"] / 1e3  # GB that a ring sends from each device
    bandwidth = arguments.bandwidth or measured_bandwidth(most)
    hidden = OVERLAP[arguments.device] * alone["backward_ms"]
    milliseconds = alone["ms_a_step"] + max(0.0, 1000 * sent / bandwidth - hidden)
    return {
        "processes": count,
        "by": f"model, {bandwidth:.2f} GB/s",
        "ms_a_step": round(milliseconds, 1),
        "images_per_second": round(1000 * count * arguments.batch / milliseconds, 1),
        "efficiency": round(alone["ms_a_step"] / milliseconds, 3),
        "summing": round(1 - alone["ms_a_step"] / milliseconds, 4),
        "gradient_MB": alone["gradient_MB"],
        "backward_ms": alone["backward_ms"],
    }


def show_record(arguments: argparse.Namespace) -> None:
    """The model beside what one GPU measured, then what it expects of more of them."""
    arguments.device, arguments.batch = "cuda", RECORDED_BATCH
    with RECORD.open(newline="") as file:
        table = [row for row in csv.DictReader(file) if row["what"].startswith(f"{RECORDED}: ")]
    checks: list[Row] = []
    known: dict[str, str] = {}  # a run that left something out is held against the one before
    for run in sorted({row["run"] for row in table}):
        values = {row["what"].partition(": ")[2]: row["value"] for row in table if row["run"] == run}
        known |= values
        network = 1000 * RECORDED_BATCH / float(known["supervised: images a second"])
        step = float(known["a step of MFM, Com"])
        if "a step of MFM, Com" in values:
            by_parts = network + float(known["com: mask and loss alone"])
            checks.append(check(f"run {run}: a step of MFM, ms", by_parts, step))
        if folk := values.get("FOLK: images a second"):
            by_passes = 1000 * RECORDED_BATCH / step * PASSES["MFM"] / PASSES["FOLK"]
            checks.append(check(f"run {run}: FOLK, images a second", by_passes, float(folk)))
    show(checks)
    megabytes = 4 * RECORDED_WEIGHTS  # gradients are float32 under bf16-mixed, too
    alone = {"ms_a_step": step, "gradient_MB": megabytes, "backward_ms": round(BACKWARD * network, 1)}
    show([expected(count, [{**alone, "by": "measured", "processes": 1}], arguments) for count in EXPECTED])


def check(what: str, model: float, measured: float) -> Row:
    return {"what": what, "model": round(model, 1), "measured": measured, "ratio": round(model / measured, 3)}


def measured_bandwidth(row: Row) -> float:
    """GB/s at which gradients were summed here."""
    count, seconds = row["processes"], row["ms_a_step"] * row["summing"] / 1000
    if count < 2 or seconds <= 0:
        raise SystemExit("no time of summing was measured; give --bandwidth in GB/s")
    return float(2 * (count - 1) / count * row["gradient_MB"] / 1e3 / seconds)


if __name__ == "__main__":
    main()
