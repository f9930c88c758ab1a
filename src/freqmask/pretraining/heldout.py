"""Looks at images that are not trained on: the held-out loss and the preview picture."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from freqmask.backbones import eval_no_grad
from freqmask.data.loader import TrainDataset, make_loader
from freqmask.data.sampler import ChosenSampler, OrderedSampler
from freqmask.images import as_float
from freqmask.pretraining.module import PretrainingModule
from freqmask.pretraining.preview import draw_preview, filter_names
from freqmask.pretraining.sharding import whole_method
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
        """Nothing is read before it is needed."""
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
        """The loss on held-out images, over that of predicting nothing where the method tells it."""
        sampler = OrderedSampler(len(images), trainer.global_rank, trainer.world_size)
        sums: dict[str, Tensor] = {}
        batches = 0
        for batch in make_loader(images, sampler, min(self.batch_size, len(sampler)), workers=0):
            views = [as_float(view).to(module.device) for view in batch["views"]]
            with trainer.precision_plugin.forward_context():
                parts = module.method(views, batch["keys"].to(module.device), details=True)
            for name in ("loss", "loss_over_zero"):
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
