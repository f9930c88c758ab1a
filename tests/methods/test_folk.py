"""FOLK: who sees what, who teaches whom, and what moves when."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny import CNN, photographs, tiny_method, views_for
from torch import Tensor, nn

from freqmask.rng import combine

KEYS = torch.arange(4)


def inputs_of(module: nn.Module) -> list[Tensor]:
    """What the module is given from now on."""
    seen: list[Tensor] = []
    module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach().clone()))
    return seen


def train_step(method: Any, step: int, total: int) -> None:
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    method(views_for(method), KEYS)["loss"].backward()
    method.before_optimizer_step(step, total)
    optimizer.step()
    method.after_step(step, total)
    optimizer.zero_grad()


@pytest.mark.parametrize(("views", "rows"), [("two", 8), ("one", 4)])
def test_the_student_sees_only_filtered_views_and_the_teacher_only_originals(views: str, rows: int) -> None:
    method = tiny_method("folk", views=views)
    student, teacher = inputs_of(method.student), inputs_of(method.teacher)
    first, second = views_for(method)
    method([first, second], KEYS)
    filtered = [
        method.filter(view, combine(KEYS, number)).images.clamp(0, 1)
        for number, view in enumerate((first, second))
    ]
    originals = [second, first]  # crossed: row by row what the student's row is to predict
    assert torch.equal(torch.cat(student), method.normalise(torch.cat(filtered))[:rows])
    assert torch.equal(torch.cat(teacher), method.normalise(torch.cat(originals))[:rows])
    assert torch.cat(student).shape[0] == rows


@pytest.mark.parametrize("views", ["two", "one"])
def test_the_loss_is_same_view_reconstruction_and_cross_view_distillation(views: str) -> None:
    method = tiny_method("folk", views=views, reconstruction_weight=0.7, distillation_weight=1.3).eval()
    method.distillation.center.normal_(std=0.1)
    both = views_for(method)
    reconstruction, student, teacher = [], [], []
    for number, view in enumerate(both):
        filtered = method.filter(view, combine(KEYS, number))
        features = method.student(method.normalise(filtered.images.clamp(0, 1)))
        prediction = method.decoder(features.feature_map)
        reconstruction.append(method.loss(prediction, method.normalise(view), filtered.keep))
        student.append((method.student_head(features.class_token) / 0.1).log_softmax(-1))
        outputs = method.teacher_head(method.teacher(method.normalise(view)).class_token)
        teacher.append(((outputs - method.distillation.center) / 0.04).softmax(-1))
    cross = [-(teacher[1 - number] * student[number]).sum(-1).mean() for number in range(2)]
    used = 2 if views == "two" else 1
    expected = (0.7 * sum(reconstruction[:used]) + 1.3 * sum(cross[:used])) / used
    parts = method(both, KEYS)
    assert parts["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert parts["reconstruction"].item() == pytest.approx(
        (sum(reconstruction[:used]) / used).item(), rel=1e-5
    )


def test_no_gradient_reaches_the_teacher() -> None:
    method = tiny_method("folk")
    teacher = [*method.teacher.parameters(), *method.teacher_head.parameters()]
    before = [parameter.clone() for parameter in teacher]
    method(views_for(method), KEYS)["loss"].backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher)
    assert all(map(torch.equal, before, teacher))
    assert not {id(p) for p in teacher} & {id(p) for p in method.parameters() if p.requires_grad}


def test_the_teacher_begins_as_the_student() -> None:
    method = tiny_method("folk")
    assert all(map(torch.equal, method.student.parameters(), method.teacher.parameters()))
    assert all(map(torch.equal, method.student_head.parameters(), method.teacher_head.parameters()))


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.9), (5, 0.95), (10, 1.0)])
def test_the_teacher_follows_with_a_momentum_that_rises_along_a_cosine(step: int, momentum: float) -> None:
    method = tiny_method("folk", ema_momentum=0.9)
    with torch.no_grad():
        for parameter in (*method.student.parameters(), *method.student_head.parameters()):
            parameter.add_(torch.randn_like(parameter))
    pairs = [
        (teacher.clone(), student.clone(), teacher)
        for teacher, student in zip(
            [*method.teacher.parameters(), *method.teacher_head.parameters()],
            [*method.student.parameters(), *method.student_head.parameters()],
            strict=True,
        )
    ]
    method.after_step(step, 10)
    for old, student, new in pairs:
        assert torch.allclose(new, momentum * old + (1 - momentum) * student, atol=1e-6)


def test_the_last_layer_stands_still_while_it_is_frozen() -> None:
    method = tiny_method("folk", freeze_last_layer_steps=2)
    layer = method.student_head.last_layer
    beginning, others = layer.clone(), method.student_head.mlp[0].weight.clone()
    for step in range(2):
        train_step(method, step, 10)
    assert torch.equal(layer, beginning)
    assert not torch.equal(method.student_head.mlp[0].weight, others)
    train_step(method, 2, 10)
    assert not torch.equal(layer, beginning)


def test_the_last_layer_is_frozen_for_a_hundredth_of_the_steps_unless_told() -> None:
    method = tiny_method("folk")
    assert (method.frozen_steps(1000), method.frozen_steps(30)) == (10, 1)


def test_the_teachers_temperature_rises_and_is_part_of_the_state() -> None:
    method = tiny_method(
        "folk", teacher_temperature_start=0.04, teacher_temperature=0.08, teacher_temperature_warmup=0.4
    )
    temperatures = [method.current_teacher_temperature.item()]
    for step in range(10):
        method.after_step(step, 10)
        temperatures.append(method.current_teacher_temperature.item())
    assert temperatures == pytest.approx([0.04, 0.05, 0.06, 0.07] + [0.08] * 7)
    assert "current_teacher_temperature" in method.state_dict()
    assert tiny_method(
        "folk", teacher_temperature_warmup=0.0
    ).current_teacher_temperature.item() == pytest.approx(0.07)


def test_the_temperature_in_force_is_the_one_that_the_loss_uses() -> None:
    method = tiny_method("folk").eval()
    cold = method(views_for(method), KEYS)["distillation"]
    method.current_teacher_temperature.fill_(0.5)
    assert not torch.isclose(method(views_for(method), KEYS)["distillation"], cold)


def test_the_centre_moves_in_training_and_only_then() -> None:
    method = tiny_method("folk")
    method.eval()(views_for(method), KEYS)
    method.after_step(0, 10)
    assert not method.distillation.center.any()
    method.train()(views_for(method), KEYS)
    method.after_step(0, 10)
    assert method.distillation.center.any()


def test_the_teacher_keeps_batch_statistics_of_its_own_images() -> None:
    method = tiny_method("folk", CNN, filter="highpass(radius=4)")
    method(views_for(method), KEYS)
    method.after_step(0, 10)
    student, teacher = method.student.timm_model.bn1, method.teacher.timm_model.bn1
    originals = method.normalise(torch.cat(views_for(method)))
    expected = 0.1 * method.teacher.timm_model.conv1(originals).mean((0, 2, 3))
    assert torch.allclose(teacher.running_mean, expected, atol=1e-4)
    assert not torch.allclose(student.running_mean, teacher.running_mean, atol=1e-2)


def test_the_teacher_drops_no_paths_and_the_student_does() -> None:
    model_args = {"embed_dim": 32, "depth": 3, "num_heads": 2, "drop_path_rate": 0.5, "proj_drop_rate": 0.5}
    method = tiny_method("folk", model_args=model_args)
    (view, _), steady = views_for(method), copy.deepcopy(method.teacher).eval()
    for _ in range(2):  # as it is built, and back from an evaluation
        with torch.no_grad():
            told = [method.teacher(method.normalise(view)).class_token for _ in range(2)]
            expected = steady(method.normalise(view)).class_token
            student = [method.student(method.normalise(view)).class_token for _ in range(2)]
        assert torch.equal(told[0], expected) and torch.equal(told[1], expected)
        assert not torch.equal(*student)
        method.eval().train()


def test_the_teacher_keeps_no_positions_of_weights_that_have_moved() -> None:
    """LeViT keeps its positions of attention in evaluation until it trains; the teacher moves at each step."""
    network = {"backbone": "levit_128s", "image_size": 64}
    method = tiny_method("folk", network)
    view = photographs(2, size=(64, 64))
    with torch.no_grad():
        method.teach(view)
        for name, parameter in method.teacher.named_parameters():
            if "attention_biases" in name:
                parameter.normal_()
        moved = copy.deepcopy(method).train()
        torch.testing.assert_close(method.teach(view), moved.teach(view))


def test_the_class_token_is_distilled_where_there_is_one_and_the_pooled_feature_elsewhere() -> None:
    for settings, expected in (({}, "class_token"), ({"distil": "pooled"}, "pooled")):
        method = tiny_method("folk", **settings)
        features = method.student(photographs())
        assert method.distilled(features) is getattr(features, expected)
    method = tiny_method("folk", CNN)
    features = method.student(photographs())
    assert method.distilled(features) is features.pooled


def test_one_filtered_view_halves_the_passes() -> None:
    two, one = tiny_method("folk"), tiny_method("folk", views="one")
    assert two.n_views == one.n_views == 2
    seen = {
        name: (inputs_of(method.student), inputs_of(method.teacher))
        for name, method in (("2", two), ("1", one))
    }
    two(views_for(two), KEYS), one(views_for(one), KEYS)
    assert [len(batch[0]) for batch in seen["2"]] == [8, 8]
    assert [len(batch[0]) for batch in seen["1"]] == [4, 4]


def test_a_teacher_that_says_the_same_of_all_is_seen_to_have_collapsed() -> None:
    method = tiny_method("folk", CNN)
    healthy = method(views_for(method), KEYS, details=True)["collapse"]
    nn.init.zeros_(method.teacher_head.mlp[-1].weight)
    nn.init.ones_(method.teacher_head.mlp[-1].bias)
    collapsed = method(views_for(method), KEYS, details=True)["collapse"]
    assert collapsed.item() == pytest.approx(0.0, abs=1e-5)
    assert 0.1 < healthy <= math.log(8)
