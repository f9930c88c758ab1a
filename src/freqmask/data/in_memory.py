"""Small images in memory: decoded once, on the device, and cut into the batches that the loader would make.

All but the pixels stays on the host, where windows are drawn. On a CPU each window is resampled by the loader's own
function, bit for bit; on a GPU all windows of a batch at once (`freqmask.data.transforms`), because a few launches
per image would take longer than a step of a small network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor
from torch.utils.data import Dataset

from freqmask.console import readable_bytes
from freqmask.data.loader import (
    WINDOWS,
    Skipped,
    TrainSampler,
    as_it_is,
    candidates,
    make_loader,
    none_usable,
)
from freqmask.data.pixels import as_bad_image, check_channels, convert_channels, is_empty, missing_pixels
from freqmask.data.source import Source, runs_of_images
from freqmask.data.transforms import (
    Geometry,
    are_empty,
    cut_windows,
    draw_flips,
    resample,
    resize,
    smallest_side,
)
from freqmask.data.values import ValueRange
from freqmask.errors import BadImage, UserError
from freqmask.rng import Keys, combine, sample_keys

_HANDED_OVER = 64  # images that a worker hands over together: 5 MB at 160 pixels
_FRAME = 8  # frames grow in steps of that many pixels, so that batches reuse each other's memory
_DRAWN_AHEAD = 1024  # samples whose windows are drawn together: as many small operations as for a few
_AT_ONCE = 2**26  # float values that are resampled together: 256 MB, a batch of 870 windows of 160 pixels

Indices = Int64[Tensor, " batch"]
Boxes = Int64[Tensor, "view batch 4"]  # (top, left, height, width) of the windows of each view


@dataclass
class InMemoryImages:
    """Decoded images in one tensor, pixel beside pixel, in the type of their files."""

    pixels: Shaped[Tensor, "pixel channel"]  # one image behind the other, line by line; uint16 in int16
    dtype: str  # the sample type as in the files
    starts: Int64[Tensor, " image"]  # where each image begins in the pixels
    sizes: Int64[Tensor, "image 2"]  # (height, width) of each image; of an unreadable one (1, 1)
    identities: Int64[Tensor, " image"]  # each image's own number
    labels: Int64[Tensor, " image"]  # class of each image, -1 where unknown
    flat: Bool[Tensor, " image"]  # True where a window may hold one value only: each is looked at
    bad: dict[int, str]  # index -> reason of the images that cannot be used

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def bytes(self) -> int:
        """What the pixels take on the device."""
        return self.pixels.nbytes

    def to(self, device: torch.device) -> InMemoryImages:
        """Itself, its pixels moved to a device."""
        self.pixels = self.pixels.to(device)
        return self


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
    pixels: list[np.ndarray] = []
    entries: list[_Entry] = []
    taken = 0
    runs: Any = runs_of_images(len(source), source.blocks(), _HANDED_OVER)
    parts: Any = make_loader(decoding, runs, 1, workers, False, as_it_is)
    for part in parts:
        if isinstance(part, DoesNotFitError):
            raise part
        pixels += part[0]
        entries += part[1]
        taken += sum(array.nbytes for array in part[0])
        if taken > limits.bytes:
            raise DoesNotFitError(
                f"they take more than the {readable_bytes(limits.bytes)} there are for them"
            )
        report(len(entries))
    bad = {index: entry.reason for index, entry in enumerate(entries) if entry.reason}
    if not pixels:
        reason = next(iter(bad.values()), "there are none")
        raise DoesNotFitError(f"none of them can be used ({reason})")
    joined = np.concatenate(pixels)
    pixels.clear()  # so that the images lie in memory twice at most
    sizes = torch.tensor([entry.size for entry in entries])
    counts = sizes.prod(dim=1)
    return InMemoryImages(
        torch.from_numpy(joined.view(np.int16) if dtype == "uint16" else joined),
        dtype,
        counts.cumsum(0) - counts,
        sizes.clamp(min=1),
        torch.tensor([entry.identity for entry in entries]),
        torch.from_numpy(source.all_labels()),
        torch.tensor([entry.flat for entry in entries]),
        bad,
    )


def _first_type(source: Source) -> str:
    """The sample type of the first image that can be opened, which the others must have, too."""
    for index in range(len(source)):
        with suppress(BadImage), as_bad_image():
            return source.open(index).dtype
    raise DoesNotFitError("none of them can be opened")


class _Entry(NamedTuple):
    """An image beside its pixels, which are missing where there is a reason."""

    size: tuple[int, int]
    identity: int
    flat: bool
    reason: str = ""


@dataclass
class _Decoding(Dataset[Any]):
    source: Source
    geometries: tuple[Geometry, ...]
    side: int
    dtype: str
    channels: int
    convert: bool

    def __getitems__(
        self, runs: Sequence[tuple[int, int]]
    ) -> tuple[list[np.ndarray], list[_Entry]] | DoesNotFitError | UserError:
        """The images of a run, which are those of a block where reading a part of one costs as much as all."""
        pixels, entries = [], []
        for index in (index for run in runs for index in range(*run)):
            identity = self.source.identity(index)
            try:
                image, flat = self._decode(index)
            except BadImage as error:
                entries.append(_Entry((0, 0), identity, False, error.reason))
            except DoesNotFitError as obstacle:
                return DoesNotFitError(f"{self.source.name(index)} {obstacle}")
            except UserError as error:
                return error
            else:
                pixels.append(image.reshape(-1, image.shape[2]))
                entries.append(_Entry(image.shape[:2], identity, flat))
        # one array travels faster than many
        return ([np.concatenate(pixels)] if pixels else []), entries

    def _decode(self, index: int) -> tuple[np.ndarray, bool]:
        """Pixels (height, width, channel), and whether windows may be empty."""
        with as_bad_image():
            picture = self.source.open(index)
        check_channels(picture.channels, self.channels, self.convert)
        if max(picture.size) > self.side:
            height, width = picture.size
            raise DoesNotFitError(f"has {height}x{width} pixels, more than {self.side} a side")
        if picture.dtype != self.dtype:
            raise DoesNotFitError(f"holds {picture.dtype}, others {self.dtype}")
        with as_bad_image():
            image = picture.decode()
        gaps = missing_pixels(image, picture.nodata)
        if gaps is not None and gaps.any():
            raise DoesNotFitError("has missing values, which are filled window by window")
        reason = is_empty(image, None)
        if reason is not None:
            raise BadImage(reason)
        converted = convert_channels(image, self.channels)
        smallest = min(smallest_side(geometry, picture.size) for geometry in self.geometries)
        flat = has_flat_tile(converted, (smallest + 1) // 2)
        if flat and len(image) not in (1, self.channels):  # the loader looks before it leaves channels out
            raise DoesNotFitError(
                f"loses channels ({len(image)} to {self.channels}) and may be empty without them"
            )
        return converted.transpose(1, 2, 0), flat


def has_flat_tile(image: Shaped[np.ndarray, "channel height width"], side: int) -> bool:
    """Whether one of an image's square tiles of ``side`` pixels holds the same value everywhere.

    Where none does, no window of ``2 side - 1`` pixels or more is empty, because it holds a whole tile.
    """
    channels, height, width = image.shape
    rows, columns = height // side, width // side
    tiles = image[:, : rows * side, : columns * side].reshape(channels, rows, side, columns, side)
    flat: np.ndarray = (tiles.max(axis=(2, 4)) == tiles.min(axis=(2, 4))).all(axis=0)
    return bool(flat.any())


@dataclass(eq=False)
class InMemoryBatches:
    """The batches of a training, as :func:`freqmask.data.loader.make_loader` makes them from files.

    Which image comes when, its key, its windows, what replaces a bad one: all as the loader has it. Views on a CPU
    are the loader's bit for bit, on a GPU to two levels of 255.
    """

    images: InMemoryImages
    source: Source
    sampler: TrainSampler
    geometries: Sequence[Geometry]
    value_range: ValueRange = ValueRange()  # noqa: RUF009  frozen
    seed: int = 0

    @property
    def device(self) -> torch.device:
        """Where the images are, and batches come."""
        return self.images.pixels.device

    def __len__(self) -> int:
        return len(self.sampler) // self.sampler.batch_size_per_process

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches as :func:`freqmask.data.loader.collate` describes them, on the device.

        Raises:
            UserError: image after image cannot be used.
        """
        size = self.sampler.batch_size_per_process
        steps = self.sampler.steps()
        while ahead := list(islice(steps, max(1, _DRAWN_AHEAD // size))):
            yield from self._batches(torch.from_numpy(np.concatenate(ahead)), size)

    def _batches(self, items: Int64[Tensor, "sample 3"], size: int) -> Iterator[dict[str, Any]]:
        epochs, _, asked = items.unbind(1)
        keys = sample_keys(self.seed, epochs, self.images.identities[asked])
        pairs = zip(asked.split(size), keys.split(size), strict=True)
        indices, skipped = zip(*(self._usable(*pair) for pair in pairs), strict=True)
        drawn = draw(self.images, self.geometries, torch.cat(indices), keys)
        for number, passed in enumerate(skipped):
            yield self._batch(drawn.part(slice(number * size, (number + 1) * size)), passed)

    def _batch(self, drawn: Drawn, skipped: Skipped) -> dict[str, Any]:
        labels = self.images.labels[drawn.indices]
        numbers = _moved(torch.stack((drawn.keys, labels, drawn.indices)), self.device).unbind(0)
        plan = make_plan(self.images, self.geometries, drawn)
        # half precision would move levels
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            views = cut_views(self.images, plan.to(self.device), self.geometries, self.value_range)
        named = dict(zip(("keys", "labels", "indices"), numbers, strict=True))
        return {"views": views, **named, "skipped": skipped}

    def _usable(self, asked: Indices, keys: Keys) -> tuple[Indices, Skipped]:
        """The images asked for, others in the place of bad ones, and the list of those."""
        if not self.images.bad:
            return asked, []
        indices, passed = asked.tolist(), []
        for place, key in enumerate(keys.tolist()):
            skipped: Skipped = []
            for index in candidates(indices[place], key, len(self.images)):
                if index not in self.images.bad:
                    break
                skipped.append((self.source.name(index), self.images.bad[index]))
            else:
                raise none_usable(skipped)
            indices[place] = index
            passed += skipped
        return torch.tensor(indices), passed


class Drawn(NamedTuple):
    """What the keys of some samples say of their views."""

    indices: Indices  # the images
    keys: Keys  # the samples' keys; a view's is ``combine(keys, view)``
    boxes: Boxes
    flips: Bool[Tensor, "view batch 3"]  # mirrored, upside down, rows and columns exchanged, for each view

    def part(self, places: slice) -> Drawn:
        """Some of the samples."""
        return Drawn(self.indices[places], self.keys[places], self.boxes[:, places], self.flips[:, places])


class Plan(NamedTuple):
    """What a batch takes from the images, a few numbers an image and view."""

    starts: Int64[Tensor, " batch"]  # where each image begins in the pixels
    strides: Int64[Tensor, " batch"]  # its width
    boxes: Boxes
    flips: Shaped[Tensor, "view batch 3"]  # mirrored, upside down, rows and columns exchanged, for each view
    flat: Int64[Tensor, " flat"]  # places in the batch of images whose windows may be empty
    others: Int64[Tensor, "attempt view flat 4"]  # for these the windows to try, at last the whole image
    frame: tuple[int, int]  # (height, width) that hold every window

    def to(self, device: torch.device) -> Plan:
        """The plan on a device, which is not waited for."""
        *numbers, frame = self
        return Plan._make([*(_moved(part, device) for part in numbers), frame])


def draw(images: InMemoryImages, geometries: Sequence[Geometry], indices: Indices, keys: Keys) -> Drawn:
    """Draw the windows of some images on the host, by the samples' keys."""
    flips = [draw_flips(geometry, combine(keys, view)) for view, geometry in enumerate(geometries)]
    return Drawn(indices, keys, _boxes(geometries, images.sizes[indices], keys, 0), torch.stack(flips))


def _boxes(geometries: Sequence[Geometry], sizes: Tensor, keys: Tensor, attempt: int) -> Boxes:
    """The windows of an attempt; after the last attempt the whole images."""
    if attempt == WINDOWS:
        return torch.cat((torch.zeros_like(sizes), sizes), dim=1).expand(len(geometries), -1, -1)
    views = enumerate(geometries)
    return torch.stack([geometry.boxes(sizes, combine(keys, view), attempt) for view, geometry in views])


def make_plan(images: InMemoryImages, geometries: Sequence[Geometry], drawn: Drawn) -> Plan:
    """Where the pixels of a batch lie, and other windows for images in which the first may be empty."""
    sizes = images.sizes[drawn.indices]
    flat = images.flat[drawn.indices].nonzero()[:, 0]
    others, largest = drawn.boxes[None, :, flat], drawn.boxes[:, :, 2:].amax(dim=(0, 1))
    if len(flat):
        tried = [_boxes(geometries, sizes[flat], drawn.keys[flat], attempt) for attempt in range(WINDOWS + 1)]
        others, largest = torch.stack(tried), largest.maximum(sizes[flat].amax(dim=0))
    height, width = (-(-side // _FRAME) * _FRAME for side in largest.tolist())
    starts = images.starts[drawn.indices]
    return Plan(starts, sizes[:, 1], drawn.boxes, drawn.flips, flat, others, (height, width))


def cut_views(
    images: InMemoryImages, plan: Plan, geometries: Sequence[Geometry], value_range: ValueRange
) -> list[Shaped[Tensor, "batch channel height width"]]:
    """Carry a plan out, on the device and without waiting for it.

    Returns:
        A tensor for each view: uint8 where the values are those of 8 bits, else float32 in [0, 1].
    """
    on_host = images.pixels.device.type == "cpu"
    # a GPU is given attempts together, where launches take longer than windows that nobody needs
    at_once = 0 if on_host else _AT_ONCE
    boxes = _with_content(images.pixels, plan, at_once) if len(plan.flat) else plan.boxes
    cut = _cut_on_host if on_host else cut_on_device
    views = zip(geometries, boxes, plan.flips, strict=True)
    return [cut(images, plan, *of_view, value_range) for of_view in views]


def _cut_on_host(
    images: InMemoryImages, plan: Plan, geometry: Geometry, boxes: Tensor, flips: Tensor, values: ValueRange
) -> Tensor:
    pixels = images.pixels.numpy()
    pixels = pixels.view(np.uint16) if images.dtype == "uint16" else pixels
    views: Tensor | None = None
    numbers = zip(plan.starts.tolist(), plan.strides.tolist(), boxes.tolist(), flips.tolist(), strict=True)
    for number, (start, stride, box, turns) in enumerate(numbers):
        (top, left, height, width), (mirrored, upside_down, exchanged) = box, turns
        lines = pixels[start + top * stride : start + (top + height) * stride]
        window = lines.reshape(height, stride, -1)[:, left : left + width].transpose(2, 0, 1)
        view = resize(torch.from_numpy(values.apply(window)), geometry.size)
        view = view.flip([axis for axis, turned in ((-1, mirrored), (-2, upside_down)) if turned])
        if views is None:
            views = torch.empty(len(boxes), len(view), *geometry.size, dtype=view.dtype)
        views[number] = view.mT if exchanged else view
    assert views is not None  # a batch holds an image
    return views


def cut_on_device(
    images: InMemoryImages, plan: Plan, geometry: Geometry, boxes: Tensor, flips: Tensor, values: ValueRange
) -> Tensor:
    """One view of a batch, all windows together, without a look at any value; ``boxes`` and ``flips`` are its own."""
    low, high = values.limits(np.dtype(images.dtype))
    levels = images.dtype == "uint8" and (low, high) == (0.0, 255.0)
    at_once = max(1, _AT_ONCE // (plan.frame[0] * plan.frame[1] * images.pixels.shape[1]))
    parts = zip(*(part.split(at_once) for part in (plan.starts, plan.strides, boxes, flips)), strict=True)
    cut = []
    for starts, strides, windows, turned in parts:
        pixels = cut_windows(images.pixels, starts, strides, windows, plan.frame)
        stored = pixels.int().bitwise_and(0xFFFF) if images.dtype == "uint16" else pixels
        numbers = stored.to(torch.float32, memory_format=torch.contiguous_format)
        numbers = numbers if levels else ((numbers - low) / (high - low)).clamp_(0, 1)
        cut.append(resample(numbers, windows[:, 2:], geometry.size, turned, levels, geometry.quarter_turns))
    return cut[0] if len(cut) == 1 else torch.cat(cut)


def _with_content(pixels: Tensor, plan: Plan, at_once: int) -> Boxes:
    """The plan's windows; for images with flat parts those of the first attempt that finds none of them empty.

    As many attempts as have ``at_once`` values are looked at together, at least one; the windows are the same.
    """
    starts, strides = plan.starts[plan.flat], plan.strides[plan.flat]
    chosen, searching = plan.others[-1], torch.ones_like(plan.flat, dtype=torch.bool)
    values = plan.frame[0] * plan.frame[1] * pixels.shape[1] * plan.others[0, ..., 0].numel()
    for part in plan.others[:-1].split(max(1, at_once // values)):
        windows = part.flatten(0, 2)
        times = len(windows) // len(starts)
        empty = are_empty(pixels, starts.repeat(times), strides.repeat(times), windows, plan.frame)
        for boxes, empties in zip(part, empty.view(part.shape[:3]).any(dim=1), strict=True):
            chosen = torch.where((searching & ~empties)[:, None], boxes, chosen)
            searching = searching & empties
        if pixels.device.type == "cpu" and not searching.any():  # elsewhere a look would be a wait
            break
    return plan.boxes.index_copy(1, plan.flat, chosen)


def _moved(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; from page-locked memory, because the host waits for any other."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)
