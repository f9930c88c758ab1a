"""Claim: k-NN of 50,000 queries among 1.3 million features of 384 numbers and 1,000 classes fits in 8 GB.

Method: synthetic float32 features of the full bank (1.3 million x 384); a part of the queries is measured, after
one warm-up chunk, and the time of all 50,000 is extrapolated from it (every chunk of queries costs the same). Memory
is the peak of the whole process, which does not grow with the queries but for their features (77 MB) and answers. The
rival, scikit-learn's brute-force k-NN by cosine, answers one chunk of the same queries.

    python benchmarks/knn.py [DEVICE] [BANK]
"""

from __future__ import annotations

import csv
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

from freqmask.evaluation import knn

RESULTS = Path(__file__).parent / "results" / "knn.csv"
BANK, DIM, QUERIES, CLASSES = 1_300_000, 384, 50_000, 1000
CHUNK, CHUNKS, RIVALS = 1024, 3, 64


def main(device: str = "cpu", bank_size: str = str(BANK)) -> None:
    generator = torch.Generator(device).manual_seed(0)
    bank = torch.randn(int(bank_size), DIM, device=device, generator=generator)
    labels = torch.randint(CLASSES, (len(bank),), device=device, generator=generator)
    queries = torch.randn(CHUNK * (CHUNKS + 1), DIM, device=device, generator=generator)
    normalised = time_of(lambda: knn.predict(queries[:1], bank, labels, CLASSES), device)
    seconds = [
        time_of(lambda part=part: knn.predict(part, bank, labels, CLASSES), device) - normalised
        for part in queries.split(CHUNK)
    ][1:]
    row: dict[str, object] = {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "bank": len(bank),
        "dim": DIM,
        "classes": CLASSES,
        "queries_measured": CHUNK * CHUNKS,
        "seconds_a_chunk": f"{np.median(seconds):.2f}",
        "chunk_spread": f"{min(seconds):.2f} to {max(seconds):.2f}",
        "queries": QUERIES,
        "minutes_extrapolated": f"{QUERIES / CHUNK * float(np.median(seconds)) / 60:.1f}",
        "peak_gb": f"{peak_bytes(device) / 1e9:.2f}",
    }
    if device == "cpu":
        row["scikit_learn_minutes_extrapolated"] = f"{rival(queries, bank, labels):.1f}"
    row |= {"torch": torch.__version__, "machine": platform.machine()}
    write(row)


def rival(queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor) -> float:
    """Minutes that scikit-learn would take, from a few queries; measured after our peak was read."""
    from sklearn.neighbors import KNeighborsClassifier

    votes = KNeighborsClassifier(
        200, metric="cosine", weights=lambda d: np.exp(-d / knn.TEMPERATURE), algorithm="brute"
    ).fit(bank.numpy(), labels.numpy())
    began = time.perf_counter()
    votes.predict(queries[:RIVALS].numpy())
    return QUERIES / RIVALS * (time.perf_counter() - began) / 60


def time_of(run: object, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()  # type: ignore[operator]
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write(row: dict[str, object]) -> None:
    known = list(csv.DictReader(RESULTS.open(encoding="utf-8"))) if RESULTS.is_file() else []
    rows = [old for old in known if (old["device"], old["bank"]) != (str(row["device"]), str(row["bank"]))]
    header = list(dict.fromkeys(name for one in [*rows, row] for name in one))
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, header)
        table.writeheader()
        table.writerows([*rows, row])
    for name, value in row.items():
        print(f"{name:<36} {value}")


if __name__ == "__main__":
    main(*sys.argv[1:])
