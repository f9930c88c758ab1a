"""Attacks: the closed form, the budget, losses that only grow, and a kept library's accuracy."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from freqmask.errors import UserError
from freqmask.evaluation.bands_and_attacks import (
    Attack,
    format_level,
    make_attacks,
    random_point,
    size_of_change,
)


def images_of(count: int, side: int = 6) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def keys_of(count: int) -> Tensor:
    return torch.arange(count) + 17


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(108, 32), nn.Tanh(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)
    )


ATTACKS = [
    Attack("fgsm"),
    Attack("fgsm", "l2", 0.5),
    Attack("pgd"),
    Attack("pgd", "linf", 0.3, steps=5, step=0.2),
    Attack("pgd", "linf", 0.1, random_start=False),
    Attack("pgd", "l2", 0.5, steps=8, step=0.2),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.name} {attack.random_start}")
def test_no_image_ends_easier_and_none_beyond_the_budget(attack: Attack) -> None:
    model, images, labels = network(), images_of(40), torch.arange(40) % 5
    harder = attack.run(model, images, labels, keys_of(40))
    before, after = (F.cross_entropy(model(one), labels, reduction="none") for one in (images, harder))
    assert (after >= before).all() and after.mean() > before.mean()
    assert size_of_change(harder - images, attack.norm).max() <= attack.epsilon + 1e-6
    assert harder.min() >= 0 and harder.max() <= 1


def test_fgsm_of_a_linear_model_is_the_closed_form() -> None:
    torch.manual_seed(0)
    weights = 0.2 * torch.randn(2, 108)  # a margin of ten would leave the gradient few digits
    images, labels = 0.25 + 0.5 * images_of(20), torch.arange(20) % 2

    def classify(some: Tensor) -> Tensor:
        return some.flatten(1) @ weights.T

    # the loss falls in the margin, whose gradient is the difference of the rows: its sign is the way
    away = (weights[1 - labels] - weights[labels]).view_as(images)
    harder = Attack("fgsm", epsilon=0.05).run(classify, images, labels, keys_of(20))
    assert torch.allclose(harder, images + 0.05 * away.sign(), atol=1e-7)
    margin = (classify(harder) - classify(images)).gather(1, (1 - labels)[:, None])[:, 0]
    expected = 0.05 * (weights[1 - labels] * away.flatten(1).sign()).sum(dim=1)
    assert torch.allclose(margin, expected, atol=1e-4)
    along = Attack("fgsm", "l2", 0.5).run(classify, images, labels, keys_of(20)) - images
    lengths = away.flatten(1).norm(dim=1)[:, None, None, None]
    assert torch.allclose(along, 0.5 * away / lengths, atol=1e-5)


def test_more_steps_find_harder_images_than_one() -> None:
    model, images, labels = network(1), images_of(60), torch.arange(60) % 5
    losses = [
        F.cross_entropy(model(attack.run(model, images, labels, keys_of(60))), labels).item()
        for attack in (Attack("fgsm", epsilon=0.1), Attack("pgd", epsilon=0.1, steps=20, step=0.025))
    ]
    assert losses[1] > losses[0]


def test_the_best_iterate_is_kept() -> None:
    """The loss rises to a ridge that is narrower than a step: the iterates jump to and fro across it."""

    def classify(images: Tensor) -> Tensor:
        height = -40 * (images.mean(dim=(1, 2, 3)) - 0.57).abs()
        return torch.stack([torch.zeros_like(height), height], dim=1)

    images, labels = torch.full((2, 3, 6, 6), 0.5), torch.zeros(2, dtype=torch.int64)
    attack = Attack("pgd", "linf", 0.2, steps=4, step=0.06, random_start=False)
    harder = attack.run(classify, images, labels, keys_of(2))
    assert torch.allclose(harder, torch.full_like(images, 0.56))  # 0.62, 0.56, 0.62 come after it


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_fill_the_ball_and_follow_from_the_keys(norm: str) -> None:
    images = torch.zeros(500, 1, 2, 2)
    points = random_point(images, keys_of(500), norm, 0.1)  # type: ignore[arg-type]
    sizes = size_of_change(points, norm)  # type: ignore[arg-type]
    assert sizes.max() <= 0.1 + 1e-7
    # of a ball in four dimensions half of the volume lies beyond 2^(-1/4) of the radius
    assert (sizes > 0.1 * 0.5**0.25).double().mean() == pytest.approx(0.5, abs=0.07)
    assert torch.equal(points[3:4], random_point(images[:1], keys_of(500)[3:4], norm, 0.1))  # type: ignore[arg-type]


def test_gradients_of_vanishing_size_still_point_somewhere() -> None:
    def classify(images: Tensor) -> Tensor:
        return images.flatten(1)[:, :2] * 1e-20

    images, labels = images_of(3), torch.zeros(3, dtype=torch.int64)
    harder = Attack("pgd", "l2", 0.5, random_start=False).run(classify, images, labels, keys_of(3))
    assert torch.isfinite(harder).all()


def digits() -> tuple[Tensor, Tensor, nn.Module]:
    """A small network that knows scikit-learn's digits."""
    pixels, truth = load_digits(return_X_y=True)
    images = torch.from_numpy((pixels / 16).astype(np.float32)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(truth)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        optimiser.zero_grad()
        F.cross_entropy(model(images[:1200]), labels[:1200]).backward()
        optimiser.step()
    return images[1200:1500], labels[1200:1500], model.eval()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_kept_library_gives_the_same_accuracy(norm: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("art", reason="pip install 'freqmask[bench]'", exc_type=ImportError)
        from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
        from art.estimators.classification import PyTorchClassifier

        images, labels, model = digits()
        epsilon, order = (0.1, math.inf) if norm == "linf" else (0.6, 2)
        theirs = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0.0, 1.0), device_type="cpu"
        )
        fast = FastGradientMethod(theirs, norm=order, eps=epsilon)
        descent = ProjectedGradientDescent(
            theirs,
            norm=order,
            eps=epsilon,
            eps_step=epsilon / 4,
            max_iter=10,
            num_random_init=0,
            verbose=False,
        )
        made = {
            kind: torch.from_numpy(attack.generate(images.numpy(), F.one_hot(labels, 10).numpy()))
            for kind, attack in (("fgsm", fast), ("pgd", descent))
        }

    def accuracy(some: Tensor) -> float:
        return float((model(some).argmax(dim=1) == labels).double().mean())

    clean = accuracy(images)
    for kind, their_images in made.items():
        attack = Attack(kind, norm, epsilon, 10, epsilon / 4, random_start=False)  # type: ignore[arg-type]
        ours = attack.run(model, images, labels, keys_of(len(images)))
        assert accuracy(ours) == pytest.approx(accuracy(their_images), abs=0.01)
        assert accuracy(ours) < clean - 0.1
        same = (ours - their_images).abs().amax(dim=(1, 2, 3)) < 1e-5
        assert kind == "pgd" or same.double().mean() > 0.95


def test_budgets_are_read_as_typed() -> None:
    fgsm, pgd = make_attacks(["fgsm", "pgd"], "linf", "auto", 10, "auto", True)
    assert fgsm.describe() == "FGSM: linf, epsilon 4/255"
    assert pgd.describe() == "PGD: linf, epsilon 4/255, 10 steps of 1/255, random start"
    (far,) = make_attacks(["pgd"], "l2", "128/255", 3, 0.1, False)
    assert (far.epsilon, far.step, far.name) == (128 / 255, 0.1, "pgd l2 128/255")
    assert make_attacks(["none"], "linf", "auto", 10, "auto", True) == []
    assert format_level(0.3) == "0.3"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((["cw"], "linf", "auto", 10, "auto", True), "attacks (cw)"),
        ((["pgd"], "linf", 4, 10, "auto", True), "epsilon (4) must be at most 1"),
        ((["pgd"], "linf", "4/0", 10, "auto", True), "epsilon (4/0)"),
        ((["pgd"], "linf", "auto", 10, "-1", True), "step_size (-1)"),
    ],
)
def test_impossible_budgets_are_refused(options: tuple, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        make_attacks(*options)
    assert sentence in str(refused.value)
