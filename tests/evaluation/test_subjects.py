"""What is measured: the features of a backbone and of raw pixels, and what their keys tell apart."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import make_run

from freqmask.data.sources import open_source
from freqmask.data.values import survey
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import (
    BackboneModel,
    EvalModel,
    open_eval_model,
    what_differs,
)
from freqmask.evaluation.protocol import EvalConfig
from freqmask.interop.models import open_model
from freqmask.spectrum import as_float

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "some").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "some" / f"{number}.png")
    return tmp_path / "some"


def opened(text: str, folder: Path, **options: Any) -> EvalModel:
    return open_eval_model(text, survey(open_source(folder)), **options)


def view(subject: EvalModel, folder: Path) -> torch.Tensor:
    return as_float(subject.dataset(open_source(folder))[(0, 0, 1)].views[0])[None]


def test_pixels_are_the_middle_square_normalised(folder: Path) -> None:
    subject = opened("pixels", folder)
    images = view(subject, folder)
    assert images.shape == (1, 3, 24, 24)  # never enlarged
    seen = survey(open_source(folder))
    mean, std = torch.tensor(seen.mean)[:, None, None], torch.tensor(seen.std)[:, None, None]
    expected = ((images - mean) / std).flatten(1)
    assert torch.allclose(subject.features(images, "end")["end/mean"], expected, atol=1e-6)
    raw = np.asarray(Image.open(folder / "1.png"))[:, 8:32] / 255
    assert np.allclose(images[0].permute(1, 2, 0).numpy(), raw, atol=1e-6)


def test_a_run_gives_the_features_of_its_backbone_and_of_blocks_inside(tmp_path: Path, folder: Path) -> None:
    run = str(make_run(tmp_path / "run", model_args={"depth": 4, "embed_dim": 64, "num_heads": 1}).path)
    subject = opened(run, folder)
    assert isinstance(subject, BackboneModel)
    assert (subject.kind, subject.name, subject.results) == ("run", "run", tmp_path / "run")
    images = view(subject, folder)
    assert images.shape == (1, 3, 32, 32)
    model = open_model(run)
    features = model.backbone(model.normalise(images))
    end = subject.features(images, "end")
    assert torch.equal(end["end/mean"], features.pooled)
    assert torch.equal(end["end/token"], features.class_token)
    inside = subject.features(images, "blocks")
    assert set(inside) == {"block2/mean", "block2/token", "block3/mean", "block3/token"}
    second = model.stages(model.normalise(images), [1])[0]
    assert torch.equal(inside["block2/mean"], second.pooled)


def test_keys_tell_models_and_preprocessing_apart_and_nothing_else(tmp_path: Path, folder: Path) -> None:
    run = str(make_run(tmp_path / "run").path)
    plain = opened(run, folder).key()
    assert plain == opened(run, folder).key()
    for options in ({"crop": "whole"}, {"image_size": 16}, {"value_range": "0,100"}):
        assert opened(run, folder, **options).key() != plain
    seeds = [opened("random:resnet10t", folder, seed=seed).key()["weights"] for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]
    pixels = opened("pixels", folder).key()
    assert opened("pixels", folder, crop="whole").key() != pixels
    assert opened("pixels", folder, image_size=8).key()["input_size"] == [3, 8, 8]


def test_fresh_batch_norm_gets_the_statistics_of_the_images(folder: Path) -> None:
    subject = opened("random:resnet10t", folder, image_size=32)
    assert isinstance(subject, BackboneModel)
    norm = subject.opened.module.bn1
    before, key = norm.running_mean.clone(), subject.key()["weights"]
    subject.prepare(open_source(folder), CPU)
    assert not torch.equal(norm.running_mean, before)
    assert subject.key()["weights"] != key  # features depend on the statistics, too


def test_a_run_in_somebody_s_home_has_the_weights_that_were_asked_for(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "folk", method="folk", outputs=16, hidden_size=8, bottleneck_size=4)
    monkeypatch.setenv("HOME", str(tmp_path))
    whole, short = (
        [opened(text, folder, weights=weights).key()["weights"] for weights in ("student", "teacher")]
        for text in (str(run.path), "~/folk")
    )
    assert whole == short
    assert whole[0] != whole[1]
    with pytest.raises(UserError, match=r"weights \(teacher\) can be chosen for a run folder only"):
        opened("~/folk/backbone", folder, weights="teacher")


def test_models_from_outside_see_the_value_range_of_the_images(tmp_path: Path, folder: Path) -> None:
    dark = tmp_path / "dark"
    dark.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(100, 300, (24, 24)).astype(np.uint16)
        Image.fromarray(pixels).save(dark / f"{number}.png")
    fresh = opened("random:resnet10t", dark, image_size=32)
    assert fresh.key()["value_range"] == survey(open_source(dark)).value_range.describe() != "dtype"
    run = opened(str(make_run(tmp_path / "run").path), dark)
    assert run.key()["value_range"] == "dtype"  # its own


def test_models_from_outside_are_made_for_images_of_many_bands(tmp_path: Path, folder: Path) -> None:
    tiles = tmp_path / "tiles"
    tiles.mkdir()
    for number in range(3):
        np.save(tiles / f"{number}.npy", np.random.default_rng(number).random((24, 24, 12), dtype=np.float32))
    seen = survey(open_source(tiles))
    subject = open_eval_model("random:resnet10t", seen, image_size=32)
    assert isinstance(subject, BackboneModel)
    assert subject.opened.input_size == (12, 32, 32)
    assert subject.opened.mean == pytest.approx(tuple(seen.mean))
    assert opened("random:resnet10t", folder, image_size=32).key()["input_size"][0] == 3
    subject.prepare(open_source(tiles), CPU)
    images = as_float(subject.dataset(open_source(tiles))[(0, 0, 1)].views[0])[None]
    assert subject.features(images, "end")["end/mean"].shape[0] == 1


def test_gradients_reach_the_pixels(tmp_path: Path, folder: Path) -> None:
    for text in ("pixels", str(make_run(tmp_path / "run").path)):
        subject = opened(text, folder)
        images = view(subject, folder).requires_grad_(True)
        subject.features(images, "end")["end/mean"].sum().backward()
        assert images.grad is not None and images.grad.abs().sum() > 0


def test_models_are_listed_once_and_one_is_needed(folder: Path) -> None:
    assert EvalConfig(["pixels", Path("a"), "pixels", "a"], data=[]).models == ["pixels", "a"]
    with pytest.raises(UserError, match="MODEL is missing"):
        EvalConfig([], data=[])
    with pytest.raises(UserError, match="model \\(nowhere\\)"):
        opened("nowhere", folder)


def test_what_a_model_is_not_shown_is_told(tmp_path: Path, folder: Path) -> None:
    seen = survey(open_source(folder))  # 40 x 24 pixels
    (cut,) = what_differs(opened("pixels", folder), seen)
    assert cut.startswith("crop center cuts 40% of the area off images of 40x24 pixels")
    assert what_differs(opened("pixels", folder, crop="whole"), seen) == []
    (chosen,) = what_differs(opened("pixels", folder, image_size=16, crop="native"), seen)
    assert "the middle 16x16 of images of 40x24 pixels, at their own resolution; --crop" in chosen
    native = str(make_run(tmp_path / "native", crop="native").path)
    (middle,) = what_differs(opened(native, folder, image_size=16), seen)
    assert (
        "native is shown the middle 16x16 of images of 40x24 pixels, at their own resolution as in its training"
        in middle
    )
    (reduced,) = what_differs(opened(native, folder, image_size=16, crop="whole"), seen)
    assert "trained on windows of 16x16 pixels as they are (crop native)" in reduced
    raw = np.asarray(Image.open(folder / "1.png"))[4:20, 12:28] / 255
    shown = view(opened(native, folder, image_size=16), folder)[0]
    assert np.allclose(shown.permute(1, 2, 0).numpy(), raw, atol=1e-6)  # as it was trained: nothing resampled
    grey = tmp_path / "grey"
    grey.mkdir()
    for number in range(3):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32), dtype=np.uint8)).save(
            grey / f"{number}.png"
        )
    run = str(make_run(tmp_path / "run").path)
    assert what_differs(opened(run, grey), survey(open_source(grey))) == [
        "images of 1 channel(s) are shown to run as 3"
    ]
