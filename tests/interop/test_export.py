"""What is exported computes the same elsewhere."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from reference import mfm_vit_shapes
from safetensors import safe_open

import freqmask
from freqmask.backbones import Backbone
from freqmask.commands.command import declared
from freqmask.errors import UserError
from freqmask.interop import exporters
from freqmask.interop.exporters import compare, graph_of
from freqmask.interop.foreign_weights import convert_file, mfm_encoder
from freqmask.interop.formats import FORMATS, export_model
from freqmask.interop.models import OpenedModel, decoder_of, open_model
from freqmask.interop.weight_files import write_timm_folder
from freqmask.timm_models import ratio_of

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 64, "num_heads": 1},
    "vit_small_patch16_dinov3": {"depth": 2, "embed_dim": 64, "num_heads": 1},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "window_size": 2,
    },
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    "resnet18": {"layers": [1, 1, 1, 1]},
    "test_efficientnet": {},
}


def write(name, folder, pooled="mean"):
    torch.manual_seed(0)
    backbone = Backbone(name, 64, model_args=SMALL[name]).eval()
    write_timm_folder(
        backbone.timm_model,
        folder,
        input_size=(3, 64, 64),
        mean=[0.5] * 3,
        std=[0.5] * 3,
        metadata={},
        pooled=pooled,
    )
    return backbone


@pytest.mark.parametrize("name", SMALL)
def test_timm_loads_the_folder_to_the_same_features(name, tmp_path):
    images = torch.rand(2, 3, 64, 64)
    backbone = write(name, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    expected = backbone(images)
    # CNNs end in a head of timm's own, which is the same on both sides; a ViT's pooling is pinned
    same = expected.pooled if name.startswith("vit") else backbone.timm_model(images)
    torch.testing.assert_close(model(images), same, atol=1e-5, rtol=0)
    opened = open_model(tmp_path)
    torch.testing.assert_close(opened.backbone(images).feature_map, expected.feature_map, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list(SMALL)[:2])
def test_the_pooling_is_pinned_to_what_was_trained(name, tmp_path):
    images = torch.rand(2, 3, 64, 64)
    for pooled in ("mean", "class_token"):
        backbone = write(name, tmp_path / pooled, pooled)
        model = timm.create_model(f"local-dir:{tmp_path / pooled}", pretrained=True).eval()
        features = backbone(images)
        expected = features.pooled if pooled == "mean" else features.class_token
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)
        # a classifier on top leaves the trained normalisation where it was, too
        timm.create_model(f"local-dir:{tmp_path / pooled}", pretrained=True, num_classes=3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_transformers_loads_the_folder_to_the_same_features(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the extra [export] is not installed")
    images = torch.rand(2, 3, 64, 64)
    backbone = write(name, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModel.from_pretrained(tmp_path).eval()
        pooled = model(images).pooler_output
    torch.testing.assert_close(pooled.flatten(1), backbone(images).pooled, atol=1e-5, rtol=0)


def test_an_export_can_be_traced_back(vit_run, tmp_path):
    export_model(open_model(vit_run.path), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    facts = config["freqmask"]
    assert (facts["run"], facts["step"], facts["data"], facts["value_range"]) == (
        "mfm-vit",
        20,
        "abc123",
        "dtype",
    )
    assert facts["pooled"] == "mean"
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.4, 0.3]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        assert json.loads(weights.metadata()["freqmask_step"]) == 20
    again = open_model(tmp_path / "out")
    assert again.weights_hash == open_model(vit_run.path).weights_hash
    assert set(decoder_of(again)) == {"0.weight", "0.bias"}


def test_notes_on_padding_are_of_the_exported_size(run_factory, tmp_path):
    layers = {"layers": [1, 1, 1, 1]}
    run = run_factory(backbone="resnet18", image_size=50, patch_size=None, model_args=layers)
    told = {}
    for size in (50, 64, 72):
        export_model(open_model(run.path, image_size=size), tmp_path / str(size))
        about = json.loads((tmp_path / str(size) / "config.json").read_text())["freqmask"]
        told[size] = " ".join(about.get("notes", []))
    assert "50x50" in told[50] and "(0, 14, 0, 14)" in told[50]
    assert told[64] == ""
    assert "72x72" in told[72] and "50x50" not in told[72]
    assert "notes" not in graph_of(open_model(run.path)).metadata


@pytest.mark.parametrize(
    ("name", "size", "padding"),
    [("vit_tiny_patch16_224", 40, (0, 8, 0, 8)), ("swin_tiny_patch4_window7_224", 60, (0, 4, 0, 4))],
)
def test_a_transformer_is_exported_for_a_size_that_its_patches_do_not_divide(name, size, padding, tmp_path):
    """timm refuses to write another size beside that which such a model was built for."""
    freqmask.export(f"random:{name}", out=tmp_path / "out", image_size=size)
    assert str(padding) in (tmp_path / "out" / "README.md").read_text()
    assert open_model(tmp_path / "out").input_size == (3, size, size)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        theirs = model(torch.nn.functional.pad(images, padding, mode="replicate"))
        ours = open_model(tmp_path / "out").backbone(images).pooled
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_nothing_is_lost_or_left_half_written(vit_run, tmp_path, monkeypatch):
    opened = open_model(vit_run.path)
    out = tmp_path / "out"
    export_model(opened, out)
    with pytest.raises(UserError, match="exists already"):
        export_model(opened, out)
    before = (out / "config.json").read_text()

    def fail(*_, **__):
        raise UserError("a full disk")

    monkeypatch.setattr("freqmask.interop.exporters.write_timm_folder", fail)
    with pytest.raises(UserError, match="full disk"):
        export_model(opened, out, overwrite=True)
    with pytest.raises(UserError, match="full disk"):
        export_model(opened, tmp_path / "other")
    assert (out / "config.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_an_exporter_cannot_follow_is_said_in_a_sentence(vit_run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("only 4D query, key, and value are supported")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(UserError, match=r"\(torch-export\) cannot hold .* AssertionError: only 4D"):
        export_model(open_model(vit_run.path), tmp_path / "model.pt2", "torch-export")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_goes_with_the_next_one(vit_run, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in ("mfm[1].pth", "other.pth"):
        (tmp_path / f".{name}.{dead.pid}.tmp").write_bytes(b"half")
    export_model(open_model(vit_run.path), tmp_path / "mfm[1].pth", "mfm-checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".other.pth.{dead.pid}.tmp", "mfm[1].pth"]


def test_the_mfm_checkpoint_of_a_vit_has_exactly_the_names_of_its_readers(vit_run, tmp_path):
    file = tmp_path / "mfm.pth"
    export_model(open_model(vit_run.path), file, "mfm-checkpoint")
    content = torch.load(file, weights_only=True)
    assert set(content) == {"model", "epoch"}
    assert content["epoch"] == 2  # 20 steps of 4 of 40 images
    expected = {f"encoder.{name}": shape for name, shape in mfm_vit_shapes(64, 2, 256, 8, 3, 17).items()}
    expected |= {"decoder.0.weight": (192, 64, 1, 1), "decoder.0.bias": (192,)}
    assert {name: tuple(tensor.shape) for name, tensor in content["model"].items()} == expected
    assert not any("qkv.bias" in name for name in content["model"])
    back = convert_file(file)
    opened = open_model(vit_run.path)
    torch.testing.assert_close(
        back.model.forward_features(IMAGES), opened.module.forward_features(IMAGES), atol=1e-5, rtol=0
    )


def test_a_vit_b_of_mfm_has_162_encoder_tensors():
    assert len(mfm_vit_shapes(768, 12, 3072, 16, 3, 197)) == 162


def test_timm_s_own_transform_gives_the_pixels_of_embed(tmp_path):
    folder, photos = tmp_path / "exported", tmp_path / "photos"
    photos.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "noise.png")
    freqmask.export("random:dla46_c", out=folder, image_size=64)  # of bilinear images, says timm
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        features = model(transform(Image.open(photos / "noise.png"))[None])
    freqmask.embed(folder, photos, out=tmp_path / "features.npy", workers=0)
    ours = torch.from_numpy(np.load(tmp_path / "features.npy"))
    torch.testing.assert_close(ours, features, rtol=0, atol=float(features.abs().max()) / 50)


def test_the_mfm_checkpoint_of_a_resnet_has_timms_names(resnet_run, tmp_path):
    file = tmp_path / "mfm.pth"
    opened = open_model(resnet_run.path)
    export_model(opened, file, "mfm-checkpoint")
    model = torch.load(file, weights_only=True)["model"]
    expected = {f"encoder.{name}" for name in opened.module.state_dict()}
    assert set(model) == expected | {"decoder.0.weight", "decoder.0.bias"}
    back = convert_file(file)
    assert torch.equal(back.model(IMAGES), opened.module(IMAGES))


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("vit_tiny_patch16_224", {"init_values": 1e-5}, r"ls1\.gamma"),
        ("vit_tiny_patch16_224", {"reg_tokens": 2}, "reg_token"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "q_norm"),
        ("vit_tiny_patch16_224", {"qkv_bias": False}, "q_bias"),
        ("vit_tiny_patch16_224", {"act_layer": "silu"}, "SiLU"),
        ("vit_tiny_patch16_224", {"num_heads": 4}, "attention heads"),
        ("vit_tiny_patch16_224", {"norm_layer": partial(torch.nn.LayerNorm, eps=1e-5)}, "eps=1e-05"),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}, "pos_embed"),
        ("vit_small_patch16_dinov3", {}, "Eva"),
        ("convnext_atto", {}, "ConvNeXt"),
        ("resnet10t", {}, "stem"),
        ("seresnet18", {}, r"\.se\."),
    ],
)
def test_models_that_the_mfm_layout_cannot_hold_are_refused(name, arguments, named):
    tiny = {"depth": 1, "embed_dim": 64, "num_heads": 1} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=0, **{**tiny, **arguments})
    with pytest.raises(UserError, match=named) as caught:
        mfm_encoder(model)
    assert "--format timm" in str(caught.value)


def test_what_is_dropped_in_training_alone_and_odd_widths_pass():
    rates = {"drop_path_rate": 0.1, "proj_drop_rate": 0.1, "patch_drop_rate": 0.2}
    tiny = {"depth": 2, "embed_dim": 64, "num_heads": 1, "mlp_ratio": 352.5 / 64}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **tiny, **rates)
    assert mfm_encoder(model)["blocks.1.mlp.fc1.weight"].shape == (352, 64)
    assert all(
        int(dim * ratio_of(hidden, dim)) == hidden
        for dim in range(32, 512, 32)
        for hidden in range(32, 2048, 32)
    )


def test_a_model_without_decoder_is_no_mfm_checkpoint(tmp_path):
    with pytest.raises(UserError, match="has no decoder"):
        export_model(open_model("random:resnet18", image_size=32), tmp_path / "x.pth", "mfm-checkpoint")
    assert not list(tmp_path.iterdir())


def test_onnx_runs_in_onnxruntime_at_any_batch(vit_run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
    pytest.importorskip("onnxscript", reason="the extra [export] is not installed")
    opened = open_model(vit_run.path)
    export_model(opened, tmp_path / "x.onnx", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    expected = opened.backbone(opened.normalise(IMAGES))
    pooled, feature_map = session.run(None, {"images": IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(pooled), expected.pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.from_numpy(feature_map), expected.feature_map, atol=1e-5, rtol=0)
    assert session.get_modelmeta().custom_metadata_map["freqmask_step"] == "20"
    assert len(session.run(None, {"images": IMAGES.repeat(3, 1, 1, 1).numpy()})[0]) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


class OfOneSize(torch.nn.Module):
    """Traced with a size that it is then bound to."""

    def forward(self, images):
        last = 96 * 128 if torch.compiler.is_exporting() else 1
        return (images.flatten(2)[:, 0, torch.tensor([last - 1])],)


def test_what_onnxruntime_raises_it_does_not_print_too(tmp_path, capfd):
    """A size that fails is tried otherwise, and a red line above the success would frighten."""
    pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
    pytest.importorskip("onnxscript", reason="the extra [export] is not installed")
    graph = exporters.Graph(OfOneSize(), {"last": "(B, 1)"}, (3, 32, 32), {}, 32)
    with pytest.raises(UserError, match="cannot hold this network"):
        exporters.write_onnx(graph, tmp_path / "x.onnx")
    assert capfd.readouterr().err == ""


def test_torch_export_loads_and_takes_any_batch(resnet_run, tmp_path):
    opened = open_model(resnet_run.path)
    export_model(opened, tmp_path / "x.pt2", "torch-export")
    program = torch.export.load(tmp_path / "x.pt2").module()
    images = torch.rand(5, 3, 64, 64)
    pooled, _ = program(images)
    torch.testing.assert_close(pooled, opened.backbone(opened.normalise(images)).pooled, atol=1e-5, rtol=0)


def test_a_graph_that_computes_otherwise_is_not_written(resnet_run):
    graph = graph_of(open_model(resnet_run.path))
    size = graph.input_size[1:]
    assert "of the largest value" in compare(graph.module, graph, [size])
    with pytest.raises(UserError, match="computes otherwise"):
        compare(lambda images: (graph.module(images)[0] + 0.1,) * 2, graph, [size])


def test_formats_and_places_that_cannot_be_are_one_sentence(vit_run, tmp_path):
    opened = open_model(vit_run.path)
    with pytest.raises(UserError, match="did you mean 'onnx'"):
        export_model(opened, tmp_path / "x", "onx")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        export_model(opened, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        export_model(opened, tmp_path / "file" / "below")


TRIES = """
import sys
import freqmask
from freqmask.errors import UserError
folder = sys.argv[1]
for command, arguments, options in (
    (freqmask.export, [folder + "/none"], {"out": folder + "/new"}),
    (freqmask.export, ["random:" + folder], {"out": folder + "/new"}),
    (freqmask.export, ["timm:resnet18"], {"out": folder, "format": "onnx"}),
    (freqmask.export, ["timm:resnet18"], {"push": "mine"}),
    (freqmask.export, ["timm:resnet18"], {"out": folder + "/new", "format": "onx"}),
    (freqmask.convert, [folder + "/none"], {"out": folder + "/new"}),
    (freqmask.convert, [folder], {"out": folder + "/new"}),
    (freqmask.convert, [folder + "/file"], {"out": folder}),
):
    try:
        command(*arguments, **options)
    except UserError as error:
        print(error)
