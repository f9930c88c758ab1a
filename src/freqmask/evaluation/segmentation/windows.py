"""From a network that sees windows to the classes of a whole image."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

Logits = Callable[[Tensor], Tensor]  # images (B, C, H, W) in [0, 1] -> logits (B, K, h, w)


def places(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side, so that they cover it: the last one ends where the side ends.

    >>> places(100, 40, 30), places(30, 40, 30)
    ([0, 30, 60], [0])
    """
    if length <= window:
        return [0]
    return [min(start, length - window) for start in range(0, length - window + stride, stride)]


def segment_windows(
    logits: Logits,
    image: Float[Tensor, "channel height width"],
    window: int,
    stride: int,
    batch_size: int,
    fill: Float[Tensor, " channel"],
) -> Float[Tensor, "classes height width"]:
    """The mean logits of overlapping windows.

    Args:
        logits: of square windows.
        image: in [0, 1].
        window: side in pixels.
        stride: from one window to the next, at most ``window``.
        batch_size: windows at once.
        fill: what stands where an image is smaller than a window.
    """
    height, width = image.shape[1:]
    padded = pad_to(image, (max(height, window), max(width, window)), fill)
    corners = list(itertools.product(places(height, window, stride), places(width, window, stride)))
    total, counts = None, image.new_zeros(padded.shape[1:])
    for some in _batched(corners, batch_size):
        windows = torch.stack([padded[:, top : top + window, left : left + window] for top, left in some])
        found = _resized(logits(windows), (window, window))
        total = found.new_zeros(found.shape[1], *padded.shape[1:]) if total is None else total
        for (top, left), one in zip(some, found, strict=True):
            total[:, top : top + window, left : left + window] += one
            counts[top : top + window, left : left + window] += 1
    assert total is not None  # there is always a window
    return (total / counts)[:, :height, :width]


def segment_whole(
    logits: Logits, image: Float[Tensor, "channel height width"]
) -> Float[Tensor, "classes height width"]:
    """The logits of the image seen in one piece; the network must take its size."""
    return _resized(logits(image[None]), (image.shape[1], image.shape[2]))[0]


def classes_at(
    logits: Float[Tensor, "classes height width"], size: tuple[int, int]
) -> Int64[Tensor, "mask_height mask_width"]:
    """The likeliest class of every pixel of the mask; logits are resampled, never classes."""
    return _resized(logits[None], size)[0].argmax(dim=0)


def pad_to(
    image: Float[Tensor, "channel height width"], size: tuple[int, int], fill: Float[Tensor, " channel"]
) -> Float[Tensor, "channel new_height new_width"]:
    """The image with ``fill`` below and to the right of it."""
    if tuple(image.shape[1:]) == size:
        return image
    padded = fill.to(image)[:, None, None].expand(-1, *size).clone()
    padded[:, : image.shape[1], : image.shape[2]] = image
    return padded


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(logits.shape[-2:]) == size:
        return logits.float()
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def _batched(corners: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(corners), size):
        yield corners[start : start + size]
