"""Claim: hiding frequencies and predicting them costs little beside the backbone itself.

A training step (forward, backward, clip, AdamW, EMA) of each method beside a plain supervised step of the same
timm backbone (cross-entropy on 1,000 classes) in the same precision: all take turns in one run, so that a busy
machine slows all alike. `mask+loss` is the time of masks, filtering, normalisation and loss with its gradient,
measured on the batch alone, as a share of the step. FOLK is compared with its own passes: two of the student
and its heads with gradient, two of the teacher and its head without. MFU is the backbone's multiply-adds
(twice, three passes) over a matmul ceiling measured in the same run.

    python benchmarks/step.py                                    # CPU sizes
    python benchmarks/step.py --device cuda --batch 256 --precision bf16 --compile
    python benchmarks/step.py --backbone resnet50 --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from record import show, write_record
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from freqmask.filters import build_filter
from freqmask.methods import build_method
from freqmask.training.loop import tune_malloc
from freqmask.training.optim import OptimConfig, build_optimizer

RESULTS = Path(__file__).parent / "results" / "step.csv"
METHODS = {"mfm": ("mfm", "fixed"), "mfm-com": ("mfm", "com"), "folk": ("folk", "com")}
Row = dict[str, Any]
Work = Callable[[], object]


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        tune_malloc()  # as a training does
    rows = [row for backbone in arguments.backbone for row in table(backbone, arguments, device)]
    show(rows)
    write_record(RESULTS, rows, device, timm=timm.__version__)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", nargs="+", default=["vit_small_patch16_224", "resnet50"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    return parser.parse_args()


def table(backbone: str, arguments: argparse.Namespace, device: torch.device) -> list[Row]:
    """One row a method, all measured in turns."""
    works: dict[str, Work] = {"supervised": supervised(backbone, arguments, device)}
    for name in arguments.methods:
        works |= {
            f"{name}/{part}": work for part, work in method_works(name, backbone, arguments, device).items()
        }
    works["matmul"] = matmul(arguments, device)
    times = take_turns(works, arguments.rounds, device)
    ceiling = matmul_flops(device) / times["matmul"]
    flops = forward_flops(backbone, arguments, device)
    rows = [row("supervised", backbone, arguments, times, "supervised", 3 * flops / ceiling)]
    for name in arguments.methods:
        passes = 3 * flops if name != "folk" else 2 * 3 * flops + 2 * flops
        rows.append(row(name, backbone, arguments, times, f"{name}/step", passes / ceiling))
    return rows


def row(
    name: str, backbone: str, arguments: argparse.Namespace, times: dict[str, float], key: str, least: float
) -> Row:
    seconds = times[key]
    result: Row = {
        "method": name,
        "backbone": backbone,
        "precision": arguments.precision,
        "compile": arguments.compile,
        "batch": arguments.batch,
        "ms_a_step": round(1000 * seconds, 1),
        "images_per_second": round(arguments.batch / seconds, 1),
        "over_supervised": round(seconds / times["supervised"], 3),
        "mfu": round(least / seconds, 3),
        "mask_and_loss_share": "",
        "over_own_passes": "",
        "peak_MB": round(torch.cuda.max_memory_allocated() / 1e6) if arguments.device != "cpu" else "",
    }
    if name != "supervised":
        result["mask_and_loss_share"] = round(times[f"{name}/mask"] / seconds, 4)
    if name == "folk":
        result["over_own_passes"] = round(seconds / times["folk/passes"], 3)
    return result


def autocast(arguments: argparse.Namespace) -> torch.autocast:
    return torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.precision == "bf16")


def compile_parts(model: nn.Module, arguments: argparse.Namespace) -> None:
    """The blocks of a ViT one by one, else (or with ``compile="whole"``) all as one graph, as a training does."""
    if not arguments.compile:
        return
    blocks = getattr(getattr(model, "timm_model", model), "blocks", None)
    parts = [model] if blocks is None or arguments.compile == "whole" else list(blocks)
    for part in parts:
        nn.Module.compile(part, backend=getattr(arguments, "backend", "inductor"))


def stepper(
    module: nn.Module, loss: Callable[..., Tensor], arguments: argparse.Namespace
) -> Callable[..., None]:
    recipe = OptimConfig(lr=1e-4, min_lr=0.0, warmup_lr=0.0, warmup_steps=0, total_steps=1)
    optimizer = build_optimizer(module, recipe)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def step(*batch: Any) -> None:
        with autocast(arguments):
            value = loss(*batch)
        value.backward()
        nn.utils.clip_grad_norm_(trained, 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def supervised(backbone: str, arguments: argparse.Namespace, device: torch.device) -> Work:
    model = (
        timm.create_model(backbone, num_classes=1000, **timm_arguments(backbone, arguments))
        .to(device)
        .train()
    )
    if "vit" not in backbone:
        model.to(memory_format=torch.channels_last)
    compile_parts(model, arguments)
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=device)
    labels = torch.randint(1000, (arguments.batch,), device=device)
    return stepper(model, lambda: nn.functional.cross_entropy(model(images), labels), arguments)


def timm_arguments(backbone: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the bare network is built with beside its name."""
    more = dict(getattr(arguments, "model", {}))
    return {
        **more.pop("model_args", {}),
        **more,
        **({"img_size": arguments.size} if "vit" in backbone else {}),
    }


