"""Mean and standard deviation per channel, taken out before the network and put back for pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from freqmask.errors import UserError
from freqmask.images import IMAGENET_MEAN, IMAGENET_STD
from freqmask.options import Auto

# Without ImageNet's three channels: the middle of the range, and about the contrast of photographs.
PLAIN_MEAN, PLAIN_STD = 0.5, 0.25


class Normalisation(nn.Module):
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
        mean: Sequence[float] | Auto | None = None,
        std: Sequence[float] | Auto | None = None,
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

    def inverse(self, normalised: Float[Tensor, "*batch channel height width"]) -> Tensor:
        """The network's numbers become images; a prediction may leave [0, 1]."""
        return normalised.float() * self.std + self.mean


def _values(
    name: str, given: Sequence[float] | Auto | None, channels: int, imagenet: Sequence[float], plain: float
) -> list[float]:
    if given is None or given == "auto":
        return list(imagenet) if channels == 3 else [plain] * channels
    if len(given) != channels:
        raise UserError(f"{name} ({list(given)}) must hold one value for each of the {channels} channels")
    return [float(value) for value in given]
