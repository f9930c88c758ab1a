"""What every room takes for granted of images: numbers in [0, 1], the field's constants, normalization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from freqmask.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
# Without ImageNet's three channels: the middle of the range, and about the contrast of photographs.
PLAIN_MEAN, PLAIN_STD = 0.5, 0.25


def as_float(images: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """uint8 becomes float32 in [0, 1] on the device it is on; floats pass."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def psnr(image: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]) -> float:
    """Peak signal-to-noise ratio in dB of an image, clipped to [0, 1], against a target."""
    error = image.detach().float().clamp(0, 1) - target.detach().float()
    return decibel(error.square().mean().item())


def decibel(mean_squared_error: float) -> float:
    """PSNR against a peak of 1; infinite below 1e-11, which is float32's own rounding."""
    return math.inf if mean_squared_error < 1e-11 else -10 * math.log10(mean_squared_error)


class Normalization(nn.Module):
    """(images - mean) / std, channel by channel.

    Args:
        channels: channels C.
        mean: one a channel, in [0, 1]; None or auto: ImageNet's for three channels, else 0.5.
        std: one a channel, above 0; None or auto: ImageNet's for three channels, else 0.25.

    Raises:
        UserError: for another number of values, or a std that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: int,
        mean: Sequence[float] | Literal["auto"] | None = None,
        std: Sequence[float] | Literal["auto"] | None = None,
    ) -> None:
        super().__init__()
        mean = _values("mean", mean, channels, IMAGENET_MEAN, PLAIN_MEAN)
        std = _values("std", std, channels, IMAGENET_STD, PLAIN_STD)
        if min(std) <= 0:
            raise UserError(
                f"std ({list(std)}) must be above 0 in every channel; leave constant channels out"
            )
        # Not part of the state: they are settings, and a checkpoint's must not override a user's.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "*batch channel height width"]) -> Tensor:
        """Images in [0, 1] become the network's numbers, of about mean 0 and deviation 1."""
        return (images - self.mean) / self.std

    def inverse(self, normalized: Float[Tensor, "*batch channel height width"]) -> Tensor:
        """The network's numbers become images; a prediction may leave [0, 1]."""
        return normalized.float() * self.std + self.mean


def _values(
    name: str,
    given: Sequence[float] | Literal["auto"] | None,
    channels: int,
    imagenet: Sequence[float],
    plain: float,
) -> list[float]:
    if given is None or given == "auto":
        return list(imagenet) if channels == 3 else [plain] * channels
    if len(given) != channels:
        raise UserError(f"{name} ({list(given)}) must hold one value for each of the {channels} channels")
    return [float(value) for value in given]
