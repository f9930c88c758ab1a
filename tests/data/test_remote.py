"""Images behind URLs: read in parts, with patience, and named where patience is of no use."""

import io
import os
import socket
import tarfile
from collections import Counter
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from freqmask.data import shards as shards_module
from freqmask.data import storage
from freqmask.data.cache import cache_folder
from freqmask.data.loader import OrderedSampler, TrainDataset, TrainSampler, make_loader
from freqmask.data.sharding import Settings, open_parts, prepare_shards
from freqmask.data.sources import open_source, splits_there
from freqmask.data.transforms import Geometry
from freqmask.errors import BadImage, UserError

pytest.importorskip("aiohttp", reason="https:// needs aiohttp (freqmask[data])")
from web_server import Handler, serving

# aiohttp closes what a forked or ended process left open when it is collected
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(storage, "BACKOFF", (0.0, 0.0, 0.0, 0.0))


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for number in range(30):
        split = "val" if number > 23 else "train"
        path = root / split / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture
def shards(photos, tmp_path):
    out = tmp_path / "shards"
    parts, _ = open_parts([photos], "channels", "all", None)
    prepare_shards(parts, Settings(None, 7, "channels", "all", parts.content), out, 0)
    return out


@pytest.fixture
def server(shards, tmp_path):
    with serving(tmp_path) as running:
        yield running


def same(one, other):
    assert len(one) == len(other) and one.class_names == other.class_names
    for k in range(len(one)):
        assert one.encoded(k) == other.encoded(k)
        assert (one.name(k), one.label(k), one.identity(k)) == (
            other.name(k),
            other.label(k),
            other.identity(k),
        )


@pytest.mark.parametrize("name", ["shards", "shards/", "shards/shards.index", "shards/prepare.json"])
def test_prepared_shards_behind_a_url_are_those_on_the_disk(server, shards, name):
    far = open_source(f"{server.url}/{name}")
    same(far, open_source(shards))
    assert any("over the network" in note for note in far.summary().notes)
    assert any("Only train is used" in note for note in far.summary().notes)


def test_splits_are_known_from_afar(server):
    assert splits_there(f"{server.url}/shards") == ["train", "val"]
    assert splits_there(f"{server.url}/photos") == ["train", "val"]
    assert len(open_source(f"{server.url}/shards", split="val")) == 6


@pytest.mark.parametrize("pattern", ["train-{000000..000001}.tar", "train-00000[01].tar"])
def test_a_pattern_works_without_an_index(server, shards, pattern):
    here = open_source(str(shards / pattern))
    (shards / "shards.index").unlink()
    far = open_source(f"{server.url}/shards/{pattern}")
    assert [far.encoded(k) for k in range(14)] == [here.encoded(k) for k in range(14)]
    assert far.all_labels().tolist() == here.all_labels().tolist()


class Signed(Handler):
    """Refuses whatever is not asked for with the signature of a tar."""

    def parse_request(self):
        if not super().parse_request():
            return False
        name, _, query = self.path.partition("?")
        is_signed = query == "X-Expires=9&sig=a%2Bb" and name.endswith(".tar")
        if not is_signed:
            self.send_error(403)
        return is_signed


@pytest.mark.parametrize("name", ["train-000000", "train-{000000..000001}"])
def test_a_signed_address_is_read_and_its_images_keep_their_names(shards, tmp_path, name):
    (shards / "shards.index").unlink()  # a signature is of one file
    with serving(tmp_path, Signed) as server:
        far = open_source(f"{server.url}/shards/{name}.tar?X-Expires=9&sig=a%2Bb")
        here = open_source(str(shards / f"{name}.tar"))
        assert [far.encoded(k) for k in range(len(far))] == [here.encoded(k) for k in range(len(here))]
        assert [far.name(k) for k in range(len(far))] == [here.name(k) for k in range(len(here))]
        for other, words in (
            ("shards?sig=a", "must be a .tar or .parquet"),
            ("x.tgz?sig=a", "compressed"),
            ("shards/train-000000.tar?sig=other", "status 403"),
        ):
            with pytest.raises(UserError, match=words):
                open_source(f"{server.url}/{other}")


