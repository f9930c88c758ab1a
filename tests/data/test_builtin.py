"""Built-in images: there without a network, the same on every machine."""

import pickle

import numpy as np

from freqmask.data.sources import PHOTOGRAPHS, BuiltinPhotos, open_source


def test_photos_are_many_different_cut_outs_of_photographs():
    source = open_source("builtin:photos")
    assert len(source) == 2048
    pictures = [source.open(index).decode() for index in range(0, 2048, 61)]
    assert all(picture.shape == (3, 128, 128) and picture.dtype == np.uint8 for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    assert np.mean([picture.std() for picture in pictures]) > 20  # photographs, not flat colour


def test_photos_are_the_same_for_the_same_seed():
    first, again, other = BuiltinPhotos(), pickle.loads(pickle.dumps(BuiltinPhotos())), BuiltinPhotos(seed=1)
    np.testing.assert_array_equal(first.open(9).decode(), again.open(9).decode())
    assert (first.open(9).decode() != other.open(9).decode()).any()
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_photos_lie_inside_their_photograph_at_every_draw():
    source = BuiltinPhotos(count=len(PHOTOGRAPHS), size=300)
    for corner in (0.0, 1 - 2**-24):
        source.windows[:] = corner
        shapes = {source.open(index).decode().shape for index in range(len(source))}
        assert shapes == {(3, 300, 300)}


def test_photos_keep_cut_outs_of_a_photograph_in_one_group():
    source = open_source("builtin:photos")
    assert source.group(3) == source.group(3 + len(PHOTOGRAPHS)) != source.group(4)
    assert source.label(3) is None


def test_digits_are_labelled_and_enlarged():
    from sklearn.datasets import load_digits

    source, digits = open_source("builtin:digits"), load_digits()
    assert len(source) == 1797 and source.class_names == [str(digit) for digit in range(10)]
    assert [source.label(index) for index in range(20)] == digits.target[:20].tolist()
    assert source.all_labels().tolist() == digits.target.tolist()
    picture = source.open(7).decode()
    assert picture.shape == (1, 32, 32) and picture.dtype == np.uint8
    reduced = picture[0].reshape(8, 4, 8, 4).mean((1, 3))
    assert np.corrcoef(reduced.ravel(), digits.images[7].ravel())[0, 1] > 0.97


def test_no_cut_out_is_empty() -> None:
    photos = BuiltinPhotos()
    retina = next(place for place, name in enumerate(PHOTOGRAPHS) if "retina" in name)  # black in its corners
    for number in range(retina, len(photos), len(PHOTOGRAPHS)):
        assert photos.open(number).decode().std() > 0


def test_a_run_of_0_1_0_finds_the_images_by_the_name_that_it_recorded():
    digits = open_source("freqmask.data.builtin:BuiltinDigits")
    assert digits.fingerprint() == open_source("builtin:digits").fingerprint()
