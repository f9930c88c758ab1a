"""``freqmask embed`` and ``freqmask predict``: the features of images, their classes, their masks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from freqmask.commands.command import command, running_options
from freqmask.console import say, say_left_out
from freqmask.errors import UserError
from freqmask.imports import uncollected
from freqmask.interop.formats import check_model
from freqmask.options import Auto, Range
from freqmask.options.of_evaluation import Inference, Windows


@command(Windows, Inference)
def embed(
    model: str,
    data: list[str],
    *,
    out: str | None = None,
    neighbours: bool = False,
    patches: bool = False,
    blocks: list[int] | None = None,
    feature: Literal["auto", "mean", "class_token"] = "auto",
    pages: Literal["channels", "images"] = "channels",
    split: str = "all",
    labels: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Writes the features of images to a parquet or npy file; the same command resumes where it was cut short.

    A parquet file has the columns path, index, label, features and, if asked, patches (row by row) and
    block_N; a npy file one array, with path, index and label of each row in a csv file beside it.

    Args:
        model: a run folder, an exported folder, timm:NAME or random:NAME.
        data: folders of images, shards, tables or arrays, as for pretrain.
        out: a .parquet or .npy file; the default is embeddings.parquet, in the run folder if model is one.
        neighbours: also draw some images with their nearest neighbors, to see what the model finds alike.
        patches: also the features of every patch.
        blocks: also the mean feature of these blocks or stages, counted from 0.
        feature: what stands for an image; auto is what evaluate knn --features save kept with the model, else the
            mean of the map, and the class token for FOLK.
        pages: what the pages of a TIFF are.
        split: all, auto or the name of a split.
        labels: a CSV table with the columns path and label.
        overwrite: replace a file that holds something else.

    Returns:
        The file.

    Raises:
        UserError: the model or the data cannot be opened, or out cannot be written.
    """
    path = Path(out if out is not None else "embeddings.parquet").expanduser()
    if path.suffix not in (".parquet", ".npy"):
        raise UserError(
            f"out ({path}) must end in .parquet or .npy; try --out {path.with_suffix('.parquet')}"
        )
    if path.suffix == ".npy" and patches and blocks:
        raise UserError("a .npy holds one array: ask for patches or blocks, or --out FILE.parquet for both")
    check_model(model)
    with uncollected():
        from freqmask.commands.inference import (
            EmbedConfig,
            Embedding,
            checked_blocks,
            compute_parts,
            open_images,
            plan_parts,
        )
        from freqmask.evaluation.features import ComputeConfig, any_shown
        from freqmask.interop.feature_files import images_missing_in, join_parts, task_of
        from freqmask.interop.models import open_model
        from freqmask.training.files import check_kept, check_out

    opened = open_model(model, image_size=options["image_size"], weights=options["weights"])
    source = open_images(data, pages, split, labels)
    if out is None and opened.kind == "run" and opened.folder is not None:
        path = opened.folder.parent / path
    pooled, crop = _choose(opened, feature, options["crop"], options["value_range"])
    config = EmbedConfig(pooled, patches, checked_blocks(blocks, opened, path), crop, options["precision"])
    compute = ComputeConfig.of(running_options(), "embed")
    task = Embedding(opened, config)
    parts = plan_parts(task, source, path)
    before = task_of(path) or {}
    is_ours = before != {} and before.items() <= parts.task.items()  # earlier versions noted no mean and std
    if before == parts.task and not any_shown(task.dataset(source), images_missing_in(path, len(source))):
        say(f"embeddings  {path} is there already, of the same images, labels and weights")
    else:
        table = [path.with_suffix(".csv")] if path.suffix == ".npy" else []  # of the rows' names
        for file in (path, *table):
            check_kept(file, filter(None, [*data, labels]))
            if file is path or not parts.folder.exists():
                check_out(file, overwrite or is_ours, folder=False)
        compute_parts(task, source, parts, compute)
        rows, skipped = join_parts(parts, task.grid if patches else None)
        say(f"embeddings  {path}: {rows:,} of {len(source):,} images, {opened.name}")
        say_left_out(skipped)
    if neighbours:
        from freqmask.commands.sheets import draw_neighbors

        say(f"figure      {draw_neighbors(path, opened, source)}")
    return path


