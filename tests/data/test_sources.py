"""What a user may type for DATA, and what is said when it names nothing."""

import shutil
import sys
import types
import unicodedata

import numpy as np
import pytest
from PIL import Image

import freqmask
from freqmask.data.source import JoinedSource, Subset
from freqmask.data.sources import BuiltinDigits, open_source, splits_there
from freqmask.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("cat/1.png", "cat/2.png", "dog/1.png")):
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (number, 0, 0)).save(path)
    return tmp_path / "pets"


@pytest.fixture
def module(monkeypatch):
    made = types.ModuleType("mylab_sources")
    made.Digits, made.ready, made.number = BuiltinDigits, BuiltinDigits(16), 3
    monkeypatch.setitem(sys.modules, "mylab_sources", made)


@pytest.mark.parametrize(("name", "size"), [("Digits", 32), ("ready", 16)])
def test_an_import_path_names_a_source_or_what_returns_one(module, name, size):
    assert open_source(f"mylab_sources:{name}").open(0).size == (size, size)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("builtin:photo", "did you mean 'builtin:photos'"),
        ("no_such_module_here:name", "neither a folder nor importable"),
        ("mylab_sources:Digit", "did you mean 'Digits'"),
        ("mylab_sources:number", "must be a freqmask.data.sources.Source"),
        ([], "at least one"),
    ],
)
def test_what_names_nothing_is_refused_with_a_way_out(module, data, words):
    with pytest.raises(UserError, match=words) as raised:
        open_source(data)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", [np.zeros((4, 8, 8, 3)), [np.zeros((8, 8))], 3.0])
def test_what_is_no_path_and_no_word_is_called_by_its_type(data):
    with pytest.raises(
        UserError, match=r"DATA must be paths, words such as builtin:photos, or a Source, not"
    ):
        open_source(data)
    with pytest.raises(UserError, match="or a Source, not"):
        freqmask.pretrain(data)
    with pytest.raises(UserError, match="or a Source, not"):
        freqmask.evaluate.knn("pixels", data=data)


def test_a_missing_path_names_its_nearest_neighbour(folder):
    with pytest.raises(UserError, match=r"does not exist; did you mean '.*/pets'\?"):
        open_source(folder.parent / "pet")
    with pytest.raises(UserError, match=r"did you mean '.*/pets'\?"):
        open_source(folder.parent / "pest" / "cat")
    (folder.parent / "Ann's photos").mkdir()
    with pytest.raises(UserError, match=r"did you mean \".*/Ann's photos\"\?"):
        open_source(folder.parent / "Anns photos")
    with pytest.raises(UserError, match="holds nothing of a similar name"):
        open_source(folder / "zzzzzz")


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("*/*.png", "3 paths"), ("c?t/[0-1].png", "1 path"), ("{cat,dog}/1.png", "2 paths"), ("d**", "1 path")],
)
def test_a_pattern_that_no_shell_expanded_is_called_one(folder, pattern, count):
    with pytest.raises(UserError, match=rf"does not exist; quotes kept .* matches {count}; .* glob\.glob"):
        open_source(folder / pattern)
    with pytest.raises(UserError, match="holds nothing of a similar name"):
        open_source(folder / "zzz*.jpg")


def test_image_files_may_be_named_one_by_one(folder, monkeypatch):
    one = open_source(folder / "cat" / "2.png")
    assert (len(one), one.name(0), one.class_names) == (1, "2.png", None)
    assert one.open(0).decode()[:, 0, 0].tolist() == [1, 0, 0]
    monkeypatch.chdir(folder.parent)
    several = open_source(["pets/dog/1.png", "pets/cat/2.png", "pets/dog/1.png"])
    names = [several.name(index) for index in range(len(several))]
    assert names == ["cat/2.png", "dog/1.png"]
    assert several.class_names == ["cat", "dog"]
    (folder / "cat").rename(folder / "train")
    (folder / "dog").rename(folder / "val")  # files of both were asked for by name
    assert len(open_source([str(file) for file in folder.glob("*/*.png")])) == 3
    assert splits_there("pets/train/1.png") == []


