"""The options of ``freqmask evaluate``: what all protocols share, and those of the ones that train or attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from freqmask.options import REQUIRED, Auto, Seed, Seeds, option
from freqmask.options.of_training import Computing, Records


@dataclass(frozen=True, kw_only=True)
class Models:
    """Options."""

    model: list[str] = option(
        REQUIRED,
        "run folders, exported folders, timm:NAME (public weights), random:NAME or random:RUN (fresh weights), pixels "
        "(the images themselves, where nothing is trained); all in one table",
    )
    data: list[Any] = option(
        REQUIRED,
        "images with labels: a folder with one folder a class (below train/ and val/ or test/, or not), a folder of "
        "train.parquet and test.parquet, an .npz, or any images with labels",
    )
    out: str | None = option(
        None,
        "folder of results.csv, the figures and the runs of what is trained; the default is the model's run folder, "
        "or this one, and runs/PROTOCOL-... for the runs",
    )
    seeds: Seeds = option(
        None,
        "mean and standard deviation are over these; 0 1 2. They draw the weights of random:, the order of the images, "
        "those held out, and few labels, the same for every model",
    )
    config: str | None = option(
        None, "a YAML file of these options, such as a trained run's config.yaml, which repeats that run"
    )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """How the images are split."""

    train_split: str = option("auto", "the part of DATA that is trained on; auto is train")
    test_split: str = option("auto", "the part that is tested on; auto is test, else val")
    test_share: float = option(
        0.2, "share of the images that we hold out where DATA has no test part", above=0, below=1
    )
    split_seed: Seed = option(0, "of the split that we draw; it is written to runs/splits and used again")
    pages: Literal["channels", "images"] = option("channels", "what the pages of a TIFF are")


@dataclass(frozen=True, kw_only=True)
class Labelled(Parts):
    """How the images are split."""

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
class Weights:
    """What the networks see."""

    weights: str | None = option(None, "teacher or student of FOLK runs; the default is what the run exports")
    value_range: str | None = option(
        None, "the values that become 0 and 1 (dtype or LOW,HIGH); the default is each model's own"
    )


@dataclass(frozen=True, kw_only=True)
class Windows(Weights):
    """What the networks see."""

    image_size: int | None = option(
        None, "side in pixels that the networks see; the default is what each was trained at", least=1
    )
    crop: Literal["auto", "center", "whole", "native"] = option(
        "auto",
        "center takes the largest centered square, whole the whole image, distorted to a square, native the middle at "
        "its own resolution; auto is native for models trained with --crop native (finetune: center, too), else center",
    )


@dataclass(frozen=True, kw_only=True)
class Inference:
    """Machine."""

    batch_size: int | Auto = option("auto", "images at once on a device, of frozen features", least=1)
    workers: int | Auto = option("auto", "processes that read images, of each device", least=0)
    accelerator: str = option("auto", "auto, cpu, cuda or mps")
    devices: int | Auto = option(
        "auto",
        "how many share the images, a process each; auto is all GPUs, else one. The numbers stay the same",
        least=1,
    )
    precision: Literal["32", "bf16"] = option(
        "32",
        "of the features: 32, or bf16, which is faster on most GPUs and some CPUs and rounds to three digits",
    )


@dataclass(frozen=True, kw_only=True)
class Frozen(Inference):
    """Machine."""

    cache: bool = option(True, "keep features, so that the next evaluation need not compute them again")


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How it is trained."""

    recipe: Literal["auto", "vit", "a3", "a2"] = option(
        "auto",
        "vit (MFM's), a3 or a2 (ResNet strikes back, 100 and 300 epochs); auto is a3 for a CNN "
        "(not for fewer than 10,000 images), else vit",
    )
    epochs: float | None = option(
        None,
        "passes over the images; the default is the recipe's, 100 (a2: 300)",
        above=0,
        rivals="length",
    )
    steps: int | None = option(
        None,
        "optimizer steps, instead of epochs: the same number for every model",
        least=1,
        rivals="length",
    )
    batch_size: int | Auto = option(
        "auto",
        "images per optimizer step over all devices and accumulation; auto is what the images fill eight times, at "
        "most 256 (a GPU: 1,024)",
        least=1,
    )
    lr: float | Auto = option(
        "auto",
        "peak learning rate of the last layer; auto is 2e-3 x batch/512, or batch/128 for networks below 8 million "
        "weights, which learn more with it (a3: 8e-3 x sqrt(batch/2048), a2: 5e-3)",
        above=0,
    )
    min_lr: float | Auto = option(
        "auto", "learning rate at the end; auto is 2.5e-7 x batch/512 (a3, a2: 1e-6)", least=0
    )
    warmup_epochs: float | Auto = option(
        "auto", "of linear warm-up; auto is 5, and a twentieth of a training below 100 epochs", least=0
    )
    weight_decay: float | Auto = option(
        "auto", "on weights with two dimensions or more; auto is 0.05 (a3, a2: 0.02)", least=0
    )
    layer_decay: float | Auto = option(
        "auto",
        "factor on the learning rate from a layer to the one below; auto is 0.8 (a3, a2: 1)",
        above=0,
        most=1,
    )
    drop_path: float | Auto = option(
        "auto",
        "share of residual branches dropped in the last block; auto is 0.1 (a3: 0, a2: 0.05)",
        least=0,
        below=1,
    )
    mixup: float | Auto = option(
        "auto",
        "alpha, 0 for none; auto is 0.8 (a3, a2: 0.1), and 0 where fewer than 10,000 images are small or a CNN's",
        least=0,
    )
    cutmix: float | Auto = option("auto", "alpha, 0 for none; auto is 1, and 0 as for mixup", least=0)
    smoothing: float | Auto = option("auto", "of the labels; auto is 0.1 (a3, a2: 0)", least=0, below=1)
    augment: str = option(
        "auto",
        "RandAugment as timm writes it, or none; auto is rand-m9-mstd0.5-inc1 (a3: m6, a2: m7), m5 below 96 pixels, "
        "and none for images that are not 8-bit color",
    )
    erasing: float | Auto = option(
        "auto",
        "probability that a rectangle becomes noise; auto is 0.25 (a3, a2: 0), 0.1 below 96 pixels",
        least=0,
        below=1,
    )
    crop_scale: list[float] | None = option(
        None,
        "smallest and largest share of the area in a random crop; 0.08 1, or 0.5 1 below 96 pixels",
        length=2,
        above=0,
        most=1,
    )
    flip: bool | Auto = option(
        "auto",
        "mirror half of the images, left to right; auto does unless frozen features tell far fewer of the mirrored "
        "images' classes, as of digits",
    )
    train_size: int | Auto = option(
        "auto",
        "side in pixels of the training images; auto is that of the test (a3: 160 for 224)",
        least=1,
    )
    ema: float | None = option(
        None,
        "decay of a moving average of the weights, which is tested in their stead, such as 0.9998; none by default",
        above=0,
        below=1,
    )
    held_out: float | Auto = option(
        "auto",
        "share of the training images on which accuracy is watched; auto is a tenth, at most 2,000, none of fewer than "
        "2,000 images. Nothing is chosen by it, nor by the test images",
        least=0,
        below=1,
    )
    crop_share: float | Auto = option(
        "auto",
        "of its side that the centered square keeps; auto is 224/256 (a3, a2: 0.95), 1 below 96 pixels",
        above=0,
        most=1,
    )


