"""No command ends in a traceback: broken inputs, broken places and poor environments are told in a sentence."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from tests.broken_runner import attempt
from tests.tiny_runs import make_run

RUNNER = Path(__file__).with_name("broken_runner.py")
TRAINING = ["--batch_size", "4", "--steps", "2", "--workers", "0"]
PRETRAINING = ["--backbone", "resnet10t", "--image_size", "32", "--precision", "32-true", *TRAINING]
FROZEN = ["--workers", "0", "--seeds", "0"]
SEGMENTING = ["--crop", "32", "--decoder_channels", "16", "--precision", "32-true", *TRAINING]


class World(NamedTuple):
    """What the commands are given."""

    images: Path
    masks: Path
    run: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Twelve photographs in two classes, the same with masks, and a run."""
    folder = tmp_path_factory.mktemp("world")
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((40, 40))
        mask = Image.fromarray((np.arange(1600).reshape(40, 40) > 100 * number).astype(np.uint8))
        places = {
            "images": f"{'cats' if number % 2 else 'dogs'}/{number}.png",
            "pairs": f"images/{number}.png",
        }
        for root, name in places.items():
            (folder / root / name).parent.mkdir(parents=True, exist_ok=True)
            pixels.save(folder / root / name)
        (folder / "pairs" / "masks").mkdir(exist_ok=True)
        mask.save(folder / "pairs" / "masks" / f"{number}.png")
    return World(folder / "images", folder / "pairs", make_run(folder / "run").path)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def writers(world: World, out: str | None) -> dict[str, list[str]]:
    """Every command that writes, with its ``--out``, or (None) its default."""
    images, run = str(world.images), str(world.run)
    first = str(world.images / "dogs" / "0.png")
    to = [] if out is None else ["--out", out]
    file = [] if out is None else ["--out", f"{out}.png"]
    commands = {
        "pretrain": ["pretrain", images, *PRETRAINING, *to],
        **{
            name: ["evaluate", name, "pixels", "--data", images, *FROZEN, *to]
            for name in ("knn", "linear", "fewshot")
        },
        "bands": ["evaluate", "bands", run, "--data", images, *FROZEN, *to],
        "robustness": ["evaluate", "robustness", run, "--data", images, *FROZEN, *to],
        "finetune": ["evaluate", "finetune", run, "--data", images, *TRAINING, "--precision", "32-true", *to],
        "segment": ["evaluate", "segment", run, "--data", str(world.masks), *SEGMENTING, *to],
        "spectra": ["spectra", first, *file],
        "reconstruct": ["reconstruct", run, first, *file],
        "report": ["report", run, *([] if out is None else ["--out", f"{out}.html"])],
    }
    if out is not None:
        commands |= {
            "embed": ["embed", run, images, "--out", f"{out}.parquet", "--workers", "0"],
            "export": ["export", run, *to],
            "prepare": ["prepare", images, *to, "--workers", "0"],
            "convert": ["convert", str(world.run / "backbone" / "model.safetensors"), *to],
            "recipes": ["recipes", "photos", "--copy", f"{out}.yaml"],
        }
    return commands


def ends_well(code: int, text: str, codes: Sequence[int] = (2,)) -> None:
    """Ended with a sentence and the code of it."""
    assert "Traceback" not in text, text
    assert code in codes, (code, text)
    if code == 2:
        assert "error: " in text, text


