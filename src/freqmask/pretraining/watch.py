"""What is measured while a run trains: the loss on held-out images, previews, and what its features are good for."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from freqmask.backbones import eval_no_grad, recalibrate_batch_norm
from freqmask.data.loader import TrainDataset, make_loader
from freqmask.data.sampler import ChosenSampler, OrderedSampler
from freqmask.evaluation import knn, linear
from freqmask.evaluation.labelled import LabelledData
from freqmask.images import as_float
from freqmask.pretraining.figures import draw_preview, filter_names
from freqmask.pretraining.pretraining_module import PretrainingModule, whole_method
from freqmask.training.monitor import Monitor, PeriodicCallback
from freqmask.training.run_folder import RunFolder

PREVIEW_IMAGES = 4
CALIBRATION_IMAGES = 256


class HeldOut(PeriodicCallback):
    """Every so often, and at the end: the loss on held-out images, and a preview.

    Args:
        run: the run folder.
        monitor: takes the loss into the metrics.
        held_out: the held-out images, seen whole and unflipped; None where there are too few.
        shown: the images of the preview, always the same ones, so that progress shows.
        every_steps: optimiser steps between two looks; 0 looks at the end only.
        batch_size: images at once.
    """

    def __init__(
        self,
        run: RunFolder,
        monitor: Monitor,
        held_out: TrainDataset | None,
        shown: TrainDataset,
        every_steps: int,
        batch_size: int,
    ) -> None:
        super().__init__(every_steps)
        self.run = run
        self.monitor = monitor
        self.held_out = held_out
        self.shown = shown
        self.batch_size = batch_size
        self.preview: str | None = None
        self._pictures: tuple[Tensor, Tensor] | None = None

    def look(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        """Measure the held-out loss and draw the preview of this step."""
        assert isinstance(module, PretrainingModule)
        began = time.perf_counter()
        # a loader draws its seed from torch's generator, which belongs to the training
        with (
            torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else []),
            eval_no_grad(module),
        ):
            if self.held_out is not None:
                loss = self.loss(trainer, module, self.held_out)
                if trainer.is_global_zero:
                    self.monitor.record(step, loss)
            method = whole_method(trainer, module)
            if trainer.is_global_zero:
                self.draw(method, step)
        self.monitor.pause(time.perf_counter() - began)

    def loss(self, trainer: L.Trainer, module: PretrainingModule, images: TrainDataset) -> dict[str, float]:
        """The loss on held-out images, relative to that of predicting zero where the method tells it."""
        sampler = OrderedSampler(len(images), trainer.global_rank, trainer.world_size)
        sums: dict[str, Tensor] = {}
        batches = 0
        for batch in make_loader(images, sampler, min(self.batch_size, len(sampler)), workers=0):
            views = [as_float(view).to(module.device) for view in batch["views"]]
            with trainer.precision_plugin.forward_context():
                parts = module.method(views, batch["keys"].to(module.device), details=True)
            for name in ("loss", "relative_loss"):
                if name in parts:
                    sums[name] = sums.get(name, torch.zeros((), device=module.device)) + parts[name].float()
            batches += 1
        means = {
            name: trainer.strategy.reduce(value / batches, reduce_op="mean") for name, value in sums.items()
        }
        return {f"held_out_{name}": float(value) for name, value in means.items()}

    def draw(self, method: Any, step: int) -> None:
        """Draw ``previews/step-….png``."""
        images, keys = self.pictures(method)
        device = next(method.parameters()).device
        reconstruction = method.reconstruct(images.to(device), keys.to(device))
        path = self.run.previews / f"step-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_preview(path, reconstruction, f"step {step:,}")
        self.preview = str(path)

    def pictures(self, method: Any) -> tuple[Tensor, Tensor]:
        """The images of the preview, (B, C, H, W) in [0, 1], and their keys."""
        if self._pictures is None:
            batch = first_batch(self.shown, PREVIEW_IMAGES)
            images = as_float(batch["views"][0])
            self._pictures = images, telling_keys(method, len(images))
        return self._pictures


def telling_keys(method: Any, count: int) -> Tensor:
    """Keys under which the images of a preview get the method's filters in turn, each as often as the others."""
    candidates = torch.arange(64 * count)
    names = filter_names(method, candidates)
    kinds = sorted(set(names))
    chosen: list[int] = []
    for number in range(count):
        wanted = kinds[number % len(kinds)]
        chosen.append(next(key for key, name in enumerate(names) if name == wanted and key not in chosen))
    return torch.tensor(chosen)


def first_batch(images: TrainDataset, count: int) -> dict[str, Any]:
    """Some images of a dataset, spread evenly over it, as one batch."""
    places = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().tolist()
    batch: dict[str, Any] = next(iter(make_loader(images, ChosenSampler(places), len(places), workers=0)))
    return batch


