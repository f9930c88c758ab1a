"""Batches of views cut from images that lie on the device: those of the loader, without workers or waiting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from freqmask.data.dataset import WINDOWS, Skipped, candidates, none_usable
from freqmask.data.resample import resample
from freqmask.data.resident import ResidentImages, as_numbers, cut_windows
from freqmask.data.sampler import Item, TrainSampler
from freqmask.data.sources import Source
from freqmask.data.values import ValueRange
from freqmask.data.views import Geometry
from freqmask.data.windows import draw_attitudes, draw_boxes
from freqmask.rng import combine, sample_keys

_FRAME = 8  # frames grow in steps of that many pixels, so that batches reuse each other's memory
_DRAWN_AHEAD = 1024  # samples whose windows are drawn together: as many small operations as for a few
_AT_ONCE = 2**26  # float values that are resampled together: 256 MB, a batch of 870 windows of 160 pixels


class ResidentBatches:
    """The batches of a training, as :func:`freqmask.data.loader.make_loader` makes them from files.

    Which image comes when, its key, its windows, what stands in for a bad one: all as the loader has it. Views are
    resampled from the whole decoded image, to one level of 255 the loader's.

    Args:
        images: the images, their pixels on the device.
        source: where they come from, for the names of bad ones.
        sampler: which image comes when.
        geometries: how each view is cut.
        value_range: the values that become 0 and 1.
        seed: the run's seed.
    """

    def __init__(
        self,
        images: ResidentImages,
        source: Source,
        sampler: TrainSampler,
        geometries: Sequence[Geometry],
        value_range: ValueRange | None = None,
        seed: int = 0,
    ) -> None:
        self.images, self.source, self.sampler = images, source, sampler
        self.geometries, self.seed = tuple(geometries), seed
        self.device = images.pixels.device
        low, high = (value_range or ValueRange()).limits(np.dtype(images.dtype))
        self.limits = None if images.dtype == "uint8" and (low, high) == (0.0, 255.0) else (low, high)

    def __len__(self) -> int:
        """Steps of the whole training, those before the sampler's first one included."""
        return len(self.sampler) // self.sampler.batch_size_per_process

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches as :func:`freqmask.data.loader.collate` describes them, on the device.

        Raises:
            UserError: image after image cannot be used.
        """
        size = self.sampler.batch_size_per_process
        items = iter(self.sampler)
        while ahead := list(islice(items, size * max(1, _DRAWN_AHEAD // size))):
            yield from self._batches(ahead, size)

    def _batches(self, items: Sequence[Item], size: int) -> Iterator[dict[str, Any]]:
        """The batches of some steps, whose windows are drawn together."""
        epochs, _, asked = torch.tensor(items).unbind(1)
        keys = sample_keys(self.seed, epochs, self.images.identities[asked])
        pairs = zip(asked.split(size), keys.split(size), strict=True)
        indices, skipped = zip(*(self._standing_in(*pair) for pair in pairs), strict=True)
        drawn = draw(self.images, self.geometries, torch.cat(indices), keys)
        for number, passed in enumerate(skipped):
            yield self._batch(drawn.part(slice(number * size, (number + 1) * size)), passed)

    def _batch(self, drawn: Drawn, skipped: Skipped) -> dict[str, Any]:
        labels = self.images.labels[drawn.indices]
        numbers = _moved(torch.stack((drawn.keys, labels, drawn.indices)), self.device).unbind(0)
        plan = make_plan(self.images, self.geometries, drawn)
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):  # half precision would move levels
            views = cut_views(self.images, plan.to(self.device), self.geometries, self.limits)
        named = dict(zip(("keys", "labels", "indices"), numbers, strict=True))
        return {"views": views, **named, "skipped": skipped}

    def _standing_in(
        self, asked: Int64[Tensor, " batch"], keys: Int64[Tensor, " batch"]
    ) -> tuple[Int64[Tensor, " batch"], Skipped]:
        """The images asked for, others in the place of bad ones, and the list of those."""
        if not self.images.bad:
            return asked, []
        indices, passed = asked.tolist(), []
        for place, (index, key) in enumerate(zip(indices, keys.tolist(), strict=True)):
            if index in self.images.bad:
                indices[place], skipped = self._first_usable(index, key)
                passed += skipped
        return torch.tensor(indices), passed

    def _first_usable(self, asked: int, key: int) -> tuple[int, Skipped]:
        skipped: Skipped = []
        for index in candidates(asked, key, len(self.images)):
            if index not in self.images.bad:
                return index, skipped
            skipped.append((self.source.name(index), self.images.bad[index]))
        raise none_usable(skipped)


class Drawn(NamedTuple):
    """What the keys of some samples say of their views.

    Attributes:
        indices: the images.
        keys: the samples' keys; a view's is ``combine(keys, view)``.
        boxes: (top, left, height, width) of the windows of each view.
        attitudes: mirrored, upended, rows and columns exchanged, for each view.
    """

    indices: Int64[Tensor, " batch"]
    keys: Int64[Tensor, " batch"]
    boxes: Int64[Tensor, "view batch 4"]
    attitudes: Bool[Tensor, "view batch 3"]

    def part(self, places: slice) -> Drawn:
        """Some of the samples."""
        return Drawn(
            self.indices[places], self.keys[places], self.boxes[:, places], self.attitudes[:, places]
        )


class Plan(NamedTuple):
    """What a batch takes from the images, a few numbers an image and view.

    Attributes:
        starts: where each image begins in the pixels.
        strides: its width.
        boxes: (top, left, height, width) of the windows of each view.
        attitudes: mirrored, upended, rows and columns exchanged, for each view.
        flat: places in the batch of images whose windows may be empty.
        others: for these the windows that are tried, the whole image being the last.
        frame: (height, width) that hold every window.
    """

    starts: Int64[Tensor, " batch"]
    strides: Int64[Tensor, " batch"]
    boxes: Int64[Tensor, "view batch 4"]
    attitudes: Shaped[Tensor, "view batch 3"]
    flat: Int64[Tensor, " flat"]
    others: Int64[Tensor, "attempt view flat 4"]
    frame: tuple[int, int]

    def to(self, device: torch.device) -> Plan:
        """The plan on a device, which is not waited for."""
        *numbers, frame = self
        return Plan._make([*(_moved(part, device) for part in numbers), frame])


def draw(
    images: ResidentImages,
    geometries: Sequence[Geometry],
    indices: Int64[Tensor, " batch"],
    keys: Int64[Tensor, " batch"],
) -> Drawn:
    """Draw the windows of some samples, on the host.

    Args:
        images: the images.
        geometries: how each view is cut.
        indices: which images.
        keys: the samples' keys.
    """
    sizes = images.sizes[indices]
    views = [(geometry, combine(keys, view)) for view, geometry in enumerate(geometries)]
    boxes = torch.stack([draw_boxes(geometry, sizes, key) for geometry, key in views])
    return Drawn(indices, keys, boxes, torch.stack([draw_attitudes(*view) for view in views]))


def make_plan(images: ResidentImages, geometries: Sequence[Geometry], drawn: Drawn) -> Plan:
    """Where the pixels of a batch lie, and other windows for images in which the first may be empty.

    Args:
        images: the images.
        geometries: how each view is cut.
        drawn: the samples of the batch.
    """
    sizes = images.sizes[drawn.indices]
    flat = images.flat[drawn.indices].nonzero()[:, 0]
    others, largest = drawn.boxes[None, :, flat], drawn.boxes[:, :, 2:].amax(dim=(0, 1))
    if len(flat):
        keys = drawn.keys[flat]
        others = torch.stack(
            [_attempt(geometries, sizes[flat], keys, number) for number in range(WINDOWS + 1)]
        )
        largest = largest.maximum(sizes[flat].amax(dim=0))
    height, width = (-(-side // _FRAME) * _FRAME for side in largest.tolist())
    starts = images.starts[drawn.indices]
    return Plan(starts, sizes[:, 1], drawn.boxes, drawn.attitudes, flat, others, (height, width))


def _attempt(
    geometries: Sequence[Geometry], sizes: Tensor, keys: Tensor, attempt: int
) -> Int64[Tensor, "view flat 4"]:
    """The windows of an attempt; after the last attempt the whole images."""
    if attempt == WINDOWS:
        return torch.cat((torch.zeros_like(sizes), sizes), dim=1).expand(len(geometries), -1, -1)
    views = enumerate(geometries)
    return torch.stack(
        [draw_boxes(geometry, sizes, combine(keys, view), attempt) for view, geometry in views]
    )


def cut_views(
    images: ResidentImages,
    plan: Plan,
    geometries: Sequence[Geometry],
    limits: tuple[float, float] | None,
) -> list[Shaped[Tensor, "batch channel height width"]]:
    """Carry a plan out, on the device and without waiting for it.

    Args:
        images: the images.
        plan: the windows.
        geometries: how each view is cut.
        limits: the values that become 0 and 1; None keeps 0 to 255.

    Returns:
        A tensor for each view: uint8 without ``limits``, else float32 in [0, 1].
    """
    boxes = _with_content(images.pixels, plan) if len(plan.flat) else plan.boxes
    part = max(1, _AT_ONCE // (plan.frame[0] * plan.frame[1] * images.pixels.shape[1]))
    views = []
    for geometry, windows, attitudes in zip(geometries, boxes, plan.attitudes, strict=True):
        rows = zip(
            *(numbers.split(part) for numbers in (plan.starts, plan.strides, windows, attitudes)), strict=True
        )
        cut = [
            resample(
                as_numbers(cut_windows(images.pixels, start, stride, box, plan.frame), images.dtype, limits),
                box[:, 2:],
                geometry.size,
                attitude,
                levels=limits is None,
                turned=geometry.quarter_turns,
            )
            for start, stride, box, attitude in rows
        ]
        views.append(cut[0] if len(cut) == 1 else torch.cat(cut))
    return views


def _with_content(pixels: Tensor, plan: Plan) -> Int64[Tensor, "view batch 4"]:
    """The plan's windows; for images with flat parts those of the first attempt that finds none of them empty."""
    starts, strides = plan.starts[plan.flat], plan.strides[plan.flat]
    chosen, searching = plan.others[-1], torch.ones_like(plan.flat, dtype=torch.bool)
    for boxes in plan.others[:-1]:
        empty = torch.stack([_is_empty(pixels, starts, strides, box, plan.frame) for box in boxes]).any(dim=0)
        chosen = torch.where((searching & ~empty)[:, None], boxes, chosen)
        searching = searching & empty
        if pixels.device.type == "cpu" and not searching.any():  # elsewhere a look would be a wait
            break
    return plan.boxes.index_copy(1, plan.flat, chosen)


def _is_empty(
    pixels: Tensor, starts: Tensor, strides: Tensor, boxes: Tensor, frame: tuple[int, int]
) -> Shaped[Tensor, " flat"]:
    """Which windows hold one value only (in each channel)."""
    windows = cut_windows(pixels, starts, strides, boxes, frame)  # (flat, height, channel, width)
    outside = (torch.arange(frame[0], device=pixels.device) >= boxes[:, 2, None])[:, :, None] | (
        torch.arange(frame[1], device=pixels.device) >= boxes[:, 3, None]
    )[:, None]
    same: Tensor = (windows == windows[:, :1, :, :1]) | outside[:, :, None]
    return same.flatten(1).all(dim=1)


def _moved(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; from page-locked memory, because the host waits for any other."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)
