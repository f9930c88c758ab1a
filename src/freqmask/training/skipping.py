"""Images that cannot be read: listed once each, and too many of them stop the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from freqmask.errors import UserError
from freqmask.training.tables import append_row, read_rows


class Skipped(L.Callback):
    """Writes skipped.csv and watches its length.

    Args:
        path: the table.
        images: images that are trained on.
        max_share: share of them at which the run stops.
    """

    def __init__(self, path: Path, images: int, max_share: float) -> None:
        """Take up the table where an earlier start left it."""
        self.path = path
        self.images = images
        self.max_share = max_share
        self.known = {row["name"] for row in read_rows(path)}

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """List what the loader passed over in this batch."""
        for name, reason in batch["skipped"]:
            if name not in self.known:
                self.known.add(name)
                if trainer.is_global_zero:
                    append_row(self.path, {"name": name, "reason": reason})
        if len(self.known) > self.max_share * self.images:
            raise UserError(
                f"{len(self.known):,} of {self.images:,} images cannot be read, more than max_skipped_share "
                f"({self.max_share:g}); {self.path} lists them with reasons"
            )
