"""Small images kept on the training device: one tensor, pixel beside pixel, in the type of their files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor


@dataclass
class ResidentImages:
    """Decoded images in one tensor. All but the pixels stay on the host, where the windows are drawn.

    Attributes:
        pixels: every pixel of every image, one image behind the other, line by line. uint16 lies in int16.
        dtype: the sample type as in the files.
        starts: where each image begins in ``pixels``.
        sizes: (height, width) of each image; of an unreadable one (1, 1).
        identities: each image's own number.
        labels: class of each image, -1 where unknown.
        flat: True where a window may hold one value only, so that each window has to be looked at.
        bad: index -> reason of the images that cannot be used.
    """

    pixels: Shaped[Tensor, "pixel channel"]
    dtype: str
    starts: Int64[Tensor, " image"]
    sizes: Int64[Tensor, "image 2"]
    identities: Int64[Tensor, " image"]
    labels: Int64[Tensor, " image"]
    flat: Bool[Tensor, " image"]
    bad: dict[int, str]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def bytes(self) -> int:
        """What the pixels take on the device."""
        return self.pixels.nbytes

    def to(self, device: torch.device) -> ResidentImages:
        """Itself, its pixels moved to a device."""
        self.pixels = self.pixels.to(device)
        return self


def cut_windows(
    pixels: Shaped[Tensor, "pixel channel"],
    starts: Int64[Tensor, " batch"],
    strides: Int64[Tensor, " batch"],
    boxes: Int64[Tensor, "batch 4"],
    padded: tuple[int, int],
) -> Shaped[Tensor, "batch padded_height channel padded_width"]:
    """The windows of some images, each in the corner of a frame of the same size.

    Args:
        pixels: those of all images, see :class:`ResidentImages`.
        starts: where each image begins.
        strides: the width of each image.
        boxes: (top, left, height, width) of each window.
        padded: (height, width) of the frame, at least that of every window.

    Returns:
        The frames. Beyond a window they hold whatever lies behind it.
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
        windows: values as :class:`ResidentImages` holds them.
        dtype: their type in the files.
        limits: the values that become 0 and 1, or None to leave them.
    """
    values = windows.int().bitwise_and(0xFFFF) if dtype == "uint16" else windows
    numbers = values.to(torch.float32, memory_format=torch.contiguous_format)
    if limits is None:
        return numbers
    low, high = limits
    return ((numbers - low) / (high - low)).clamp_(0, 1)
