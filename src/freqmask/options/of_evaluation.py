"""The options that the protocols of ``freqmask evaluate`` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from freqmask.options.declare import option
from freqmask.options.of_training import Computing, Records
from freqmask.options.option import Auto, Seed


@dataclass(frozen=True, kw_only=True)
class Parts:
    """How the images are parted."""

    train_split: str = option("auto", "the part of DATA that is learnt from; auto is train")
    test_split: str = option("auto", "the part that is judged on; auto is test, else val")
    test_share: float = option(
        0.2, "share of the images that we hold out where DATA has no test part", above=0, below=1
    )
    split_seed: Seed = option(0, "of the split that we draw; it is written to runs/splits and used again")
    pages: Literal["channels", "images"] = option("channels", "what the pages of a TIFF are")


@dataclass(frozen=True, kw_only=True)
class Labelled(Parts):
    """How the images are parted."""

    labels: str | None = option(
        None, "a CSV table with the columns path and label, and optionally split and group"
    )
    folds: int | None = option(
        None, "cross-validation with so many parts, where a test part would be too small", least=2
    )
    duplicates: Literal["refuse", "together"] = option(
        "refuse", "what a split of ours does about identical images: refuse, or keep them together"
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the network sees."""

    weights: str | None = option(None, "teacher or student of FOLK runs; the default is what the run exports")
    value_range: str | None = option(
        None, "the values that become 0 and 1 (dtype or LOW,HIGH); the default is each model's own"
    )


@dataclass(frozen=True, kw_only=True)
class Windows(Measured):
    """What the network sees."""

    image_size: int | None = option(
        None, "side in pixels that the networks see; the default is what each was trained at", least=1
    )
    crop: Literal["center", "whole"] = option(
        "center", "center takes the largest centred square, whole the whole picture, distorted to a square"
    )


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """Machine."""

    batch_size: int | Auto = option("auto", "images at once on a device", least=1)
    workers: int | Auto = option("auto", "processes that read images, of each device", least=0)
    accelerator: str = option("auto", "auto, cpu, cuda or mps")
    devices: int | Auto = option(
        "auto",
        "how many share the images, a process each; auto is all GPUs, else one. The numbers stay the same",
        least=1,
    )
    precision: Literal["32", "bf16"] = option(
        "32", "of the features: 32, or bf16, which is faster and rounds to three digits"
    )
    cache: bool = option(True, "keep features, so that the next evaluation need not compute them again")


@dataclass(frozen=True, kw_only=True)
class Trained(Records, Computing):
    """Records."""

    dry_run: bool = option(False, "print the plans and stop")
