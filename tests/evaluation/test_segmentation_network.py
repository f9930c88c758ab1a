"""UperNet on a plain ViT and on a CNN: the pyramid, the losses, the learning rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from freqmask.backbones import Backbone
from freqmask.interop.models import OpenedModel

pytest.importorskip("segmentation_models_pytorch", reason="pip install 'freqmask[seg]'")

from freqmask.evaluation.upernet import FeaturePyramid, UperNet, segmentation_losses

TINY: dict[str, Any] = {"depth": 4, "embed_dim": 16, "num_heads": 1}
RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (4, 8, 8, 16)}


def opened(backbone: Backbone) -> OpenedModel:
    size = (backbone.channels, *backbone.image_size)
    return OpenedModel(
        "tiny", "random", backbone, size, (0.5,) * backbone.channels, (0.2,) * backbone.channels
    )


def vit(patch: int = 16, side: int = 64, **options: Any) -> Backbone:
    return Backbone("vit_tiny_patch16_224", side, patch_size=patch, model_args=TINY, **options)


@pytest.mark.parametrize("patch", [16, 8, 14, 32])
def test_a_plain_vit_gets_maps_of_four_strides(patch: int) -> None:
    pyramid = FeaturePyramid(vit(patch, 4 * patch)).eval()
    assert pyramid.stages == [0, 1, 2, 3]
    sides = [one.shape[-1] for one in pyramid(torch.rand(1, 3, 4 * patch, 4 * patch))]
    exact = {16: [16, 8, 4, 2], 8: [8, 4, 2, 1], 14: [16, 8, 4, 2], 32: [32, 16, 8, 4]}
    assert sides == exact[patch]


def test_a_shallow_vit_gives_a_block_twice() -> None:
    shallow = Backbone("vit_tiny_patch16_224", 32, model_args={**TINY, "depth": 2})
    assert FeaturePyramid(shallow).stages == [0, 0, 1, 1]


def test_a_cnn_gives_its_own_last_four_stages() -> None:
    network = UperNet(opened(Backbone("resnet18", 64, model_args=RESNET)), 3, 8)
    assert not network.pyramid.is_plain
    assert network.pyramid.channels == [4, 8, 8, 16]
    logits = network(torch.rand(2, 3, 64, 64))
    assert logits.decoder.shape == (2, 3, 16, 16)
    assert network.eval()(torch.rand(1, 3, 64, 96)).auxiliary is None


def test_every_trained_parameter_has_a_gradient() -> None:
    for backbone in (vit(8, 32), Backbone("resnet18", 32, model_args=RESNET)):
        network = UperNet(opened(backbone), 2, 8)
        masks = torch.randint(0, 2, (2, 32, 32), generator=torch.Generator().manual_seed(0))
        segmentation_losses(network(torch.rand(2, 3, 32, 32)), masks)["loss"].backward()
        trained = {name for name, one in network.named_parameters() if one.requires_grad}
        reached = {name for name, one in network.named_parameters() if one.grad is not None}
        assert trained == reached
        assert "pyramid.backbone.timm_model.norm.weight" not in trained


def test_an_ignored_pixel_has_no_gradient_and_a_batch_of_them_no_loss() -> None:
    logits = torch.rand(1, 3, 4, 4, requires_grad=True)
    masks = torch.zeros(1, 4, 4, dtype=torch.int64)
    masks[0, 0] = -1

    from freqmask.evaluation.upernet import Logits

    segmentation_losses(Logits(logits, None), masks)["loss"].backward()
    assert logits.grad is not None
    assert (logits.grad[0, :, 0] == 0).all()
    assert (logits.grad[0, :, 1:] != 0).all()
    assert segmentation_losses(Logits(logits, logits), masks.fill_(-1))["loss"].item() == 0.0


def test_the_loss_is_the_decoder_s_plus_two_fifths_of_the_auxiliary_head_s() -> None:
    network = UperNet(opened(vit(8, 32)), 2, 8)
    masks = torch.zeros(2, 32, 32, dtype=torch.int64)
    parts = segmentation_losses(network(torch.rand(2, 3, 32, 32)), masks)
    assert parts["loss"].item() == pytest.approx((parts["decoder"] + 0.4 * parts["auxiliary"]).item())


def test_a_vit_that_may_takes_images_of_any_size() -> None:
    network = UperNet(opened(vit(8, 32, optional_model_args={"dynamic_img_size": True})), 2, 8).eval()
    assert network(torch.rand(1, 3, 40, 64)).decoder.shape == (1, 2, 10, 16)
