"""Accuracy on held-out training images while a classifier learns; nothing is chosen by it."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from freqmask.backbones import eval_no_grad
from freqmask.data.loader import TrainDataset, make_loader
from freqmask.data.sampler import OrderedSampler
from freqmask.training.monitor import Monitor, PeriodicCallback


class HeldOutAccuracy(PeriodicCallback):
    """Every so often, and at the end: how many held-out images the classifier gets right.

    Args:
        monitor: takes it into the metrics.
        images: the held-out images as a test sees them.
        every_steps: optimiser steps between two looks.
        batch_size: images at once.
    """

    def __init__(self, monitor: Monitor, images: TrainDataset, every_steps: int, batch_size: int) -> None:
        """Nothing is read before it is needed."""
        super().__init__(every_steps)
        self.monitor = monitor
        self.images = images
        self.batch_size = batch_size

    def look(self, trainer: L.Trainer, module: Any, step: int) -> None:
        """Measure and record the accuracy of this step."""
        began = time.perf_counter()
        devices = [module.device] if module.device.type == "cuda" else []
        # a loader draws its seed from torch's generator, which belongs to the training
        with torch.random.fork_rng(devices=devices), eval_no_grad(module):
            right, seen = self._count(trainer, module)
        if trainer.is_global_zero:
            self.monitor.record(step, {"held_out_accuracy": float(right / seen)})
        self.monitor.pause(time.perf_counter() - began)

    def _count(self, trainer: L.Trainer, module: Any) -> tuple[Tensor, Tensor]:
        """Right answers and images, over all processes."""
        sampler = OrderedSampler(len(self.images), trainer.global_rank, trainer.world_size)
        counts = torch.zeros(2, device=module.device)
        for batch in make_loader(self.images, sampler, min(self.batch_size, len(sampler)), workers=0):
            images = module.normalise(batch["views"][0].to(module.device))
            labels = batch["labels"].to(module.device)
            with trainer.precision_plugin.forward_context():
                answers = module.tested(images).argmax(dim=1)
            counts += torch.stack([(answers == labels).sum(), torch.ones_like(labels).sum()])
        counts = trainer.strategy.reduce(counts, reduce_op="sum") if trainer.world_size > 1 else counts
        return counts[0], counts[1]
