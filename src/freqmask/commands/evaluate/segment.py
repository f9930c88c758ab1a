"""Semantic segmentation: UperNet is trained on a backbone, and every pixel of the test images named."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from freqmask.commands.evaluate.reported import reported
from freqmask.commands.given import command
from freqmask.options import Auto, Rivals, Seed, Seeds

__all__ = ["segment"]


@command()
def segment(
    model: list[str],
    *,
    data: str | None = None,
    images: str | None = None,
    masks: str | None = None,
    layout: Literal["auto", "plain", "ade20k"] = "auto",
    class_names: list[str] | None = None,
    ignore_label: list[int] | None = None,
    train_split: str = "auto",
    test_split: str = "auto",
    test_share: float = 0.2,
    split_seed: Seed = 0,
    pages: Literal["channels", "images"] = "channels",
    # how it is trained
    image_size: int | None = None,
    crop: int | Auto = "auto",
    scale: list[float] | None = None,
    flip: bool = True,
    steps: Annotated[int | None, Rivals("length")] = None,
    epochs: Annotated[float | None, Rivals("length")] = None,
    batch_size: int | Auto = "auto",
    lr: float | Auto = "auto",
    warmup_steps: int | Auto = "auto",
    weight_decay: float | Auto = "auto",
    layer_decay: float | Auto = "auto",
    drop_path: float | Auto = "auto",
    decoder_channels: int | Auto = "auto",
    # how it is judged
    inference: list[str] | None = None,
    stride: int | Auto = "auto",
    overlays: int = 6,
    seeds: Seeds = None,
    weights: str | None = None,
    value_range: str | None = None,
    out: str | None = None,
    # machine and records
    workers: int | Auto = "auto",
    accelerator: str = "auto",
    devices: int | Auto = "auto",
    precision: str = "auto",
    accumulate: int | Auto = "auto",
    max_skipped_share: float = 0.1,
    checkpoint_every_minutes: float = 10.0,
    keep_checkpoints: int = 2,
    dry_run: bool = False,
    config: str | None = None,
) -> list[Any]:
    """Measures backbones by semantic segmentation: UperNet on top, all weights learn, mean IoU on test images.

    Every model and seed becomes a run folder; interrupted, the same command goes on, and finished networks are
    taken as they are. It needs pip install 'freqmask[seg]'. For instance:
    freqmask evaluate segment random:RUN timm:vit_small_patch16_224 RUN --data DATA

    Args:
        model: run folders, exported folders, timm:NAME (public weights), random:NAME or random:RUN (fresh
            weights); all in one table.
        data: a folder with images/train beside masks/train (annotations and labels will do for masks), or
            train/images beside train/masks, and the same for test or val; or images beside masks, which we part.
        images: instead of data, a folder of images; its masks have the same names.
        masks: that of their masks, with one class number a pixel: PNG, TIFF, BMP, GIF, PGM or .npy.
        layout: ade20k ignores label 0 and begins the names with label 1; auto does so for annotations/training
            beside images/training, and only there.
        class_names: names of the labels in order, or one file with a name, or a number and a name, a line; the
            default is classes.txt in DATA. Without names the labels of the training masks are the classes.
        ignore_label: labels that count for nothing; the default is 255 and classes called void or unlabelled.
            -1 ignores none.
        train_split: the part of DATA that is learnt from; auto is train.
        test_split: the part that is judged on; auto is test, else val.
        test_share: share of the images that we hold out where DATA has no parts.
        split_seed: of the split that we draw; it is written to runs/splits and used again.
        pages: what the pages of a TIFF are.
        image_size: shorter side in pixels that every image is brought to first; the default is as it is.
        crop: side in pixels of training samples and of test windows, a multiple of 32 does best; auto is 512 (on a
            CPU 224), or less where the images are smaller.
        scale: smallest and largest random factor on the image; 0.5 2.
        flip: mirror half of the samples, left to right.
        steps: optimiser steps; the default is 127 epochs, as BEiT has on ADE20K, at most 160,000.
        epochs: passes over the images, instead of steps.
        batch_size: samples per optimiser step over all devices and accumulation; 16.
        lr: peak learning rate; auto is 7e-4 x batch/16 for a plain ViT, 1e-4 x batch/16 for others.
        warmup_steps: auto is 1,500 of 160,000.
        weight_decay: on weights with two dimensions or more; auto is 0.05.
        layer_decay: factor on the learning rate from a layer of the backbone to the one below; auto is 0.65 for a
            plain ViT, 1 for others and for fresh weights.
        drop_path: share of residual branches dropped in the last block; auto is 0.1, where the family knows it.
        decoder_channels: width of the decoder; auto is that of the ViT, 512 for others. Fewer are faster.
        inference: windows (overlapping, of the crop's size, their logits averaged) or whole (the image in one
            piece), or both; windows. The first one stands in the overlays and in the table of classes.
        stride: from window to window in pixels; auto is two thirds of the crop.
        overlays: test images in the picture of predictions; 0 draws none.
        seeds: mean and standard deviation are over these; 0. They draw the decoder's weights, the order, crops, and
            the weights of random:.
        weights: teacher or student of FOLK runs; the default is what the run exports.
        value_range: the values that become 0 and 1 (dtype or LOW,HIGH); the default is each model's own.
        out: folder of the runs, results.csv and the pictures; the default is runs/segment-..., and the rows go to
            the model's run folder, or this one.
        workers: processes that read images; 0 reads in the training process.
        accelerator: auto, cpu, cuda or mps.
        devices: how many train together, or auto for all.
        precision: auto, 32-true, bf16-mixed, 16-mixed.
        accumulate: parts that a device's batch is cut into; auto finds what fits.
        max_skipped_share: share of unreadable images at which a run stops, 0 to 1.
        checkpoint_every_minutes: besides twenty times a training; whichever comes first.
        keep_checkpoints: how many stay on the disk while it trains; afterwards the network stays alone.
        dry_run: print the plans and stop.
        config: a YAML file of these options, such as a run's config.yaml, which repeats that run.

    Returns:
        One `freqmask.evaluation.results.Summary` a model: the numbers of the table.

    Raises:
        UserError: a model or the data cannot be opened, masks do not fit their images, or an option cannot be.
    """
    options = {name: value for name, value in locals().items() if name != "config"}
    from freqmask.evaluation.protocol import run_protocol
    from freqmask.evaluation.segmentation.job import Segment

    return reported(model, run_protocol(Segment(options), options))
