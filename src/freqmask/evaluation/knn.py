"""k-NN: neighbours by cosine vote for their classes, near ones more."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from freqmask.errors import UserError
from freqmask.evaluation.labelled import Round
from freqmask.evaluation.protocol import EvalContext, Prediction, Protocol

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
_QUERIES = 1024  # at once: 1,024 x 1,000 classes of votes are 4 MB
_BANK = 32_768  # images of the bank at once: 1,024 x 32,768 similarities are 134 MB
Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def outside_autocast(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """A function whose matrix products keep the precision of its arguments wherever it is called.

    The probe of a training stands inside bf16 autocast, where similarities have three digits: k-NN fell from 89.3 % to
    58.7 % on the same features.
    """

    @functools.wraps(function)
    def exact(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        with ExitStack() as stack:
            for device in ("cpu", "cuda", "mps"):
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return exact


@outside_autocast
def predict(
    queries: Float[Tensor, "query dim"],
    bank: Float[Tensor, "image dim"],
    labels: Int64[Tensor, " image"],
    classes: int,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    chunk: tuple[int, int] = (_QUERIES, _BANK),
) -> dict[int, Int64[Tensor, " query"]]:
    """The class that the nearest images of the bank vote for.

    A neighbour of cosine similarity s adds ``exp(s / temperature)`` to its class, as published for DINO. Of
    classes with the same votes the first wins. Memory: the bank, and one chunk of similarities.

    Args:
        queries: features of any length; they are normalised here.
        bank: features of the images whose classes are known.
        labels: their classes, 0 to ``classes - 1``.
        classes: how many there are.
        neighbours: numbers k of neighbours that vote, each at most the size of the bank.
        temperature: of the votes, above 0.
        chunk: queries and images of the bank at once.

    Returns:
        For each k the predicted classes.

    Raises:
        UserError: a k is out of its range.
    """
    most = max(neighbours)
    if min(neighbours) < 1 or most > len(bank):
        raise UserError(
            f"k ({min(neighbours)} to {most}) must be from 1 to the {len(bank):,} images of the bank"
        )
    queries, bank = queries.float(), torch.nn.functional.normalize(bank.float(), dim=1)
    found: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for part in queries.split(chunk[0]):
        similarity, places = nearest(torch.nn.functional.normalize(part, dim=1), bank, most, chunk[1])
        weights = torch.exp((similarity - similarity[:, :1]) / temperature)  # relative: exp(1/0.07) is 1.6e6
        voters = labels[places]
        for k in neighbours:
            votes = weights.new_zeros(len(part), classes).scatter_add_(1, voters[:, :k], weights[:, :k])
            found[k].append(votes.argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in found.items()}


@outside_autocast
def nearest(
    queries: Float[Tensor, "query dim"], bank: Float[Tensor, "image dim"], count: int, chunk: int = _BANK
) -> tuple[Float[Tensor, "query count"], Int64[Tensor, "query count"]]:
    """The most similar images of the bank, the most similar first, found chunk by chunk.

    Args:
        queries: normalised.
        bank: normalised.
        count: how many are wanted.
        chunk: images of the bank at once.

    Returns:
        Their similarities and places.
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


def usable(neighbours: Sequence[int], images: int) -> list[int]:
    """The numbers k that a bank of so many images can serve; all of its images where none can."""
    return [k for k in neighbours if k <= images] or [images]


class Knn(Protocol):
    """Votes of the nearest training images.

    Args:
        k: numbers of neighbors that vote; those larger than the training part are left out.
        temperature: of the votes.
        feature: ``mean`` or ``class_token``.
    """

    name, seeded = "knn", False

    def __init__(
        self, k: Sequence[int] | None = None, temperature: float = TEMPERATURE, feature: str = "mean"
    ) -> None:
        self.k, self.temperature, self.feature = list(k or NEIGHBOURS), temperature, feature
        self.title = f"k-NN by cosine, temperature {temperature:g}"
        self.headline = f"k={20 if 20 in self.k else min(self.k)}"

    def predict(self, context: EvalContext, one: Round, seed: int) -> dict[str, Prediction]:
        """One prediction a k."""
        values = context.end(self.feature)
        voted = predict(
            context.tensor(values, one.test),
            context.tensor(values, one.train),
            context.labels(one.train),
            context.classes,
            usable(self.k, len(one.train)),
            self.temperature,
        )
        return {
            f"k={k}": Prediction(predicted.cpu().numpy(), n_train=len(one.train))
            for k, predicted in voted.items()
        }
