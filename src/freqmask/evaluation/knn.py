"""k-NN: neighbors by cosine vote for their classes, near ones more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from freqmask.console import say
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import BackboneModel
from freqmask.evaluation.labelled import Round, held_out_parts
from freqmask.evaluation.protocol import EvalConfig, EvalContext, Prediction, Protocol
from freqmask.interop.feature_space import KINDS, PLAIN, FeatureSpace, save_space

NEIGHBORS = (10, 20, 100, 200)
TEMPERATURE = 0.07
MOST_WHITENED = 2_048  # numbers; the covariance of more (raw pixels) takes minutes
MOST_CHOOSING = 10_000  # training images that choose the features
CHOOSING_SHARE = 0.3  # of them, held out
_QUERIES = 1024  # at once: 1,024 x 1,000 classes of votes are 4 MB
_BANK = 32_768  # images of the bank at once: 1,024 x 32,768 similarities are 134 MB
Function = TypeVar("Function", bound=Callable[..., Any])


def outside_autocast(function: Function) -> Function:
    """A function whose matrix products keep the precision of its arguments wherever it is called.

    The probe of a training stands inside bf16 autocast, where similarities have three digits: k-NN fell from 89.3 % to
    58.7 % on the same features.
    """
    for device in ("cpu", "cuda", "mps"):
        function = torch.autocast(device, enabled=False)(function)
    return function


@outside_autocast
def predict(
    queries: Float[Tensor, "query dim"],
    bank: Float[Tensor, "image dim"],
    labels: Int64[Tensor, " image"],
    classes: int,
    neighbors: Sequence[int] = NEIGHBORS,
    temperature: float = TEMPERATURE,
    chunk: tuple[int, int] = (_QUERIES, _BANK),
) -> dict[int, Int64[Tensor, " query"]]:
    """The class that the nearest images of the bank vote for.

    A neighbor of cosine similarity s adds ``exp(s / temperature)`` to its class, as published for DINO. Of
    classes with the same votes the first wins. Memory: the bank, and one chunk of similarities.

    Args:
        queries: features of any length; they are normalized here.
        bank: features of the images whose classes are known.
        labels: their classes, 0 to ``classes - 1``.
        classes: how many there are.
        neighbors: numbers k of neighbors that vote, each at most the size of the bank.
        temperature: of the votes, above 0.
        chunk: queries and images of the bank at once.

    Raises:
        UserError: a k is out of its range.
    """
    most = max(neighbors)
    if min(neighbors) < 1 or most > len(bank):
        raise UserError(
            f"k ({min(neighbors)} to {most}) must be from 1 to the {len(bank):,} images of the bank"
        )
    queries, bank = queries.float(), torch.nn.functional.normalize(bank.float(), dim=1)
    predicted: dict[int, list[Tensor]] = {k: [] for k in neighbors}
    for part in queries.split(chunk[0]):
        similarity, places = nearest(torch.nn.functional.normalize(part, dim=1), bank, most, chunk[1])
        weights = torch.exp((similarity - similarity[:, :1]) / temperature)  # relative: exp(1/0.07) is 1.6e6
        voters = labels[places]
        for k in neighbors:
            votes = weights.new_zeros(len(part), classes).scatter_add_(1, voters[:, :k], weights[:, :k])
            predicted[k].append(votes.argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in predicted.items()}


@outside_autocast
def nearest(
    queries: Float[Tensor, "query dim"], bank: Float[Tensor, "image dim"], count: int, chunk: int = _BANK
) -> tuple[Float[Tensor, "query count"], Int64[Tensor, "query count"]]:
    """Similarities and places of the ``count`` most similar images of the bank, the most similar first.

    Queries and bank are normalized; ``chunk`` images of the bank are taken at once.
    """
    best = queries.new_empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), chunk):
        similarity = queries @ bank[start : start + chunk].T
        top, where = similarity.topk(min(count, similarity.shape[1]), dim=1)
        best, places = torch.cat([best, top], dim=1), torch.cat([places, where + start], dim=1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        places = places.gather(1, order)
    return best, places


def usable(neighbors: Sequence[int], images: int) -> list[int]:
    """The numbers k that a bank of so many images can serve; all of its images where none can."""
    return [k for k in neighbors if k <= images] or [images]


def candidates(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Features that may stand side by side: each alone, mean and token of a place, means (tokens) of all places."""
    places = list(dict.fromkeys(name.split("/")[0] for name in names))
    pairs = [tuple(name for name in names if name.startswith(f"{place}/")) for place in places]
    kinds = [tuple(name for name in names if name.endswith(kind)) for kind in ("/mean", "/token")]
    return list(dict.fromkeys([*((name,) for name in names), *filter(None, pairs), *filter(None, kinds)]))


