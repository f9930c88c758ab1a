"""Distill: what a frozen teacher sees in the whole image, told from a part of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CNN, VIT, photographs, tiny_method, tiny_teacher, views_for
from torch import Tensor

from freqmask.backbones import Backbone
from freqmask.errors import UserError
from freqmask.methods import build_method
from freqmask.methods.distill import Teacher, on_grid, teacher_size
from freqmask.training.optim import OptimConfig, build_optimizer

KEYS = torch.arange(4)


def standardized(values: Tensor) -> Tensor:
    return (values - values.mean(0)) / (values.var(0, unbiased=False) + 1e-5).sqrt()


def seen_by_hand(teacher: Teacher, images: Tensor) -> Tensor:
    """The map of timm's own module, in evaluation mode, of enlarged and normalised images."""
    large = F.interpolate(images, size=(40, 40), mode="bicubic").clamp(0, 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        model = teacher.backbone.timm_model.eval()
        return model.forward_features((large - mean[:, None, None]) / std[:, None, None])  # type: ignore[no-any-return]


@pytest.mark.parametrize("network", [VIT, CNN], ids=["vit", "cnn"])
def test_the_loss_is_that_of_torchs_cosine(network: dict[str, Any]) -> None:
    method = tiny_method("distill", network, token_weight=0.5, reconstruction_weight=2.0)
    views = views_for(method)
    cells, places = method.see(views[0], KEYS)
    feature_map = seen_by_hand(method.teacher, views[0])
    pooled = torch.nn.CosineSimilarity()(
        method.head(cells.mean(1)), standardized(feature_map.mean((2, 3)))
    ).mean()
    on_students = F.interpolate(feature_map, size=(4, 4), mode="bilinear").flatten(2).mT  # it has 2 x 2
    if places is not None:
        assert places.shape == (4, 8)  # half of the patches
        on_students = torch.stack([one[at] for one, at in zip(on_students, places, strict=True)])
    target = standardized(on_students.flatten(0, 1))
    tokens = torch.nn.CosineSimilarity()(method.token_head(cells.flatten(0, 1)), target).mean()
    pictures = method.picture_loss(cells, places, views[0])
    loss = (1 - pooled) + 0.5 * (1 - tokens) + 2.0 * pictures
    assert torch.allclose(method(views, KEYS)["loss"], loss, atol=1e-5)


def test_the_teacher_is_frozen_and_in_no_checkpoint() -> None:
    method = tiny_method("distill", CNN).train()
    before = {name: value.clone() for name, value in method.teacher.backbone.state_dict().items()}
    optimizer = build_optimizer(
        method, OptimConfig(lr=0.1, min_lr=0.0, warmup_lr=0.0, warmup_steps=0, total_steps=3)
    )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in method.teacher.parameters()}
    for step in range(3):
        method(views_for(method), KEYS)["loss"].backward()
        optimizer.step()
        method.after_step(step, 3)
    after = method.teacher.backbone.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module.training for module in method.teacher.modules())
    assert [name for name in method.state_dict() if name.startswith("teacher")] == []
    assert list(method.backbones()) == ["backbone"]


def test_without_its_teacher_it_still_loads_and_draws() -> None:
    method = tiny_method("distill", token_weight=1.0)
    method(views_for(method), KEYS)
    again = build_method("distill", **method.settings)
    again.load_state_dict(method.state_dict())
    images = photographs()
    assert torch.equal(again.reconstruct(images)["prediction"], method.reconstruct(images)["prediction"])
    with pytest.raises(UserError, match=r"teacher \(random:resnet18\) must be opened"):
        again(views_for(method), KEYS)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_pictures_reach_the_student_only_with_a_weight(weight: float) -> None:
    method = tiny_method("distill", reconstruction_weight=weight)
    method.head.requires_grad_(False)
    method.head[1].weight.zero_()
    method.head[3].weight.zero_()  # the teacher says nothing any more
    method(views_for(method), KEYS)["loss"].backward()
    grads = [p.grad for p in method.backbone.parameters() if p.requires_grad]
    assert any(grad is not None and grad.abs().max() > 1e-7 for grad in grads) == (weight > 0)
    assert method.decoder[0].weight.grad.abs().sum() > 0


def test_a_vits_class_token_is_its_summary() -> None:
    backbone = Backbone(VIT["backbone"], 32, patch_size=8, model_args=VIT["model_args"])
    teacher = Teacher(backbone, "random:vit")
    features = teacher(photographs())
    assert torch.equal(teacher.summary(features), features.class_token)
    assert torch.equal(tiny_teacher().summary(features), features.pooled)


def test_sizes_of_a_teacher() -> None:
    assert teacher_size((32, 32), (224, 224), "auto") == (96, 96)
    assert teacher_size((128, 128), (224, 224), "auto") == (224, 224)
    assert teacher_size((64, 96), (224, 224), "auto") == (192, 288)
    assert teacher_size((32, 32), (224, 224), 64) == (64, 64)


def test_maps_are_averaged_down_and_interpolated_up() -> None:
    feature_map = torch.arange(16.0).view(1, 1, 4, 4)
    assert on_grid(feature_map, (4, 4)) is feature_map
    halves = feature_map.view(2, 2, 2, 2).mean((1, 3))
    assert torch.equal(on_grid(feature_map, (2, 2))[0, 0], halves)
    assert on_grid(feature_map, (5, 3)).shape == (1, 1, 5, 3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"teacher": None}, "method distill needs a teacher"),
        ({"teacher": tiny_teacher(1)}, r"takes 1 channels and the images have 3"),
        ({"token_weight": -1}, r"token_weight \(-1\)"),
        ({"teacher_size": 0}, r"teacher_size \(0\)"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        tiny_method("distill", **options)
