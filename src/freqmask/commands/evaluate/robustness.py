"""Robustness: corrupted images, adversarial ones, and test sets of other people's making."""

from __future__ import annotations

from typing import Any, Literal

from freqmask.commands.evaluate.reported import reported
from freqmask.commands.given import command
from freqmask.options import Auto, Seed, Seeds

__all__ = ["robustness"]


@command()
def robustness(
    model: list[str],
    *,
    data: list[str] | None = None,
    labels: str | None = None,
    train_split: str = "auto",
    test_split: str = "auto",
    test_share: float = 0.2,
    folds: int | None = None,
    split_seed: Seed = 0,
    duplicates: Literal["refuse", "together"] = "refuse",
    pages: Literal["channels", "images"] = "channels",
    head: Literal["linear", "own"] = "linear",
    corruptions: list[str] | None = None,
    severities: list[int] | None = None,
    constants: str = "auto",
    frost: str | None = None,
    attacks: list[str] | None = None,
    norm: Literal["linf", "l2"] = "linf",
    epsilon: float | str = "auto",
    steps: int = 10,
    step_size: float | str = "auto",
    random_start: bool = True,
    folder: list[str] | None = None,
    test_images: int | None = None,
    seeds: Seeds = None,
    weights: str | None = None,
    image_size: int | None = None,
    crop: Literal["center", "whole"] = "center",
    value_range: str | None = None,
    out: str | None = None,
    batch_size: int | Auto = "auto",
    workers: int | Auto = "auto",
    accelerator: str = "auto",
    devices: int | Auto = "auto",
    precision: Literal["32", "bf16"] = "32",
    cache: bool = True,
) -> list[Any]:
    """Measures classifiers on images made harder: common corruptions, adversarial attacks, ImageNet-C, -A, -R, -Sketch.

    The head learns from clean images; test images are corrupted (15 ways, 5 severities) or attacked (FGSM, PGD).
    For instance: freqmask evaluate robustness pixels random:RUN timm:vit_small_patch16_224 RUN --data DATA

    Args:
        model: run folders, exported folders, timm:NAME (public weights), random:NAME or random:RUN (fresh
            weights), pixels (the images themselves); with --head own classifiers; all in one table.
        data: images with labels: a folder with one folder a class (below train/ and val/ or test/, or not),
            a folder of train.parquet and test.parquet, an .npz, or any images with labels. It may be left
            out with --head own where --folder names what is tested on.
        labels: a CSV table with the columns path and label, and optionally split and group.
        train_split: the part of DATA that is learnt from; auto is train.
        test_split: the part that is judged on; auto is test, else val.
        test_share: share of the images that we hold out where DATA has no test part.
        folds: cross-validation with so many parts, where a test part would be too small.
        split_seed: of the split that we draw; it is written to runs/splits and used again.
        duplicates: what a split of ours does about identical images: refuse, or keep them together.
        pages: what the pages of a TIFF are.
        head: what classifies: a linear head on frozen features, learnt from clean images; or own, the model's
            own classifier (what finetune leaves behind, and timm:NAME on ImageNet's classes).
        corruptions: common (the 15), all (4 more), a family (noise blur weather digital extra), names, or none.
        severities: some of 1 2 3 4 5; all of them.
        constants: how strong they are: imagenet-c (made for 224 pixels), tiny-imagenet-c (64), cifar-10-c (32);
            auto takes those of the size nearest to the model's and scales lengths in pixels.
        frost: a folder of photographs of frost, which we cannot ship; without it frost is drawn.
        attacks: fgsm pgd, or none.
        norm: of the attacks' budget: linf, the largest change of a value, or l2, over the whole image.
        epsilon: the budget for images in [0, 1]; auto is 4/255 for linf, 1/2 for l2.
        steps: of PGD.
        step_size: of PGD, in the norm; auto is 2.5 epsilon over the steps, 1/255 for the defaults.
        random_start: whether PGD begins at a random point within the budget.
        folder: test sets on disk: an ImageNet-C tree (then corruptions are read, not made), or class folders
            such as ImageNet-A, -R, -Sketch, whose answers are restricted to the classes that they have.
        test_images: at most so many test images of DATA, evenly taken; the default is all.
        seeds: of the head and of random: weights; 0.
        weights: teacher or student of FOLK runs; the default is what the run exports.
        image_size: side in pixels that the networks see; the default is what each was trained at.
        crop: center takes the largest centred square, whole the whole picture, distorted to a square.
        value_range: the values that become 0 and 1 (dtype or LOW,HIGH); the default is each model's own.
        out: folder of results.csv and the pictures; the default is the model's run folder, or this one.
        batch_size: images at once on a device.
        workers: processes that read and corrupt images, of each device.
        accelerator: auto, cpu, cuda or mps.
        devices: how many share the images, a process each; auto is all GPUs, else one. The numbers stay the same.
        precision: of the features: 32, or bf16, which is faster and rounds to three digits; attacks always use 32.
        cache: keep features, so that the next evaluation need not compute them again.

    Returns:
        One `freqmask.evaluation.results.Summary` a model and variant: the numbers of the table.

    Raises:
        UserError: a model, the data or a folder cannot be opened, or an option does not fit.
    """
    options = locals()
    from pathlib import Path

    from freqmask.evaluation.attacks import make_attacks
    from freqmask.evaluation.corruptions import check_severities, choose_corruptions
    from freqmask.evaluation.protocol import run_protocol
    from freqmask.evaluation.robustness import Robustness

    protocol = Robustness(
        head=head,
        corruptions=choose_corruptions(corruptions or ["common"]),
        severities=check_severities(severities or [1, 2, 3, 4, 5]),
        attacks=make_attacks(attacks or ["fgsm", "pgd"], norm, epsilon, steps, step_size, random_start),
        folders=[Path(one) for one in ([folder] if isinstance(folder, str) else folder or [])],
        constants=constants,
        frost=frost,
        test_images=test_images,
    )
    return reported(model, run_protocol(protocol, {**options, "data": data or [], "seeds": seeds or [0]}))
