"""``freqmask convert`` as a user types it."""

import pytest
import timm
import torch
from tiny_runs import make_run

import freqmask
from freqmask.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run = make_run(folder / "mfm-vit")
    return freqmask.export(run.path, out=folder / "x.pth", format="mfm-checkpoint")


def test_a_checkpoint_becomes_a_model_with_its_decoder(checkpoint, tmp_path, capsys):
    main(["convert", str(checkpoint), "--out", str(tmp_path / "x")])
    said = capsys.readouterr().out
    assert "with its decoder" in said
    assert "attention heads: 1" in said
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        "config.json",
        "model.safetensors",
        "decoder.safetensors",
    }
    assert timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).embed_dim == 64


def test_a_file_of_another_width_than_the_named_network_is_told(tmp_path, capsys):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "x.pth")
    for name, note in (
        ("vit_tiny_patch16_224", ""),
        ("vit_small_patch16_224", "width 192 of 12 blocks, as in"),
    ):
        main(["convert", str(tmp_path / "x.pth"), "--backbone", name, "--out", str(tmp_path / name)])
        said = capsys.readouterr().out
        assert ("by itself has 384 of 12" in said and note in said) if note else "by itself" not in said


@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_a_bad_file_leaves_nothing_behind(checkpoint, tmp_path, capsys, damage):
    file = tmp_path / "bad.pth"
    words = []
    if damage == "cut":
        file.write_bytes(checkpoint.read_bytes()[:-2000])
    elif damage == "other":
        torch.save(torch.load(checkpoint, weights_only=True), file)
        words = ["--backbone", "resnet50"]
    with pytest.raises(SystemExit) as left:
        main(["convert", str(file), "--out", str(tmp_path / "x"), *words])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ([] if damage == "gone" else ["bad.pth"])
