"""Other people's checkpoints become models that compute the same."""

import json
import shutil

import pytest
import timm
import torch
from reference import mfm_vit_shapes
from safetensors.torch import save_file

import freqmask
from freqmask.errors import UserError
from freqmask.interop.foreign_weights import convert_file, from_beit_names, to_beit_names
from freqmask.interop.models import open_model

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
    assert converted.metadata["epoch"] == 299
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


def test_a_vit_of_images_that_are_no_square_is_read_by_its_size_and_said_where_it_is_not_given(tmp_path):
    """Cells of 2 x 4 and the class token are 9 places, as are cells of 3 x 3 without it (DeiT III)."""
    model, images = tiny_vit(img_size=(16, 32)), torch.rand(2, 3, 16, 32)
    torch.save({"model": released(model)}, tmp_path / "x.pth")
    converted = convert_file(tmp_path / "x.pth", model_args={"img_size": [16, 32], "num_heads": 1})
    expected = model.forward_features(images)
    torch.testing.assert_close(converted.model.forward_features(images), expected, atol=1e-5, rtol=0)
    assert not any("square images" in note for note in converted.notes)
    assert any("among the 9 of pos_embed" in note for note in convert_file(tmp_path / "x.pth").notes)
    model = tiny_vit(no_embed_class=True)
    torch.save({"model": released(model)}, tmp_path / "x.pth")
    for given in ({}, {"img_size": 32}):
        converted = convert_file(tmp_path / "x.pth", model_args=given)
        torch.testing.assert_close(
            converted.model.forward_features(IMAGES), model.forward_features(IMAGES), atol=1e-5, rtol=0
        )


def test_biases_that_a_model_has_by_themselves_are_not_joined(tmp_path):
    arguments = {"img_size": 28, "embed_dim": 64, "depth": 1, "num_heads": 1, "num_classes": 0}
    model, images = timm.create_model("eva02_tiny_patch14_224", **arguments).eval(), torch.rand(2, 3, 28, 28)
    model.blocks[0].attn.q_bias.data.normal_()
    torch.save(model.state_dict(), tmp_path / "x.pth")
    converted = convert_file(tmp_path / "x.pth", backbone="eva02_tiny_patch14_224", model_args=arguments)
    torch.testing.assert_close(converted.model.forward_features(images), model.forward_features(images))
    assert converted.mean == model.pretrained_cfg["mean"] == (0.48145466, 0.4578275, 0.40821073)
    assert converted.std == model.pretrained_cfg["std"]


@pytest.mark.parametrize("size", [[32], [32, 32, 32], "32", [32, "x"]])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    torch.save({"model": released(tiny_vit())}, tmp_path / "x.pth")
    with pytest.raises(UserError):
        convert_file(tmp_path / "x.pth", model_args={"img_size": size})


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
    shapes = {name: tuple(tensor.shape) for name, tensor in there.items()}
    assert shapes == mfm_vit_shapes(64, 2, 256, 8, 3, 17)
    back = from_beit_names(there)
    assert set(back) == set(state)
    changed = [name for name in state if not torch.equal(back[name], state[name])]
    assert changed == ["blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"]
    assert back[changed[0]][64:128].abs().max() == 0


def timm_vit(**changes):
    """A ViT with timm's own names."""
    return tiny_vit(**changes).state_dict()


def assert_converts(state, content, path, **options):
    torch.save(content, path)
    converted = convert_file(path, **options)
    assert set(state) == set(converted.model.state_dict())
    for name, tensor in converted.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    return converted


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


HEAD = {"head.mlp.0.weight": torch.ones(8, 64), "head.last_layer.weight_g": torch.ones(3, 1)}


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: {"teacher": {**prefixed("backbone.", s), **HEAD}}, "not taken: head.last_layer.weight_g"),
        (
            lambda s: {
                "student": {**prefixed("module.backbone.", s), **prefixed("module.", HEAD)},
                "teacher": {**prefixed("backbone.", s), **HEAD},
            },
            "taken: teacher.backbone; --key takes others: student.module.backbone",
        ),
        (
            lambda s: {"state_dict": {**prefixed("_orig_mod.module.", s)}, "optimizer": {0: torch.ones(1)}},
            "not taken",
        ),
        (
            lambda s: {
                "state_dict": {
                    **prefixed("momentum_backbone.", s),
                    **prefixed("backbone.", s),
                    "x.w": torch.ones(1),
                },
                "pytorch-lightning_version": "2.1",
                "random_state": torch.zeros(4),
            },
            "taken: state_dict.backbone; --key takes others: state_dict.momentum_backbone",
        ),
        (
            lambda s: {
                "model": {
                    **s,
                    "mask_token": torch.zeros(1, 1, 64),
                    "decoder_embed.weight": torch.zeros(8, 64),
                    "decoder_pos_embed": torch.zeros(1, 17, 8),
                    "decoder_blocks.0.norm1.weight": torch.zeros(8),
                }
            },
            "decoder_embed.weight (8, 64)",
        ),
    ],
    ids=["DINO teacher", "DINO both", "compiled DDP", "solo-learn", "MAE with its decoder"],
)
def test_prefixes_of_other_projects_come_off_by_what_fits_best(tmp_path, wrap, said):
    state = timm_vit()
    converted = assert_converts(state, wrap(state), tmp_path / "x.pth")
    assert any(said in note for note in converted.notes), converted.notes