def test_a_listed_folder_of_images_is_the_folder(server, photos):
    for name in (".hidden/1.png", "train/.hidden.png", "train/Thumbs.db"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"x")
    far = open_source(f"{server.url}/photos")
    same(far, open_source(photos))
    assert far.summary().kind == "folder on http"
    whole, here = open_source(f"{server.url}/photos", split="all"), open_source(photos, split="all")
    assert len(whole) == 30 and whole.summary().ignored == here.summary().ignored == {}
    table = photos.parent / "labels.csv"
    table.write_text(f"path,label\n{server.url}/photos/{whole.name(4)},a\n{whole.name(2)},b\n")
    told = open_source(f"{server.url}/photos", labels=table)
    assert [told.name(k) for k in range(2)] == [whole.name(4), whole.name(2)]
    server.asked.clear()
    for k in (3, 4, 3):
        whole.open(k)
        assert whole.encoded(k) == here.encoded(k)
    assert sum(server.asked.values()) == 3  # an image and its file are one request


@pytest.mark.parametrize("failures", [["cut"], [500, 503], ["cut", 500, "cut", 429]])
def test_a_cut_connection_is_tried_again(server, shards, failures):
    far, here = open_source(f"{server.url}/shards"), open_source(shards)
    server.failures["shards/train-000000.tar"] = list(failures)
    assert far.encoded(0) == here.encoded(0)
    assert server.asked["shards/train-000000.tar"] == len(failures) + 1


def test_a_mistake_in_a_program_is_neither_tried_again_nor_put_into_words():
    tries = []

    def mistaken():
        tries.append(1)
        raise TypeError("an argument too many")

    with pytest.raises(TypeError, match="too many"):
        storage.with_retries("https://x.y/z", mistaken)
    assert len(tries) == 1


@pytest.mark.parametrize(
    "answer", [{"status": 401}, {"code": 404}, {"response": SimpleNamespace(status_code=403)}]
)
def test_a_refusal_is_understood_however_a_library_tells_it(answer):
    error = Exception("no")
    vars(error).update(answer)
    with pytest.raises(UserError, match=r"refused \(status 40[134]\)"):
        storage.with_retries("hf://x.y/z", lambda: (_ for _ in ()).throw(error))


def test_a_server_that_stays_away_is_named(server):
    far = open_source(f"{server.url}/shards")
    server.failures["shards/train-000000.tar"] = [503] * 99
    with pytest.raises(UserError, match=r"train-000000.tar cannot be read after 5 tries \(status 503\)"):
        far.open(0)


def test_a_server_that_is_gone_is_named(shards, tmp_path):
    with serving(tmp_path) as server:
        far = open_source(f"{server.url}/shards")
    with pytest.raises(UserError, match="after 5 tries"):
        far.open(0)


