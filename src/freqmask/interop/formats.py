"""The formats of `freqmask export` by name. No torch here: the command's help lists them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from freqmask.errors import UserError, nearest
from freqmask.training.files import check_out

FORMATS = {
    "timm": "write_timm",
    "onnx": "write_onnx",
    "torch-export": "write_torch_export",
    "mfm-checkpoint": "write_mfm",
}
"""Name -> function of :mod:`freqmask.interop.exporters`; adding a format is a line here and its function there."""
FOLDER = "timm"  # the one that is no file

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]


def export_model(opened: Any, out: str | Path, format: str = "timm", overwrite: bool = False) -> list[str]:
    """Write a model in a format.

    Args:
        opened: an :class:`~freqmask.interop.models.OpenedModel`, an ``OpenedClassifier``, or any other
            :class:`~freqmask.interop.exporters.Graph`.
        out: a folder for ``timm``, a file for the others.
        format: one of ``FORMATS``.
        overwrite: True replaces what is at ``out``.

    Returns:
        Whole sentences on what was written and checked.

    Raises:
        UserError: the format is unknown, cannot hold the model, or ``out`` cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"format ({format}) is unknown; {nearest(format, FORMATS)}")
    path = check_out(out, overwrite, folder=format == FOLDER)
    write = getattr(import_module("freqmask.interop.exporters"), FORMATS[format])
    sentences: list[str] = write(opened, path)
    return sentences
