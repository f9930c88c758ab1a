"""Stacks of images in numpy files."""

import os
import pickle

import numpy as np
import pytest
from sklearn.preprocessing import LabelEncoder

from freqmask.data.sources import open_source
from freqmask.errors import UserError

GENERATOR = np.random.default_rng(0)


def stack(*shape, dtype=np.uint16):
    return GENERATOR.integers(0, 255, shape).astype(dtype)


@pytest.mark.parametrize("channels", [(), (1,), (3,), (12,)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_a_stack_is_its_images(tmp_path, channels, dtype):
    images = stack(4, 20, 24, *channels, dtype=dtype)
    np.save(tmp_path / "x.npy", images)
    source = open_source(tmp_path / "x.npy")
    planes = images.reshape(4, 20, 24, -1).transpose(0, 3, 1, 2)
    picture = source.open(2)
    assert len(source) == 4 and picture.size == (20, 24) and picture.dtype == np.dtype(dtype).name
    np.testing.assert_array_equal(picture.decode(), planes[2])
    np.testing.assert_array_equal(picture.decode((1, 2, 5, 6)), planes[2][:, 1:6, 2:8])
    assert source.label(0) is None and source.name(3) == "3"


def test_channels_may_come_first(tmp_path):
    images = stack(4, 12, 20, 24)
    np.save(tmp_path / "x.npy", images)
    np.testing.assert_array_equal(open_source(tmp_path / "x.npy").open(1).decode(), images[1])


def test_decoded_pixels_are_ones_own(tmp_path):
    images = stack(2, 20, 24)
    np.save(tmp_path / "x.npy", images)
    source = open_source(tmp_path / "x.npy")
    source.open(0).decode()[:] = 0
    np.testing.assert_array_equal(source.open(0).decode()[0], images[0])


@pytest.fixture
def medmnist(tmp_path):
    parts = {"train": 6, "val": 2, "test": 3}
    arrays = {f"{name}_images": stack(count, 28, 28, dtype=np.uint8) for name, count in parts.items()}
    arrays |= {f"{name}_labels": GENERATOR.integers(0, 5, (count, 1)) for name, count in parts.items()}
    np.savez(tmp_path / "medmnist.npz", **arrays)
    return tmp_path / "medmnist.npz", arrays


def test_an_npz_with_splits_uses_train_and_says_so(medmnist):
    path, arrays = medmnist
    source = open_source(path)
    assert len(source) == 6 and source.summary().notes[0].startswith("Only train is used, not test and val")
    assert source.all_labels().tolist() == arrays["train_labels"].ravel().tolist()
    np.testing.assert_array_equal(source.open(5).decode()[0], arrays["train_images"][5])
    test = open_source(path, split="test")
    np.testing.assert_array_equal(test.open(2).decode()[0], arrays["test_images"][2])
    assert source.identity(0) != test.identity(0)
    everything = open_source(path, split="all")
    assert len(everything) == 11
    np.testing.assert_array_equal(everything.open(7).decode()[0], arrays["val_images"][1])
    assert everything.label(8) == int(arrays["test_labels"][0, 0])


def test_labels_that_are_ids_are_classes_by_their_order(tmp_path):
    ids = np.array([7_000_000_000, 12, 7_000_000_000, 400_123], np.uint64)
    np.savez(tmp_path / "x.npz", images=stack(4, 8, 8), labels=ids)
    source = open_source(tmp_path / "x.npz")
    values, numbers = np.unique(ids, return_inverse=True)
    assert source.class_names == [str(value) for value in values]
    assert source.all_labels().tolist() == numbers.tolist()


@pytest.mark.parametrize(
    "labels",
    [
        np.array([2.0, 0.0, 1.0, 0.0]),
        np.array([b"newt", b"ant", "für".encode(), b"ant"]),
        np.array([1, 0, 2, 0]),
    ],
    ids=["as pandas' to_numpy has them", "as h5py has them", "whole"],
)
def test_labels_are_classes_whatever_type_writers_give_them(tmp_path, labels):
    np.savez(tmp_path / "x.npz", images=stack(4, 8, 8), labels=labels)
    source = open_source(tmp_path / "x.npz")
    assert source.all_labels().tolist() == LabelEncoder().fit_transform(labels).tolist()
    first = {np.float64: "2", np.bytes_: "newt", np.int64: "1"}[type(labels[0])]
    assert source.class_names is not None and source.class_names[source.label(0)] == first
    assert not source.summary().notes


def test_a_label_that_is_missing_is_none_and_fractions_are_no_classes(tmp_path):
    np.savez(tmp_path / "x.npz", images=stack(3, 8, 8), labels=np.array([1, np.nan, 0]))
    assert open_source(tmp_path / "x.npz").all_labels().tolist() == [1, -1, 0]
    np.savez(tmp_path / "x.npz", images=stack(3, 8, 8), labels=np.array([1, 0.5, 0]))
    source = open_source(tmp_path / "x.npz")
    assert source.class_names is None and "left out" in source.summary().notes[0]


def test_labels_of_several_columns_are_left_out_and_said(tmp_path):
    np.savez(tmp_path / "x.npz", images=stack(3, 28, 28), labels=np.ones((3, 14), int))
    source = open_source(tmp_path / "x.npz")
    assert source.label(0) is None and "left out" in source.summary().notes[0]


def test_an_array_source_travels_without_its_pixels(medmnist, tmp_path):
    np.save(tmp_path / "x.npy", stack(50, 40, 40))
    for path in (medmnist[0], tmp_path / "x.npy"):
        source = open_source(path)
        sent = pickle.dumps(source)
        assert len(sent) < 3000
        np.testing.assert_array_equal(pickle.loads(sent).open(1).decode(), source.open(1).decode())


def test_the_fingerprint_changes_with_the_images(tmp_path):
    images = stack(5, 20, 20)
    np.save(tmp_path / "x.npy", images)
    before = open_source(tmp_path / "x.npy").fingerprint()
    assert open_source(tmp_path / "x.npy").fingerprint() == before
    np.save(tmp_path / "x.npy", images[:4])
    assert open_source(tmp_path / "x.npy").fingerprint() != before


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pixels": np.zeros((3, 8, 8))}, "named images or x"),
        ({"images": np.zeros(8)}, "it holds images of 1"),
    ],
)
def test_an_npz_without_images_is_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=words):
        open_source(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "labels", [np.array(3), np.zeros(0, int), np.zeros((5, 0), int), np.zeros((5, 2), int)]
)
def test_labels_of_a_shape_that_fits_no_images_are_left_out_and_said(tmp_path, labels):
    np.savez(tmp_path / "x.npz", images=stack(5, 8, 8), labels=labels)
    source = open_source(tmp_path / "x.npz")
    assert source.class_names is None and "are left out" in source.notes[-1]


