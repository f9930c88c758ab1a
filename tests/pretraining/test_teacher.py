"""``--teacher``: a frozen network from a folder teaches a run, which goes on exactly and exports the student alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import TINY, steps_made, train_until

import freqmask
from freqmask.commands.draw import reconstruct
from freqmask.errors import UserError
from freqmask.interop.weight_files import write_timm_folder

WEIGHTS = "model.safetensors"


def write_teacher(folder: Path, channels: int = 1) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(
        "resnet18", in_chans=channels, num_classes=0, layers=(1, 1, 1, 1), channels=(4, 8, 8, 12)
    )
    statistics = {"mean": [0.5] * channels, "std": [0.25] * channels}
    write_timm_folder(model, folder, input_size=(channels, 64, 64), metadata={}, **statistics)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "net")


def test_a_run_with_a_teacher_goes_on_exactly_and_repeats(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**TINY, "teacher": teacher, "checkpoint_every_steps": 2, "token_weight": 1.0}
    whole = freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "whole"))
    shown = capsys.readouterr().out
    assert "method      distill (there is a teacher): " in shown
    assert f"teacher     {teacher}, frozen, sees whole images at 48 pixels (its passes are" in shown
    assert "token_distillation" in (whole / "metrics.csv").read_text().partition("\n")[0]
    with pytest.raises(RuntimeError, match="killed here"):
        train_until(3, options, tmp_path / "parts")
    steps = steps_made(monkeypatch)
    again = freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "parts"))
    assert steps == [3, 4, 5, 6]
    assert_identical(whole, again)
    repeated = freqmask.pretrain(config=str(whole / "config.yaml"), out=str(tmp_path / "repeated"))
    assert_identical(whole, repeated)
    state = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in state if ".teacher." in name]
    exported = timm.create_model(f"local-dir:{whole / 'backbone'}", pretrained=True)
    assert exported.embed_dim == 32


def test_reconstruct_needs_no_teacher(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path / "net")
    run = freqmask.pretrain(
        "builtin:digits", **{**TINY, "steps": 2, "teacher": str(folder)}, out=str(tmp_path / "r")
    )
    (folder / WEIGHTS).unlink()
    Image.new("L", (20, 20), 90).save(tmp_path / "grey.png")
    reconstruct(str(run), str(tmp_path / "grey.png"), out=str(tmp_path / "pictures.png"))
    assert (tmp_path / "pictures.png").is_file()


def test_other_weights_in_the_teachers_place_are_refused(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path / "net")
    options = {**TINY, "teacher": str(folder), "checkpoint_every_steps": 2}
    with pytest.raises(RuntimeError, match="killed here"):
        train_until(3, options, tmp_path / "run")
    change(folder, lambda tensor: tensor + 1)
    with pytest.raises(UserError, match="has other weights than when the run began"):
        freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "run"))


def assert_identical(one: Path, other: Path) -> None:
    first, second = (load_file(run / "backbone" / WEIGHTS) for run in (one, other))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def change(folder: Path, how: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["conv1.weight"] = how(tensors["conv1.weight"])
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"teacher": "nowhere"}, r"--teacher: model \(nowhere\) must be a run folder.*nothing of that name"),
        ({"teacher": "timm:resnet5O"}, r"--teacher: .*resnet5O.*did you mean 'resnet"),
        (
            {"teacher": "timm:resnet50", "channels": 3},
            r"cannot be reached: HF_HUB_OFFLINE.*use a local folder",
        ),
        ({"channels": 3}, r"takes 1 channels and the images have 3; try --channels 1"),
        ({"method": "mfm"}, r"option --teacher is not used by method mfm; it belongs to distill"),
        ({"method": "folk"}, r"option --teacher is not used by method folk; it belongs to distill"),
        ({"teacher": None, "method": "distill"}, r"method distill needs a teacher; name one"),
        ({"teacher": None, "method": "mfm", "teacher_size": 32}, r"--teacher_size is not used by method mfm"),
        ({"token_share": 0.0}, r"token_share \(0.0\) must be"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    options: dict[str, Any], sentence: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {**TINY, "teacher": str(teacher), **options}
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(UserError, match=sentence):
        freqmask.pretrain("builtin:digits", **given, out=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_weights_that_are_not_finite_teach_nothing(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path / "net")
    change(folder, lambda tensor: tensor * float("nan"))
    with pytest.raises(UserError, match=r"--teacher: .*conv1.weight holds NaN"):
        freqmask.pretrain("builtin:digits", **TINY, teacher=str(folder), out=str(tmp_path / "run"))
