"""Features on the disk are the model's, in the data's order, and survive a crash."""

import csv
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_runs import make_run

import freqmask
from freqmask.commands.inference import EmbedConfig, Embedding, plan_parts, some_parts
from freqmask.data.sources import open_source
from freqmask.errors import UserError
from freqmask.evaluation.features import part_images
from freqmask.interop.feature_files import Parts, join_parts, nearest_neighbors, task_of
from freqmask.interop.models import open_model, still_images
from freqmask.spectrum import as_float
from freqmask.training.files import MARKER

CPU = torch.device("cpu")


def planned(opened, source, out, config=None):
    task = Embedding(opened, config)
    parts = plan_parts(task, source, out)
    return task, parts, parts.begin()


def share(task, source, parts, batch_size=4, workers=0, places=None):
    missing = parts.missing()
    places = range(len(missing)) if places is None else places
    return some_parts(CPU, places, missing, task, source, parts, batch_size, workers, False)


def run(opened, source, out, config=None, **place):
    task, parts, _ = planned(opened, source, out, config)
    computed = sum(share(task, source, parts, **place))
    rows, skipped = join_parts(parts, task.grid if task.config.patches else None)
    assert computed == len(source)
    return rows, skipped


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr("freqmask.interop.feature_files._FEWEST_IMAGES", 3)


def expected_features(opened, source, index):
    image = as_float(still_images(opened, source)[0, index, index].views[0])
    with torch.no_grad():
        return opened.backbone(opened.normalise(image[None]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_is_the_feature_of_its_image_and_bad_images_are_left_out(
    vit_run, photographs, tmp_path, small_parts, workers
):
    opened, source = open_model(vit_run.path), open_source(photographs)
    rows, skipped = run(opened, source, tmp_path / "x.parquet", workers=workers)
    table = pq.read_table(tmp_path / "x.parquet")
    assert (rows, table.num_rows) == (6, 6)
    assert [name for name, _ in skipped] == ["cats/9.png"]
    assert table["path"].to_pylist() == [
        "cats/1.png",
        "cats/3.png",
        "cats/5.png",
        "dogs/0.png",
        "dogs/2.png",
        "dogs/4.png",
    ]
    assert table["class"].to_pylist() == ["cats"] * 3 + ["dogs"] * 3
    for row in table.to_pylist():
        expected = expected_features(opened, source, row["index"]).pooled[0]
        assert source.name(row["index"]) == row["path"]
        torch.testing.assert_close(torch.tensor(row["features"]), expected, atol=1e-5, rtol=0)


def test_what_of_a_folder_is_passed_over_is_said(vit_run, photographs, tmp_path, capsys):
    folder = tmp_path / "all"
    shutil.copytree(photographs, folder)
    Image.new("L", (8, 8)).save(folder / "a_mask.png")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    freqmask.embed(vit_run.path, folder, out=tmp_path / "x.npy", workers=0)
    assert "note: 1 masks beside their images" in capsys.readouterr().out


def test_patches_and_blocks_come_along(vit_run, photographs, tmp_path):
    opened, source = open_model(vit_run.path), open_source(photographs)
    run(opened, source, tmp_path / "x.parquet", EmbedConfig(patches=True, blocks=(0, 1)))
    row = pq.read_table(tmp_path / "x.parquet").to_pylist()[2]
    features = expected_features(opened, source, row["index"])
    patches = torch.tensor(row["patches"]).reshape(4, 4, 64)
    torch.testing.assert_close(patches, features.feature_map[0].permute(1, 2, 0), atol=1e-5, rtol=0)
    image = as_float(still_images(opened, source)[0, row["index"], row["index"]].views[0])[None]
    stages = opened.stages(opened.normalise(image))
    torch.testing.assert_close(torch.tensor(row["block_0"]), stages[0].pooled[0], atol=1e-5, rtol=0)


def test_a_npy_holds_one_array_and_names_its_rows(vit_run, photographs, tmp_path, small_parts):
    opened, source = open_model(vit_run.path), open_source(photographs)
    run(opened, source, tmp_path / "x.parquet")
    expected = np.array(pq.read_table(tmp_path / "x.parquet")["features"].to_pylist(), np.float32)
    run(opened, source, tmp_path / "x.npy")
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected)
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows][:2] == ["cats/1.png", "cats/3.png"]
    run(opened, source, tmp_path / "patches.npy", EmbedConfig(patches=True))
    assert np.load(tmp_path / "patches.npy").shape == (6, 4, 4, 64)
    run(opened, source, tmp_path / "blocks.npy", EmbedConfig(blocks=(0, 1)))
    assert np.load(tmp_path / "blocks.npy").shape == (6, 2, 64)