print(*[name for name in ("torch", "timm", "numpy.linalg") if name in sys.modules])
"""


def test_what_cannot_be_exported_is_told_before_anything_large_is_imported(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", TRIES, str(tmp_path)], capture_output=True, text=True, check=True
    )
    *told, imported = done.stdout.splitlines()
    assert imported == ""
    for line, part in zip(
        told,
        (
            "nothing of that name exists",
            "there is no backbone in it",
            "is a folder",
            "must be USER/NAME",
            "did you mean 'onnx'",
            "does not exist",
            "is a folder; an exported folder needs no converting",
            "exists already",
        ),
        strict=True,
    ):
        assert part in line


def test_the_help_and_the_documentation_know_every_format_and_each_has_its_writer():
    assert set(get_args(declared(freqmask.export)["format"].kind)) == set(FORMATS)
    page = (Path(__file__).parent.parent.parent / "docs" / "using-it.md").read_text(encoding="utf-8")
    assert all(name in page for name in FORMATS)
    assert all(callable(getattr(exporters, writer)) for writer in FORMATS.values())


def test_a_folk_run_exports_its_class_token(folk_run, tmp_path):
    opened = open_model(folk_run.path)
    export_model(opened, tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    expected = opened.backbone(IMAGES).class_token
    torch.testing.assert_close(model(IMAGES), expected, atol=1e-5, rtol=0)
    graph = graph_of(opened)  # what ONNX and torch.export are given
    inside = opened.backbone(opened.normalise(IMAGES)).class_token
    torch.testing.assert_close(graph.module(IMAGES)[0], inside, atol=1e-5, rtol=0)
    assert "the class token" in graph.outputs["features"]
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(("name", "stage"), [("vit_tiny_patch16_224", 0), ("resnet18", -2)])
def test_an_inner_stage_is_noted_with_the_call_that_gives_its_features(name, stage, tmp_path):
    backbone = Backbone(name, image_size=32, stage=stage, model_args=SMALL[name])
    opened = OpenedModel("x", "folder", backbone.eval(), (3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    export_model(opened, tmp_path / "x")
    model = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    call = re.search(r"The features are `(.*?)`", (tmp_path / "x" / "README.md").read_text())[1]
    features = eval(call, {"model": model, "x": IMAGES})
    torch.testing.assert_close(features, backbone(IMAGES).pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        open_model(tmp_path / "x").backbone(IMAGES).pooled, features, atol=1e-5, rtol=0
    )
