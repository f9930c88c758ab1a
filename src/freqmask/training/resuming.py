"""Going on after a checkpoint exactly where the training was."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor


class ExactResume(L.Callback):
    """Keeps what Lightning's checkpoints leave out: torch's generator (dropout, drop path) and the batches seen.

    Args:
        batches_a_step: parts that an optimiser step is made of now; it may differ from what it was.
    """

    def __init__(self, batches_a_step: int = 1) -> None:
        """Nothing is restored yet."""
        self.batches_a_step = batches_a_step
        self._random_state: Tensor | None = None
        self._gpu_random_state: Tensor | None = None

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state of the global generator, and of that of the GPU, where dropout draws."""
        checkpoint["random_state"] = torch.get_rng_state()
        if module.device.type == "cuda":
            checkpoint["gpu_random_state"] = torch.cuda.get_rng_state(module.device)

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the generator's state until the training starts: setting up draws numbers, too."""
        self._random_state = checkpoint.get("random_state")
        self._gpu_random_state = checkpoint.get("gpu_random_state")
        batches = int(checkpoint["global_step"]) * self.batches_a_step
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (
            progress["total"],
            progress["current"],
        ):  # the batch may be cut into other parts than before
            counts.update(ready=batches, started=batches, processed=batches, completed=batches - 1)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the generator after a restart, only now: the loader has drawn its seed for the first batch."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            if self._gpu_random_state is not None and module.device.type == "cuda":
                torch.cuda.set_rng_state(self._gpu_random_state, module.device)
            self._random_state = self._gpu_random_state = None
