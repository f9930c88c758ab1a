"""Pre-training end to end, on data and networks as small as they come."""

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import timm
import torch
from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import TINY, steps_made, train_until

import freqmask
from freqmask.data.sources import open_source
from freqmask.data.splits import hold_out
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import seen_in_training
from freqmask.methods import MFM
from freqmask.pretraining import job
from freqmask.pretraining.watch import HeldOut
from freqmask.training import auto, loop
from freqmask.training.files import read_rows
from freqmask.training.loop import ScheduledModule
from freqmask.training.run_folder import RunFolder

TINY_FOLK: dict[str, Any] = {
    **TINY,
    "method": "folk",
    "outputs": 32,
    "hidden_size": 32,
    "bottleneck_size": 16,
}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "backbone" / "model.safetensors")


def assert_identical(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run that several tests look at."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = {**TINY, "preview_every_steps": 3, "log_every_steps": 2, "checkpoint_every_steps": 2}
    return freqmask.pretrain("builtin:digits", **options, method="mfm", out=str(out))


class Told(MFM):
    """Says a number of its own where details are asked for."""

    def forward(self, views: Any, keys: Any = None, details: bool = False) -> dict[str, torch.Tensor]:
        parts = super().forward(views, keys, details)
        self.calls = getattr(self, "calls", 0) + 1
        some = torch.tensor(float("nan") if self.calls % 2 else 4.0)  # as of a filter that no image drew
        return {**parts, "my_detail": torch.tensor(2.0), "some": some} if details else parts


@pytest.mark.parametrize("parts", [1, 2])
def test_a_detail_is_the_mean_of_the_parts_that_told_it_whatever_its_name(tmp_path: Path, parts: int) -> None:
    options = {**TINY, "method": Told, "log_every_steps": 3, "accumulate": parts}
    run = freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "run"))
    assert [float(row["my_detail"]) for row in rows(run) if row["my_detail"]] == [2.0, 2.0, 2.0]
    if parts > 1:
        assert [float(row["some"]) for row in rows(run) if row["my_detail"]] == [4.0, 4.0, 4.0]


def test_a_run_leaves_what_the_map_promises(finished: Path) -> None:
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "plan.png",
        "metrics.csv",
        "summary.json",
        "checkpoints/last.ckpt",
        "backbone/config.json",
        "backbone/model.safetensors",
        "previews/step-000003.png",
        "previews/step-000006.png",
    } <= names
    assert len([name for name in names if name.startswith("checkpoints/step-")]) == 2
    assert not [name for name in names if name.endswith(".tmp")]


def test_metrics_hold_loss_health_speed_and_recipe(finished: Path) -> None:
    logged = [row for row in rows(finished) if row["loss"]]
    assert [row["step"] for row in logged] == ["1", "2", "4", "6"]
    for name in ("relative_loss", "lr", "grad_norm", "images_per_second", "data_wait_share"):
        assert float(logged[-1][name]) >= 0, name
    assert any(name.startswith("relative_loss/band_") for name in logged[0])
    assert {"relative_loss/lowpass", "relative_loss/highpass"} <= set(logged[0])
    assert [row["step"] for row in rows(finished) if row["held_out_loss"]] == ["3", "6"]


@pytest.mark.parametrize("parts", [1, 2])
def test_the_line_of_a_step_shows_what_was_measured_at_it(
    parts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**TINY, "preview_every_steps": 2, "log_every_steps": 1, "accumulate": parts, "lr": 0.01}
    run = freqmask.pretrain("builtin:digits", **options, method="mfm", out=str(tmp_path / "run"))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in told] == list("123456")
    assert "held out" not in told[0]
    measured = {
        row["step"]: f"{float(row['held_out_relative_loss']):.3f}"
        for row in rows(run)
        if row["held_out_loss"]
    }
    assert len(set(measured.values())) == 3, "or an older one could not be told from it"
    shown = [line.partition("held out ")[2].partition(",")[0] for line in told[1:]]
    assert shown == [measured[step] for step in ("2", "2", "4", "4", "6")]


