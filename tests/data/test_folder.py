"""Folders as people have them: flat, nested, with classes, with splits, with what else lies around."""

import os
import pickle
import shutil

import numpy as np
import pytest
import tifffile
from PIL import Image

from freqmask.data import decode, image_folder, sources
from freqmask.data import index as folder_index
from freqmask.data.sources import Subset, open_source
from freqmask.errors import BadImage, UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def plant(root, *names):
    """One-coloured images of 6×8 pixels; anything without an image's suffix gets a line of text."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg"):
            Image.new("RGB", (8, 6), (number, 2 * number, 0)).save(path)
        else:
            path.write_text("text")


def names_of(source):
    return [source.name(index) for index in range(len(source))]


def labels_of(source):
    return [source.label(index) for index in range(len(source))]


def test_a_flat_folder_has_no_labels(tmp_path):
    plant(tmp_path, "a.png", "b.png")
    source = open_source(tmp_path)
    assert names_of(source) == ["a.png", "b.png"]
    assert labels_of(source) == [None, None] and source.class_names is None
    assert source.all_labels().tolist() == [-1, -1]
    picture = source.open(1)
    assert picture.size == (6, 8) and picture.decode()[:, 0, 0].tolist() == [1, 2, 0]


def test_folders_of_images_are_classes_at_any_depth_below(tmp_path):
    plant(tmp_path, "dog/1.png", "cat/2019/1.png", "cat/2020/1.png", "empty/readme.txt")
    source = open_source(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert labels_of(source) == [0, 0, 1] == source.all_labels().tolist()


@pytest.mark.parametrize("names", [["2019/a.png", "2020/b.png", "c.png"], ["all/a.png", "all/b.png"]])
def test_folders_beside_images_and_a_single_folder_are_no_classes(tmp_path, names):
    plant(tmp_path, *names)
    assert open_source(tmp_path).class_names is None


def test_train_beside_val_is_used_alone_and_said(tmp_path):
    plant(tmp_path, "train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "val/dog/2.png")
    source = open_source(tmp_path)
    assert names_of(source) == ["train/cat/1.png", "train/dog/1.png"]
    assert labels_of(source) == [0, 1]
    assert any("Only train" in note and "val" in note for note in source.summary().notes)
    held_out = open_source(tmp_path, split="val")
    assert names_of(held_out) == ["val/cat/2.png", "val/dog/2.png"] and labels_of(held_out) == [0, 1]
    everything = open_source(tmp_path, split="all")
    assert len(everything) == 4 and everything.class_names == ["cat", "dog"]
    assert labels_of(everything) == [0, 1, 0, 1] and not everything.summary().notes


def test_a_split_that_is_not_there_names_those_that_are(tmp_path):
    plant(tmp_path, "train/1.png", "val/1.png")
    with pytest.raises(UserError, match=r"split \(vale\).*did you mean 'val'"):
        open_source(tmp_path, split="vale")


def test_train_alone_changes_nothing(tmp_path):
    plant(tmp_path, "train/cat/1.png", "train/dog/1.png")
    source = open_source(tmp_path)
    assert source.class_names == ["cat", "dog"] and not source.summary().notes


def test_unread_files_are_counted_with_the_extra_that_reads_them(tmp_path, monkeypatch):
    heif_free = frozenset(suffix for suffix in decode.read_suffixes() if "hei" not in suffix)
    for module in (decode, image_folder, sources):
        monkeypatch.setattr(module, "read_suffixes", lambda: heif_free)
    plant(tmp_path, "a.png", "b.heic", "c.HEIC", "d.txt")
    summary = open_source(tmp_path).summary()
    assert summary.found == 1 and summary.ignored == {".heic": 2, ".txt": 1}
    assert summary.notes == ["2 .heic files are not read; pip install 'freqmask[data]' reads them."]
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"only files that are not read \(2 .heic.*pip install 'freqmask"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "holds no images"),
        (["a.txt", "b.txt"], r"only files that are not read \(2 .txt\)"),
        (["one/a.tar"], "name the folder that holds the .tar files"),
    ],
)
def test_a_folder_without_images_is_refused(tmp_path, names, words):
    (tmp_path / "data").mkdir()
    plant(tmp_path / "data", *names)
    with pytest.raises(UserError, match=words):
        open_source(tmp_path / "data")


def test_bad_files_are_found_when_opened_not_before(tmp_path):
    plant(tmp_path, "good.png", "empty.png", "folder/text.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder/text.png").write_text("no image")
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "gone.tif").symlink_to(tmp_path / "away.tif")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    np.save(tmp_path / "one.npy", np.zeros(3))
    source = open_source(tmp_path)
    reasons = {}
    for index in range(len(source)):
        try:
            source.open(index).decode()
        except BadImage as bad:
            reasons[source.name(index)] = bad.reason
    assert reasons == {
        "broken.png": "it is a link to a file that is gone",
        "empty.png": "the file is empty",
        "folder/text.png": "its content is not an image of any known format",
        "gone.tif": "it is a link to a file that is gone",
        "loop.png": "it is a link that leads to itself",
        "one.npy": "an array of 3 is no image (height×width or height×width×channels)",
    }


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_said(tmp_path):
    plant(tmp_path, "a.png", "shut/b.png")
    (tmp_path / "a.png").chmod(0)
    (tmp_path / "shut").chmod(0)
    source = open_source(tmp_path)
    (tmp_path / "shut").chmod(0o700)
    with pytest.raises(BadImage, match="no permission"):
        source.open(0)
    assert any("shut" in note for note in source.summary().notes)


def test_a_folder_that_was_shut_for_a_while_is_read_once_it_is_open(tmp_path, monkeypatch):
    """Its times are those of before: to be opened again changes none."""
    plant(tmp_path, "a.png", "shut/b.png")
    for folder in (tmp_path / "shut", tmp_path):
        os.utime(folder, (1e9, 1e9))  # long enough ago for the index to be believed
    scan = os.scandir

    def refuse(path):
        if os.fsencode(path).endswith(b"shut"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    written, write = [], folder_index.write_arrays
    monkeypatch.setattr(folder_index, "write_arrays", lambda *given: written.append(given) or write(*given))
    with monkeypatch.context() as locked:
        locked.setattr(os, "scandir", refuse)
        for _ in range(2):
            assert len(open_source(tmp_path)) == 1
            assert len(written) == 1  # the second time nothing has changed
            notes = open_source(tmp_path).summary().notes
            assert "1 folders may not be opened and are left out (shut)." in notes
    assert len(open_source(tmp_path)) == 2
    assert open_source(tmp_path).summary().notes == []


def test_no_permission_in_words(tmp_path, monkeypatch):
    plant(tmp_path, "a.png")
    source = open_source(tmp_path)

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(BadImage, match="no permission to read it"):
        source.open(0)


def test_names_identities_and_fingerprint_stay_when_the_folder_moves(tmp_path):
    odd = ["two words.png", "写真.png", "new\nline.png", os.fsdecode(b"latin-\xe9.png")]
    plant(tmp_path / "here", *odd)
    before = open_source(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    after = open_source(tmp_path / "there")
    assert names_of(before) == names_of(after) and set(names_of(after)) == set(odd)
    identities = [after.identity(index) for index in range(4)]
    assert identities == [before.identity(index) for index in range(4)] and len(set(identities)) == 4
    assert before.fingerprint() == after.fingerprint()
    assert all(after.open(index).decode().shape == (3, 6, 8) for index in range(4))


def test_pages_of_tiffs_are_images_of_their_own_when_asked(tmp_path, monkeypatch):
    for name, pages in (("a.tif", 3), ("b.tif", 1), ("c.tif", 2)):
        stack = np.stack([np.full((4, 5), 10 * pages + k, np.uint16) for k in range(pages)])
        tifffile.imwrite(tmp_path / name, stack, photometric="minisblack")
    source = open_source(tmp_path, pages="images")
    assert names_of(source) == ["a.tif#0", "a.tif#1", "a.tif#2", "b.tif", "c.tif#0", "c.tif#1"]
    assert [int(source.open(index).decode()[0, 0, 0]) for index in range(6)] == [30, 31, 32, 10, 20, 21]
    assert len({source.identity(index) for index in range(6)}) == 6
    assert [open_source(tmp_path).open(index).channels for index in range(3)] == [3, 1, 2]
    (tmp_path / "b.tif").write_bytes(b"II*\0")  # a broken one counts for an image, too
    names = names_of(open_source(tmp_path, pages="images"))
    monkeypatch.setattr(image_folder, "count_images", None)  # not counted twice
    assert names_of(open_source(tmp_path, pages="images")) == names == names_of(source)


def test_a_folder_of_npy_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 9000, (20, 31, 12), np.uint16)
    np.save(tmp_path / "last.npy", pixels)
    np.save(tmp_path / "first.npy", pixels.transpose(2, 0, 1))
    np.save(tmp_path / "grey.npy", pixels[..., 0])
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    source = open_source(tmp_path)
    for index in (0, 2):
        part = source.open(index).decode((1, 2, 3, 4))
        np.testing.assert_array_equal(part, pixels.transpose(2, 0, 1)[:, 1:4, 2:6])
    np.testing.assert_array_equal(source.open(1).decode()[0], pixels[..., 0])
    with pytest.raises(BadImage, match="no plain numpy array"):
        source.open(3)


def test_a_source_travels_to_workers(tmp_path):
    plant(tmp_path, "cat/a.png", "dog/b.png")
    source = open_source(tmp_path)
    copy = pickle.loads(pickle.dumps(source))
    assert names_of(copy) == names_of(source) and labels_of(copy) == [0, 1]
    np.testing.assert_array_equal(copy.open(1).decode(), source.open(1).decode())


@pytest.mark.parametrize("split", ["auto", "all"])
@pytest.mark.parametrize("pages", ["channels", "images"])
def test_the_identities_of_all_images_are_those_of_each(tmp_path, split, pages):
    plant(tmp_path, "train/a/1.png", "train/b/ü.png", "train/b/c/2.png", "val/a/3.png", "val/b/4.png")
    Image.new("RGB", (8, 6)).save(os.fsencode(tmp_path) + b"/train/a/\xfc.png")
    source = open_source(tmp_path, pages, split)
    assert len(source) == {"auto": 4, "all": 6}[split]
    alone = [source.identity(index) for index in range(len(source))]
    assert (
        source.identities().tolist() == alone == Subset(source, np.arange(len(source))).identities().tolist()
    )


def test_a_class_has_one_name_however_a_system_writes_its_accents(tmp_path):
    plant(tmp_path, "train/caf\u00e9/1.png", "train/tea/2.png", "test/cafe\u0301/3.png", "test/tea/4.png")
    source = open_source(tmp_path, split="all")
    assert source.class_names == ["caf\u00e9", "tea"]
    labels = dict(zip(names_of(source), labels_of(source), strict=True))
    assert labels["test/cafe\u0301/3.png"] == labels["train/caf\u00e9/1.png"] == 0
