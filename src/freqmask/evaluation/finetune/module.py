"""The LightningModule: it wires a classifier to its recipe and knows nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
from timm.optim.lamb import Lamb
from torch import Tensor, nn

from freqmask.evaluation.finetune.augment import Mixer
from freqmask.evaluation.finetune.recipes import Tuning
from freqmask.images import as_float
from freqmask.rng import sample_key
from freqmask.training.loop import ScheduledModule
from freqmask.training.optim import OptimConfig, Schedule, update_ema

BETAS = (0.9, 0.999)
_PRESENT = 0.2  # a class that is that much of a mixed picture counts as there, as timm's RSB trainings do


class FinetuneModule(ScheduledModule):
    """Trains a classifier.

    Args:
        model: a timm classifier.
        tuning: every number.
        classes: of the data.
    """

    def __init__(self, model: nn.Module, tuning: Tuning, classes: int) -> None:
        """Wire the parts; the optimiser is made when Lightning asks for it."""
        super().__init__()
        self.model: Any = model
        self.average: Any = (
            copy.deepcopy(model).requires_grad_(False).eval() if tuning.ema is not None else None
        )
        self.tuning = tuning
        self.mixer = Mixer(classes, tuning.mixup, tuning.cutmix, tuning.smoothing, tuning.erasing)
        binary = tuning.loss == "binary"
        self.loss = BinaryCrossEntropy(target_threshold=_PRESENT) if binary else SoftTargetCrossEntropy()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(tuning.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(tuning.std)[:, None, None], persistent=False)

    @property
    def tested(self) -> Any:
        """The classifier that is judged: the moving average where there is one."""
        return self.model if self.average is None else self.average

    def normalise(self, view: Tensor) -> Tensor:
        """A view (B, C, H, W), uint8 or in [0, 1], as the classifier takes it."""
        return (as_float(view) - self.mean) / self.std

    def training_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """One part of an optimiser step."""
        with torch.no_grad():
            part = batch_index % self.tuning.accumulate
            key = sample_key(self.tuning.seed, self.step, self.trainer.global_rank, part)
            images, targets = self.mixer(self.normalise(batch["views"][0]), batch["labels"], key)
        loss = self.loss(self.model(images).float(), targets)
        self.check(loss)
        return {"loss": loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW or LAMB, the layers at learning rates of their own."""
        tuning = self.tuning
        groups = layer_groups(self.model, tuning.weight_decay, tuning.layer_decay)
        optimizer: torch.optim.Optimizer
        if tuning.optimizer == "lamb":
            optimizer = Lamb(groups, lr=tuning.lr, weight_decay=tuning.weight_decay)
        else:
            fused = self.device.type in ("cpu", "cuda")
            optimizer = torch.optim.AdamW(groups, lr=tuning.lr, betas=BETAS, fused=fused)
        self.schedule = Schedule(optimizer, recipe_of(tuning))
        return optimizer

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then let the moving average follow."""
        optimizer.step(closure=optimizer_closure)
        if self.average is None:
            return
        # young averages follow faster, or a short training would be judged by its beginning
        update_ema(
            self.average, self.model, min(float(self.tuning.ema or 0), (1 + self.step) / (10 + self.step))
        )
        for mine, its in zip(self.average.buffers(), self.model.buffers(), strict=True):
            mine.copy_(its)


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameters by layer, each with the factor on its learning rate (``lr_scale``) and its weight decay.

    Vectors, positions and tokens get no weight decay. The head's factor is 1, that of the layer below it
    ``layer_decay``, and so on down to the patch embedding.
    """
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    return list(
        param_groups_layer_decay(model, weight_decay, no_weight_decay_list=spared, layer_decay=layer_decay)
    )


def recipe_of(tuning: Tuning) -> OptimConfig:
    """The learning rate over the steps."""
    return OptimConfig(
        lr=tuning.lr,
        min_lr=tuning.min_lr,
        warmup_lr=tuning.warmup_lr,
        warmup_steps=tuning.warmup_steps,
        total_steps=tuning.steps,
        weight_decay=tuning.weight_decay,
        weight_decay_end=tuning.weight_decay,
        betas=BETAS,
        clip_grad=None,
    )