@outside_autocast
def choose_space(
    features: Mapping[str, Float[Tensor, "image dim"]],
    labels: Int64[Tensor, " image"],
    classes: int,
    groups: Sequence[str | None] | None = None,
    temperature: float = TEMPERATURE,
) -> tuple[FeatureSpace, float]:
    """The features by which held-out training images find their class best; no test image is looked at.

    Features are by name, ``end/mean`` among them; no group is divided between the parts. The choice has its mean and
    projection from all these images; beside it stands its accuracy on the held-out ones. Among equals the first wins:
    fewer parts, no whitening.
    """
    some = torch.linspace(0, len(labels) - 1, min(len(labels), MOST_CHOOSING)).long()  # enough to choose by
    known = None if groups is None else [groups[index] for index in some.tolist()]
    numbers = labels.cpu()[some].numpy()
    use, way_out = "features are chosen on", "leave --features out"
    parts = held_out_parts(numbers, known, CHOOSING_SHARE, 0, use, way_out)
    fitted, held = (some[torch.from_numpy(part)].to(labels.device) for part in parts)
    rows = {name: values[fitted] for name, values in features.items()}
    asked = {name: values[held] for name, values in features.items()}
    k = min(20, len(fitted))
    spaces: list[tuple[float, tuple[str, ...], str]] = []
    for names in candidates(list(features)):
        many = sum(rows[name].shape[1] for name in names) > MOST_WHITENED
        for kind in KINDS[:-1] if many else KINDS:
            space = FeatureSpace.fit(rows, names, kind)
            voted = predict(space.apply(asked), space.apply(rows), labels[fitted], classes, [k], temperature)
            spaces.append((float((voted[k] == labels[held]).cpu().double().mean()), names, kind))
    accuracy, names, kind = max(spaces, key=lambda one: one[0])
    return FeatureSpace.fit(features, names, kind), accuracy


@dataclass
class Knn(Protocol):
    """Votes of the nearest training images."""

    k: Sequence[int] = NEIGHBORS  # that vote; those above the training images are left out
    temperature: float = TEMPERATURE  # of the votes
    feature: str = "mean"  # mean or class_token
    # plain; auto also measures what `choose_space` chooses; save keeps that beside the weights, for freqmask embed
    features: str = PLAIN

    seeded = False

    def __post_init__(self) -> None:
        self.title = f"k-NN by cosine, temperature {self.temperature:g}"
        self.headline = f"k={20 if 20 in self.k else min(self.k)}"
        self.blocks = self.features != PLAIN

    def open(self, config: EvalConfig) -> None:
        """As for every protocol; what is kept comes from one training part."""
        if self.features == "save" and config.split.folds:
            raise UserError(
                "features (save) needs one training part and --folds makes several; leave one out"
            )
        super().open(config)

    def predict(self, context: EvalContext, one: Round, seed: int) -> dict[str, Prediction]:
        """One prediction a k, of plain and of chosen features."""
        values = context.end(self.feature)
        train, test = context.tensor(values, one.train), context.tensor(values, one.test)
        predictions = self._vote(context, one, train, test)
        if self.features != PLAIN:
            inside = context.inside()
            features = context.tensors(inside, one.train)
            labels, groups = context.labels(one.train), context.data.groups_of(one.train)
            space, accuracy = choose_space(features, labels, context.classes, groups, self.temperature)
            say(f"features    {context.model.name}: {space.describe()}")
            say(f"            ({100 * accuracy:.1f} % of held-out training images)")
            opened = context.model.opened if isinstance(context.model, BackboneModel) else None
            if self.features == "save" and opened is not None and opened.folder:
                say(f"            kept in {save_space(space, opened)}; freqmask embed gives these")
            train, test = (space.apply(context.tensors(inside, part)) for part in (one.train, one.test))
            chosen = self._vote(context, one, train, test, space.describe())
            predictions |= {f"{variant}, chosen": prediction for variant, prediction in chosen.items()}
        return predictions

    def _vote(
        self, context: EvalContext, one: Round, train: Tensor, test: Tensor, chosen: str = ""
    ) -> dict[str, Prediction]:
        fewest = min(len(part.train) for part in context.data.rounds)  # folds differ by an image or a group
        labels, k = context.labels(one.train), usable(self.k, fewest)
        voted = predict(test, train, labels, context.classes, k, self.temperature)
        return {
            f"k={k}": Prediction(predicted.cpu().numpy(), chosen, len(one.train))
            for k, predicted in voted.items()
        }