def method_works(
    name: str, backbone: str, arguments: argparse.Namespace, device: torch.device, fed: bool = False
) -> dict[str, Any]:
    """The method's whole step, its masks and loss alone, for FOLK its passes alone; the step on given views, if fed."""
    kind, filter_name = METHODS[name]
    method: Any = build_method(
        kind,
        backbone=backbone,
        image_size=arguments.size,
        filter=filter_name,
        **getattr(arguments, "model", {}),
    ).to(device)
    if method.backbones().popitem()[1].is_cnn:
        method.to(memory_format=torch.channels_last)  # as a training does
    if arguments.compile:  # as a training does
        method.compile_parts(backend=getattr(arguments, "backend", "inductor"))
    if arguments.compile == "whole":
        for part in method.backbones().values():
            compile_parts(part, arguments)
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    views = [torch.rand(shape, device=device) for _ in range(method.n_views)]
    keys = torch.arange(arguments.batch, device=device)
    train = stepper(method, lambda *batch: method(*batch)["loss"], arguments)

    def stepped(*batch: Any) -> None:
        train(*batch)
        method.after_step(0, 1000)

    works: dict[str, Any] = {"step": lambda: stepped(views, keys), "mask": mask_work(method, views, keys)}
    if fed:
        works["stepped"] = stepped
    if name == "folk":
        works["passes"] = passes_work(method, views, arguments)
    return works


def mask_work(method: Any, views: list[Tensor], keys: Tensor) -> Work:
    """What the method adds to a network that reconstructs: filter, clamp, normalise, loss and its gradient."""
    predictions = [torch.randn_like(view).requires_grad_() for view in views]

    def work() -> None:
        for view, prediction in zip(views, predictions, strict=True):
            with torch.no_grad():
                filtered = method.filter(view, keys, clamp=True)
                method.normalise(filtered.images)
                target = method.normalise(view)
            torch.autograd.grad(method.loss(prediction, target, filtered.keep), prediction)

    return work


def passes_work(method: Any, views: list[Tensor], arguments: argparse.Namespace) -> Work:
    """FOLK's own passes: two of the student and its heads with gradient, two of the teacher and its head."""
    both = torch.cat(views)

    def loss() -> Tensor:
        method.teach(both)
        features = method.student(both)
        prediction = method.decoder(features.feature_map, both.shape[-2:])
        logits = method.student_head(method.distilled(features))
        return prediction.float().mean() + logits.float().mean()

    return stepper(method, loss, arguments)


def matmul_side(device: torch.device) -> int:
    return 1024 if device.type == "cpu" else 8192


def matmul_flops(device: torch.device) -> float:
    return 2.0 * matmul_side(device) ** 3


def matmul(arguments: argparse.Namespace, device: torch.device) -> Work:
    side = matmul_side(device)
    kind = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    return lambda: left @ right


def forward_flops(backbone: str, arguments: argparse.Namespace, device: torch.device) -> float:
    model = timm.create_model(backbone, num_classes=0, **timm_arguments(backbone, arguments)).eval()
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False  # the counter knows matrix products, not a CPU's fused attention
    images = torch.randn(1, 3, arguments.size, arguments.size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return float(counter.get_total_flops()) * arguments.batch


def filter_work(name: str, arguments: argparse.Namespace, device: torch.device) -> Work:
    """The filter alone: transform, mask, transform back, clamp."""
    filter = build_filter(name, arguments.size).to(device)
    if arguments.compile:  # as a training does
        filter.compile(backend=getattr(arguments, "backend", "inductor"))
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size, device=device)
    keys = torch.arange(arguments.batch, device=device)
    return lambda: filter(images, keys, clamp=True)


def take_turns(
    works: dict[str, Work], rounds: int, device: torch.device, repeats: int = 1
) -> dict[str, float]:
    """Median seconds of each, after one round that warms up; so many repeats follow each other without a wait."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            synchronise(device)
            start = time.perf_counter()
            for _ in range(repeats if number else 1):
                work()
            synchronise(device)
            if number:
                times[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(values) for name, values in times.items() if values}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
