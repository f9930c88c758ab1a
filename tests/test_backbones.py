"""Any timm model as a feature map: families, sizes, stages, what cannot be, batch norm."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from tiny_runs import fused_backwards
from torch import nn

from freqmask.backbones import Backbone, recalibrate_batch_norm
from freqmask.errors import UserError
from freqmask.timm_models import PatchConv2d, initialise_as_mfm

VIT: dict[str, Any] = {"patch_size": 8, "model_args": {"embed_dim": 32, "depth": 3, "num_heads": 2}}
# name: how it is shrunk, its family (vit, cnn or neither), whether the last stage leaves parameters unreached
FAMILIES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "vit_tiny_patch16_224": (VIT, "vit", False),
    "deit3_small_patch16_224": (VIT, "vit", False),
    "vit_small_patch16_dinov3": (VIT, "vit", False),
    "eva02_tiny_patch14_224": (VIT, "vit", True),
    "swin_tiny_patch4_window7_224": (
        {"model_args": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}},
        "",
        False,
    ),
    "convnext_atto": ({"model_args": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}}, "cnn", True),
    "resnet18": ({"model_args": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}}, "cnn", False),
    "regnetx_002": ({}, "cnn", False),
    "efficientnet_b0": ({}, "cnn", False),
    "hiera_tiny_224": ({"model_args": {"embed_dim": 16, "stages": (1, 1, 1, 1)}}, "", True),
    "maxvit_rmlp_pico_rw_256": ({}, "", False),
    "mambaout_femto": ({"model_args": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}}, "cnn", True),
}


def tiny_vit(image_size: int | tuple[int, int] = 32, **options: Any) -> Backbone:
    return Backbone("vit_tiny_patch16_224", image_size, **{**VIT, **options})


def tiny_resnet(image_size: int = 32, **options: Any) -> Backbone:
    return Backbone("resnet18", image_size, **{**FAMILIES["resnet18"][0], **options})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_covers_odd_images_of_any_channels_with_its_map(name: str) -> None:
    options, family, leaves_some = FAMILIES[name]
    backbone = Backbone(name, (97, 64), channels=2, **options)
    features = backbone(torch.randn(2, 2, 97, 64))
    rows, columns = features.feature_map.shape[2:]
    assert features.feature_map.shape[:2] == (2, backbone.feature_dim)
    assert rows * backbone.stride >= 97 > (rows - 1) * backbone.stride
    assert columns * backbone.stride == 64
    assert (backbone.is_vit, backbone.is_cnn) == (family == "vit", family == "cnn")

    features.feature_map.sum().backward()
    without = [p for p in backbone.parameters() if p.requires_grad and p.grad is None]
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    assert not without
    assert bool(frozen) == leaves_some


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_stage_is_what_timm_itself_classifies_from(name: str) -> None:
    backbone = Backbone(name, 64, **FAMILIES[name][0]).eval()
    images = torch.randn(1, 3, 64, 64)
    features = backbone(images)
    expected = backbone.timm_model.forward_features(images)
    if expected.dim() == 3:
        prefix = getattr(backbone.timm_model, "num_prefix_tokens", 0)
        expected = expected[:, prefix:].transpose(1, 2).reshape(features.feature_map.shape)
    elif expected.shape[1] != backbone.feature_dim:
        expected = expected.permute(0, 3, 1, 2)
    assert torch.allclose(features.feature_map, expected, atol=1e-6)
    assert torch.allclose(features.pooled, features.feature_map.mean((2, 3)))


def test_the_class_token_is_timms_and_no_register() -> None:
    backbone = Backbone("vit_small_patch16_dinov3", 32, **VIT).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(backbone(images).class_token, backbone.timm_model.forward_features(images)[:, 0])
    registers_only = {**VIT["model_args"], "class_token": False, "reg_tokens": 2, "global_pool": "avg"}
    assert tiny_vit(model_args=registers_only)(images).class_token is None
    assert tiny_resnet()(images).class_token is None


def test_what_lies_behind_the_chosen_stage_needs_no_gradient() -> None:
    backbone = tiny_vit(stage=1)
    frozen = {name.split(".")[2] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"2"}  # the third block
    assert tiny_resnet(stage=2).stride == 8
    assert tiny_resnet(stage=-2).stride == 16


def test_patch_size_and_output_stride_change_the_stride() -> None:
    assert tiny_vit(patch_size=4).stride == 4
    assert Backbone("convnext_atto", 32, patch_size=1, **FAMILIES["convnext_atto"][0]).stride == 8
    assert Backbone("resnet18", 32, model_args={"output_stride": 8}).stride == 8


def test_drop_path_is_off_unless_asked() -> None:
    swin = Backbone("swin_tiny_patch4_window7_224", 64, **FAMILIES["swin_tiny_patch4_window7_224"][0])
    assert not [m for m in swin.modules() if type(m).__name__ == "DropPath" and m.drop_prob > 0]
    asked = tiny_vit(model_args={**VIT["model_args"], "drop_path_rate": 0.2})
    assert [m for m in asked.modules() if type(m).__name__ == "DropPath" and m.drop_prob > 0]


def test_looking_at_the_model_leaves_no_trace_in_its_statistics() -> None:
    for name, buffer in tiny_resnet().named_buffers():
        assert "running_mean" not in name or not buffer.any()
        assert "num_batches" not in name or buffer == 0


def test_a_model_of_no_fixed_size_takes_other_sizes() -> None:
    assert tiny_resnet(64)(torch.randn(1, 3, 96, 33)).feature_map.shape[2:] == (3, 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, r"backbone \(resnet19\).*did you mean 'resnet1"),
        ("vit_tinny", {}, r"did you mean 'vit_tiny_patch"),
        ("zzzzzzzz", {}, r"backbone \(zzzzzzzz\) must be the name of a timm model"),
        ("resnet18", {"patch_size": 8}, r"patch_size \(8\) is no argument of backbone resnet18"),
        ("resnet18", {"model_args": {"depht": 3}}, r"model_args depht \(3\) is no argument"),
        ("resnet18", {"model_args": {"in_chans": 3}}, r"use the option channels"),
        ("resnet18", {"stage": 5}, r"stage \(5\) must be between -5 and 4"),
        ("resnet18", {"image_size": 0}, r"image_size \(0\) must be"),
        ("resnet18", {"initialisation": "zeros"}, r"initialisation \(zeros\)"),
        ("sknet", {}, r"backbone \(sknet\) must be"),
        (
            "resnet18",
            {"model_args": {"num_classes": 3}},
            r"num_classes=3\) must not name it: freqmask sets it",
        ),
        (
            "vit_tiny_patch16_224",
            {"model_args": {"depth": "abc"}},
            r"cannot take the arguments .*'depth': 'abc'",
        ),
        ("inception_v3", {"image_size": 32}, r"backbone \(inception_v3\) cannot take images of 32x32"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Backbone(name, **{"image_size": 32, **options})


def test_images_that_do_not_fit_are_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"images of 48x48 pixels do not fit .* built for 32x32"):
        tiny_vit()(torch.randn(1, 3, 48, 48))
    with pytest.raises(UserError, match=r"images of 4 channels do not fit .* built for 3"):
        tiny_vit()(torch.randn(1, 4, 32, 32))


def test_public_weights_that_cannot_be_had_are_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(UserError, match=r"public weights of resnet18 could not be had .*no route to host"):
        Backbone("resnet18", 32, pretrained=True)


def test_a_vit_begins_as_the_authors_do() -> None:
    model = tiny_vit(model_args={"embed_dim": 64, "depth": 3, "num_heads": 2}).timm_model
    for depth, block in enumerate(model.blocks, start=1):
        assert block.attn.qkv.weight.abs().max() <= 0.02
        assert block.attn.qkv.weight.std().item() == pytest.approx(
            0.02 * 0.5396, rel=0.1
        )  # std of a normal cut at one
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.abs().max().item() == pytest.approx(0.02 / math.sqrt(2 * depth), rel=0.02)
        assert not any(layer.bias.any() for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1))
    assert 0.015 < model.patch_embed.proj.weight.abs().max() <= 0.02
    assert 0.015 < model.pos_embed.abs().max() <= 0.02
    assert model.norm.eps == 1e-6


def test_other_families_and_timm_keep_timms_beginning() -> None:
    torch.manual_seed(0)
    ours = tiny_vit(initialisation="timm")
    torch.manual_seed(0)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=0, patch_size=8, **VIT["model_args"]
    )
    assert all(map(torch.equal, ours.timm_model.state_dict().values(), theirs.state_dict().values()))
    initialise_as_mfm(theirs)
    assert not torch.equal(ours.timm_model.pos_embed, theirs.pos_embed)


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
def test_gradient_checkpointing_leaves_the_gradients_as_they_are(build: Any) -> None:
    backbone = build()
    other = copy.deepcopy(backbone)
    other.set_gradient_checkpointing()
    images = torch.randn(2, 3, 32, 32)
    for module in (backbone, other):
        module(images).feature_map.square().sum().backward()
    assert all(
        torch.allclose(a.grad, b.grad, atol=1e-5)
        for a, b in zip(backbone.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_gradient_checkpointing_trains_on_few_tokens_in_half_precision(precision: str, share: float) -> None:
    torch.manual_seed(0)
    backbone, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    if precision == "bf16-true":
        backbone, images = backbone.bfloat16(), images.bfloat16()
    other = copy.deepcopy(backbone)
    other.set_gradient_checkpointing()
    for module in (backbone, other):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            tokens = module.read_tokens(images, torch.arange(round(share * 16)).expand(2, -1))
            if share == 1:
                tokens = module(images).feature_map
        tokens.float().square().sum().backward()
    plain, recomputed = (
        torch.cat([parameter.grad.float().flatten() for parameter in module.parameters()])
        for module in (backbone, other)
    )
    assert (recomputed - plain).norm() < 0.1 * plain.norm()  # two kernels in bf16


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
def test_a_backbone_compiles_in_one_graph_and_keeps_its_names(build: Any) -> None:
    backbone = build()
    names = list(backbone.state_dict())
    images = torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(backbone)(images).feature_map
    backbone.compile(backend="eager", fullgraph=True)
    assert torch.allclose(backbone(images).feature_map, expected, atol=1e-6)
    assert list(backbone.state_dict()) == names


def test_recalibration_gives_the_mean_statistics_of_the_batches_and_changes_nothing_else() -> None:
    backbone = tiny_resnet()
    first = backbone.timm_model.bn1
    backbone(torch.randn(4, 3, 32, 32) + 5)  # statistics of other images
    backbone.timm_model.layer1.eval()  # somebody's own choice of modes
    modes = [module.training for module in backbone.modules()]
    weights = {name: value.clone() for name, value in backbone.named_parameters()}
    batches = [torch.randn(8, 3, 32, 32), 2 * torch.randn(8, 3, 32, 32) + 1]

    recalibrate_batch_norm(backbone, iter(batches))

    seen = [backbone.timm_model.conv1(batch) for batch in batches]
    assert torch.allclose(
        first.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0), atol=1e-5
    )
    assert torch.allclose(first.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0), rtol=1e-4)
    assert first.momentum == 0.1
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in backbone.named_parameters())


def test_recalibration_weighs_a_last_batch_by_its_images() -> None:
    backbone = tiny_resnet()
    images = torch.cat([torch.randn(10, 3, 32, 32), 9 * torch.randn(2, 3, 32, 32) + 4])
    parts = (*images.split(4)[:2], images[8:10], images[10:])
    recalibrate_batch_norm(backbone, parts)
    seen = [backbone.timm_model.conv1(part).detach().double().numpy() for part in parts]
    weights = [len(part) for part in parts]
    mean = np.average([values.mean((0, 2, 3)) for values in seen], axis=0, weights=weights)
    variance = np.average([values.var((0, 2, 3), ddof=1) for values in seen], axis=0, weights=weights)
    assert np.allclose(backbone.timm_model.bn1.running_mean, mean, atol=1e-4)
    assert np.allclose(backbone.timm_model.bn1.running_var, variance, rtol=1e-4)


def test_recalibration_without_images_keeps_the_old_statistics() -> None:
    backbone = tiny_resnet()
    backbone(torch.randn(4, 3, 32, 32))
    before = backbone.timm_model.bn1.running_mean.clone()
    with pytest.raises(UserError, match="at least one batch"):
        recalibrate_batch_norm(backbone, [])
    assert torch.equal(backbone.timm_model.bn1.running_mean, before)


def test_a_lone_image_is_joined_to_its_neighbor_and_changes_nothing_where_it_is_all_there_is() -> None:
    images = torch.randn(5, 3, 32, 32)  # the last map has one cell: one image has no variance
    joined, whole, alone = tiny_resnet(), tiny_resnet(), tiny_resnet()
    for backbone in (joined, alone):
        backbone.load_state_dict(whole.state_dict())
    recalibrate_batch_norm(joined, [images[:4], images[4:]])
    recalibrate_batch_norm(whole, [images])
    before = {name: value.clone() for name, value in alone.state_dict().items()}
    recalibrate_batch_norm(alone, [images[:1]])
    for name, value in joined.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
        assert torch.equal(alone.state_dict()[name], before[name]), name


def test_gradient_checkpointing_that_a_family_lacks_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lacks(enable: bool) -> None:
        assert not enable, "gradient checkpointing not supported"  # as timm does it

    backbone = tiny_resnet()
    monkeypatch.setattr(backbone.timm_model, "set_grad_checkpointing", lacks)
    with pytest.raises(UserError, match="gradient_checkpointing is not offered by resnet18; leave it off"):
        backbone.set_gradient_checkpointing()


def test_what_goes_wrong_in_reading_images_for_recalibration_is_told_as_it_is() -> None:
    def batches() -> Any:
        raise ValueError("tile 7 is odd")
        yield

    with pytest.raises(ValueError, match="tile 7 is odd"):
        recalibrate_batch_norm(tiny_resnet(), batches())


def test_a_network_that_ends_in_several_sequences_is_read_at_its_coarsest() -> None:
    backbone = Backbone("coat_tiny", (64, 96), channels=2).eval()
    images = torch.rand(1, 2, 64, 96)
    *_, coarsest = backbone.timm_model.forward_features(images)  # the class token before its cells
    feature_map = backbone(images).feature_map
    assert (backbone.stride, feature_map.shape[2:]) == (32, (2, 3))
    torch.testing.assert_close(feature_map.flatten(2).mT, coarsest[:, 1:])


def test_recalibration_reads_nothing_where_there_is_no_batch_norm() -> None:
    def batches() -> Any:
        raise RuntimeError("read")
        yield

    recalibrate_batch_norm(nn.Linear(2, 2), batches())


def test_optional_model_args_are_granted_where_the_family_knows_them() -> None:
    optional_model_args = {"dynamic_img_size": True, "drop_path_rate": 0.5}
    tiny = {"depth": 2, "embed_dim": 32, "num_heads": 1}
    vit = Backbone("vit_tiny_patch16_224", 32, model_args=tiny, optional_model_args=optional_model_args)
    assert not vit.fixed_size
    assert vit(torch.rand(1, 3, 48, 64)).feature_map.shape[2:] == (3, 4)
    assert vit.timm_model.blocks[1].drop_path1.drop_prob == 0.5
    assert Backbone("resnet18", 32, optional_model_args=optional_model_args).fixed_size is False


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
@pytest.mark.parametrize(("side", "tokens"), [(32, 17), (96, 145)])
def test_few_tokens_in_half_precision_are_attended_to_by_the_plain_product_and_alike(
    precision: str, side: int, tokens: int
) -> None:
    torch.manual_seed(0)
    backbone, images = tiny_vit(side), torch.randn(2, 3, side, side)
    expected = backbone(images).feature_map.detach()
    if precision == "bf16-true":
        backbone, images = backbone.bfloat16(), images.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        feature_map = backbone(images).feature_map
    assert fused_backwards(feature_map) == (0 if precision != "32-true" and tokens < 128 else 3)
    torch.testing.assert_close(feature_map.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("size", [(32, 40), (33, 47)])
def test_the_first_layer_of_a_vit_is_on_a_gpu_the_product_that_its_convolution_is(
    size: tuple[int, int],
) -> None:
    narrow = {"embed_dim": 64, "depth": 1, "num_heads": 1}
    backbone = Backbone("vit_tiny_patch16_224", size, patch_size=8, model_args=narrow)
    layer = backbone.timm_model.patch_embed.proj
    assert isinstance(layer, PatchConv2d)
    images = torch.randn(2, 3, *size, requires_grad=True)
    expected = F.conv2d(images, layer.weight, layer.bias, stride=8)
    torch.testing.assert_close(layer(images), expected)
    torch.testing.assert_close(layer.product(images), expected)
    ours, theirs = (
        torch.autograd.grad(out.square().sum(), (images, layer.weight, layer.bias))
        for out in (layer.product(images), expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
