"""``freqmask export``: a backbone for other software."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from freqmask.commands.given import command
from freqmask.console import say
from freqmask.errors import UserError
from freqmask.interop.formats import FormatName, export_model


@command(imports="freqmask.commands.inference")
def export(
    model: str,
    *,
    out: str | None = None,
    format: FormatName = "timm",
    weights: str | None = None,
    image_size: int | None = None,
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
    if push is not None:
        from freqmask.interop.hub import check_hub

        check_hub(push)
    opened = _open(model, image_size, weights, format)
    if out is not None:
        told = export_model(opened, out, format, overwrite)
        say(f"written     {out}    ({getattr(opened, 'name', model)}, {format})")
        for sentence in told:
            say(f"            {sentence}")
    if push is None:
        return Path(str(out))
    from freqmask.interop.hub import push_model

    address = push_model(opened, push, public=public, with_images=with_images)
    say(f"pushed      {address}    ({'public' if public else 'private'})")
    return address


def _open(model: str, image_size: int | None, weights: str | None, format: str) -> Any:
    """A classifier with its head, a segmentation network as a graph, or a backbone."""
    from freqmask.commands.inference import open_segmenter, segmentation_graph
    from freqmask.interop.models import open_classifier, open_model
    from freqmask.interop.timm_folder import PUBLIC, RANDOM

    segmenter = open_segmenter(model)
    if segmenter is not None:
        return segmentation_graph(segmenter)
    if weights is None and image_size is None and not model.startswith((PUBLIC, RANDOM)):
        classifier = open_classifier(model)
        if classifier is not None and format != "mfm-checkpoint":
            return classifier
    return open_model(model, image_size=image_size, weights=weights)
