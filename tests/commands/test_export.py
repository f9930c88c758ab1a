"""``freqmask export`` as a user types it."""

import pytest
import timm
import torch
from tiny_runs import make_run

import freqmask
from freqmask.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "mfm-vit").path


def test_a_run_becomes_a_folder_for_timm(run, tmp_path, capsys):
    main(["export", str(run), "--out", str(tmp_path / "x")])
    assert 'timm.create_model("local-dir:' in capsys.readouterr().out
    assert timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).embed_dim == 64


def test_the_twin_writes_an_mfm_checkpoint(run, tmp_path):
    path = freqmask.export(run, out=tmp_path / "x.pth", format="mfm-checkpoint")
    assert "encoder.cls_token" in torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--out FOLDER"),
        (["--format", "onxx", "--out", "x"], "must be one of"),
        (["--push", "me/mine", "--format", "onnx"], "goes with --format timm"),
        (["--out", "x", "--public"], "concern --push"),
        (["--out", "x", "--weights", "teacher"], "weights (teacher)"),
    ],
)
def test_what_cannot_be_is_one_sentence(run, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["export", str(run), *words])
    assert left.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
