"""Tar shards read by their index: found, labelled, split and refused like a folder."""

import io
import json
import os
import pickle
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import PureWindowsPath

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from freqmask.data import shards as shards_module
from freqmask.data.cache import cache_folder, read_arrays, write_arrays
from freqmask.data.loader import TrainDataset, TrainSampler, make_loader
from freqmask.data.shards import (
    SCHEMA,
    Row,
    ShardIndex,
    ShardRows,
    ShardSource,
    find_index,
    make_index,
    pack_rows,
)
from freqmask.data.sources import open_source, splits_there
from freqmask.data.splits import hold_out
from freqmask.data.storage import INDEX_NAME, expand_braces, files_of, is_pattern
from freqmask.data.transforms import Geometry
from freqmask.errors import BadImage, UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def png(number):
    file = io.BytesIO()
    image = Image.new("RGB", (8, 6), (number, 0, 0))
    image.putpixel((7, 5), (255, 255, 255))
    image.save(file, "PNG")
    return file.getvalue()


def pack(path, members):
    """A tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(numbers, label=lambda n: n % 2):
    for number in numbers:
        yield f"{number:04d}.png", png(number)
        yield f"{number:04d}.cls", str(label(number)).encode()


def reds(source):
    return [int(source.open(index).decode()[0, 0, 0]) for index in range(len(source))]


def test_a_folder_of_shards_gives_images_labels_and_names(tmp_path):
    pack(tmp_path / "shards-000.tar", samples(range(3)))
    pack(tmp_path / "shards-001.tar", samples(range(3, 5)))
    source = open_source(tmp_path)
    assert reds(source) == [0, 1, 2, 3, 4]
    assert source.class_names == ["0", "1"] and source.all_labels().tolist() == [0, 1, 0, 1, 0]
    assert source.name(3) == "shards-001/0003.png" and source.label(3) == 1
    assert source.summary().kind == "2 shards"
    with pytest.raises(IndexError):
        source.open(5)


def test_headers_are_read_once(tmp_path, monkeypatch):
    pack(tmp_path / "a.tar", samples(range(3)))
    first = open_source(tmp_path / "a.tar")
    monkeypatch.setattr(shards_module, "read_headers", None)
    again = open_source(tmp_path / "a.tar")
    assert reds(again) == [0, 1, 2] and again.fingerprint() == first.fingerprint()
    assert reds(pickle.loads(pickle.dumps(again))) == [0, 1, 2]
    assert len(pickle.dumps(again)) < 2000  # the arrays travel as the name of their file


def test_a_changed_shard_is_read_anew(tmp_path):
    pack(tmp_path / "a.tar", samples(range(3)))
    before = open_source(tmp_path)
    pack(tmp_path / "a.tar", samples(range(9)))
    after = open_source(tmp_path)
    assert len(after) == 9 and after.fingerprint() != before.fingerprint()


@pytest.mark.parametrize(
    "pattern", ["s-{001..002}.tar", "s-00[12].tar", "s-{001,002}.tar", "{s-001,s-002}.tar"]
)
def test_a_pattern_names_some_shards(tmp_path, pattern):
    for number in range(4):
        pack(tmp_path / f"s-{number:03d}.tar", samples([number]))
    assert reds(open_source(str(tmp_path / pattern))) == [1, 2]


class _WindowsPath(PureWindowsPath):
    """A path as Windows has it, of files that are there where they are looked for."""

    def expanduser(self):
        return self

    def is_dir(self):
        return False

    def is_file(self):
        return not is_pattern(str(self))

    def glob(self, pattern):
        assert not PureWindowsPath(pattern).anchor  # pathlib refuses those
        return [self / pattern.replace("*", "7")]


@pytest.mark.parametrize(
    ("text", "root", "names"),
    [
        (r"C:\data\train\s-*.tar", r"C:\data\train", ["s-7.tar"]),
        ("C:/data/*/s-{0..1}.tar", r"C:\data", ["7/s-0.tar", "7/s-1.tar"]),
        ("C:/s-*.tar", "C:\\", ["s-7.tar"]),
        (r"data\s-*.tar", "data", ["s-7.tar"]),
        ("s-*.tar", ".", ["s-7.tar"]),
        (r"\\server\share\set\s-*.tar", r"\\server\share\set", ["s-7.tar"]),
    ],
)
def test_a_pattern_may_have_a_drive_and_backslashes(text, root, names, monkeypatch):
    monkeypatch.setattr("freqmask.data.storage.Path", _WindowsPath)
    files, found = files_of(text)
    assert (files.where, found) == (root, names)


def test_braces_count_with_their_zeros():
    assert expand_braces("a-{8..10}") == ["a-8", "a-9", "a-10"]
    assert expand_braces("a-{08..10}-{0..1}")[-1] == "a-10-1"


def test_identity_stays_when_shards_move_and_others_come(tmp_path):
    pack(tmp_path / "a" / "s-001.tar", samples(range(3)))
    pack(tmp_path / "b" / "c" / "s-001.tar", samples(range(3)))
    pack(tmp_path / "b" / "c" / "s-000.tar", samples(range(3)))
    one, other = open_source(tmp_path / "a"), open_source(tmp_path / "b" / "c")
    assert [one.identity(k) for k in range(3)] == [other.identity(k + 3) for k in range(3)]
    assert len({other.identity(k) for k in range(6)}) == 6


def test_json_tells_label_group_and_name(tmp_path):
    facts = {"label": "cat", "group": "patient 7", "name": "a/b.png"}
    members = [("0.json", json.dumps(facts).encode()), ("0.png", png(0)), ("1.png", png(1)), ("1.json", b"{")]
    source = open_source(pack(tmp_path / "s.tar", members))
    assert source.class_names == ["cat"] and source.all_labels().tolist() == [0, -1]
    assert (source.group(0), source.group(1)) == ("patient 7", None)
    assert [source.name(0), source.name(1)] == ["a/b.png", "1.png"]


def test_labels_that_stand_apart_from_their_images_are_said(tmp_path):
    members = [("0.png", png(0)), ("1.png", png(1)), ("0.cls", b"3"), ("1.cls", b"7")]
    source = open_source(pack(tmp_path / "s.tar", members))
    assert (len(source), source.class_names) == (2, None)
    assert source.summary().notes == [
        "2 labels of s.tar are left out, not standing beside their images (tar --sort=name)."
    ]


def test_a_packed_folder_has_its_folders_as_classes(tmp_path):
    names = ["./dog/IMG.1.png", "./dog/IMG.2.png", "./cat/x.png", "./cat/._x.png", "./cat/notes.txt"]
    source = open_source(pack(tmp_path / "s.tar", [(n, png(k)) for k, n in enumerate(names)]))
    assert len(source) == 3 and source.class_names == ["cat", "dog"]
    assert source.all_labels().tolist() == [1, 1, 0] and source.summary().ignored == {".txt": 1}


@pytest.mark.parametrize(
    ("folders", "classes", "notes"),
    [
        (["photos/dog", "photos/cat"], ["cat", "dog"], 0),  # tar cf photos.tar photos
        (["./my/photos/dog", "./my/photos/cat/deep"], ["cat", "dog"], 0),
        (["/data/set/train/dog", "/data/set/train/cat"], ["cat", "dog"], 0),
        (["set/train/dog", "set/val/cat"], ["cat", "dog"], 1),
        (["train/images/dog", "test/images/cat"], ["cat", "dog"], 1),
        (["train/dog", "test/dog"], None, 1),
        (["train", "test"], None, 1),
        (["photos/dog", "photos/dog"], None, 0),
        (["photos", "photos/dog"], None, 0),
    ],
)
def test_a_packed_folder_has_the_classes_of_a_folder(tmp_path, folders, classes, notes):
    names = [f"{folder}/{number}.png" for number, folder in enumerate(folders)]
    source = open_source(pack(tmp_path / "s.tar", [(n, png(k)) for k, n in enumerate(names)]))
    assert source.class_names == classes
    assert source.all_labels().tolist() == ([1, 0] if classes else [-1, -1])
    told = source.summary().notes
    assert len(told) == notes and all("lie side by side in the shards, and all are used" in n for n in told)


@pytest.mark.parametrize("far", [False, True])
def test_what_a_mac_leaves_beside_shards_and_tables_is_none_of_them(tmp_path, far):
    pack(tmp_path / "tars" / "a.tar", [("0.png", png(4))])
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"image": [png(5)]}), tmp_path / "tables" / "a.parquet")
    for name in ("tars/._a.tar", "tables/._a.parquet"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7" * 1000)
    root = str(tmp_path)
    if far:
        root = f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").put(f"{tmp_path}/", f"/{tmp_path.name}/", recursive=True)
    for name, red in (("tars/*.tar", 4), ("tars", 4), ("tables/*.parquet", 5), ("tables", 5)):
        assert reds(open_source(f"{root}/{name}")) == [red]


@pytest.mark.parametrize("far", [False, True])
def test_a_hard_link_is_the_image_that_it_names(tmp_path, far):
    (tmp_path / "set").mkdir()
    for number in range(3):
        (tmp_path / "set" / f"{number}.png").write_bytes(png(number))
    (tmp_path / "set" / "0.cls").write_text("cat")
    (tmp_path / "set" / "3.png").hardlink_to(tmp_path / "set" / "1.png")
    (tmp_path / "set" / "3.cls").hardlink_to(tmp_path / "set" / "0.cls")
    (tmp_path / "set" / "4.png").hardlink_to(tmp_path / "set" / "2.png")
    (tmp_path / "set" / "5.png").symlink_to("2.png")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "set", "set")  # its files by their names, one whose bytes it has already as a link
        assert sum(info.islnk() for info in tar) == 3
    source = open_source(f"file://{tmp_path / 's.tar'}" if far else tmp_path / "s.tar")
    assert [source.name(k) for k in range(5)] == [f"s/set/{k}.png" for k in range(5)]
    assert reds(source) == reds(source) == [0, 1, 2, 1, 2]
    assert source.all_labels().tolist() == [0, -1, -1, 0, -1]
    assert source.summary().ignored == {".png": 1}


def test_masks_beside_images_are_not_images(tmp_path):
    members = [("0.depth.png", png(9)), ("0.png", png(0)), ("1.png", png(1)), ("1.mask.png", png(9))]
    source = open_source(pack(tmp_path / "s.tar", members))
    assert reds(source) == [0, 1] and "first is read" in source.summary().notes[0]


@pytest.mark.parametrize("names", [("train/0.tar", "val/0.tar"), ("x-train-0.tar", "x-val-0.tar")])
def test_train_beside_val_is_used_and_said(tmp_path, names):
    pack(tmp_path / names[0], samples(range(3)))
    pack(tmp_path / names[1], samples(range(3, 5)))
    assert splits_there(tmp_path) == ["train", "val"]
    auto = open_source(tmp_path)
    assert reds(auto) == [0, 1, 2] and "Only train is used" in auto.summary().notes[0]
    assert reds(open_source(tmp_path, split="val")) == [3, 4]
    assert reds(open_source(tmp_path, split="all")) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="split"):
        open_source(tmp_path, split="dev-7")


@pytest.mark.parametrize("prepared", [False, True])
def test_a_shard_of_val_that_is_named_is_read(tmp_path, prepared):
    pack(tmp_path / "train-0.tar", samples(range(3)))
    val = pack(tmp_path / "val-0.tar", samples(range(3, 5)))
    if prepared:
        find_index(*files_of(str(tmp_path)), "here").save(tmp_path / INDEX_NAME)
    source = open_source(val)
    assert reds(source) == [3, 4] and not source.summary().notes
    assert splits_there(val) == ["val"]
    assert reds(open_source(str(tmp_path / "{train,val}-0.tar"))) == [0, 1, 2]


@pytest.mark.parametrize(
    "name", ["photos.tar.gz", "photos.tgz", "photos.zip", "s-{0..3}.tar.gz", "https://x.y/a.tgz"]
)
def test_what_is_packed_as_a_whole_is_refused_with_its_program(tmp_path, name):
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as packed:
        packed.add(__file__)
    program = "unzip" if name.endswith("zip") else "gunzip"
    with pytest.raises(UserError, match=rf"compressed.* unpack it with {program} .*freqmask prepare"):
        open_source(name if "//" in name else str(tmp_path / name))
    with pytest.raises(UserError, match=r"\(1 .gz\); unpack them with gunzip"):
        open_source(tmp_path)


def test_held_out_images_stay_where_they_are(tmp_path):
    pack(tmp_path / "s-0.tar", samples(range(40)))
    train, held_out = hold_out(open_source(tmp_path), 0.2)
    assert len(held_out) == 8 and sorted([*train, *held_out]) == list(range(40))


def test_a_table_of_labels_names_members(tmp_path):
    pack(tmp_path / "s.tar", samples(range(3)))
    (tmp_path / "labels.csv").write_text("path,label\ns/0001.png,frog\ns/0000.png,newt\n")
    source = open_source(tmp_path, labels=tmp_path / "labels.csv")
    assert reds(source) == [1, 0] and source.class_names == ["frog", "newt"]


def test_workers_read_shards(tmp_path):
    pack(tmp_path / "s.tar", samples(range(1, 9)))
    dataset = TrainDataset(open_source(tmp_path), [Geometry(4, crop="whole")])
    batches = list(make_loader(dataset, TrainSampler(8, 0, 4, total_steps=2), 4, workers=1))
    assert sorted(np.concatenate([batch["indices"] for batch in batches])) == list(range(8))
    assert [batch["skipped"] for batch in batches] == [[], []]


@pytest.mark.parametrize("damage", ["cut", "compressed", "text", "missing", "empty"])
def test_a_bad_shard_is_a_sentence(tmp_path, damage):
    tar = pack(tmp_path / "s-000.tar", samples(range(30)))
    if damage == "cut":
        tar.write_bytes(tar.read_bytes()[:20_000])
    if damage == "text":
        tar.write_bytes(b"no tar" * 1000)
    if damage == "compressed":
        with tarfile.open(tar, "w:gz") as packed:
            packed.add(__file__)
    if damage == "empty":
        pack(tar, [("notes.txt", b"x")])
    with pytest.raises(UserError, match=r"s-00|holds no images"):
        open_source(str(tmp_path / "s-{000..001}.tar") if damage == "missing" else tmp_path)


def indexed(folder, count=4):
    """Shards with our own index beside them."""
    sizes, shards = {}, []
    for shard in range(2):
        tar = pack(folder / f"s-{shard}.tar", samples(range(shard * count, (shard + 1) * count)))
        index = find_index(*files_of(str(tar)), str(tar))
        rows = [
            Row(
                index.text("members", k),
                int(index.arrays["offsets"][k]),
                int(index.arrays["sizes"][k]),
                "cat",
                name=f"old/{shard}/{k}",
            )
            for k in range(count)
        ]
        sizes[tar] = tar.stat().st_size
        shards.append(ShardRows(tar.name, sizes[tar], None, pack_rows(rows)))
    make_index(shards, ["ant", "cat"]).save(folder / INDEX_NAME)
    return folder


def test_an_index_beside_the_shards_decides(tmp_path, monkeypatch):
    indexed(tmp_path)
    monkeypatch.setattr(shards_module, "read_headers", None)
    source = open_source(tmp_path)
    assert reds(source) == list(range(8)) and source.class_names == ["ant", "cat"]
    assert source.name(5) == "old/1/1" and source.label(5) == 1
    assert reds(open_source(tmp_path / "s-1.tar")) == [4, 5, 6, 7]


def test_a_shard_that_an_index_does_not_list_is_said(tmp_path):
    indexed(tmp_path)
    assert open_source(tmp_path).summary().notes == []
    pack(tmp_path / "more.tar", samples([8, 9]))
    source = open_source(tmp_path)
    assert reds(source) == list(range(8))
    assert source.summary().notes == [
        "1 shard (such as more.tar) that shards.index does not list: not read; delete shards.index to have it made "
        "anew."
    ]
    assert open_source(tmp_path / "s-0.tar").summary().notes == []
    (tmp_path / INDEX_NAME).unlink()
    assert sorted(reds(open_source(tmp_path))) == list(range(10))


@pytest.mark.parametrize("damage", ["gone", "other", "index", "older"])
def test_an_index_that_does_not_fit_is_refused(tmp_path, damage):
    indexed(tmp_path)
    if damage == "gone":
        (tmp_path / "s-1.tar").unlink()
    if damage == "other":
        pack(tmp_path / "s-1.tar", samples(range(50)))
    if damage == "index":
        (tmp_path / INDEX_NAME).write_bytes(b"x" * 100)
    if damage == "older":
        about, arrays = read_arrays(tmp_path / INDEX_NAME)
        write_arrays(tmp_path / INDEX_NAME, about | {"version": 0}, arrays)
    with pytest.raises(UserError, match="fetch it"):
        open_source(tmp_path)
    if damage == "gone":
        assert reds(open_source(str(tmp_path / "s-[0].tar"))) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("about", "arrays"),
    [
        ({"shards": None}, {}),
        ({"shards": []}, {}),
        ({"shards": [[1]]}, {}),
        ({"shards": [["s-0.tar", float("inf"), None], ["s-1.tar", 1, None]]}, {}),
        ({"class_names": ["ant"]}, {}),
        ({"class_names": None}, {}),
        ({"group_names": 3}, {}),
        ({"notes": None}, {}),
        ({"ignored": [1]}, {}),
        ({}, {"starts": np.zeros(0, np.int64)}),
        ({}, {"offsets": np.zeros(3, np.int64)}),
        ({}, {"sizes": np.zeros((8, 1), np.int64)}),
        ({}, {"labels": np.zeros(8)}),
        ({}, {"groups": np.zeros(8, np.int32)}),
        ({}, {"names_ends": np.zeros(2, np.int64)}),
    ],
)
def test_an_index_of_something_else_is_refused_however_whole(tmp_path, about, arrays):
    right_about, right_arrays = read_arrays(indexed(tmp_path) / INDEX_NAME)
    for key in about:
        write_arrays(tmp_path / INDEX_NAME, {k: v for k, v in right_about.items() if k != key}, right_arrays)
        with pytest.raises(UserError, match="fetch it again"):
            open_source(tmp_path)
    write_arrays(tmp_path / INDEX_NAME, right_about | about, right_arrays | arrays)
    with pytest.raises(UserError, match="fetch it again"):
        open_source(tmp_path)


def test_an_index_that_is_replaced_before_a_worker_opens_it_is_a_sentence(tmp_path):
    source = open_source(indexed(tmp_path))
    sent = pickle.dumps(source)
    assert reds(pickle.loads(sent)) == list(range(8)) and len(sent) < 3000
    (tmp_path / "other").write_bytes(b"x" * 100)
    (tmp_path / "other").replace(tmp_path / INDEX_NAME)
    with pytest.raises(UserError, match="was replaced while workers started; start again"):
        pickle.loads(sent)
    assert (
        len(pickle.loads(pickle.dumps(source)).index) == 8
    )  # it is known to be another: the index travels whole


def test_a_million_images_have_their_labels_at_once(tmp_path):
    rows = pa.table({
        field.name: pa.array(range(10**6), field.type)
        if field.name in ("offset", "size")
        else pa.array([b"a.png"] * 10**6 if field.name == "member" else [None] * 10**6, field.type)
        for field in SCHEMA
    })  # fmt: skip
    labels = np.array(["ant", "cat"])[np.arange(10**6) % 2]
    for index in (make_index([ShardRows("a.tar", 9, None, rows)], labels=pa.chunked_array([labels])),
                  make_index([ShardRows("a.tar", 9, None, rows)])):  # fmt: skip
        source, began = ShardSource(files_of(str(tmp_path))[0], index), time.process_time()
        told = source.all_labels()
        assert time.process_time() - began < 0.1  # a loop takes 0.13 s, and twelve times that with labels
        assert told[[0, 1, -1]].tolist() == ([0, 1, 1] if index.class_names else [-1] * 3)


@pytest.mark.parametrize(
    "text", [b"[" * 99_999, b'{"label": ' + b"1" * 5000 + b"}", b'{"label": true, "name": 3}']
)
def test_an_odd_json_beside_an_image_costs_nothing(tmp_path, text):
    pack(tmp_path / "a.tar", [("1.png", png(1)), ("1.json", text)])
    assert reds(open_source(tmp_path / "a.tar")) == [1]


def test_a_folder_named_as_a_shard_is_passed_over(tmp_path):
    pack(tmp_path / "a.tar", samples(range(4)))
    (tmp_path / "b.tar").mkdir()
    assert reds(open_source(tmp_path)) == reds(open_source(str(tmp_path / "*.tar"))) == [0, 1, 2, 3]


def test_a_shard_that_goes_away_makes_bad_images(tmp_path):
    source = open_source(indexed(tmp_path))
    (tmp_path / "s-1.tar").write_bytes((tmp_path / "s-1.tar").read_bytes()[:600])
    (tmp_path / "s-0.tar").unlink()
    with pytest.raises(BadImage, match="gone"):
        source.open(0)
    with pytest.raises(BadImage, match="truncated"):
        source.open(5)


def test_many_may_make_the_same_index_at_once(tmp_path):
    for number in range(3):
        pack(tmp_path / "shards" / f"s-{number}.tar", samples(range(9)))
    with ThreadPoolExecutor(6) as pool:
        sources = list(pool.map(open_source, [tmp_path / "shards"] * 6))
    assert {source.fingerprint() for source in sources} == {open_source(tmp_path / "shards").fingerprint()}
    assert [len(source) for source in sources] == [27] * 6
    assert not list(cache_folder().glob("*.tmp"))


def test_names_that_are_no_utf8_are_kept(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("caf\xe9.png")
        info.size = len(png(1))
        tar.addfile(info, io.BytesIO(png(1)))
    source = open_source(tmp_path)
    assert source.name(0) == "s/caf\udce9.png" and reds(source) == [1]
    assert source.identity(0) == open_source(tmp_path).identity(0)


def test_pages_are_for_files(tmp_path):
    pack(tmp_path / "s.tar", samples(range(3)))
    with pytest.raises(UserError, match="prepare --pages images"):
        open_source(tmp_path, pages="images")


def test_an_index_file_holds_what_it_was_given(tmp_path):
    index = ShardIndex.load(indexed(tmp_path) / INDEX_NAME)
    assert len(index) == 8 and index.text("names", 7) == "old/1/3" and index.splits() == []


@pytest.mark.parametrize("count", [4, 40])
def test_a_shard_packed_anew_after_its_index_was_read_gives_no_pixels_of_others(tmp_path, count):
    pack(tmp_path / "a.tar", samples(range(4)))
    source, size = open_source(tmp_path), (tmp_path / "a.tar").stat().st_size
    assert reds(source) == [0, 1, 2, 3]
    pack(tmp_path / "a.tar", samples(range(100, 100 + count)))
    assert ((tmp_path / "a.tar").stat().st_size == size) == (count == 4)
    for known in (source, pickle.loads(pickle.dumps(source))):
        with pytest.raises(UserError, match="changed while it was being read"):
            known.open(0)


@pytest.mark.parametrize("damage", ["header", "cut"])
def test_a_damaged_header_is_no_end_of_a_shard(tmp_path, damage):
    path = tmp_path / "a.tar"
    pack(path, [(f"{k}.png", png(k)) for k in range(9)])
    with tarfile.open(path) as tar:
        place = tar.getmembers()[5].offset
    data = path.read_bytes()
    path.write_bytes(data[: place + 100] + (b"" if damage == "cut" else b"\xff" * 100 + data[place + 200 :]))
    with pytest.raises(
        UserError, match=rf"a.tar is truncated, compressed or no tar \(no header at byte {place:,}"
    ):
        open_source(path)
    path.write_bytes(data[:place])  # without an end mark all that is there is read
    assert len(open_source(path)) == 5


def test_what_is_kept_of_shards_changes_with_the_readers_and_the_folder(tmp_path, monkeypatch):
    for name, suffix in (("one", "png"), ("two", "heic")):
        (tmp_path / name / "set").mkdir(parents=True)
        pack(tmp_path / name / "set" / "A.TAR", [("1.png", png(1)), (f"2.{suffix}", png(2))])
        os.utime(tmp_path / name / "set" / "A.TAR", (10**9, 10**9))
    counts = {}
    for name in ("one", "two"):
        monkeypatch.chdir(tmp_path / name)
        counts[name] = len(open_source("set"))
    assert counts == {"one": 2, "two": 1}
    monkeypatch.setattr("freqmask.data.shards.read_suffixes", lambda: frozenset({".png", ".heic"}))
    assert len(open_source("set")) == 2  # its reader has been installed
