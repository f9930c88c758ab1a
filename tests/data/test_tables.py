"""Images in parquet tables of the Hugging Face layout."""

import io
import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.preprocessing import LabelEncoder

from freqmask.data import parquet
from freqmask.data.cache import cache_folder
from freqmask.data.sharding import Settings, open_parts, prepare_shards
from freqmask.data.sources import open_source, splits_there
from freqmask.errors import BadImage, UserError
from freqmask.evaluation.labelled import open_labelled


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path, count=5, column="img", names=("cat", "dog"), first=0):
    """A table as `datasets` writes it: (bytes, path), a label, its names in the schema's metadata."""
    cells = [{"bytes": png(first + k), "path": f"{k}.png"} for k in range(count)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {column: {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([(column, kind), ("label", pa.int64())], about)
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [k % len(names) for k in range(count)]
    pq.write_table(pa.table([pa.array(cells, kind), pa.array(labels)], schema), path, row_group_size=2)
    return path


@pytest.mark.parametrize("column", ["img", "whatever"])
@pytest.mark.parametrize("limit", [10**9, 0])
def test_a_table_gives_its_images_and_classes(tmp_path, monkeypatch, column, limit):
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", limit)
    source = open_source(write(tmp_path / "t.parquet", column=column))
    assert len(source) == 5 and source.class_names == ["cat", "dog"]
    assert [source.label(index) for index in range(5)] == [0, 1, 0, 1, 0]
    assert [int(source.open(index).decode()[0, 0, 0]) for index in range(5)] == [0, 1, 2, 3, 4]
    assert source.name(3) == "3:3.png"
    again = open_source(tmp_path / "t.parquet")  # from the cache, where it is mapped
    assert int(again.open(4).decode()[0, 0, 0]) == 4


def test_a_folder_of_tables_uses_train_and_says_so(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", 3)
    write(tmp_path / "data" / "train-00001-of-00002.parquet", 2, first=10)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", 4, first=20)
    source = open_source(tmp_path)
    assert [int(source.open(index).decode()[0, 0, 0]) for index in range(len(source))] == [0, 1, 2, 10, 11]
    assert source.all_labels().tolist() == [0, 1, 0, 0, 1]
    assert "Only train is used, not test" in source.summary().notes[0]
    assert splits_there(tmp_path) == ["test", "train"]
    assert len(open_source(tmp_path, split="test")) == 4 and len(open_source(tmp_path, split="all")) == 9


def test_images_beside_a_table_are_what_a_folder_is_for(tmp_path):
    write(tmp_path / "t.parquet")
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    source = open_source(tmp_path)
    assert source.summary().kind == "folder" and source.summary().ignored == {".parquet": 1}


def test_plain_bytes_and_text_labels_work_too(tmp_path):
    table = pa.table({"image": [png(1), None, png(3)], "label": ["x", "y", None]})
    pq.write_table(table, tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet")
    assert source.class_names == ["x", "y"] and [source.label(index) for index in range(3)] == [0, 1, None]
    assert source.name(2) == "2" and source.open(2).decode()[0, 0, 0] == 3
    with pytest.raises(BadImage, match="no bytes"):
        source.open(1)


@pytest.mark.parametrize("as_struct", [True, False])
def test_of_several_columns_the_one_called_image_is_read_and_said(tmp_path, as_struct):
    cells = {name: [png(value)] * 2 for name, value in (("mask", 1), ("thumb", 2), ("Image", 3))}
    if as_struct:
        cells = {name: [{"bytes": data, "path": None} for data in cell] for name, cell in cells.items()}
        cells["image_md5"] = [b"0123456789abcdef"] * 2
    pq.write_table(pa.table(cells | {"label": ["", "cat"]}), tmp_path / "t.parquet")
    for source in (open_source(tmp_path / "t.parquet"), open_source(tmp_path / "t.parquet")):  # and cached
        assert source.open(1).decode()[0, 0, 0] == 3
        assert source.summary().notes == ["Images are read from the column Image, not from mask or thumb."]
        assert (source.class_names, source.all_labels().tolist()) == (["cat"], [-1, 0])


def test_a_table_source_travels_without_its_pixels(tmp_path):
    source = open_source(write(tmp_path / "t.parquet", 50))
    source.open(0)
    sent = pickle.dumps(source)
    assert len(sent) < 4000
    np.testing.assert_array_equal(pickle.loads(sent).open(9).decode(), source.open(9).decode())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PAR1 but no table", "truncated or no parquet file"),
        (
            {"path": ["a.png"], "label": [0]},
            r"must hold a column of encoded images .*; it has 'path', 'label'$",
        ),
        ({"image": pa.array([], pa.binary())}, "holds no rows"),
    ],
)
def test_a_table_without_images_is_refused(tmp_path, content, words):
    path = tmp_path / "t.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(pa.table(content), path)
    with pytest.raises(UserError, match=words):
        open_source(path)


HOSTILE = pa.Array.from_buffers(pa.string(), 6, pa.array([b"\xfc"] * 6).buffers())  # a text that is no UTF-8


@pytest.mark.parametrize(
    ("columns", "classes"),
    [
        ({"label": HOSTILE}, ["\udcfc"]),
        ({"label": pa.array([[1]] * 6)}, None),
        ({"label": pa.array([1.5] * 6)}, None),
        ({"path": HOSTILE}, None),
        ({"path": pa.array([3] * 6)}, None),
    ],
    ids=["label of bytes", "label of lists", "label of fractions", "path of bytes", "path of numbers"],
)
@pytest.mark.parametrize(
    "metadata", [[], 3, {"label": 3}, {"label": {"_type": "ClassLabel", "names": 3}}, "[" * 9999]
)
def test_odd_columns_and_metadata_of_a_table_are_no_end(tmp_path, columns, classes, metadata):
    columns = {"label": pa.array([None] * 6, pa.string()), "path": pa.array(["a"] * 6)} | columns
    images = pa.StructArray.from_arrays([pa.array([png(1)] * 6), columns["path"]], ["bytes", "path"])
    told = metadata if isinstance(metadata, str) else json.dumps({"info": {"features": metadata}})
    table = pa.table({"image": images, "label": columns["label"]}).replace_schema_metadata(
        {"huggingface": told}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet")
    assert (source.class_names or None) == classes and source.encoded(0) == (png(1), ".png")
    assert columns["path"] is not HOSTILE or source.name(0) == "0:\udcfc"


@pytest.mark.parametrize("leaf", [pa.array(["x"] * 6), pa.array([3] * 6), pa.array([[b"x"]] * 6)])
def test_a_struct_of_something_else_than_bytes_is_no_image(tmp_path, leaf):
    pq.write_table(pa.table({"image": pa.StructArray.from_arrays([leaf], ["bytes"])}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="must hold a column of encoded images"):
        open_source(tmp_path / "t.parquet")


def test_a_damaged_file_among_good_ones_is_named(tmp_path):
    for name in ("a", "b"):
        pq.write_table(pa.table({"image": [png(1)]}), tmp_path / f"{name}.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but no table")
    with pytest.raises(UserError, match=r"b.parquet\) is truncated or no parquet file"):
        open_source(tmp_path)


def test_a_damaged_row_group_costs_its_images_and_no_others(tmp_path):
    path = write(tmp_path / "t.parquet", 6)
    source = open_source(path)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content, before = bytearray(path.read_bytes()), path.stat()
    content[start : start + 30] = bytes(30)
    path.write_bytes(bytes(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a disk that loses bytes keeps the time
    for index in (2, 3):
        with pytest.raises(BadImage, match=r"t.parquet is damaged in its row group 1"):
            source.open(index)
    assert [int(source.open(index).decode()[0, 0, 0]) for index in (0, 1, 4, 5)] == [0, 1, 4, 5]


def test_labels_and_names_of_a_table_are_read_once(tmp_path, monkeypatch):
    path = write(tmp_path / "t.parquet")
    first = open_source(path)
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_read_index", None)
        again = open_source(path)
    assert again.all_labels().tolist() == first.all_labels().tolist() and again.name(4) == "4:4.png"
    write(path, 3)
    assert len(open_source(path)) == 3


def test_a_table_without_labels_is_read_once_and_travels_too(tmp_path, monkeypatch):
    pq.write_table(pa.table({"image": [png(k) for k in range(4)]}), tmp_path / "t.parquet")
    open_source(tmp_path)
    monkeypatch.setattr(parquet, "_read_index", None)
    again = pickle.loads(pickle.dumps(open_source(tmp_path)))
    assert len(again) == 4 and again.all_labels().tolist() == [-1] * 4


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    source = open_source(write(tmp_path / "t.parquet"))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be laid out in .*XDG_CACHE_HOME"):
        source.open(0)


@pytest.mark.parametrize("labels", [[10**12, 7, 10**12], [-5, 0, 2], [3, None, 1]])
def test_numbers_without_names_are_classes(tmp_path, labels):
    table = pa.table({"image": [png(k) for k in range(3)], "label": pa.array(labels, pa.int64())})
    pq.write_table(table, tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet")
    found = [-1 if label is None else label for label in (source.label(k) for k in range(3))]
    assert source.all_labels().tolist() == found
    for label, number in zip(labels, found, strict=True):
        assert (number == -1) if label is None or label < 0 else source.class_names[number] == str(label)
    assert len(source.class_names) <= 4


def test_train_and_test_are_told_by_the_names_of_files_wherever_they_lie(tmp_path):
    write(tmp_path / "test" / "train-0.parquet", 3)
    write(tmp_path / "test" / "test-0.parquet", 2)
    assert splits_there(tmp_path / "test") == ["test", "train"] and len(open_source(tmp_path / "test")) == 3
    assert len(open_source(str(tmp_path / "test" / "t*-0.parquet"), split="test")) == 2
    write(tmp_path / "hub" / "mnist-train.parquet", 3)  # as the hub's conversion called them
    write(tmp_path / "hub" / "mnist-test.parquet", 2)
    assert splits_there(tmp_path / "hub") == ["test", "train"] and len(open_source(tmp_path / "hub")) == 3
    with pytest.raises(UserError, match="no file fits"):
        open_source(str(tmp_path / "none-*.parquet"))


def test_features_that_we_wrote_beside_tables_are_no_data(tmp_path):
    from freqmask.training.files import replace_atomically

    write(tmp_path / "data" / "train.parquet", 3)
    for folder in (tmp_path, tmp_path / "data"):
        features = pa.table({"features": [[0.5]], "index": [0]})
        replace_atomically(folder / "embeddings.parquet", lambda path: pq.write_table(features, path))  # noqa: B023
    assert len(open_source(tmp_path)) == 3


@pytest.mark.parametrize("count", [5, 7])
def test_a_table_written_anew_between_its_labels_and_its_images_is_a_sentence(tmp_path, count):
    file = write(tmp_path / "t.parquet", 5)
    source = open_source(file)
    write(file, count, first=100)
    with pytest.raises(UserError, match="changed while it was being read"):
        source.open(0)


def test_a_damaged_layout_in_the_cache_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    file = write(tmp_path / "t.parquet", 5)
    open_source(file).open(0)
    (cached,) = cache_folder().glob("images-*")
    cached.write_bytes(cached.read_bytes()[:100])
    assert int(open_source(file).open(4).decode()[0, 0, 0]) == 4


def test_a_column_that_would_end_the_process_is_a_sentence(tmp_path):
    file = write(tmp_path / "t.parquet", 5)
    data = file.read_bytes()
    # the column of bytes, whose cells may be missing (2), is said to have none that are (0): its statistics
    # then have one level too many, and pyarrow's metadata aborts over them
    optional, required = (b"\x15\x0c\x25" + bytes([number]) + b"\x18\x05bytes" for number in (2, 0))
    assert data.count(optional) == 1
    file.write_bytes(data.replace(optional, required))
    with pytest.raises(UserError, match=r"t.parquet\) is damaged"):
        open_source(file)


@pytest.mark.parametrize("folders", [("plain_text",) * 2, ("train", "test"), ("data/train", "data/test")])
def test_tables_lie_in_folders_of_a_folder_as_behind_a_url(tmp_path, folders):
    write(tmp_path / folders[0] / "train-0.PARQUET", 3)
    write(tmp_path / folders[1] / "test-0.parquet", 2)
    assert splits_there(tmp_path) == ["test", "train"]
    assert len(open_source(tmp_path)) == 3 and len(open_source(tmp_path, split="test")) == 2
    write(tmp_path / "other" / "train-0.parquet", 2)
    with pytest.raises(UserError, match="tables of 2 data sets"):
        open_source(tmp_path)
    write(tmp_path / "t.parquet", 4)  # what lies in the folder itself is meant
    assert len(open_source(tmp_path)) == 4


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (pa.array(["b", "a", None]).dictionary_encode(), ["a", "b"]),
        (pa.array([1.0, 0.0, float("nan")]), ["0", "1"]),
        (pa.array([1.0, 0.0, None]), ["0", "1"]),
        (pa.array([True, False, None]), ["0", "1"]),
        (pa.array([0.5, 1.0, None]), None),
    ],
    ids=["categories", "numbers with NaN", "numbers with null", "truths", "fractions"],
)
def test_labels_are_read_as_pandas_writes_them(tmp_path, labels, classes):
    table = pa.table({"image": pa.array([png(1), png(2), png(3)]).dictionary_encode(), "label": labels})
    pq.write_table(table, tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet")
    assert source.class_names == classes and source.open(1).decode()[0, 0, 0] == 2
    assert source.all_labels().tolist() == ([1, 0, -1] if classes else [-1] * 3)


@pytest.mark.parametrize(
    "labels",
    [[17, 81_017, 17, 300, 99_999], [0, 5, 0, 0, 10**9], [4, 4, 4, 4, 4], [0, 0, 6, 3, 0], [7, 1, 1, 7, 9]],
)
def test_numbers_with_many_gaps_are_as_many_classes_as_occur(tmp_path, labels):
    write(tmp_path / "t.parquet")
    images = pq.read_table(tmp_path / "t.parquet")["img"]
    pq.write_table(pa.table({"img": images, "label": labels}), tmp_path / "numbers.parquet")
    source = open_source(tmp_path / "numbers.parquet")
    encoder = LabelEncoder()
    assert source.all_labels().tolist() == encoder.fit_transform(labels).tolist()
    assert source.class_names == [str(number) for number in encoder.classes_]


def test_classes_of_parts_that_lack_some_of_them_are_those_of_both_in_order(tmp_path):
    write(tmp_path / "t.parquet")
    images = pq.read_table(tmp_path / "t.parquet")["img"]
    numbers = {"train": [70, 2, 0, 9, 1], "test": [1, 0, 9, 9, 70]}
    for split, labels in numbers.items():
        path = tmp_path / "both" / f"{split}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"img": images, "label": labels}), path)
    data = open_labelled(tmp_path / "both")
    assert data.class_names == ["0", "1", "2", "9", "70"]
    assert [int(data.class_names[number]) for number in data.labels] == numbers["train"] + numbers["test"]


def test_of_several_columns_of_classes_the_usual_name_is_taken_and_the_others_named(tmp_path):
    write(tmp_path / "t.parquet")
    images = pq.read_table(tmp_path / "t.parquet")["img"]
    kinds = {"domain": ["clipart", "real"], "label": ["ant", "bee", "cow"]}
    features = {name: {"_type": "ClassLabel", "names": names} for name, names in kinds.items()}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"img": images, "domain": [0, 0, 1, 1, 1], "label": [2, 1, 0, 0, 1]})
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "two.parquet")
    source = open_source(tmp_path / "two.parquet")
    assert source.class_names == kinds["label"] and source.all_labels().tolist() == [2, 1, 0, 0, 1]
    assert "Labels are read from the column label, not from domain." in source.summary().notes
    alone = pa.table({"img": images, "cls": ["a", "b", "a", "b", "b"]})  # WebDataset's word for it
    pq.write_table(alone, tmp_path / "cls.parquet")
    source = open_source(tmp_path / "cls.parquet")
    assert source.class_names == ["a", "b"] and not source.summary().notes
    pq.write_table(pa.table({"Image": images, "Label": ["a", "b", "a", "b", "b"]}), tmp_path / "cls.parquet")
    source = open_source(tmp_path / "cls.parquet")
    assert source.class_names == ["a", "b"] and source.all_labels().tolist() == [0, 1, 0, 1, 1]


@pytest.mark.parametrize(("loud", "plain"), [("Label", "label"), ("Class", "target")])
def test_a_column_of_labels_without_capitals_goes_before_one_with(tmp_path, loud, plain):
    columns = {"image": [png(k) for k in range(2)], loud: ["one", "other"], plain: ["a", "b"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert source.class_names == ["a", "b"]
    assert f"Labels are read from the column {plain}, not from {loud}." in source.summary().notes


def test_a_name_that_two_classes_have_merges_them_nowhere(tmp_path):
    """ImageNet has two classes that are called crane."""
    names, wanted = ["crane", "dog", "crane"], [0, 1, 2, 0, 1]
    for part in ("train", "test"):
        write(tmp_path / f"{part}.parquet", names=names)
    joined = open_source([tmp_path / "train.parquet", tmp_path / "test.parquet"])
    assert joined.all_labels().tolist() == 2 * wanted
    assert [joined.label(index) for index in range(5)] == wanted
    parts, _ = open_parts([tmp_path], "channels", "train", None)
    prepare_shards(parts, Settings(None, 3, "channels", "train", parts.content), tmp_path / "out", 0)
    shards = open_source(tmp_path / "out")
    assert sorted(shards.all_labels().tolist()) == sorted(wanted)
    assert shards.class_names == joined.class_names == ["crane", "dog", "crane (2)"]


def test_names_stay_with_their_images_where_a_file_has_none(tmp_path):
    write(tmp_path / "a.parquet", count=3)
    kind = pa.struct([("bytes", pa.binary())])
    cells = pa.array([{"bytes": png(k)} for k in range(2)], kind)
    pq.write_table(pa.table({"img": cells, "label": [0, 1]}), tmp_path / "b.parquet")
    write(tmp_path / "c.parquet", count=3)
    source = open_source(tmp_path)
    names = [source.name(index) for index in range(len(source))]
    assert [name.rpartition(":")[2] for name in names[:3] + names[5:]] == 2 * ["0.png", "1.png", "2.png"]
    assert len({*names}) == 8
