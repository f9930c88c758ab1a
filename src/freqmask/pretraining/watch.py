"""What is measured while a run trains: the loss on held-out images, previews, and what its features are good for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Int64
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from freqmask.backbones import Backbone, recalibrate_batch_norm
from freqmask.data.loader import ChosenSampler, OrderedSampler, TrainDataset, calibration_images, make_loader
from freqmask.data.source import Source, spread
from freqmask.evaluation import knn, linear
from freqmask.evaluation.labelled import LabelledData
from freqmask.methods import build_method
from freqmask.pretraining.figures import draw_preview, filter_names
from freqmask.spectrum import Images, as_float
from freqmask.training.callbacks import Measurement
from freqmask.training.run_folder import RunFolder

PREVIEW_IMAGES = 4
FEATURES_AT_ONCE = 64 * 224**2  # pixels: without gradients even large networks have room for them
MOST_TRAIN, MOST_TEST, MOST_RANKED = 5000, 2000, 1000  # images of a probe: enough for a trend, cheap enough
NEIGHBORS = 20
FEWEST_LABELLED, LEAST_OF_A_CLASS = 100, 4  # images by whose own labels features are judged
PIXEL_SIDE = 32
_RATE, _EPOCHS = 0.3, 10  # less regularization than a sweep begins with: few labels, features of low rank

Encode = Callable[[Tensor], Tensor]


def whole_method(trainer: L.Trainer, module: Any) -> Any:
    """The method with all its weights; under sharding a copy on the CPU in the first process, in the others None.

    Every process has to call this.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return module.method
    state = trainer.strategy.lightning_module_state_dict()
    if not trainer.is_global_zero:
        return None
    method = build_method(module.method.name, **module.method.settings)
    method.load_state_dict({name.removeprefix("method."): value for name, value in state.items()})
    return method.train(module.method.training)


class HeldOut(Measurement):
    """The loss on held-out images, and a preview.

    Args:
        run: the run folder.
        held_out: the held-out images, seen whole and unflipped; None where there are too few.
        shown: the images of the preview, always the same, so that progress shows.
        common: as for :class:`Measurement`.
    """

    def __init__(
        self, run: RunFolder, held_out: TrainDataset | None, shown: TrainDataset, *common: Any
    ) -> None:
        super().__init__(*common)
        self.run, self.held_out, self.shown = run, held_out, shown
        self._pictures: tuple[Tensor, Tensor] | None = None

    def measure(self, trainer: L.Trainer, module: Any, step: int) -> dict[str, float]:
        """The held-out loss; draws ``previews/step-….png``."""
        method = whole_method(trainer, module)
        values = {} if self.held_out is None else self._loss(trainer, module, self.held_out)
        if trainer.is_global_zero:
            if self._pictures is None:
                images = as_float(first_batch(self.shown, PREVIEW_IMAGES)["views"][0])
                self._pictures = images, telling_keys(method, len(images))
            device = next(method.parameters()).device
            reconstruction = method.reconstruct(*(tensor.to(device) for tensor in self._pictures))
            draw_preview(self.run.previews / f"step-{step:06d}.png", reconstruction, f"step {step:,}")
        return values

    def _loss(self, trainer: L.Trainer, module: Any, images: TrainDataset) -> dict[str, float]:
        """The mean loss of an image, and relative to predicting zero where the method tells it; by all processes."""
        sampler = OrderedSampler(len(images), trainer.global_rank, trainer.world_size)
        sums: dict[str, Tensor] = {}
        for batch in make_loader(images, sampler, min(self.batch_size, len(sampler)), workers=0):
            views = [as_float(view).to(module.device) for view in batch["views"]]
            with trainer.precision_plugin.forward_context():
                parts = module.method(views, batch["keys"].to(module.device), details=True)
            for name in {"loss", "relative_loss"} & set(parts):  # the last batch may be a single image
                sums[name] = sums.get(name, 0) + len(views[0]) * parts[name].float()
        return {
            f"held_out_{name}": float(trainer.strategy.reduce(total / len(sampler), reduce_op="mean"))
            for name, total in sorted(sums.items())
        }