def test_every_image_file_that_is_named_is_read(folder, monkeypatch):
    """In a folder these are passed over: masks, what is hidden, what photo managers leave, what freqmask wrote."""
    names = {"cat/1_mask.png", "cat/.a.png", ".tmp/b.png", "@eaDir/c.png", "run/plan.png", "cat/1.png"}
    for name in names - {"cat/1.png"}:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "cat" / "1.png", folder / name)
    for name in ("config.yaml", "metrics.csv", "run.json"):
        (folder / "run" / name).touch()
    monkeypatch.chdir(folder / "cat")
    several = open_source([f"../{name}" if not name.startswith("cat/") else name[4:] for name in names])
    assert {several.name(index) for index in range(len(several))} == names


def test_a_file_that_is_none_of_these_is_refused(folder):
    (folder / "list.txt").write_text("cat/1.png")
    with pytest.raises(UserError, match=r"list.txt\) must be a folder, an image, a .tar"):
        open_source(folder / "list.txt")


def test_pages_is_channels_or_images(folder):
    with pytest.raises(UserError, match=r"pages \(image\).*did you mean 'images'"):
        open_source(folder, pages="image")


def test_joined_sources_share_classes_by_name(folder):
    other = folder.parent / "more"
    for name in ("bird/1.png", "cat/1.png"):
        (other / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 6), (9, 0, 0)).save(other / name)
    joined = open_source([folder, str(other), "builtin:photos"])
    assert isinstance(joined, JoinedSource) and len(joined) == 3 + 2 + 2048
    assert joined.class_names == ["bird", "cat", "dog"]
    assert [joined.label(index) for index in range(6)] == [1, 1, 2, 0, 1, None]
    assert joined.all_labels()[:6].tolist() == [1, 1, 2, 0, 1, -1]
    assert joined.open(3).decode()[0, 0, 0] == 9 and joined.open(5).size == (128, 128)
    names = [joined.name(index) for index in range(len(joined))]
    assert len(set(names)) == len(joined)
    assert len({joined.identity(index) for index in range(len(joined))}) == len(joined)
    assert joined.group(2) is None and joined.group(5) == "astronaut"
    assert joined.summary().kind == "2 × folder, built-in photographs" and joined.summary().found == 2053
    with pytest.raises(IndexError):
        joined.open(len(joined))


def test_one_source_in_a_list_is_that_source(folder):
    assert open_source([folder]).name(0) == "cat/1.png"


def test_a_subset_keeps_names_identities_and_labels(folder):
    whole = open_source(folder)
    part = Subset(whole, np.array([2, 0]))
    assert [part.name(index) for index in range(2)] == ["dog/1.png", "cat/1.png"]
    assert part.identity(0) == whole.identity(2) and part.all_labels().tolist() == [1, 0]
    assert (part.summary().found, part.summary().used) == (3, 2)
    assert part.fingerprint() not in (
        whole.fingerprint(),
        Subset(whole, np.array([0, 2])).fingerprint(),
    )


def write_table(folder, text, encoding="utf-8"):
    path = folder.parent / "labels.csv"
    path.write_text(text, encoding)
    return path


def test_labels_come_from_a_table(folder):
    table = write_table(folder, "path,label,group\ncat/2.png,sick,p1\n./dog/1.png,well,p2\n")
    source = open_source(folder, labels=table)
    assert [source.name(index) for index in range(2)] == ["cat/2.png", "dog/1.png"]
    assert source.class_names == ["sick", "well"] and source.all_labels().tolist() == [0, 1]
    assert [source.group(index) for index in range(2)] == ["p1", "p2"]
    assert source.summary().notes == ["1 images that labels.csv does not list are left out."]


def test_a_table_may_be_a_spreadsheets(folder):
    text = f"Path;Label\r\ncat\\1.png;10\r\n{folder / 'dog' / '1.png'};9\r\n"
    source = open_source(folder, labels=write_table(folder, text, "utf-8-sig"))
    assert source.class_names == ["9", "10"] and [source.label(index) for index in range(2)] == [1, 0]


