"""Where a run's images come from at each step: the memory of the device, or the loader."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from freqmask.console import readable_bytes, readable_time, say
from freqmask.data.in_memory import DoesNotFitError, InMemoryImages, Limits, read_images
from freqmask.data.source import Source
from freqmask.data.transforms import OVERSAMPLING, Geometry
from freqmask.data.values import Survey
from freqmask.errors import UserError
from freqmask.training import auto

SHARE_OF_MEMORY = 0.25  # of what is free, on the device and in the host, where images pass through twice
LARGEST_SIDE = 160  # pixels; beyond, decoding a part costs less than keeping the whole
FEWEST_PASSES = 2.0  # decoding ahead is for nothing where images are seen once
PROCESSES_FROM = 1_000  # fewer images are decoded before worker processes have started
SECONDS_OF_SILENCE = 10.0


def choose_place(options: Mapping[str, Any], survey: Survey, images: int) -> auto.Choice:
    """``device`` or ``loader``, with the reason.

    Args:
        options: all resolved but ``images_from``.
        survey: what the images are like.
        images: how many are trained on.

    Raises:
        UserError: they shall stay on the device and cannot.
    """
    if options["images_from"] == "loader":
        return auto.Choice("loader", "as asked")
    itemsize = max(np.dtype(dtype).itemsize for dtype in survey.dtypes)
    size = images * survey.mean_pixels * options["channels"] * itemsize
    passes = options["steps"] * options["batch_size"] / images
    obstacle = _obstacle(survey, size, memory_limit(options))
    if options["images_from"] == "device":
        if obstacle is not None:
            raise UserError(f"images_from (device) cannot be: {obstacle}; try --images_from auto")
        return auto.Choice("device", f"{readable_bytes(size)}, as asked")
    side, limit = max(survey.max_size), largest_side(options)
    if obstacle is None and side > limit:
        obstacle = f"the largest has {side} pixels a side, and up to {limit} are kept in memory"
    elif obstacle is None and passes < FEWEST_PASSES:
        obstacle = f"each is seen {passes:.1f} times, too few to decode all ahead"
    if obstacle is not None:
        return auto.Choice("loader", obstacle)
    return auto.Choice("device", f"{readable_bytes(size)} of small images, each seen {passes:,.0f} times")


def memory_limit(options: Mapping[str, Any]) -> int:
    """Bytes that kept images may take in each process: a quarter of what is free on its device and in the host."""
    host = auto.free_memory(torch.device("cpu")) // int(options["devices"])
    own = auto.free_memory(torch.device("cuda")) if options["accelerator"] == "cuda" else host
    return int(SHARE_OF_MEMORY * min(own, host))


def largest_side(options: Mapping[str, Any]) -> int:
    """The longest side that is kept without being asked for, in pixels."""
    # From twice the oversampling on, the loader decodes a JPEG reduced, and the two would see different pixels.
    reduced = 2 * OVERSAMPLING * min(Geometry(image_size=options["image_size"]).size) - 1
    return min(reduced, LARGEST_SIDE)


def keep_images(
    options: Mapping[str, Any], source: Source, geometry: Geometry, convert: bool, by_hand: bool
) -> InMemoryImages | None:
    """Decode the images of a run whose images stay on the device, and say how it went.

    Args:
        options: resolved options.
        source: the images that are trained on.
        geometry: how views are cut.
        convert: whether images with other channels are converted instead of skipped.
        by_hand: whether the device was asked for, so that any size is kept and an obstacle is an error.

    Returns:
        The images, still in the host's memory; None where they come from the loader.
    """
    if options["images_from"] != "device":
        return None
    limits = Limits(2**31 if by_hand else largest_side(options), memory_limit(options))
    decoders = 0
    if int(options["workers"]) and len(source) >= PROCESSES_FROM:
        decoders = max(int(options["workers"]), auto.usable_cores() // int(options["devices"]))
    began = spoke = time.monotonic()

    def report(count: int) -> None:
        nonlocal spoke
        if time.monotonic() - spoke > SECONDS_OF_SILENCE:
            spoke = time.monotonic()
            say(f"            {count:,} of {len(source):,} images read")

    try:
        images = read_images(source, [geometry], limits, options["channels"], convert, decoders, report)
    except DoesNotFitError as reason:
        if by_hand:
            raise UserError(f"images_from (device) cannot be: {reason}; try --images_from loader") from reason
        say(f"note: images come from the loader after all: {reason}")
        return None
    took = readable_time(time.monotonic() - began)
    bad = f", {len(images.bad):,} cannot be used" if images.bad else ""
    say(f"read        {len(source):,} images in {took}, {readable_bytes(images.bytes)}{bad}")
    return images


def _obstacle(survey: Survey, size: float, limit: int) -> str | None:
    if len(survey.dtypes) > 1:
        return f"they hold {' and '.join(sorted(survey.dtypes))}"
    if survey.with_gaps:
        return f"{survey.with_gaps} of {survey.count} looked at have missing values, which are filled window by window"
    if size > limit:
        return (
            f"they take {readable_bytes(size)}, and a quarter of the free memory is {readable_bytes(limit)}"
        )
    return None
