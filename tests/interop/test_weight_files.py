"""Files of weights: timm loads what is written; files of torch.save are read, and nothing in them run."""

from __future__ import annotations

import collections
import json
import os
import pickle
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from freqmask.backbones import Backbone
from freqmask.errors import UserError
from freqmask.interop.foreign_weights import read_weights
from freqmask.interop.weight_files import Inert, read_torch_file, tensors_in, write_timm_folder


class Bomb:
    """Makes a folder when it is unpickled as the file asks."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def yacs(monkeypatch):
    """A stand-in for yacs that is importable while writing, and gone while reading."""
    module, inner = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    inner.CfgNode = node
    monkeypatch.setitem(sys.modules, "yacs", module)
    monkeypatch.setitem(sys.modules, "yacs.config", inner)

    def write(content, path, new):
        torch.save(content, path, _use_new_zipfile_serialization=new)
        monkeypatch.delitem(sys.modules, "yacs.config")
        monkeypatch.delitem(sys.modules, "yacs")

    return node, write


TENSORS = {
    "plain": torch.arange(24.0).reshape(4, 6),
    "transposed": torch.arange(24.0).reshape(4, 6).t(),
    "slice": torch.arange(24.0).reshape(4, 6)[1:3, 2:5],
    "half": torch.ones(3, dtype=torch.float16),
    "bfloat": torch.full((2,), 1.5, dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "bool": torch.tensor([True, False]),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "empty": torch.empty(0, 3),
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_tensors_come_back_bit_for_bit(tmp_path, new):
    file = tmp_path / "x.pth"
    torch.save({"model": collections.OrderedDict(TENSORS)}, file, _use_new_zipfile_serialization=new)
    read = tensors_in(read_torch_file(file).content["model"])
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_foreign_objects_beside_the_weights_are_named_and_nothing_runs(tmp_path, yacs, new):
    node, write = yacs
    proof, file = tmp_path / "it ran", tmp_path / "x.pth"
    content = {
        "model": {"w": torch.ones(2)},
        "config": node(A=node(B=[1, 2])),
        "bomb": Bomb(proof),
        "max_accuracy": np.float64(83.1),
        "epoch": 299,
    }
    write(content, file, new)
    weights = read_weights(file)
    assert not proof.exists()
    assert "yacs" not in sys.modules
    assert torch.equal(weights.encoder["w"], torch.ones(2))
    assert weights.epoch == 299
    assert "yacs.config.CfgNode" in weights.notes[0]
    assert "mkdir" in weights.notes[0]
    assert "nothing in the file was run" in weights.notes[0]
    pickle_module = "posix" if os.name == "posix" else "nt"
    assert f"{pickle_module}.mkdir" in read_torch_file(file).foreign


def test_the_same_file_does_run_when_read_the_usual_way(tmp_path):
    proof, file = tmp_path / "it ran", tmp_path / "x.pth"
    torch.save({"bomb": Bomb(proof)}, file)
    torch.load(file, weights_only=False)
    assert proof.exists()  # so that the test above means something


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_foreign_objects_inside_the_weights_are_refused(tmp_path, new):
    file = tmp_path / "x.pth"
    torch.save(
        {"model": {"w": torch.ones(2), "x": Bomb(tmp_path / "ran")}}, file, _use_new_zipfile_serialization=new
    )
    with pytest.raises(UserError, match=r"weights hold a foreign object \(x: .*mkdir"):
        read_weights(file)
    torch.save({"model": torch.nn.Linear(2, 2)}, file, _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match=r"torch.nn.modules.linear.Linear"):
        read_weights(file)
    assert not (tmp_path / "ran").exists()


def test_an_inert_object_swallows_whatever_a_pickle_does_with_it():
    stub = Inert(1, a=2)
    stub["x"] = 1
    stub.append(1)
    stub.extend([1])
    stub.__setstate__({})
    assert stub(1) is stub
    assert not hasattr(stub, "x")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_file_cut_short_anywhere_is_one_sentence(tmp_path, new):
    file = tmp_path / "x.pth"
    torch.save({"model": {"w": torch.ones(40)}, "epoch": 1}, file, _use_new_zipfile_serialization=new)
    whole = file.read_bytes()
    for length in [*range(0, len(whole) - 1, 41), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut short|damaged|refused"):
            tensors_in(read_torch_file(file).content["model"])


def rezip(source, target, change):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            for name, content, kind in change(entry.filename, old.read(entry)):
                new.writestr(name, content, compress_type=kind)


def test_a_zip_that_declares_more_than_it_has_is_refused(tmp_path):
    file, bomb = tmp_path / "x.pth", tmp_path / "bomb.pth"
    torch.save({"model": {"w": torch.zeros(100_000)}}, file)
    rezip(file, bomb, lambda name, content: [(name, content, zipfile.ZIP_DEFLATED)])
    assert bomb.stat().st_size < 10_000
    with pytest.raises(UserError, match="compressed"):
        read_torch_file(bomb)
    content = bytearray(file.read_bytes())
    place = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    content[place + 20 : place + 28] = (2**31).to_bytes(4, "little") * 2  # sizes in the directory
    bomb.write_bytes(content)
    with pytest.raises(UserError, match=r"declares 2,147,\d\d\d,\d\d\d bytes"):
        read_torch_file(bomb)


def test_entries_that_point_outside_are_refused(tmp_path):
    file, bad = tmp_path / "x.pth", tmp_path / "bad.pth"
    torch.save({"model": {"w": torch.zeros(3)}}, file)
    stored = zipfile.ZIP_STORED
    rezip(
        file,
        bad,
        lambda name, content: (
            [(name, content, stored)] + ([("../../evil", b"x", stored)] if name.endswith("data.pkl") else [])
        ),
    )
    with pytest.raises(UserError, match="outside of the file"):
        read_torch_file(bad)


def test_programs_and_strangers_are_refused(tmp_path):
    script = tmp_path / "script.pt"
    with zipfile.ZipFile(script, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}))
        archive.writestr("m/constants.pkl", pickle.dumps(()))
    with pytest.raises(UserError, match="TorchScript"):
        read_torch_file(script)
    text = tmp_path / "text.pth"
    for content in (b"", b"hello", pickle.dumps({"model": 1})):
        text.write_bytes(content)
        with pytest.raises(UserError, match="no torch file"):
            read_torch_file(text)
    with pytest.raises(UserError, match="does not exist"):
        read_torch_file(tmp_path / "nothing.pth")


def test_a_pickle_cannot_make_it_allocate_by_a_number(tmp_path):
    file = tmp_path / "x.pth"
    for opcodes in (
        b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b".",  # a byte array of 4 EiB
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo of two thousand million places
    ):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("m/data.pkl", opcodes)
        with pytest.raises(UserError):
            read_weights(file)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    file = tmp_path / "x.pth"
    torch.save({"model": {"w": torch.ones(1).expand(10**12)}}, file)
    with pytest.raises(UserError, match="larger than what is stored"):
        read_weights(file)


def test_a_network_that_trains_channels_last_is_written_as_any_other(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=0).eval().to(memory_format=torch.channels_last)
    write_timm_folder(model, tmp_path, input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.2,) * 3, metadata={})
    assert not model.conv1[0].weight.is_contiguous()  # the model that is trained stays as it is
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)


STAGE = "model.forward_intermediates(x, indices=[{}], norm=True, intermediates_only=True)[0].mean((2, 3))"
NARROW = {"patch_size": 8, "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2}}


@pytest.mark.parametrize(
    ("name", "size", "options", "told"),
    [
        ("mobilenetv3_small_050", 64, {}, "model.forward_features(x).mean((2, 3))"),
        ("convnextv2_atto", 50, {}, "model.forward_features(x).mean((2, 3))"),
        ("inception_next_atto", 64, {}, "model.forward_features(x).mean((2, 3))"),
        ("mambaout_femto", 64, {}, "model.forward_features(x).mean((1, 2))"),
        ("hiera_tiny_224", 64, {}, "model.forward_features(x)[:, 0:].mean(1)"),
        ("coat_lite_tiny", 64, {}, STAGE.format(3)),
        ("pit_ti_224", 64, {}, STAGE.format(2)),
        ("beit_base_patch16_224", 64, NARROW, "model.forward_features(x)[:, 1:].mean(1)"),
        ("eva02_tiny_patch14_224", 64, NARROW, "model.forward_features(x)[:, 1:].mean(1)"),
        ("deit_tiny_distilled_patch16_224", 64, NARROW, "model.forward_features(x)[:, 2:].mean(1)"),
        ("vit_medium_patch16_reg4_gap_256", 64, NARROW, "model.forward_features(x)[:, 4:].mean(1)"),
        ("vit_tiny_patch16_224", 64, NARROW, None),
        ("vit_small_patch16_dinov3", 64, NARROW, None),
        ("swin_tiny_patch4_window7_224", 64, {}, None),
        ("resnet10t", 64, {}, None),
    ],
)
def test_a_folder_says_how_to_get_embeds_features_where_a_plain_call_does_not(
    tmp_path: Path, name: str, size: int, options: dict[str, Any], told: str | None
) -> None:
    torch.manual_seed(0)
    backbone = Backbone(name, size, **options).eval()
    common = {"input_size": (3, size, size), "mean": [0.5] * 3, "std": [0.5] * 3, "metadata": {}}
    write_timm_folder(backbone.timm_model, tmp_path, pooled="mean", backbone=backbone, **common)
    text = (tmp_path / "README.md").read_text() if told else ""
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = x = torch.rand(2, 3, size, size)
    if "pad(" in text:
        x = eval(re.search(r"x = (torch\.nn.*?\))`", text)[1], {"torch": torch, "x": images})
    assert told is None or f"`{told}`" in text
    with torch.no_grad():
        answer = eval(told or "model(x)", {"model": model, "x": x})
        torch.testing.assert_close(answer, backbone(images).pooled, atol=1e-5, rtol=1e-5)
    notes = json.loads((tmp_path / "config.json").read_text())["freqmask"].get("notes", [])
    assert bool(notes) == bool(told) == (tmp_path / "README.md").exists()


def test_a_folder_says_where_no_call_gives_the_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = Backbone("resnet10t", 32).eval()
    monkeypatch.setattr(torch, "allclose", lambda *_, **__: False)
    common = {"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.5] * 3, "metadata": {}}
    write_timm_folder(backbone.timm_model, tmp_path, pooled="mean", backbone=backbone, **common)
    assert (
        "No call of timm's gives the features; `freqmask embed` and ONNX do"
        in (tmp_path / "README.md").read_text()
    )
