"""Decoding images once, to be kept on a device; and what speaks against keeping them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch.utils.data import Dataset

from freqmask.console import readable_bytes
from freqmask.data.dataset import as_bad_image
from freqmask.data.lanes import runs_of_images
from freqmask.data.loader import make_loader
from freqmask.data.pictures import Picture
from freqmask.data.pixels import check_channels, convert_channels, is_empty, missing_pixels
from freqmask.data.resident import ResidentImages
from freqmask.data.sources import Source
from freqmask.data.views import Geometry
from freqmask.data.windows import smallest_side
from freqmask.errors import BadImage, UserError

_AT_ONCE = 64  # images that a worker hands over together: 5 MB at 160 pixels


class NotKeptError(Exception):
    """The images cannot be kept on a device; the message says why, as the end of a sentence."""


@dataclass(frozen=True)
class Limits:
    """What images must be like to be kept.

    Args:
        side: longest side in pixels.
        bytes: of all of them together.
    """

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
) -> ResidentImages:
    """Decode all images of a source once.

    Args:
        source: the images.
        geometries: how the views will be cut.
        limits: what the images must be like.
        channels: the channels of the views.
        convert: True makes grey into colour and the other way round; False lists images with other channels
            as bad.
        workers: processes that decode; 0 for none but this one.
        report: called now and then with the number of images read.

    Returns:
        The images, on the host.

    Raises:
        NotKeptError: an image is beyond the limits or has gaps; no more are read.
    """
    dtype = _first_type(source)
    decoding = _Decoding(source, tuple(geometries), limits.side, dtype, channels, convert)
    whole = _Block()
    runs: Any = runs_of_images(len(source), source.blocks(), _AT_ONCE)
    blocks: Any = make_loader(decoding, runs, 1, workers, False, _together)
    for block in blocks:
        if block.obstacle is not None:
            raise NotKeptError(block.obstacle)
        whole.append(block)
        if whole.bytes > limits.bytes:
            raise NotKeptError(f"they take more than the {readable_bytes(limits.bytes)} there are for them")
        report(len(whole.sizes))
    return _resident(whole, source, dtype)


def _first_type(source: Source) -> str:
    """The sample type of the first image that can be opened, which the others must have, too."""
    for index in range(len(source)):
        try:
            with as_bad_image():
                return source.open(index).dtype
        except BadImage:
            continue
    raise NotKeptError("none of them can be opened")


@dataclass
class _Decoded:
    """One image: pixels (height, width, channel), or the reason why it is bad, or why none can be kept."""

    identity: int
    pixels: np.ndarray | None = None
    flat: bool = False
    bad: str = ""
    obstacle: str | None = None


@dataclass
class _Block:
    """Some images one behind the other, as a worker hands them over."""

    pixels: list[np.ndarray] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    identities: list[int] = field(default_factory=list)
    flat: list[bool] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    obstacle: str | None = None
    bytes: int = 0

    def append(self, other: _Block) -> None:
        """Put the images of another block behind those here."""
        self.bad |= {len(self.sizes) + place: reason for place, reason in other.bad.items()}
        self.pixels += other.pixels
        self.sizes += other.sizes
        self.identities += other.identities
        self.flat += other.flat
        self.bytes += other.bytes


class _Decoding(Dataset[_Decoded]):
    """Decodes image by image, in a worker."""

    def __init__(
        self,
        source: Source,
        geometries: tuple[Geometry, ...],
        side: int,
        dtype: str,
        channels: int,
        convert: bool,
    ) -> None:
        self.source, self.geometries, self.side, self.dtype = source, geometries, side, dtype
        self.channels, self.convert = channels, convert

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, runs: Sequence[tuple[int, int]]) -> list[_Decoded] | UserError:
        """The images of a run, which are those of a block where reading a part of one costs as much as all."""
        try:
            return [self[index] for first, after in runs for index in range(first, after)]
        except UserError as error:
            return error

    def __getitem__(self, index: int) -> _Decoded:
        identity = self.source.identity(index)
        try:
            with as_bad_image():
                picture = self.source.open(index)
            check_channels(picture.channels, self.channels, self.convert)
            reason = self._too_much(picture)
            if reason is None:
                pixels, flat, reason = self._pixels(picture)
        except BadImage as error:
            return _Decoded(identity, bad=error.reason)
        if reason is not None:
            return _Decoded(identity, obstacle=f"{self.source.name(index)} {reason}")
        return _Decoded(identity, pixels, flat)

    def _too_much(self, picture: Picture) -> str | None:
        """Why a picture cannot be kept, from its header."""
        if max(picture.size) > self.side:
            return f"has {picture.size[0]}x{picture.size[1]} pixels, more than {self.side} a side"
        if picture.dtype != self.dtype:
            return f"holds {picture.dtype}, others {self.dtype}"
        return None

    def _pixels(self, picture: Picture) -> tuple[np.ndarray, bool, str | None]:
        """Pixels (height, width, channel), whether windows may be empty, and why it cannot be kept after all."""
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
    """Whether one of the square tiles of an image holds the same value everywhere.

    Where none does, no window of ``2 side - 1`` pixels or more is empty, because it holds a whole tile.

    Args:
        image: any type, without missing values.
        side: of the tiles in pixels; at most that of the image.
    """
    channels, height, width = image.shape
    rows, columns = height // side, width // side
    tiles = image[:, : rows * side, : columns * side].reshape(channels, rows, side, columns, side)
    flat: np.ndarray = (tiles.max(axis=(2, 4)) == tiles.min(axis=(2, 4))).all(axis=0)
    return bool(flat.any())


def _together(images: list[_Decoded] | UserError) -> _Block | UserError:
    """A worker's images as one block: one array travels faster than many."""
    if isinstance(images, UserError):
        return images
    obstacle = next((image.obstacle for image in images if image.obstacle is not None), None)
    if obstacle is not None:
        return _Block(obstacle=obstacle)
    kept = [image.pixels for image in images if image.pixels is not None]
    flat = [pixels.reshape(-1, pixels.shape[2]) for pixels in kept]
    joined = [np.concatenate(flat)] if flat else []
    return _Block(
        joined,
        [image.pixels.shape[:2] if image.pixels is not None else (0, 0) for image in images],
        [image.identity for image in images],
        [image.flat for image in images],
        {place: image.bad for place, image in enumerate(images) if image.pixels is None},
        bytes=sum(part.nbytes for part in joined),
    )


def _resident(whole: _Block, source: Source, dtype: str) -> ResidentImages:
    """The tensors; the list of blocks is emptied on the way, so that the images lie in memory twice at most."""
    if not whole.pixels:
        reason = next(iter(whole.bad.values()), "there are none")
        raise NotKeptError(f"none of them can be used ({reason})")
    pixels = np.concatenate(whole.pixels)
    whole.pixels.clear()
    sizes = torch.tensor(whole.sizes)
    counts = sizes.prod(dim=1)
    return ResidentImages(
        torch.from_numpy(pixels.view(np.int16) if dtype == "uint16" else pixels),
        dtype,
        counts.cumsum(0) - counts,
        sizes.clamp(min=1),
        torch.tensor(whole.identities),
        torch.from_numpy(source.all_labels()),
        torch.tensor(whole.flat),
        whole.bad,
    )
