"""Fine-tuned classifiers and segmentation networks are handed on with their heads, and predict."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from freqmask.cli import parse
from freqmask.errors import UserError
from freqmask.training.run_folder import RunFolder

GOLDEN = Path(__file__).parent.parent / "golden"


def run(words):
    """A command as it is typed, whose errors stay errors."""
    function, options = parse(words)
    function(**options)


@pytest.fixture(autouse=True)
def in_golden(tmp_path, monkeypatch):
    ignore = shutil.ignore_patterns("*.py", "__pycache__", "checkpoints")
    shutil.copytree(GOLDEN, tmp_path / "golden", ignore=ignore)
    monkeypatch.chdir(tmp_path / "golden")


def test_a_classifier_is_exported_with_its_head():
    run(["export", "tuned/mfm-seed0", "--out", "again"])
    old, new = load_file("tuned/mfm-seed0/classifier/model.safetensors"), load_file("again/model.safetensors")
    assert set(old) == set(new)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert json.loads(Path("again/config.json").read_text())["label_names"] == ["0", "1", "2"]
    images = torch.rand(2, 3, 32, 32)
    ours = timm.create_model("local-dir:again", pretrained=True).eval()
    theirs = timm.create_model("local-dir:tuned/mfm-seed0/classifier", pretrained=True).eval()
    assert torch.equal(ours(images), theirs(images))


def test_a_graph_of_a_classifier_gives_its_logits():
    run(["export", "tuned/mfm-seed0", "--format", "torch-export", "--out", "x.pt2"])
    program = torch.export.load("x.pt2").module()
    model = timm.create_model("local-dir:tuned/mfm-seed0/classifier", pretrained=True).eval()
    images = torch.rand(3, 3, 32, 32)
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(program(images)[0], model((images - mean) / std), atol=1e-5, rtol=0)


def test_classes_are_written_as_the_model_gives_them():
    run(["predict", "tuned/mfm-seed0", "labelled.npz", "--split", "test", "--out", "x.csv", "--workers", "0"])
    with Path("x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    images = torch.from_numpy(np.load("labelled.npz")["test_images"]).permute(0, 3, 1, 2).float() / 255
    model = timm.create_model("local-dir:tuned/mfm-seed0/classifier", pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    expected = model((images - mean) / std).softmax(dim=1)
    found = torch.tensor([[float(row[name]) for name in ("0", "1", "2")] for row in rows])
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=0)
    assert [row["class"] for row in rows] == [str(n) for n in expected.argmax(dim=1).tolist()]


def test_classes_that_are_called_as_the_first_columns_have_columns_of_their_own():
    config = Path("tuned/mfm-seed0/classifier/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "label_names": ["path", "class", "2"]}))
    words = ["labelled.npz", "--split", "test", "--out", "x.csv", "--workers", "0"]
    run(["predict", "tuned/mfm-seed0/classifier", *words])
    with Path("x.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [
        "path",
        "class",
        "probability",
        "probability of path",
        "probability of class",
        "2",
    ]
    for row in found:
        shares = {"path": row["probability of path"], "class": row["probability of class"], "2": row["2"]}
        assert row["probability"] == max(shares.values(), key=float) == shares[row["class"]]


def test_masks_are_written_and_score_what_the_evaluation_said():
    pytest.importorskip("segmentation_models_pytorch")
    run(["predict", "segmented/mfm-seed0", "scenes/images/test", "--out", "masks", "--workers", "0"])
    right = total = 0
    for path in sorted(Path("scenes/masks/test").glob("*.png")):
        truth, mask = np.array(Image.open(path)), np.array(Image.open(next(Path("masks").rglob(path.name))))
        assert truth.shape == mask.shape
        right, total = right + int((truth == mask).sum()), total + truth.size
    with Path("results/segment.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert right / total == pytest.approx(float(row["pixel_accuracy"]), abs=0.02)  # its stride was another


def test_every_image_has_a_mask_of_its_own_at_its_path_below_data():
    pytest.importorskip("segmentation_models_pytorch")
    names = ["a.png", "x-4.png", "x.png", "x.webp", "p1/cam/0.png", "p2/cam/0.png", "v1.5.png", "v1.6.png"]
    for side, name in enumerate(names, start=32):
        Path("nested", name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((side, 32, 3), side, np.uint8)).save(Path("nested", name))
    pages = [Image.fromarray(np.full((side, 32), side, np.uint8)) for side in (40, 41)]
    pages[0].save("nested/t.tif", save_all=True, append_images=pages[1:])
    run(["predict", "segmented/mfm-seed0", "nested", "--pages", "images", "--workers", "0", "--out", "masks"])
    found = {
        str(path.relative_to("masks")): len(np.array(Image.open(path)))
        for path in Path("masks").rglob("*.png")
    }
    names[names.index("x.webp")] += ".png"  # its like is called x.png
    assert found == {name: side for side, name in enumerate([*names, "t#0.png", "t#1.png"], start=32)}


def test_as_many_windows_are_segmented_at_once_as_its_training_had_room_for(monkeypatch):
    pytest.importorskip("segmentation_models_pytorch")
    from freqmask.evaluation.upernet import Predictor

    seen, logits = [], Predictor._logits
    monkeypatch.setattr(
        Predictor, "_logits", lambda self, images: seen.append(len(images)) or logits(self, images)
    )
    Path("large").mkdir()
    Image.fromarray(np.zeros((200, 200, 3), np.uint8)).save("large/1.png")
    words = ["predict", "segmented/mfm-seed0", "large", "--workers", "0", "--out"]
    run([*words, "masks"])
    assert max(seen) == RunFolder("segmented/mfm-seed0").config()["batch_size"] < sum(seen)
    run([*words, "again", "--batch_size", "3"])
    assert max(seen[seen.index(3) :]) == 3


def test_a_segmentation_network_is_a_graph():
    pytest.importorskip("segmentation_models_pytorch")
    run(["export", "segmented/mfm-seed0", "--format", "torch-export", "--out", "x.pt2"])
    assert torch.export.load("x.pt2").module()(torch.rand(2, 3, 32, 32))[0].shape == (2, 3, 32, 32)
    with pytest.raises(UserError, match=r"--format onnx or torch-export"):
        run(["export", "segmented/mfm-seed0", "--out", "again"])


def test_what_cannot_predict_is_one_sentence():
    with pytest.raises(UserError, match="has no head to predict with"):
        run(["predict", "trained/mfm", "shards", "--out", "x.csv"])
    with pytest.raises(UserError, match=r"must end in \.csv"):
        run(["predict", "tuned/mfm-seed0", "shards", "--out", "x.txt"])
    shutil.rmtree("trained")
    with pytest.raises(UserError, match="was built on trained/mfm"):
        run(["predict", "segmented/mfm-seed0", "shards", "--out", "x"])


def test_a_prediction_that_was_cut_short_is_not_computed_again(monkeypatch, capsys):
    words = ["predict", "tuned/mfm-seed0", "labelled.npz", "--split", "test", "--workers", "0", "--out"]
    with monkeypatch.context() as power_cut:
        power_cut.setattr("freqmask.commands.inference.rows_of", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run([*words, "x.csv"])
    assert not Path("x.csv").exists()
    run([*words, "x.csv"])
    assert "resumes     1 of 1 parts" in capsys.readouterr().out
    run([*words, "y.csv"])
    assert Path("x.csv").read_bytes() == Path("y.csv").read_bytes()
    assert not list(Path().glob(".*.parts"))
