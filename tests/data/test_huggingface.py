"""Hugging Face datasets, from a copy on the disk and by name."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from freqmask.data.sources import open_source, splits_there
from freqmask.errors import BadImage, UserError

datasets = pytest.importorskip("datasets", reason="hf: needs datasets (freqmask[data])")


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def made(count=4, first=0, label=None):
    images = [{"bytes": png(first + k), "path": None} for k in range(count)]
    kinds = {"photo": datasets.Image(), "label": label or datasets.ClassLabel(names=["cat", "dog"])}
    labels = [["cat", "dog"][k % 2] if label else k % 2 for k in range(count)]
    return datasets.Dataset.from_dict({"photo": images, "label": labels}, features=datasets.Features(kinds))


def reds(source):
    return [int(source.open(k).decode()[0, 0, 0]) for k in range(len(source))]


@pytest.fixture
def saved(tmp_path):
    """A copy with two splits."""
    datasets.DatasetDict(train=made(4), test=made(3, 10)).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_copy_gives_images_labels_and_splits(saved):
    assert splits_there(saved) == ["test", "train"]
    source = open_source(saved)
    assert reds(source) == [0, 1, 2, 3] and source.class_names == ["cat", "dog"]
    assert source.all_labels().tolist() == [0, 1, 0, 1] and source.label(3) == 1
    assert source.name(2) == "train-2" and "Only train is used" in source.summary().notes[0]
    assert reds(open_source(saved, split="test")) == [10, 11, 12]
    assert len(open_source(saved, split="all")) == 7
    with pytest.raises(IndexError):
        source.open(4)


def test_one_split_alone_needs_no_name(tmp_path):
    made().save_to_disk(tmp_path / "one")
    source = open_source(tmp_path / "one")
    assert splits_there(tmp_path / "one") == [] and source.name(1) == "1"
    assert reds(pickle.loads(pickle.dumps(source))) == [0, 1, 2, 3]


def test_a_moved_copy_is_the_same_data(saved, tmp_path):
    before = open_source(saved).fingerprint()
    saved.rename(tmp_path / "moved")
    assert open_source(tmp_path / "moved").fingerprint() == before
    assert open_source(tmp_path / "moved", split="test").fingerprint() != before


def test_images_stay_the_files_they_were(saved):
    assert open_source(saved).encoded(1) == (png(1), ".png")


def test_text_labels_become_classes(tmp_path):
    made(label=datasets.Value("string")).save_to_disk(tmp_path / "one")
    source = open_source(tmp_path / "one")
    assert source.class_names == ["cat", "dog"] and source.all_labels().tolist() == [0, 1, 0, 1]


def test_images_named_by_path_are_read_from_there(tmp_path):
    (tmp_path / "1.png").write_bytes(png(7))
    cells = [{"bytes": None, "path": str(tmp_path / name)} for name in ("1.png", "gone.png")]
    kinds = datasets.Features({"image": datasets.Image()})
    one = datasets.Dataset.from_dict({"image": cells}, features=kinds)
    from freqmask.data.parquet import HuggingFaceSource

    source = HuggingFaceSource(one, "", "here")
    assert source.open(0).decode()[0, 0, 0] == 7 and source.label(0) is None
    with pytest.raises(BadImage, match="gone"):
        source.open(1)


def test_a_name_on_the_hub_is_loaded_by_name_and_config(monkeypatch):
    asked = []

    def load(*words):
        asked.append(words)
        return datasets.DatasetDict(train=made(), test=made(2))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert np.array_equal(reds(open_source("hf:someone/photos:small", split="test")), [0, 1])
    assert asked == [("someone/photos", "small")]


def test_what_cannot_be_fetched_is_a_sentence(monkeypatch):
    def fail(*words):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"hf:a/b\) cannot be opened \(no route\)"):
        open_source("hf:a/b")


def test_a_dataset_without_images_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match="column of images"):
        open_source(tmp_path / "one")


def test_a_damaged_copy_is_a_sentence(saved):
    (saved / "train" / "data-00000-of-00001.arrow").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be opened"):
        open_source(saved)
