"""A probe beside a training: numbers in the metrics, and not a bit of the training moved."""

from pathlib import Path
from typing import Any

import pytest
import torch

import freqmask
from freqmask.training.checkpoint import load_safely
from freqmask.training.tables import read_rows

TINY: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "backbone": "vit_small_patch16_224",
    "model_args": {"depth": 1, "embed_dim": 32, "num_heads": 1, "proj_drop_rate": 0.2},
    "steps": 4,
    "batch_size": 8,
    "workers": 0,
    "precision": "32-true",
}


def test_a_probe_writes_numbers_and_leaves_the_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    every = {"probe_data": ["builtin:digits"], "probe_every_epochs": 0.009}  # two steps
    probed = freqmask.pretrain(["builtin:digits"], out=str(tmp_path / "probed"), **every, **TINY)
    plain = freqmask.pretrain(["builtin:digits"], out=str(tmp_path / "plain"), **TINY)
    states = [load_safely(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (probed, plain)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    rows = [row for row in read_rows(probed / "metrics.csv") if row["probe_knn"]]
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(0 < float(row["probe_linear"]) <= 1 < float(row["rankme"]) for row in rows)
    assert "probe_knn" not in read_rows(plain / "metrics.csv")[0]
