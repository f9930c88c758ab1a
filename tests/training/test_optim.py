"""The published recipe, to the number (docs/methods.md, MFM)."""

import math

import pytest
import torch
from torch import nn

from freqmask.training.optim import (
    OptimConfig,
    Schedule,
    build_optimizer,
    parameter_groups,
    scaled_lr,
    update_ema,
)


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


def recipe(**changes: object) -> OptimConfig:
    values = {"lr": 1.2e-3, "min_lr": 1e-5, "warmup_lr": 1e-6, "warmup_steps": 20, "total_steps": 300}
    return OptimConfig(**{**values, **changes})  # type: ignore[arg-type]


def rates(settings: OptimConfig) -> list[float]:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2, 2))], lr=settings.lr)
    schedule = Schedule(optimizer, settings)
    found = []
    for step in range(settings.total_steps):
        schedule.apply(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_learning_rate_scales_with_the_batch_as_published() -> None:
    assert scaled_lr(3e-4, 2048) == pytest.approx(1.2e-3)


def test_only_matrices_decay() -> None:
    model = Vit()
    decayed, undecayed = parameter_groups(model, 0.05)
    assert [p.shape for p in decayed["params"]] == [model.linear.weight.shape]
    assert decayed["weight_decay"] == 0.05
    assert undecayed["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in undecayed["params"]} == {
        "pos_embed",
        "cls_token",
        "linear.bias",
        "norm.weight",
        "norm.bias",
    }


def test_cosine_runs_underneath_the_warm_up() -> None:
    found = rates(recipe())
    assert found[0] == pytest.approx(1e-6)
    assert found[10] == pytest.approx(1e-6 + 10 * (1.2e-3 - 1e-6) / 20)
    cosine_at_20 = 1e-5 + 0.5 * (1.2e-3 - 1e-5) * (1 + math.cos(math.pi * 20 / 300))
    assert found[20] == pytest.approx(cosine_at_20)
    assert found[20] / 1.2e-3 == pytest.approx(0.989, abs=1e-3)  # the peak that the paper's schedule reaches
    assert found[-1] < 1.1e-5


def test_weight_decay_follows_a_cosine_and_spares_the_undecayed() -> None:
    model = Vit()
    settings = recipe(weight_decay=0.04, weight_decay_end=0.4, total_steps=100)
    optimizer = build_optimizer(model, settings)
    schedule = Schedule(optimizer, settings)
    schedule.apply(0)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.04)
    schedule.apply(50)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.22)
    schedule.apply(100)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [pytest.approx(0.4), 0.0]


def test_a_weight_decay_that_begins_at_0_rises() -> None:
    settings = recipe(weight_decay=0.0, weight_decay_end=0.4, total_steps=100)
    optimizer = build_optimizer(Vit(), settings)
    schedule, found = Schedule(optimizer, settings), []
    for step in (0, 50, 100):
        optimizer.load_state_dict(optimizer.state_dict())  # a resumed one has groups of its own
        schedule.apply(step)
        found.append([group["weight_decay"] for group in optimizer.param_groups])
    assert found == [[0.0, 0.0], [pytest.approx(0.2), 0.0], [pytest.approx(0.4), 0.0]]


@pytest.mark.parametrize(
    ("precision", "scaled"), [("16-mixed", False), ("bf16-mixed", True), ("32-true", True)]
)
def test_an_optimizer_under_a_loss_scale_is_handed_gradients_of_the_loss(
    precision: str, scaled: bool
) -> None:
    optimizer = build_optimizer(Vit(), recipe(), precision)
    assert bool(optimizer.defaults["fused"]) is scaled
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is scaled  # what Lightning goes by


def test_moving_average_is_the_weighted_mean() -> None:
    teacher, student = nn.Linear(3, 3), nn.Linear(3, 3)
    expected = 0.9 * teacher.weight + 0.1 * student.weight
    update_ema(teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight, expected)


def test_a_power_decays_as_a_polynomial_to_the_least_rate_and_layers_keep_their_factor() -> None:
    layer = nn.Linear(2, 2)
    groups = [{"params": [layer.weight], "lr_scale": 0.5}, {"params": [layer.bias]}]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    schedule = Schedule(optimizer, OptimConfig(1.0, 0.0, 0.0, warmup_steps=10, total_steps=100, power=1.0))
    rates = []
    for step in (0, 5, 25, 75, 99):
        schedule.apply(step)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates == [[pytest.approx(rate / 2), pytest.approx(rate)] for rate in (0.0, 0.5, 0.75, 0.25, 0.01)]