def test_the_backbone_loads_in_timm_and_is_the_trained_one(finished: Path) -> None:
    model = timm.create_model(f"local-dir:{finished / 'backbone'}", pretrained=True)
    trained = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[f"method.backbone.timm_model.{name}"]), name
    config = json.loads((finished / "backbone" / "config.json").read_text())
    assert config["freqmask"]["step"] == 6
    assert config["freqmask"]["value_range"]
    assert config["pretrained_cfg"]["input_size"] == [1, 16, 16]


def test_a_size_that_the_patch_does_not_divide_is_padded_and_exported(tmp_path: Path) -> None:
    run = freqmask.pretrain(
        "builtin:digits", **{**TINY, "steps": 1, "patch_size": 5}, out=str(tmp_path / "run")
    )
    config = json.loads((run / "backbone" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [1, 20, 20]


def test_dropout_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {**TINY["model_args"], "proj_drop_rate": 0.5}
    options = {**TINY, "model_args": arguments, "checkpoint_every_steps": 2, "preview_every_steps": 2}
    whole = freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="killed here"):
        train_until(3, options, tmp_path / "parts")
    steps = steps_made(monkeypatch)
    assert_identical(whole, freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "parts")))
    assert steps == [3, 4, 5, 6]


def test_config_repeats_the_run_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    again = freqmask.pretrain(config=str(finished / "config.yaml"), out=str(tmp_path / "again"))
    assert_identical(finished, again)


def test_a_source_made_in_python_is_named_and_its_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = str(tmp_path / "run"), {**TINY, "checkpoint_every_steps": 2}
    with pytest.raises(RuntimeError, match="killed here"):
        train_until(3, options, tmp_path / "run", open_source("builtin:digits"))
    steps = steps_made(monkeypatch)
    freqmask.pretrain(open_source("builtin:digits"), **options, out=out)
    assert steps == [3, 4, 5, 6]
    assert RunFolder(out).config()["data"] == ["freqmask.data.sources:BuiltinDigits"]
    told = capsys.readouterr().out
    assert "object at" not in told
    assert f"freqmask embed {out} DATA --neighbours" in told
    assert f"freqmask evaluate knn pixels random:{out} {out} --data DATA " in told


