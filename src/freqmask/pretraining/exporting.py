"""The backbone of a run, written for others at every checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from freqmask.backbones import recalibrate_batch_norm
from freqmask.interop.timm_folder import trained_feature, write_timm_folder
from freqmask.pretraining.sharding import whole_method
from freqmask.training.run_folder import RunFolder


class BackboneExport:
    """Refreshes ``backbone/`` of a run.

    Args:
        run: the run folder.
        calibration: gives normalised, unfiltered batches (B, C, H, W) on the CPU for batch norm.
        settings: what :func:`write_timm_folder` needs beside the model and the step.
    """

    def __init__(
        self, run: RunFolder, calibration: Callable[[], Iterable[Tensor]], settings: dict[str, Any]
    ) -> None:
        """Nothing is written before it is called."""
        self.run = run
        self.calibration = calibration
        self.settings = settings

    def __call__(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        """Every process lends its part of the weights, the first one writes."""
        method = whole_method(trainer, module)
        if trainer.is_global_zero:
            self.write(method, step)

    def write(self, method: Any, step: int) -> None:
        """Export what the method exports by default, its batch norm recalibrated on unfiltered images."""
        backbone = copy.deepcopy(method.backbones()[method.default_backbone])
        device = next(backbone.parameters()).device
        # a loader draws its seed from torch's generator, whose state the checkpoint holds already
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            recalibrate_batch_norm(backbone, (batch.to(device) for batch in self.calibration()))
        height, width = backbone.padded_size if backbone.fixed_size else backbone.image_size
        settings = {**self.settings, "input_size": (backbone.channels, height, width)}
        facts = {**settings.pop("facts"), "step": step, "weights": method.default_backbone}
        pooled = trained_feature(method, backbone)
        write_timm_folder(backbone.timm_model, self.run.backbone, facts=facts, pooled=pooled, **settings)
