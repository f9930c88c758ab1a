"""``freqmask evaluate segment`` as a user types it: it learns, resumes, tells; mistakes leave nothing behind."""

from __future__ import annotations

import csv
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from evaluation.segmentation_images import make_data
from safetensors.torch import load_file
from tiny_runs import fused_in_training, make_run

import freqmask
from freqmask.cli import main
from freqmask.data.sources import open_source
from freqmask.errors import UserError

pytest.importorskip("segmentation_models_pytorch", reason="pip install 'freqmask[seg]'")

from freqmask.evaluation import segmentation
from freqmask.evaluation.eval_model import seen_in_training
from freqmask.evaluation.segmentation import open_network
from freqmask.evaluation.upernet import SegmentationModule, choose_crop, groups_of
from freqmask.training.run_folder import RunFolder

TINY: dict[str, Any] = {
    "crop": 32,
    "batch_size": 4,
    "decoder_channels": 8,
    "workers": 0,
    "accelerator": "cpu",
    "precision": "32-true",
    "overlays": 2,
}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(make_run(tmp_path / "runs" / "mine").path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(make_data(tmp_path / "street"))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_it_learns_two_colours_in_a_few_steps_and_tells(
    run: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**TINY, "steps": 60, "lr": 0.005, "scale": [1.0, 1.0], "inference": ["windows", "whole"]}
    (summary, whole) = freqmask.evaluate.segment([run], data=data, out="out", **options)
    assert (summary.variant, whole.variant) == ("windows", "whole")
    assert summary.scores.mean_iou > 0.8
    shown = capsys.readouterr().out
    assert "8 training images, 3 test images, 2 classes (train / test)" in shown
    assert "60 steps of 4 samples" in shown
    first = rows(tmp_path / "out" / "results.csv")[0]
    assert float(first["mean_iou"]) == pytest.approx(summary.scores.mean_iou, rel=1e-5)
    assert float(first["mean_iou_low"]) <= float(first["mean_iou"]) <= float(first["mean_iou_high"])
    for name in ("segment.png", "segment-overlays.png", "segment-classes.csv"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    folder = tmp_path / "out" / "mine-seed0"
    assert (folder / "network.safetensors").is_file()
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize(("precision", "fused"), [("bf16-mixed", 0), ("32-true", 2)])
def test_few_tokens_are_attended_to_by_the_kernel_with_the_quick_backward_pass(
    precision: str, fused: int, run: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fused_in_training(monkeypatch)
    freqmask.evaluate.segment([run], data=data, out="out", **{**TINY, "steps": 2, "precision": precision})
    assert found == [fused] * 2


def test_runs_of_one_name_stand_beside_each_other_in_rows_and_picture(
    run: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = str(make_run(tmp_path / "others" / "mine").path)
    drawn: list[Any] = []
    monkeypatch.setattr(
        segmentation, "draw_overlays", lambda path, title, overlays, names: drawn.extend(overlays)
    )
    found = freqmask.evaluate.segment([run, other], data=data, out="out", **{**TINY, "steps": 1})
    assert [one.name for one in found] == [run, other]
    assert [row["model"] for row in rows(tmp_path / "out" / "results.csv")] == [run, other]
    assert [list(overlay.predicted) for overlay in drawn] == [[run, other]] * 2
    assert {path.parent.name for path in (tmp_path / "out").glob("*/config.yaml")} == {
        "mine-seed0",
        "mine-2-seed0",
    }


def test_a_killed_training_ends_as_one_that_was_not(
    run: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**TINY, "steps": 5, "drop_path": 0.3, "overlays": 0}
    freqmask.evaluate.segment([run], data=data, out="whole", **options)
    step = SegmentationModule.training_step

    def dies(self: SegmentationModule, batch: Any, index: int) -> Any:
        if self.trainer.global_step == 3:
            raise RuntimeError("killed")
        return step(self, batch, index)

    monkeypatch.setattr(SegmentationModule, "training_step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        freqmask.evaluate.segment([run], data=data, out="parts", **options)
    monkeypatch.setattr(SegmentationModule, "training_step", step)
    capsys.readouterr()
    freqmask.evaluate.segment([run], data=data, out="parts", **options)
    assert "resumes from step-00000003.ckpt" in capsys.readouterr().out
    one, other = (
        load_file(tmp_path / name / "mine-seed0" / "network.safetensors") for name in ("whole", "parts")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    scores = [rows(tmp_path / name / "results.csv")[0]["mean_iou"] for name in ("whole", "parts")]
    assert scores[0] == scores[1]


def test_a_finished_network_is_taken_and_other_settings_are_refused(
    run: str, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**TINY, "steps": 1, "overlays": 0, "out": "out"}
    first = freqmask.evaluate.segment([run], data=data, **options)
    monkeypatch.setattr(SegmentationModule, "training_step", lambda *_: pytest.fail("trained again"))
    again = freqmask.evaluate.segment([run], data=data, **options)
    assert again[0].values == first[0].values
    said = capsys.readouterr().out
    assert "is finished; its network is taken" in said and "rewritten" not in said
    os.utime(next(Path(data).rglob("train/*.png")))
    freqmask.evaluate.segment([run], data=data, **options)
    assert (
        "note: files of the training images were rewritten since; delete out/mine" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match=r"begun with other settings: lr was auto and is 0\.1 now"):
        freqmask.evaluate.segment([run], data=data, **{**options, "lr": 0.1})
    Path("out/mine-seed0/network.safetensors").unlink()
    with pytest.raises(UserError, match=r"is finished and its network\.safetensors is gone"):
        freqmask.evaluate.segment([run], data=data, **options)
    with pytest.raises(UserError, match="has no network yet"):
        open_network(RunFolder("out/mine-seed0"))


def test_samples_are_multiples_of_32_as_large_as_images_and_machine_allow() -> None:
    asked: Any = {"crop": "auto", "accelerator": "cpu"}
    sides = ((90, 120), (2000, 3000), (20, 500))
    chosen = [choose_crop(asked, Mock(shorter_side=min(size))) for size in sides]
    assert [one.value for one in chosen] == [64, 224, 32]
    assert [one.reason for one in chosen[:2]] == ["the median shorter side is 90", "training runs on the CPU"]


def test_images_of_other_channels_are_drawn_as_stretched_gray() -> None:
    gray = np.linspace(0, 0.5, 100).reshape(1, 10, 10)
    drawn = segmentation.as_colors(gray)
    assert drawn.shape == (10, 10, 3)
    assert (drawn.min(), drawn.max()) == (0, 1) and (drawn == drawn[..., :1]).all()
    colors = np.stack([gray[0]] * 3)
    assert np.array_equal(segmentation.as_colors(colors), colors.transpose(1, 2, 0))


def test_a_network_that_keeps_what_it_computes_in_evaluation_is_trained(data: str) -> None:
    freqmask.evaluate.segment(["random:levit_128s"], data=data, dry_run=True, **TINY)


def test_test_images_that_cannot_be_read_are_left_out(
    run: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "street" / "images" / "test" / "101.png"
    image.write_bytes(image.read_bytes()[:-200])
    freqmask.evaluate.segment([run], data=data, out="out", **{**TINY, "steps": 1, "overlays": 0})
    assert "left out    test/101.png" in capsys.readouterr().out
    assert [row["test_images"] for row in rows(tmp_path / "out" / "results.csv")] == ["2"]


def test_a_network_is_opened_without_the_model_it_began_from(run: str, data: str, tmp_path: Path) -> None:
    freqmask.evaluate.segment([run], data=data, out="out", **{**TINY, "steps": 1, "overlays": 0})
    shutil.rmtree(run)
    folder = RunFolder(tmp_path / "out" / "mine-seed0")
    network, training = open_network(folder)
    stored = load_file(folder.path / "network.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in network.state_dict().items())
    assert (training.crop, network(torch.rand(1, 3, 48, 64)).decoder.shape[1]) == (32, 2)


def test_layers_learn_slower_the_deeper_they_lie(
    run: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def note(network: Any, training: Any) -> list[dict[str, Any]]:
        seen.append(training.layer_decay)
        groups = groups_of(network, training)
        names = {id(one): name for name, one in network.named_parameters()}
        scales = {names[id(one)]: group["lr_scale"] for group in groups for one in group["params"]}
        assert len(scales) == sum(one.requires_grad for one in network.parameters())
        if training.layer_decay < 1:
            assert scales["classifier.1.weight"] == 1.0
            assert scales["pyramid.backbone.timm_model.blocks.1.mlp.fc1.weight"] == pytest.approx(0.65)
            assert scales["pyramid.backbone.timm_model.patch_embed.proj.weight"] == pytest.approx(0.65**3)
        return groups

    monkeypatch.setattr("freqmask.evaluation.upernet.groups_of", note)
    freqmask.evaluate.segment([run, f"random:{run}"], data=data, **{**TINY, "steps": 1, "overlays": 0})
    assert seen == [0.65, 1.0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--inference", "wole"],
            r"inference \(wole\) .* did you mean 'whole'",
        ),
        (["--scale", "2", "0.5"], "scale .* must be the smallest and the largest factor"),
        (["--stride", "64"], r"stride \(64\) must be at most crop \(32\)"),
        (["--steps", "0"], r"steps \(0\) must be a whole number at least 1"),
        (["--epochs", "2"], "--steps and --epochs exclude each other"),
        (["--batch_size", "1"], r"batch_size \(1\).* must leave two images or more"),
        (["--layer_decay", "1.5"], r"layer_decay \(1\.5\) must be a number above 0 and at most 1"),
        (["--images", "street"], "images and masks must be given together"),
        (["--layout", "coco"], "layout"),
        (["--class_names", "sky"], "fewer than two classes"),
        (
            ["--class_names", "street/clases.txt"],
            r"class_names \(street/clases\.txt\) is not there as a file",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    options: list[str], sentence: str, run: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--{name}={value}" for name, value in TINY.items()] + ["--steps=2", "--out=made", *options]
    with pytest.raises(SystemExit) as left:
        main(["evaluate", "segment", run, "--data", data, *words])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    import re

    assert re.search(sentence, error), error
    assert not (tmp_path / "made").exists()


def test_pixels_cannot_be_trained_on(data: str) -> None:
    with pytest.raises(UserError, match=r"model \(pixels\) must have weights"):
        freqmask.evaluate.segment(["pixels"], data=data, **TINY)


def test_a_missing_extra_is_named(run: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.decoders.upernet.decoder", None)
    with pytest.raises(UserError, match=r"pip install 'freqmask\[seg\]'"):
        freqmask.evaluate.segment([run], data=data, **TINY)


def test_test_images_that_are_training_images_too_are_counted(
    run: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    freqmask.evaluate.segment([run], data=data, dry_run=True, **TINY)
    assert "identical" not in capsys.readouterr().out
    images = Path(data) / "images"
    (images / "test" / "101.png").write_bytes((images / "train" / "003.png").read_bytes())
    freqmask.evaluate.segment([run], data=data, dry_run=True, **TINY)
    assert "note: 1 of the 3 test images are identical to training images." in capsys.readouterr().out


def test_a_dry_run_writes_nothing(run: str, data: str, tmp_path: Path) -> None:
    assert freqmask.evaluate.segment([run], data=data, dry_run=True, out="made", **TINY) == []
    assert not (tmp_path / "made").exists()


def test_images_that_a_network_was_trained_on_are_counted_from_every_folder(
    run: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freqmask.evaluate.segment([run], data="street", out="out", **{**TINY, "steps": 1})
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    for part, told in (("train", "8 of the 8"), ("test", "0 of the 3")):
        source = open_source(Path(data, "images", part))
        seen = seen_in_training(Path("../out/mine-seed0"), source, np.arange(len(source)))
        assert seen == f"mine-seed0: trained on {told} test images (with their masks)"
