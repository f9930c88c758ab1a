"""A probe beside a training: numbers in the metrics, and not a bit of the training moved."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import freqmask
from freqmask.data.loader import TrainDataset
from freqmask.data.source import Subset
from freqmask.data.sources import open_source
from freqmask.data.splits import hold_out
from freqmask.data.transforms import Geometry
from freqmask.pretraining.task import Images
from freqmask.pretraining.watch import HeldOut, Probe, by_own_labels, first_batch, pixels_of
from freqmask.spectrum import as_float
from freqmask.training.callbacks import Monitor
from freqmask.training.files import read_rows
from freqmask.training.run_folder import RunFolder, load_safely

TINY: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "backbone": "vit_small_patch16_224",
    "model_args": {"depth": 1, "embed_dim": 32, "num_heads": 1, "proj_drop_rate": 0.2},
    "steps": 4,
    "batch_size": 8,
    "workers": 0,
    "preview_every_steps": 0,
    "precision": "32-true",
}


def test_a_probe_writes_numbers_and_leaves_the_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    every = {"probe_data": ["builtin:digits"], "probe_every_epochs": 0.009}  # two steps
    probed = freqmask.pretrain(["builtin:digits"], out=str(tmp_path / "probed"), **every, **TINY)
    plain = freqmask.pretrain(["builtin:digits"], out=str(tmp_path / "plain"), **TINY)
    states = [load_safely(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (probed, plain)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    rows = [row for row in read_rows(probed / "metrics.csv") if row["probe_knn"]]
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    assert all(0 < float(row["probe_linear"]) <= 1 < float(row["rankme"]) for row in rows)
    assert float(rows[0]["pixels_knn"]) > 0.8, "raw pixels of digits are told apart well"
    summary = json.loads((probed / "summary.json").read_text())
    assert summary["first_probe_knn"] == pytest.approx(float(rows[0]["probe_knn"]))
    assert summary["probe_knn"] == pytest.approx(float(rows[-1]["probe_knn"]))
    first = read_rows(plain / "metrics.csv")[0]
    assert "probe_linear" not in first, "the images' own labels tell k-NN alone"
    assert 0 < float(first["probe_knn"]) < float(first["pixels_knn"]) <= 1
    states = [json.loads((run / "run.json").read_text())["probe_images"] for run in (probed, plain)]
    assert states == [359, 1000]


@pytest.mark.parametrize("more", [{}, {"probe_data": ["builtin:digits"], "probe_every_epochs": 0.009}])
def test_the_plan_counts_the_images_that_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    counted, looked = [], []
    features, loss, watched = Probe._features, HeldOut._loss, Images.watched
    monkeypatch.setattr(Images, "watched", lambda *given: counted.append(watched(*given)) or counted[-1])

    def of_features(self: Probe, encode: Any, images: Any, chosen: Any, device: Any) -> Any:
        looked.append(0 if encode is pixels_of else len(chosen))
        return features(self, encode, images, chosen, device)

    def of_loss(self: HeldOut, trainer: Any, module: Any, images: TrainDataset) -> Any:
        looked.append(len(images))
        return loss(self, trainer, module, images)

    monkeypatch.setattr(Probe, "_features", of_features)
    monkeypatch.setattr(HeldOut, "_loss", of_loss)
    freqmask.pretrain(
        ["builtin:digits"], out=str(tmp_path / "run"), **{**TINY, **more, "preview_every_steps": 2}
    )
    assert set(counted) == {sum(looked)} and sum(looked) > 5000


@pytest.mark.parametrize("count, classes", [(301, 3), (600, 40)])
def test_own_labels_tell_what_scikit_learn_says_of_each_half_by_the_other(count: int, classes: int) -> None:
    generator = np.random.default_rng(count)
    labels = generator.integers(0, classes, count)
    features = generator.normal(size=(classes, 8))[labels] + generator.normal(size=(count, 8))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    order = np.argsort(labels, kind="stable")
    unit, labels, features = unit[order], labels[order], features[order]
    right = 0
    for part in (0, 1):
        voters = KNeighborsClassifier(20, weights=lambda far: np.exp((1 - far**2 / 2) / 0.07))  # cosines
        voters.fit(unit[1 - part :: 2], labels[1 - part :: 2])
        right += (voters.predict(unit[part::2]) == labels[part::2]).sum()
    unknown = generator.normal(size=(50, 8))  # images without a label say nothing
    mixed = torch.from_numpy(np.concatenate([features, unknown])).float()
    found = by_own_labels(mixed, torch.from_numpy(np.concatenate([7 * labels, np.full(50, -1)])))
    assert found == {"probe_knn": pytest.approx(right / count, abs=1.5 / count)}


def test_own_labels_that_alternate_are_in_both_halves() -> None:
    labels = torch.arange(1000) % 2
    features = torch.nn.functional.one_hot(labels).float() + 0.01 * torch.randn(1000, 2)
    assert by_own_labels(features, labels) == {"probe_knn": 1.0}


NOTHING = [np.zeros(500), np.arange(99) % 2, np.full(500, -1), np.arange(1000), np.arange(1000) // 3]


@pytest.mark.parametrize("labels", NOTHING, ids=["one class", "few", "none", "a class each", "three a class"])
def test_labels_that_cannot_tell_say_nothing(labels: np.ndarray) -> None:
    features = torch.randn(len(labels), 4)
    assert by_own_labels(features, torch.from_numpy(labels).long()) == {}


def test_every_held_out_image_counts_alike_though_the_last_batch_is_one_image(tmp_path: Path) -> None:
    source = open_source(["builtin:digits"])
    images = TrainDataset(
        Subset(source, np.arange(9)), [Geometry(image_size=16, crop="center", horizontal_flip=0)]
    )
    whole = as_float(first_batch(images, 9)["views"][0]).flatten(1).mean(1)
    assert whole[:8].mean() != pytest.approx(float(whole[8]), rel=0.05)

    def method(views: list[torch.Tensor], keys: torch.Tensor, details: bool) -> dict[str, torch.Tensor]:
        return {"loss": views[0].mean()}

    trainer = SimpleNamespace(
        global_rank=0,
        world_size=1,
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value),
    )
    look: Any = HeldOut(RunFolder(tmp_path), images, images, None, 1, 4)
    loss = look._loss(trainer, SimpleNamespace(method=method, device="cpu"), images)
    assert loss == {"held_out_loss": pytest.approx(float(whole.mean()), rel=1e-6)}


def test_a_probe_is_float32_under_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights before the first step are the same, so are their numbers; a look under autocast gave others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {**TINY, "steps": 1, "probe_data": ["builtin:digits"]}
    found = []
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        run = freqmask.pretrain(
            ["builtin:digits"], out=str(tmp_path / precision), **{**options, "precision": precision}
        )
        found.append(read_rows(run / "metrics.csv")[0])
    assert found[0]["probe_knn"] == found[1]["probe_knn"]
    for name in ("probe_knn", "probe_linear", "rankme"):
        assert float(found[1][name]) == pytest.approx(float(found[0][name]), rel=1e-6)
        assert float(found[2][name]) == pytest.approx(float(found[0][name]), rel=0.05)  # its weights are bf16


def test_row_0_is_of_the_first_weights_though_the_run_was_stopped_before_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is resumed has trained weights; those that it began with come from its seed again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {**TINY, "probe_every_epochs": 100, "checkpoint_every_steps": 2}
    whole = freqmask.pretrain(["builtin:digits"], out=str(tmp_path / "whole"), **options)
    ended = Monitor.on_train_batch_end

    def fall(monitor: Monitor, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("the power is gone")
        ended(monitor, trainer, *rest)

    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="power"):
        broken.setattr(Monitor, "on_train_batch_end", fall)
        freqmask.pretrain(["builtin:digits"], out=str(tmp_path / "cut"), **options)
    assert "rankme" not in read_rows(tmp_path / "cut" / "metrics.csv")[-1]
    cut = freqmask.pretrain(["builtin:digits"], out=str(tmp_path / "cut"), **options)
    rows = [read_rows(run / "metrics.csv")[0] for run in (whole, cut)]
    assert rows[0]["step"] == rows[1]["step"] == "0"
    assert rows[0]["rankme"] == rows[1]["rankme"] != ""


def test_statistics_of_batch_norm_are_of_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder lies class by class, and its first 256 images are all of the first one here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    draws, pixels = np.random.default_rng(0), dict[str, np.ndarray]()
    for name, brightness in (("1-night", 20), ("2-mid", 110), ("3-day", 200)):
        (tmp_path / "sky" / name).mkdir(parents=True)
        for number in range(260):
            pixels[f"{name}/{number}.png"] = image = draws.integers(0, 50, (32, 32, 3), np.uint8) + brightness
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / "sky" / name / f"{number}.png")
    options = {"method": "mfm", "backbone": "resnet10t", "image_size": 32, "steps": 3, "batch_size": 8}
    options |= {"workers": 0, "precision": "32-true", "accelerator": "cpu"}
    run = freqmask.pretrain(["sky"], out="run", **options)
    model = timm.create_model(f"local-dir:{run / 'backbone'}", pretrained=True).train()
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))

    def running_mean(names: list[str]) -> torch.Tensor:
        shown = torch.from_numpy(np.stack([pixels[name] for name in names])).permute(0, 3, 1, 2) / 255
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        with torch.no_grad():
            for start in range(0, len(shown), 130):
                model((shown[start : start + 130] - mean) / std)
        return model.bn1.running_mean.clone()

    kept = model.bn1.running_mean.clone()
    source = open_source("sky")
    trained = [source.name(int(index)) for index in hold_out(source, seed=0)[0]]
    everything = running_mean(np.random.default_rng(1).permutation(trained).tolist())
    gap = float((running_mean(trained[:256]) - everything).abs().max())
    assert float((kept - everything).abs().max()) < gap / 20