def test_a_split_without_images_beside_another_costs_nothing(tmp_path):
    np.savez(tmp_path / "x.npz", train_images=stack(0, 8, 8), test_images=stack(5, 8, 8))
    source = open_source(tmp_path / "x.npz", split="all")
    assert len(source) == 5 and len(source.fingerprint()) == 16


@pytest.mark.parametrize("shape", [(8, 8), (0, 8, 8), (2, 2, 2, 2, 2)])
def test_an_npy_that_is_no_stack_is_refused(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros(shape))
    with pytest.raises(UserError, match=r"must be numbers of the shape|holds no images"):
        open_source(tmp_path / "x.npy")


class Runs:
    """Would run code when unpickled."""

    def __reduce__(self):
        return pytest.fail, ("code from the file ran",)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_file_that_would_run_code_is_refused(tmp_path, suffix):
    objects = np.empty((2, 3, 3), object)
    objects[:] = Runs()
    path = tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(path, objects, allow_pickle=True)
    else:
        np.savez(path, images=objects)
    with pytest.raises(UserError, match="plain numpy array"):
        open_source(path)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_damaged_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(b"not numpy at all")
    with pytest.raises(UserError, match=r"plain numpy array|damaged"):
        open_source(path)


@pytest.mark.parametrize("change", ["cut", "rewritten"])
def test_a_mapped_file_that_changes_is_a_sentence_and_not_the_end_of_the_process(tmp_path, change):
    path = tmp_path / "x.npy"
    np.save(path, stack(40, 64, 64))
    source = open_source(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:200] if change == "cut" else whole[::-1])
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match=r"x\.npy.* was changed while it was being read"):
        source.open(39).decode()


def test_an_array_without_labels_beside_one_with_them_has_none(tmp_path):
    labels = np.array([2, -1, 0])
    np.savez(tmp_path / "x.npz", x_train=stack(3, 8, 8), y_train=labels, x_test=stack(2, 8, 8))
    source = open_source(tmp_path / "x.npz", split="all")
    assert source.all_labels().tolist() == [2, -1, 0, -1, -1] and source.class_names == ["0", "1", "2"]
    np.savez(tmp_path / "y.npz", images=stack(3, 8, 8), labels=np.full(3, -1))
    assert open_source(tmp_path / "y.npz").class_names is None
    np.savez(tmp_path / "z.npz", images=stack(3, 8, 8), labels=np.array(["dog", "cat", "dog"]))
    source = open_source(tmp_path / "z.npz")
    assert source.class_names == ["cat", "dog"] and source.all_labels().tolist() == [1, 0, 1]