def test_a_key_takes_other_weights_of_the_file(tmp_path):
    model, average = timm_vit(), {name: tensor + 1 for name, tensor in timm_vit().items()}
    content = {
        "state_dict": prefixed("module.", model),
        "state_dict_ema": prefixed("module.", average),
        "epoch": 3,
    }
    assert_converts(model, content, tmp_path / "x.pth")
    assert_converts(average, content, tmp_path / "x.pth", key="state_dict_ema")
    assert_converts(average, content, tmp_path / "x.pth", key="state_dict_ema.module")
    with pytest.raises(
        UserError, match=r"key \(ema\) is not in .*; it has state_dict.module, state_dict_ema.module"
    ):
        convert_file(tmp_path / "x.pth", key="ema")


def test_a_named_backbone_is_found_behind_prefixes(tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("test_convnext", num_classes=0).state_dict()
    content = {"state_dict": {**prefixed("student.backbone.", state), **prefixed("student.", HEAD)}}
    assert_converts(state, content, tmp_path / "x.ckpt", backbone="test_convnext")


@pytest.mark.parametrize("place", ["timm", "dinov2"])
def test_registers_and_places_without_a_class_token(tmp_path, place):
    torch.manual_seed(0)
    options = {"img_size": 40, "embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 8, "num_classes": 0}
    model = timm.create_model("vit_small_patch14_reg4_dinov2", **options).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    state = dict(model.state_dict())
    if place == "dinov2":  # Meta's own names: timm's reader of them is the reference
        first = torch.randn(1, 1, 64)
        theirs = {**state, "register_tokens": state["reg_token"], "mask_token": torch.zeros(1, 64)}
        theirs |= {"cls_token": state["cls_token"] - first}
        theirs |= {"pos_embed": torch.cat([first, state["pos_embed"]], dim=1)}
        del theirs["reg_token"]
        reference = timm.models.vision_transformer.checkpoint_filter_fn(dict(theirs), model)
        model.load_state_dict(reference)
        state = theirs
    torch.save(state, tmp_path / "x.pth")
    converted = convert_file(tmp_path / "x.pth")
    images = torch.rand(2, 3, 40, 40)
    expected = model.forward_features(images)
    torch.testing.assert_close(converted.model.forward_features(images), expected, atol=1e-5, rtol=0)


def test_weights_that_hold_nan_are_refused_by_name(tmp_path):
    state = timm_vit()
    state["blocks.1.attn.qkv.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.qkv\.weight holds NaN"):
        convert_file(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_file_is_called_that(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"TorchScript program.*state_dict"):
        convert_file(tmp_path / "x.pt")


def test_a_list_of_what_does_not_fit_ends(tmp_path):
    torch.save(timm_vit(depth=4), tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        convert_file(tmp_path / "x.pth", backbone="resnet18")
    assert len(str(caught.value).splitlines()) == 10
    assert "more" in str(caught.value).splitlines()[-1]


def test_a_converted_vit_starts_a_training_of_another_size_as_timms_own_weights_would(tmp_path):
    """The documented way of machines without network: positions and patches are resampled, by timm's functions."""
    from freqmask.commands.export import convert
    from freqmask.interop.weights import initial_backbone, load_initial
    from freqmask.methods import MFM

    model = tiny_vit(img_size=48)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    folder = str(convert(str(tmp_path / "x.pth"), out=str(tmp_path / "converted")))
    name, arguments, patch = initial_backbone(folder, None)
    assert patch == 8
    for size, side in ((32, 8), (32, 4), (48, 8)):
        method = MFM(name, size, model_args=arguments, patch_size=side)
        notes = load_initial(method, folder)
        reference = timm.create_model(
            f"local-dir:{folder}", pretrained=True, img_size=size, patch_size=side, num_classes=0
        )
        own = method.backbone.timm_model.state_dict()
        for key, tensor in reference.state_dict().items():
            torch.testing.assert_close(own[key], tensor, atol=1e-5, rtol=1e-5)
        assert (len(notes) > 1) == (size != 48 or side != 8)


def test_weights_that_open_as_they_are_need_no_converting(vit_run, tmp_path):
    with pytest.raises(UserError, match=f"needs no converting; name its folder as MODEL: {vit_run.backbone}"):
        convert_file(vit_run.backbone / "model.safetensors")
    with pytest.raises(UserError, match=f"is a file; name its folder: {vit_run.backbone}"):
        open_model(vit_run.backbone / "model.safetensors")
    shutil.copy(
        vit_run.backbone / "model.safetensors", tmp_path
    )  # alone it tells neither statistics nor sizes
    assert convert_file(tmp_path / "model.safetensors").model.embed_dim == 64
    weights = prefixed("method.backbone.timm_model.", timm_vit())
    content = {
        "state_dict": weights,
        "pytorch-lightning_version": "2",
        "random_state": torch.zeros(4),
        "epoch": 0,
    }
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="training state of freqmask; name its run folder"):
        convert_file(tmp_path / "last.ckpt")


def test_statistics_of_others_are_put_where_the_note_says(tmp_path, capsys):
    model = tiny_vit()
    torch.save(
        {"teacher": {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}},
        tmp_path / "a.pth",
    )
    folder = freqmask.convert(tmp_path / "a.pth", out=tmp_path / "dino", model_args={"num_heads": 1})
    mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    assert (
        f"DINO's, MAE's and DeiT's are {list(mean)} and {list(std)}: put them into config.json"
        in capsys.readouterr().out
    )
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": mean, "std": std}
    (folder / "config.json").write_text(json.dumps(config))
    opened = open_model(folder)
    shown = (IMAGES - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(opened.normalise(IMAGES), shown)
        torch.testing.assert_close(opened.backbone(opened.normalise(IMAGES)).class_token, model(shown))
