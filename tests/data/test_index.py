"""The index of a folder: complete, compact, cached, and refreshed when a folder changes."""

import io
import multiprocessing
import os
import pickle
import shutil
import tarfile
import time

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from freqmask.data import index as index_module
from freqmask.data.cache import cache_folder, read_arrays, write_arrays
from freqmask.data.index import index_folder, index_listing
from freqmask.data.source import JoinedSource, Subset
from freqmask.data.sources import open_source

SUFFIXES = frozenset({".jpg", ".png"})


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def reads(monkeypatch):
    """Counts the folders that are really read."""
    paths = []
    read = index_module._read_folder

    def counting(path, *rest):
        paths.append(os.fsdecode(path))
        return read(path, *rest)

    monkeypatch.setattr(index_module, "_read_folder", counting)
    return paths


def plant(root, *names, size=3):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


def age(root):
    """Makes every folder look unchanged for an hour, as it would be at the next start."""
    for path in (root, *(p for p in root.rglob("*") if p.is_dir() and not p.is_symlink())):
        then = path.stat().st_mtime - 3600
        os.utime(path, (then, then))


def listed(index):
    return [index.relative(number) for number in range(len(index))]


def test_files_are_listed_in_a_fixed_order_and_others_counted(tmp_path):
    plant(
        tmp_path,
        "b/2.JPG",
        "b/1.png",
        "a/deep/x.jpg",
        "z.jpg",
        "a/notes.txt",
        "a/more.txt",
        "plain",
        ".hidden.jpg",
    )
    index = index_folder(tmp_path, SUFFIXES)
    assert listed(index) == ["z.jpg", "a/deep/x.jpg", "b/1.png", "b/2.JPG"]
    assert index.ignored == {".txt": 2, "": 1}
    assert index.path(1) == tmp_path / "a/deep/x.jpg"


ODD_NAMES = [
    "two words.jpg",
    "Grüße-写真.jpg",
    "new\nline.jpg",
    os.fsdecode(b"latin-\xe9.jpg"),
    "..dots.. .jpg",
]


def test_odd_names_survive_the_cache(tmp_path):
    folder = tmp_path / os.fsdecode(b"odd \xff folder")
    plant(folder, *ODD_NAMES[:4], "a..dots.. .jpg")
    first = index_folder(tmp_path, SUFFIXES)
    age(tmp_path)
    index_folder(tmp_path, SUFFIXES)
    again = index_folder(tmp_path, SUFFIXES)
    assert listed(first) == listed(again)
    assert all(again.path(number).read_bytes() == b"xxx" for number in range(5))


def test_an_unchanged_folder_is_not_read_again(tmp_path, reads):
    plant(tmp_path, "a/1.jpg", "b/1.jpg")
    age(tmp_path)
    first = index_folder(tmp_path, SUFFIXES)
    assert len(reads) == 3
    again = index_folder(tmp_path, SUFFIXES)
    assert len(reads) == 3
    assert listed(again) == listed(first) and again.fingerprint == first.fingerprint


@pytest.mark.parametrize("change", ["add", "remove", "rename", "new folder", "remove folder"])
def test_only_what_changed_is_read_again(tmp_path, reads, change):
    plant(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg", "c/1.jpg")
    age(tmp_path)
    before = index_folder(tmp_path, SUFFIXES)
    reads.clear()
    if change == "add":
        plant(tmp_path, "a/3.jpg")
    elif change == "remove":
        (tmp_path / "a/1.jpg").unlink()
    elif change == "rename":
        (tmp_path / "a/1.jpg").rename(tmp_path / "a/0.jpg")
    elif change == "new folder":
        plant(tmp_path, "d/1.jpg")
    else:
        (tmp_path / "c/1.jpg").unlink()
        (tmp_path / "c").rmdir()
    after = index_folder(tmp_path, SUFFIXES)
    expected = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.jpg"))
    assert sorted(listed(after)) == expected
    assert after.fingerprint != before.fingerprint
    assert str(tmp_path / "b") not in reads
    assert listed(index_folder(tmp_path, SUFFIXES, use_cache=False)) == listed(after)


def test_a_folder_that_just_changed_is_read_again(tmp_path, reads):
    plant(tmp_path, "1.jpg")
    stamp = tmp_path.stat().st_mtime_ns
    index_folder(tmp_path, SUFFIXES)
    plant(tmp_path, "2.jpg")
    os.utime(tmp_path, ns=(stamp, stamp))  # within the same tick of the file system's clock
    assert listed(index_folder(tmp_path, SUFFIXES)) == ["1.jpg", "2.jpg"]


def test_a_folder_that_was_unpacked_anew_with_its_old_time_is_read_again(tmp_path):
    """As tar, cp -a and rsync -a leave it: the time is the archive's, to the nanosecond."""
    for names in (["a/1.jpg", "a/2.jpg"], ["a/2.jpg", "a/3.jpg", "a/4.jpg"]):
        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            for name in ("a", *names):
                info = tarfile.TarInfo(name)
                info.type, info.mode = (tarfile.REGTYPE, 0o644) if "." in name else (tarfile.DIRTYPE, 0o755)
                info.mtime = 1_600_000_000
                tar.addfile(info, io.BytesIO())
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        with tarfile.open(tmp_path / "set.tar") as tar:
            tar.extractall(tmp_path / "set", filter="data")
        os.utime(tmp_path / "set", (1_600_000_000,) * 2)
        assert (tmp_path / "set" / "a").stat().st_mtime == 1_600_000_000
        assert listed(index_folder(tmp_path / "set", SUFFIXES)) == names
        time.sleep(0.05)  # the system's clock has ticks of up to 10 ms


def bitmap(value):
    """A file of an image of one gray; as many bytes whatever the value."""
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "BMP")
    return file.getvalue()


