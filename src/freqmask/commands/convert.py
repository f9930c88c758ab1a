"""``freqmask convert``: somebody else's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from freqmask.commands.given import command
from freqmask.console import say, shell_word


@command(imports="freqmask.interop.foreign_weights")
def convert(
    file: str,
    *,
    out: str,
    backbone: str | None = None,
    image_size: int | None = None,
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
    from freqmask.interop.foreign_weights import convert_file
    from freqmask.interop.timm_folder import write_timm_folder
    from freqmask.training.files import check_out, new_folder

    path = check_out(out, overwrite, folder=True)
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
    say(f"written     {out}    ({converted.architecture}, {height}x{width} pixels)")
    if converted.decoder:
        say(
            f"            with its decoder: freqmask reconstruct {shell_word(out)} IMAGE shows what it fills in"
        )
    for note in converted.notes:
        say(f"            {note}")
    return path
