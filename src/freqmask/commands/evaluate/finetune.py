"""Fine-tuning: all weights of a backbone learn from labels."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from freqmask.commands.evaluate.reported import listed, reported
from freqmask.commands.given import command
from freqmask.options import Auto, Rivals, Seed, Seeds

__all__ = ["finetune"]


@command()
def finetune(
    model: list[str],
    *,
    data: list[str],
    labels: str | None = None,
    train_split: str = "auto",
    test_split: str = "auto",
    test_share: float = 0.2,
    folds: int | None = None,
    split_seed: Seed = 0,
    duplicates: Literal["refuse", "together"] = "refuse",
    pages: Literal["channels", "images"] = "channels",
    shots: str | None = None,
    # how it is trained
    recipe: Literal["auto", "vit", "a3", "a2"] = "auto",
    epochs: Annotated[float | None, Rivals("length")] = None,
    steps: Annotated[int | None, Rivals("length")] = None,
    batch_size: int | Auto = "auto",
    lr: float | Auto = "auto",
    min_lr: float | Auto = "auto",
    warmup_epochs: float | Auto = "auto",
    weight_decay: float | Auto = "auto",
    layer_decay: float | Auto = "auto",
    drop_path: float | Auto = "auto",
    mixup: float | Auto = "auto",
    cutmix: float | Auto = "auto",
    smoothing: float | Auto = "auto",
    augment: str = "auto",
    erasing: float | Auto = "auto",
    crop_scale: list[float] | None = None,
    flip: bool = True,
    train_size: int | Auto = "auto",
    ema: float | None = None,
    held_out: float | Auto = "auto",
    # how it is judged
    crop: Literal["center", "whole"] = "center",
    crop_share: float | Auto = "auto",
    seeds: Seeds = None,
    weights: str | None = None,
    image_size: int | None = None,
    value_range: str | None = None,
    out: str | None = None,
    # machine and records
    workers: int | Auto = "auto",
    accelerator: str = "auto",
    devices: int | Auto = "auto",
    strategy: str = "auto",
    precision: str = "auto",
    accumulate: int | Auto = "auto",
    max_skipped_share: float = 0.1,
    validate_every_epochs: float | Auto = "auto",
    log_every_steps: int | Auto = "auto",
    checkpoint_every_steps: int | Auto = "auto",
    checkpoint_every_minutes: float = 10.0,
    keep_checkpoints: int = 2,
    dry_run: bool = False,
    config: str | None = None,
) -> list[Any]:
    """Measures backbones after fine-tuning: all weights learn, with the published recipe.

    Every model and seed becomes a run folder with a classifier that timm loads; interrupted, the same command
    goes on. random: is the supervised baseline. For instance:
    freqmask evaluate finetune random:RUN timm:vit_small_patch16_224 RUN --data DATA

    Args:
        model: run folders, exported folders, timm:NAME (public weights), random:NAME or random:RUN (fresh
            weights); all in one table.
        data: images with labels: a folder with one folder a class (below train/ and val/ or test/, or not),
            a folder of train.parquet and test.parquet, an .npz, or any images with labels.
        labels: a CSV table with the columns path and label, and optionally split and group.
        train_split: the part of DATA that is learnt from; auto is train.
        test_split: the part that is judged on; auto is test, else val.
        test_share: share of the images that we hold out where DATA has no test part.
        folds: cross-validation with so many parts, where a test part would be too small.
        split_seed: of the split that we draw; it is written to runs/splits and used again.
        duplicates: what a split of ours does about identical images: refuse, or keep them together.
        pages: what the pages of a TIFF are.
        shots: learn from few labels: images a class (5), or a share of the training images (10%), the same ones
            for every model; the default is all.
        recipe: vit (MFM's), a3 or a2 (ResNet strikes back, 100 and 300 epochs); auto is a3 for a CNN, else vit.
        epochs: passes over the images; the default is the recipe's, 100 (a2: 300).
        steps: optimiser steps, instead of epochs: the same number for every model.
        batch_size: images per optimiser step over all devices and accumulation; auto is what the images fill
            eight times, at most 256 (a GPU: 1,024).
        lr: peak learning rate of the last layer; auto is 2e-3 x batch/512, or batch/128 for networks below 8 million
            weights, which learn more with it (a3: 8e-3 x sqrt(batch/2048), a2: 5e-3).
        min_lr: learning rate at the end; auto is 2.5e-7 x batch/512 (a3, a2: 1e-6).
        warmup_epochs: of linear warm-up; auto is 5, and a twentieth of a training below 100 epochs.
        weight_decay: on weights with two dimensions or more; auto is 0.05 (a3, a2: 0.02).
        layer_decay: factor on the learning rate from a layer to the one below; auto is 0.8 (a3, a2: 1).
        drop_path: share of residual branches dropped in the last block; auto is 0.1 (a3: 0, a2: 0.05).
        mixup: alpha, 0 for none; auto is 0.8 (a3, a2: 0.1), and 0 for fewer than 10,000 pictures below 96 pixels.
        cutmix: alpha, 0 for none; auto is 1, and 0 as for mixup.
        smoothing: of the labels; auto is 0.1 (a3, a2: 0).
        augment: RandAugment as timm writes it, or none; auto is rand-m9-mstd0.5-inc1 (a3: m6, a2: m7), m5 below
            96 pixels, and none for images that are not 8-bit colour.
        erasing: probability that a rectangle becomes noise; auto is 0.25 (a3, a2: 0), 0.1 below 96 pixels.
        crop_scale: smallest and largest share of the area in a random crop; 0.08 1, or 0.5 1 below 96 pixels.
        flip: mirror half of the pictures, left to right.
        train_size: side in pixels of the training pictures; auto is that of the test (a3: 160 for 224).
        ema: decay of a moving average of the weights, which is judged in their stead; none by default.
        held_out: share of the training images on which accuracy is watched; auto is a tenth, at most 2,000, none
            of fewer than 2,000 images. Nothing is chosen by it, nor by the test images.
        crop: center takes the largest centred square, whole the whole picture, distorted to a square.
        crop_share: of its side that the centred square keeps; auto is 224/256 (a3, a2: 0.95), 1 below 96 pixels.
        seeds: mean and standard deviation are over these; 0. They draw the head, the order, crops and mixing, the
            labels of shots, and the weights of random:.
        weights: teacher or student of FOLK runs; the default is what the run exports.
        image_size: side in pixels that the networks see; the default is what each was trained at.
        value_range: the values that become 0 and 1 (dtype or LOW,HIGH); the default is each model's own.
        out: folder of the runs, results.csv and the picture; the default is runs/finetune-..., and the rows go to
            the model's run folder, or this one.
        workers: processes that read images; 0 reads in the training process.
        accelerator: auto, cpu, cuda or mps.
        devices: how many train together, or auto for all.
        strategy: Lightning's: auto or ddp.
        precision: auto, 32-true, bf16-mixed, 16-mixed.
        accumulate: parts that a device's batch is cut into; auto finds what fits.
        max_skipped_share: share of unreadable images at which a run stops, 0 to 1.
        validate_every_epochs: how often held-out accuracy is measured; auto is twenty times a run.
        log_every_steps: auto is a row about every five seconds.
        checkpoint_every_steps: auto is twenty times a run.
        checkpoint_every_minutes: whichever comes first.
        keep_checkpoints: how many stay on the disk.
        dry_run: print the plans and stop.
        config: a YAML file of these options, such as a run's config.yaml, which repeats that run.

    Returns:
        One `freqmask.evaluation.results.Summary` a model: the numbers of the table.

    Raises:
        UserError: a model or the data cannot be opened, the labels do not fit, or an option cannot be.
    """
    options = listed({name: value for name, value in locals().items() if name != "config"})
    from freqmask.evaluation.finetune.job import Finetune
    from freqmask.evaluation.protocol import run_protocol

    return reported(model, run_protocol(Finetune(options), options))
