"""One part of what `benchmarks/gpu.sh` measures, on a GPU or, with --toy, at tiny sizes on a CPU.

python benchmarks/gpu.py step --out OUT
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import Claims

HERE = Path(__file__).parent
WORK = Path(os.environ.get("FREQMASK_BENCHMARK_WORK", "/tmp/freqmask-benchmark"))
Work = Callable[[], object]
TOY = {"model_args": {"depth": 1, "embed_dim": 64, "num_heads": 1}, "patch_size": 8}
NETWORKS = {"ViT-B/16": "vit_base_patch16_224", "ResNet-50": "resnet50"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=120, help="that are there; what is least telling is left out"
    )
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    options.until = time.monotonic() + options.seconds
    options.device = "cpu" if options.toy else "cuda"
    # each shape gets code of its own: a second one would else make slower code for any shape
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    torch.set_float32_matmul_precision("highest")
    WORK.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    claims = Claims(options.out, options.part, options.device)
    PARTS[options.part](options, claims)
    claims.add("time of this part", time.monotonic() - began, "s")


def tests(options: Any, claims: Claims) -> None:
    """The tests marked gpu; a failure is named in the table."""
    files = [
        str(path)
        for path in sorted((HERE.parent / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text()
    ]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0" if options.toy else "12", "-vv", "-rfE"]
    command += [
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        "--timeout",
        "90",
        "--tb",
        "short",
        "--durations",
        "10",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    with (options.out / "tests.txt").open("w") as log:
        running = subprocess.Popen(
            [*command, *files], cwd=HERE.parent, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            running.wait(max(options.until - time.monotonic() - 15, 5))
        except subprocess.TimeoutExpired:
            claims.add("stopped", "no time left for the other tests")
            running.send_signal(signal.SIGINT)  # so that it still tells what failed
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(8)
            running.kill()
    counts: dict[str, set[str]] = {"PASSED": set(), "FAILED": set(), "SKIPPED": set(), "ERROR": set()}
    for line in (options.out / "tests.txt").read_text().splitlines():
        words = line.split()
        kind = next((word for word in words if word in counts), None)
        name = next((word for word in words if "::" in word), None)
        if kind is not None and name is not None:
            counts[kind].add(
                line[line.index(name) :].removesuffix(kind).split(f" {kind} ")[0].split(" - ")[0].strip()
            )
    failed = sorted(counts["FAILED"] | counts["ERROR"])
    claims.add("tests passed", len(counts["PASSED"]), aim="" if options.toy else ">= 60")
    claims.add("tests skipped", len(counts["SKIPPED"]))
    claims.add("tests failed", len(failed), aim="== 0")
    for name in failed:
        claims.add("failed", name)


def step(options: Any, claims: Claims) -> None:
    """Steps of ViT-B/16 and ResNet-50 against the matmul ceiling, FOLK against its passes, Com's share."""
    from step import matmul, matmul_flops, take_turns

    given = sizes(options, "vit_base_patch16_224", batch=256)
    device = torch.device(options.device)
    product = matmul(given, device)
    ceiling = (
        matmul_flops(device)
        / take_turns({"matmul": product}, 5, device, repeats=1 if options.toy else 20)["matmul"]
    )
    claims.add("bf16 matmul of this run", ceiling / 1e12, "TFLOP/s")
    for name, backbone in NETWORKS.items():
        if time.monotonic() > options.until - 50 and not options.toy:
            claims.add(f"{name}: left out", "no time left")
            continue
        given = sizes(options, "resnet18" if options.toy and "Res" in name else backbone, batch=256)
        with going_on(claims, name):
            mfm_steps(name, given, claims, ceiling, device)
        free()
        if "ViT" in name:
            with going_on(claims, f"{name}, FOLK"):
                folk_steps(name, sizes(options, backbone, batch=128), claims, device)
            free()
    if time.monotonic() < options.until - 50 or options.toy:
        with going_on(claims, "one graph"):
            one_graph(sizes(options, "vit_base_patch16_224", batch=256), claims, device)