def test_a_finished_run_says_so_and_how_to_train_on(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights(finished)
    freqmask.pretrain("builtin:digits", **TINY, out=str(finished))
    shown = capsys.readouterr().out
    assert "is finished" in shown
    # without a method the new run would be one of words; DATA is as it was typed, not as it was recorded
    assert f"freqmask pretrain builtin:digits --method mfm --init {finished}" in shown
    freqmask.pretrain(out=str(finished))
    assert f"freqmask pretrain builtin:digits --method mfm --init {finished}" in capsys.readouterr().out
    assert all(torch.equal(value, before[name]) for name, value in weights(finished).items())


def test_a_finished_run_says_where_it_was_trained_on_other_images(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    then = len(open_source("builtin:digits"))
    freqmask.pretrain(str(photos(tmp_path / "other", 12)), **TINY, out=str(finished))
    told = f"note: the images have changed since the run began: {then:,} then, 12 now: the run stays"
    assert told in capsys.readouterr().out
    freqmask.pretrain(str(tmp_path / "none"), **TINY, out=str(finished))
    assert "note:" not in capsys.readouterr().out


def test_a_finished_run_names_the_options_that_differ(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights(finished)
    same = {**TINY, "image_size": "16", "lr": "auto", "preview_every_steps": 1, "keep_checkpoints": 9}
    freqmask.pretrain("builtin:digits", **same, out=str(finished))
    assert "note:" not in capsys.readouterr().out
    changed = {**TINY, "steps": 120, "batch_size": 16, "focal": 1.0}
    assert freqmask.pretrain("builtin:digits", **changed, out=str(finished)) == finished
    told = capsys.readouterr().out
    assert (
        "note: batch_size was 8 and is 16 now; steps was 6 and is 120 now; focal was None and is 1.0 now: "
        "the run stays as it was trained; give another --out"
    ) in told
    assert "to train on from it" in told
    assert all(torch.equal(value, before[name]) for name, value in weights(finished).items())


def test_init_starts_from_the_weights_of_a_run(finished: Path, tmp_path: Path) -> None:
    options = {**TINY, "steps": 1, "lr": 1e-12, "min_lr": 0.0, "warmup_epochs": 0, "weight_decay": 0.0}
    run = freqmask.pretrain("builtin:digits", **options, init=str(finished), out=str(tmp_path / "on"))
    for name, value in weights(run).items():
        torch.testing.assert_close(value, weights(finished)[name], atol=1e-6, rtol=0)


def test_a_run_goes_on_though_its_first_weights_are_gone(finished: Path, tmp_path: Path) -> None:
    options = {**TINY, "method": "mfm", "steps": 4, "checkpoint_every_steps": 1, "probe_every_epochs": "auto"}
    first, early, late = (tmp_path / name for name in ("first", "early", "late"))
    shutil.copytree(finished, first)
    options["init"] = str(first)
    whole = freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "whole"))
    for step, out in ((1, early), (3, late)):
        with pytest.raises(RuntimeError, match="killed here"):
            train_until(step, options, out)
        assert bool(RunFolder(out).began_measured()) == (out == late)
    shutil.rmtree(first)
    with pytest.raises(UserError, match=r"init .*nothing of that name exists"):  # row 0 is to be of them
        freqmask.pretrain("builtin:digits", **options, out=str(early))
    with pytest.raises(UserError, match=r"init .*nothing of that name exists"):
        freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "new"))
    assert_identical(whole, freqmask.pretrain("builtin:digits", **options, out=str(late)))


@pytest.mark.parametrize("method", ["mfm", "sr"])
def test_init_takes_heads_of_the_same_method_only(
    method: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**TINY, "steps": 1, "lr": 1e-12, "min_lr": 0.0, "warmup_epochs": 0, "weight_decay": 0.0}
    options |= {"method": method, "init": str(finished)}
    run = freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "on"))
    said, is_same = capsys.readouterr().out, method == "mfm"
    assert (f"the whole method of {finished}" in said) == is_same
    assert (f"the backbone of {finished}; the heads begin anew" in said) != is_same
    first, now = (freqmask.load_method(path).state_dict() for path in (finished, run))
    heads = [name for name in first if name.startswith("decoder.")]
    assert heads
    for name, value in first.items():
        assert torch.allclose(value, now[name], atol=1e-6) == (is_same or name not in heads), name


def test_init_names_what_does_not_fit(finished: Path, tmp_path: Path) -> None:
    options = {**TINY, "model_args": {"depth": 2, "embed_dim": 32, "num_heads": 2}}
    with pytest.raises(UserError, match=r"does not fit the backbone: blocks\.1.*is missing"):
        freqmask.pretrain("builtin:digits", **options, init=str(finished), out=str(tmp_path / "on"))
    options = {**TINY, "channels": 3, "out": str(tmp_path / "on")}
    with pytest.raises(UserError, match=r"is of 1 channel \(--channels 1\) and does not fit the backbone"):
        freqmask.pretrain("builtin:digits", **options, init=str(finished))


@pytest.mark.parametrize("method", ["folk", "sr", "deblur", "denoise"])
def test_every_method_trains(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = TINY_FOLK if method == "folk" else {**TINY, "method": method}
    run = freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / method))
    assert (run / "summary.json").is_file()
    shown = capsys.readouterr().out
    assert "relative loss" in shown
    if method == "folk":
        assert [row["step"] for row in rows(run) if row["collapse"]]


