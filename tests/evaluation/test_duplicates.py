"""Identical images are found by their pixels, whatever they are called and wherever they lie."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_images import missing_for_now
from PIL import Image
from tiny_runs import make_run

from freqmask.data.sources import Source, open_source
from freqmask.evaluation import eval_model, labelled
from freqmask.evaluation.eval_model import seen_in_training
from freqmask.evaluation.labelled import pixel_hashes


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder: Path, *seeds: int, suffix: str = "png") -> Path:
    folder.mkdir(exist_ok=True)
    for seed in seeds:
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.{suffix}")
    return folder


def test_pixels_count_and_neither_names_nor_formats(tmp_path: Path) -> None:
    first = pixel_hashes(open_source(write(tmp_path / "one", 0, 1, 2)))
    assert len(set(first)) == 3
    other = write(tmp_path / "other", 1, suffix="bmp")
    assert pixel_hashes(open_source(other)) == first[1:2]


def test_size_and_one_pixel_make_a_difference(tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    flat = np.zeros((6, 4, 3), np.uint8)
    for name, image in {"tall": flat, "wide": flat.transpose(1, 0, 2)}.items():
        Image.fromarray(image).save(folder / f"{name}.png")
    touched = flat.copy()
    touched[0, 0, 0] = 1
    Image.fromarray(touched).save(folder / "touched.png")
    assert len(set(pixel_hashes(open_source(folder)))) == 3


def test_unreadable_images_are_no_twins_of_each_other(tmp_path: Path) -> None:
    folder = write(tmp_path / "some", 0)
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(b"no image")
    assert len(set(pixel_hashes(open_source(folder)))) == 3


def test_large_jpegs_that_differ_in_what_is_fine_are_no_twins(tmp_path: Path) -> None:
    stripes = np.repeat(np.tile(np.uint8([100, 140]), 320)[None, :, None], 640, axis=0).repeat(3, axis=2)
    for name, image in {"columns": stripes, "rows": stripes.transpose(1, 0, 2)}.items():
        Image.fromarray(image).save(tmp_path / f"{name}.jpg", quality=95)
    (tmp_path / "copy.jpg").write_bytes((tmp_path / "rows.jpg").read_bytes())
    columns, copy, rows = pixel_hashes(source := open_source(tmp_path))
    assert [source.name(index) for index in range(3)] == ["columns.jpg", "copy.jpg", "rows.jpg"]
    assert columns != copy == rows


def test_an_image_that_could_not_be_read_once_is_read_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "some", 0, 1)
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes())
    with missing_for_now(folder / "2.png"):
        before = pixel_hashes(open_source(folder))
        assert len(set(before)) == 3 and before == pixel_hashes(open_source(folder))
    after = pixel_hashes(open_source(folder))
    assert after == [*before[:2], before[1]]


def test_some_images_are_those_of_all(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "some", *range(5)))
    assert pixel_hashes(source, [3, 1]) == [pixel_hashes(source)[3], pixel_hashes(source)[1]]


def test_hashes_are_cached_until_the_images_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "some", 0, 1)
    before = pixel_hashes(open_source(folder))
    reading = labelled._pixel_hash
    monkeypatch.setattr(labelled, "_pixel_hash", lambda *_: pytest.fail("read again"))
    assert pixel_hashes(open_source(folder)) == before
    monkeypatch.setattr(labelled, "_pixel_hash", reading)
    write(folder, 2)
    assert pixel_hashes(open_source(folder))[:2] == before
    os.utime(folder, (0, 0))  # as one that has not changed for long
    before = pixel_hashes(open_source(folder))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "1.png")  # under its name
    os.utime(folder, (0, 0))
    after = pixel_hashes(open_source(folder))
    assert [one == other for one, other in zip(after, before, strict=True)] == [True, False, True]


def trained_on(source: Source, folder: Path, **options: Any) -> Path:
    """A run that says of which images it is."""
    run = make_run(folder, **options)
    run.write_state(run.state() | {"data": source.fingerprint()})
    return run.path


def test_test_images_of_a_pretraining_are_counted(tmp_path: Path) -> None:
    trained = write(tmp_path / "trained", *range(40))
    run = trained_on(open_source(trained), tmp_path / "run", data=[str(trained)], overfit=40)
    source = open_source(write(tmp_path / "new", 3, 4, 100, 101, 102))
    assert "pre-trained on 2 of the 5 test images" in seen_in_training(run, source, np.arange(5))
    names = [source.name(index) for index in range(5)]
    fresh = np.array([names.index("100.png"), names.index("101.png")])
    assert "pre-trained on 0 of the 2" in seen_in_training(run, source, fresh)


def test_another_folder_of_the_same_relative_path_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    source = open_source(write(tmp_path / "here" / "pics", *range(4)))
    write(tmp_path / "there" / "pics", *range(10, 14))
    run = trained_on(source, tmp_path / "run", data=["pics"], overfit=4)
    for folder, words in (
        ("here", "pre-trained on 4 of the 4"),
        ("there", "are not those that this path leads to from here"),
    ):
        monkeypatch.chdir(tmp_path / folder)
        assert words in seen_in_training(run, source, np.arange(4))


def test_images_that_have_changed_since_are_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "pics", *range(4))
    source = open_source(folder)
    run = trained_on(source, tmp_path / "run", data=[str(folder)], overfit=5)
    write(folder, 9)
    assert "are others now than they were; 4 of the 4" in seen_in_training(run, source, np.arange(4))


def test_images_held_out_of_the_pretraining_do_not_count(tmp_path: Path) -> None:
    from freqmask.data.splits import hold_out

    trained = open_source(write(tmp_path / "trained", *range(60)))
    run = trained_on(trained, tmp_path / "run", data=[str(tmp_path / "trained")], seed=0)
    held = hold_out(trained, seed=0)[1]
    assert len(held)
    assert "pre-trained on 0 of" in seen_in_training(run, trained, np.asarray(held))
    everything = seen_in_training(run, trained, np.arange(60))
    assert f"pre-trained on {60 - len(held)} of the 60" in everything


def test_images_that_are_gone_or_too_many_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write(tmp_path / "new", 0, 1))
    run = make_run(tmp_path / "run").path
    assert "no longer there" in seen_in_training(run, source, np.arange(2))
    many = make_run(tmp_path / "many", data=[str(tmp_path / "new")]).path
    monkeypatch.setattr(eval_model, "MOST_COMPARED", 1)
    assert "too many to be compared" in seen_in_training(many, source, np.arange(2))