def _choose(opened: Any, feature: str, crop: Any, value_range: str | None) -> tuple[str, Any]:
    """What stands for an image and how it is cropped, every auto resolved and told."""
    from freqmask.data.values import ValueRange
    from freqmask.interop.exporters import pooled_of
    from freqmask.interop.feature_space import load_space

    if value_range is not None and (asked := ValueRange.parse(value_range)) is not None:
        opened.value_range = asked.describe()
    pooled = pooled_of(opened) if feature == "auto" else feature
    opened.space = load_space(opened) if feature == "auto" else None
    if opened.space is not None:
        pooled, kept = opened.space.digest, f"{opened.space.describe()}, as kept with {opened.name}"
        say(f"features    {kept}; --feature mean leaves them plain")
    if pooled == "class_token" and not opened.backbone.has_class_token:
        raise UserError(f"feature (class_token): {opened.name} has none; try --feature mean")
    is_native = opened.trained_crop == "native"
    if crop == "auto":
        crop = "native" if is_native else "center"
    if crop == "native" and is_native:
        say(
            "crop        native, as trained: the middle of an image at its own resolution; --crop center takes more"
        )
    return pooled, crop


@command()
def predict(
    model: str,
    data: list[str],
    *,
    out: str,
    crop: Literal["center", "whole"] = "center",
    inference: Literal["windows", "whole"] = "windows",
    pages: Literal["channels", "images"] = "channels",
    split: str = "all",
    batch_size: Annotated[int | Auto, Range(least=1)] = "auto",
    workers: Annotated[int | Auto, Range(least=0)] = "auto",
    accelerator: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Writes what a classifier or a segmentation network says of images: classes as CSV, masks as PNG.

    Classifiers are those that freqmask evaluate finetune left, exported folders with a head, and timm:NAME. A
    table has the columns path, class and probability, and of up to 50 classes the probability of each. A mask
    lies at the path of its image below DATA, is as large, and holds the labels of the training masks.

    Args:
        model: the run of a fine-tuning or of a segmentation, an exported folder with a head, or timm:NAME.
        data: folders of images, shards, tables or arrays, as for pretrain.
        out: a .csv file for classes, a folder for masks.
        crop: of a classifier: center takes the centered square, whole the whole image, distorted to a square.
        inference: of a segmentation network: overlapping windows as large as its training samples, or the
            whole image in one piece.
        pages: what the pages of a TIFF are.
        split: all, auto or the name of a split.
        batch_size: images, or windows, at once.
        workers: processes that read images.
        accelerator: auto, cpu, cuda or mps.
        overwrite: replace what is at out.

    Returns:
        The table, or the folder of masks.

    Raises:
        UserError: the model has no head, the data cannot be opened, or out cannot be written.
    """
    check_model(model)
    with uncollected():
        from freqmask.commands.inference import (
            Classification,
            open_images,
            open_segmenter,
            write_classes,
            write_masks,
        )
        from freqmask.evaluation.features import ComputeConfig
        from freqmask.interop.models import open_classifier
        from freqmask.training.files import check_kept, check_out

    segmenter = open_segmenter(model)
    classifier = None if segmenter is not None else open_classifier(model)
    if segmenter is None and classifier is None:
        raise UserError(
            f"model ({model}) has no head to predict with; freqmask evaluate finetune or segment trains one"
        )
    path = check_out(out, overwrite, folder=segmenter is not None)
    check_kept(path, [model, *data])
    if classifier is not None and path.suffix != ".csv":
        raise UserError(f"out ({out}) must end in .csv; try --out {path.with_suffix('.csv')}")
    source = open_images(data, pages, split)
    compute = ComputeConfig.of(running_options(), "predict")
    if segmenter is not None:
        written = write_masks(segmenter, source, path, inference, compute)
    else:
        assert classifier is not None  # or the model would have been refused
        written = write_classes(Classification(classifier, crop), source, path, compute)
    say(f"predicted   {path}: {written:,} of {len(source):,} images, {model}")
    return path
