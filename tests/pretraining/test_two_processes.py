"""Two processes on this machine make the steps of one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freqmask.cli import main
from freqmask.training.files import read_rows

WORDS = (
    "--image_size 16 --patch_size 8 --steps 4 --batch_size 16 --accelerator cpu "
    "--precision 32-true "  # in bf16 the order of sums shows in the fourth digit
    "--log_every_steps 1 --preview_every_steps 0 --probe_every_epochs 1 "
    "--outputs 32 --hidden_size 32 --bottleneck_size 16 --method folk"
)
MODEL = ["--model_args", "{depth: 2, embed_dim: 32, num_heads: 2}"]


def losses(out: Path, *words: str, data: str = "builtin:digits") -> list[float]:
    command = ["pretrain", data, *WORDS.split(), *MODEL, *words, "--out", str(out)]
    if "--devices" in words:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "freqmask", *command],
            capture_output=True,
            text=True,
            env=environment,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout.count("done        4 steps") == 1  # the second process is silent
    else:
        main(command)
    return column(out, "loss")


def column(out: Path, name: str) -> list[float]:
    return [float(row[name]) for row in read_rows(out / "metrics.csv") if row[name]]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run by one process."""
    return losses(tmp_path_factory.mktemp("one") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one(strategy: str, one: list[float], tmp_path: Path) -> None:
    two = losses(tmp_path / "two", "--devices", "2", "--strategy", strategy)
    assert len(one) == 4
    assert one == pytest.approx(two, rel=2e-6)
    assert (tmp_path / "two" / "backbone" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_workers(tmp_path: Path) -> None:
    every = ("--checkpoint_every_steps", "2", "--keep_checkpoints", "9")
    whole = losses(tmp_path / "whole", "--workers", "0", *every)
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "whole", broken)
    undo_to_step_2(broken)
    went_on = losses(broken, "--devices", "2", "--workers", "1")
    assert went_on == pytest.approx(whole, rel=2e-6)
    assert (broken / "checkpoints" / "last.ckpt").is_file()  # it was trained on from the one that was left


@pytest.mark.slow
def test_two_processes_that_keep_images_equal_one(tmp_path: Path) -> None:
    one = losses(tmp_path / "one", "--images_from", "device")
    two = losses(tmp_path / "two", "--images_from", "device", "--devices", "2")
    assert len(one) == 4
    assert one == pytest.approx(two, rel=2e-6)


NOISY = """
import torch
from freqmask.methods import MFM


class Noisy(MFM):
    parts = ("drawn",)

    def forward(self, views, keys, details=False):
        return {**super().forward(views, keys), "drawn": torch.rand(())}  # as dropout draws
"""


@pytest.mark.slow
def test_every_process_drops_by_a_generator_of_its_own_and_resumes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["pretrain", "builtin:digits", *WORDS.split(" --outputs")[0].split()]
    every = (
        "--method",
        "noisy:Noisy",
        "--checkpoint_every_steps",
        "2",
        "--keep_checkpoints",
        "9",
        "--workers",
        "0",
    )

    def drawn(out: Path, *more: str) -> list[float]:
        command = [*words, *MODEL, *every, *more, "--out", str(out)]
        if more:
            done = subprocess.run(
                [sys.executable, "-m", "freqmask", *command], capture_output=True, text=True, timeout=280
            )
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            main(command)
        return column(out, "drawn")

    one, two = drawn(tmp_path / "one"), drawn(tmp_path / "two", "--devices", "2")
    other = [2 * mean - first for mean, first in zip(two, one, strict=True)]  # the second process's own
    assert all(0 <= number <= 1 for number in other)
    assert not set(np.round(other, 5)) & set(np.round(one, 5))
    undo_to_step_2(tmp_path / "two")
    assert drawn(tmp_path / "two", "--devices", "2") == two


def undo_to_step_2(run: Path) -> None:
    (run / "summary.json").unlink()
    kept, *later = sorted((run / "checkpoints").glob("step-*.ckpt"))
    for file in (*later, run / "checkpoints" / "last.ckpt"):
        file.unlink()
    assert torch.load(kept, weights_only=True)["global_step"] == 2


@pytest.mark.slow
def test_two_processes_list_the_images_that_either_of_them_passed_over(tmp_path: Path) -> None:
    (data := tmp_path / "data").mkdir()
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(data / f"{number}.png")
    for number in range(8):
        (data / f"bad{number}.png").write_bytes(b"no image")
    listed = []
    for devices in ("1", "2"):
        # a row after each third step: what was passed over in the fourth is told at the end
        words = ("--devices", devices, "--max_skipped_share", "0.5", "--log_every_steps", "3")
        losses(tmp_path / devices, *words, data=str(data))
        listed.append(sorted(row["name"] for row in read_rows(tmp_path / devices / "skipped.csv")))
        assert json.loads((tmp_path / devices / "summary.json").read_text())["skipped"] == len(listed[-1])
    assert listed[0] == listed[1]
    assert 7 <= len(listed[0]) <= 8  # one may be held out
