"""``freqmask export`` and ``freqmask convert``: a backbone for other software, and somebody else's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from freqmask.commands.command import command
from freqmask.console import BELOW, say, shell_path
from freqmask.errors import UserError
from freqmask.imports import uncollected
from freqmask.interop.formats import (
    FOLDER,
    PUBLIC,
    RANDOM,
    FormatName,
    check_file,
    check_hub,
    check_model,
    export_model,
)
from freqmask.options import Range
from freqmask.training.files import check_kept, check_out, new_folder


@command()
def export(
    model: str,
    *,
    out: str | None = None,
    format: FormatName = "timm",
    weights: str | None = None,
    image_size: Annotated[int | None, Range(least=8)] = None,
    push: str | None = None,
    public: bool = False,
    with_images: bool = False,
    overwrite: bool = False,
) -> Path | str:
    """Hands a backbone on: to timm and transformers, ONNX runtimes, torch.export, or users of MFM's files.

    Graphs (onnx, torch-export) take images in [0, 1] and normalize inside; they are checked against torch
    before they are written, and take any image size where the network does. A fine-tuned classifier keeps its
    head (its graph gives logits); a segmentation network gives logits at the size of the images. The
    mfm-checkpoint holds plain ViTs and ResNets with their decoder only.

    Args:
        model: a run folder (of a pre-training, a fine-tuning or a segmentation), an exported folder, timm:NAME or
            random:NAME.
        out: the folder (timm) or file to write.
        format: what to write.
        weights: teacher or student of a FOLK run; the default is the student. It alone is moved by both
            losses; the teacher, its slow average, is still near the beginning after a short run. After
            hundreds of epochs the teacher is worth a try.
        image_size: side in pixels that the export is made for; the default is what the model was trained at.
        push: a repository of the Hugging Face hub (USER/NAME) to send the timm folder to, with a model card.
        public: a pushed repository can be seen by everybody; without it, only by you.
        with_images: the pushed folder may show previews, file names and local paths.
        overwrite: replace what is at out.

    Returns:
        The path written, or the address of the repository.

    Raises:
        UserError: the model cannot be opened or the format cannot hold it; out exists; no network or token.
    """
    if out is None and push is None:
        raise UserError("out is missing; try --out FOLDER, or --push USER/NAME")
    if push is not None and format != "timm":
        raise UserError(f"push goes with --format timm, not {format}; export the file and upload it by hand")
    if push is None and (public or with_images):
        raise UserError("public and with_images concern --push USER/NAME, which is not given")
    check_model(model)
    if out is not None:
        check_kept(check_out(out, overwrite, folder=format == FOLDER), [model.removeprefix(RANDOM)])
    if push is not None:
        check_hub(push)
    opened = _open(model, image_size, weights, format)
    if out is not None:
        sentences = export_model(opened, out, format, overwrite)
        name = getattr(opened, "name", model)
        say(f"written     {BELOW.join([f'{out}    ({name}, {format})', *sentences])}")
    if push is None:
        return Path(str(out))
    from freqmask.interop.exporters import push_model

    address = push_model(opened, push, public=public, with_images=with_images)
    say(f"pushed      {address}    ({'public' if public else 'private'})")
    return address


def _open(model: str, image_size: int | None, weights: str | None, format: str) -> Any:
    """A classifier with its head, a segmentation network as a graph, or a backbone."""
    with uncollected():
        from freqmask.commands.inference import open_segmenter, segmentation_graph
        from freqmask.interop.models import open_classifier, open_model

    segmenter = open_segmenter(model)
    network: Any = None if segmenter is None else segmentation_graph(segmenter)
    if network is None and format != "mfm-checkpoint" and not model.startswith((PUBLIC, RANDOM)):
        network = open_classifier(model)
    if network is None:
        return open_model(model, image_size=image_size, weights=weights)
    height, width = network.input_size[1:]
    for name, value in (("image_size", image_size), ("weights", weights)):
        if value is not None:
            raise UserError(
                f"{name} ({value}) is for backbones; {model} has a head, and is exported as it was trained, "
                f"at {height}x{width} pixels"
            )
    return network


@command()
def convert(
    file: str,
    *,
    out: str,
    backbone: str | None = None,
    image_size: Annotated[int | None, Range(least=8)] = None,
    model_args: dict[str, Any] | None = None,
    key: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Makes an exported folder of a checkpoint: MFM's released ones, BEiT's, or state dicts with timm's names.

    Nothing in the file is run. Foreign objects outside the weights are left out and named; inside the
    weights they are refused. MFM's decoder comes along, so that freqmask reconstruct can show what the
    model fills in.

    Args:
        file: the checkpoint, of torch.save or safetensors.
        out: the folder to write.
        backbone: timm's name of the architecture, where the file does not tell (ViT, BEiT and ResNet do).
        image_size: side in pixels to interpolate a ViT's positions to; the default is the file's own.
        model_args: timm's arguments that the file cannot tell, such as '{num_heads: 8}'.
        key: which weights, where the file holds several, such as state_dict_ema or teacher.backbone.
        overwrite: replace what is at out.

    Returns:
        The folder.

    Raises:
        UserError: the file is broken, refused or does not fit; tensors that do not are named.
    """
    path = check_out(out, overwrite, folder=True)
    check_kept(path, [file])
    check_file(file)
    with uncollected():
        from freqmask.interop.foreign_weights import convert_file
        from freqmask.interop.weight_files import write_timm_folder

    converted = convert_file(file, backbone, image_size, model_args, key)
    with new_folder(path) as scratch:
        write_timm_folder(
            converted.model,
            scratch,
            input_size=(len(converted.mean), *converted.image_size),
            mean=converted.mean,
            std=converted.std,
            metadata=converted.metadata,
            pooled="mean" if converted.decoder else None,
            decoder=converted.decoder or None,
        )
    height, width = converted.image_size
    lines = [f"{out}    ({converted.architecture}, {height}x{width} pixels)"]
    if converted.decoder:
        lines.append(f"with its decoder: freqmask reconstruct {shell_path(out)} IMAGE shows what it fills in")
    say(f"written     {BELOW.join([*lines, *converted.notes])}")
    return path
