"""Images into shards: nothing lost that was not said to be, and the same bytes however often it was killed."""

import io
import json
import tarfile

import numpy as np
import pytest
import tifffile
from PIL import Image
from pyarrow import feather

from freqmask.commands.prepare import empty_octave_share, spectrum_words
from freqmask.data import sharding as prepare_module
from freqmask.data.decode import open_bytes, open_file
from freqmask.data.pixels import ArrayPicture, missing_pixels
from freqmask.data.sharding import (
    Settings,
    encode_picture,
    images_there,
    member_key,
    open_parts,
    prepare_shards,
    read_manifest,
    reduced,
    reduced_size,
)
from freqmask.data.sources import open_source
from freqmask.errors import BadImage, UserError
from freqmask.training.files import read_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def noise(seed, height=20, width=24, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path):
    """Twelve photographs in two classes and two splits, two of them broken, names that a tar dislikes."""
    root = tmp_path / "photos"
    for number in range(12):
        split = "val" if number > 8 else "train"
        path = root / split / f"class {number % 2}" / f"img.v{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(number)).save(path)
    (root / "train/class 0/img.v2.jpg").write_bytes(b"")
    (root / "train/class 0/img.v4.jpg").write_bytes((root / "train/class 0/img.v4.jpg").read_bytes()[:200])
    return root


def prepared(data, out, resize=None, size=3, workers=0, report=lambda done: None, **how):
    parts, _ = open_parts([data], how.get("pages", "channels"), how.get("split", "all"), how.get("labels"))
    settings = Settings(resize, size, "channels", "all", parts.content)
    return prepare_shards(parts, settings, out, workers, report)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_names_labels_and_splits_are_kept(photos, tmp_path):
    outcome = prepared(photos, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "prepare.json", "shards.index", "skipped.csv", "train-000000.tar", "train-000001.tar",
        "train-000002.tar", "val-000000.tar",
    ]  # fmt: skip
    assert {name for name, _ in outcome.skipped} == {"train/class 0/img.v2.jpg", "train/class 0/img.v4.jpg"}
    for split, count in (("train", 7), ("val", 3), ("all", 10)):
        before, after = open_source(photos, split=split), open_source(tmp_path / "out", split=split)
        known = {before.name(k): k for k in range(len(before))}
        assert len(after) == count and after.class_names == ["class 0", "class 1"]
        for k in range(len(after)):
            own = known[after.name(k)]
            assert after.label(k) == before.label(own)
            assert after.encoded(k) == before.encoded(own)  # byte for byte


def test_bad_images_are_listed_with_reasons(photos, tmp_path):
    prepared(photos, tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "skipped.csv")
    assert {row["name"]: row["reason"] for row in rows}["train/class 0/img.v2.jpg"] == "the file is empty"


def test_webdataset_finds_its_samples(photos, tmp_path):
    prepared(photos, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "val-000000.tar") as tar:
        names = tar.getnames()
        assert len(names) == 6
        for image, label in zip(names[::2], names[1::2], strict=True):
            assert image.count(".") == 1 and label == image.removesuffix(".jpg") + ".cls"
            assert tar.extractfile(label).read().decode() == image[len("val/class_")]


