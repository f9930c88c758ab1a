"""Filters that look at the radius alone: low-pass, high-pass, bands and rings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from freqmask.errors import UserError, nearest
from freqmask.filters.filter import Complement, Filter
from freqmask.rng import uniform
from freqmask.spectrum import REFERENCE_SIDE, constant, frequency_radius, inside

Radius = float | Literal["auto"]
Edge = Literal["sigmoid", "gaussian"]

DEFAULT_RADIUS_AT_224 = 16  # MFM's (arXiv 2206.07706), in bins of a 224-pixel image; words has an own
RINGS_AT_224 = (4, 8, 16, 32, 64, 112)  # octaves; the last is the largest whole circle


def exact_radius(radius: Radius, height: int, width: int) -> Fraction:
    """The radius as an exact number: decimals as written (0.1 is a tenth), ``auto`` is 16 at 224 pixels.

    Args:
        radius: in cycles per shorter side (bins of a square image), or ``"auto"``.
        height: H in pixels.
        width: W in pixels.

    Returns:
        The radius; ``auto`` (``DEFAULT_RADIUS_AT_224``) scales with the shorter side.
    """
    if isinstance(radius, str):
        return Fraction(DEFAULT_RADIUS_AT_224 * min(height, width), REFERENCE_SIDE)
    return Fraction(str(radius))


def _check_radius(name: str, radius: Radius) -> None:
    if isinstance(radius, str):
        if radius != "auto":
            raise UserError(
                f"{name} ({radius!r}) must be a number or 'auto'; "
                f"'auto' is {DEFAULT_RADIUS_AT_224} at {REFERENCE_SIDE} pixels"
            )
    elif not (math.isfinite(radius) and radius >= 0):
        raise UserError(f"{name} ({radius}) must be a finite number of at least 0; try 'auto'")


def _check_softness(softness: float, edge: str) -> None:
    if not (math.isfinite(softness) and softness >= 0):
        raise UserError(f"softness ({softness}) must be at least 0 bins; 0 is a hard edge")
    if edge not in ("sigmoid", "gaussian"):
        raise UserError(f"edge ({edge!r}) must be a known edge; {nearest(edge, ('sigmoid', 'gaussian'))}")


def _check_reach(name: str, radius: Radius, image_size: tuple[int, int]) -> None:
    limit = min(image_size) / 2
    if not isinstance(radius, str) and radius > limit:
        raise UserError(
            f"{name} ({radius}) must be at most {limit:g} for {min(image_size)}-pixel images; "
            "try --radius auto"
        )


@constant
def disc(
    size: tuple[int, int],
    radius: Radius,
    softness: float,
    edge: Edge,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Low-pass map: 1 in the middle, 0 outside.

    Hard: r^2 < radius^2, decided in integers. ``sigmoid``: 1 / (1 + exp((r - radius) / softness)).
    ``gaussian``: 1 up to the radius, exp(-(r - radius)^2 / (2 softness^2)) beyond; radius 0 makes it the
    Gaussian exp(-r^2 / 2 sigma^2).

    Args:
        size: (H, W) of the images.
        radius: in cycles per shorter side.
        softness: width of the edge in the same unit, 0 for a hard one.
        edge: the edge's shape.
        device: where the map is wanted.
        dtype: in what precision.

    Returns:
        (H, W // 2 + 1).
    """
    exact = exact_radius(radius, *size)
    if softness == 0:
        return inside(*size, exact).to(device, dtype)
    beyond = frequency_radius(*size).double() - float(exact)
    if edge == "sigmoid":
        return torch.sigmoid(-beyond / softness).to(device, dtype)
    return torch.exp(-0.5 * (beyond.clamp_min(0) / softness).square()).to(device, dtype)


class LowPass(Filter):
    """Keeps the frequencies nearer to DC than a radius: r^2 < radius^2 (MFM, arXiv 2206.07706).

    Args:
        radius: in bins of a square image, else in cycles per shorter side; may be fractional, decimals
            count as written. ``"auto"``: 16 at 224 pixels, scaled with the shorter side.
        softness: width of the edge in the same unit; 0 is the papers' hard edge.
        edge: ``"sigmoid"`` or ``"gaussian"``, see ``disc``; only with softness.

    Raises:
        UserError: for a setting out of range.
    """

    name = "lowpass"

    def __init__(self, radius: Radius = "auto", softness: float = 0.0, edge: Edge = "sigmoid") -> None:
        super().__init__()
        _check_radius("radius", radius)
        _check_softness(softness, edge)
        self.radius, self.softness, self.edge = radius, softness, edge

    def keep(self, spectrum: Tensor, size: tuple[int, int], keys: Tensor) -> Tensor:
        """The same map for every image, see ``Filter.keep``."""
        mask = disc(size, self.radius, self.softness, self.edge, spectrum.device, spectrum.real.dtype)
        return mask.expand(len(spectrum), 1, -1, -1)  # one map for the whole batch, without a copy

    def check(self, image_size: tuple[int, int]) -> None:
        """The radius must lie in the spectrum."""
        _check_reach("radius", self.radius, image_size)


