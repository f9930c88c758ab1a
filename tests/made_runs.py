"""Run folders made by hand, as pre-training leaves them but without a training."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

CONFIG = {
    "data": ["photos"],
    "method": "mfm",
    "backbone": "vit_tiny_patch16_224",
    "image_size": 32,
    "channels": 3,
    "steps": 40,
    "batch_size": 8,
    "lr": 1e-3,
    "min_lr": 1e-6,
    "warmup_epochs": 1.0,
    "weight_decay": 0.05,
    "seed": 0,
    "accelerator": "cpu",
    "devices": 1,
}
COLUMNS = ("loss", "relative_loss", "relative_loss/lowpass", "relative_loss/band_0_2", "lr", "grad_norm")


def make_run(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    rows: int = 40,
    previews: int = 3,
    finished: bool = True,
    skipped: Sequence[tuple[str, str]] = (),
    results: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """A run folder with falling curves."""
    (folder / "previews").mkdir(parents=True)
    whole = {**CONFIG, **(config or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(whole, allow_unicode=True, sort_keys=False))
    given = {"data": whole["data"], **(config or {})}
    state = {"given": given, "images": 80, "freqmask": "0.1.0", "began": "2026-01-01 00:00:00"}
    (folder / "run.json").write_text(json.dumps(state))
    if finished:
        (folder / "summary.json").write_text(json.dumps({"steps": rows, "seconds": 61.0}))
    write_table(
        folder / "metrics.csv",
        [{"step": step, **dict.fromkeys(COLUMNS, 1 / step)} for step in range(1, rows + 1)],
    )
    for number in range(previews):
        shade = np.full((30, 40, 3), 40 + 60 * number, dtype=np.uint8)
        Image.fromarray(shade).save(folder / "previews" / f"step-{(number + 1) * 10:06d}.png")
    if skipped:
        write_table(folder / "skipped.csv", [{"name": name, "reason": reason} for name, reason in skipped])
    if results:
        write_table(folder / "results.csv", results)
    return folder


def result(model: str, accuracy: float | str, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A row as an evaluation writes it."""
    row = {"protocol": "knn", "model": model, "variant": "k=20", "seed": seed, "accuracy": accuracy}
    ends = {}
    if not isinstance(accuracy, str):  # a measurement that failed has no score
        ends = {"accuracy_low": accuracy - 0.02, "accuracy_high": accuracy + 0.03}
    return {**row, **ends, "data": "labelled", **more}


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["step"])
        writer.writeheader()
        writer.writerows(rows)
