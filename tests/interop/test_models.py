import json
import shutil
import socket
from pathlib import Path

import pytest
import timm
import torch

import freqmask
from freqmask.errors import UserError
from freqmask.interop.models import decoder_of, open_model
from freqmask.interop.weights import load_method, run_state


def images(size=32, batch=2, channels=3):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def test_a_run_opens_with_the_weights_and_statistics_of_its_training(vit_run):
    opened = open_model(vit_run.path)
    method = load_method(vit_run.path).eval()
    assert (opened.kind, opened.name, opened.input_size) == ("run", "mfm-vit", (3, 32, 32))
    assert opened.mean == (0.5, 0.4, 0.3)
    expected = method.backbone(method.normalise(images()))
    got = opened.backbone(opened.normalise(images()))
    torch.testing.assert_close(got.feature_map, expected.feature_map, atol=1e-6, rtol=0)
    assert not opened.backbone.training


def test_the_backbone_folder_of_a_run_is_the_same_model(vit_run):
    run, folder = open_model(vit_run.path), open_model(vit_run.backbone)
    assert (folder.kind, folder.name) == ("folder", "mfm-vit")
    assert folder.weights_hash == run.weights_hash


def test_a_model_that_was_put_into_a_run_is_not_the_run_s(vit_run, resnet_run, tmp_path):
    shutil.copytree(vit_run.path, tmp_path / "run")
    shutil.copytree(resnet_run.backbone, tmp_path / "run" / "other")
    own, other = (open_model(tmp_path / "run" / name) for name in ("backbone", "other"))
    assert own.run is not None and decoder_of(own)
    assert other.run is None and other.name == "other" and decoder_of(other) == {}


def test_a_home_is_the_same_place_as_its_path(vit_run, monkeypatch):
    monkeypatch.setenv("HOME", str(vit_run.path.parent))
    assert open_model("~/mfm-vit/backbone").kind == open_model(vit_run.backbone).kind
    assert load_method("~/mfm-vit").name == "mfm"
    assert open_model("random:~/mfm-vit").module.embed_dim == 64


def test_a_name_is_told_from_timm_s_source_as_timm_tells_it():
    from freqmask.interop.formats import _is_of_timm

    names = [*timm.list_models()[::80], "resnet19x", "resnet", "checkpoint_filter_fn", "no/MODEL"]
    assert [_is_of_timm(name) for name in names] == [timm.is_model(name) for name in names]


def test_the_weights_hash_tells_weights_apart_and_stays_the_same(vit_run):
    one, again = open_model("random:resnet18", seed=1), open_model("random:resnet18", seed=1)
    assert one.weights_hash == again.weights_hash
    assert one.weights_hash != open_model("random:resnet18", seed=2).weights_hash
    with torch.no_grad():
        next(again.module.parameters()).view(-1)[0] += 1e-3
    assert one.weights_hash != again.weights_hash


def test_random_of_a_run_has_its_architecture_and_other_weights(vit_run):
    run, fresh = open_model(vit_run.path), open_model(f"random:{vit_run.path}")
    assert {n: t.shape for n, t in run.module.state_dict().items()} == {
        n: t.shape for n, t in fresh.module.state_dict().items()
    }
    assert run.weights_hash != fresh.weights_hash
    assert (fresh.kind, fresh.mean, fresh.metadata) == ("random", run.mean, {})


def test_opening_a_random_model_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    open_model("random:resnet10t", image_size=32)
    assert torch.equal(torch.rand(1), expected)


def test_positions_are_interpolated_to_another_image_size(vit_run):
    opened = open_model(vit_run.path, image_size=64)
    assert opened.backbone(opened.normalise(images(64))).feature_map.shape == (2, 64, 8, 8)


