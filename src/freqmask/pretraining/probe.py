"""Looks at what the backbone has learnt while it trains: k-NN and a small linear head, or the rank of its features."""

from __future__ import annotations

import copy
import time
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from freqmask.backbones import recalibrate_batch_norm
from freqmask.data.loader import TrainDataset, make_loader
from freqmask.evaluation import knn, linear
from freqmask.evaluation.labelled import LabelledData
from freqmask.pretraining.heldout import calibration, looking
from freqmask.pretraining.module import PretrainingModule, as_float
from freqmask.pretraining.sharding import whole_method
from freqmask.training.looking import Look
from freqmask.training.monitor import Monitor

PROBES_A_RUN = 10
MOST_TRAIN, MOST_TEST, MOST_RANKED = 5000, 2000, 1000  # images of a look: enough for a trend, cheap enough
NEIGHBOURS = 20
_RATE, _EPOCHS = 0.3, 10  # less regularisation than a sweep begins with: few labels, features of low rank


class Probe(Look):
    """Every so often, and at the end, measures the features and writes them into the metrics.

    Nothing of it reaches the training: modes are put back, and no generator is moved.

    Args:
        monitor: takes the numbers.
        every_steps: optimiser steps between two looks.
        ranked: held-out images for RankMe; None where there are too few.
        labelled: images with labels, seen whole and unflipped; None for RankMe alone.
        data: their labels and parts; None for RankMe alone.
        batch_size: images at once.
    """

    def __init__(
        self,
        monitor: Monitor,
        every_steps: int,
        ranked: TrainDataset | None,
        labelled: TrainDataset | None,
        data: LabelledData | None,
        batch_size: int,
    ) -> None:
        """Nothing is read before it is needed."""
        super().__init__(every_steps)
        self.monitor = monitor
        self.ranked = ranked
        self.labelled = labelled
        self.data = data
        self.batch_size = batch_size

    def look(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        """Measure, in the first process, to which the others lend their share of sharded weights."""
        assert isinstance(module, PretrainingModule)
        began = time.perf_counter()
        devices = [module.device] if module.device.type == "cuda" else []
        # A loader draws its seed from torch's generator, which belongs to the training.
        with (
            torch.random.fork_rng(devices=devices),
            looking(module),
            trainer.precision_plugin.forward_context(),
        ):
            method = whole_method(trainer, module)
            values = self.measure(method) if trainer.is_global_zero else {}
        if values and trainer.is_global_zero:
            self.monitor.record(step, values)
        self.monitor.pause(time.perf_counter() - began)

    def measure(self, method: Any) -> dict[str, float]:
        """The numbers by their names in the metrics: shares of right answers, and an effective rank."""
        values: dict[str, float] = {}
        backbone = copy.deepcopy(method.backbones()[method.default_backbone]).eval()
        some = self.labelled if self.labelled is not None else self.ranked
        if some is not None:
            recalibrate_batch_norm(backbone, calibration(some, method))
        if self.labelled is not None and self.data is not None:
            one = self.data.rounds[0]
            train, test = spread(one.train, MOST_TRAIN), spread(one.test, MOST_TEST)
            features = [self.features(method, backbone, self.labelled, part) for part in (train, test)]
            values |= probe(
                features[0], self.labels(train), features[1], self.labels(test), len(self.data.class_names)
            )
        if self.ranked is not None:
            images = spread(np.arange(len(self.ranked)), MOST_RANKED)
            values["rankme"] = rankme(self.features(method, backbone, self.ranked, images))
        return values

    def labels(self, images: np.ndarray) -> Tensor:
        """The classes of some labelled images."""
        assert self.data is not None
        return torch.from_numpy(self.data.labels[images])

    def features(
        self, method: Any, backbone: Any, images: TrainDataset, indices: np.ndarray
    ) -> Float[Tensor, "image dim"]:
        """The mean feature of each image, on the CPU."""
        items: Any = [(0, index, index) for index in indices.tolist()]
        device = next(method.parameters()).device
        found = []
        for batch in make_loader(images, items, min(self.batch_size, len(items)), workers=0):
            normalised = method.normalise(as_float(batch["views"][0].to(device)))
            found.append(backbone(normalised).pooled.float().cpu())
        return torch.cat(found)


def probe(
    train: Float[Tensor, "image dim"],
    train_labels: Tensor,
    test: Float[Tensor, "query dim"],
    test_labels: Tensor,
    classes: int,
) -> dict[str, float]:
    """Accuracy of k-NN (k = 20) and of one small linear head, in [0, 1].

    Args:
        train: features that are learnt from.
        train_labels: their classes.
        test: features that are judged on.
        test_labels: their classes.
        classes: how many there are.
    """
    if not (torch.isfinite(train).all() and torch.isfinite(test).all()):
        return {"probe_knn": float("nan"), "probe_linear": float("nan")}
    k = min(NEIGHBOURS, len(train))
    near = knn.predict(test, train, train_labels, classes, [k])[k]
    heads = [linear.Head(("mean",), _RATE)]
    sweep = linear.Sweep({"mean": train}, train_labels, classes, heads, epochs=_EPOCHS)
    straight = sweep.predict({"mean": test})[0]
    return {
        "probe_knn": float((near == test_labels).double().mean()),
        "probe_linear": float((straight == test_labels).double().mean()),
    }


def rankme(features: Float[Tensor, "image dim"]) -> float:
    """Effective rank of features: the exponential of the entropy of their singular values (arXiv 2210.02885).

    Between 1 (all images look alike) and the smaller of images and dimensions; nan where features are not
    finite.

    >>> round(rankme(torch.eye(4)), 3)
    4.0
    """
    if not torch.isfinite(features).all():
        return float("nan")
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most so many of them, evenly taken."""
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).round().astype(np.int64)]


def steps_between(options: Any, images: int) -> int:
    """Optimiser steps between two looks: ten looks a run, or every so many epochs."""
    if options.get("probe_every_epochs") in (None, "auto"):
        return max(int(options["steps"]) // PROBES_A_RUN, 1)
    return max(round(float(options["probe_every_epochs"]) * images / int(options["batch_size"])), 1)
