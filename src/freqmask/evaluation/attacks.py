"""Adversarial images: FGSM (arXiv 1412.6572) and PGD (arXiv 1706.06083), in pixels, before normalization.

    x_0     = x + start                                     start: 0, or uniform in the ball of radius epsilon
    x_{t+1} = clip_[0,1](project(x_t + step * direction(grad loss(x_t))))

direction(g) is sign(g) for the maximum norm and g / |g| for the Euclidean one; loss is the cross-entropy with
the true class. FGSM is one step of epsilon from x itself. Of all iterates, x included, the one with the
largest loss is kept: no image ends easier than it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from freqmask.errors import UserError
from freqmask.rng import normal, uniform

Norm = Literal["linf", "l2"]
Images = Float[Tensor, "batch channel height width"]
Classifier = Callable[[Images], Float[Tensor, "batch class"]]

KINDS = ("fgsm", "pgd")
EPSILONS: dict[Norm, str] = {"linf": "4/255", "l2": "1/2"}
_REACH = 2.5  # PGD's steps together over epsilon (arXiv 1706.06083): 10 steps of 1/255 for 4/255


@dataclass(frozen=True)
class Attack:
    """One attack and its budget."""

    kind: str  # fgsm or pgd
    norm: Norm = "linf"  # of the budget: linf (largest change of a value) or l2 (Euclidean, over the image)
    epsilon: float = 4 / 255  # budget, images being in [0, 1]
    steps: int = 10  # of PGD
    step: float = 1 / 255  # length of a step of PGD, in the norm
    random_start: bool = True  # whether PGD begins at a random point of the ball

    @property
    def name(self) -> str:
        """For tables and records, such as ``pgd linf 4/255``."""
        return f"{self.kind} {self.norm} {format_level(self.epsilon)}"

    def describe(self) -> str:
        """Everything that defines it, in words."""
        budget = f"{self.kind.upper()}: {self.norm}, epsilon {format_level(self.epsilon)}"
        if self.kind == "fgsm":
            return budget
        start = "random start" if self.random_start else "start at the image"
        return f"{budget}, {self.steps} steps of {format_level(self.step)}, {start}"

    def run(
        self,
        classify: Classifier,
        images: Images,
        labels: Int64[Tensor, " batch"],
        keys: Int64[Tensor, " batch"],
    ) -> Images:
        """The adversarial images, in [0, 1] and within the budget: of each the iterate of the largest loss.

        Args:
            classify: images in [0, 1] -> logits, differentiable.
            images: in [0, 1].
            labels: their true classes.
            keys: one an image, of the random start.
        """
        one_step = self.kind == "fgsm"
        steps, step = (1, self.epsilon) if one_step else (self.steps, self.step)
        best, best_loss = images, torch.full((len(images),), -math.inf, device=images.device)
        now = images
        if self.random_start and not one_step:
            now = (images + random_point(images, keys, self.norm, self.epsilon)).clamp(0, 1)
            best_loss, _ = _slope(classify, images, labels, with_gradient=False)
        for number in range(steps + 1):
            loss, gradient = _slope(classify, now, labels, with_gradient=number < steps)
            better = loss > best_loss
            best = torch.where(better[:, None, None, None], now, best)
            best_loss = torch.where(better, loss, best_loss)
            if gradient is not None:
                moved = now + step * direction(gradient, self.norm)
                now = (images + projected(moved - images, self.norm, self.epsilon)).clamp(0, 1)
        return best


def _slope(
    classify: Classifier, images: Images, labels: Tensor, with_gradient: bool
) -> tuple[Float[Tensor, " batch"], Images | None]:
    """The loss of each image and its gradient."""
    with torch.set_grad_enabled(with_gradient):
        leaf = images.detach().requires_grad_(with_gradient)
        losses = F.cross_entropy(classify(leaf).float(), labels, reduction="none")
        gradient = torch.autograd.grad(losses.sum(), leaf)[0] if with_gradient else None
    return losses.detach(), gradient


def direction(gradient: Images, norm: Norm) -> Images:
    """The step of length 1 in which the loss grows most; 0 where the gradient is 0."""
    if norm == "linf":
        return gradient.sign()
    return gradient / _lengths(gradient).clamp_min(1e-30)


def projected(change: Images, norm: Norm, epsilon: float) -> Images:
    """The nearest change within the budget."""
    if norm == "linf":
        return change.clamp(-epsilon, epsilon)
    return change * (epsilon / _lengths(change).clamp_min(1e-30)).clamp_max(1)


def random_point(images: Images, keys: Int64[Tensor, " batch"], norm: Norm, epsilon: float) -> Images:
    """A point of the ball for each image, uniform over its volume; a function of the keys."""
    shape = images.shape[1:]
    if norm == "linf":
        return ((2 * uniform(keys, "attack/start", shape) - 1) * epsilon).to(images.dtype)
    way = normal(keys, "attack/start", shape)
    length = uniform(keys, "attack/length", (1, 1, 1)) ** (1 / math.prod(shape))
    return (way / _lengths(way) * length * epsilon).to(images.dtype)


def _lengths(change: Images) -> Float[Tensor, "batch 1 1 1"]:
    # the largest value taken out first: squares of gradients of 1e-25 would be 0 in float32
    largest = change.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
    return (change / largest).square().sum(dim=(1, 2, 3), keepdim=True).sqrt() * largest


def size_of_change(change: Images, norm: Norm) -> Float[Tensor, " batch"]:
    """How much of the budget each change takes, in image units."""
    return change.abs().amax(dim=(1, 2, 3)) if norm == "linf" else _lengths(change).flatten()


def make_attacks(
    kinds: list[str], norm: Norm, epsilon: str | float, steps: int, step: str | float, random_start: bool
) -> list[Attack]:
    """Attacks from what a user typed: numbers also as fractions such as 4/255, or auto.

    Raises:
        UserError: one of them is out of its range.
    """
    kinds = [] if kinds == ["none"] else list(dict.fromkeys(kinds))
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"attacks ({kind}) must be fgsm, pgd, or none alone")
    radius = _number("epsilon", EPSILONS[norm] if epsilon == "auto" else epsilon)
    if norm == "linf" and radius > 1:
        raise UserError(f"epsilon ({epsilon}) must be at most 1, images being in [0, 1]; try 4/255")
    length = _REACH * radius / steps if step == "auto" else _number("step_size", step)
    return [Attack(kind, norm, radius, steps, length, random_start) for kind in kinds]


def _number(name: str, text: str | float) -> float:
    """A positive number, also as a fraction such as 4/255."""
    try:
        value = float(Fraction(str(text).replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not (0 < value < math.inf):
        raise UserError(f"{name} ({text}) must be a number above 0 such as 4/255 or 0.5, or auto")
    return value


def format_level(value: float) -> str:
    """A number of 255ths where it is one below 1, else with three digits.

    >>> format_level(4 / 255), format_level(0.5)
    ('4/255', '0.5')
    """
    levels = round(255 * value)
    return f"{levels}/255" if 0 < levels < 255 and abs(255 * value - levels) < 1e-6 else f"{value:.3g}"
