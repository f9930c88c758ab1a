"""Parquet tables behind URLs: those of a copy here, fetched row group by row group, none of them whole."""

import io
import json
import pickle
from collections import Counter

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from freqmask.data import parquet, storage
from freqmask.data.in_memory import Limits, read_images
from freqmask.data.loader import TrainDataset, TrainSampler, make_loader
from freqmask.data.sharding import Settings, open_parts, prepare_shards
from freqmask.data.sources import open_source, splits_there
from freqmask.data.splits import hold_out
from freqmask.data.transforms import Geometry
from freqmask.data.values import survey
from freqmask.errors import BadImage, UserError

pytest.importorskip("aiohttp", reason="https:// needs aiohttp (freqmask[data])")
from web_server import HubHandler, serving

pytestmark = pytest.mark.filterwarnings("ignore:Unclosed", "ignore::pytest.PytestUnraisableExceptionWarning")
GROUP = 10  # rows of a row group
TRAIN = "data/train-00000-of-00002.parquet"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(storage, "BACKOFF", (0.0, 0.0, 0.0, 0.0))


def png(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(
        file, "PNG"
    )
    return file.getvalue()


def write(path, count, first=0, **how):
    """A table as ``datasets`` writes it, images beside a large column that nobody wants."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    about = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "img": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": about}})}
    schema = pa.schema([("img", kind), ("features", pa.binary()), ("label", pa.int64())], metadata)
    numbers = range(first, first + count)
    cells = [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]
    waste = [bytes(np.random.default_rng(k).integers(0, 256, 20_000, dtype=np.uint8)) for k in numbers]
    columns = [pa.array(cells, kind), pa.array(waste), pa.array([number % 2 for number in numbers])]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema), path, row_group_size=GROUP, **how)
    return path


@pytest.fixture
def tables(tmp_path):
    root = tmp_path / "photos"
    write(root / "data" / "train-00000-of-00002.parquet", 34)
    write(root / "data" / "train-00001-of-00002.parquet", 21, 34)
    write(root / "data" / "test-00000-of-00001.parquet", 7, 55)
    return root


@pytest.fixture
def server(tables, tmp_path):
    with serving(tmp_path) as running:
        yield running


def same(one, other):
    assert len(one) == len(other) and one.class_names == other.class_names
    assert one.all_labels().tolist() == other.all_labels().tolist()
    assert one.fingerprint() == other.fingerprint()
    for k in range(len(one)):
        assert one.encoded(k) == other.encoded(k)
        assert (one.name(k), one.label(k)) == (other.name(k), other.label(k))


def asked_of_tables(server):
    return sum(count for name, count in server.asked.items() if name.endswith(".parquet"))


@pytest.mark.parametrize("split", ["auto", "test", "all"])
def test_tables_behind_a_url_are_those_on_the_disk(server, tables, split):
    far = open_source(f"{server.url}/photos", split=split)
    same(far, open_source(tables, split=split))
    assert splits_there(f"{server.url}/photos") == ["test", "train"]
    if split == "auto":
        assert "Only train is used" in far.summary().notes[0]


@pytest.mark.parametrize(
    "how", [{"compression": "none"}, {"use_dictionary": False}, {"data_page_version": "2.0"}]
)
def test_however_a_table_is_written(tmp_path, how):
    path = write(tmp_path / "t.parquet", 12, **how)
    fsspec.filesystem("memory").pipe_file("/tables/t.parquet", path.read_bytes())
    same(open_source("memory://tables/t.parquet"), open_source(path))
    fsspec.filesystem("memory").rm("/tables", recursive=True)


@pytest.mark.parametrize("pattern", ["train-*.parquet", "train-{00000..00001}-of-00002.parquet"])
def test_a_pattern_names_some_tables_here_and_there(server, tables, pattern):
    far, here = (
        open_source(f"{server.url}/photos/data/{pattern}"),
        open_source(str(tables / "data" / pattern)),
    )
    assert len(far) == 55
    same(far, here)
    assert splits_there(f"{server.url}/photos/data/{pattern}") == ["train"]


def test_a_data_set_of_the_hub_is_read_where_it_is(tables, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="hf:// needs huggingface_hub (freqmask[data])")
    with serving(tables, HubHandler) as hub:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": False})
        far = open_source("hf://datasets/someone/photos")
        hub.sent.clear()
        same(far, open_source(tables))
        sizes = sum(path.stat().st_size for path in tables.rglob("train*"))
        assert sum(hub.sent.values()) < sizes / 4  # neither whole files nor 5 MB ahead
        with pytest.raises(UserError, match="hf://datasets/NAME"):
            open_source("hf://someone/photos")


def test_plain_bytes_and_text_labels_work_from_afar(tmp_path):
    kinds = {"image": [png(1), None, png(3)], "label": ["x", "y", None]}
    pq.write_table(pa.table(kinds), tmp_path / "t.parquet")
    fsspec.filesystem("memory").pipe_file("/plain/t.parquet", (tmp_path / "t.parquet").read_bytes())
    far = open_source("memory://plain/t.parquet")
    assert far.class_names == ["x", "y"] and far.all_labels().tolist() == [0, 1, -1]
    assert far.label(2) is None and far.name(2) == "2" and far.encoded(2) == (png(3), ".png")
    with pytest.raises(BadImage, match="no bytes"):
        far.open(1)
    with pytest.raises(IndexError):
        far.open(3)
    fsspec.filesystem("memory").rm("/plain", recursive=True)


def test_an_index_is_read_once_and_travels_as_the_name_of_its_file(server, monkeypatch):
    first = open_source(f"{server.url}/photos")
    server.asked.clear()
    again = open_source(f"{server.url}/photos")
    assert asked_of_tables(server) == 0 and again.all_labels().tolist() == first.all_labels().tolist()
    sent = pickle.dumps(again)
    assert len(sent) < 4000 and pickle.loads(sent).encoded(40) == first.encoded(40)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_fetches_a_row_group_once_or_twice_and_every_image_once(server, monkeypatch, workers):
    monkeypatch.setattr(parquet, "KEPT_BYTES", 3 * GROUP * 1200)
    far = open_source(f"{server.url}/photos")
    blocks = far.blocks()
    assert blocks.whole and 1 < blocks.window < 6
    server.asked.clear()
    steps = len(far) // 5
    sampler = TrainSampler(len(far), 0, 5, total_steps=steps, blocks=blocks, workers=workers)
    batches = list(make_loader(TrainDataset(far, [Geometry(8)]), sampler, 5, workers))
    seen = Counter(int(index) for batch in batches for index in batch["indices"])
    assert len(seen) == 5 * steps and set(seen.values()) == {1}
    cuts = max(workers, 1) - 1
    assert asked_of_tables(server) <= int(blocks.numbers.max()) + 1 + cuts


def test_looking_at_some_images_fetches_few_row_groups(server, monkeypatch):
    from freqmask.data import values

    monkeypatch.setattr(values, "_SURVEY_BLOCKS", 2)
    far = open_source(f"{server.url}/photos")
    server.asked.clear()
    seen = survey(far)
    assert 1 <= seen.count <= 2 * GROUP and asked_of_tables(server) == 2
    _, held_out = hold_out(far, 0.15)
    groups = {far.index.part_of(int(index)) for index in held_out}
    assert len(held_out) == 8 and len(groups) <= 2


def test_a_cut_connection_is_tried_again_and_then_named(server, tables):
    far = open_source(f"{server.url}/photos")
    server.failures[f"photos/{TRAIN}"] = ["cut", 503]
    assert far.encoded(0) == open_source(tables).encoded(0)
    server.failures[f"photos/{TRAIN}"] = [503] * 99
    with pytest.raises(UserError, match=r"train-00000-of-00002.parquet cannot be read after 5 tries"):
        far.open(GROUP)


def test_what_is_gone_or_damaged_is_a_bad_image(server, tables):
    far = open_source(f"{server.url}/photos")
    content = bytearray((tables / TRAIN).read_bytes())
    content[4:2000] = bytes(1996)
    (tables / TRAIN).write_bytes(bytes(content))
    with pytest.raises(BadImage, match="damaged in its row group 0"):
        far.open(0)
    (tables / TRAIN).unlink()
    with pytest.raises(BadImage, match="gone"):
        far.open(GROUP)


@pytest.mark.parametrize("content", [b"", b"PAR1 but no table", b"x" * 100 + b"\xff\xff\x00\x00PAR1", None])
def test_a_table_that_cannot_be_is_a_sentence(server, tables, content):
    if content is None:
        (tables / TRAIN).unlink()
    else:
        (tables / TRAIN).write_bytes(content)
    with pytest.raises(UserError, match=r"no parquet file|not there"):
        open_source(f"{server.url}/photos/data/train-{{00000..00001}}-of-00002.parquet")


def test_a_table_of_another_layout_is_a_sentence(server, tables):
    pq.write_table(pa.table({"img": [png(1)]}), tables / TRAIN.replace("0-of", "1-of"))
    with pytest.raises(UserError, match=r"00001-of-00002.parquet lacks the column label"):
        open_source(f"{server.url}/photos")


@pytest.mark.parametrize(
    ("content", "words"), [({"text": ["a"]}, "column of encoded"), ({"img": []}, "no rows")]
)
def test_a_table_without_images_is_a_sentence(server, tables, content, words):
    kind = pa.schema([(name, pa.binary() if name == "img" else pa.string()) for name in content])
    pq.write_table(pa.table(content, kind), tables / "t.parquet")
    with pytest.raises(UserError, match=words):
        open_source(f"{server.url}/photos/t.parquet")


def test_several_data_sets_in_one_place_are_told_apart(server, tables):
    write(tables / "other" / "train-0.parquet", 3)
    with pytest.raises(UserError, match=r"2 data sets .*name one: http.*photos/other"):
        open_source(f"{server.url}/photos")
    assert len(open_source(f"{server.url}/photos/other")) == 3


def test_folders_named_as_splits_hold_their_tables(tmp_path):
    memory = fsspec.filesystem("memory")
    for split, count in (("train", 3), ("validation", 2)):
        memory.pipe_file(f"/hub/{split}/0000.parquet", write(tmp_path / "t.parquet", count).read_bytes())
    assert splits_there("memory://hub") == ["train", "validation"]
    assert len(open_source("memory://hub")) == 3 and len(open_source("memory://hub", split="val")) == 2
    memory.rm("/hub", recursive=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_tables_become_shards_at_a_request_a_row_group(server, tables, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(parquet, "KEPT_BYTES", 2 * GROUP * 1200)
    parts, _ = open_parts([f"{server.url}/photos"], "channels", "all", None)
    server.asked.clear()
    settings = Settings(None, 20, "channels", "all", parts.content, max(workers, 1))
    prepare_shards(parts, settings, tmp_path / "out", workers)
    assert asked_of_tables(server) <= 8 + 2 * max(workers - 1, 0)  # row groups, and cuts in two splits
    before, after = open_source(tables, split="all"), open_source(tmp_path / "out", split="all")
    assert sorted(after.encoded(k)[0] for k in range(62)) == sorted(before.encoded(k)[0] for k in range(62))


def test_images_kept_on_a_device_come_row_group_by_row_group(server, tables, monkeypatch):
    monkeypatch.setattr(parquet, "KEPT_BYTES", GROUP * 1200)
    far = open_source(f"{server.url}/photos")
    server.asked.clear()
    kept = read_images(far, [Geometry(8)], Limits(64, 10**9), workers=2)
    assert asked_of_tables(server) <= 7 + 1  # seven row groups, and the first for its type
    here = read_images(open_source(tables), [Geometry(8)], Limits(64, 10**9))
    assert kept.pixels.equal(here.pixels) and kept.labels.equal(here.labels)
