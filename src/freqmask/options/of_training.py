"""The options that every training shares, and those of ``freqmask pretrain`` by group, but for its methods'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from freqmask.options import Auto, Seed, option


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


@dataclass(frozen=True, kw_only=True)
class First:
    """Options."""

    method: str | Any = option(
        "auto",
        "words, mfm, folk, distill, sr, deblur, denoise, or the import path of a method of your own (in Python also "
        "the class); auto is words, but distill with a teacher, and mfm where an option is given that words lacks",
    )
    backbone: str = option(
        "auto",
        "any timm model that yields a feature map; auto is a small ViT. `--channels`, `--image_size` and "
        "`--patch_size` are passed on to it",
    )
    image_size: int | list[int] | str = option(
        "auto", "input size in pixels: a side, or HEIGHTxWIDTH; auto goes by the median image"
    )
    hours: float | None = option(
        None,
        "time of the training and what is measured in it, instead of epochs; turned into steps once, by a "
        "measurement on this machine",
        above=0,
        rivals="length",
    )
    epochs: float | None = option(
        None,
        "passes over the images; auto gives 300 as published, more for few images",
        above=0,
        rivals="length",
    )
    steps: int | None = option(None, "optimizer steps, instead of epochs", least=1, rivals="length")
    batch_size: int | Auto = option(
        "auto",
        "images per optimizer step over all devices and accumulation; auto is what memory holds and the "
        "images fill eight times, at most 256 (a GPU: 1,024); less, down to 64, where hours would hold fewer "
        "than 5,000 steps",
        least=1,
    )
    lr: float | Auto = option(
        "auto",
        "peak learning rate; auto is 3e-4 x batch/512 as published, or for networks below 8 million weights, "
        "which learn more with it, 1e-3 x batch/256, words and distill 2e-3 x batch/128; a quarter of that with init",
        above=0,
    )
    init: str | None = option(
        None, "weights to start from: timm:NAME (its public weights), a run folder, or an exported folder"
    )
    out: str | None = option(
        None,
        "folder of the run; without it the newest unfinished run of the same options is resumed, else "
        "runs/METHOD-BACKBONE-N is new",
    )
    dry_run: bool = option(False, "print the plan, draw plan.png, and stop")


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images."""

    channels: int | Auto = option(
        "auto", "channels of the input; auto is the commonest count among the images", least=1
    )
    convert_channels: bool | Auto = option(
        "auto",
        "gray and color always become each other; true also drops the fourth of four bands, false skips such images; "
        "auto drops it where channels is given",
    )
    value_range: str = option(
        "auto",
        "auto, dtype, or LOW,HIGH: what becomes 0 and 1. auto is the full range for 8 bits, else the 0.1 and 99.9 "
        "percentiles of 1,000 images",
    )
    pages: Literal["channels", "images"] = option(
        "channels", "several pages in a TIFF are channels of one image, or images of their own"
    )
    split: str = option(
        "auto", "which part of DATA: auto takes train/ where there is val/ or test/ beside it; all; or a name"
    )


@dataclass(frozen=True, kw_only=True)
class Views:
    """Views of an image."""

    crop: Literal["resized", "native", "whole", "center"] = option(
        "resized",
        "resized: a random part brought to the size; native: a random part of just that size, never resampled "
        "(microscopy); whole: the whole image resized; center: the largest centered part",
    )
    crop_scale: list[float] | Auto = option(
        "auto",
        "smallest and largest share of the image's area in a resized crop. auto is 0.2 1 as published (FOLK: 0.25 1), "
        "or 0.5 1 below 160 pixels, where small crops empty the upper band",
        length=2,
        above=0,
        most=1,
    )
    flip: bool = option(True, "mirror half of the views, left to right")
    vertical_flip: bool = option(
        False, "mirror half of the views top to bottom (views from above, microscopy)"
    )
    quarter_turns: bool = option(False, "turn the views by 0, 90, 180 or 270 degrees")
    colour_jitter: list[float] | None = option(
        None,
        "strengths of brightness, contrast, saturation, hue, and their probability. FOLK: 0.4 0.4 0.2 0.1 0.8. The "
        "other methods use none unless asked",
        length=5,
        least=0,
    )
    grey: float | None = option(None, "probability of a gray view. FOLK: 0.2", least=0, most=1)
    blur: list[float] | None = option(
        None, "probability of blur, for each view. FOLK: 1.0 0.1 (off below 96 pixels)", least=0, most=1
    )
    solarise: list[float] | None = option(
        None, "probability of solarization, for each view. FOLK: 0 0.2 (off below 96 pixels)", least=0, most=1
    )


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Optimization."""

    min_lr: float | Auto = option("auto", "learning rate at the end; auto is 2.5e-6 x batch/512", least=0)
    warmup_epochs: float | Auto = option(
        "auto", "epochs of linear warm-up; auto is a fifteenth of the training", least=0
    )
    weight_decay: float = option(0.05, "AdamW's, on weights with two dimensions or more", least=0)
    weight_decay_end: float | None = option(
        None, "where a cosine leads the weight decay (DINO: 0.4); by default it is constant", least=0
    )
    betas: list[float] | None = option(None, "AdamW's; 0.9 0.95 as published", length=2, least=0, below=1)
    clip_grad: float | None = option(3.0, "largest gradient norm; null does not clip", above=0)


@dataclass(frozen=True, kw_only=True)
class Machine(Computing):
    """Machine."""

    seed: Seed = option(0, "decides everything that is drawn")
    images_from: Literal["auto", "device", "loader"] = option(
        "auto",
        "device: all images are decoded once, stay in the device's memory and are cropped, resampled and flipped "
        "there; loader: workers read them anew at every step. auto is device for images of up to 160 pixels a side "
        "that fit into a quarter of the free memory and are seen twice or more",
    )
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"] = option(
        "auto", "of the computation; auto is bf16-mixed where the device computes it fast"
    )
    num_nodes: int = option(1, "how many machines train together", least=1)
    strategy: Literal["auto", "ddp", "fsdp", "model_parallel"] = option(
        "auto", "Lightning's: auto, ddp, or fsdp for sharding"
    )
    compile: bool = option(False, "compile the backbone with torch.compile")


@dataclass(frozen=True, kw_only=True)
class RunRecords(Records):
    """Records."""

    log_every_steps: int | Auto = option("auto", "auto is a row about every five seconds", least=1)
    checkpoint_every_steps: int | Auto = option("auto", "auto is fifty times a run", least=1)
    preview_every_steps: int | Auto = option(
        "auto", "auto is ten times a run; 0 draws at the end only", least=0
    )
    probe_data: list[str] | None = option(
        None,
        "images with labels (a folder a class, or as for `freqmask evaluate`) on which k-NN and a small linear head "
        "are measured during the training; they are never trained on",
    )
    probe_every_epochs: float | Auto = option(
        "auto", "how often, and how often the features' rank is; auto is five times a run", above=0
    )
    logger: Literal["tensorboard", "wandb"] | None = option(
        None, "also log to tensorboard or wandb (pip install 'freqmask[log]')"
    )
    overfit: int | None = option(None, "train on this many images only, and end in PASS or FAIL", least=1)


GROUPS = (First, Images, Views, Optimization, Machine, RunRecords)  # beside those of the methods
