"""Other people's checkpoints become models that compute the same."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from freqmask.errors import UserError
from freqmask.interop.convert import convert_file
from freqmask.interop.mfm_layout import differences, from_beit_names, to_beit_names, vit_shapes

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tiny_vit(**changes):
    torch.manual_seed(0)
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 1,
        "num_classes": 0,
    }
    model = timm.create_model("vit_base_patch16_224", **{**arguments, **changes}).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def beit_like_reference(state, images, depth, heads=1):
    """Block outputs straight from an MFM file's tensors, written from docs/methods.md, exchange format."""
    get = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
    patch = torch.nn.functional.conv2d(
        images, get["patch_embed.proj.weight"], get["patch_embed.proj.bias"], stride=8
    )
    tokens = patch.flatten(2).transpose(1, 2)
    x = torch.cat([get["cls_token"].expand(len(images), -1, -1), tokens], dim=1) + get["pos_embed"]
    dim, outputs = x.shape[-1], []

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (dim,), get[f"{name}.weight"], get[f"{name}.bias"], 1e-6)

    for number in range(depth):
        block = f"blocks.{number}"
        bias = torch.cat([get[f"{block}.attn.q_bias"], torch.zeros(dim), get[f"{block}.attn.v_bias"]])
        qkv = norm(x, f"{block}.norm1") @ get[f"{block}.attn.qkv.weight"].T + bias
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) * (dim // heads) ** -0.5).softmax(dim=-1)
        mixed = (scores @ v).transpose(1, 2).reshape(x.shape)
        x = x + mixed @ get[f"{block}.attn.proj.weight"].T + get[f"{block}.attn.proj.bias"]
        hidden = norm(x, f"{block}.norm2") @ get[f"{block}.mlp.fc1.weight"].T + get[f"{block}.mlp.fc1.bias"]
        hidden = torch.nn.functional.gelu(hidden)
        x = x + hidden @ get[f"{block}.mlp.fc2.weight"].T + get[f"{block}.mlp.fc2.bias"]
        outputs.append(x)
    return outputs, norm(x, "norm")


def released(model, decoder=True):
    state = {f"encoder.{name}": tensor for name, tensor in to_beit_names(model.state_dict()).items()}
    if decoder:
        state |= {"decoder.0.weight": torch.randn(8 * 8 * 3, 64, 1, 1), "decoder.0.bias": torch.randn(192)}
    return state


def test_dropping_the_bias_of_keys_changes_no_block(tmp_path):
    model = tiny_vit()
    state = to_beit_names(model.state_dict())
    blocks = model.forward_intermediates(IMAGES, intermediates_only=True, return_prefix_tokens=True)
    outputs, final = beit_like_reference(state, IMAGES, 2)
    for output, (spatial, prefix) in zip(outputs, blocks, strict=True):
        torch.testing.assert_close(output[:, :1], prefix, atol=1e-5, rtol=0)
        torch.testing.assert_close(output[:, 1:], spatial.flatten(2).transpose(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(final, model.forward_features(IMAGES), atol=1e-5, rtol=0)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_pre_trained_mfm_vit_computes_what_its_tensors_say(tmp_path, new):
    state, file = released(tiny_vit()), tmp_path / "mfm.pth"
    torch.save({"model": state, "epoch": 299, "optimizer": {}}, file, _use_new_zipfile_serialization=new)
    converted = convert_file(file)
    _, final = beit_like_reference(state, IMAGES, 2)
    torch.testing.assert_close(converted.model.forward_features(IMAGES), final, atol=1e-5, rtol=0)
    assert torch.equal(converted.decoder["0.weight"], state["decoder.0.weight"])
    assert converted.image_size == (32, 32)
    assert converted.mean == (0.485, 0.456, 0.406)
    assert converted.facts["epoch"] == 299
    assert "not taken: optimizer" in converted.notes


def test_a_fine_tuned_mfm_vit_keeps_its_classifier(tmp_path):
    model = tiny_vit(num_classes=7, global_pool="avg", fc_norm=True)
    torch.save({"model": to_beit_names(model.state_dict())}, tmp_path / "finetuned.pth")
    converted = convert_file(tmp_path / "finetuned.pth")
    torch.testing.assert_close(converted.model(IMAGES), model(IMAGES), atol=1e-5, rtol=0)
    assert converted.model(IMAGES).shape == (2, 7)
    assert converted.decoder == {}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_resnet_is_told_from_its_names(tmp_path, prefix):
    torch.manual_seed(0)
    model = timm.create_model("resnet34", num_classes=5, layers=(1, 2, 1, 1)).eval()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "resnet.pth")
    converted = convert_file(tmp_path / "resnet.pth")
    assert torch.equal(converted.model(IMAGES), model(IMAGES))


def test_a_pre_trained_mfm_resnet_brings_its_decoder(tmp_path):
    model = timm.create_model("resnet18", num_classes=0).eval()
    state = {f"encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {"decoder.0.weight": torch.randn(32 * 32 * 3, 512, 1, 1), "decoder.0.bias": torch.randn(3072)}
    torch.save({"model": state}, tmp_path / "resnet.pth")
    converted = convert_file(tmp_path / "resnet.pth")
    assert converted.architecture == "resnet18"
    assert torch.equal(converted.model(IMAGES), model(IMAGES))
    assert set(converted.decoder) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("shared", [False, True])
def test_beit_with_relative_positions_is_a_beit(tmp_path, shared):
    torch.manual_seed(0)
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 1,
        "num_classes": 0,
    }
    positions = {"use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared}
    model = timm.create_model("beit_base_patch16_224", **arguments, **positions, use_abs_pos_emb=False).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    state = {**model.state_dict(), "mask_token": torch.zeros(1, 1, 64)}
    torch.save({"module": state}, tmp_path / "beit.pth")
    converted = convert_file(tmp_path / "beit.pth")
    expected = model.forward_features(IMAGES)
    torch.testing.assert_close(converted.model.forward_features(IMAGES), expected, atol=1e-6, rtol=0)
    assert any("mask_token (1, 1, 64)" in note for note in converted.notes)


def test_timm_names_take_the_architecture_from_the_file_or_from_the_user(tmp_path):
    model = timm.create_model("resnet10t", num_classes=0).eval()
    del model.fc
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        convert_file(tmp_path / "x.safetensors")  # a deep stem is no plain ResNet
    convert_file(tmp_path / "x.safetensors", backbone="resnet10t")
    torch.save({"arch": "resnet10t", "state_dict": model.state_dict()}, tmp_path / "x.pth")
    assert convert_file(tmp_path / "x.pth").architecture == "resnet10t"
    other = timm.create_model("test_convnext", num_classes=0)
    torch.save(other.state_dict(), tmp_path / "y.pth")
    with pytest.raises(UserError, match="--backbone"):
        convert_file(tmp_path / "y.pth")
    with pytest.raises(UserError, match="did you mean 'test_convnext'"):
        convert_file(tmp_path / "y.pth", backbone="test_convnex")


def test_what_does_not_fit_is_named_key_by_key_with_shapes(tmp_path):
    state = released(tiny_vit())
    del state["encoder.norm.weight"]
    state["encoder.blocks.1.norm1.weight"] = torch.ones(65)
    state["encoder.extra.weight"] = torch.ones(3, 2)
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        convert_file(tmp_path / "x.pth")
    for problem in (
        "norm.weight (64,) is missing",
        "blocks.1.norm1.weight is (65,) instead of (64,)",
        "extra.weight (3, 2) has no place",
    ):
        assert problem in str(caught.value)


def test_another_image_size_interpolates_positions_and_says_so(tmp_path):
    torch.save({"model": released(tiny_vit())}, tmp_path / "x.pth")
    converted = convert_file(tmp_path / "x.pth", image_size=64)
    assert converted.model.pos_embed.shape == (1, 65, 64)
    assert any("interpolated from 32x32 to 64x64" in note for note in converted.notes)
    assert converted.model(torch.rand(1, 3, 64, 64)).shape == (1, 64)


def test_a_file_without_a_partner_bias_or_weights_is_refused(tmp_path):
    state = released(tiny_vit())
    del state["encoder.blocks.0.attn.v_bias"]
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no partner"):
        convert_file(tmp_path / "x.pth")
    torch.save({"epoch": 3, "note": "hello"}, tmp_path / "y.pth")
    with pytest.raises(UserError, match=r"no weights.*epoch, note"):
        convert_file(tmp_path / "y.pth")
    (tmp_path / "z.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(UserError, match="cut short"):
        convert_file(tmp_path / "z.safetensors")


def test_names_go_to_beit_and_back():
    model = tiny_vit()
    state = model.state_dict()
    there = to_beit_names(state)
    assert differences(there, vit_shapes(64, 2, 256, 8, 3, 17)) == []
    back = from_beit_names(there)
    assert set(back) == set(state)
    changed = [name for name in state if not torch.equal(back[name], state[name])]
    assert changed == ["blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"]
    assert back[changed[0]][64:128].abs().max() == 0
