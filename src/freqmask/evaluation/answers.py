"""Answers as logits: of a model's own classifier, or of a linear head learnt on its frozen features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from freqmask.evaluation import linear
from freqmask.evaluation.classifier import LOGITS
from freqmask.evaluation.features import Place
from freqmask.evaluation.labelled import Round
from freqmask.evaluation.protocol import Bench


@dataclass(frozen=True)
class Answers:
    """What turns the features of a model into logits.

    Attributes:
        sweep: the chosen head alone; None where the features are logits already.
        chosen: which head was chosen on held-out training images.
        learnt_from: images that it learnt from.
    """

    sweep: linear.Sweep | None = None
    chosen: str = ""
    learnt_from: int = 0

    def differentiable(self, features: Mapping[str, Tensor]) -> Float[Tensor, "batch class"]:
        """Logits of features (batch, dim) by name, differentiable in them."""
        if self.sweep is None:
            return features[LOGITS]
        return self.sweep.logits({name: values.float() for name, values in features.items()})

    def logits(self, place: Place, values: Mapping[str, np.ndarray]) -> Float[Tensor, "image class"]:
        """Logits of features as they lie in a table (image, dim), on the place's device."""
        with torch.no_grad():
            return self.differentiable({name: on_device(place, rows) for name, rows in values.items()})


def on_device(place: Place, values: np.ndarray) -> Tensor:
    """An array on a place's device."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(place.device)


def learn_answers(bench: Bench, head: str, one: Round, seed: int) -> Answers:
    """The answers of a model.

    Args:
        bench: the model and its images.
        head: ``own``, or ``linear``: learnt from the last features of whole images.
        one: whose training images are learnt from.
        seed: of the head.
    """
    if head == "own":
        return Answers()
    features = {name: bench.tensor(values, one.train) for name, values in bench.table("end").values.items()}
    chosen, sweep = linear.choose_and_fit(
        features,
        bench.labels(one.train),
        bench.classes,
        groups=bench.groups(one.train),
        seed=seed,
        weighted=False,
    )["plain"]
    return Answers(sweep, chosen.describe(), len(one.train))
