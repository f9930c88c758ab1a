"""Folders as they come: from Kaggle, from a NAS, unpacked twice, with masks, with what we wrote ourselves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from freqmask.data.sources import open_source, splits_there
from freqmask.data.splits import split_of
from freqmask.errors import UserError
from freqmask.training.files import replace_atomically
from freqmask.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def photographs(root: Path, *folders: str, count: int = 3, suffix: str = ".jpg") -> None:
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            pixels = np.random.default_rng([number, k]).integers(0, 256, (32, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{k}{suffix}")


def masks(root: Path, folder: str, ending: str = "", count: int = 3) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for k in range(count):
        labels = np.random.default_rng(k).integers(0, 4, (4, 5), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(labels).save(root / folder / f"{k}{ending}.png")


def names_of(data: Path, **options: Any) -> list[str]:
    source = open_source(data, **options)
    return [source.name(index) for index in range(len(source))]


def notes_of(data: Path) -> str:
    return " ".join(open_source(data).summary().notes)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training_set", "test_set"),
        ("trainset", "testset"),
        ("train_images", "test_images"),
        ("Training", "Testing"),
        ("train2017", "val2017"),
        ("TrainData", "ValData"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("archive/data/train", "archive/data/test"),
        ("images/train", "images/val"),
    ],
)
def test_splits_are_found_under_the_names_and_folders_they_come_in(
    tmp_path: Path, train: str, test: str
) -> None:
    photographs(tmp_path, *(f"{part}/{name}" for part in (train, test) for name in ("cat", "dog")))
    source = open_source(tmp_path)
    assert source.class_names == ["cat", "dog"] and len(source) == 6
    assert all(source.name(index).startswith(train) for index in range(6))
    assert {split_of(name) for name in splits_there(tmp_path)} == {"train", split_of(test.split("/")[-1])}
    everything = open_source(tmp_path, split="all")
    assert everything.class_names == ["cat", "dog"] and len(everything) == 12


@pytest.mark.parametrize(
    "name", ["train_station", "test tube", "val_thorens", "trainers", "Developed", "data", "set"]
)
def test_a_class_that_sounds_like_a_split_is_none(name: str) -> None:
    assert split_of(name) is None


@pytest.mark.parametrize("wrapping", ["dataset", "Images", "a/b/c"])
def test_classes_are_found_below_folders_that_wrap_everything(tmp_path: Path, wrapping: str) -> None:
    photographs(tmp_path, f"{wrapping}/cat", f"{wrapping}/dog")
    (tmp_path / "Annotation").mkdir()
    (tmp_path / "Annotation/list.xml").write_text("<xml/>")
    source = open_source(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert source.all_labels().tolist() == [0, 0, 0, 1, 1, 1]


def test_a_class_named_test_beside_others_is_a_class(tmp_path: Path) -> None:
    photographs(tmp_path, "apple", "pear", "test")
    assert splits_there(tmp_path) == []
    assert open_source(tmp_path).class_names == ["apple", "pear", "test"]
    assert len(names_of(tmp_path, split="test")) == 3  # who asks for it by name gets it


@pytest.mark.parametrize("root", ["", "set/"])
def test_splits_below_each_class_are_all_used_and_said(tmp_path: Path, root: str) -> None:
    photographs(
        tmp_path,
        *(f"{root}{one}/{part}" for one in ("bottle", "cable") for part in ("train/good", "test/bad")),
    )
    source = open_source(tmp_path)
    assert source.class_names == ["bottle", "cable"] and len(source) == 12
    assert (
        source.summary().notes[0].startswith("test and train lie in folders side by side, and all are used")
    )
    assert not open_source(tmp_path / root / "cable", split="train").summary().notes


def test_a_flat_val_leaves_train_its_classes(tmp_path: Path) -> None:
    photographs(tmp_path, "train/cat", "train/dog", "val")
    assert open_source(tmp_path).class_names == ["cat", "dog"]
    assert open_source(tmp_path, split="all").all_labels().tolist().count(-1) == 3
    flat = open_source(tmp_path, split="val")
    assert flat.class_names is None and "not in a folder a class" in flat.why_unlabelled


def test_images_beside_class_folders_are_named(tmp_path: Path) -> None:
    photographs(tmp_path, "cat", "dog")
    shutil.copy(tmp_path / "cat/0.jpg", tmp_path / "loose.jpg")
    source = open_source(tmp_path)
    assert source.class_names is None
    assert "'loose.jpg') lie beside the class folders (cat, dog)" in source.why_unlabelled


@pytest.mark.parametrize(
    "junk",
    ["@eaDir", "cat/@eaDir/0.jpg", "__MACOSX/cat", "lost+found", "$RECYCLE.BIN", ".thumbnails", "#recycle"],
)
def test_what_systems_leave_is_not_read(tmp_path: Path, junk: str) -> None:
    photographs(tmp_path, "cat", "dog", junk)
    (tmp_path / "cat/Thumbs.db").write_bytes(b"x")
    (tmp_path / "cat/._0.jpg").write_bytes(b"x")
    source = open_source(tmp_path)
    assert len(source) == 6 and source.class_names == ["cat", "dog"] and not source.summary().ignored


@pytest.mark.parametrize(
    ("images", "beside"),
    [
        ("images", "masks"),
        ("images", "labels"),
        ("JPEGImages", "SegmentationClass"),
        ("leftImg8bit", "gtFine"),
        ("train", "train_masks"),
        ("train", "trainannot"),
        ("imagesTr", "labelsTr"),
        ("train/images", "train/masks"),
        ("scans", "labels"),
    ],
)
def test_masks_beside_images_are_not_read(tmp_path: Path, images: str, beside: str) -> None:
    photographs(tmp_path, images)
    masks(tmp_path, beside)
    assert names_of(tmp_path) == [f"{images}/{k}.jpg" for k in range(3)]
    assert f"{beside} holds masks of {images}" in notes_of(tmp_path)


@pytest.mark.parametrize("ending", ["", "_mask", "_seg", "_L", "-label"])
def test_masks_among_images_are_not_read(tmp_path: Path, ending: str) -> None:
    photographs(tmp_path, "scans")
    masks(tmp_path, "scans", ending)
    assert names_of(tmp_path) == [f"scans/{k}.jpg" for k in range(3)]
    assert "3 masks beside their images" in notes_of(tmp_path)


def test_train_below_images_is_used_and_the_masks_are_not(tmp_path: Path) -> None:
    photographs(tmp_path, "images/train", "images/test")
    masks(tmp_path, "masks/train")
    masks(tmp_path, "masks/test")
    assert names_of(tmp_path) == [f"images/train/{k}.jpg" for k in range(3)]


@pytest.mark.parametrize(("one", "other"), [("mask", "no_mask"), ("face", "face_mask"), ("labels", "boxes")])
def test_classes_of_photographs_that_sound_like_masks_stay(tmp_path: Path, one: str, other: str) -> None:
    photographs(tmp_path, one, other)
    assert open_source(tmp_path).class_names == sorted([one, other])


@pytest.mark.parametrize("where", ["runs/mfm-1", "experiment", "cat/here"])
@pytest.mark.parametrize("planned_only", [True, False])
def test_a_run_inside_its_data_is_never_read(tmp_path: Path, where: str, planned_only: bool) -> None:
    photographs(tmp_path, "cat", "dog")
    before = open_source(tmp_path)
    run = RunFolder(tmp_path / where)
    run.lock()
    run.begin({"method": "mfm"}, {}, "a run")
    for path in (run.path / "plan.png", run.previews / "step-000500.png"):
        replace_atomically(path, lambda file: Image.new("RGB", (8, 8)).save(file, "PNG"))
    if planned_only:
        (run.path / "config.yaml").unlink()
        (run.path / "run.json").unlink()
    run.unlock()
    after = open_source(tmp_path)
    assert len(after) == 6 and after.class_names == ["cat", "dog"]
    assert after.fingerprint() == before.fingerprint()
    assert f"What freqmask wrote here itself is passed over ({where})" in notes_of(tmp_path)


def test_a_run_beside_its_images_reads_them_and_none_of_its_pictures(tmp_path: Path) -> None:
    """``--out .`` in the folder of photographs, then evaluate and embed."""
    photographs(tmp_path, ".")
    run = RunFolder(tmp_path)
    run.lock()
    run.begin({"method": "mfm"}, {}, "a run")
    pictures = ("plan.png", "previews/1.png", "knn.png", "embeddings.neighbours.png")
    for name in pictures:
        replace_atomically(tmp_path / name, lambda file: Image.new("RGB", (8, 8)).save(file, "PNG"))
    run.unlock()
    assert names_of(tmp_path) == ["0.jpg", "1.jpg", "2.jpg"]


def test_pictures_and_features_written_among_images_are_not_read(tmp_path: Path) -> None:
    photographs(tmp_path, ".")
    for name in ("reconstruction.png", "knn.png"):
        replace_atomically(tmp_path / name, lambda file: Image.new("RGB", (8, 8)).save(file, "PNG"))
    assert names_of(tmp_path) == ["0.jpg", "1.jpg", "2.jpg"]
    assert "(knn.png, reconstruction.png)" in notes_of(tmp_path)


def test_a_folder_of_nothing_but_our_pictures_can_be_named(tmp_path: Path) -> None:
    replace_atomically(tmp_path / "a.png", lambda file: Image.new("RGB", (8, 8)).save(file, "PNG"))
    assert names_of(tmp_path) == ["a.png"]


def test_a_folder_that_holds_only_a_run_has_no_images(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs/a")
    run.begin({}, {}, "a run")
    photographs(run.previews, ".")
    with pytest.raises(UserError, match="nothing but what freqmask wrote itself"):
        open_source(tmp_path)
