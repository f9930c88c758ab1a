"""``freqmask pretrain`` as a user types it: its plan, likely slips, records elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_runs import make_run

import freqmask
from freqmask.cli import main
from freqmask.errors import UserError
from freqmask.interop.weights import check_init
from freqmask.pretraining import plan
from freqmask.pretraining.job import _say_stopped
from freqmask.pretraining.resolve import LOGGERS, check_logger
from freqmask.pretraining.task import _logger
from freqmask.timm_models import check_name


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    return "photos"


def test_the_plan_begins_with_what_matters_and_ends_with_the_length(
    photos: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "LONG_SECONDS", 0)
    words = [
        "--dry_run",
        "--workers",
        "0",
        "--image_size",
        "32",
        "--model_args.depth",
        "1",
        "--accelerator",
        "cpu",
    ]
    main(["pretrain", photos, *words])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["images", "backbone", "method", "training"]
    assert "about" in lines[3] and "epochs" in lines[3]
    length = next(line for line in lines[-3:] if line.startswith("length"))
    assert "you named none, so it is" in length
    assert f"{lines[3].rpartition('about ')[2]} here" in length  # one time, not two
    hour = "--dry_run true --workers 0 --image_size 32 --model_args '{depth: 1}' --accelerator cpu --hours 1"
    assert length.endswith(f"freqmask pretrain photos {hour}")


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("hf-hub:timm/resnet18.a1_in1k", "public weights are timm:resnet18.a1_in1k"),
        ("resnet18", "public weights are timm:resnet18"),
        ("random:resnet18", "leave it out to begin with random weights"),
        ("nowhere/at/all", "nothing of that name exists"),
        (".", "there is no backbone in it"),
        ("timm:resnet81", "did you mean 'resnet"),
    ],
)
def test_a_slip_in_init_is_named_before_any_work(init: str, words: str, photos: str) -> None:
    with pytest.raises(UserError, match=words):
        freqmask.pretrain(photos, init=init, dry_run=True)


def test_an_init_that_is_there_passes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine").path
    for init in (str(run), str(run / "backbone"), "timm:resnet18"):
        check_init(init)


@pytest.mark.parametrize("name", ["timm:resnet18", "random:resnet18"])
def test_a_prefix_before_a_backbone_is_named(name: str) -> None:
    with pytest.raises(UserError, match=r"must be a name as timm has it; did you mean 'resnet18'\?"):
        check_name(name)


def test_a_run_that_goes_on_goes_on_in_the_same_run_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", lambda **options: made.append(options))
    run = make_run(tmp_path / "mine")
    monkeypatch.setitem(LOGGERS, "wandb", ("wandb_is_not_here",))
    for refuse in (partial(_logger, "wandb", run), partial(check_logger, "wandb")):
        with pytest.raises(UserError, match=r"logger \(wandb\) is not installed; pip install"):
            refuse()
    monkeypatch.setitem(LOGGERS, "wandb", ("torch",))
    _logger("wandb", run)
    _logger("wandb", run)
    assert made[0]["id"] == made[1]["id"] == run.state()["wandb"] != ""
    assert made[0]["resume"] == "allow"
    _logger("wandb", make_run(tmp_path / "other"))
    assert made[2]["id"] != made[0]["id"]


def test_the_command_that_resumes_a_stopped_run_holds_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my photos").mkdir()
    data = ["my photos", "builtin:digits", "s3://bucket/shards"]
    stopped: Any = SimpleNamespace(run=make_run(Path("mine")), options={"data": data})
    _say_stopped(stopped)
    words = (
        f"'{tmp_path}/my photos' builtin:digits s3://bucket/shards --out {tmp_path}/mine    (from anywhere)"
    )
    assert f"    freqmask pretrain {words}\n" in capsys.readouterr().out


def test_a_second_process_does_not_wait_for_a_dry_run_that_begins_nothing(
    photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freqmask.training.run_folder.PATIENCE", -1.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    freqmask.pretrain(photos, out="made", dry_run=True)
    assert not (tmp_path / "made").exists()
    with pytest.raises(UserError, match="was not begun by process 0"):
        freqmask.pretrain(photos, out="made")