class HighPass(Complement):
    """Keeps the complement of ``LowPass``, whose arguments it has: r^2 >= radius^2."""

    name, of = "highpass", LowPass


class BandPass(Filter):
    """Keeps low^2 <= r^2 < high^2.

    Args:
        low: inner radius, as ``LowPass``'s.
        high: outer radius, above ``low``.
        softness: width of both edges; 0 is hard.
        edge: their shape.

    Raises:
        UserError: for a setting out of range.
    """

    name = "bandpass"

    def __init__(self, low: float, high: float, softness: float = 0.0, edge: Edge = "sigmoid") -> None:
        super().__init__()
        _check_radius("low", low)
        _check_radius("high", high)
        _check_softness(softness, edge)
        if isinstance(low, str) or isinstance(high, str) or low >= high:
            raise UserError(
                f"low ({low}) and high ({high}) must be numbers, low below high; try low=4 and high=16"
            )
        self.low, self.high, self.softness, self.edge = low, high, softness, edge

    def keep(self, spectrum: Tensor, size: tuple[int, int], keys: Tensor) -> Tensor:
        """The same map for every image, see ``Filter.keep``."""
        settings = (self.softness, self.edge, spectrum.device, spectrum.real.dtype)
        mask = disc(size, self.high, *settings) - disc(size, self.low, *settings)
        return mask.expand(len(spectrum), 1, -1, -1)

    def check(self, image_size: tuple[int, int]) -> None:
        """The inner radius must lie in the spectrum; the outer one may contain all of it."""
        _check_reach("low", self.low, image_size)


class BandStop(Complement):
    """Keeps the complement of ``BandPass``, whose arguments it has: r < low or r >= high."""

    name, of = "bandstop", BandPass


@constant
def rings(
    size: tuple[int, int],
    edges: tuple[float, ...] | None,
    softness: float,
    edge: Edge,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The rings between neighboring edges.

    Args:
        size: (H, W) of the images.
        edges: radii, rising; ``None``: octaves, see ``Rings``.
        softness: see ``disc``.
        edge: see ``disc``.
        device: where the maps are wanted.
        dtype: in what precision.

    Returns:
        (rings, H, W // 2 + 1), disjoint where the edges are hard.
    """
    if edges is None:
        edges = tuple(radius * min(size) / REFERENCE_SIDE for radius in RINGS_AT_224)
    discs = torch.stack([disc(size, radius, softness, edge, device, dtype) for radius in edges])
    return discs[1:] - discs[:-1]


class Rings(Filter):
    """Stops a random subset of rings; what lies inside the first edge and outside the last is kept.

    Args:
        edges: rising radii, the first above 0 (the center with DC is protected); ``"auto"``: 4, 8, 16,
            32, 64, 112 at 224 pixels, scaled with the shorter side.
        share: of the rings are stopped in each image, rounded, at least one; in (0, 1].
        softness: width of the edges; 0 is hard.
        edge: their shape.

    Raises:
        UserError: for a setting out of range.
    """

    name = "rings"

    def __init__(
        self,
        edges: Sequence[float] | Literal["auto"] = "auto",
        share: float = 0.5,
        softness: float = 0.0,
        edge: Edge = "sigmoid",
    ) -> None:
        super().__init__()
        _check_softness(softness, edge)
        if isinstance(edges, str):
            if edges != "auto":
                raise UserError(f"edges ({edges!r}) must be radii or 'auto'; try edges=[4, 8, 16]")
        elif len(edges) < 2 or edges[0] <= 0 or any(a >= b for a, b in pairwise(edges)):
            raise UserError(
                f"edges ({list(edges)}) must be at least two radii, rising, above 0; try edges=[4, 8, 16]"
            )
        if not 0 < share <= 1:
            raise UserError(f"share ({share}) must be above 0 and at most 1; 0.5 stops half of the rings")
        self.edges = edges if isinstance(edges, str) else tuple(edges)
        self.share, self.softness, self.edge = share, softness, edge

    def keep(self, spectrum: Tensor, size: tuple[int, int], keys: Tensor) -> Tensor:
        """Each image's own subset, see ``Filter.keep``."""
        edges = None if isinstance(self.edges, str) else self.edges
        maps = rings(size, edges, self.softness, self.edge, spectrum.device, spectrum.real.dtype)
        count = max(1, round(self.share * len(maps)))
        order = uniform(keys, "rings", (len(maps),)).argsort(dim=-1, stable=True).argsort(dim=-1)
        stopped = (order < count).to(maps.dtype)  # (batch, rings)
        # a sum, not a matrix product: autocast would round a soft edge to eight bits
        return 1.0 - (stopped[:, :, None, None] * maps).sum(1, keepdim=True)

    def check(self, image_size: tuple[int, int]) -> None:
        """The first ring must lie in the spectrum."""
        if not isinstance(self.edges, str):
            _check_reach("edges[0]", self.edges[0], image_size)
