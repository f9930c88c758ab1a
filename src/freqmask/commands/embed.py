"""``freqmask embed``: the features of images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from freqmask.commands.given import command
from freqmask.console import say
from freqmask.errors import UserError
from freqmask.options import Auto

_QUERIES, _NEIGHBOURS = 8, 7


@command()
def embed(
    model: str,
    data: list[str],
    *,
    out: str | None = None,
    neighbours: bool = False,
    patches: bool = False,
    blocks: list[int] | None = None,
    feature: Literal["auto", "mean", "class_token"] = "auto",
    weights: str | None = None,
    image_size: int | None = None,
    crop: Literal["auto", "center", "whole", "native"] = "auto",
    value_range: str | None = None,
    pages: Literal["channels", "images"] = "channels",
    split: str = "all",
    labels: str | None = None,
    batch_size: int | Auto = "auto",
    workers: int | Auto = "auto",
    accelerator: str = "auto",
    devices: int | Auto = "auto",
    precision: Literal["32", "bf16"] = "32",
    overwrite: bool = False,
) -> Path:
    """Writes the features of images to a parquet or npy file; the same command goes on where it was cut short.

    A parquet file has the columns path, index, label, features and, if asked, patches (row by row) and
    block_N; a npy file one array, with path, index and label of each row in a csv file beside it.

    Args:
        model: a run folder, an exported folder, timm:NAME or random:NAME.
        data: folders or files of images, as for pretrain.
        out: a .parquet or .npy file; the default is embeddings.parquet, in the run folder if model is one.
        neighbours: also draw some images with their nearest neighbours, to see what the model finds alike.
        patches: also the features of every patch.
        blocks: also the mean feature of these blocks or stages, counted from 0.
        feature: what stands for an image; auto is what evaluate knn --features save kept with the model, else the
            mean of the map, and the class token for FOLK.
        weights: teacher or student of a FOLK run; the default is what the run exports.
        image_size: side in pixels that the network sees; the default is what it was trained at.
        crop: center takes the largest centered square, whole the whole image, distorted to a square, native the
            middle at its own resolution; auto is native where the model was trained with --crop native, else center.
        value_range: the values that become 0 and 1 (dtype or LOW,HIGH); the default is the model's own.
        pages: what the pages of a TIFF are.
        split: all, auto or the name of a split.
        labels: a CSV table with the columns path and label.
        batch_size: images at once on a device.
        workers: loader processes of each device.
        accelerator: auto, cpu, cuda or mps.
        devices: how many, a process each; auto is all GPUs, else one.
        precision: 32 or bf16; bf16 is faster and rounds to three digits.
        overwrite: replace a file that holds something else.

    Returns:
        The file.

    Raises:
        UserError: the model or the data cannot be opened, or out cannot be written.
    """
    from freqmask.commands import embedding
    from freqmask.data.sources import open_source
    from freqmask.data.values import ValueRange
    from freqmask.interop.feature_parts import Wanted, plan_parts
    from freqmask.interop.feature_space import load_space
    from freqmask.interop.feature_tables import SUFFIXES
    from freqmask.interop.formats import pooled_of
    from freqmask.interop.models import open_model
    from freqmask.interop.outputs import check_out

    opened = open_model(model, image_size=image_size, weights=weights)
    if value_range is not None:
        opened.value_range = (ValueRange.parse(value_range) or opened.values).describe()
    source = open_source([data] if isinstance(data, str) else data, pages=pages, split=split, labels=labels)
    path = Path(out) if out is not None else embedding.default_out(opened)
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"out ({path}) must end in .parquet or .npy; try --out {path.with_suffix('.parquet')}"
        )
    if path.suffix == ".npy" and patches and blocks:
        raise UserError("a .npy holds one array: ask for patches or blocks, or --out FILE.parquet for both")
    pooled = pooled_of(opened.facts.get("method"), opened) if feature == "auto" else feature
    opened.space = load_space(opened) if feature == "auto" else None
    if opened.space is not None:
        pooled = opened.space.digest
        say(
            f"features    {opened.space.describe()}, as kept with {opened.name}; --feature mean leaves them plain"
        )
    if pooled == "class_token" and not opened.backbone.has_class_token:
        raise UserError(f"feature (class_token): {opened.name} has none; try --feature mean")
    if crop == "auto":
        crop = "native" if opened.trained_crop == "native" else "center"
    if crop == "native" and opened.trained_crop == "native":
        say(
            "crop        native, as trained: the middle of an image at its own resolution; --crop center takes more"
        )
    wanted = Wanted(pooled, patches, tuple(embedding.checked_blocks(blocks, opened)), crop, precision)
    place, places = embedding.choose_place(batch_size, workers, accelerator, devices)
    parts = plan_parts(opened, source, path, wanted)
    if embedding.is_there(path, parts.task):
        say(f"embeddings  {path} is there already, of the same images and weights")
    else:
        check_out(path, overwrite, folder=False)
        written = embedding.compute(opened, source, path, wanted, place, places)
        embedding.tell(written, opened, len(source))
    if neighbours:
        from freqmask.commands.sheets import draw_neighbours

        say(f"look at     {draw_neighbours(path, opened, source, _QUERIES, _NEIGHBOURS)}")
    return path