def test_shards_without_their_index_hold_the_same_images(photos, tmp_path):
    prepared(photos, tmp_path / "out")
    whole = open_source(tmp_path / "out", split="all")
    (tmp_path / "out" / "shards.index").unlink()
    plain = open_source(tmp_path / "out", split="all")
    assert [plain.encoded(k) for k in range(10)] == [whole.encoded(k) for k in range(10)]
    assert plain.all_labels().tolist() == whole.all_labels().tolist()
    assert [plain.identity(k) for k in range(10)] == [whole.identity(k) for k in range(10)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_kill_and_another_start_give_the_same_bytes(photos, tmp_path, workers):
    class Killed(BaseException):
        pass

    def kill(done):
        if done == 5:
            raise Killed

    prepared(photos, tmp_path / "whole")
    with pytest.raises(Killed):
        prepared(photos, tmp_path / "out", workers=workers, report=kill)
    first = (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns
    assert not (tmp_path / "out" / "train-000001.tar").exists()
    assert read_manifest(tmp_path / "out")[1] is False
    with pytest.raises(UserError, match="is not finished: freqmask prepare was cut short there"):
        open_source(tmp_path / "out")
    done = []
    prepared(photos, tmp_path / "out", workers=workers, report=done.append)
    assert len(done) == 9  # the finished shard of three was not made again
    assert (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns == first
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert read_manifest(tmp_path / "out")[1] is True
    (tmp_path / "out" / "train-000001.tar").unlink()
    assert read_manifest(tmp_path / "out")[1] is False  # so that the same command makes it again
    prepared(photos, tmp_path / "out", workers=workers)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_is_a_sentence_and_can_go_on(photos, tmp_path, monkeypatch):
    import errno

    write = prepare_module.write_shard

    def full(path, images):
        if path.name == "train-000001.tar":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, images)

    monkeypatch.setattr(prepare_module, "write_shard", full)
    with pytest.raises(UserError, match="disk is full"):
        prepared(photos, tmp_path / "out")
    monkeypatch.setattr(prepare_module, "write_shard", write)
    prepared(photos, tmp_path / "out")
    prepared(photos, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_groups_go_along(photos, tmp_path):
    rows = "".join(f"train/class {k % 2}/img.v{k}.jpg,kind{k},p{k // 3}\n" for k in range(9))
    (tmp_path / "labels.csv").write_text("path,label,group\n" + rows)
    prepared(photos, tmp_path / "out", labels=tmp_path / "labels.csv")
    source = open_source(tmp_path / "out")
    assert {source.name(k)[-5]: source.group(k) for k in range(len(source))} == {
        "0": "p0", "1": "p0", "3": "p1", "5": "p1", "6": "p2", "7": "p2", "8": "p2",
    }  # fmt: skip
    assert source.class_names == [f"kind{k}" for k in range(9)]  # also those of images that cannot be read


def test_only_unreadable_images_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="not one of the 1 images"):
        prepared(tmp_path / "photos", tmp_path / "out")


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="something else"):
        read_manifest(tmp_path)
    (tmp_path / "prepare.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_manifest(tmp_path)


def test_large_images_are_reduced_and_small_ones_are_not(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(noise(0, 100, 200)).save(tmp_path / "photos" / "large.png")
    Image.fromarray(noise(1, 30, 40)).save(tmp_path / "photos" / "small.png")
    outcome = prepared(tmp_path / "photos", tmp_path / "out", resize=50)
    source = open_source(tmp_path / "out")
    sizes = {source.name(k): (source.open(k).size, source.encoded(k)[1]) for k in range(2)}
    assert sizes == {"large.png": ((50, 100), ".jpg"), "small.png": ((30, 40), ".png")}
    assert outcome.reductions == [0.5]


def test_a_strip_that_is_too_long_for_a_jpeg_stays_an_image():
    long = ArrayPicture(np.tile(noise(0, 20, 50), (1, 1700, 1)))  # 85,000 pixels; a JPEG ends at 65,500
    packed = encode_picture(long, None, 16)
    assert packed.size == (16, 68_000) and open_bytes(packed.data).size == packed.size


def test_a_reduced_photograph_is_pillows_bicubic_within_jpegs_loss():
    smooth = np.asarray(Image.fromarray(noise(0, 10, 12)).resize((240, 200), Image.Resampling.BICUBIC))
    encoded = encode_picture(ArrayPicture(smooth), None, 100)
    expected = np.asarray(Image.fromarray(smooth).resize((120, 100), Image.Resampling.BICUBIC))
    found = open_bytes(encoded.data).decode().transpose(1, 2, 0)
    assert np.abs(found.astype(int) - expected).mean() < 2
    assert encoded.suffix == ".jpg" and encoded.reduction == 0.5


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("nodata", [None, -7.0])
def test_all_bits_and_bands_survive(kind, channels, nodata):
    values = np.random.default_rng(0).normal(300, 200, (20, 26, channels)).astype(kind)
    picture = ArrayPicture(values)
    picture.nodata = nodata if kind in ("int16", "float32") else None
    back = open_bytes(encode_picture(picture, None, None).data)
    assert (back.dtype, back.channels, back.nodata) == (kind, channels, picture.nodata)
    assert np.array_equal(back.decode(), values.transpose(2, 0, 1))
    small = open_bytes(encode_picture(picture, None, 10).data)
    assert (small.dtype, small.channels, small.size) == (kind, channels, (10, 13))


@pytest.mark.parametrize(("kind", "nodata"), [("float32", None), ("int16", -7.0)])
def test_what_was_not_measured_stays_so(kind, nodata):
    values = np.random.default_rng(0).normal(300, 200, (2, 40, 40)).astype(kind)
    hole = np.nan if nodata is None else nodata
    values[:, :20] = hole
    small = reduced(values, (20, 20), nodata)
    missing = np.isnan(small) if nodata is None else small == nodata
    assert missing[:, :9].all() and not missing[:, 11:].any()
    assert small[~missing].min() >= np.nanmin(np.where(values == hole, 300, values))
    with pytest.raises(BadImage, match="missing"):
        reduced(np.full((1, 40, 40), hole, kind), (20, 20), nodata)


def test_a_tile_of_8_bits_keeps_its_gaps_and_only_such_a_tile_is_no_jpeg(tmp_path):
    tags = {
        "metadata": None,
        "photometric": "rgb",
        "extratags": [(42113, "s", 0, "0", True)],
    }  # GDAL's nodata
    values = noise(0, 80, 80) // 2 + 60
    tifffile.imwrite(tmp_path / "whole.tif", values, **tags)
    values[:, :40] = 0
    tifffile.imwrite(tmp_path / "edge.tif", values, **tags)
    edge, whole = (open_file(tmp_path / f"{name}.tif") for name in ("edge", "whole"))
    encoded = encode_picture(edge, None, 40)
    assert tifffile.imread(io.BytesIO(encoded.data))[:, :19].max() == 0
    small = open_bytes(encoded.data)
    missing = missing_pixels(small.decode(), small.nodata)
    assert missing[:, :, :19].all() and not missing[:, :, 21:].any()
    assert encode_picture(whole, None, 40).suffix == ".jpg"


def test_pages_become_images(tmp_path):
    (tmp_path / "stack").mkdir()
    pages = np.random.default_rng(0).integers(0, 4000, (3, 16, 16)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "stack" / "s.tif", pages, photometric="minisblack")
    prepared(tmp_path / "stack", tmp_path / "out", pages="images")
    source = open_source(tmp_path / "out")
    found = {source.name(k): source.open(k).decode()[0] for k in range(3)}
    assert all(np.array_equal(found[f"s.tif#{k}"], pages[k]) for k in range(3))


def test_members_have_names_of_their_own():
    taken = set()
    assert [member_key(n, taken) for n in ("a/b.c.png", "a/b_c.jpg", "0:x y.png", "\udce9.png")] == [
        "a/b_c", "a/b_c_2", "0_x_y", "_",
    ]  # fmt: skip


def test_the_shorter_side_decides():
    assert reduced_size((3000, 4000), 448) == (448, 597)
    assert reduced_size((448, 4000), 448) == (448, 4000)
    assert reduced_size((5, 5000), None) == (5, 5000)


def test_the_share_of_the_octave_agrees_with_drawn_crops():
    share = np.random.default_rng(0).uniform(0.2, 1, 100_000)
    end = 0.5 * np.minimum(256 * np.sqrt(share) / 224, 1)  # where a crop's frequencies end, cycles a pixel
    empty = (0.5 - np.maximum(end, 0.25)) / 0.25
    assert empty_octave_share(256) == pytest.approx(empty.mean(), abs=0.005)
    assert empty_octave_share(2000) == 0


def test_the_words_name_share_and_cut_off():
    words = " ".join(spectrum_words([0.5, 0.25, 0.2], 4, 448))
    assert "3 of 4 images (75%)" in words and "0.12 cycles" in words and "69%" in words
    assert "untouched" in spectrum_words([], 4, 448)[0]


def test_the_manifest_names_settings_classes_and_shards(photos, tmp_path):
    prepared(photos, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert manifest["settings"]["shard_size"] == 3 and manifest["class_names"] == ["class 0", "class 1"]
    assert [name for name, _, _ in manifest["shards"]][-1] == "val-000000.tar"
    (photos / "other").mkdir()
    Image.fromarray(noise(9)).save(photos / "other" / "x.png")
    parts, notes = open_parts([photos], "channels", "all", None)
    assert parts.count == 12 and notes[-1] == "1 images outside of train, val are left out."
    parts, notes = open_parts([photos], "channels", "auto", None)
    assert [split for split, _ in parts.parts] == [None] and "Only train is used" in notes[0]


def test_the_same_command_twice_at_once_is_a_sentence(photos, tmp_path):
    def take_away(done):
        for path in (tmp_path / "out" / ".parts").glob("*.index"):
            path.unlink()  # as the other one does when it is through

    with pytest.raises(UserError, match="started twice"):
        prepared(photos, tmp_path / "out", report=take_away)


@pytest.mark.parametrize(
    "told", [None, {"a": "b"}, {"written": "3"}, {"written": "{}"}, {"written": "[" * 9999}]
)
def test_damaged_notes_of_a_finished_shard_have_it_written_again(photos, tmp_path, told):
    prepared(photos, tmp_path / "one")
    parts, _ = open_parts([photos], "channels", "all", None)
    settings = Settings(None, 3, "channels", "all", parts.content)
    planned = parts.shards(3)
    (tmp_path / "two").mkdir()
    prepare_module._write_missing(parts, settings, tmp_path / "two", planned[:1], 0, lambda done: None)
    part = prepare_module._part_file(tmp_path / "two", planned[0])
    feather.write_feather(feather.read_table(part).replace_schema_metadata(told), str(part))
    assert images_there(tmp_path / "two", parts, settings) == 0
    prepare_shards(parts, settings, tmp_path / "two", 0)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("manifest", ['"x"', '{"settings": "x"}', '{"settings": []}', "[" * 99_999])
def test_a_damaged_manifest_is_a_sentence(tmp_path, manifest):
    (tmp_path / "prepare.json").write_text(manifest)
    with pytest.raises(UserError, match="is damaged; delete"):
        read_manifest(tmp_path)


def test_a_folder_that_the_first_release_began_is_continued(photos, tmp_path):
    prepared(photos, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "prepare.json").read_text())
    manifest["settings"]["lanes"] = manifest["settings"].pop("workers")
    (tmp_path / "out" / "prepare.json").write_text(json.dumps(manifest))
    (tmp_path / "out" / ".parts").mkdir()
    (tmp_path / "out" / ".parts" / "train-000000.tar.index").write_bytes(b"freqmask" + bytes(60))
    settings, finished = read_manifest(tmp_path / "out")
    assert finished and settings.workers == 1
    parts, _ = open_parts([photos], "channels", "all", None)
    assert images_there(tmp_path / "out", parts, settings) == 0  # rows in another form are written anew


def test_splits_whose_names_differ_in_odd_signs_only_lose_no_image(tmp_path):
    (photos := tmp_path / "photos").mkdir()
    names = [f"{number}.png" for number in range(12)]
    for number, name in enumerate(names):
        Image.fromarray(noise(number)).save(photos / name)
    splits = ["fold 1", "fold.1", "fold?1"]
    rows = [f"{name},a,{splits[number % 3]}" for number, name in enumerate(names)]
    (table := tmp_path / "splits.csv").write_text("\n".join(["path,label,split", *rows]))
    prepared(photos, tmp_path / "out", labels=table)
    for number, split in enumerate(splits):
        source = open_source(tmp_path / "out", split=split)
        assert {source.name(index) for index in range(len(source))} == set(names[number::3])