@dataclass(frozen=True, kw_only=True)
class Trained(Records, Computing):
    """Records."""

    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = option(
        "auto", "of the computation; auto is bf16-mixed where the device computes it fast"
    )
    dry_run: bool = option(False, "print the plans and stop")


@dataclass(frozen=True, kw_only=True)
class FineTuned(Trained):
    """Records."""

    strategy: Literal["auto", "ddp"] = option("auto", "Lightning's: auto or ddp")
    validate_every_epochs: float | Auto = option(
        "auto", "how often held-out accuracy is measured; auto is twenty times a run", above=0
    )
    log_every_steps: int | Auto = option("auto", "auto is a row about every five seconds", least=1)
    checkpoint_every_steps: int | Auto = option("auto", "auto is twenty times a run", least=1)


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Images and masks."""

    images: str | None = option(None, "instead of data, a folder of images; its masks have the same names")
    masks: str | None = option(
        None, "that of their masks, with one class number a pixel: PNG, TIFF, BMP, GIF, PGM or .npy"
    )
    layout: Literal["auto", "plain", "ade20k"] = option(
        "auto",
        "ade20k ignores label 0 and begins the names with label 1; auto does so for annotations/training beside "
        "images/training, and only there",
    )
    class_names: list[str] | None = option(
        None,
        "names of the labels in order, or one file with a name, or a number and a name, a line; the default is "
        "classes.txt in DATA. Without names the labels of the training masks are the classes",
    )
    ignore_label: list[int] | None = option(
        None,
        "labels that count for nothing; the default is 255 and classes called void or unlabelled. -1 ignores none",
    )


@dataclass(frozen=True, kw_only=True)
class Segmenting:
    """How it is trained and tested."""

    image_size: int | None = option(
        None, "shorter side in pixels that every image is brought to first; the default is as it is", least=1
    )
    crop: int | Auto = option(
        "auto",
        "side in pixels of training samples and of test windows, a multiple of 32 does best; auto is 512 (on a CPU "
        "224), or less where the images are smaller",
        least=1,
    )
    scale: list[float] | None = option(
        None, "smallest and largest random factor on the image; 0.5 2", length=2, above=0
    )
    flip: bool = option(True, "mirror half of the samples, left to right")
    steps: int | None = option(
        None,
        "optimizer steps; the default is 127 epochs, as BEiT has on ADE20K, at most 160,000",
        least=1,
        rivals="length",
    )
    epochs: float | None = option(None, "passes over the images, instead of steps", above=0, rivals="length")
    batch_size: int | Auto = option(
        "auto", "samples per optimizer step over all devices and accumulation; 16", least=1
    )
    lr: float | Auto = option(
        "auto",
        "peak learning rate; auto is 7e-4 x batch/16 for a plain ViT, 1e-4 x batch/16 for others",
        above=0,
    )
    warmup_steps: int | Auto = option("auto", "auto is 1,500 of 160,000", least=0)
    weight_decay: float | Auto = option(
        "auto", "on weights with two dimensions or more; auto is 0.05", least=0
    )
    layer_decay: float | Auto = option(
        "auto",
        "factor on the learning rate from a layer of the backbone to the one below; auto is 0.65 for a plain ViT, 1 "
        "for others and for fresh weights",
        above=0,
        most=1,
    )
    drop_path: float | Auto = option(
        "auto",
        "share of residual branches dropped in the last block; auto is 0.1, where the family knows it",
        least=0,
        below=1,
    )
    decoder_channels: int | Auto = option(
        "auto",
        "width of the decoder; auto is that of the ViT, 512 for others. Fewer are faster",
        least=1,
    )
    inference: list[Literal["windows", "whole"]] | None = option(
        None,
        "windows (overlapping, of the crop's size, their logits averaged) or whole (the image in one piece), or both; "
        "windows. The first one stands in the overlays and in the table of classes",
    )
    stride: int | Auto = option(
        "auto", "from window to window in pixels; auto is two thirds of the crop", least=1
    )
    overlays: int = option(6, "test images in the figure of predictions; 0 draws none", least=0)


@dataclass(frozen=True, kw_only=True)
class HarderImages:
    """What is done to the test images."""

    corruptions: list[str] | None = option(
        None, "common (the 15), all (4 more), a family (noise blur weather digital extra), names, or none"
    )
    severities: list[int] | None = option(None, "some of 1 2 3 4 5; all of them", least=1, most=5)
    constants: Literal["auto", "imagenet-c", "tiny-imagenet-c", "cifar-10-c"] = option(
        "auto",
        "how strong they are: imagenet-c (made for 224 pixels), tiny-imagenet-c (64), cifar-10-c (32); auto takes "
        "those of the size nearest to the model's and scales lengths in pixels",
    )
    frost: str | None = option(
        None, "a folder of photographs of frost, which we cannot ship; without it frost is drawn"
    )
    attacks: list[str] | None = option(None, "fgsm pgd, or none")
    norm: Literal["linf", "l2"] = option(
        "linf", "of the attacks' budget: linf, the largest change of a value, or l2, over the whole image"
    )
    epsilon: float | str = option(
        "auto", "the budget for images in [0, 1]; auto is 4/255 for linf, 1/2 for l2"
    )
    steps: int = option(10, "of PGD", least=1)
    step_size: float | str = option(
        "auto",
        "of PGD, in the norm; auto is 2.5 epsilon over the steps, 1/255 for the defaults",
    )
    random_start: bool = option(True, "whether PGD begins at a random point within the budget")
    folder: list[str] | None = option(
        None,
        "test sets on disk: an ImageNet-C tree (then corruptions are read, not made), or class folders such as "
        "ImageNet-A, -R, -Sketch, whose answers are restricted to the classes that they have",
    )
    test_images: int | None = option(
        None, "at most so many test images of DATA, evenly taken; the default is all", least=1
    )