def rewrite_folder(root, value):
    plant(root, "0.bmp", "1.bmp", size=0)
    for name in ("0.bmp", "1.bmp"):
        (root / name).write_bytes(bitmap(value))
    return open_source(root)


def rewrite_array(root, value):
    stack = np.zeros((6, 4, 4), np.uint8)
    stack[1] = value  # none of the first, the middle and the last
    np.save(root / "images.npy", stack)
    return open_source(root / "images.npy")


def rewrite_table(root, value):
    column = pa.array([{"bytes": bitmap(value), "path": "a.bmp"}] * 2)
    pq.write_table(
        pa.table({"image": column}), root / "a.parquet", compression="none", write_statistics=False
    )
    return open_source(root / "a.parquet")


def rewrite_server(root, value):
    system = fsspec.filesystem("memory")
    system.pipe("/rewritten/0.bmp", bitmap(value))
    return open_source("memory://rewritten")


@pytest.mark.parametrize("rewrite", [rewrite_folder, rewrite_array, rewrite_table, rewrite_server])
def test_an_image_rewritten_under_its_name_changes_the_stamp_of_the_content_alone(tmp_path, rewrite):
    def stamps(source):
        return [(one.fingerprint(), one.content_stamp()) for one in of(source)]

    def of(source):
        return [source, Subset(source, [0]), JoinedSource([source, source])]

    source = rewrite(tmp_path, 0)
    age(tmp_path)
    before = stamps(source)
    assert before == stamps(pickle.loads(pickle.dumps(source)))
    after = stamps(rewrite(tmp_path, 9))
    for (name, content), (same_name, other_content) in zip(before, after, strict=True):
        assert name == same_name
        assert content != other_content


def test_pages_of_a_rewritten_file_are_counted_anew(tmp_path):
    for pages in (3, 2):
        tifffile.imwrite(tmp_path / "a.tif", np.zeros((pages, 8, 8), np.uint8), photometric="minisblack")
        os.utime(tmp_path, (0, 0))  # as one that has not changed for long
        assert len(open_source(tmp_path, pages="images")) == pages