def telling_keys(method: Any, count: int) -> Tensor:
    """Keys under which the images of a preview get the method's filters in turn, rarely drawn ones less often."""
    names = filter_names(method, torch.arange(64 * count))
    kinds = sorted(set(names))
    chosen: list[int] = []
    for number in range(count):
        wanted = kinds[number % len(kinds)]
        unused = [key for key in range(len(names)) if key not in chosen]
        chosen.append(next((key for key in unused if names[key] == wanted), unused[0]))
    return torch.tensor(chosen)


def first_batch(images: TrainDataset, count: int) -> dict[str, Any]:
    """Some images of a dataset, spread evenly over it, as one batch."""
    places = spread(np.arange(len(images)), count).tolist()
    batch: dict[str, Any] = next(iter(make_loader(images, ChosenSampler(places), len(places), workers=0)))
    return batch


def calibration(images: TrainDataset, method: Any) -> Iterator[Tensor]:
    """Normalized, unfiltered batches for batch norm."""
    places = calibration_images(images.source)
    for batch in make_loader(images, ChosenSampler(places), min(64, len(places)), workers=0):
        yield method.normalise(as_float(batch["views"][0]).to(next(method.parameters()).device))


class Probe(Measurement):
    """What the features are good for: RankMe, and k-NN and a linear head on labelled images.

    Where none are given, but the images of RankMe have labels of their own, their features, which are there, tell k-NN.

    All of it is float32, whatever the training's precision: under bf16 autocast similarities have three digits, and
    k-NN fell from 89.3 to 58.7 % on the same features. Row 0 holds the weights that the run began with, and (with
    labels) raw pixels, so that what the training has changed can be told. It is written with the first row after it:
    a thousand images in the way of the first step were most of its wait.

    Args:
        ranked: images for RankMe.
        labelled: images with labels, seen whole and unflipped, and
        data: their labels and parts; None for RankMe alone.
        first: the backbone with the weights that the run began with; None where row 0 is written.
        common: as for :class:`Measurement`.
    """

    def __init__(
        self,
        ranked: TrainDataset,
        labelled: TrainDataset | None,
        data: LabelledData | None,
        first: Backbone | None,
        *common: Any,
    ) -> None:
        super().__init__(*common)
        self.ranked, self.labelled, self.data, self.first = ranked, labelled, data, first

    def measure(self, trainer: L.Trainer, module: Any, step: int) -> dict[str, float]:
        """Shares of correct classes, and an effective rank."""
        method = whole_method(trainer, module)
        if not trainer.is_global_zero:
            return {}
        if self.first is not None:
            began = self._values(self.first, method)
            if "probe_knn" in began:  # what any features have to beat
                pixels = self._by_labels(pixels_of, torch.device("cpu"))
                began |= {name.replace("probe", "pixels"): value for name, value in pixels.items()}
            self.monitor.record(0, began)
            self.first = None
        return self._values(copy.deepcopy(method.backbones()[method.default_backbone]), method)

    def _values(self, backbone: Backbone, method: Any) -> dict[str, float]:
        """The numbers of a backbone, which is turned to float32 and to evaluation."""
        device = next(method.parameters()).device
        backbone.to(device).float().eval()

        def encode(images: Tensor) -> Tensor:
            pooled: Tensor = backbone(method.normalise(images)).pooled
            return pooled

        with torch.autocast(device.type, enabled=False):
            some = self.ranked if self.labelled is None else self.labelled
            recalibrate_batch_norm(backbone, calibration(some, method))
            ranked = self._ranked(encode, device)
            return self._by_labels(encode, device, ranked) | {"rankme": rankme(ranked[0])}

    def _by_labels(
        self, encode: Encode, device: torch.device, ranked: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, float]:
        """k-NN and a linear head on the labelled images; else k-NN by the own labels of RankMe's."""
        if self.labelled is None or self.data is None:
            return by_own_labels(*(ranked or self._ranked(encode, device)))
        first = self.data.rounds[0]
        parts = (spread(first.train, MOST_TRAIN), spread(first.test, MOST_TEST))
        train, test = (self._features(encode, self.labelled, part, device)[0] for part in parts)
        labels = [torch.from_numpy(self.data.labels[part]) for part in parts]
        return probe(train, labels[0], test, labels[1], len(self.data.class_names))

    def _ranked(self, encode: Encode, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features and labels of RankMe's images."""
        return self._features(encode, self.ranked, _places(self.ranked), device)

    def _features(
        self, encode: Encode, images: TrainDataset, indices: np.ndarray, device: torch.device
    ) -> tuple[Float[Tensor, "image dim"], Int64[Tensor, " image"]]:
        """What ``encode`` makes of each image, on the CPU, and its label, -1 where it has none."""
        sampler, at_once = ChosenSampler(indices.tolist()), min(self.batch_size, len(indices))
        features, labels = [], []
        for batch in make_loader(images, sampler, at_once, workers=0):
            features.append(encode(as_float(batch["views"][0].to(device))).float().cpu())
            labels.append(batch["labels"])
        return torch.cat(features), torch.cat(labels)


def pixels_of(images: Images) -> Float[Tensor, "batch dim"]:
    """Raw pixels as features, centered, images made smaller where they have more than 32 a side."""
    sides = [min(PIXEL_SIDE, side) for side in images.shape[-2:]]
    small = torch.nn.functional.interpolate(images, size=sides, mode="bilinear", antialias=True)
    return small.flatten(1) - 0.5


def by_own_labels(features: Float[Tensor, "image dim"], labels: Int64[Tensor, " image"]) -> dict[str, float]:
    """Accuracy of k-NN (k = 20) in [0, 1], every second image of a class by the others and those by it.

    Nothing where labels do not tell, see :func:`telling`.
    """
    chosen = torch.from_numpy(telling(labels.numpy()))
    if not chosen.any():
        return {}
    classes = labels[chosen].unique(return_inverse=True)[1]
    order = classes.argsort(stable=True)  # both halves then have images of every class
    features, classes = features[chosen][order], classes[order]
    if not torch.isfinite(features).all():
        return {"probe_knn": float("nan")}
    right = 0.0
    for part in (0, 1):
        bank, known = features[1 - part :: 2], classes[1 - part :: 2]
        k = min(NEIGHBORS, len(bank))
        voted = knn.predict(features[part::2], bank, known, int(classes.max()) + 1, [k])[k]
        right += float((voted == classes[part::2]).sum())
    return {"probe_knn": right / len(classes)}


def own_labels(images: Source) -> int:
    """How many of RankMe's images have labels of their own that features can be judged by."""
    labels = (images.label(int(place)) for place in _places(images))
    return int(telling(np.array([-1 if label is None else label for label in labels], np.int64)).sum())


def telling(labels: np.ndarray) -> np.ndarray:
    """Which labels (-1: none) features can be judged by: of classes of four images and more, if there are enough."""
    _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    chosen: np.ndarray = (labels >= 0) & (counts[places] >= LEAST_OF_A_CLASS)
    enough = chosen.sum() >= FEWEST_LABELLED and len(np.unique(labels[chosen])) > 1
    return chosen if enough else np.zeros_like(chosen)


def _places(images: Source | TrainDataset) -> np.ndarray:
    """Which images RankMe is of."""
    return spread(np.arange(len(images)), MOST_RANKED)


def probe(
    train: Float[Tensor, "image dim"],
    train_labels: Tensor,
    test: Float[Tensor, "query dim"],
    test_labels: Tensor,
    classes: int,
) -> dict[str, float]:
    """Accuracy on the test features of k-NN (k = 20) and of one small linear head, in [0, 1]."""
    if not (torch.isfinite(train).all() and torch.isfinite(test).all()):
        return {"probe_knn": float("nan"), "probe_linear": float("nan")}
    k = min(NEIGHBORS, len(train))
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
