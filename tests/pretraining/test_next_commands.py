"""The commands that a finished run prints, typed as they stand."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_runs import TINY

import freqmask
from freqmask.cli import main
from freqmask.training.run_folder import RunFolder

SHORT = {**TINY, "steps": 2, "method": "mfm"}
SEEN: dict[str, Any] = {  # with images of one channel and values up to 100 this is no default of any
    "channels": 1,
    "value_range": "0,100",
    "crop": "native",
    "vertical_flip": True,
    "quarter_turns": True,
    "crop_scale": [0.3, 0.9],
    "flip": False,
    "grey": None,
    "mean": [0.25],
    "std": [0.5],
    "seed": 3,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def write_stacks(folder: Path, stacks: int, pages: int = 1) -> Path:
    """Gray images with values up to 100 in two classes, several in a file."""
    for number in range(stacks):
        generator = np.random.default_rng([len(folder.name), number])
        images = [Image.fromarray(generator.integers(0, 101, (20, 20), dtype=np.uint8)) for _ in range(pages)]
        path = folder / ("cat" if number % 2 else "dog") / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        images[0].save(path, save_all=True, append_images=images[1:])
    return folder


def next_commands(shown: str) -> dict[str, list[str]]:
    """First words of the command -> its further words, as a shell takes them."""
    lines = [line.removeprefix("next").strip() for line in shown.splitlines() if line.endswith(")")]
    words = [shlex.split(line.rpartition("    (")[0]) for line in lines if line.startswith("freqmask ")]
    return {command[1]: command[1:] for command in words}


def typed(capsys: pytest.CaptureFixture[str], words: list[str], *more: str) -> str:
    capsys.readouterr()
    main([*words, *more])
    return capsys.readouterr().out


def tiny_words() -> list[str]:
    """What makes a training short; the network is that of the run."""
    short = {name: TINY[name] for name in ("batch_size", "workers", "accelerator")}
    return [word for name, value in short.items() for word in (f"--{name}", str(value))] + ["--steps", "1"]


def test_pages_that_are_images_stay_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_stacks(tmp_path / "stacks", 4, pages=20)
    run = freqmask.pretrain(str(data), **SHORT, pages="images", out="run")
    commands = next_commands(capsys.readouterr().out)
    assert RunFolder(run).state()["images"] > 70, "80 pages, not 4 files"
    knn = typed(capsys, commands["evaluate"], "--seeds", "0", "--accelerator", "cpu", "--workers", "0")
    assert "64 training images, 16 test images" in knn
    typed(capsys, commands["embed"], "--accelerator", "cpu", "--workers", "0")
    assert pq.read_table(run / "embeddings.parquet").num_rows == 80
    typed(capsys, commands["pretrain"], *tiny_words())
    on = RunFolder(Path("run-continued"))
    assert on.state()["data"] == RunFolder(run).state()["data"]
    assert on.config()["pages"] == "images"


@pytest.mark.parametrize("split", ["all", "val", None])
def test_the_same_part_is_embedded_and_trained_on(
    split: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, count in (("train", 20), ("val", 10)):
        write_stacks(tmp_path / "data" / part, count)
    part = {} if split is None else {"split": split}
    run = freqmask.pretrain("data", **{**SHORT, "batch_size": 4}, **part, out="run")
    commands = next_commands(capsys.readouterr().out)
    typed(capsys, commands["embed"], "--accelerator", "cpu", "--workers", "0")
    embedded = pq.read_table(run / "embeddings.parquet").num_rows
    assert embedded == {"all": 30, "val": 10, None: 30}[split]
    knn = typed(capsys, commands["evaluate"], "--seeds", "0", "--accelerator", "cpu", "--workers", "0")
    assert "20 training images, 10 test images" in knn, "DATA's own parts, whatever was trained on"
    typed(capsys, commands["pretrain"], *tiny_words(), "--batch_size", "4")
    assert RunFolder(Path("run-continued")).state()["data"] == RunFolder(run).state()["data"]


@pytest.mark.parametrize("in_a_file", [False, True])
def test_what_was_given_of_the_images_is_given_again(
    in_a_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_stacks(tmp_path / "stacks", 24)
    if in_a_file:
        lines = [f"{name}: {'null' if value is None else value}" for name, value in SEEN.items()]
        Path("mine.yaml").write_text("\n".join(lines).replace("0,100", '"0,100"') + "\n")
    given: dict[str, Any] = {"config": "mine.yaml"} if in_a_file else SEEN
    run = freqmask.pretrain("stacks", **SHORT, **given, out="run")
    command = next_commands(capsys.readouterr().out)["pretrain"]
    freqmask.pretrain(out="run")
    told = capsys.readouterr().out.partition("to train on from it: freqmask ")[2].strip()
    assert shlex.split(told)[2:] == command[2:], "DATA is absolute where it was not typed"
    typed(capsys, command, *tiny_words())
    before, after = RunFolder(run).config(), RunFolder(Path("run-continued")).config()
    for name in (*SEEN, "image_size"):
        assert after.get(name) == before.get(name), name
    assert before["crop_scale"] == [0.3, 0.9] and before["value_range"] == "0,100"
    assert "--steps" not in command and "--batch_size" not in command
