"""What freqmask 0.1.0 trained, measured and wrote (``make.py``) is what this program trains, measures and reads."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from freqmask.cli import main as run

HERE = Path(__file__).parent
FROZEN: dict[str, Any] = json.loads((HERE / "frozen.json").read_text())
PRETRAININGS = ("mfm", "mfm-com", "mfm-cnn", "folk", "sr", "deblur", "denoise")
# columns of results.csv that hold what was measured
MEASURED = (
    *("accuracy", "balanced_accuracy", "macro_f1", "accuracy_low", "accuracy_high"),
    *("mean_iou", "pixel_accuracy", "mean_accuracy", "mean_iou_low", "mean_iou_high"),
    *("adversarial_loss", "largest_change"),
)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the files to work in."""
    shutil.copytree(HERE, tmp_path / "golden", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(tmp_path / "golden")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "golden"
    torch.set_num_threads(threads)


def rows(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run_folder: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(run_folder / "metrics.csv") if row.get("loss")]


def only_training(folder: str) -> Path:
    (metrics,) = Path(folder).rglob("metrics.csv")
    return metrics.parent


def assert_same_rows(old: str, new: str) -> None:
    """Same models, variants and numbers in the newest rows."""
    first = rows(old)
    second = rows(new)[-len(first) :]  # measuring again appends
    for column in ("protocol", "model", "variant", "seed"):
        assert [row[column] for row in first] == [row[column] for row in second]
    for column in MEASURED:
        if column in first[0]:
            numbers = [[float(row[column] or "nan") for row in table] for table in (first, second)]
            np.testing.assert_allclose(numbers[1], numbers[0], rtol=1e-5, atol=1e-6, err_msg=column)


@pytest.mark.parametrize("name", PRETRAININGS)
def test_every_method_trains_to_the_frozen_losses(name: str) -> None:
    run(["pretrain", "--out", "again", *FROZEN[name]["arguments"]])
    assert losses(Path("again")) == pytest.approx(FROZEN[name]["loss"], rel=1e-6)
    state = torch.load("again/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert {key: list(tensor.shape) for key, tensor in state.items()} == FROZEN[name]["keys"]


def test_an_unfinished_run_goes_on_to_the_same_losses() -> None:
    """Stopped at step 12, checkpoint at step 10."""
    run(["pretrain", "--out", "trained/unfinished", *FROZEN["mfm"]["arguments"]])
    assert losses(Path("trained/unfinished")) == pytest.approx(FROZEN["mfm"]["loss"], rel=1e-6)
    assert json.loads(Path("trained/unfinished/summary.json").read_text())["steps"] == 20


def test_the_newest_unfinished_run_is_found_without_its_name() -> None:
    Path("trained").rename("runs")
    run(["pretrain", *FROZEN["mfm"]["arguments"]])
    assert len(losses(Path("runs/unfinished"))) == 20


def test_fine_tuning_gives_the_frozen_losses_and_rows() -> None:
    """As the run was begun: since then the head of few images begins as logistic regression."""
    Path("again/mfm-seed0").mkdir(parents=True)
    for name in ("config.yaml", "run.json"):
        shutil.copy(Path("tuned/mfm-seed0") / name, "again/mfm-seed0")
    run(["evaluate", "finetune", "--out", "again", *FROZEN["finetune"]["arguments"]])
    training = only_training("again")
    assert losses(training) == pytest.approx(FROZEN["finetune"]["loss"], rel=1e-6)
    state = torch.load(training / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {key: list(tensor.shape) for key, tensor in state.items()} == FROZEN["finetune"]["keys"]
    assert_same_rows("results/finetune.csv", "again/results.csv")


def test_segmentation_gives_the_frozen_losses_and_rows() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    run(["evaluate", "segment", "--out", "again", *FROZEN["segment"]["arguments"]])
    assert losses(only_training("again")) == pytest.approx(FROZEN["segment"]["loss"], rel=1e-6)
    assert_same_rows("results/segment.csv", "again/results.csv")


@pytest.mark.parametrize("protocol", ["knn", "linear", "fewshot", "bands", "robustness"])
def test_protocols_give_the_frozen_rows(protocol: str) -> None:
    run(["evaluate", protocol, *FROZEN[protocol]["arguments"], "--out", "again"])
    assert_same_rows(f"results/{protocol}.csv", "again/results.csv")


def test_a_finished_classifier_is_measured_again_without_training() -> None:
    before = Path("tuned/mfm-seed0/metrics.csv").read_bytes()
    run(["evaluate", "finetune", "--out", "tuned", *FROZEN["finetune"]["arguments"]])
    assert Path("tuned/mfm-seed0/metrics.csv").read_bytes() == before
    assert_same_rows("results/finetune.csv", "tuned/results.csv")


def test_a_finished_segmentation_network_is_measured_again_without_training() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    before = Path("segmented/mfm-seed0/metrics.csv").read_bytes()
    run(["evaluate", "segment", "--out", "segmented", *FROZEN["segment"]["arguments"]])
    assert Path("segmented/mfm-seed0/metrics.csv").read_bytes() == before
    assert_same_rows("results/segment.csv", "segmented/results.csv")


def test_features_of_a_run_are_the_frozen_ones() -> None:
    run(["embed", "trained/mfm", "shards", "--out", "again.npy", "--batch_size", "8", "--workers", "0"])
    np.testing.assert_allclose(np.load("again.npy"), np.load("features.npy"), rtol=1e-5, atol=1e-6)


def test_an_exported_folder_still_loads_everywhere() -> None:
    import timm

    from freqmask.interop.models import open_model

    timm.create_model("local-dir:exported", pretrained=True)
    assert open_model("exported").name == "exported"
    run(["pretrain", "shards", "--init", "exported", "--steps", "2", "--batch_size", "8", "--out", "again"])


@pytest.mark.parametrize("model", ["trained/mfm", "trained/folk", "exported"])
def test_runs_and_folders_are_exported_again(model: str) -> None:
    run(["export", model, "--out", "again"])
    from safetensors.torch import load_file

    folder = Path(model) if model == "exported" else Path(model) / "backbone"
    old, new = (load_file(path / "model.safetensors") for path in (folder, Path("again")))
    assert set(old) == set(new)
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_an_mfm_checkpoint_is_converted() -> None:
    run(["convert", "mfm.pth", "--out", "again"])
    from safetensors.torch import load_file

    encoder = torch.load("mfm.pth", weights_only=True)["model"]
    converted = load_file("again/model.safetensors")
    assert torch.equal(converted["cls_token"], encoder["encoder.cls_token"])


def test_reports_lists_and_tables_show_old_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run(["report", "trained/mfm", "trained/folk", "tuned/mfm-seed0", "--out", "report.html"])
    page = Path("report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("mfm", "folk", "mfm-seed0"))
    run(["runs", "trained"])
    printed = capsys.readouterr().out
    assert "unfinished" in printed and "folk" in printed


def test_shards_are_read_as_data() -> None:
    from freqmask.data.sources import open_source

    assert len(open_source("shards")) == 24
