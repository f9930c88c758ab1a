"""Decoding small images once, to be held in memory; and what speaks against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch.utils.data import Dataset

from freqmask.console import readable_bytes
from freqmask.data.in_memory import InMemoryImages
from freqmask.data.loader import as_bad_image, make_loader
from freqmask.data.pixels import Picture, check_channels, convert_channels, is_empty, missing_pixels
from freqmask.data.sampler import runs_of_images
from freqmask.data.source import Source
from freqmask.data.transforms import Geometry, smallest_side
from freqmask.errors import BadImage, UserError

_HANDED_OVER = 64  # images that a worker hands over together: 5 MB at 160 pixels


class DoesNotFitError(Exception):
    """The images cannot be held in memory; the message says why, as the end of a sentence."""


@dataclass(frozen=True)
class Limits:
    """What images must be like to be held in memory: the longest side in pixels, the bytes of all together."""

    side: int
    bytes: int


def read_images(
    source: Source,
    geometries: Sequence[Geometry],
    limits: Limits,
    channels: int = 3,
    convert: bool = True,
    workers: int = 0,
    report: Callable[[int], None] = lambda count: None,
) -> InMemoryImages:
    """Decode all images of a source once, to be held on the host.

    Args:
        source: the images.
        geometries: how the views will be cut.
        limits: what the images must be like.
        channels: the channels of the views.
        convert: as for :class:`freqmask.data.loader.TrainDataset`; what cannot be converted is listed as bad.
        workers: processes that decode; 0 for none but this one.
        report: called now and then with the number of images read.

    Raises:
        DoesNotFitError: an image is beyond the limits or has gaps; no more are read.
    """
    dtype = _first_type(source)
    decoding = _Decoding(source, tuple(geometries), limits.side, dtype, channels, convert)
    whole = _Decoded()
    runs: Any = runs_of_images(len(source), source.blocks(), _HANDED_OVER)
    parts: Any = make_loader(decoding, runs, 1, workers, False, lambda part: part)
    for part in parts:
        if part.obstacle:
            raise DoesNotFitError(part.obstacle)
        whole.append(part)
        if whole.bytes > limits.bytes:
            raise DoesNotFitError(
                f"they take more than the {readable_bytes(limits.bytes)} there are for them"
            )
        report(len(whole.sizes))
    return _as_tensors(whole, source, dtype)


def _first_type(source: Source) -> str:
    """The sample type of the first image that can be opened, which the others must have, too."""
    for index in range(len(source)):
        try:
            with as_bad_image():
                return source.open(index).dtype
        except BadImage:
            continue
    raise DoesNotFitError("none of them can be opened")


@dataclass
class _Decoded:
    """Some images one behind the other; ``obstacle`` says why none can be held in memory."""

    pixels: list[np.ndarray] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    identities: list[int] = field(default_factory=list)
    flat: list[bool] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    obstacle: str = ""

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.pixels)

    def append(self, other: _Decoded) -> None:
        self.bad |= {len(self.sizes) + place: reason for place, reason in other.bad.items()}
        for name in ("pixels", "sizes", "identities", "flat"):
            getattr(self, name).extend(getattr(other, name))


@dataclass
class _Decoding(Dataset[_Decoded]):
    source: Source
    geometries: tuple[Geometry, ...]
    side: int
    dtype: str
    channels: int
    convert: bool

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, runs: Sequence[tuple[int, int]]) -> _Decoded | UserError:
        """The images of a run, which are those of a block where reading a part of one costs as much as all."""
        whole = _Decoded()
        try:
            for first, after in runs:
                for index in range(first, after):
                    self._decode(index, whole)
        except DoesNotFitError as obstacle:
            return _Decoded(obstacle=str(obstacle))
        except UserError as error:
            return error
        # one array travels faster than many
        whole.pixels = [np.concatenate(whole.pixels)] if whole.pixels else []
        return whole

    def _decode(self, index: int, whole: _Decoded) -> None:
        size, flat = (0, 0), False
        try:
            with as_bad_image():
                picture = self.source.open(index)
            check_channels(picture.channels, self.channels, self.convert)
            obstacle = self._too_much(picture)
            if obstacle is None:
                pixels, flat, obstacle = self._pixels(picture)
                size = pixels.shape[:2]
        except BadImage as error:
            whole.bad[len(whole.sizes)] = error.reason
        else:
            if obstacle is not None:
                raise DoesNotFitError(f"{self.source.name(index)} {obstacle}")
            whole.pixels.append(pixels.reshape(-1, pixels.shape[2]))
        whole.sizes.append(size)
        whole.identities.append(self.source.identity(index))
        whole.flat.append(flat)

    def _too_much(self, picture: Picture) -> str | None:
        if max(picture.size) > self.side:
            return f"has {picture.size[0]}x{picture.size[1]} pixels, more than {self.side} a side"
        if picture.dtype != self.dtype:
            return f"holds {picture.dtype}, others {self.dtype}"
        return None

    def _pixels(self, picture: Picture) -> tuple[np.ndarray, bool, str | None]:
        """Pixels (height, width, channel), whether windows may be empty, and why it cannot be held after all."""
        with as_bad_image():
            image = picture.decode()
        gaps = missing_pixels(image, picture.nodata)
        if gaps is not None and gaps.any():
            return image, False, "has missing values, which are filled window by window"
        reason = is_empty(image, None)
        if reason is not None:
            raise BadImage(reason)
        converted = convert_channels(image, self.channels)
        smallest = min(smallest_side(geometry, picture.size) for geometry in self.geometries)
        flat = has_flat_tile(converted, (smallest + 1) // 2)
        obstacle = None
        if flat and len(image) not in (1, self.channels):  # the loader looks before it leaves channels out
            obstacle = f"loses channels ({len(image)} to {self.channels}) and may be empty without them"
        return converted.transpose(1, 2, 0), flat, obstacle


def has_flat_tile(image: Shaped[np.ndarray, "channel height width"], side: int) -> bool:
    """Whether one of an image's square tiles of ``side`` pixels holds the same value everywhere.

    Where none does, no window of ``2 side - 1`` pixels or more is empty, because it holds a whole tile.
    """
    channels, height, width = image.shape
    rows, columns = height // side, width // side
    tiles = image[:, : rows * side, : columns * side].reshape(channels, rows, side, columns, side)
    flat: np.ndarray = (tiles.max(axis=(2, 4)) == tiles.min(axis=(2, 4))).all(axis=0)
    return bool(flat.any())


def _as_tensors(whole: _Decoded, source: Source, dtype: str) -> InMemoryImages:
    """The tensors; the list of arrays is emptied on the way, so that the images lie in memory twice at most."""
    if not whole.pixels:
        reason = next(iter(whole.bad.values()), "there are none")
        raise DoesNotFitError(f"none of them can be used ({reason})")
    pixels = np.concatenate(whole.pixels)
    whole.pixels.clear()
    sizes = torch.tensor(whole.sizes)
    counts = sizes.prod(dim=1)
    return InMemoryImages(
        torch.from_numpy(pixels.view(np.int16) if dtype == "uint16" else pixels),
        dtype,
        counts.cumsum(0) - counts,
        sizes.clamp(min=1),
        torch.tensor(whole.identities),
        torch.from_numpy(source.all_labels()),
        torch.tensor(whole.flat),
        whole.bad,
    )