@pytest.mark.parametrize(("options", "workers"), [(TINY, 0), (TINY_FOLK, 2)])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    options: dict[str, Any], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**options, "workers": workers, "checkpoint_every_steps": 2}
    whole = freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "whole"))
    parts = tmp_path / "parts"
    with pytest.raises(RuntimeError, match="killed here"):
        train_until(3, options, parts)
    assert not (parts / "summary.json").exists()
    steps = steps_made(monkeypatch)
    again = freqmask.pretrain("builtin:digits", **options, out=str(parts))
    assert steps == [3, 4, 5, 6]  # it went on, and did not begin again
    assert_identical(whole, again)
    assert [row["step"] for row in rows(whole)] == [row["step"] for row in rows(again)]


def test_the_time_of_a_run_is_that_of_all_its_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, clock = {**TINY, "checkpoint_every_steps": 2}, iter(range(0, 100_000, 1000))
    monkeypatch.setattr("freqmask.training.callbacks.time.time", lambda: next(clock))  # 1,000 s a look
    with pytest.raises(RuntimeError, match="killed here"):
        train_until(3, options, tmp_path / "run")
    run = freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "run"))
    # 1,000 until the checkpoint of step 2; then begun at 2,000 and looked at for steps 4 and 6 and at the end
    assert RunFolder(run).summary()["seconds"] == 1000 + 3000


def speed_of(run: Path, steps: range) -> float:
    """Images/s of these steps, each of which has a row."""
    own = [row for row in rows(run) if int(row["step"]) in steps and row["images_per_second"]]
    return statistics.harmonic_mean([float(row["images_per_second"]) for row in own])


def test_the_speed_of_a_run_is_that_of_the_steps_of_all_its_starts_without_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, folder = {**TINY, "checkpoint_every_steps": 2, "preview_every_steps": 1}, tmp_path / "run"
    monkeypatch.setattr(HeldOut, "measure", lambda *_: time.sleep(0.2))
    with pytest.raises(RuntimeError, match="killed here"):
        train_until(3, options, folder)
    freqmask.pretrain("builtin:digits", **options, out=str(folder))
    summary = RunFolder(folder).summary()
    assert summary["images_per_second"] == pytest.approx(speed_of(folder, range(1, 7)), rel=1e-4)
    assert summary["seconds"] > 6 * 0.2


def test_the_speed_of_a_run_of_0_1_0_is_that_of_the_steps_made_since(tmp_path: Path) -> None:
    options, folder = {**TINY, "checkpoint_every_steps": 2}, tmp_path / "run"
    with pytest.raises(RuntimeError, match="killed here"):
        train_until(3, options, folder)
    (file,) = (folder / "checkpoints").glob("step-*.ckpt")
    content = torch.load(file, weights_only=True)
    torch.save({name: content[name] for name in content if name not in ("seconds", "row")}, file)
    with pytest.raises(RuntimeError, match="killed here"):
        train_until(5, options, folder)
    freqmask.pretrain("builtin:digits", **options, out=str(folder))
    told = RunFolder(folder).summary()["images_per_second"]
    assert told == pytest.approx(speed_of(folder, range(3, 7)), rel=1e-4)


def test_the_first_row_after_a_stop_is_that_of_a_run_that_was_never_stopped(tmp_path: Path) -> None:
    options = {**TINY, "checkpoint_every_steps": 2, "log_every_steps": 3}
    whole = freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="killed here"):
        train_until(3, options, tmp_path / "parts")
    parts = freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "parts"))
    clocks = ("images_per_second", "data_wait_share")
    told = [
        [{name: row[name] for name in row if name not in clocks} for row in rows(run)]
        for run in (whole, parts)
    ]
    assert told[0] == told[1]