def test_a_start_that_was_cut_short_goes_on_and_ends_the_same(vit_run, photographs, tmp_path, small_parts):
    opened, source = open_model(vit_run.path), open_source(photographs)
    run(opened, source, tmp_path / "whole.parquet")
    out = tmp_path / "x.parquet"
    task, parts, _ = planned(opened, source, out)
    batches = share(task, source, parts, batch_size=1)
    done = sum(next(batches) for _ in range(4))
    batches.close()  # as a power cut would
    assert done == 4
    assert not out.exists()
    task, parts, whole = planned(opened, source, out)
    assert whole == 1
    assert sum(share(task, source, parts, batch_size=1)) == 4
    join_parts(parts)
    one, two = (pq.read_table(tmp_path / name) for name in ("whole.parquet", "x.parquet"))
    assert one["path"].equals(two["path"])
    a, b = (np.array(table["features"].to_pylist()) for table in (one, two))
    np.testing.assert_allclose(a, b, atol=1e-5)  # another batch size adds up in another order
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARKER, "whole.parquet", "x.parquet"]


def test_parts_of_other_weights_or_images_are_not_taken(vit_run, photographs, tmp_path, small_parts):
    source = open_source(photographs)
    for seed, expected in ((0, 0), (0, 3), (1, 0)):
        opened = open_model(f"random:{vit_run.path}", seed=seed)
        task, parts, whole = planned(opened, source, tmp_path / "x.parquet")
        assert whole == expected
        list(share(task, source, parts))


def test_several_processes_share_the_parts(vit_run, photographs, tmp_path, small_parts):
    opened, source = open_model(vit_run.path), open_source(photographs)
    task, parts, _ = planned(opened, source, tmp_path / "x.parquet")
    shares = [share(task, source, parts, 2, places=places) for places in part_images(parts.count, 1, 2)]
    assert [sum(done) for done in shares] == [3, 4]
    assert join_parts(parts)[0] == 6


def test_a_file_says_what_it_was_made_from(vit_run, photographs, tmp_path):
    opened, source = open_model(vit_run.path), open_source(photographs)
    run(opened, source, tmp_path / "x.parquet")
    task = task_of(tmp_path / "x.parquet")
    assert task == plan_parts(Embedding(opened), source, tmp_path / "x.parquet").task
    assert task["weights"] == opened.weights_hash
    assert task_of(photographs / "cats" / "1.png") is None


def test_a_part_that_is_missing_at_the_end_is_named(vit_run, photographs, tmp_path):
    opened, source = open_model(vit_run.path), open_source(photographs)
    _, parts, _ = planned(opened, source, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="1 parts of"):
        join_parts(parts)
    assert not (tmp_path / "x.parquet").exists()


@pytest.mark.parametrize(("images", "row_bytes"), [(1, 10), (65, 10), (100_000, 3000), (10_000, 10**9)])
def test_parts_cover_every_image_once(tmp_path, images, row_bytes):
    parts = Parts(tmp_path / "x.parquet", {}, images, row_bytes)
    covered = [index for number in range(parts.count) for index in parts.indices(number)]
    assert covered == list(range(images))


@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_nearest_neighbors_are_those_of_a_plain_search(vit_run, photographs, tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("freqmask.interop.feature_files._ROWS", 4)
    opened, source = open_model(vit_run.path), open_source(photographs)
    run(opened, source, tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    features = np.array(table["features"].to_pylist())
    if suffix == ".npy":
        run(opened, source, tmp_path / "x.npy")
    features = features - features.mean(axis=0)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    numbers = np.array(table["index"])
    found, scores = nearest_neighbors(tmp_path / f"x{suffix}", queries=6, neighbors=3)
    similarity = features @ features.T
    np.fill_diagonal(similarity, np.inf)
    expected = numbers[np.argsort(-similarity, axis=1)[:, :4]]
    assert np.array_equal(found, expected)
    np.testing.assert_allclose(scores[:, 1:], -np.sort(-similarity, axis=1)[:, 1:4], atol=1e-4)
    padded, _ = nearest_neighbors(tmp_path / f"x{suffix}", queries=2, neighbors=9)
    assert padded.shape == (2, 10)
    assert (padded[:, 6:] == -1).all()


def test_a_model_of_native_crops_is_shown_the_middle_at_its_own_resolution(tmp_path):
    run = make_run(tmp_path / "native", crop="native")
    opened = open_model(run.path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 90, 71, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    dataset = still_images(opened, open_source([str(tmp_path / "x.npy")]))
    view = dataset[(0, 1, 1)].views[0]
    middle = torch.from_numpy(pixels[1, 29 : 29 + 32, 19 : 19 + 32]).permute(2, 0, 1)
    assert torch.equal(view, middle)


@pytest.mark.parametrize("content", [b"", b"PAR1 cut off", None])
def test_parts_and_notes_that_were_damaged_are_made_again(
    vit_run, photographs, tmp_path, small_parts, content
):
    opened, source = open_model(vit_run.path), open_source(photographs)
    run(opened, source, tmp_path / "whole.parquet")
    task, parts, _ = planned(opened, source, tmp_path / "x.parquet")
    list(share(task, source, parts))
    if content is None:
        (parts.folder / "task.json").write_bytes(b"\xff{")
    else:
        parts.path(1).write_bytes(content)
    task, parts, _ = planned(opened, source, tmp_path / "x.parquet")
    list(share(task, source, parts))
    join_parts(parts, None)
    one, two = (pq.read_table(tmp_path / name) for name in ("whole.parquet", "x.parquet"))
    assert one.equals(two)
