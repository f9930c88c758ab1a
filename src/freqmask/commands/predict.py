"""``freqmask predict``: what a fine-tuned classifier or a segmentation network says of images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from freqmask.commands.given import command
from freqmask.console import say
from freqmask.errors import UserError
from freqmask.options import Auto


@command(imports="freqmask.commands.prediction")
def predict(
    model: str,
    data: list[str],
    *,
    out: str,
    crop: Literal["center", "whole"] = "center",
    inference: Literal["windows", "whole"] = "windows",
    pages: Literal["channels", "images"] = "channels",
    split: str = "all",
    batch_size: int | Auto = "auto",
    workers: int | Auto = "auto",
    accelerator: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Writes what a classifier or a segmentation network says of images: classes as CSV, masks as PNG.

    Classifiers are those that freqmask evaluate finetune left, exported folders with a head, and timm:NAME. A
    table has the columns path, class and probability, and of up to 50 classes the probability of each. A mask
    is as large as its image and holds the labels of the training masks.

    Args:
        model: the run of a fine-tuning or of a segmentation, an exported folder with a head, or timm:NAME.
        data: folders or files of images, as for pretrain.
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
    from freqmask.commands import prediction
    from freqmask.commands.embedding import choose_compute
    from freqmask.data.sources import open_source
    from freqmask.interop.models import open_classifier
    from freqmask.training.files import check_out

    segmenter = prediction.open_segmenter(model)
    classifier = None if segmenter is not None else open_classifier(model)
    path = check_out(out, overwrite, folder=segmenter is not None)
    if classifier is not None and path.suffix != ".csv":
        raise UserError(f"out ({out}) must end in .csv; try --out {path.with_suffix('.csv')}")
    source = open_source(data, pages=pages, split=split)
    config, devices = choose_compute(batch_size, workers, accelerator, 1, "predict")
    if segmenter is not None:
        written = prediction.write_masks(segmenter, source, path, inference, config, devices[0])
    elif classifier is not None:
        task = prediction.Classification(classifier, crop)
        written = prediction.write_classes(task, source, path, config, devices)
    else:
        raise UserError(
            f"model ({model}) has no head to predict with; freqmask evaluate finetune or segment trains one"
        )
    say(f"predicted   {path}: {written:,} of {len(source):,} images, {model}")
    return path