def test_a_run_finds_its_images_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, folder in enumerate(("begun", "elsewhere")):
        (tmp_path / folder / "pics").mkdir(parents=True)
        for name in range(30 - number):
            pixels = np.random.default_rng(100 * number + name).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / "pics" / f"{name}.png")
    monkeypatch.chdir(tmp_path / "begun")
    with pytest.raises(RuntimeError):
        train_until(3, {**TINY, "method": "mfm"}, tmp_path / "run", ["pics"])
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = freqmask.pretrain(out=str(tmp_path / "run"))
    assert "have changed" not in capsys.readouterr().out
    assert RunFolder(run).config()["data"] == [str(tmp_path / "begun" / "pics")]
    seen = seen_in_training(run, open_source(tmp_path / "begun" / "pics"), np.arange(30))
    assert "pre-trained on 29 of the 30 test images" in seen


def test_first_weights_are_the_same_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("first", "elsewhere/first"):
        freqmask.pretrain("builtin:digits", **TINY, method="mfm", seed=len(name), out=name)
    with pytest.raises(RuntimeError):
        train_until(3, {**TINY, "method": "mfm", "init": "first"}, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"init was .*first and is .*elsewhere/first now"):
        freqmask.pretrain("builtin:digits", **TINY, method="mfm", init="first", out="../run")
    freqmask.pretrain("builtin:digits", **TINY, method="mfm", init="../first", out="../run")


def test_other_settings_are_refused_each_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(RuntimeError):
        train_until(3, TINY, out)
    changed = {**TINY, "seed": 5, "batch_size": 16, "image_size": "16x16"}
    with pytest.raises(UserError) as caught:
        freqmask.pretrain("builtin:digits", **changed, out=str(out))
    assert "seed was 0 and is 5 now" in str(caught.value)
    assert "batch_size was 8 and is 16 now" in str(caught.value)
    assert "another --out" in str(caught.value)


def test_without_out_the_newest_unfinished_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError):
        train_until_without_out(4)
    run = freqmask.pretrain("builtin:digits", **{**TINY, "checkpoint_every_steps": 2})
    assert "resumes from step-00000002.ckpt" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name]
    second = freqmask.pretrain("builtin:digits", **{**TINY, "checkpoint_every_steps": 2})
    assert second.name != run.name


