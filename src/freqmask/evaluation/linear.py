"""The linear probe: many softmax heads trained in one pass over frozen features, one chosen without the test."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from freqmask.evaluation.eval_model import LOGITS
from freqmask.evaluation.knn import outside_autocast
from freqmask.evaluation.labelled import Round, held_out_parts
from freqmask.evaluation.protocol import EvalContext, Prediction, Protocol
from freqmask.evaluation.results import margins, score

LEARNING_RATES = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0, 100.0)
DECAY = 1e-3  # weight decay times learning rate, see `Sweep`
HELD_OUT, ENOUGH, MOST_HELD_OUT = 0.1, 500, 0.3  # of the training images: they choose among the heads
MOMENTUM, BATCH, EPOCHS, LEAST_STEPS = 0.9, 512, 50, 1000
INVERSE_STRENGTH = 1.0  # scikit-learn's C, on features of mean squared length 1 x sqrt(number of features)
FOLDS, RIDGE = 5, 0.1  # the ridge's strength, times the mean squared length of an image's features
_CHUNK = 2**26  # logits at once, 270 MB: those of 18 heads, 5,000 classes and 8,192 images would be 3 GB
_AT_ONCE = 8192  # images
IMBALANCED = 1.2  # largest over smallest class from which class weights make a difference worth a row


def _in_double(values: Tensor) -> Tensor:
    """In float64, on the CPU where their device has none (MPS)."""
    return (values.cpu() if values.device.type == "mps" else values).double()


@dataclass(frozen=True)
class Head:
    """One head of the sweep."""

    inputs: tuple[str, ...]  # names of the features that it reads, side by side
    rate: float  # peak learning rate on features of variance 1, taken implicitly (see `Sweep`)
    weighted: bool = False  # whether rare classes count more, so that all count the same

    def describe(self) -> str:
        """For the records."""
        return f"{' + '.join(self.inputs)}, rate {self.rate:g}"


@dataclass
class Columns:
    """One input of some heads: features side by side, standardized as they are read."""

    parts: list[Tensor]  # the features (image, dim), as many as stand side by side
    mean: Tensor  # of each number over the training images
    scale: Tensor  # that makes the variance of each number 1

    @classmethod
    def of(cls, parts: list[Tensor]) -> Columns:
        """Learn mean and scale from these images."""
        means = torch.cat([part.float().mean(dim=0) for part in parts])
        deviations = torch.cat([part.float().std(dim=0, unbiased=False) for part in parts])
        # What does not vary tells nothing; rounding errors in it must not be blown up.
        floor = 1e-5 * deviations.max().clamp_min(1e-12)
        return cls(parts, means, torch.where(deviations > floor, 1 / deviations.clamp_min(1e-12), 0.0))

    def rows(self, images: Tensor) -> Float[Tensor, "batch columns"]:
        """The standardized input of some images, with a column of ones for the bias."""
        raw = torch.cat([part[images].float() for part in self.parts], dim=1)
        return torch.nn.functional.pad((raw - self.mean) * self.scale, (0, 1), value=1.0)

    def like(self, parts: list[Tensor]) -> Columns:
        """Other images, standardized as these."""
        return Columns(parts, self.mean, self.scale)

    def principal(self) -> tuple[Float[Tensor, "columns direction"], Float[Tensor, " direction"]]:
        """Directions in which the features vary independently (with that of the bias), and their variances.

        Of more columns than images only the directions that the images span are given: no gradient leaves them.
        """
        count, width = len(self.parts[0]), len(self.mean) + 1
        if count < len(self.mean):  # from the products of images: 200 of 25,600 pixels in 0.1 s, not in hours
            rows = torch.cat([self.rows(images) for images in self.chunks()])[:, :-1]
            variances, images = torch.linalg.eigh(_in_double(rows @ rows.T) / count)
            kept = variances > 1e-7 * variances.max().clamp_min(1e-12)  # below it is float32's rounding
            variances, images = (one.float().to(rows.device) for one in (variances[kept], images[:, kept]))
            directions = torch.nn.functional.pad(rows.T @ images / (count * variances).sqrt(), (0, 1, 0, 1))
            directions[-1, -1] = 1.0  # the bias
            return directions, torch.nn.functional.pad(variances, (0, 1), value=1.0)
        covariance = torch.zeros(width, width, device=self.mean.device)
        for images in self.chunks():
            rows = self.rows(images)
            covariance += rows.T @ rows / count
        # means are zero but for rounding: the bias stays apart
        covariance[-1, :-1] = covariance[:-1, -1] = 0.0
        variances, directions = torch.linalg.eigh(_in_double(covariance))
        return directions.float().to(rows.device), variances.float().clamp_min(0).to(rows.device)

    def chunks(self, width: int = 1) -> tuple[Tensor, ...]:
        """Numbers of the images, some thousands at once, or what there is room for if each makes many numbers."""
        count = min(max(_CHUNK // width, 1), _AT_ONCE)
        return torch.arange(len(self.parts[0]), device=self.mean.device).split(count)


class Sweep:
    """Heads on one input, trained together: none influences another.

    Multinomial logistic regression by SGD with momentum 0.9 and a cosine to zero. A step of rate r is taken
    implicitly, as if the loss were least squares: the gradient is multiplied by (covariance + 1/r)^-1. For small
    r that is plain SGD, for large r Newton's step, and none is unstable: features of networks vary a million
    times more in some directions than in others, and plain SGD would need as many steps. With the rate comes a
    weight decay of 0.001 / r, at which the thousands of effective steps arrive: a head ends at the solution of
    L2-regularized logistic regression (scikit-learn's with C = 1000 r / images), small rates at a simple one.
    The gradient is written out, so that all heads of one input are one matrix product.

    Features are name -> (image, dim) of the training images, whose order follows from the seed; small sets get at
    least 1,000 steps.
    """

    @outside_autocast
    def __init__(
        self,
        features: Mapping[str, Float[Tensor, "image dim"]],
        labels: Int64[Tensor, " image"],
        classes: int,
        heads: Sequence[Head],
        seed: int = 0,
        epochs: float = EPOCHS,
    ) -> None:
        (self.inputs,) = {head.inputs for head in heads}
        self.heads, self.classes = list(heads), classes
        batch = min(BATCH, len(labels))
        steps = max(math.ceil(epochs * len(labels) / batch), LEAST_STEPS)
        columns = Columns.of([features[name] for name in self.inputs])
        self.weights = self._train(columns, labels, _batches(len(labels), batch, steps, seed), steps)
        # the training images have served, and heads travel to other processes
        self.columns = columns.like([])

    @outside_autocast
    def predict(self, features: Mapping[str, Float[Tensor, "image dim"]]) -> Int64[Tensor, "head image"]:
        """The class that each head predicts for each image."""
        return torch.cat([logits.argmax(dim=2).T for _, logits in self._logits(features)], dim=1)

    @outside_autocast
    def logits(self, features: Mapping[str, Float[Tensor, "image dim"]]) -> Float[Tensor, "image class"]:
        """Those of the first head, differentiable in the features."""
        columns = self._columns(features)
        every = torch.arange(len(columns.parts[0]), device=columns.mean.device)
        return columns.rows(every) @ self.weights[:, : self.classes]

    @outside_autocast
    def evaluate(
        self, features: Mapping[str, Float[Tensor, "image dim"]], labels: Int64[Tensor, " image"]
    ) -> tuple[Int64[np.ndarray, "head image"], list[float]]:
        """The classes of each head, and its mean cross-entropy in nats."""
        losses, predicted = torch.zeros(len(self.heads), device=labels.device), []
        for images, logits in self._logits(features):
            predicted.append(logits.argmax(dim=2).T)
            truth = labels[images][:, None, None].expand(-1, len(self.heads), 1)
            losses -= logits.log_softmax(dim=2).gather(2, truth).sum(dim=(0, 2)) / len(labels)
        return torch.cat(predicted, dim=1).cpu().numpy(), losses.tolist()

    def _columns(self, features: Mapping[str, Tensor]) -> Columns:
        return self.columns.like([features[name] for name in self.inputs])

    def _logits(
        self, features: Mapping[str, Float[Tensor, "image dim"]]
    ) -> Iterator[tuple[Tensor, Float[Tensor, "batch head class"]]]:
        """Numbers of images and their logits, chunk by chunk."""
        columns = self._columns(features)
        for images in columns.chunks(self.weights.shape[1]):
            yield images, (columns.rows(images) @ self.weights).view(len(images), -1, self.classes)

    def _train(self, columns: Columns, labels: Tensor, batches: Iterator[Tensor], steps: int) -> Tensor:
        """The weights (column, head x class), learned in the basis of the principal directions."""
        heads = self.heads
        directions, variances = columns.principal()
        features = torch.cat([columns.rows(images) @ directions for images in columns.chunks()])
        counts = torch.bincount(labels, minlength=self.classes)
        balancing = len(labels) / (int((counts > 0).sum()) * counts.clamp_min(1))
        even = torch.ones_like(balancing)
        importance = torch.stack([balancing if head.weighted else even for head in heads])  # (head, class)
        rates = torch.tensor([head.rate for head in heads], device=labels.device)
        paces = (1 / (variances[:, None] + 1 / rates))[:, :, None]  # of each weight (direction, head, 1)
        # the bias is free; after sorting its direction is the one that ends in 1
        decays = ((1 - directions[-1:].T.square()) * DECAY / rates)[:, :, None]
        weights = torch.zeros(*paces.shape[:2], self.classes, device=labels.device)
        speeds = torch.zeros_like(weights)
        for step, chosen in enumerate(batches):
            images = chosen.to(labels.device)
            rows, truth = features[images], labels[images]
            error = (rows @ weights.flatten(1)).view(len(rows), len(heads), self.classes).softmax(dim=2)
            error[torch.arange(len(rows), device=rows.device), :, truth] -= 1  # d loss / d logits
            error *= importance[:, truth].T[:, :, None] / len(rows)
            gradient = (rows.T @ error.flatten(1)).view_as(weights)
            speeds.mul_(MOMENTUM).add_(gradient).addcmul_(decays, weights)
            weights -= 0.5 * (1 + math.cos(math.pi * step / steps)) * paces * speeds
        return directions @ weights.flatten(1)


def _batches(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Numbers of images for every step: orders of successive epochs, one behind the other."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(waiting) < batch:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:batch]
        waiting = waiting[batch:]


def _standard(values: Float[np.ndarray, "image dim"]) -> tuple[np.ndarray, np.ndarray]:
    """The mean, and the scale that gives features a mean squared length of the root of their number."""
    mean, spread = values.mean(axis=0, dtype=np.float64), values.std(axis=0, dtype=np.float64)
    scale = np.where(spread > 1e-5 * spread.max(), 1 / np.maximum(spread, 1e-12), 0.0)
    return mean, scale / values.shape[1] ** 0.25


def fit_logistic_regression(
    train: Float[np.ndarray, "image dim"],
    labels: Int64[np.ndarray, " image"],
    unlabelled: Float[np.ndarray, "other dim"],
    strength: float = INVERSE_STRENGTH,
) -> tuple[Any, Float[np.ndarray, " dim"], Float[np.ndarray, " dim"]]:
    """Scikit-learn's, of as few images as there are, on ``(train - mean) * scale``; with that mean and scale.

    ``unlabelled`` are the features of all training images, whose mean and spread standardize.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, scale = _standard(unlabelled)
    model = LogisticRegression(C=strength, max_iter=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 500 steps are close enough to the end
        model.fit((train - mean) * scale, labels)
    return model, mean, scale


def right_out_of_fold(
    features: Float[Tensor, "image dim"], others: Float[Tensor, "image dim"], labels: Int64[Tensor, " image"]
) -> tuple[Bool[np.ndarray, " image"], Bool[np.ndarray, " image"]]:
    """Which images a ridge classifier of four fifths of the others has right, by ``features`` and by ``others``.

    None where there is one class alone, or where a feature is not finite.
    """
    from sklearn.linear_model import RidgeClassifier

    truth, values = labels.cpu().numpy(), [part.double().cpu().numpy() for part in (features, others)]
    right = np.zeros((2, len(truth)), dtype=bool)
    folds = np.random.default_rng(0).permutation(len(truth)) % FOLDS
    for fold in range(FOLDS):
        train, test = folds != fold, folds == fold
        if len(np.unique(truth[train])) < 2 or not all(np.isfinite(part).all() for part in values):
            break
        mean, scale = _standard(values[0][train])
        ridge = RidgeClassifier(alpha=RIDGE * math.sqrt(len(mean)), solver="cholesky")
        ridge.fit((values[0][train] - mean) * scale, truth[train])
        for number, part in enumerate(values):
            right[number, test] = ridge.predict((part[test] - mean) * scale) == truth[test]
    return right[0], right[1]


@torch.no_grad()
def begin_head(
    head: Any, features: Float[Tensor, "image dim"], labels: Int64[Tensor, " image"], binary: bool = False
) -> None:
    """Sets a linear layer, in place, to the logistic regression of a few images on its inputs.

    With ``binary`` each class has its own, against all others, as a loss of yes or no for each class takes it. A class
    without an image keeps the weights it has, and the lowest bias of the others. One class alone, and features that are
    not finite, leave the layer as it is: the training tells of them.
    """
    classes, truth = labels.unique(), labels.cpu().numpy()
    if len(classes) < 2 or not features.isfinite().all():
        return
    values = features.double().cpu().numpy()
    if binary:
        fits = [fit_logistic_regression(values, truth == number, values) for number in classes.tolist()]
        _, mean, scale = fits[0]
        weights = np.concatenate([one.coef_ for one, _, _ in fits]) * scale
        bias = np.concatenate([one.intercept_ for one, _, _ in fits])
    else:
        model, mean, scale = fit_logistic_regression(values, truth, values)
        weights, bias = model.coef_ * scale, model.intercept_
        if len(classes) == 2:  # scikit-learn has one row of their difference
            weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    bias = bias - weights @ mean
    head.bias.fill_(float(bias.min()))
    head.weight[classes] = torch.as_tensor(weights).to(head.weight)
    head.bias[classes] = torch.as_tensor(bias).to(head.bias)


def sweep_of(names: Sequence[str], weighted: bool, rates: Sequence[float] = LEARNING_RATES) -> list[Head]:
    """Learning rates × {mean patch, class token, both} × places, without and with class weights.

    Features are called ``PLACE/mean`` and ``PLACE/token``.
    """
    places = dict.fromkeys(name.split("/")[0] for name in names)
    pairs = [(f"{place}/mean", f"{place}/token") for place in places]
    inputs = [*((name,) for name in names), *(pair for pair in pairs if set(pair) <= set(names))]
    kinds = (False, True) if weighted else (False,)
    return [Head(one, rate, kind) for one in inputs for kind in kinds for rate in rates]


def choose_and_fit(
    features: Mapping[str, Float[Tensor, "image dim"]],
    labels: Int64[Tensor, " image"],
    classes: int,
    *,
    groups: Sequence[str | None] | None = None,
    seed: int = 0,
    rates: Sequence[float] = LEARNING_RATES,
    epochs: float = EPOCHS,
    weighted: bool | None = None,
) -> dict[str, tuple[Head, Sweep]]:
    """Train the sweep on most images, choose on the held-out ones, train the chosen head on all.

    No group is divided between the parts. ``weighted`` says whether heads with class weights come along; None is where
    the classes differ in size.

    Returns:
        ``plain``, and ``class weights`` where asked for: the chosen head and a sweep of it alone. The first is
        chosen by accuracy, the second by balanced accuracy.
    """
    counts = torch.bincount(labels)
    if weighted is None:
        weighted = bool(counts.max() > IMBALANCED * counts[counts > 0].min())
    share = held_out_share(len(labels))
    use, way_out = "a linear head is chosen on", "measure by knn or fewshot"
    parts = held_out_parts(labels.cpu().numpy(), groups, share, seed, use, way_out)
    fitted, held = (torch.from_numpy(part).to(labels.device) for part in parts)
    heads = sweep_of(list(features), weighted, rates)
    predicted, losses, truth = list[np.ndarray](), list[float](), labels[held].cpu().numpy()
    # input by input: their memory is that of one
    for inputs, members in itertools.groupby(heads, lambda head: head.inputs):
        rows = {name: features[name][fitted] for name in inputs}
        sweep = Sweep(rows, labels[fitted], classes, list(members), seed, epochs)
        classes_of, losses_of = sweep.evaluate({name: features[name][held] for name in inputs}, labels[held])
        predicted, losses = [*predicted, *classes_of], [*losses, *losses_of]
    chosen = {}
    for name, kind in (("plain", False), ("class weights", True)):
        if kind and not weighted:
            continue
        among = [number for number, head in enumerate(heads) if head.weighted == kind]
        best = max(among, key=lambda k: _rank(margins(truth, predicted[k], classes), losses[k], kind))
        chosen[name] = (heads[best], Sweep(features, labels, classes, [heads[best]], seed, epochs))
    return chosen


def held_out_share(images: int) -> float:
    """A tenth of the training images, up to three tenths where that would be fewer than 500."""
    return min(max(HELD_OUT, ENOUGH / images), MOST_HELD_OUT)


def _rank(counts: np.ndarray, loss: float, balanced: bool) -> tuple[float, float]:
    """Accuracy, and among equals the loss: few images leave many heads with the same accuracy."""
    if not math.isfinite(loss):
        return -1.0, -math.inf
    scores = score(counts)
    return (scores.balanced_accuracy if balanced else scores.accuracy), -loss


@dataclass(frozen=True)
class ClassifierHead:
    """What turns the features of a model into logits."""

    sweep: Sweep | None = None  # the chosen linear head alone; None where the features are logits already
    chosen: str = ""  # which head was chosen on held-out training images
    n_train: int = 0  # training images

    def logits(self, features: Mapping[str, Tensor]) -> Float[Tensor, "batch class"]:
        """Of features (batch, dim) by name, differentiable in them."""
        if self.sweep is None:
            return features[LOGITS]
        return self.sweep.logits({name: values.float() for name, values in features.items()})

    def predict(
        self, context: EvalContext, values: Mapping[str, np.ndarray], among: Sequence[int] | None = None
    ) -> Int64[np.ndarray, " image"]:
        """The classes of images by their features (image, dim) in a table; ``among`` some classes, their places."""
        predicted, inputs = [], (LOGITS,) if self.sweep is None else self.sweep.inputs
        read = {name: values[name] for name in inputs}
        for images in torch.arange(len(read[inputs[0]])).split(_AT_ONCE):
            with torch.no_grad():
                logits = self.logits(context.tensors(read, images.numpy()))
            predicted.append((logits if among is None else logits[:, among]).argmax(dim=1).cpu().numpy())
        return np.concatenate(predicted)


def fit_heads(
    context: EvalContext, features: Mapping[str, np.ndarray], one: Round, seed: int, **options: Any
) -> dict[str, ClassifierHead]:
    """The heads that :func:`choose_and_fit` gives for a round's training images, by the features of all images."""
    chosen = choose_and_fit(
        context.tensors(features, one.train),
        context.labels(one.train),
        context.classes,
        groups=context.data.groups_of(one.train),
        seed=seed,
        **options,
    )
    return {
        name: ClassifierHead(sweep, head.describe(), len(one.train)) for name, (head, sweep) in chosen.items()
    }


def fit_head(context: EvalContext, head: str, one: Round, seed: int) -> ClassifierHead:
    """The classifier of a model: its ``own``, or ``linear``, trained on the last features of a round's images."""
    if head == "own":
        return ClassifierHead()
    return fit_heads(context, context.table("end").values, one, seed, weighted=False)["plain"]


@dataclass
class Linear(Protocol):
    """The sweep of softmax heads."""

    rates: Sequence[float] = LEARNING_RATES  # peak learning rates of the sweep
    epochs: float = EPOCHS  # passes over the training images

    headline, blocks = "plain", True
    title = "linear probe, chosen on held-out training images"

    def predict(self, context: EvalContext, one: Round, seed: int) -> dict[str, Prediction]:
        """The plain head and, where classes differ in size, the one with class weights."""
        inside = context.inside()
        test = {name: rows[one.test] for name, rows in inside.items()}
        heads = fit_heads(context, inside, one, seed, rates=self.rates, epochs=self.epochs)
        return {
            name: Prediction(head.predict(context, test), head.chosen, head.n_train)
            for name, head in heads.items()
        }