def calibration(images: TrainDataset, method: Any, batch_size: int = 64) -> Iterator[Tensor]:
    """Normalised, unfiltered batches for batch norm, from the first images of a dataset."""
    sampler = OrderedSampler(min(CALIBRATION_IMAGES, len(images)))
    for batch in make_loader(images, sampler, min(batch_size, len(sampler)), workers=0):
        yield method.normalise(as_float(batch["views"][0]).to(next(method.parameters()).device))


PROBES_A_RUN = 10
MOST_TRAIN, MOST_TEST, MOST_RANKED = 5000, 2000, 1000  # images of a look: enough for a trend, cheap enough
NEIGHBOURS = 20
ENOUGH_RANKED = 256  # held-out images; where there are fewer, RankMe is of training images
PIXEL_SIDE = 32
_RATE, _EPOCHS = 0.3, 10  # less regularisation than a sweep begins with: few labels, features of low rank

Encode = Callable[[Tensor], Tensor]


class Probe(PeriodicCallback):
    """Before the first step, every so often, and at the end, measures the features and writes them into the metrics.

    All of it is float32, whatever the training's precision: under bf16 autocast similarities have three digits, and
    k-NN fell from 89.3 to 58.7 % on the same features. Row 0 holds the weights that the run began with, and (with
    labels) raw pixels, so that what the training has changed can be told. Nothing of it reaches the training: modes
    are put back, and no generator is moved.

    Args:
        monitor: takes the numbers.
        every_steps: optimiser steps between two looks.
        ranked: images without labels for RankMe; None where there are none.
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
        super().__init__(every_steps)
        self.monitor = monitor
        self.ranked = ranked
        self.labelled = labelled
        self.data = data
        self.batch_size = batch_size

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Measure the weights that the run begins with."""
        if trainer.global_step == 0:
            self.look(trainer, module, 0)

    def look(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        """Measure, in the first process, to which the others lend their share of sharded weights."""
        assert isinstance(module, PretrainingModule)
        began = time.perf_counter()
        devices = [module.device] if module.device.type == "cuda" else []
        # A loader draws its seed from torch's generator, which belongs to the training.
        with (
            torch.random.fork_rng(devices=devices),
            eval_no_grad(module),
            torch.autocast(module.device.type, enabled=False),
        ):
            method = whole_method(trainer, module)
            values = self.measure(method) if trainer.is_global_zero else {}
            if trainer.is_global_zero and step == 0 and self.labelled is not None:
                values |= self.measure_pixels()
        if values and trainer.is_global_zero:
            self.monitor.record(step, values)
        self.monitor.pause(time.perf_counter() - began)

    def measure(self, method: Any) -> dict[str, float]:
        """The numbers by their names in the metrics: shares of right answers, and an effective rank."""
        values: dict[str, float] = {}
        backbone = copy.deepcopy(method.backbones()[method.default_backbone]).float().eval()
        some = self.labelled if self.labelled is not None else self.ranked
        if some is not None:
            recalibrate_batch_norm(backbone, calibration(some, method))
        if self.labelled is not None and self.data is not None:
            values |= self.measure_labelled(
                lambda images: backbone(method.normalise(images)).pooled, next(backbone.parameters()).device
            )
        if self.ranked is not None:
            images = spread(np.arange(len(self.ranked)), MOST_RANKED)
            device = next(backbone.parameters()).device
            values["rankme"] = rankme(
                self.features(lambda x: backbone(method.normalise(x)).pooled, self.ranked, images, device)
            )
        return values

    def measure_labelled(self, encode: Encode, device: torch.device) -> dict[str, float]:
        """k-NN and a linear head on what ``encode`` makes of the labelled images."""
        assert self.labelled is not None and self.data is not None
        one = self.data.rounds[0]
        train, test = spread(one.train, MOST_TRAIN), spread(one.test, MOST_TEST)
        features = [self.features(encode, self.labelled, part, device) for part in (train, test)]
        labels = [torch.from_numpy(self.data.labels[part]) for part in (train, test)]
        return probe(features[0], labels[0], features[1], labels[1], len(self.data.class_names))

    def measure_pixels(self) -> dict[str, float]:
        """The same on raw pixels, of at most 32 a side: what any features have to beat."""
        values = self.measure_labelled(pixels_of, torch.device("cpu"))
        return {name.replace("probe", "pixels"): value for name, value in values.items()}

    def features(
        self, encode: Encode, images: TrainDataset, indices: np.ndarray, device: torch.device
    ) -> Float[Tensor, "image dim"]:
        """What ``encode`` makes of each image, on the CPU."""
        items: Any = [(0, index, index) for index in indices.tolist()]
        batches = make_loader(images, items, min(self.batch_size, len(items)), workers=0)
        return torch.cat([encode(as_float(batch["views"][0].to(device))).float().cpu() for batch in batches])


def pixels_of(images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch dim"]:
    """Raw pixels as features, centered, images made smaller where they have more than 32 a side."""
    sides = [min(PIXEL_SIDE, side) for side in images.shape[-2:]]
    small = torch.nn.functional.interpolate(images, size=sides, mode="bilinear", antialias=True)
    return small.flatten(1) - 0.5


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
    # double: no autocast reaches it
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