def train_until_without_out(step: int) -> None:
    from freqmask.training.callbacks import Monitor

    def broken(self: Any, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == step:
            raise RuntimeError("killed here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "on_train_batch_end", broken)
        freqmask.pretrain("builtin:digits", **{**TINY, "checkpoint_every_steps": 2})


def test_accumulation_makes_the_same_step(tmp_path: Path) -> None:
    runs = []
    for parts in (1, 4):
        options = {**TINY, "steps": 2, "reduce": "image", "accumulate": parts, "log_every_steps": 1}
        runs.append(freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / str(parts))))
    for name in ("loss", "grad_norm"):
        first, second = ([float(row[name]) for row in rows(run) if row[name]] for run in runs)
        assert len(first) == 2
        assert first == pytest.approx(second, rel=1e-4), name


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    options = {
        **TINY,
        "lr": 1e30,
        "warmup_epochs": 0,
        "clip_grad": None,
        "checkpoint_every_steps": 1,
        "steps": 30,
    }
    with pytest.raises(UserError, match=r"no longer finite at step \d+ \(learning rate 1e\+30.*step-0"):
        freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_overfit_ends_in_pass_or_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {**TINY, "lr": 3e-3, "steps": 60}
    freqmask.pretrain("builtin:digits", **options, overfit=8, out=str(tmp_path / "pass"))
    assert "PASS: on 8 images" in capsys.readouterr().out
    options = {**options, "lr": 1e-9, "steps": 2}
    freqmask.pretrain("builtin:digits", **options, overfit=8, out=str(tmp_path / "fail"))
    assert "FAIL: on 8 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("crop", "words"),
    [("resized", "of the area"), ("native", "never resampled"), ("whole", "whole images, distorted")],
)
def test_the_plan_says_how_images_are_cropped(
    crop: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    freqmask.pretrain("builtin:digits", **TINY, out=str(tmp_path / "run"), crop=crop, dry_run=True)
    told = capsys.readouterr().out
    assert words in told
    assert ("of the area" in told) == (crop == "resized")
    assert "changes nothing" not in told


def test_a_crop_scale_without_an_effect_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {**TINY, "crop": "native", "crop_scale": [0.1, 1.0], "dry_run": True}
    freqmask.pretrain("builtin:digits", **options, out=str(tmp_path / "run"))
    assert "crop_scale is for --crop resized and changes nothing here" in capsys.readouterr().out


def test_dry_run_draws_the_plan_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    freqmask.pretrain("builtin:digits", **TINY, method="mfm", out=str(out), dry_run=True)
    shown = capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert "plan.png" in names
    assert names <= {"plan.png", "run.lock"}
    for words in (
        "images",
        "hides some frequencies",
        "low_pass_share",
        "learning rate",
        "memory",
        "disk",
        "epochs",
        "plan drawn",
    ):
        assert words in shown
    assert (freqmask.pretrain("builtin:digits", **TINY, out=str(out)) / "summary.json").is_file()
    assert "method      words (learned most in equal time" in capsys.readouterr().out


def test_bad_images_are_listed_and_the_run_goes_on(tmp_path: Path) -> None:
    data = photos(tmp_path / "data", 30)
    (data / "broken\n√.png").write_bytes(b"\x89PNG broken")
    (data / "empty.jpg").write_bytes(b"")
    run = freqmask.pretrain(str(data), **TINY, out=str(tmp_path / "run"))
    with (run / "skipped.csv").open(newline="") as file:
        skipped = {row["name"]: row["reason"] for row in csv.DictReader(file)}
    assert set(skipped) == {"broken\n√.png", "empty.jpg"}  # neither is the one that is held out
    assert all(skipped.values())


@pytest.mark.parametrize("content", ["broken", "of one color"])
def test_a_bad_image_that_is_the_only_one_held_out_ends_no_run(tmp_path: Path, content: str) -> None:
    data = photos(tmp_path / "data", 20)
    source = open_source(data)
    (held,) = hold_out(source, seed=0)[1]
    if content == "broken":
        (data / source.name(held)).write_bytes(b"no image")
    else:
        Image.new("RGB", (40, 32)).save(data / source.name(held))
    run = freqmask.pretrain(str(data), **{**TINY, "preview_every_steps": 2}, out=str(tmp_path / "run"))
    assert RunFolder(run).finished()
    assert not any(row.get("held_out_loss") for row in rows(run))


def test_too_many_bad_images_stop_the_run(tmp_path: Path) -> None:
    data = photos(tmp_path / "data", 16)
    for number in range(8):
        (data / f"bad{number}.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match="max_skipped_share"):
        freqmask.pretrain(str(data), **{**TINY, "steps": 50}, out=str(tmp_path / "run"))


def photos(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photo {number}.png")
    return folder


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("nowhere", "does not exist"),
        ("builtin:photo", "did you mean 'builtin:photos'"),
        (None, "DATA is missing; try freqmask pretrain builtin:photos"),
    ],
)
def test_bad_data_leaves_nothing_behind(
    data: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        freqmask.pretrain(data, steps=2)
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_while_it_begins_begins_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("plan.png", "run.lock", "run.json", ".config.yaml.17.tmp"):
        (out / name).write_text("{}")
    assert (freqmask.pretrain("builtin:digits", **TINY, out=str(out)) / "summary.json").is_file()


def test_a_folder_with_other_things_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files and no run"):
        freqmask.pretrain("builtin:digits", **TINY, out=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_where_compiling_fails_the_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: torch.nn.Module, **_: object) -> None:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no compiler here\nand more")

        self.forward = fail  # type: ignore[method-assign]

    monkeypatch.setattr(torch.nn.Module, "compile", refuse)
    run = freqmask.pretrain("builtin:digits", **TINY, compile=True, out=str(tmp_path / "run"))
    assert (
        "torch.compile cannot be used here (no compiler here); training without it" in capsys.readouterr().out
    )
    assert (run / "summary.json").is_file()


def test_another_loader_or_log_is_accepted_on_the_way(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(RuntimeError):
        train_until(3, {**TINY, "checkpoint_every_steps": 2}, out)
    again = freqmask.pretrain(
        "builtin:digits", **{**TINY, "workers": 1, "log_every_steps": 1, "keep_checkpoints": 1}, out=str(out)
    )
    assert (again / "summary.json").is_file()


def test_a_run_keeps_the_threads_that_it_began_with_and_leaves_ours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sums of other threads end in other last bits."""
    out, seen, ours = tmp_path / "run", [], torch.get_num_threads()

    def plan_takes_one_more(self: Any, *rest: Any) -> Any:
        measured = take_cost(self, *rest)
        torch.set_num_threads(ours + 1)
        return measured

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with monkeypatch.context() as patch:
        take_cost = auto.Plan.take_cost
        patch.setattr(auto.Plan, "take_cost", plan_takes_one_more)
        with pytest.raises(RuntimeError):
            train_until(3, {**TINY, "checkpoint_every_steps": 2}, out)
    assert torch.get_num_threads() == ours
    assert RunFolder(out).state()["threads"] == ours + 1
    monkeypatch.setattr(ScheduledModule, "check", lambda *_: seen.append(torch.get_num_threads()))
    freqmask.pretrain("builtin:digits", **TINY, out=str(out))
    assert seen == [ours + 1] * 4
    assert torch.get_num_threads() == ours
    assert f"note: threads: {ours + 1}, as the run began, not {ours}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "state", [{}, {"threads": None}, {"threads": 0}, {"threads": "?"}, {"threads": 3, "cores": 999}]
)
def test_a_run_that_did_not_note_its_threads_or_had_other_cores_takes_those_of_here(
    state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    loop._take_threads({"cores": auto.usable_cores(), **state})
    assert torch.get_num_threads() == before


def test_a_filter_object_is_recorded_by_its_words(tmp_path: Path) -> None:
    from freqmask.filters import BandStop

    run = freqmask.pretrain("builtin:digits", **TINY, filter=BandStop(1, 4), out=str(tmp_path / "run"))
    assert "bandstop(low=1" in (run / "config.yaml").read_text()


def test_under_a_loss_scale_gradients_are_logged_and_clipped_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    for precision in ("32-true", "16-mixed"):
        with monkeypatch.context() as patch:
            if precision == "16-mixed":  # on a CPU Lightning would take bf16 for it
                patch.setattr("freqmask.training.loop.L.Trainer", scaled_trainer)
            run = freqmask.pretrain("builtin:digits", **TINY, method="mfm", out=str(tmp_path / precision))
        norms.append([float(row["grad_norm"]) for row in read_rows(run / "metrics.csv") if row["grad_norm"]])
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def scaled_trainer(precision: str, plugins: list[Any], **options: Any) -> Trainer:
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    return Trainer(plugins=[*plugins, scaled], **options)


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1], ids=["the first process", "the second process"])
def test_a_signal_to_any_process_stops_all_and_the_run_resumes(told: int, tmp_path: Path) -> None:
    words = "pretrain builtin:digits --image_size 16 --patch_size 8 --steps 100000 --batch_size 8 --workers 0"
    words += " --devices 2 --accelerator cpu --preview_every_steps 0 --log_every_steps 2"
    depth = ["--model_args", "{depth: 1, embed_dim: 32, num_heads: 2}", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "freqmask", *words.split(), *depth],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    until = time.monotonic() + 120
    while (
        len(read_rows(tmp_path / "run" / "metrics.csv")) < 3
        and time.monotonic() < until
        and process.poll() is None
    ):
        time.sleep(0.1)
    (second,) = [child for child in psutil.Process(process.pid).children() if "--devices" in child.cmdline()]
    os.kill((process.pid, second.pid)[told], signal.SIGTERM)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 143, shown
    assert "the same command resumes" in shown
    assert not (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_save_first_and_say_how_to_go_on(number: int, code: int, tmp_path: Path) -> None:
    words = "pretrain builtin:digits --image_size 16 --patch_size 8 --steps 100000 --batch_size 8 --workers 1"
    depth = ["--model_args", "{depth: 1, embed_dim: 32, num_heads: 2}", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "freqmask", *words.split(), *depth, "--log_every_steps", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    until = time.monotonic() + 120
    while not metrics_exist(tmp_path / "run") and time.monotonic() < until and process.poll() is None:
        time.sleep(0.1)  # for the process to get going; nothing is measured
    process.send_signal(number)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == code, shown
    assert "the same command resumes" in shown
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert "Traceback" not in shown


def metrics_exist(run: Path) -> bool:
    return (run / "metrics.csv").is_file()


def test_a_kill_between_the_last_checkpoint_and_the_export_loses_no_backbone(tmp_path: Path) -> None:
    run = freqmask.pretrain("builtin:digits", **TINY, method="mfm", out=str(tmp_path / "run"))
    before = weights(run)
    for name in ("summary.json", "backbone/model.safetensors"):
        (run / name).unlink()
    freqmask.pretrain("builtin:digits", **TINY, method="mfm", out=str(run))
    assert (run / "summary.json").is_file()
    assert RunFolder(run).summary()["images_per_second"] > 0, "no step is made any more"
    after = weights(run)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("changed", [{"devices": 3}, {"devices": 16}, {"accumulate": 3}])
def test_a_batch_that_the_devices_cannot_share_is_refused_when_a_run_resumes(
    tmp_path: Path, changed: dict[str, int]
) -> None:
    run = freqmask.pretrain("builtin:digits", **TINY, method="mfm", out=str(tmp_path / "run"))
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match=r"must divide the run's batch_size \(8\)"):
        freqmask.pretrain("builtin:digits", **TINY, method="mfm", out=str(run), **changed)


@pytest.mark.parametrize(("overfit", "left"), [(None, None), (4, None), (None, 'step,loss\r\n6,"1,5"\r\n')])
def test_a_run_whose_metrics_are_gone_ends_without_them(
    overfit: int | None, left: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**TINY, "method": "mfm", "overfit": overfit, "out": str(tmp_path / "run")}
    run = freqmask.pretrain("builtin:digits", **options)
    for name in ("summary.json", "metrics.csv"):
        (run / name).unlink()
    if left:  # as a spreadsheet writes it where a comma is the decimal point
        (run / "metrics.csv").write_text(left)
    capsys.readouterr()
    freqmask.pretrain("builtin:digits", **options)
    shown = capsys.readouterr().out
    assert f"loss        unknown: {run / 'metrics.csv'} tells none" in shown
    assert f"backbone    {run / 'backbone'}" in shown
    assert "PASS" not in shown and "FAIL" not in shown
    assert "loss" not in RunFolder(run).summary()


def test_a_run_that_another_process_began_meanwhile_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, out = {**TINY, "method": "mfm"}, tmp_path / "run"
    resolve = job.resolve

    def while_another_trains(*given: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(job, "resolve", resolve)
            freqmask.pretrain("builtin:digits", **options, out=str(out))
        return resolve(*given)

    monkeypatch.setattr(job, "resolve", while_another_trains)
    with pytest.raises(UserError, match="was begun by another process meanwhile; the same command"):
        freqmask.pretrain("builtin:digits", **{**options, "steps": 2}, out=str(out))
    assert RunFolder(out).config()["steps"] == 6
    assert [row["step"] for row in rows(out)][-1] == "6"
