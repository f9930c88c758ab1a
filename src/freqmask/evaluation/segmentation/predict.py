"""A trained network's answers to the test images, counted; a few of them kept to be looked at."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int16, Int64, Shaped
from torch import Tensor

from freqmask.console import readable_time, say
from freqmask.data.loader import make_loader
from freqmask.data.sampler import ChosenSampler, OrderedSampler
from freqmask.data.sources import Source
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import as_float
from freqmask.evaluation.protocol import say_skipped
from freqmask.evaluation.scores import image_margins
from freqmask.evaluation.segmentation.fit import pairs
from freqmask.evaluation.segmentation.labels import Labels
from freqmask.evaluation.segmentation.network import UperNet
from freqmask.evaluation.segmentation.settings import Training
from freqmask.evaluation.segmentation.windows import classes_at, segment_whole, segment_windows


@dataclass
class Shown:
    """One image to be looked at.

    Attributes:
        name: of the image.
        image: (channel, height, width) in [0, 1], as large as its mask.
        truth: classes, negative where a pixel does not count.
        predicted: name of a model -> classes.
    """

    name: str
    image: Float[np.ndarray, "channel height width"]
    truth: Int16[np.ndarray, "height width"]
    predicted: dict[str, Shaped[np.ndarray, "height width"]] = field(default_factory=dict)


class Predictor:
    """A network on a device.

    Args:
        network: trained.
        training: how it was.
        device: of torch.
        stride: from window to window in pixels.
        batch_size: windows at once.
    """

    def __init__(
        self, network: UperNet, training: Training, device: torch.device, stride: int, batch_size: int
    ) -> None:
        self.network = network.to(device).eval()
        self.training, self.device, self.stride, self.batch_size = training, device, stride, batch_size
        self.fill = torch.tensor(training.mean)

    def __call__(
        self, image: Shaped[Tensor, "channel height width"], size: tuple[int, int], inference: str
    ) -> tuple[Int64[np.ndarray, "mask_height mask_width"], bool]:
        """The class of every pixel of the mask, and whether all logits were finite.

        Args:
            image: uint8 or in [0, 1], at the size that the network is to see it.
            size: of the mask.
            inference: ``windows`` or ``whole``.
        """
        pixels = as_float(image.to(self.device))
        if inference == "whole":
            logits = segment_whole(self._logits, pixels)
        else:
            crop = self.training.crop
            logits = segment_windows(self._logits, pixels, crop, self.stride, self.batch_size, self.fill)
        return classes_at(logits, size).cpu().numpy(), bool(torch.isfinite(logits).all())

    def _logits(self, images: Tensor) -> Tensor:
        kind = torch.bfloat16 if "bf16" in self.training.precision else torch.float16
        with torch.autocast(self.device.type, kind, enabled="mixed" in self.training.precision):
            found: Tensor = self.network(images).decoder
        return found


@torch.inference_mode()
def predict(
    predictor: Predictor, source: Source, labels: Labels, inference: str, name: str
) -> tuple[Int64[np.ndarray, "image 3 classes"], Int64[np.ndarray, " image"], str]:
    """Segment every image and count.

    Args:
        predictor: the network.
        source: test images with masks.
        labels: the classes.
        inference: ``windows`` or ``whole``.
        name: of the model, for the lines printed.

    Returns:
        The margins of each image that could be read, the numbers of those images, and what is wrong, if anything.

    Raises:
        UserError: not one image can be read.
    """
    began = time.monotonic()
    dataset = pairs(source, labels, predictor.training, cut=False)
    counts, images, skipped, finite = [], [], {}, True
    loader = make_loader(dataset, OrderedSampler(len(source)), 1, predictor.training.workers)
    for asked, batch in enumerate(loader):
        skipped.update(batch["skipped"])
        if int(batch["indices"][0]) != asked:  # another image stands in for one that cannot be read
            continue
        image, truth = batch["views"][0][0], batch["views"][1][0].numpy()
        predicted, good = predictor(image, truth.shape, inference)
        counts.append(image_margins(truth, predicted, len(labels)))
        images.append(asked)
        finite = finite and good
    say_skipped(list(skipped.items()))
    if not images:
        raise UserError("not one of the test images can be read; check DATA")
    say(
        f"tested      {name}: {len(images):,} images in {readable_time(time.monotonic() - began)} ({inference})"
    )
    error = "" if finite else "the logits are not finite; no result"
    return np.stack(counts), np.array(images, np.int64), error


@torch.inference_mode()
def add_shown(
    shown: list[Shown],
    predictor: Predictor,
    source: Source,
    labels: Labels,
    inference: str,
    name: str,
    count: int,
) -> list[Shown]:
    """A model's answers to a few evenly spread images, beside those of other models.

    Args:
        shown: what other models said of the same images; empty for the first.
        predictor: the network.
        source: test images with masks.
        labels: the classes.
        inference: ``windows`` or ``whole``.
        name: of the model.
        count: of images.
    """
    places = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)).tolist()
    dataset = pairs(source, labels, predictor.training, cut=False)
    known = {one.name: one for one in shown}
    for place, batch in zip(places, make_loader(dataset, ChosenSampler(places), 1, 0), strict=True):
        if int(batch["indices"][0]) != place:
            continue
        image, truth = batch["views"][0][0], batch["views"][1][0].numpy()
        predicted, _ = predictor(image, truth.shape, inference)
        title = source.name(place)
        if title not in known:
            pixels = torch.nn.functional.interpolate(as_float(image)[None], size=truth.shape, mode="bilinear")
            known[title] = Shown(title, pixels[0].cpu().numpy(), truth)
        known[title].predicted[name] = predicted
    return list(known.values())
