"""The options that every training shares: pre-training, fine-tuning, segmentation."""

from __future__ import annotations

from dataclasses import dataclass

from freqmask.options.declare import option
from freqmask.options.option import Auto


@dataclass(frozen=True, kw_only=True)
class Computing:
    """Machine."""

    workers: int | Auto = option(
        "auto", "processes that read images; 0 reads in the training process", least=0
    )
    accelerator: str = option("auto", "auto, cpu, cuda, mps")
    devices: int | Auto = option("auto", "how many train together, or auto for all", least=1)
    accumulate: int | Auto = option(
        "auto", "parts that a device's batch is cut into; auto finds what fits", least=1
    )


@dataclass(frozen=True, kw_only=True)
class Records:
    """Records."""

    checkpoint_every_minutes: float = option(10.0, "and by steps, whichever comes first", above=0)
    keep_checkpoints: int = option(2, "how many stay on the disk", least=1)
    max_skipped_share: float = option(
        0.1, "share of unreadable images at which a run stops, 0 to 1", least=0, most=1
    )
