"""The one call that measures a GPU cannot fail on a typo: all of its parts run here at toy size."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs_at_toy_size(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "TMPDIR": str(tmp_path),
        "SECONDS_IN_ALL": "280",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
    }
    told = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out"), "--toy"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    with (tmp_path / "out" / "claims.csv").open() as file:
        rows = list(csv.DictReader(file))
    parts = {row["part"] for row in rows if row["what"] == "time of this part"}
    assert parts == {"tests", "step", "small", "loader", "peers", "learning"}, told.stdout
    failures = [row for row in rows if "failed" in row["what"] and row["what"] != "tests failed"]
    assert not failures, told.stdout
    assert "claims met" in told.stdout
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_the_speed_of_a_method_is_its_teacher_s_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import learning

    job = {"backbone": "cnn", "method": "teacher", "options": {"lr": 0.1}, "size": 32}
    keys = [
        learning.speed_key({**job, **more}) for more in ({}, {"teacher": "timm:a"}, {"teacher": "timm:b"})
    ]
    assert len(set(keys)) == 3
    assert keys[0] == '["cnn", "teacher", {}]'  # as speeds of methods without one are kept