def test_a_shard_that_its_server_changed_at_the_same_size_is_indexed_anew(server, shards):
    (shards / "shards.index").unlink()
    (shards / "prepare.json").unlink()
    (name,) = (path.name for path in shards.glob("val-*.tar"))
    assert not open_source(f"{server.url}/shards/{name}").name(0).startswith("val-000000/x")
    size = (shards / name).stat().st_size
    data = (shards / name).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar if info.isreg()]
    with tarfile.open(shards / name, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, (info, content) in enumerate(members):
            info.name = f"x{number}.png" if info.name.endswith(".png") else info.name
            tar.addfile(info, io.BytesIO(content))
    os.utime(shards / name, (2_000_000_000, 2_000_000_000))
    assert (shards / name).stat().st_size == size
    assert open_source(f"{server.url}/shards/{name}").name(0).startswith("val-000000/x")


def test_a_place_is_asked_once_for_its_index_and_once_for_its_files(server):
    storage.RemoteFiles(f"{server.url}/photos").listing()
    one_listing = server.asked.copy()
    server.asked.clear()
    open_source(f"{server.url}/photos")
    assert server.asked == one_listing + Counter({"photos/shards.index": 1})


def test_a_refusal_is_not_tried_again(server):
    far = open_source(f"{server.url}/shards")
    server.failures["shards/train-000000.tar"] = [403, 403]
    with pytest.raises(UserError, match=r"refused \(status 403\)"):
        far.open(0)
    assert server.asked["shards/train-000000.tar"] == 1


def test_what_is_gone_is_a_bad_image(server, shards, photos):
    far, folder = open_source(f"{server.url}/shards"), open_source(f"{server.url}/photos")
    (shards / "train-000000.tar").unlink()
    with pytest.raises(BadImage, match="gone"):
        far.open(0)
    (photos / folder.name(0)).unlink()
    with pytest.raises(BadImage, match="gone"):
        folder.open(0)


def test_a_server_without_ranges_is_told(server):
    far = open_source(f"{server.url}/shards")
    server.failures["shards/train-000000.tar"] = ["whole"]
    with pytest.raises(UserError, match="ignores byte ranges"):
        far.open(0)


@pytest.mark.parametrize("name", ["x.parquet", "x", "x-*.parquet", "a-{0..2}.tar"])
def test_a_refused_connection_is_no_missing_file(tmp_path, name):
    with serving(tmp_path) as server:
        pass  # nobody listens at its port from here on
    with pytest.raises(UserError, match="the connection was refused"):
        open_source(f"{server.url}/{name}")


@pytest.mark.parametrize(
    ("status", "words"), [(500, "after 5 tries .status 500"), (403, "refused .status 403")]
)
def test_an_answer_of_the_server_is_no_missing_file(tmp_path, status, words):
    (tmp_path / "x.parquet").write_bytes(b"x")
    with serving(tmp_path, Refusing) as server:
        server.status = status
        with pytest.raises(UserError, match=words):
            open_source(f"{server.url}/x.parquet")


class Refusing(Handler):
    """Answers everything with one status."""

    def do_GET(self):
        self.send_error(self.server.status)

    def do_HEAD(self):
        self.do_GET()


def test_a_length_that_is_not_true_is_a_sentence(tmp_path):
    pq.write_table(pa.table({"image": [b"x" * 999] * 9}), tmp_path / "x.parquet")
    with serving(tmp_path, Lying) as server, pytest.raises(UserError, match="bytes came"):
        open_source(f"{server.url}/x.parquet")


class Lying(Handler):
    """Calls every file longer than it is."""

    def do_HEAD(self):
        size = os.path.getsize(self.translate_path(self.path))  # noqa: PTH202
        self.send_response(200)
        self.send_header("Content-Length", str(size + 500))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()


@pytest.mark.parametrize(
    ("error", "words"),
    [(TimeoutError(), "nothing came for"), (socket.gaierror(-2, "?"), "no host of that name")],
)
def test_what_hangs_and_what_is_unknown_is_named(error, words):
    with pytest.raises(UserError, match=words):
        storage.with_retries("https://x.y/z", lambda: (_ for _ in ()).throw(error))


@pytest.mark.parametrize("name", ["nowhere", "shards/none-{0..3}.tar", "shards/none-*.tar"])
def test_what_is_not_there_is_a_sentence(server, name):
    with pytest.raises(UserError, match=r"not there|no file fits"):
        open_source(f"{server.url}/{name}")


def test_an_unknown_protocol_is_a_sentence():
    with pytest.raises(UserError, match=r"^DATA \(nothing://x.*not known"):
        open_source("nothing://x/y")


def test_a_training_takes_two_requests_a_block(server, monkeypatch):
    monkeypatch.setattr(shards_module, "BLOCK_BYTES", 8_000)
    far = open_source(f"{server.url}/shards")
    server.asked.clear()
    blocks = far.blocks()
    last = blocks.numbers.max()
    sampler = TrainSampler(len(far), 0, 4, total_steps=6, blocks=blocks)
    list(make_loader(TrainDataset(far, [Geometry(8)]), sampler, 4))
    assert 1 < last < len(far) / 2
    assert sum(server.asked.values()) <= 2 * (last + 1)


def test_single_looks_fetch_single_images(server, shards):
    far = open_source(f"{server.url}/shards")
    server.sent.clear()
    data, _ = far.encoded(3)
    assert sum(server.sent.values()) == len(data)


def test_workers_read_over_the_network(server):
    far = open_source(f"{server.url}/shards")
    far.open(0)  # a connection of the parent, which its children must not use
    batches = list(make_loader(TrainDataset(far, [Geometry(8)]), OrderedSampler(len(far)), 8, workers=2))
    assert sorted(np.concatenate([b["indices"] for b in batches])) == list(range(len(far)))


def test_a_worker_hands_on_what_is_wrong_with_the_network(server):
    far = open_source(f"{server.url}/shards")
    for name in ("train-000000.tar", "train-000001.tar"):
        server.failures[f"shards/{name}"] = [503] * 999
    with pytest.raises(UserError, match="after 5 tries"):
        list(make_loader(TrainDataset(far, [Geometry(8)]), OrderedSampler(len(far)), 8, workers=1))


def test_memory_and_file_urls_work_like_others(shards, photos):
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    same(open_source("memory://bucket"), open_source(shards))
    same(open_source(f"file://{photos}"), open_source(photos))
    memory.rm("/bucket", recursive=True)


def test_a_tar_made_by_others_is_indexed_from_afar(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(3):
            png = io.BytesIO()
            Image.new("L", (4, 4), number).save(png, "PNG")
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(png.getvalue())
            tar.addfile(info, io.BytesIO(png.getvalue()))
    fsspec.filesystem("memory").pipe_file("/others/a.tar", file.getvalue())
    assert [open_source("memory://others/a.tar").name(k) for k in range(3)] == [
        "a/0.png",
        "a/1.png",
        "a/2.png",
    ]
    fsspec.filesystem("memory").rm("/others", recursive=True)


def test_pages_need_files_here(server):
    with pytest.raises(UserError, match="pages"):
        open_source(f"{server.url}/photos", pages="images")


@pytest.fixture
def bucket(monkeypatch, tmp_path_factory):
    """An S3 server on this machine."""
    pytest.importorskip("s3fs", reason="s3:// needs s3fs (freqmask[data])")
    moto = pytest.importorskip("moto.server", reason="the S3 test needs moto[server]")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield "images"
    server.stop()
    os.environ.pop("AWS_ENDPOINT_URL", None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_bucket_holds_shards_and_folders(bucket, shards, photos):
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir(bucket)
    system.put(str(shards), f"{bucket}/shards", recursive=True)
    system.put(str(photos), f"{bucket}/photos", recursive=True)
    same(open_source(f"s3://{bucket}/shards"), open_source(shards))
    same(open_source(f"s3://{bucket}/photos"), open_source(photos))
    tables = photos.parent / "tables"
    tables.mkdir()
    image = (photos / open_source(photos).name(0)).read_bytes()
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": [image] * 3, "label": [0, 1, 0]}), tables / f"{split}-0.parquet")
    system.put(str(tables), f"{bucket}/tables", recursive=True)
    same(open_source(f"s3://{bucket}/tables"), open_source(tables))
    same(open_source(f"s3://{bucket}/tables/t*.parquet", split="test"), open_source(tables, split="test"))
    far = open_source(f"s3://{bucket}/shards")
    batches = list(make_loader(TrainDataset(far, [Geometry(8)]), OrderedSampler(len(far)), 8, workers=1))
    assert sum(len(batch["indices"]) for batch in batches) == len(far)
    with pytest.raises(UserError, match="not there"):
        open_source("s3://images/nowhere")


def test_a_server_that_answers_everything_with_a_page_is_a_sentence(tmp_path):
    with serving(tmp_path, Paging) as server:
        sentences = {
            "shards": "cannot be listed",
            "shards/a.tar": "or no tar",
            "shards/a-*.tar": "no file fits",
        }
        for name, words in {**sentences, "x.parquet": "or no parquet file"}.items():
            with pytest.raises(UserError, match=words):
                open_source(f"{server.url}/{name}")


class Paging(Handler):
    """Sends people who are not logged in a page, whatever they ask for."""

    def do_GET(self):
        page = b"<!DOCTYPE html><html><body>Please log in</body></html>" * 40
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(page)

    def do_HEAD(self):
        self.do_GET()


def test_a_redirect_in_a_circle_is_a_sentence(tmp_path):
    with serving(tmp_path, Circling) as server, pytest.raises(UserError, match="after 5 tries"):
        open_source(f"{server.url}/x.parquet")


class Circling(Handler):
    """Sends every request back to where it came from."""

    def do_GET(self):
        self.send_response(302)
        self.send_header("Location", self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self):
        self.do_GET()


@pytest.mark.parametrize("harm", ["damaged", "no folder"])
def test_a_damaged_or_impossible_cache_of_a_remote_index_costs_nothing(
    server, shards, tmp_path, monkeypatch, harm
):
    if harm == "damaged":
        open_source(f"{server.url}/shards")
        (cached,) = cache_folder().glob("remote-index-*")
        cached.write_bytes(cached.read_bytes()[:-9])
    else:
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    same(open_source(f"{server.url}/shards"), open_source(shards))
