"""The cache of features: what it keeps is taken again, and any change of weights, preprocessing or data noticed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from odd_images import missing_for_now
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import make_run
from torch import Tensor

from freqmask.data.cache import cache_folder
from freqmask.data.sources import open_source
from freqmask.data.values import survey
from freqmask.evaluation import features
from freqmask.evaluation.corruptions import Corruption, strengths_for
from freqmask.evaluation.eval_model import EvalModel, open_eval_model
from freqmask.evaluation.features import (
    UNCHANGED,
    ComputeConfig,
    FeatureTable,
    ImageChange,
    compute_features,
    not_finite,
    prune,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder: Path, count: int = 5) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def begun(text: str, folder: Path, **options: Any) -> EvalModel:
    source = open_source(folder)
    subject = open_eval_model(text, survey(source), **options)
    subject.prepare(source, torch.device("cpu"))
    return subject


def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by what is computed rather than taken from the cache."""
    made: list[str] = []
    compute = features._compute

    def noting(subject: EvalModel, *rest: Any) -> FeatureTable:
        made.append(subject.name)
        return compute(subject, *rest)

    monkeypatch.setattr(features, "_compute", noting)
    return made


def test_the_cache_gives_back_what_was_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, run, made = write(tmp_path / "some"), str(make_run(tmp_path / "run").path), computed(monkeypatch)
    (folder / "9.png").write_bytes(b"no image")
    tables = [
        compute_features(begun(run, folder), open_source(folder), "end", ComputeConfig()) for _ in range(2)
    ]
    assert made == ["run"]
    assert tables[0].values.keys() == tables[1].values.keys()
    for name, values in tables[0].values.items():
        assert np.array_equal(values, tables[1].values[name])
    assert tables[1].read.tolist() == [True] * 5 + [False]
    assert tables[0].skipped == tables[1].skipped and tables[0].skipped[0][0] == "9.png"
    assert not tables[0].values["end/mean"][5].any()


def test_an_image_that_could_not_be_read_once_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = write(tmp_path / "some"), computed(monkeypatch)
    subject = begun("pixels", folder)
    with missing_for_now(folder / "3.png"):
        for _ in range(2):
            table = compute_features(subject, open_source(folder), "end", ComputeConfig())
            assert table.read.tolist() == [True, True, True, False, True]
    assert made == ["pixels"]
    for _ in range(2):
        again = compute_features(subject, open_source(folder), "end", ComputeConfig())
        assert again.read.all() and not again.skipped
        assert np.array_equal(again.values["end/mean"][table.read], table.values["end/mean"][table.read])
    assert made == ["pixels", "pixels"]


def test_an_image_of_channels_that_the_model_does_not_take_is_not_tried_again_with_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run, made = write(tmp_path / "some"), str(make_run(tmp_path / "run").path), computed(monkeypatch)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 40, 40), dtype=np.uint8)
    tifffile.imwrite(folder / "bands.tif", pixels, photometric="minisblack")
    subject = begun(run, folder)
    for _ in range(2):
        table = compute_features(subject, open_source(folder), "end", ComputeConfig())
        assert [name for name, _ in table.skipped] == ["bands.tif"]
    assert made == ["run"]


def test_changed_weights_preprocessing_and_data_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = write(tmp_path / "some"), make_run(tmp_path / "run")
    made = computed(monkeypatch)

    def look(what: str = "end", place: ComputeConfig | None = None, **options: Any) -> int:
        subject = begun(str(run.path), folder, **options)
        compute_features(subject, open_source(folder), what, place or ComputeConfig())
        return len(made)

    assert look() == 1
    assert look(crop="whole") == 2
    assert look(value_range="0,100") == 3
    assert look(image_size=16) == 4
    assert look("blocks") == 5
    assert look(place=ComputeConfig(bf16=True)) == 6
    assert look(place=ComputeConfig(batch_size=2)) == 6  # nothing that the features depend on
    file = run.backbone / "model.safetensors"
    weights = load_file(file)
    weights[min(weights)] = weights[min(weights)] + 1e-3
    save_file(weights, file, {"format": "pt"})
    assert look() == 7
    os.utime(folder, (0, 0))  # as one that has not changed for long
    assert look() == 7
    Image.fromarray(np.zeros((33, 41, 3), np.uint8)).save(folder / "2.png")  # as many as before
    os.utime(folder, (0, 0))
    assert look() == 8
    write(folder, 6)
    assert look() == 9
    assert look(place=ComputeConfig(cache=False)) == look(place=ComputeConfig(cache=False)) - 1 == 10


class Half(ImageChange):
    def describe(self) -> str:
        return "half"

    def change(self, images: Tensor) -> Tensor:
        return images / 2


def test_changed_images_and_corruptions_have_features_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "some")
    source, subject, made = open_source(folder), begun("pixels", folder), computed(monkeypatch)
    plain = compute_features(subject, source, "end", ComputeConfig())
    darker = compute_features(subject, source, "end", ComputeConfig(), Half())
    assert not np.array_equal(plain.values["end/mean"], darker.values["end/mean"])
    found = [
        compute_features(
            subject, source, "end", ComputeConfig(), Corruption(name, severity, strengths_for(32))
        ).values["end/mean"]
        for name, severity in (("fog", 1), ("fog", 2), ("snow", 1), ("fog", 1))
    ]
    assert len(made) == 5
    assert np.array_equal(found[0], found[3])
    assert not any(np.array_equal(found[0], other) for other in (found[1], found[2]))


def test_features_do_not_depend_on_batches_or_workers(tmp_path: Path) -> None:
    folder = write(tmp_path / "some")
    subject = begun(str(make_run(tmp_path / "run").path), folder)
    for change in (UNCHANGED, Corruption("spatter", 4, strengths_for(32))):
        places = [
            ComputeConfig(cache=False, batch_size=5),
            ComputeConfig(cache=False, batch_size=2, workers=1),
        ]
        one, other = (
            compute_features(subject, open_source(folder), "end", place, change) for place in places
        )
        for name, values in one.values.items():
            assert np.allclose(values, other.values[name], atol=1e-5)


def test_rows_that_are_not_finite_are_counted() -> None:
    values = np.ones((4, 3), np.float32)
    values[1, 2], values[3, 0] = np.nan, np.inf
    assert not_finite(values) == 2


def test_the_oldest_features_go_first(tmp_path: Path) -> None:
    folder = cache_folder()
    folder.mkdir(parents=True)
    for age, name in enumerate(("new", "old", "oldest")):
        file = folder / f"features-{name}.bin"
        file.write_bytes(bytes(100))
        os.utime(file, (1_000_000 - age, 1_000_000 - age))
    (folder / "index-other.bin").write_bytes(bytes(1000))
    prune(most=250)
    assert sorted(file.name for file in folder.iterdir()) == [
        "features-new.bin", "features-old.bin", "index-other.bin",
    ]  # fmt: skip
    prune(most=0)
    assert (folder / "features-new.bin").is_file()  # what was just written stays
