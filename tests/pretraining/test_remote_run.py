"""A run whose images lie behind a URL: killed, it ends with the bits of one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import freqmask
from freqmask.data.sharding import Settings, open_parts, prepare_shards

pytest.importorskip("aiohttp", reason="https:// needs aiohttp (freqmask[data])")
from web_server import Server, serving

pytestmark = pytest.mark.filterwarnings("ignore:Unclosed", "ignore::pytest.PytestUnraisableExceptionWarning")
OPTIONS = {
    "image_size": 16,
    "patch_size": 8,
    "model_args": {"depth": 1, "embed_dim": 32, "num_heads": 2},
    "batch_size": 8,
    "steps": 40,
    "workers": 2,
    "preview_every_steps": 0,
    "checkpoint_every_steps": 5,
    "log_every_steps": 5,
    "accelerator": "cpu",
    "images_from": "loader",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Seven shards of 110 images behind a URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(110):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    parts, _ = open_parts([tmp_path / "photos"], "channels", "all", None)
    prepare_shards(parts, Settings(None, 17, "channels", "all", parts.content), tmp_path / "shards", 0)
    with serving(tmp_path) as running:
        yield running


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "backbone" / "model.safetensors")


def start(url: str, out: Path) -> "subprocess.Popen[str]":
    words = [text for name, value in OPTIONS.items() for text in (f"--{name}", str(value).replace("'", '"'))]
    return subprocess.Popen(
        [sys.executable, "-m", "freqmask", "pretrain", url, *words, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_run_over_the_network_that_was_broken_off_ends_with_the_same_bits(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{server.url}/shards"
    whole = freqmask.pretrain(url, **OPTIONS, out=str(tmp_path / "whole"))
    out = tmp_path / "broken"
    with start(url, out) as process:
        for _ in process.stdout:  # a line every five steps
            if (out / "checkpoints" / "last.ckpt").is_file():
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL and not (out / "summary.json").exists()
    server.failures["shards/shards-000003.tar"] = ["cut", 503]  # and the way back is bumpy
    again = freqmask.pretrain(url, **OPTIONS, out=str(out))
    assert "resumes" in capsys.readouterr().out
    first, second = weights(whole), weights(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
