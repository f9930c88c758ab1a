"""Claim: evaluations of 5,000 classes take seconds and a gigabyte or two, no table of all pairs of classes.

    python benchmarks/classes.py
    python benchmarks/classes.py --classes 20000 --protocols knn

Small images of random colors in a .npz, two a class to learn from and one to test; the model is pixels, and for three
steps of fine-tuning a small ViT. Times are of the processor, so that other programs disturb little; each protocol has a
process, and a peak of memory, of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from record import show, write_record

WORDS = {  # the model and the options of each protocol
    "knn": ["pixels"],
    "fewshot": ["pixels", "--shots", "1"],
    "linear": [
        "pixels",
        "--rates",
        "1",
    ],  # by default nine: nine times the time, and the heads' memory
    "finetune": ["random:vit_tiny_patch16_224", "--image_size", "32", "--steps", "3", "--batch_size", "16"],
}
RESULTS = Path(__file__).parent / "results" / "classes.csv"
MEASURED = """
import resource, sys
from freqmask.cli import main
try:
    main(sys.argv[1:])
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    sys.stderr.write(f"\\nMEASURED {used.ru_utime + used.ru_stime} {used.ru_maxrss}\\n")
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=5000)
    parser.add_argument("--protocols", nargs="+", default=list(WORDS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        draw(work / "images.npz", arguments.classes)
        rows = [measure(work, protocol) for protocol in arguments.protocols]
    show(rows)
    load = " ".join(f"{value:.0f}" for value in os.getloadavg())
    write_record(RESULTS, rows, classes=arguments.classes, load_average=load)


def draw(file: Path, classes: int) -> None:
    """Images of 8 x 8 pixels, those of a class alike but for noise."""
    random = np.random.default_rng(0)
    means = random.integers(0, 256, (classes, 8, 8, 3))
    arrays = {}
    for part, each in (("train", 2), ("test", 1)):
        labels = np.tile(np.arange(classes), each)
        noisy = means[labels] + random.normal(0, 20, (len(labels), 8, 8, 3))
        arrays |= {f"{part}_images": noisy.clip(0, 255).astype(np.uint8), f"{part}_labels": labels}
    np.savez(file, **arrays)


def measure(work: Path, protocol: str) -> dict[str, object]:
    """One evaluation, in a process of its own."""
    words = ["evaluate", protocol, *WORDS[protocol], "--data", "images.npz", "--workers", "0", "--seeds", "0"]
    command = [sys.executable, "-c", MEASURED, *words, "--out", protocol]
    environment = {**os.environ, "XDG_CACHE_HOME": str(work / "cache")}
    done = subprocess.run(command, cwd=work, env=environment, check=True, capture_output=True, text=True)
    _, seconds, kilobytes = next(
        line.split() for line in done.stderr.splitlines() if line.startswith("MEASURED")
    )
    return {"protocol": protocol, "seconds": round(float(seconds), 1), "peak_MB": int(kilobytes) // 1000}


if __name__ == "__main__":
    main()
