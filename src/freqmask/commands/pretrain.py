"""``freqmask pretrain``: its signature is the parser, its docstring the help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from freqmask.commands.given import command, given_options
from freqmask.options import Auto, Rivals, Seed


@command
def pretrain(
    data: list[Any] | None = None,
    *,
    method: str | Any = "mfm",
    backbone: str = "auto",
    out: str | None = None,
    config: str | None = None,
    init: str | None = None,
    # images
    image_size: int | list[int] | str = "auto",
    channels: int | Auto = "auto",
    convert_channels: bool | Auto = "auto",
    value_range: str = "auto",
    mean: list[float] | Auto = "auto",
    std: list[float] | Auto = "auto",
    pages: Literal["channels", "images"] = "channels",
    split: str = "auto",
    max_skipped_share: float = 0.1,
    # views
    crop: Literal["resized", "native", "whole", "center"] = "resized",
    crop_scale: list[float] | Auto = "auto",
    flip: bool = True,
    vertical_flip: bool = False,
    quarter_turns: bool = False,
    colour_jitter: list[float] | None = None,
    grey: float | None = None,
    blur: list[float] | None = None,
    solarise: list[float] | None = None,
    # how long and how fast
    epochs: Annotated[float | None, Rivals("length")] = None,
    steps: Annotated[int | None, Rivals("length")] = None,
    hours: Annotated[float | None, Rivals("length")] = None,
    batch_size: int | Auto = "auto",
    lr: float | Auto = "auto",
    min_lr: float | Auto = "auto",
    warmup_epochs: float | Auto = "auto",
    weight_decay: float = 0.05,
    weight_decay_end: float | None = None,
    betas: list[float] | None = None,
    clip_grad: float | None = 3.0,
    # backbone
    patch_size: int | Auto = "auto",
    stage: int | None = None,
    model_args: dict[str, Any] | None = None,
    initialisation: str | None = None,
    gradient_checkpointing: bool | None = None,
    # what is hidden
    filter: str | Any | None = None,
    radius: float | Auto | None = None,
    low_pass_share: float | Auto | None = None,
    com_fractions: list[float] | None = None,
    com_share: float | None = None,
    magnitude: Literal["luma", "mean", "each"] | None = None,
    softness: float | None = None,
    clamp: bool | None = None,
    # loss
    masked_weight: float | None = None,
    kept_weight: float | None = None,
    reduce: Literal["batch", "image"] | None = None,
    gamma: float | None = None,
    focal: float | None = None,
    # FOLK
    views: Literal["two", "one"] | None = None,
    outputs: int | Auto | None = None,
    hidden_size: int | None = None,
    bottleneck_size: int | None = None,
    student_temperature: float | None = None,
    teacher_temperature: float | None = None,
    teacher_temperature_start: float | None = None,
    teacher_temperature_warmup: float | None = None,
    center_momentum: float | None = None,
    ema_momentum: float | None = None,
    distillation_weight: float | None = None,
    reconstruction_weight: float | None = None,
    freeze_last_layer_epochs: float | None = None,
    distil: Literal["auto", "class_token", "pooled"] | None = None,
    # restoration
    factor: float | Auto | None = None,
    sigma: float | Auto | None = None,
    kernel_sizes: list[int] | Auto | None = None,
    # machine
    seed: Seed = 0,
    workers: int | Auto = "auto",
    images_from: Literal["auto", "device", "loader"] = "auto",
    accelerator: str = "auto",
    devices: int | Auto = "auto",
    num_nodes: int = 1,
    strategy: str = "auto",
    precision: str = "auto",
    compile: bool = False,
    accumulate: int | Auto = "auto",
    # records
    checkpoint_every_steps: int | Auto = "auto",
    checkpoint_every_minutes: float = 10.0,
    keep_checkpoints: int = 2,
    preview_every_steps: int | Auto = "auto",
    log_every_steps: int | Auto = "auto",
    probe_data: list[str] | None = None,
    probe_every_epochs: float | Auto = "auto",
    logger: Literal["tensorboard", "wandb"] | None = None,
    dry_run: bool = False,
    overfit: int | None = None,
) -> Path:
    """Pre-train a backbone on images without labels.

    With no argument at all it trains a small ViT on photographs that come with scikit-image: three minutes
    on a laptop that show what the method does. Interrupted, it goes on where it was when you type the same
    command again.

    Args:
        data: what to learn from: folders, shards (of `freqmask prepare`, or any WebDataset tars) or
            parquet tables, each also behind s3://, gs://, https:// or hf://datasets/NAME; .npy or .npz arrays,
            hf:NAME, builtin:photos, builtin:digits, or an import path such as mylab.data:MySource. Several are joined.
        method: mfm, folk, sr, deblur, denoise, or the import path of a method of your own (in Python also the
            class).
        backbone: any timm model that yields a feature map; auto is a small ViT. `--channels`,
            `--image_size` and `--patch_size` are passed on to it.
        out: folder of the run; without it the newest unfinished run of the same options goes on, else
            runs/METHOD-BACKBONE-N is new.
        config: a YAML file of these options, or the name of a shipped recipe (`freqmask recipes`).
        init: weights to start from: timm:NAME (its public weights), a run folder, or an exported folder.
        image_size: side in pixels that the network sees, or HEIGHTxWIDTH; auto goes by the median image.
        channels: channels that the network sees; auto is the commonest count among the images.
        convert_channels: grey and color always become each other; true also drops the fourth of four bands, false
            skips such images; auto drops it where channels is given.
        value_range: auto, dtype, or LOW,HIGH: what becomes 0 and 1. auto is the full range for 8 bits,
            else the 0.1 and 99.9 percentiles of 1,000 images.
        mean: means that normalise the channels; auto is ImageNet's for 8-bit colour, else measured.
        std: standard deviations that normalise the channels; auto as for mean.
        pages: several pages in a TIFF are channels of one image, or images of their own.
        split: which part of DATA: auto takes train/ where there is val/ or test/ beside it; all; or a name.
        max_skipped_share: share of unreadable images at which the run stops, 0 to 1.
        crop: resized: a random part brought to the size; native: a random part of just that size, never
            resampled (microscopy); whole: the whole image resized; center: the largest centred part.
        crop_scale: smallest and largest share of the image's area in a resized crop. auto is 0.2 1 as
            published (FOLK: 0.25 1), or 0.5 1 below 160 pixels, where small crops empty the upper band.
        flip: mirror half of the views, left to right.
        vertical_flip: mirror half of the views top to bottom (views from above, microscopy).
        quarter_turns: turn the views by 0, 90, 180 or 270 degrees.
        colour_jitter: strengths of brightness, contrast, saturation, hue, and their probability. FOLK: 0.4 0.4 0.2
            0.1 0.8. The other methods use none unless asked.
        grey: probability of a grey view. FOLK: 0.2.
        blur: probability of blur, for each view. FOLK: 1.0 0.1 (off below 96 pixels).
        solarise: probability of solarisation, for each view. FOLK: 0 0.2 (off below 96 pixels).
        epochs: passes over the images; auto gives 300 as published, more for few images.
        steps: optimiser steps, instead of epochs.
        hours: time, instead of epochs; turned into steps once, by a measurement on this machine.
        batch_size: images per optimiser step over all devices and accumulation; auto is what memory holds and the
            images fill eight times, at most 256 (a GPU: 1,024); less, down to 64, where hours would hold fewer than
            5,000 steps.
        lr: peak learning rate; auto is 3e-4 x batch/512 as published, or 1e-3 x batch/256 for networks below
            8 million weights, which learn more with it; a quarter of that with init.
        min_lr: learning rate at the end; auto is 2.5e-6 x batch/512.
        warmup_epochs: epochs of linear warm-up; auto is a fifteenth of the training.
        weight_decay: AdamW's, on weights with two dimensions or more.
        weight_decay_end: where a cosine leads the weight decay (DINO: 0.4); by default it is constant.
        betas: AdamW's; 0.9 0.95 as published.
        clip_grad: largest gradient norm; null does not clip.
        patch_size: patch of a ViT in pixels; auto is the model's own, smaller for small images.
        stage: which stage's feature map is decoded; -1, the default, is the last.
        model_args: further arguments of the timm model, e.g. '{output_stride: 8}'.
        initialisation: mfm (the paper's, for a ViT), which is the default, or timm (the library's).
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        filter: fixed (low- and high-pass), com (Com and RCom), a filter with arguments such as
            'bandstop(low=8, high=24)', or an import path (in Python also the object). MFM's default is
            fixed, FOLK's com.
        radius: of the fixed filters, in frequency bins; auto is 16 at 224 pixels, scaled with the side.
            Two radii are not an option here: name a bandpass or bandstop filter.
        low_pass_share: share of images that are low-passed; auto is 0.5 for a ViT, 0.3 for a CNN.
        com_fractions: shares of the frequencies that Com keeps, one drawn per image. 0.005 0.01 0.05.
        com_share: share of images under Com, the others under RCom. 0.5.
        magnitude: which magnitudes Com ranks: of the luma (the default; with other than three channels it is
            the mean), the channels' mean, or each channel apart.
        softness: width of a soft filter edge in frequency bins; 0, the default, is hard.
        clamp: cut the filtered image to [0, 1], as the papers do; true.
        masked_weight: weight of the hidden frequencies in the loss. 1.
        kept_weight: weight of the kept frequencies in the loss. 0.
        reduce: normalise the loss over the batch (as released, the default) or image by image.
        gamma: power of the spectral distance in the loss. 1.
        focal: strength of the focal weight; null is off.
        views: FOLK's two filtered views (the default), or one (half the passes).
        outputs: FOLK's prototypes; auto is 65,536, or 4,096 below 100,000 images.
        hidden_size: width of FOLK's projection head. 2,048.
        bottleneck_size: width of that head's bottleneck. 256.
        student_temperature: of the softmax of FOLK's student. 0.1.
        teacher_temperature: of the teacher's softmax after its warm-up. 0.07.
        teacher_temperature_start: of the teacher's softmax before its warm-up. 0.04.
        teacher_temperature_warmup: share of the training over which it rises. 0.1.
        center_momentum: how much of the teacher's centre a step keeps. 0.9.
        ema_momentum: of the teacher at the start; a cosine leads it to 1. 0.996.
        distillation_weight: weight of the distillation in FOLK's loss. 1.
        reconstruction_weight: weight of the reconstruction in FOLK's loss. 1.
        freeze_last_layer_epochs: epochs in which the head's last layer stands still. 1.
        distil: what FOLK distils; auto is the class token where there is one, else the pooled feature.
        factor: of super-resolution; auto is 8 at 224 pixels.
        sigma: of deblurring in pixels (auto: 5 at 224) or of the noise in [0, 1] units (75/255).
        kernel_sizes: of deblurring, odd; auto is 7 to 21 at 224 pixels.
        seed: decides everything that is drawn.
        workers: processes that read images; 0 reads in the training process.
        images_from: device: all images are decoded once, stay in the device's memory and are cropped, resampled
            and flipped there; loader: workers read them anew at every step. auto is device for images of up to
            160 pixels a side (64 on a CPU) that fit into a quarter of the free memory and are seen twice or more.
        accelerator: auto, cpu, cuda, mps.
        devices: how many, or auto for all.
        num_nodes: how many machines train together.
        strategy: Lightning's: auto, ddp, or fsdp for sharding.
        precision: auto, 32-true, bf16-mixed, 16-mixed.
        compile: compile the backbone with torch.compile.
        accumulate: parts that a device's batch is cut into; auto finds what fits.
        checkpoint_every_steps: auto is fifty times a run.
        checkpoint_every_minutes: whichever comes first.
        keep_checkpoints: how many stay on the disk.
        preview_every_steps: auto is ten times a run; 0 draws at the end only.
        log_every_steps: auto is a row about every five seconds.
        probe_data: images with labels (a folder a class, or as for `freqmask evaluate`) on which k-NN and a
            small linear head are measured while the training goes on; they are never learnt from.
        probe_every_epochs: how often, and how often the rank of held-out features is; auto is ten times a run.
        logger: also log to tensorboard or wandb (pip install 'freqmask[log]').
        dry_run: print the plan, draw plan.png, and stop.
        overfit: train on this many images only, and end in PASS or FAIL.

    Returns:
        The run folder.

    Raises:
        UserError: an option that cannot be, with the way out.
    """
    options = {name: value for name, value in locals().items() if name != "config"}
    from freqmask.pretraining.job import run_job

    return run_job(options, given_options())
