"""``freqmask embed`` as a user types it."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from scipy.spatial import distance
from tiny_runs import make_photographs, make_run

import freqmask
from freqmask.cli import main
from freqmask.commands import sheets
from freqmask.data import image_folder
from freqmask.errors import BadImage, UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "mfm-vit").path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("photographs"))


def test_features_stand_beside_the_run_and_are_not_computed_twice(run, photographs, capsys):
    main(["embed", str(run), str(photographs), "--workers", "0", "--neighbours"])
    said = capsys.readouterr().out
    assert "6 of 7 images" in said
    assert "cats/9.png" in said
    assert pq.read_table(run / "embeddings.parquet").num_rows == 6
    assert (run / "embeddings.neighbours.png").read_bytes().startswith(b"\x89PNG")
    main(["embed", str(run), str(photographs), "--workers", "0"])
    assert "is there already" in capsys.readouterr().out


def test_the_figure_of_neighbors_says_of_what_its_cosines_are(run, photographs, tmp_path, monkeypatch):
    shown, whole = {}, sheets.nearest_neighbors
    monkeypatch.setattr(sheets, "nearest_neighbors", lambda *all: shown.setdefault("found", whole(*all)))
    new = sheets.new_sheet
    monkeypatch.setattr(sheets, "new_sheet", lambda *all: shown.setdefault("title", all[3]) and new(*all))
    main(
        [
            "embed",
            str(run),
            str(photographs),
            "--workers",
            "0",
            "--neighbours",
            "--out",
            str(tmp_path / "f.npy"),
        ]
    )
    features = np.load(tmp_path / "f.npy").astype(float)
    centered = features - features.mean(axis=0)
    similar = 1 - distance.cdist(centered, centered, "cosine")
    _, scores = shown["found"]
    order = -np.sort(-similar[0])
    np.testing.assert_allclose(scores[0][1 : len(order)], order[1 : scores.shape[1]], atol=1e-5)
    assert "cosine, after the mean of all is taken off" in shown["title"]


def test_an_image_that_can_be_read_again_is_in_the_file_again(
    run, photographs, tmp_path, monkeypatch, capsys
):
    out, read = tmp_path / "x.parquet", image_folder.open_file

    def away(path, *rest):
        if path.name == "1.png":
            raise BadImage("the network drive is away")
        return read(path, *rest)

    monkeypatch.setattr(image_folder, "open_file", away)
    for _ in range(2):  # it is not computed anew for what still cannot be read
        freqmask.embed(run, photographs, out=out, workers=0)
    assert capsys.readouterr().out.count("left out    cats/1.png") == 1
    assert "cats/1.png" not in pq.read_table(out)["path"].to_pylist()
    monkeypatch.undo()
    freqmask.embed(run, photographs, out=out, workers=0)
    assert "cats/1.png" in pq.read_table(out)["path"].to_pylist()


def test_an_image_of_channels_that_the_model_does_not_take_is_no_reason_to_begin_again(run, tmp_path, capsys):
    folder = make_photographs(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 40, 40), dtype=np.uint8)
    tifffile.imwrite(folder / "cats" / "bands.tif", pixels, photometric="minisblack")
    for _ in range(2):
        freqmask.embed(run, folder, out=tmp_path / "x.parquet", workers=0)
    printed = capsys.readouterr().out
    assert printed.count("it has 5 channels") == 1 and "is there already" in printed


def test_a_file_of_an_earlier_version_is_made_anew_unasked(run, photographs, tmp_path):
    out = tmp_path / "x.parquet"
    freqmask.embed(run, photographs, out=out, workers=0)
    table = pq.read_table(out)
    note = json.loads(table.schema.metadata[b"freqmask"])
    of_then = {name: value for name, value in note.items() if name not in ("mean", "std")}
    pq.write_table(table.replace_schema_metadata({"freqmask": json.dumps(of_then)}), out)
    freqmask.embed(run, photographs, out=out, workers=0)
    assert json.loads(pq.read_schema(out).metadata[b"freqmask"]) == note


def test_a_file_with_other_labels_is_something_else(run, photographs, tmp_path):
    table, out = tmp_path / "labels.csv", tmp_path / "x.parquet"
    names = [str(path.relative_to(photographs)) for path in sorted(photographs.glob("cats/[0-4].*"))]
    options = {"labels": str(table), "out": out, "workers": 0}
    for labels, more in ((["a", "b"], {}), (["b", "a"], {"overwrite": True})):
        wanted = [labels[k % 2] for k in range(len(names))]
        rows = [f"{name},{label}" for name, label in zip(names, wanted, strict=True)]
        table.write_text("\n".join(["path,label", *rows]) + "\n")
        if more:
            with pytest.raises(UserError, match="exists already"):
                freqmask.embed(run, photographs, **options)
        freqmask.embed(run, photographs, **options, **more)
        assert pq.read_table(out)["class"].to_pylist() == wanted


def test_another_mean_of_the_same_weights_gives_other_features(photographs, tmp_path):
    """Of a foreign checkpoint nobody tells them: whoever finds them out puts them into config.json."""
    freqmask.export("random:resnet10t", out=tmp_path / "model", image_size=32)
    words = {"model": tmp_path / "model", "data": [photographs], "image_size": 32, "workers": 0}
    freqmask.embed(**words, out=tmp_path / "x.parquet")
    config = tmp_path / "model" / "config.json"
    content = json.loads(config.read_text())
    content["pretrained_cfg"] |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    config.write_text(json.dumps(content))
    with pytest.raises(UserError, match="exists already"):
        freqmask.embed(**words, out=tmp_path / "x.parquet")
    freqmask.embed(**words, out=tmp_path / "x.parquet", overwrite=True)
    freqmask.embed(**words, out=tmp_path / "y.parquet")
    tables = [pq.read_table(tmp_path / name)["features"].to_pylist() for name in ("x.parquet", "y.parquet")]
    assert tables[0] == tables[1]


def test_a_file_of_something_else_is_not_replaced_unasked(run, photographs, tmp_path, capsys):
    out = tmp_path / "x.npy"
    out.write_bytes(b"something else")
    words = ["embed", str(run), str(photographs), "--out", str(out), "--workers", "0"]
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_bytes() == b"something else"
    table = out.with_suffix(".csv")
    out.rename(table)  # where the names of the rows go
    with pytest.raises(SystemExit):
        main(words)
    assert f"out ({table}) exists already" in capsys.readouterr().err
    assert table.read_bytes() == b"something else"
    main([*words, "--overwrite"])
    assert np.load(out).shape == (6, 64)
    assert "cats/1.png" in table.read_text()


def test_the_table_of_labels_is_never_replaced_by_the_names_of_the_rows(run, photographs, tmp_path):
    table = tmp_path / "photographs.csv"
    table.write_text("path,label\ncats/1.png,a\ncats/9.png,b\n")
    for out in (table.with_suffix(".npy"), tmp_path / ".." / tmp_path.name / "photographs.npy"):
        with pytest.raises(UserError, match=r"out \(.*photographs.csv\) is or holds .* would be lost"):
            freqmask.embed(run, photographs, labels=table, out=out, workers=0, overwrite=True)
    assert table.read_text() == "path,label\ncats/1.png,a\ncats/9.png,b\n"


def test_a_parquet_file_that_is_none_is_something_else_too(run, photographs, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"something else")
    with pytest.raises(UserError, match="exists already"):
        freqmask.embed(run, photographs, out=tmp_path / "x.parquet", workers=0)


@pytest.mark.slow
def test_two_processes_write_what_one_does(run, photographs, tmp_path):
    one = freqmask.embed(str(run), [str(photographs)], out=str(tmp_path / "1.npy"), workers=0)
    two = freqmask.embed(
        str(run), [str(photographs)], out=str(tmp_path / "2.npy"), workers=0, devices=2, accelerator="cpu"
    )
    assert np.array_equal(np.load(one), np.load(two))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--out", "x.csv"], "must end in .parquet or .npy"),
        (["--out", "x.npy", "--patches", "--blocks", "0"], "holds one array"),
        (["--blocks", "7"], "from 0 to 1"),
        (["--value_range", "0,x"], "value_range (0,x)"),
        (["--batch_size", "0"], "batch_size"),
        (["--accelerator", "tpu"], "accelerator (tpu)"),
        (["--split", "nothing"], "split"),
    ],
)
def test_what_cannot_be_is_one_sentence(run, photographs, capsys, words, sentence):
    with pytest.raises(SystemExit) as left:
        main(["embed", str(run), str(photographs), *words])
    assert left.value.code == 2
    assert sentence in capsys.readouterr().err


def test_blocks_of_several_widths_are_refused_before_they_are_computed(photographs, tmp_path):
    words = ["random:resnet10t", [str(photographs)]]
    with pytest.raises(UserError, match=r"blocks \(0, 4\) differ in width, .* --out .*x\.parquet"):
        freqmask.embed(*words, out=tmp_path / "x.npy", image_size=32, blocks=[0, 4], workers=0)
    assert not list(tmp_path.iterdir())


def test_similarities_have_digits_enough_to_differ() -> None:
    from freqmask.commands.sheets import _similarity

    assert [_similarity(score) for score in (-0.5, 0.984, 0.99912, 0.99949)] == [
        "-0.50",
        "0.98",
        "0.9991",
        "0.9995",
    ]