@pytest.mark.parametrize("damage", ["truncated", "garbage", "one byte", "empty"])
def test_a_corrupt_cache_is_rebuilt(tmp_path, damage):
    plant(tmp_path, *(f"a/{number:03d}.jpg" for number in range(50)))
    age(tmp_path)
    before = listed(index_folder(tmp_path, SUFFIXES))
    (file,) = cache_folder().glob("index-*")
    content = bytearray(file.read_bytes())
    if damage == "one byte":
        content[content.rindex(b"049.jpg")] ^= 0xFF  # in a name
    file.write_bytes(
        {"truncated": content[:-64], "garbage": b"freqmask" + bytes(99), "empty": b""}.get(damage, content)
    )
    assert listed(index_folder(tmp_path, SUFFIXES)) == before
    assert read_arrays(file) is not None  # written anew


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    plant(tmp_path, "images/1.jpg", "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert listed(index_folder(tmp_path / "images", SUFFIXES)) == ["1.jpg"]


def test_the_cache_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "kept.bin"
    assert write_arrays(file, {"n": 1}, {"a": np.arange(5)})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", full)
        assert not write_arrays(file, {"n": 2}, {"a": np.arange(6)})
    about, arrays = read_arrays(file)
    assert about == {"n": 1} and arrays["a"].tolist() == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["kept.bin"]


def test_loops_of_links_end_and_linked_folders_are_entered_once(tmp_path):
    plant(tmp_path, "data/a/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/self.jpg").symlink_to(tmp_path / "data/self.jpg")
    (tmp_path / "data/broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    index = index_folder(tmp_path / "data", SUFFIXES)
    assert listed(index) == ["broken.jpg", "self.jpg", "a/1.jpg", "b/2.jpg"]


def test_a_pipe_under_an_images_name_is_left_alone(tmp_path):
    plant(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert listed(index_folder(tmp_path, SUFFIXES)) == ["1.jpg"]


def test_a_large_index_travels_as_the_name_of_its_cache(tmp_path, monkeypatch):
    plant(tmp_path, *(f"{number:04d}.jpg" for number in range(300)))
    index = index_folder(tmp_path, SUFFIXES)
    whole = pickle.dumps(index)
    monkeypatch.setattr(index_module, "SENT_WHOLE_BYTES", 0)
    small = pickle.dumps(index)
    assert len(small) < 600 < len(whole)
    assert listed(pickle.loads(small)) == listed(pickle.loads(whole)) == listed(index)


def test_an_index_takes_about_thirty_bytes_a_file(tmp_path):
    plant(tmp_path, *(f"class{number % 9}/image-{number:06d}.jpg" for number in range(900)))
    index_folder(tmp_path, SUFFIXES)
    (file,) = cache_folder().glob("index-*")
    assert file.stat().st_size < 40 * 900


def test_an_index_replaced_by_another_process_travels_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "SENT_WHOLE_BYTES", 0)
    plant(tmp_path, "1.jpg", "2.jpg")
    index = index_folder(tmp_path, SUFFIXES)
    plant(tmp_path, "3.jpg")
    index_folder(tmp_path, SUFFIXES)  # as a second command does meanwhile
    assert listed(pickle.loads(pickle.dumps(index))) == ["1.jpg", "2.jpg"]


def index_again(root, barrier):
    barrier.wait()
    for _ in range(20):
        assert len(index_folder(root, SUFFIXES)) >= 50


def test_processes_that_write_one_cache_at_once_all_succeed(tmp_path):
    plant(tmp_path, *(f"a/{number:03d}.jpg" for number in range(50)))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    workers = [context.Process(target=index_again, args=(tmp_path, barrier)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert read_arrays(next(cache_folder().glob("index-*"))) is not None


@pytest.mark.parametrize("content", [{}, {"folders": ["", "x"], "tree": [], "own": [], "unreadable": []}])
def test_a_cache_with_something_else_in_it_is_rebuilt(tmp_path, content):
    plant(tmp_path, "1.jpg")
    index_folder(tmp_path, SUFFIXES)
    (file,) = cache_folder().glob("index-*")
    write_arrays(file, content, {"starts": np.zeros(2, np.int64)})
    assert listed(index_folder(tmp_path, SUFFIXES)) == ["1.jpg"]


def test_a_flipped_bit_anywhere_in_a_cache_is_noticed(tmp_path):
    file = tmp_path / "x.bin"
    write_arrays(file, {"names": ["a", "b"]}, {"numbers": np.arange(5), "flags": np.ones(3, bool)})
    whole = file.read_bytes()
    about, arrays = read_arrays(file, holding=["numbers", "flags"])
    for place in [*range(0, len(whole), 7), 60, 80, 100]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        read = read_arrays(file)  # what lies between arrays is nobody's
        assert read is None or (
            read[0] == about and all(np.array_equal(read[1][n], arrays[n]) for n in arrays)
        )
    file.write_bytes(whole)
    assert read_arrays(file, holding=["pixels"]) is None


def test_what_a_killed_process_left_in_the_cache_goes_after_a_day(tmp_path):
    write_arrays(tmp_path / "x.bin", {}, {})
    for name, age in (("x.binold.tmp", 90_000), ("x.binnew.tmp", 60), ("y.binold.tmp", 90_000)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_arrays(tmp_path / "x.bin", {}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"x.bin", "x.binnew.tmp", "y.binold.tmp"}


def test_a_run_among_the_files_of_a_server_is_passed_over():
    files = dict.fromkeys(["a.png", "runs/r/config.yaml", "runs/r/metrics.csv", "runs/r/previews/1.png"], 9)
    index = index_listing("memory://x", files, frozenset({".png"}))
    assert list(index.paths()) == [b"a.png"] and index.own == ["runs/r"]
