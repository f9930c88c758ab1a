"""Claim: the report of a long run stays below 8 MB and answers at once; curves and previews are thinned, not cut.

A made-up run of 100,000 logged steps with 18 columns and 200 previews of photographs is written to a temporary
folder; its report is built and opened in Chromium from the disk. Median of the repeats; time to interactive
is from the start of the navigation until all charts are drawn.

    python benchmarks/report.py                       # 100,000 steps, 200 previews
    python benchmarks/report.py --steps 5000 --previews 20 --runs 4
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from freqmask.reporting.page import write_report
from freqmask.reporting.reading import read_run

RESULTS = Path(__file__).parent / "results" / "report.csv"
FIXED = ("", "/lowpass", "/highpass", "/band_0_4", "/band_4_8", "/band_8_16", "/band_16_32", "/band_32_64")
BANDS = (*FIXED, "/band_64_112", "/band_112_159")
PREVIEW = (1400, 1180)  # as pre-training draws one for 224-pixel images


def make_run(folder: Path, steps: int, previews: int, seed: int) -> Path:
    """A run folder as pre-training leaves one, with invented numbers and real photographs."""
    draw = np.random.default_rng(seed)
    (folder / "previews").mkdir(parents=True)
    config = {
        "data": ["photos"],
        "method": "mfm",
        "backbone": "vit_small_patch16_224",
        "image_size": 224,
        "channels": 3,
        "steps": steps,
        "batch_size": 256,
        "lr": 1.5e-4,
        "min_lr": 1.25e-6,
        "warmup_epochs": 20.0,
        "weight_decay": 0.05,
        "seed": seed,
        "accelerator": "cuda",
        "devices": 1,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "run.json").write_text(json.dumps({"images": 1_281_167, "freqmask": "0.1.0", "torch": "2.11"}))
    (folder / "summary.json").write_text(json.dumps({"steps": steps, "seconds": 36_000.0}))
    write_metrics(folder / "metrics.csv", steps, draw)
    write_previews(folder / "previews", steps, previews, draw)
    return folder


def write_metrics(path: Path, steps: int, draw: np.random.Generator) -> None:
    """Noisy curves that fall, a row a step."""
    progress = np.arange(1, steps + 1) / steps
    columns = {"step": np.arange(1, steps + 1), "epoch": progress * 300, "loss": falling(progress, 4.5, draw)}
    for number, name in enumerate(BANDS):
        columns[f"relative_loss{name}"] = falling(progress, 1.0, draw, floor=0.5 + 0.04 * number)
    columns["lr"] = 1.5e-4 * np.minimum(progress * 15, 0.5 * (1 + np.cos(np.pi * progress)))
    columns["weight_decay"] = np.full(steps, 0.05)
    columns["grad_norm"] = np.exp(draw.normal(0, 0.4, steps))
    columns["images_per_second"] = draw.normal(1200, 60, steps)
    columns["data_wait_share"] = np.clip(draw.normal(0.03, 0.01, steps), 0, 1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([f"{value:.7g}" for value in row] for row in zip(*columns.values(), strict=True))


def falling(progress: np.ndarray, start: float, draw: np.random.Generator, floor: float = 0.6) -> np.ndarray:
    """From ``start`` towards its ``floor``-th part, with the noise of batches."""
    curve = start * (floor + (1 - floor) * np.exp(-6 * progress))
    return curve * (1 + draw.normal(0, 0.03, len(progress)))


def write_previews(folder: Path, steps: int, count: int, draw: np.random.Generator) -> None:
    """Photographs under less and less noise, as hard to compress as real previews."""
    from skimage import data

    photographs = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    for number in range(count):
        picture = Image.fromarray(photographs[number % 4]).convert("RGB").resize(PREVIEW)
        noise = draw.normal(0, 40 * (1 - number / count), (PREVIEW[1] // 4, PREVIEW[0] // 4, 3))
        noise = np.kron(noise, np.ones((4, 4, 1)))
        noisy = np.clip(np.asarray(picture)[: noise.shape[0], : noise.shape[1]] + noise, 0, 255)
        step = round((number + 1) * steps / count)
        Image.fromarray(noisy.astype(np.uint8)).save(folder / f"step-{step:06d}.png", compress_level=1)


def seconds_to_interactive(page: Path, repeats: int) -> list[float]:
    """From navigation to the last chart drawn, each time in a fresh browser context."""
    from playwright.sync_api import sync_playwright

    taken = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or None, args=["--no-sandbox"]
        )
        for _ in range(repeats):
            tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            tab.goto(page.resolve().as_uri(), wait_until="load", timeout=120_000)
            tab.wait_for_selector("html[data-ready]", timeout=120_000)
            taken.append(float(tab.evaluate("document.documentElement.dataset.ready")) / 1000)
        browser.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000, help="logged steps of a run")
    parser.add_argument("--previews", type=int, default=200, help="previews of a run")
    parser.add_argument("--runs", type=int, default=1, help="runs overlaid")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="copy the page here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            make_run(Path(folder) / f"run-{number}", given.steps, given.previews, number)
            for number in range(given.runs)
        ]
        row = measure(runs, Path(folder) / "report.html", given.repeats)
        if given.keep:
            shutil.copy(Path(folder) / "report.html", given.keep)
    row = {"runs": given.runs, "steps": given.steps, "previews": given.previews, **row}
    for name, value in row.items():
        print(f"{name:24} {value}")
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)


def measure(runs: list[Path], out: Path, repeats: int) -> dict[str, object]:
    built = []
    for _ in range(repeats):
        start = time.perf_counter()
        write_report(runs, out)
        built.append(time.perf_counter() - start)
    text = out.read_text()
    try:
        interactive = f"{statistics.median(seconds_to_interactive(out, repeats)):.2f}"
    except ImportError:
        interactive = "playwright is not installed"
    return {
        "megabytes": f"{out.stat().st_size / 1e6:.2f}",
        "previews_shown": text.count("<img src=") if len(runs) == 1 else text.count("data-step="),
        "rows_read": sum(read_run(run).rows for run in runs),
        "build_seconds": f"{statistics.median(built):.1f}",
        "seconds_to_interactive": interactive,
        "repeats": repeats,
        "machine": f"{platform.machine()}, {platform.system()}, python {platform.python_version()}",
    }


if __name__ == "__main__":
    main()