def sizes(options: Any, backbone: str, batch: int) -> argparse.Namespace:
    """What step.py and peers.py are asked."""
    toy = options.toy
    return argparse.Namespace(
        device=options.device,
        backbone="vit_tiny_patch16_224" if toy and "vit" in backbone else backbone,
        batch=2 if toy else batch,
        size=32 if toy else 224,
        precision="bf16",
        compile=True,
        backend="eager" if toy else "inductor",
        rounds=1 if toy else 5,
        repeats=1 if toy else 5,
        model=TOY if toy and "vit" in backbone else {},
        outputs=64 if toy else 65_536,
        options=options,
    )


def mfm_steps(name: str, given: Any, claims: Claims, ceiling: float, device: torch.device) -> None:
    """MFM with both kinds of masks beside a supervised step."""
    from step import filter_work, forward_flops, method_works, supervised, take_turns

    began = time.monotonic()
    fixed = method_works("mfm", given.backbone, given, device)
    com = method_works("mfm-com", given.backbone, given, device)
    works: dict[str, Work] = {"supervised": supervised(given.backbone, given, device)}
    works |= {f"fixed {part}": work for part, work in fixed.items()}
    works |= {f"com {part}": work for part, work in com.items()}
    works["com filter"] = filter_work("com", given, device)
    works["fixed filter"] = filter_work("fixed", given, device)
    reset_peak(device)
    take_turns(works, 0, device)
    claims.add(f"{name}: time to compile", time.monotonic() - began, "s")
    times = take_turns(works, given.rounds, device, given.repeats)
    flops = 3 * forward_flops(given.backbone, given, device)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    claims.add(
        f"{name}: MFM, Com: share of the ceiling",
        flops / times["com step"] / ceiling,
        "",
        ">= 0.45" if "ViT" in name else "",
    )
    claims.add(f"{name}: MFM, fixed: share of the ceiling", flops / times["fixed step"] / ceiling)
    claims.add(f"{name}: supervised: share of the ceiling", flops / times["supervised"] / ceiling)
    for kind, key in (("MFM, Com", "com step"), ("MFM, fixed", "fixed step"), ("supervised", "supervised")):
        claims.add(f"{name}: {kind}: images a second", given.batch / times[key], "images/s")
    claims.add(f"{name}: a step of MFM, Com", 1000 * times["com step"], "ms")
    for kind in ("com", "fixed"):
        claims.add(f"{name}: {kind}: filter alone", 1000 * times[f"{kind} filter"], "ms")
        filtering = times[f"{kind} filter"] / times[f"{kind} step"]
        claims.add(
            f"{name}: {kind}: share of the filter in a step",
            filtering,
            "",
            "<= 0.02" if kind == "com" else "",
        )
        claims.add(f"{name}: {kind}: mask and loss alone", 1000 * times[f"{kind} mask"], "ms")
        share = times[f"{kind} mask"] / times[f"{kind} step"]
        claims.add(f"{name}: {kind}: share of mask and loss in a step", share)
    claims.add(f"{name}: MFM, Com over supervised", times["com step"] / times["supervised"])
    claims.add(f"{name}: most memory, batch {given.batch}", peak, "GB")
    for kind in ("com step", "com mask"):
        profile(works[kind], given, f"{name}: {kind}")


def folk_steps(name: str, given: Any, claims: Claims, device: torch.device) -> None:
    """FOLK beside the sum of its passes."""
    from step import method_works, take_turns

    works = method_works("folk", given.backbone, given, device)
    reset_peak(device)
    take_turns(works, 0, device)
    times = take_turns(works, given.rounds, device, given.repeats)
    claims.add(f"{name}: FOLK over its passes", times["step"] / times["passes"], "", "<= 1.05")
    claims.add(f"{name}: FOLK: images a second", given.batch / times["step"], "images/s")
    claims.add(f"{name}: FOLK: share of mask and loss in a step", times["mask"] / times["step"])
    if device.type == "cuda":
        claims.add(
            f"{name}: FOLK: most memory, batch {given.batch}", torch.cuda.max_memory_allocated() / 1e9, "GB"
        )
    for kind in ("step", "passes"):
        profile(works[kind], given, f"{name}: FOLK: {kind}")


