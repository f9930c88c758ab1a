"""Windows of a whole batch on a device: cut out of images in memory, and resampled by two matrix products.

A loop over images, as on a CPU, would take a launch of some microseconds for every image and step. Each window has a
matrix for its columns and one for its rows, Pillow's antialiased bicubic (a = -0.5), which the loader's
:func:`freqmask.data.transforms.resize` computes, too. A sampling grid (``grid_sample``) would not do: it does not
smooth before it reduces, and the spectrum it changes is what is predicted.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

_REACH = 2  # pixels of the coarser of the two grids to which the kernel reaches


def cut_windows(
    pixels: Shaped[Tensor, "pixel channel"],
    starts: Int64[Tensor, " batch"],
    strides: Int64[Tensor, " batch"],
    boxes: Int64[Tensor, "batch 4"],
    padded: tuple[int, int],
) -> Shaped[Tensor, "batch padded_height channel padded_width"]:
    """The windows of some images, each in the corner of a frame of the same size.

    Args:
        pixels: those of all images, see :class:`freqmask.data.in_memory.InMemoryImages`.
        starts: where each image begins.
        strides: the width of each image.
        boxes: (top, left, height, width) of each window.
        padded: (height, width) of the frame, at least that of every window; beyond one it holds whatever lies behind.
    """
    first = starts + boxes[:, 0] * strides + boxes[:, 1]
    lines = first[:, None] + torch.arange(padded[0], device=pixels.device) * strides[:, None]
    places = lines[:, :, None] + torch.arange(padded[1], device=pixels.device)
    taken = pixels.index_select(0, places.clamp_(max=len(pixels) - 1).flatten())
    return taken.view(*places.shape, pixels.shape[1]).transpose(2, 3)


def as_numbers(
    windows: Shaped[Tensor, "*shape"], dtype: str, limits: tuple[float, float] | None
) -> Float[Tensor, "*shape"]:
    """Stored values as float32: 0 to 255 as they are, or those of a value range in [0, 1].

    Args:
        windows: values as :class:`freqmask.data.in_memory.InMemoryImages` holds them.
        dtype: their type in the files.
        limits: the values that become 0 and 1, or None to leave them.
    """
    values = windows.int().bitwise_and(0xFFFF) if dtype == "uint16" else windows
    numbers = values.to(torch.float32, memory_format=torch.contiguous_format)
    if limits is None:
        return numbers
    low, high = limits
    return ((numbers - low) / (high - low)).clamp_(0, 1)


def are_empty(
    pixels: Tensor, starts: Tensor, strides: Tensor, boxes: Tensor, frame: tuple[int, int]
) -> Shaped[Tensor, " flat"]:
    """Which windows hold one value only in each channel; arguments as for `cut_windows`."""
    windows = cut_windows(pixels, starts, strides, boxes, frame)  # (flat, height, channel, width)
    outside = (torch.arange(frame[0], device=pixels.device) >= boxes[:, 2, None])[:, :, None] | (
        torch.arange(frame[1], device=pixels.device) >= boxes[:, 3, None]
    )[:, None]
    same: Tensor = (windows == windows[:, :1, :, :1]) | outside[:, :, None]
    return same.flatten(1).all(dim=1)


def resample(
    windows: Float[Tensor, "batch padded_height channel padded_width"],
    sizes: Int64[Tensor, "batch 2"],
    size: tuple[int, int],
    flips: Bool[Tensor, "batch 3"],
    levels: bool,
    turned: bool = False,
) -> Shaped[Tensor, "batch channel height width"]:
    """Bring windows to one size, mirrored and turned.

    Args:
        windows: float32 pixels, lines of all channels one below the other. What lies beyond a window's own size may be
            any finite number.
        sizes: (height, width) of each window in pixels.
        size: (height, width) asked.
        flips: whether each is mirrored, upside_down, and has then rows and columns exchanged.
        levels: True for values from 0 to 255, which are rounded after each of the two products as Pillow does, and
            come back as uint8; False for values in [0, 1], which are clamped to it.
        turned: whether rows and columns of any may be exchanged, which wants a square size.
    """
    batch, height, channels, width = windows.shape
    mirrored, upside_down, exchanged = flips.unbind(1)
    if (height, size[0]) == (width, size[1]):  # together they take half of the small operations
        both = resampling_matrices(sizes.T.flatten(), width, size[0], torch.cat((upside_down, mirrored)))
        rows, columns = both.split(batch)
    else:
        rows = resampling_matrices(sizes[:, 0], height, size[0], upside_down)
        columns = resampling_matrices(sizes[:, 1], width, size[1], mirrored)
    lines = windows.reshape(batch, height * channels, width) @ columns.mT
    if levels:
        lines.round_().clamp_(0, 255)
    views = (rows @ lines.view(batch, height, channels * size[1])).view(batch, size[0], channels, size[1])
    views = (views.round_().clamp_(0, 255) if levels else views.clamp_(0, 1)).transpose(1, 2)
    views = views.to(torch.uint8 if levels else views.dtype, memory_format=torch.contiguous_format)
    return torch.where(exchanged[:, None, None, None], views.mT, views) if turned else views


def resampling_matrices(
    lengths: Int64[Tensor, " batch"], padded: int, out: int, reverse: Bool[Tensor, " batch"]
) -> Float[Tensor, "batch out padded"]:
    """What each of ``out`` pixels of a line takes from each of its ``lengths`` pixels, in ``padded`` columns.

    ``w[i, j] = cubic((j + 1/2 - s (i + 1/2)) / max(s, 1))`` with ``s = length / out``, for ``j < length``, each row
    divided by its sum: a line is smoothed where it is reduced, and its ends are not repeated. Only the few weights
    of a row that can differ from zero are computed, in a third of the time at 64 pixels. The identity where length
    and ``out`` agree; lines in ``reverse`` come out backwards.
    """
    target = torch.arange(out, device=lengths.device) + 0.5
    step = (lengths / out)[:, None]
    width = step.clamp(min=1)
    centre = step * torch.where(reverse[:, None], out - target, target)  # (batch, out), in pixels of the line
    taps = min(padded, 2 * math.ceil(_REACH * max(padded / out, 1)) + 1)
    first = (centre - _REACH * width).floor_().clamp_(0, padded - taps)
    source = first[:, :, None] + torch.arange(taps, device=lengths.device)
    weights = cubic((source - (centre - 0.5)[:, :, None]).div_(width[:, :, None]))
    weights.mul_(source < lengths[:, None, None])
    weights.div_(weights.sum(dim=2, keepdim=True))
    empty = torch.zeros(len(lengths), out, padded, device=lengths.device)
    return empty.scatter_(2, source.long(), weights)


def cubic(distance: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Keys' cubic kernel with a = -0.5 (1981, equation 15), 1 at 0 and 0 at every other integer; overwrites its input.

    Written as ``t^2 (t - 1) / 2 + s^2 (1 - 2 s)`` with ``t = max(2 - |x|, 0)`` and ``s = max(1 - |x|, 0)``, which
    takes less than half the time of choosing between its two pieces.
    """
    outer = distance.abs_().neg_().add_(2)
    inner = (outer - 1).clamp_(min=0)
    outer = outer.clamp_(min=0)
    wide = (outer - 1).mul_(outer).mul_(outer).mul_(0.5)
    return wide.addcmul_(inner * inner, inner.mul_(-2).add_(1))