def test_a_table_may_name_splits(folder):
    table = write_table(folder, "path,label,split\ncat/1.png,a,train\ncat/2.png,b,train\ndog/1.png,a,test\n")
    source = open_source(folder, labels=table)
    assert len(source) == 2 and "Only train is used, not test" in source.summary().notes[0]
    assert open_source(folder, split="test", labels=table).name(0) == "dog/1.png"
    assert len(open_source(folder, split="all", labels=table)) == 3


def test_splits_and_labels_that_only_look_alike_are_one(folder):
    """In another case, or with an accent as a letter of its own; an empty split is said."""
    text = "\npath,label,split\ncat/1.png,caf\u00e9,Train\ncat/2.png,cafe\u0301,train\ndog/1.png,b,\n"
    source = open_source(folder, labels=write_table(folder, text), split="train")
    assert source.class_names == [unicodedata.normalize("NFC", "cafe\u0301")]
    assert source.all_labels().tolist() == [0, 0]
    assert source.summary().notes == ["1 images of labels.csv have no split and are left out."]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "path,label\ncat/1.pnk,a\n",
            r"names 1 image that DATA lacks \(first 'cat/1.pnk'\); did you mean 'cat/1.png'",
        ),
        ("path,label\ncat/1.png,a\ncat/1.png,b\n", "twice"),
        ("file,label\ncat/1.png,a\n", "path is missing"),
        ("path,label\n", "lists no images"),
        ("path,label,split\ncat/1.png,black, white,train\n", r"line 2 than columns \(last 'train'\).*quotes"),
        ("\n\nsep=;\npath;label\ncat/1.png;a;b\n", r"line 5 than columns \(last 'b'\)"),
        ("path,label,label\ncat/1.png,a,b\n", "one column label, it has 2"),
        ("", "path and label are missing; the file is empty"),
    ],
)
def test_a_wrong_table_is_refused(folder, text, words):
    with pytest.raises(UserError, match=words):
        open_source(folder, labels=write_table(folder, text))


def test_a_missing_table_is_refused(folder):
    with pytest.raises(UserError, match=r"labels \(.*none.csv\) cannot be read"):
        open_source(folder, labels=folder / "none.csv")


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        *((name, open_source) for name in ("x.npz", "x.npy", "x.tar", "x.parquet", "folder", "set")),
        *((name, splits_there) for name in ("x.npz", "x.tar", "folder", "set")),  # the others are not opened
    ],
)
def test_what_may_not_be_read_is_a_sentence(tmp_path, monkeypatch, name, opening):
    def refused(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    if name == "set":
        (tmp_path / name).mkdir()
        (tmp_path / name / "shards.index").write_bytes(b"x")
        monkeypatch.setattr("pathlib.Path.open", refused)
    elif name == "folder":
        (tmp_path / name).mkdir()
        monkeypatch.setattr("pathlib.Path.is_file", refused)  # as stat is in a folder without its x
    else:
        (tmp_path / name).write_bytes(b"x")
        monkeypatch.setattr("pathlib.Path.open", refused)
        monkeypatch.setattr("zipfile.ZipFile", refused)
        monkeypatch.setattr("numpy.load", refused)
    with pytest.raises(UserError, match=rf"DATA \(.*{name}.*\) may not be read: no permission"):
        opening(tmp_path / name)


def test_the_splits_there_are_can_be_asked_for(folder):
    assert splits_there(folder) == [] == splits_there("builtin:digits") == splits_there(BuiltinDigits())
    for name in ("val", "train"):
        (folder.parent / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(folder.parent / "data" / name / "1.png")
    assert splits_there(folder.parent / "data") == ["train", "val"]
    np.savez(folder.parent / "x.npz", test_images=np.zeros((2, 8, 8)), train_images=np.zeros((2, 8, 8)))
    assert splits_there(folder.parent / "x.npz") == ["test", "train"]
    table = write_table(folder, "path,label,split\ncat/1.png,a,fold2\ncat/2.png,b,fold1\n")
    assert splits_there(folder, table) == ["fold1", "fold2"]
