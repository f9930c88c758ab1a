"""``freqmask export`` as a user types it."""

import pytest
import timm
import torch
from tiny_runs import make_run

import freqmask
from freqmask.cli import main
from freqmask.errors import UserError
from freqmask.interop.weight_files import write_timm_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "mfm-vit").path


def test_a_run_becomes_a_folder_for_timm(run, tmp_path, capsys):
    main(["export", str(run), "--out", str(tmp_path / "x")])
    assert 'timm.create_model("local-dir:' in capsys.readouterr().out
    assert timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).embed_dim == 64


def test_what_a_reader_has_to_know_is_said(tmp_path, capsys):
    main(["export", "random:convnext_atto", "--image_size", "32", "--out", str(tmp_path / "x")])
    assert f"its features take another call: {tmp_path / 'x' / 'README.md'}" in capsys.readouterr().out
    wide = make_run(tmp_path / "wide", image_size=[16, 32]).path
    main(["export", str(wide), "--format", "mfm-checkpoint", "--out", str(tmp_path / "x.pth")])
    assert "freqmask convert needs its size: --model_args '{img_size: [16, 32]}'" in capsys.readouterr().out


def test_the_twin_writes_an_mfm_checkpoint(run, tmp_path):
    path = freqmask.export(run, out=tmp_path / "x.pth", format="mfm-checkpoint")
    assert "encoder.cls_token" in torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--out FOLDER"),
        (["--format", "onxx", "--out", "x"], "must be one of"),
        (["--push", "me/mine", "--format", "onnx"], "goes with --format timm"),
        (["--out", "x", "--image_size", "-3"], "image_size (-3) must be a whole number at least 8"),
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


@pytest.mark.parametrize(("option", "value"), [("image_size", 64), ("weights", "teacher")])
def test_what_is_for_a_backbone_is_not_dropped_with_a_head_or_a_name(option, value, tmp_path):
    write_timm_folder(
        timm.create_model("resnet18", num_classes=2, layers=[1, 1, 1, 1]),
        tmp_path / "tuned",
        input_size=(3, 32, 32),
        mean=[0.5] * 3,
        std=[0.5] * 3,
        metadata={},
        label_names=["cat", "dog"],
    )
    with pytest.raises(UserError, match=rf"{option} \({value}\) is for backbones; .* at 32x32 pixels"):
        freqmask.export(tmp_path / "tuned", out=tmp_path / "x", **{option: value})
    if option == "weights":
        with pytest.raises(UserError, match=r"weights \(teacher\) can be chosen for a run folder only"):
            freqmask.export("random:resnet18", out=tmp_path / "x", weights="teacher")


def test_overwrite_takes_neither_what_is_read_nor_a_run(run, tmp_path):
    weights, other = tmp_path / "in" / "x.pth", make_run(tmp_path / "other").path
    freqmask.export(run, out=weights, format="mfm-checkpoint")
    calls = [
        (lambda: freqmask.export(run, out=run, overwrite=True), f"is or holds {run}"),
        (lambda: freqmask.export(run, out=run.parent, overwrite=True), f"is or holds {run}"),
        (lambda: freqmask.export(run, out=other, overwrite=True), "is a run"),
        (lambda: freqmask.convert(weights, out=weights.parent, overwrite=True), f"is or holds {weights}"),
    ]
    for call, sentence in calls:
        with pytest.raises(UserError, match=f"{sentence}, which would be lost; name another place"):
            call()
    assert (run / "run.json").is_file() and (other / "run.json").is_file() and weights.is_file()