def test_stages_of_a_vit_are_its_blocks(vit_run):
    opened = open_model(vit_run.path)
    normalised = opened.normalise(images())
    stages = opened.stages(normalised)
    assert [stage.feature_map.shape for stage in stages] == [(2, 64, 4, 4)] * 2
    model = opened.module
    tokens = model._pos_embed(model.patch_embed(normalised))
    first = model.blocks[0](tokens)
    torch.testing.assert_close(stages[0].class_token, first[:, 0])
    torch.testing.assert_close(stages[0].pooled, first[:, 1:].mean(dim=1))
    with pytest.raises(UserError, match="between -2 and 1"):
        opened.stages(normalised, [2])


def test_teacher_and_student_of_folk_can_be_chosen(folk_run):
    method = load_method(folk_run.path).eval()
    normalised = method.normalise(images())
    for weights, backbone in method.backbones().items():
        opened = open_model(folk_run.path, weights=weights)
        assert opened.metadata["weights"] == weights
        expected = backbone(normalised).class_token
        torch.testing.assert_close(opened.backbone(normalised).class_token, expected, atol=1e-6, rtol=0)
    assert open_model(folk_run.path).metadata["weights"] == "student"
    with pytest.raises(UserError, match="did you mean 'teacher'"):
        open_model(folk_run.path, weights="teacherr")
    with pytest.raises(UserError, match="a run folder only"):
        open_model(folk_run.backbone, weights="teacher")


def test_load_backbone_gives_a_plain_timm_module(vit_run):
    module = freqmask.load_backbone(vit_run.path)
    assert type(module).__module__.startswith("timm.")
    assert not module.training
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_load_method_gives_every_weight_of_the_checkpoint(folk_run):
    method = freqmask.load_method(folk_run.path)
    stored = run_state(folk_run.path)
    assert method.name == "folk"
    assert all(torch.equal(stored[f"method.{name}"], tensor) for name, tensor in method.state_dict().items())
    assert method.freeze_last_layer_steps == 10  # one epoch of 40 images in batches of 4


def test_public_weights_without_a_network_are_one_sentence_at_once(monkeypatch):
    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr("freqmask.interop.weights.is_cached", lambda repository: False)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"timm:resnet18.*no connection.*check the network"):
        open_model("timm:resnet18")


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("timm:resnt18", "did you mean"),
        ("random:vit_smal_patch16_224", "did you mean"),
        ("timm:test_vit", "public weights"),
        ("/nowhere/at/all", "nothing of that name"),
    ],
)
def test_models_that_are_not_there_are_named(model, sentence, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=sentence):
        open_model(model)


def test_a_broken_folder_is_one_sentence(vit_run, tmp_path):
    def broken(change):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(vit_run.backbone, folder)
        change(folder)
        with pytest.raises(UserError) as caught:
            open_model(folder)
        return str(caught.value)

    weights = (vit_run.backbone / "model.safetensors").read_bytes()
    assert "cut short" in broken(lambda f: (f / "model.safetensors").write_bytes(weights[:-100]))
    assert "is not valid JSON" in broken(lambda f: (f / "config.json").write_text("{"))
    assert "architecture" in broken(lambda f: (f / "config.json").write_text("[]"))
    assert "there is no" in broken(lambda f: (f / "model.safetensors").unlink())

    def other(folder):
        config = json.loads((folder / "config.json").read_text())
        config["model_args"]["embed_dim"] = 128
        (folder / "config.json").write_text(json.dumps(config))

    assert "cannot be opened" in broken(other)


@pytest.mark.parametrize(
    ("open_it", "model", "sentence"),
    [
        (open_model, "tuned", r"no backbone in it .*; it holds the run .*tuned.mfm-seed0"),
        (open_model, "segmented/mfm-seed0", "is a segmentation network, which predict and export take"),
        (load_method, "tuned/mfm-seed0", "must be of freqmask pretrain; it is of evaluate finetune"),
    ],
)
def test_runs_of_evaluations_are_told_apart_from_those_of_a_backbone(open_it, model, sentence):
    with pytest.raises(UserError, match=sentence):
        open_it(Path(__file__).parents[1] / "golden" / model)