def one_graph(given: Any, claims: Claims, device: torch.device) -> None:
    """The whole network as one compiled graph, no compilation, and blocks: what the graph of blocks gives away."""
    from step import method_works, take_turns

    works = {}
    for kind, compiled in (("blocks", True), ("eager", False)):
        works[kind] = method_works(
            "mfm", given.backbone, argparse.Namespace(**{**vars(given), "compile": compiled}), device
        )["step"]
    began = time.monotonic()
    works["whole"] = method_works(
        "mfm", given.backbone, argparse.Namespace(**{**vars(given), "compile": "whole"}), device
    )["step"]
    take_turns({"whole": works["whole"]}, 0, device)
    claims.add("ViT-B/16: time to compile one graph", time.monotonic() - began, "s")
    take_turns(works, 0, device)
    times = take_turns(works, given.rounds, device, given.repeats)
    claims.add("ViT-B/16: blocks compiled, over not compiled", times["eager"] / times["blocks"])
    claims.add("ViT-B/16: one graph compiled, over not compiled", times["eager"] / times["whole"])


def small(options: Any, claims: Claims) -> None:
    """ViT-Ti/4 on 32 pixels through `freqmask pretrain`, images on the device."""
    data = os.environ.get("CIFAR") or str(
        smooth_images(WORK / "small.npy", 512 if options.toy else 50_000, 32)
    )
    # what is claimed first: compiling takes half of the time that there is
    small_run(options, claims, "crops and flips", data, {})
    if options.toy or time.monotonic() < options.until - 35:
        with going_on(claims, "the step alone"):
            small_step_alone(options, claims)
        free()
    else:
        claims.add("ViT-Ti/4 at 32 pixels, step alone: left out", "no time left")
    jittered = "crops, flips, colour jitter"
    if not options.toy and time.monotonic() < options.until - 40:
        small_run(options, claims, jittered, data, {"colour_jitter": [0.4, 0.4, 0.2, 0.1, 0.8]})
    elif not options.toy:
        claims.add(f"ViT-Ti/4 at 32 pixels, {jittered}: left out", "no time left")


