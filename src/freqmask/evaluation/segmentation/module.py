"""The LightningModule: it wires a segmentation network to its recipe and knows nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from freqmask.evaluation.finetune.module import layer_groups
from freqmask.evaluation.segmentation.settings import Training
from freqmask.evaluation.segmentation.upernet import UperNet, segmentation_losses
from freqmask.images import as_float
from freqmask.training.loop import ScheduledModule
from freqmask.training.optim import OptimConfig, Schedule, parameter_groups

BETAS = (0.9, 0.999)


class SegmentationModule(ScheduledModule):
    """Trains a network.

    Args:
        network: backbone and decoder.
        training: every number.
    """

    def __init__(self, network: UperNet, training: Training) -> None:
        """Wire the parts; the optimiser is made when Lightning asks for it."""
        super().__init__()
        self.network = network
        self.training_numbers = training

    def training_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """One part of an optimiser step: the losses of both heads."""
        images, masks = batch["views"]
        losses = segmentation_losses(self.network(as_float(images)), masks.long())
        self.check(losses["loss"])
        return losses

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW: the backbone's layers at learning rates of their own, all that is new at the whole one."""
        numbers = self.training_numbers
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(
            groups_of(self.network, numbers), lr=numbers.lr, betas=BETAS, fused=fused
        )
        self.schedule = Schedule(optimizer, recipe_of(numbers))
        return optimizer


def groups_of(network: UperNet, training: Training) -> list[dict[str, Any]]:
    """The backbone's parameters by layer, those of the decoder and the heads with the factor 1.

    timm gives a backbone without a head the factor 1 at its last block; here the decoder stands above it.
    """
    decay = training.layer_decay
    backbone = network.pyramid.backbone.timm_model
    new = nn.ModuleList([network.pyramid.rescale, network.decoder, network.classifier, network.auxiliary])
    fresh = [{**group, "lr_scale": 1.0} for group in parameter_groups(new, training.weight_decay)]
    old = layer_groups(backbone, training.weight_decay, decay)
    return [*({**group, "lr_scale": decay * group["lr_scale"]} for group in old), *fresh]


def recipe_of(training: Training) -> OptimConfig:
    """Linear warm-up, then linear decay to nothing (poly of power 1)."""
    return OptimConfig(
        lr=training.lr,
        min_lr=0.0,
        warmup_lr=training.lr * 1e-6,
        warmup_steps=training.warmup_steps,
        total_steps=training.steps,
        weight_decay=training.weight_decay,
        weight_decay_end=training.weight_decay,
        betas=BETAS,
        clip_grad=None,
        power=1.0,
    )
