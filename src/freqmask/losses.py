"""The reconstruction loss in the frequency domain; FOLK's distillation loss is in ``methods/folk.py``."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as distributed
from jaxtyping import Float
from torch import Tensor, nn

from freqmask.errors import UserError, nearest
from freqmask.spectrum import Images, bin_weights, image_size, irfft2, power, rfft2, single_or_double

Reduce = Literal["batch", "image"]

_SOFT = 1e-12  # beneath the root of a magnitude, whose gradient is else infinite at zero
_SMALL = 1e-12  # a batch in which nothing is hidden gives 0, not 0 / 0


def processes() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum over all processes, without a gradient.

    Args:
        values: of the same shape in every process.

    Returns:
        A new tensor; the values themselves where there is one process.
    """
    if processes() == 1:
        return values.detach()
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total


def spectrum_distance(
    prediction: Images, target: Images, gamma: float = 1.0, focal: float | None = None
) -> Float[Tensor, "batch channel height half_width"]:
    """Distance |F(prediction) - F(target)|^gamma for every bin of the half spectrum (MFM, arXiv 2206.07706).

    The transform is linear, so one FFT of the difference does; |z| is sqrt(re^2 + im^2 + 1e-12), whose
    gradient is finite at zero.

    Args:
        prediction: image space, any scale.
        target: likewise.
        gamma: the power of the distance.
        focal: exponent of the focal weight of Jiang et al. 2021, |d|^focal over its maximum of each image and
            channel, held constant in the backward pass; ``None``: no weight.

    Returns:
        Distances, float32 or float64.
    """
    magnitude = torch.sqrt(power(rfft2(single_or_double(prediction) - single_or_double(target))) + _SOFT)
    distance = magnitude if gamma == 1.0 else magnitude**gamma
    if focal is None:
        return distance
    weight = magnitude.detach() ** focal
    return distance * weight / weight.amax(dim=(-2, -1), keepdim=True)


class _WeightedSums(torch.autograd.Function):
    """Each image's sum of w |F(difference)|^gamma over the full spectrum, with its gradient by one inverse FFT."""

    # Autograd's own way back from a half spectrum is a complex FFT of twice the size and several copies. Here the
    # gradient's spectrum, w gamma |F|^(gamma - 2) F, is made where |F| is at hand.

    @staticmethod
    def forward(
        ctx: Any, difference: Tensor, weight: Tensor, pairs: Tensor, gamma: float, focal: float | None
    ) -> Tensor:
        spectrum = rfft2(difference)
        magnitude = torch.sqrt(power(spectrum) + _SOFT)
        distance = magnitude if gamma == 1.0 else magnitude**gamma
        if focal is not None:
            focus = magnitude**focal
            weight = weight * (focus / focus.amax(dim=(-2, -1), keepdim=True))
        if ctx.needs_input_grad[0]:
            slope = weight / magnitude if gamma == 1.0 else gamma * weight * magnitude ** (gamma - 2)
            ctx.save_for_backward(spectrum * slope)
            ctx.size = image_size(difference)
        weighted = weight * pairs
        if weight.shape[1] == 1:  # the channels have one mask: they are added up first, which is less to read
            return (weighted * distance.sum(1, keepdim=True)).sum((1, 2, 3))
        return (weighted * distance).sum((1, 2, 3))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (spectrum,) = ctx.saved_tensors
        # the inverse counts a pair twice, as the sum over the full spectrum does
        back = irfft2(spectrum, ctx.size)
        return back * gradient[:, None, None, None], None, None, None, None


class SpectrumLoss(nn.Module):
    """Mean distance between two spectra over the frequencies that were hidden.

    With w = masked_weight (1 - keep) + kept_weight keep, broadcast to all channels, and sums over the full
    spectrum: sum(w d) / sum(w) over the batch or, with ``reduce="image"``, for each image and then averaged
    (MFM, arXiv 2206.07706). Weights (1, 0) are the paper's, (1, 1) the whole spectrum.

    Args:
        masked_weight: weight of the hidden frequencies, at least 0.
        kept_weight: weight of the visible ones, at least 0.
        reduce: ``"batch"``: one quotient over the batches of all processes; ``"image"``: the mean of the
            images' quotients, which adds up over processes and accumulation.
        gamma: power of the distance, above 0.
        focal: exponent of the focal weight, or ``None`` (the paper's).

    Raises:
        UserError: for a setting out of range.
    """

    def __init__(
        self,
        masked_weight: float = 1.0,
        kept_weight: float = 0.0,
        reduce: Reduce = "batch",
        gamma: float = 1.0,
        focal: float | None = None,
    ) -> None:
        super().__init__()
        if min(masked_weight, kept_weight) < 0 or masked_weight + kept_weight <= 0:
            raise UserError(
                f"masked_weight ({masked_weight}) and kept_weight ({kept_weight}) must be at least 0 and not "
                "both 0; the paper's are 1 and 0"
            )
        if reduce not in ("batch", "image"):
            raise UserError(
                f"reduce ({reduce!r}) must be a known reduction; {nearest(reduce, ('batch', 'image'))}"
            )
        if gamma <= 0:
            raise UserError(f"gamma ({gamma}) must be above 0; the paper's is 1")
        self.masked_weight, self.kept_weight = masked_weight, kept_weight
        self.reduce, self.gamma, self.focal = reduce, gamma, focal

    def forward(
        self,
        prediction: Images,
        target: Images,
        keep: Float[Tensor, "batch mask_channel height half_width"] | None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            prediction: image space.
            target: image space.
            keep: 1 where the network saw the frequency, of 1 or C channels; ``None``: every frequency counts
                alike (the restoration tasks' mean(d)).

        Returns:
            A scalar. Under torch.distributed ``"batch"`` divides by the mean over processes of sum(w), so
            that DDP's mean of gradients is the gradient of one process with the whole batch.
        """
        difference = single_or_double(prediction) - single_or_double(target)
        pairs = bin_weights(*image_size(difference), difference.device, difference.dtype)
        weight = self.weights(pairs, keep)
        sums = _WeightedSums.apply(difference, weight, pairs, self.gamma, self.focal)
        over = (weight * pairs).expand(len(difference), -1, -1, -1).sum((1, 2, 3))
        over = over * (difference.shape[1] // weight.shape[1])
        if self.reduce == "image":
            return (sums / over.clamp_min(_SMALL)).mean()
        total = sum_over_processes(over.sum()) / processes()
        return sums.sum() / total.clamp_min(_SMALL)

    def weights(
        self,
        pairs: Float[Tensor, "height half_width"],
        keep: Float[Tensor, "batch mask_channel height half_width"] | None,
    ) -> Float[Tensor, "any mask_channel height half_width"]:
        """The weight w of every bin, not yet counted for its partner.

        Args:
            pairs: ``bin_weights`` of the size, whose device and precision the result gets.
            keep: as in ``forward``.
        """
        if keep is None:
            return torch.ones_like(pairs)[None, None]
        return self.masked_weight + (self.kept_weight - self.masked_weight) * keep.detach().to(pairs.dtype)
