"""How much has been learned: the loss over the loss at zero prediction, in whole and in parts.

1.00 means nothing learned (docs/methods.md, small pictures). Sums are this process's own: no collective, no wait for
the device. A part that no image of the batch belongs to is NaN.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from freqmask.filters import Filter, OneOf
from freqmask.filters.fixed import RINGS_AT_224
from freqmask.losses import SpectrumLoss, spectrum_distance
from freqmask.spectrum import REFERENCE_SIDE, bin_weights, constant, frequency_radius


@torch.no_grad()
def reconstruction_health(
    loss: SpectrumLoss,
    prediction: Float[Tensor, "batch channel height width"],
    target: Float[Tensor, "batch channel height width"],
    keep: Float[Tensor, "batch mask_channel height half_width"] | None,
    filter: Filter | None = None,
    keys: Int64[Tensor, " batch"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """The loss over that of a zero prediction: overall, per filter drawn, per band of radii.

    Args:
        loss: whose weights, power and focal weight count.
        prediction: as the loss gets it.
        target: likewise; zero is its mean image.
        keep: likewise; None counts every frequency.
        filter: the filter that made keep; only of a mixture the parts are told apart.
        keys: the keys that it was given.

    Returns:
        ``relative_loss``, ``relative_loss/NAME`` and ``relative_loss/band_LOW_HIGH`` (radii in cycles per
        shorter side, LOW included).
    """
    height, width = target.shape[-2:]
    reached = spectrum_distance(prediction, target, loss.gamma, loss.focal)
    at_zero = spectrum_distance(torch.zeros_like(target), target, loss.gamma, loss.focal)
    pairs = bin_weights(height, width, target.device, at_zero.dtype)
    weight = pairs * loss.weights(pairs, keep)
    reached, at_zero = (weight * reached).sum(1), (weight * at_zero).sum(1)
    health = {"relative_loss": reached.sum() / at_zero.sum()}
    if isinstance(filter, OneOf) and keys is not None:
        drawn = filter.draw(keys)
        for number, name in enumerate(filter.names):
            chosen = (drawn == number)[:, None, None]
            health[f"relative_loss/{name}"] = (reached * chosen).sum() / (at_zero * chosen).sum()
    edges = band_edges(height, width)
    masks = _band_masks(height, width, edges, target.device)
    for low, high, mask in zip(edges[:-1], edges[1:], masks, strict=True):
        health[f"relative_loss/band_{low}_{high}"] = (reached * mask).sum() / (at_zero * mask).sum()
    return health


def band_edges(height: int, width: int) -> tuple[int, ...]:
    """Rising radii that cut a spectrum into octaves, at the same shares of it for every size, its corners included.

    >>> band_edges(224, 224)
    (0, 4, 8, 16, 32, 64, 112, 159)
    """
    side = min(height, width)
    corner = math.floor(side / math.sqrt(2)) + 1  # above every radius
    return tuple(sorted({round(edge * side / REFERENCE_SIDE) for edge in (0, *RINGS_AT_224)} | {corner}))


@constant
def _band_masks(height: int, width: int, edges: tuple[int, ...], device: torch.device) -> Tensor:
    radius = frequency_radius(height, width, device)
    return torch.stack([(low <= radius) & (radius < high) for low, high in pairwise(edges)])
