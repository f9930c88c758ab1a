"""Filters that rank the bins of each image: Com and RCom, by energy, at random.

All of them rank one representative of every conjugate pair and mirror the choice, so that the filtered
image is real, and cut the ranking where the count of the full spectrum is reached. ``size`` is (H, W) of the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from freqmask.errors import UserError, nearest
from freqmask.filters.filter import Complement, Filter
from freqmask.options.of_methods import COM_FRACTIONS
from freqmask.rng import uniform
from freqmask.spectrum import LUMA, bin_weights, constant, power, self_conjugate_columns

Magnitude = Literal["luma", "mean", "each"]

_FLAT = 1e-6  # a channel whose root mean square is below this share of its mean is constant but for rounding


@constant
def full_counts(size: tuple[int, int], device: torch.device) -> Tensor:
    """How many bins of the full spectrum each bin of the half stands for, when one partner is ranked.

    Returns:
        int64 (H (W // 2 + 1),): 2 for a pair, 1 for a bin that is its own partner, 0 for the second stored
        partner of a pair.
    """
    height, width = size
    columns = self_conjugate_columns(width)
    counts = torch.full((height, width // 2 + 1), 2, dtype=torch.int64)
    counts[height // 2 + 1 :, columns] = 0
    for row in {0, height // 2} if height % 2 == 0 else {0}:
        counts[row, columns] = 1
    return counts.flatten().to(device)


@constant
def tie_order(size: tuple[int, int], device: torch.device) -> Tensor:
    """Which of equally strong bins comes first.

    Returns:
        int64 (H (W // 2 + 1),), falling from bin to bin; -1 for the second stored partner of a pair.
    """
    counts = full_counts(size, torch.device("cpu"))
    return torch.arange(len(counts) - 1, -1, -1).where(counts > 0, -1).to(device)


def representatives(size: tuple[int, int]) -> int:
    """How many conjugate pairs, self-conjugate bins included, a spectrum has.

    Returns:
        The number of bins that are free to choose.
    """
    height, width = size
    alone = (1 if height % 2 else 2) * (1 if width % 2 else 2)
    return (height * width + alone) // 2


def ranking(score: Tensor, size: tuple[int, int]) -> Int64[Tensor, "batch mask_channel bins"]:
    """Scores as integers of the same order and without ties: the float's bits, then the place.

    The bits of non-negative floats rise with the floats. Ranking integers costs no more than ranking floats
    (``benchmarks/masks.py``) and makes the choice the same on every device.

    Args:
        score: (batch, mask_channel, H, W // 2 + 1), non-negative, ranked in float32.
        size: (H, W) of the images.

    Returns:
        int64, -1 for a bin whose partner is stored as well.
    """
    bits = score.float().contiguous().view(torch.int32).flatten(-2).to(torch.int64)
    return (bits << 32) | tie_order(size, score.device)  # anything | -1 is -1


def mirror(kept: Bool[Tensor, "*batch height half_width"], width: int) -> Tensor:
    """Gives the second stored partner of a pair what the first one has."""
    height = kept.shape[-2]
    for column in self_conjugate_columns(width):
        kept[..., height // 2 + 1 :, column] = kept[..., 1 : (height + 1) // 2, column].flip(-1)
    return kept


def strongest(
    score: Float[Tensor, "batch mask_channel height half_width"],
    size: tuple[int, int],
    count: Int64[Tensor, "batch mask_channel"],
    most: int,
) -> Bool[Tensor, "batch mask_channel height half_width"]:
    """The highest scores, so many that the full spectrum keeps ``count`` bins to within one pair.

    Args:
        score: non-negative.
        size: (H, W) of the images.
        count: bins of the full spectrum; never exceeded, missed by at most one.
        most: an upper bound of all counts, known without asking the device.

    Returns:
        True = kept; both partners of a pair alike.
    """
    order = ranking(score, size)
    # at most four bins are their own partner, and only they need less than half a place of the count
    top, places = order.topk(min(most // 2 + 4, representatives(size)), dim=-1)
    totals = full_counts(size, score.device)[places].cumsum(-1)
    kept = (totals <= count[..., None]).sum(-1, keepdim=True)
    return cut(order, top, kept, score.shape, size)


def cut(order: Tensor, top: Tensor, kept: Tensor, shape: torch.Size, size: tuple[int, int]) -> Tensor:
    """Keeps the first ``kept`` of the ranking ``top``: a comparison with the last of them, no scatter."""
    last = top.gather(-1, (kept - 1).clamp_min(0))
    chosen = (order >= last) & (kept > 0)
    return mirror(chosen.view(shape), size[1])


def score_of(spectrum: Tensor, magnitude: Magnitude, size: tuple[int, int]) -> Tensor:
    """What the ranking of one mask sees: the power of luma, of the channels' mean, or of each channel.

    The transform is linear, so luma's spectrum is the weighted sum of the channels' spectra.

    Args:
        spectrum: (batch, C, H, W // 2 + 1).
        magnitude: as in ``Com``; luma falls back to the mean unless there are three channels.
        size: (H, W) of the images.

    Returns:
        (batch, 1 or C, H, W // 2 + 1).
    """
    channels = spectrum.shape[1]
    if magnitude == "each" or channels == 1:
        return power(spectrum)
    if magnitude == "luma" and channels == 3:
        # in real numbers, which a compiler makes one kernel of
        red, green, blue = torch.view_as_real(spectrum).unbind(1)
        luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
        squares = luma.square_()
        return (squares[..., 0] + squares[..., 1])[:, None]
    return power((spectrum * equalizing(power(spectrum), size)).sum(1, keepdim=True))


def equalizing(energy: Float[Tensor, "batch channel height half_width"], size: tuple[int, int]) -> Tensor:
    """Weights that give all channels the same contrast: 1 / root mean square without DC.

    Args:
        energy: power of the half spectra.
        size: (H, W) of the images.

    Returns:
        (batch, channel, 1, 1); 0 for a constant channel, whose rounding errors would else be blown up.
    """
    height, width = size
    total = (energy * bin_weights(*size, energy.device, energy.dtype)).sum((-2, -1), keepdim=True)
    constant_part = energy[..., :1, :1]
    deviation = ((total - constant_part).clamp_min(0) / max(height * width - 1, 1)).sqrt()
    flat = deviation <= _FLAT * (constant_part / (height * width)).sqrt()
    return torch.where(flat, 0.0, 1.0 / deviation.clamp_min(torch.finfo(energy.dtype).tiny))


@constant
def _counts(size: tuple[int, int], fractions: tuple[float, ...], device: torch.device) -> Tensor:
    total = size[0] * size[1]
    return torch.tensor([max(1, round(fraction * total)) for fraction in fractions], device=device)


def _check_fractions(name: str, fractions: Sequence[float]) -> tuple[float, ...]:
    if not len(fractions) or not all(0 < fraction <= 1 for fraction in fractions):
        raise UserError(
            f"{name} ({list(fractions)}) must be above 0 and at most 1; "
            f"FOLK's are {', '.join(map(str, COM_FRACTIONS))}"
        )
    return tuple(float(fraction) for fraction in fractions)


def _check_magnitude(magnitude: str) -> None:
    names = ("luma", "mean", "each")
    if magnitude not in names:
        raise UserError(f"magnitude ({magnitude!r}) must be a known one; {nearest(magnitude, names)}")


class Com(Filter):
    """Keeps the strongest frequencies of each image (FOLK, arXiv 2409.10362).

    The bins of the full spectrum kept are ``fraction * H * W`` to within one conjugate pair, at least one; of
    equal magnitudes the first in the half spectrum's order wins.

    Args:
        fractions: one is drawn for each image with equal chance; each in (0, 1].
        magnitude: of what. ``"luma"`` (ITU-R 601) for three channels, else as ``"mean"``: the mean of the
            channels' spectra, each divided by its own root mean square without DC; ``"each"``: every
            channel has a mask of its own. FOLK's choice is not public.

    Raises:
        UserError: for a setting out of range.
    """

    name = "com"

    def __init__(self, fractions: Sequence[float] = COM_FRACTIONS, magnitude: Magnitude = "luma") -> None:
        super().__init__()
        _check_magnitude(magnitude)
        self.fractions = _check_fractions("fractions", fractions)
        self.magnitude = magnitude

    def keep(self, spectrum: Tensor, size: tuple[int, int], keys: Tensor) -> Tensor:
        """Each image's own mask, see ``Filter.keep``."""
        score = score_of(spectrum.detach(), self.magnitude, size)
        table = _counts(size, self.fractions, spectrum.device)
        drawn = table[(uniform(keys, "com/fraction") * len(self.fractions)).long()]
        most = max(1, round(max(self.fractions) * size[0] * size[1]))
        return strongest(score, size, drawn[:, None], most).to(spectrum.real.dtype)


class RCom(Complement):
    """Keeps all but the strongest frequencies of each image: the complement of ``Com``, with its arguments."""

    name, of = "rcom", Com


class Energy(Filter):
    """Keeps DC and the fewest, strongest other frequencies that hold a share of the energy without DC.

    Args:
        share: of the energy, in (0, 1].
        magnitude: whose energy, as ``Com``'s.

    Raises:
        UserError: for a setting out of range.
    """

    name = "energy"

    def __init__(self, share: float = 0.9, magnitude: Magnitude = "luma") -> None:
        super().__init__()
        _check_magnitude(magnitude)
        if not 0 < share <= 1:
            raise UserError(f"share ({share}) must be above 0 and at most 1; try 0.9")
        self.share, self.magnitude = share, magnitude

    def keep(self, spectrum: Tensor, size: tuple[int, int], keys: Tensor) -> Tensor:
        """Each image's own mask, see ``Filter.keep``."""
        score = score_of(spectrum.detach(), self.magnitude, size)
        score[..., 0, 0] = torch.inf  # first in the ranking, without a part in the sum
        order = ranking(score, size)
        top, places = order.topk(representatives(size), dim=-1)
        counts = full_counts(size, score.device)[places]
        energy = torch.where(places == 0, 0.0, score.flatten(-2).gather(-1, places)) * counts
        # float32 would lose the weak tail of a large spectrum; MPS has no float64
        held = energy.cumsum(-1, dtype=torch.float32 if energy.device.type == "mps" else torch.float64)
        before = held - energy
        kept = (before < self.share * held[..., -1:]).sum(-1, keepdim=True).clamp_min(1)
        return cut(order, top, kept, score.shape, size).to(spectrum.real.dtype)


class REnergy(Complement):
    """Keeps what ``Energy``, whose arguments it has, hides: the weak frequencies, without DC."""

    name, of = "renergy", Energy


class RandomBins(Filter):
    """Keeps as many frequencies as ``Com`` would, at random places: the control experiment.

    Args:
        fraction: of the full spectrum's bins that is kept, to within one pair; in (0, 1].

    Raises:
        UserError: for a fraction out of range.
    """

    name = "randombins"

    def __init__(self, fraction: float = 0.5) -> None:
        super().__init__()
        _check_fractions("fraction", [fraction])
        self.fraction = fraction

    def keep(self, spectrum: Tensor, size: tuple[int, int], keys: Tensor) -> Tensor:
        """Each image's own mask, see ``Filter.keep``."""
        score = uniform(keys, "randombins", (1, *spectrum.shape[-2:]))
        count = _counts(size, (self.fraction,), spectrum.device).expand(len(spectrum), 1)
        most = max(1, round(self.fraction * size[0] * size[1]))
        return strongest(score, size, count, most).to(spectrum.real.dtype)