def in_own_process(commands: Sequence[list[str]], shell: str, *before: str) -> list[tuple[int, str]]:
    """The commands in a process that a shell has prepared: ``shell`` is run before it."""
    script = f'{shell}\nexec "$0" "$@"'
    words = [*before, "bash", "-c", script, sys.executable, str(RUNNER), json.dumps(list(commands))]
    paths = os.pathsep.join([str(RUNNER.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[tuple[int, str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", writers(World(Path("a"), Path("b"), Path("c")), "out"))
def test_an_out_below_a_file_is_a_sentence_before_any_work(
    name: str, world: World, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("images were read before the place was checked")

    (place / "file").write_text("no folder")
    monkeypatch.setattr("freqmask.data.loader.TrainDataset.__getitems__", too_late)
    code, text = attempt(writers(world, str(place / "file" / "out"))[name])
    ends_well(code, text)
    assert "cannot be written" in text, text
    assert {path.name for path in place.iterdir()} <= {"file", "cache"}


def _mounts() -> bool:
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode
    )


@pytest.mark.skipif(not _mounts(), reason="no mounts of one's own here")
def test_read_only_folders_and_a_full_disk_are_sentences(world: World, place: Path) -> None:
    """Default places in a read-only folder, a run that may only be read, and a disk of 400 kB."""
    for name in ("here", "small"):
        (place / name).mkdir()
    defaults = writers(world, None)
    full = {
        name: writers(world, str(place / "small" / name))[name]
        for name in ("pretrain", "finetune", "segment", "export")
    }
    shell = " && ".join(
        [
            f"mount -o bind,ro {place / 'here'} {place / 'here'}",
            f"mount -o bind,ro {world.run} {world.run}",
            f"mount -t tmpfs -o size=400k tmpfs {place / 'small'}",
            f"cd {place / 'here'}",
        ]
    )
    commands = [*defaults.values(), *full.values()]
    found = in_own_process(commands, shell, "unshare", "-rm")
    for name, (code, text) in zip([*defaults, *full], found, strict=True):
        ends_well(code, text)
        assert "Read-only file system" in text or "No space left on device" in text, (name, text)
    assert "there was no checkpoint yet" in found[len(defaults)][1]


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """A resource limit of this process, as ``ulimit`` sets it."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_limit_on_file_sizes_is_a_sentence(world: World, place: Path) -> None:
    with limited(resource.RLIMIT_FSIZE, 300_000):
        code, text = attempt(writers(world, str(place / "out"))["pretrain"])
    ends_well(code, text)
    assert "ulimit -f" in text, text


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_few_open_files_no_cache_and_an_interactive_shell_of_slurm_do_no_harm(
    world: World, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file" / "cache"))
    shell = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "mine", "SLURM_PROCID": "0"}
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    for name in ("pretrain", "knn", "embed", "spectra", "prepare", "export", "report"):
        with limited(resource.RLIMIT_NOFILE, 64):
            code, text = attempt(writers(world, str(place / f"out-{name}"))[name])
        ends_well(code, text, codes=(0,))


def _broken(world: World, place: Path) -> dict[str, str]:
    """Inputs that are none, by what is wrong with them."""
    (place / "empty").mkdir()
    (place / "noise").mkdir()
    for number in range(4):
        (place / "noise" / f"{number}.png").write_bytes(bytes([number]) * 100)
    (place / "text.txt").write_text("hello")
    torn, no_config = place / "torn", place / "no_config"
    shutil.copytree(world.run, torn)
    for file in (torn / "checkpoints" / "last.ckpt", torn / "backbone" / "model.safetensors"):
        file.write_bytes(file.read_bytes()[:200])
    shutil.copytree(world.run, no_config)
    (no_config / "config.yaml").write_text("a: [")
    (no_config / "run.json").write_text("{")
    (no_config / "backbone" / "config.json").write_text("{")
    nan = place / "nan.pth"
    state = {"conv1.weight": torch.full((64, 3, 7, 7), float("nan"))}
    torch.save(state, nan)
    names = ("missing", "empty", "noise", "text.txt", "torn", "no_config", "nan.pth")
    return {name: str(place / name) for name in names}


READERS = {
    "pretrain": lambda it, world: ["pretrain", it, *PRETRAINING, "--out", "a"],
    "init": lambda it, world: ["pretrain", str(world.images), *PRETRAINING, "--init", it, "--out", "b"],
    "teacher data": lambda it, world: [
        *["pretrain", str(world.images), *PRETRAINING],
        *["--probe_data", it, "--out", "b"],
    ],
    "config": lambda it, world: ["pretrain", "--config", it, "--out", "c"],
    "resume": lambda it, world: ["pretrain", str(world.images), "--out", it, *PRETRAINING],
    "knn data": lambda it, world: ["evaluate", "knn", "pixels", "--data", it, *FROZEN, "--out", "d"],
    "knn model": lambda it, world: [
        "evaluate",
        "knn",
        it,
        "--data",
        str(world.images),
        *FROZEN,
        "--out",
        "e",
    ],
    "labels": lambda it, world: [
        *["evaluate", "knn", "pixels", "--data", str(world.images)],
        *["--labels", it, *FROZEN, "--out", "d"],
    ],
    "finetune model": lambda it, world: [
        *["evaluate", "finetune", it, "--data", str(world.images)],
        *[*TRAINING, "--out", "f"],
    ],
    "segment data": lambda it, world: ["evaluate", "segment", str(world.run), "--data", it, "--out", "g"],
    "embed model": lambda it, world: ["embed", it, str(world.images), "--out", "h.parquet", "--workers", "0"],
    "embed data": lambda it, world: ["embed", str(world.run), it, "--out", "i.parquet", "--workers", "0"],
    "reconstruct model": lambda it, world: ["reconstruct", it, str(world.images / "dogs" / "0.png")],
    "reconstruct image": lambda it, world: ["reconstruct", str(world.run), it],
    "spectra": lambda it, world: ["spectra", it],
    "export": lambda it, world: ["export", it, "--out", "j"],
    "convert": lambda it, world: ["convert", it, "--out", "k"],
    "prepare": lambda it, world: ["prepare", it, "--out", "l", "--workers", "0"],
    "report": lambda it, world: ["report", it, "--out", "m.html"],
    "runs": lambda it, world: ["runs", it],
    "recipes": lambda it, world: ["recipes", it],
}


@pytest.mark.parametrize("command", READERS)
def test_a_broken_input_is_a_sentence(command: str, world: World, place: Path) -> None:
    for it in _broken(world, place).values():
        code, text = attempt(READERS[command](it, world))
        ends_well(code, text, codes=(0, 2))


@pytest.mark.parametrize(
    "words",
    [
        ["--seed", "123456789012345678901234"],
        ["--seed", "-1"],
        ["--image_size", "0"],
        ["--devices", "99"],
        ["--batch_size", "1"],
        ["--lr", "nan"],
        ["--init", "timm:resnet10t.c3_in1k"],
        [
            "--backbone",
            "naflexvit_base_patch16_gap",
            "--model_args",
            "{depth: 1, embed_dim: 32, num_heads: 1}",
        ],
        ["--pages", "what"],
    ],
)
def test_an_option_that_cannot_be_is_a_sentence(
    words: list[str], world: World, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, text = attempt(["pretrain", str(world.images), *PRETRAINING, "--out", "o", *words])
    ends_well(code, text, codes=(0,) if "naflex" in words[1] else (2,))


def test_one_image_at_once_and_a_map_of_one_cell_are_refused_before_the_first_step(
    world: World, place: Path
) -> None:
    words = ["pretrain", str(world.images), *PRETRAINING, "--out", "o"]
    code, text = attempt([*words, "--batch_size", "1"])
    ends_well(code, text)
    assert "batch norm" in text
    assert not (place / "o" / "config.yaml").exists()
    code, text = attempt([*words, "--batch_size", "4", "--accumulate", "4"])
    ends_well(code, text)


_SOURCE = """
import numpy as np
from freqmask.data.pixels import ArrayPicture
from freqmask.data.sources import Source, SourceSummary

class Mine(Source):
    def __len__(self):
        return 12
    def open(self, index):
        return ArrayPicture(np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    def name(self, index):
        raise KeyError("row 7")
    def fingerprint(self):
        return "mine"
    def summary(self):
        return SourceSummary("mine", 12, 12)

def unready():
    raise ValueError("no database")
"""


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("broken_source:Mine", "broken_source:Mine raised KeyError: 'row 7'"),
        ("broken_source:unready", "broken_source:unready raised ValueError: no database"),
        ("broken_module:Mine", "broken_module:Mine cannot be imported: ValueError: too early"),
    ],
)
def test_code_of_ones_own_that_raises_is_named_in_a_sentence(
    named: str, words: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "broken_source.py").write_text(_SOURCE)
    (place / "broken_module.py").write_text("raise ValueError('too early')")
    monkeypatch.syspath_prepend(str(place))
    sys.modules.pop("broken_source", None)
    code, text = attempt(["pretrain", named, *PRETRAINING, "--out", "own"])
    ends_well(code, text)
    assert words in text, text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("run.json", b"[]", "begin the run anew"),
        ("run.json", b"\xff{", "begin the run anew"),
        ("config.yaml", b"steps: five\n", "lacks a usable steps"),
        ("summary.json", b"[]", "delete it"),
    ],
)
def test_a_run_whose_files_were_damaged_says_so(
    name: str, content: bytes, words: str, world: World, place: Path
) -> None:
    shutil.copytree(world.run, place / "torn")
    if name != "summary.json":
        (place / "torn" / "summary.json").unlink()
    (place / "torn" / name).write_bytes(content)
    code, text = attempt(["pretrain", str(world.images), "--out", "torn"])
    ends_well(code, text)
    assert words in text, text
