"""The protocols that leave the backbone as it is: knn, linear, fewshot, bands."""

from __future__ import annotations

from typing import Any, Literal

from freqmask.commands.evaluate.reported import listed, reported
from freqmask.commands.given import command
from freqmask.options import Auto, Seed, Seeds

__all__ = ["bands", "fewshot", "knn", "linear"]


@command()
def knn(
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
    k: list[int] | None = None,
    temperature: float = 0.07,
    feature: Literal["mean", "class_token"] = "mean",
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
    """Measures backbones by their nearest neighbours: an image gets the class of the training images most like it.

    No training, so it is the fastest look; masked modelling scores lower here than in a linear probe. For
    instance: freqmask evaluate knn pixels random:RUN timm:vit_small_patch16_224 RUN --data DATA

    Args:
        model: run folders, exported folders, timm:NAME (public weights), random:NAME or random:RUN (fresh
            weights), pixels (the images themselves); all in one table.
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
        k: neighbours that vote; 10 20 100 200. Those above the training images are left out.
        temperature: of the votes, which weigh exp(similarity / temperature).
        feature: what stands for an image: the mean of the map, or the class token where there is one.
        seeds: mean and standard deviation are over these; 0 1 2. They draw the weights of random:.
        weights: teacher or student of FOLK runs; the default is what the run exports.
        image_size: side in pixels that the networks see; the default is what each was trained at.
        crop: center takes the largest centred square, whole the whole picture, distorted to a square.
        value_range: the values that become 0 and 1 (dtype or LOW,HIGH); the default is each model's own.
        out: folder of results.csv and the picture; the default is the model's run folder, or this one.
        batch_size: images at once on a device.
        workers: processes that read images, of each device.
        accelerator: auto, cpu, cuda or mps.
        devices: how many share the images, a process each; auto is all GPUs, else one. The numbers stay the same.
        precision: of the features: 32, or bf16, which is faster and rounds to three digits.
        cache: keep features, so that the next evaluation need not compute them again.

    Returns:
        One `freqmask.evaluation.results.Summary` a model and variant: the numbers of the table.

    Raises:
        UserError: a model or the data cannot be opened, or the labels do not fit.
    """
    options = locals()
    from freqmask.evaluation.knn import Knn
    from freqmask.evaluation.protocol import run_protocol

    return reported(model, run_protocol(Knn(k, temperature, feature), options))


@command()
def linear(
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
    rates: list[float] | None = None,
    epochs: float = 50,
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
    """Measures backbones by a linear head on frozen features.

    A sweep (learning rates, mean and class token, blocks at 1/2, 3/4 and the end) is trained in one pass; the
    head is chosen on held-out training images, never on the test images. For instance:
    freqmask evaluate linear pixels random:RUN timm:vit_small_patch16_224 RUN --data DATA

    Args:
        model: run folders, exported folders, timm:NAME (public weights), random:NAME or random:RUN (fresh
            weights), pixels (the images themselves); all in one table.
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
        rates: learning rates of the sweep, from strong regularisation to little; nine from 0.0001 to 100.
        epochs: passes over the training images; small sets get at least 1,000 steps.
        seeds: mean and standard deviation are over these; 0 1 2. They draw the order of the images, the
            held-out ones, and the weights of random:.
        weights: teacher or student of FOLK runs; the default is what the run exports.
        image_size: side in pixels that the networks see; the default is what each was trained at.
        crop: center takes the largest centred square, whole the whole picture, distorted to a square.
        value_range: the values that become 0 and 1 (dtype or LOW,HIGH); the default is each model's own.
        out: folder of results.csv and the picture; the default is the model's run folder, or this one.
        batch_size: images at once on a device.
        workers: processes that read images, of each device.
        accelerator: auto, cpu, cuda or mps.
        devices: how many share the images, a process each; auto is all GPUs, else one. The numbers stay the same.
        precision: of the features: 32, or bf16, which is faster and rounds to three digits.
        cache: keep features, so that the next evaluation need not compute them again.

    Returns:
        One `freqmask.evaluation.results.Summary` a model and variant: the numbers of the table.

    Raises:
        UserError: a model or the data cannot be opened, or the labels do not fit.
    """
    options = locals()
    from freqmask.evaluation.linear import Linear
    from freqmask.evaluation.protocol import run_protocol

    return reported(model, run_protocol(Linear(rates, epochs), options))


@command()
def fewshot(
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
    shots: list[str] | None = None,
    tune: Literal["frozen", "finetune", "both"] = "frozen",
    epochs: float | None = None,
    strength: float = 1.0,
    feature: Literal["mean", "class_token"] = "mean",
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
    """Measures backbones where labels are few.

    Logistic regression on the frozen features of a handful of images, or all weights fine-tuned on them with
    three published settings (learning rate 2e-3 with warm-up; 2e-4 without; 2e-4 for 100 epochs). For instance:
    freqmask evaluate fewshot pixels random:RUN timm:vit_small_patch16_224 RUN --data DATA

    Args:
        model: run folders, exported folders, timm:NAME (public weights), random:NAME or random:RUN (fresh
            weights), pixels (the images themselves); all in one table.
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
        shots: labels to learn from: images a class (5), or a share of the training images (10%); 1 5 10 1% 10%.
        tune: frozen features, all weights fine-tuned (finetune), or both beside each other.
        epochs: of fine-tuning in the first two settings; 50.
        strength: scikit-learn's C of the logistic regression.
        feature: what stands for an image: the mean of the map, or the class token where there is one.
        seeds: mean and standard deviation are over these; 0 1 2. They draw the labels, the same for every
            model, and the weights of random:.
        weights: teacher or student of FOLK runs; the default is what the run exports.
        image_size: side in pixels that the networks see; the default is what each was trained at.
        crop: center takes the largest centred square, whole the whole picture, distorted to a square.
        value_range: the values that become 0 and 1 (dtype or LOW,HIGH); the default is each model's own.
        out: folder of results.csv, the picture and the runs of fine-tuning; the default is the model's run folder,
            or this one, and runs/finetune-... for the runs.
        batch_size: images at once on a device, of frozen features.
        workers: processes that read images, of each device.
        accelerator: auto, cpu, cuda or mps.
        devices: how many share the images, a process each, or train together with --tune; auto is all GPUs, else
            one. The numbers of frozen features stay the same.
        precision: of the features: 32, or bf16, which is faster and rounds to three digits.
        cache: keep features, so that the next evaluation need not compute them again.

    Returns:
        One `freqmask.evaluation.results.Summary` a model and variant: the numbers of the table.

    Raises:
        UserError: a model or the data cannot be opened, or the labels do not fit.
    """
    options = locals()
    from freqmask.evaluation.protocol import run_protocol

    if tune != "frozen":
        from freqmask.evaluation.finetune.shots import TunedFewshot

        options = listed(options)
        return reported(model, run_protocol(TunedFewshot(options), options))
    if epochs is not None:
        from freqmask.errors import UserError

        raise UserError(
            f"epochs ({epochs:g}) are those of fine-tuning; leave them out, or give --tune finetune"
        )
    from freqmask.evaluation.fewshot import Fewshot

    return reported(model, run_protocol(Fewshot(shots, feature, strength), options))


@command()
def bands(
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
    head: Literal["linear", "knn", "own"] = "linear",
    radii: list[float] | None = None,
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
    """Shows which frequencies a model uses: its accuracy on low-, high- and band-passed test images.

    The head learns from whole images; only the test images are filtered. For instance:
    freqmask evaluate bands pixels random:RUN timm:vit_small_patch16_224 RUN --data DATA

    Args:
        model: run folders, exported folders, timm:NAME (public weights), random:NAME or random:RUN (fresh
            weights), pixels (the images themselves); all in one table.
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
        head: what classifies: a linear or k-NN head on frozen features, learnt from whole images; or own, the
            model's own classifier (exported classifiers, and timm:NAME on ImageNet's classes).
        radii: in frequency bins; the default are seven from an eighth of the highest frequency to all of it.
        seeds: of the head and of random: weights; 0.
        weights: teacher or student of FOLK runs; the default is what the run exports.
        image_size: side in pixels that the networks see; the default is what each was trained at.
        crop: center takes the largest centred square, whole the whole picture, distorted to a square.
        value_range: the values that become 0 and 1 (dtype or LOW,HIGH); the default is each model's own.
        out: folder of results.csv and the picture; the default is the model's run folder, or this one.
        batch_size: images at once on a device.
        workers: processes that read images, of each device.
        accelerator: auto, cpu, cuda or mps.
        devices: how many share the images, a process each; auto is all GPUs, else one. The numbers stay the same.
        precision: of the features: 32, or bf16, which is faster and rounds to three digits.
        cache: keep features, so that the next evaluation need not compute them again.

    Returns:
        One `freqmask.evaluation.results.Summary` a model and variant: the numbers of the table.

    Raises:
        UserError: a model or the data cannot be opened, or the labels do not fit.
    """
    options = locals()
    from freqmask.evaluation.bands import Bands
    from freqmask.evaluation.protocol import run_protocol

    return reported(model, run_protocol(Bands(head, radii), {**options, "seeds": seeds or [0]}))
