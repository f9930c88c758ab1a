"""What a model fills in: the method behind a run or a converted checkpoint, and how well it does, band by band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from freqmask.data.decode import open_file
from freqmask.data.pixels import convert_channels, fill_missing, missing_pixels
from freqmask.data.transforms import decode_windows
from freqmask.data.values import ValueRange
from freqmask.errors import BadImage, UserError
from freqmask.filters import build_filter
from freqmask.images import as_float, decibel
from freqmask.interop.exporters import decoder_of
from freqmask.interop.models import OpenedModel, open_model, still_geometry
from freqmask.interop.timm_folder import load_fitting
from freqmask.interop.weights import load_method
from freqmask.methods import MFM
from freqmask.methods.mfm import band_edges
from freqmask.spectrum import inside, pair_weights, rfft2
from freqmask.training.run_folder import RunFolder


@dataclass(frozen=True)
class Band:
    """How well one ring of frequencies is filled in."""

    low: int  # radius in bins where it begins
    high: int  # radius where it ends
    hidden: float  # share of its bins that the filter hides
    filtered: float  # PSNR in dB of the filtered input
    predicted: float  # of what it predicted
    filled: float  # of the visible bins with the predicted hidden ones


def open_method(model: str, filter: str | None = None) -> tuple[Any, OpenedModel]:
    """The method with its decoder, and the model's sizes and value range.

    Args:
        model: a run folder, or an exported folder that a decoder came along with.
        filter: another filter than the run's, see :func:`freqmask.filters.build_filter`.

    Raises:
        UserError: there is no decoder, or the method hides no frequencies that a filter could choose.
    """
    opened = open_model(model)
    path = Path(model).expanduser()
    if RunFolder(path).exists():
        method: Any = load_method(path)
    else:
        method = _from_decoder(opened, filter)
    if filter is not None:
        if not hasattr(method, "filter"):
            raise UserError(
                f"filter ({filter}) has no say in method {method.name}, which degrades images otherwise"
            )
        method.filter = build_filter(filter, opened.backbone.image_size)
    return method.eval(), opened


def _from_decoder(opened: OpenedModel, filter: str | None) -> MFM:
    decoder = decoder_of(opened)
    if not decoder:
        raise UserError(
            f"model ({opened.name}) has no decoder to reconstruct with; name a run, or convert a pre-trained "
            "(not fine-tuned) MFM checkpoint"
        )
    method = MFM(
        opened.backbone,
        opened.backbone.image_size,
        opened.input_size[0],
        filter=filter or "fixed",
        mean=opened.mean,
        std=opened.std,
    )
    load_fitting(method.decoder, decoder, f"model ({opened.name}): its decoder does not fit its backbone")
    return method


def read_image(file: str | Path, opened: OpenedModel) -> Float[Tensor, "1 channel height width"]:
    """The center of an image as the model takes it: its size, its channels, in [0, 1].

    Raises:
        UserError: it cannot be read, or has other channels.
    """
    geometry = still_geometry(opened)
    try:
        picture = open_file(Path(file))
        box = geometry.box(picture.size, key=0)
        (window,) = decode_windows(picture, [box], [geometry.at_least()])
        filled = fill_missing(window, missing_pixels(window, picture.nodata))
        scaled = (ValueRange.parse(opened.value_range) or ValueRange()).apply(
            convert_channels(filled, opened.input_size[0])
        )
    except BadImage as error:
        raise UserError(f"image ({file}) cannot be read: {error.reason}; name another file") from error
    view = geometry.finish(torch.from_numpy(np.array(scaled)), key=0)  # a copy: a file's map is not writable
    return as_float(view)[None]


@torch.no_grad()
def psnr_by_band(pictures: dict[str, Tensor], edges: Sequence[int] | None = None) -> list[Band]:
    """PSNR of the filtered input, the prediction and what is filled in, ring by ring.

    The PSNR of a band is -10 log10 of the mean squared error of its bins (ortho-normal FFT, a mean over bins and
    channels), so that the bands' errors, weighted by their bins, add up to the image's.

    Args:
        pictures: from a method's ``reconstruct``.
        edges: radii in bins; None takes the bands of the training's health table.

    Returns:
        The bands from the center outwards.
    """
    target = pictures["target"].double()
    height, width = target.shape[-2:]
    limits = band_edges(height, width) if edges is None else edges
    weights = pair_weights(height, width).double()
    whole = rfft2(target)
    errors = {
        name: (rfft2(pictures[name].double()) - whole).abs().square().mean(dim=(0, 1))
        for name in ("filtered", "prediction", "filled")
    }
    hidden = 1 - pictures["keep"].double().mean(dim=(0, 1))
    bands = []
    for low, high in pairwise(limits):
        ring = inside(height, width, Fraction(high)) & ~inside(height, width, Fraction(low))
        mass = weights * ring
        if not mass.any():
            continue
        share = {name: float((mass * error).sum() / mass.sum()) for name, error in errors.items()}
        bands.append(
            Band(
                low,
                high,
                float((mass * hidden).sum() / mass.sum()),
                *(decibel(share[name]) for name in ("filtered", "prediction", "filled")),
            )
        )
    return bands