def small_run(options: Any, claims: Claims, kind: str, data: str, more: dict[str, Any]) -> None:
    """Images/s of one training, and how long it took from start to end."""
    import freqmask

    batch, steps = (16, 4) if options.toy else (2048, 160)
    run = WORK / f"small-{len(list(WORK.iterdir()))}"
    given: dict[str, Any] = {
        "backbone": "vit_tiny_patch16_224",
        "patch_size": 4,
        "image_size": 32,
        "batch_size": batch,
        "steps": steps,
        "images_from": "device",
        "compile": not options.toy,
        "filter": "com",
        "accelerator": options.device,
        "log_every_steps": max(steps // 10, 1),
        "preview_every_steps": 0,
        "probe_every_epochs": 10000,
        "checkpoint_every_steps": steps,
        "workers": 0 if options.toy else 16,
        "out": str(run),
        **more,
    }
    if options.toy:
        given |= TOY
    with going_on(claims, kind):
        began = time.monotonic()
        freqmask.pretrain(data, **given)
        claims.add(f"ViT-Ti/4 at 32 pixels, {kind}", rate(run), "images/s", ">= 40000")
        claims.add(f"ViT-Ti/4 at 32 pixels, {kind}: all of it", time.monotonic() - began, "s")
        shutil.rmtree(run)
    free()


def small_step_alone(options: Any, claims: Claims) -> None:
    """The same step without Lightning and data: what both cost is the difference."""
    from step import method_works, take_turns

    given = sizes(options, "vit_tiny_patch16_224", batch=2048)
    given.size, given.model = 32, TOY if options.toy else {"patch_size": 4}
    device = torch.device(options.device)
    works = method_works("mfm-com", given.backbone, given, device)
    take_turns(works, 0, device)
    times = take_turns(works, given.rounds, device, given.repeats)
    claims.add("ViT-Ti/4 at 32 pixels, step alone", given.batch / times["step"], "images/s")
    claims.add("ViT-Ti/4 at 32 pixels: share of mask and loss in a step", times["mask"] / times["step"])
    profile(works["step"], given, "ViT-Ti/4 at 32 pixels")


def rate(run: Path) -> float:
    """Images a second of the later two thirds of a run's rows."""
    from freqmask.training.files import read_rows

    rows = [
        float(row["images_per_second"])
        for row in read_rows(run / "metrics.csv")
        if row.get("images_per_second")
    ]
    return float(np.median(rows[len(rows) // 3 :]))


def loader(options: Any, claims: Claims) -> None:
    """ViT-B/16 fed by the loader from prepared shards, against the same steps on one batch."""
    from step import method_works

    import freqmask
    from freqmask.data.loader import TrainDataset, TrainSampler, make_loader
    from freqmask.data.sources import open_source
    from freqmask.data.transforms import Geometry
    from freqmask.spectrum import as_float

    workers = 0 if options.toy else min(16, os.cpu_count() or 1)
    photographs = os.environ.get("PHOTOS") or str(
        made_photographs(WORK / "photos", 16 if options.toy else 2048, workers)
    )
    shards = WORK / "shards"
    freqmask.prepare(photographs, out=str(shards), workers=max(workers, 1))
    given = sizes(options, "vit_base_patch16_224", batch=256)
    device, source = torch.device(options.device), open_source(shards)
    dataset = TrainDataset(source, [Geometry(given.size, scale=(0.2, 1.0))], channels=3)
    batches = iter(
        make_loader(
            dataset, TrainSampler(len(source), 0, given.batch, total_steps=10**6), given.batch, workers
        )
    )
    rounds, ahead = (1, 1) if options.toy else (20, 2 * workers)

    def alone() -> None:
        for _ in range(rounds):
            next(batches)

    for _ in range(ahead):  # what the workers have made ready meanwhile
        next(batches)
    claims.add(f"loader alone, {workers} workers", given.batch * rounds / timed(alone, device), "images/s")
    train = method_works("mfm-com", given.backbone, given, device, fed=True)["stepped"]
    moved = (
        (
            [as_float(view.to(device, non_blocking=True)) for view in batch["views"]],
            batch["keys"].to(device, non_blocking=True),
        )
        for batch in batches
    )
    one = next(moved)
    timed(lambda: [train(*one) for _ in range(3)], device)
    still = timed(lambda: [train(*one) for _ in range(rounds)], device)
    for _ in range(ahead):
        train(*next(moved))
    fed = timed(lambda: [train(*next(moved)) for _ in range(rounds)], device)
    claims.add("ViT-B/16 on one batch", given.batch * rounds / still, "images/s")
    claims.add("ViT-B/16 fed by the loader", given.batch * rounds / fed, "images/s")
    claims.add("share of a step that waits for data", max(0.0, 1 - still / fed), "", "<= 0.03")


def made_photographs(folder: Path, count: int, workers: int) -> Path:
    """JPEGs of ImageNet's usual size: crops of scikit-image's photographs, made larger, with fine noise."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = max(workers, 1)
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import gpu; gpu.make_photographs"
    code += f"({str(folder)!r}, {count}, {parts}, int(sys.argv[1]))"
    makers = [subprocess.Popen([sys.executable, "-c", code, str(part)]) for part in range(parts)]
    for maker in makers:
        maker.wait()
    return folder


def make_photographs(folder: str, count: int, parts: int, part: int) -> None:
    """One process's share of the photographs."""
    from PIL import Image
    from skimage import data

    pictures = [
        Image.fromarray(getattr(data, name)()).convert("RGB")
        for name in ("astronaut", "coffee", "chelsea", "rocket")
    ]
    random = np.random.default_rng(part)
    for number in range(part, count, parts):
        picture = pictures[number % len(pictures)]
        width, height = (int(side * random.uniform(0.6, 0.95)) for side in picture.size)
        left, top = (
            int(random.integers(0, whole - side + 1))
            for whole, side in zip(picture.size, (width, height), strict=True)
        )
        crop = picture.crop((left, top, left + width, top + height)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(crop, np.float32) + random.normal(0, 4, (375, 500, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
            Path(folder) / f"{number:05d}.jpg", quality=92
        )


def smooth_images(path: Path, count: int, side: int) -> Path:
    """An array (count, side, side, 3) of smooth random images."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    np.save(path, (255 * images).byte().permute(0, 2, 3, 1).contiguous().numpy())
    return path


def peers(options: Any, claims: Claims) -> None:
    """MFM and FOLK beside lightly's SimMIM, MAE and DINO, compiled."""
    try:
        from peers import in_turns
    except ImportError as error:
        claims.add("left out", f"lightly is not there ({error})")
        return
    given = sizes(options, "vit_small_patch16_224", batch=256)
    times = in_turns(
        given, torch.device(options.device), lambda name, reason: claims.add(f"{name} failed", reason)
    )
    for name, seconds in times.items():
        claims.add(f"ViT-S/16: {name}", given.batch / seconds, "images/s")
    for ours, rival in (("mfm", "simmim"), ("mfm-com", "simmim"), ("mfm", "mae"), ("folk", "dino")):
        if ours in times and rival in times:
            claims.add(f"ViT-S/16: speed of {ours} over {rival}", times[rival] / times[ours])


def learning(options: Any, claims: Claims) -> None:
    """What methods learn: `learning.py`, where there is data for it, for as long as there is time."""
    script, data = HERE / "learning.py", os.environ.get("LEARNING_DATA") or os.environ.get("CIFAR")
    if not script.exists() or not data or options.toy:
        claims.add(
            "left out", "needs benchmarks/learning.py, a GPU and LEARNING_DATA (folders with train and test)"
        )
        return
    out = WORK / "learning"
    command = [
        sys.executable,
        str(script),
        "--data",
        *data.split(),
        "--device",
        options.device,
        "--out",
        str(out),
    ]
    command += os.environ.get("LEARNING_OPTIONS", "").split()
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, timeout=max(options.until - time.monotonic() - 10, 5), check=False)
    for table in out.glob("*.csv"):
        shutil.copy(table, options.out / table.name)
        claims.add(f"rows of {table.name}", len(table.read_text().splitlines()) - 1)


@contextlib.contextmanager
def going_on(claims: Claims, name: str) -> Iterator[None]:
    """A failure inside becomes a row."""
    try:
        yield
    except Exception as error:
        import traceback

        traceback.print_exc()
        claims.add(f"{name}: failed", (str(error).strip().splitlines() or [type(error).__name__])[0][:200])
        free()


def profile(work: Work, given: Any, title: str) -> None:
    """The kernels that two steps spend their time in, as text."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if given.device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(2):
            work()
        if given.device == "cuda":
            torch.cuda.synchronize()
    order = "self_device_time_total" if given.device == "cuda" else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=90)
    with (given.options.out / "profile.txt").open("a") as file:
        file.write(f"== {title}\n{table}\n")


def timed(work: Work, device: torch.device) -> float:
    """Seconds that it takes, the device's work included."""
    from step import synchronise

    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def free() -> None:
    """Give memory back between measurements."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PARTS = {"tests": tests, "step": step, "small": small, "loader": loader, "peers": peers, "learning": learning}

if __name__ == "__main__":
    main()
