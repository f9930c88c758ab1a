"""What the numbers in the images mean: the range that becomes [0, 1], and the survey that finds it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from jaxtyping import Float

from freqmask.data.pixels import (
    Pixels,
    as_bad_image,
    check_channels,
    convert_channels,
    fill_missing,
    is_empty,
    missing_pixels,
)
from freqmask.data.source import Source, some_images
from freqmask.errors import BadImage, UserError

_GRID = 32  # a survey keeps 32x32 pixels of each image: a thousand images give a million per channel
_SURVEY_BLOCKS = 16  # from that many row groups of tables behind a URL, which come whole: some 200 MB
_LOST = 0.05  # an image is nearly black or white below or above this share of the range, and so many of them matter
_NEARLY = 0.99  # of an image's values
_SURVEY_PIXELS = 128  # and decodes no more than it must for those to be pixels of a usual view


@dataclass(frozen=True)
class ValueRange:
    """The values that become 0 and 1; what lies outside is clamped. A UserError where the ends are not in order."""

    low: float | None = None  # becomes 0; None: the smallest of the image's own type (0 for floats)
    high: float | None = None  # becomes 1; None: the largest of the type (1 for floats)
    by_type: tuple[tuple[str, float, float], ...] = ()  # (sample type, low, high) where types are mixed

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise UserError(
                f"value_range ({self.low}, {self.high}) must give both ends; try --value_range auto"
            )
        if self.low is not None and self.high is not None and not -np.inf < self.low < self.high < np.inf:
            raise UserError(
                f"value_range ({self.describe()}) must be LOW,HIGH with LOW below HIGH, such as 0,4095"
            )

    @classmethod
    def parse(cls, text: str | Sequence[float]) -> ValueRange | None:
        """Read the option ``--value_range``: ``auto``, ``dtype``, ``LOW,HIGH``, ``TYPE:LOW,HIGH/...`` or two numbers.

        None for ``auto``, which a survey resolves; a UserError for anything else.
        """
        if text == "auto":
            return None
        if text == "dtype":
            return cls()
        try:
            if isinstance(text, str) and ":" in text:
                parts = [part.partition(":")[::2] for part in text.split("/")]
                ranges = [(np.dtype(name).name, cls._ends(ends)) for name, ends in parts]
                return cls(by_type=tuple((name, *ends) for name, ends in ranges))
            return cls(*cls._ends(text))
        except (TypeError, ValueError):
            raise UserError(f"value_range ({text}) must be auto, dtype or LOW,HIGH such as 0,4095") from None

    @classmethod
    def _ends(cls, text: str | Sequence[float]) -> tuple[float, float]:
        low, high = (float(end) for end in (text.split(",") if isinstance(text, str) else text))
        cls(low, high)  # for its checks
        return low, high

    def describe(self) -> str:
        """The text that :meth:`parse` reads back."""
        if self.by_type:
            return "/".join(f"{name}:{low:.9g},{high:.9g}" for name, low, high in self.by_type)
        return "dtype" if self.low is None else f"{self.low:.9g},{self.high:.9g}"

    def limits(self, dtype: np.dtype) -> tuple[float, float]:
        """The values that become 0 and 1 in an image of that type."""
        if self.low is not None and self.high is not None:
            return self.low, self.high
        for name, low, high in self.by_type:
            if dtype.name == name:
                return low, high
        return _full_range(dtype)

    def apply(self, image: Pixels) -> Pixels:
        """Map an image of any type, without missing values, to float32 in [0, 1], clamped.

        An 8-bit image with its full range stays uint8, 0 to 255, because the device divides it faster than a worker.
        """
        low, high = self.limits(image.dtype)
        if image.dtype == np.uint8 and (low, high) == (0.0, 255.0):
            return image
        scaled = (image.astype(np.float32) - np.float32(low)) / np.float32(high - low)
        return np.clip(scaled, 0, 1, out=scaled)


@cache
def _full_range(dtype: np.dtype) -> tuple[float, float]:
    """Of a type; numpy takes 20 microseconds to say it, for every image."""
    return (0.0, 1.0) if dtype.kind == "f" else (float(np.iinfo(dtype).min), float(np.iinfo(dtype).max))


@dataclass
class Survey:
    """What up to a thousand images of a source look like."""

    count: int  # images looked at
    median_size: tuple[int, int]  # median height and width in pixels
    shorter_side: int  # the median of the images' own shorter sides, which portraits among landscapes have
    min_size: tuple[int, int]  # smallest height and smallest width
    max_size: tuple[int, int]  # largest height and largest width
    channel_counts: dict[int, int]  # channels -> how many images have them
    dtypes: dict[str, int]  # sample type -> how many images have it
    channels: int  # the channels of the run
    value_range: ValueRange  # the range that becomes [0, 1]
    mean: list[float]  # mean of each channel after that, over pixels
    std: list[float]  # standard deviation of each channel after that, over pixels; at least 1/255
    bad: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of unusable images
    notes: list[str] = field(default_factory=list)  # sentences for the user: what was chosen, and why
    mean_pixels: float = 0.0  # mean of height times width
    with_gaps: int = 0  # how many have missing values


@dataclass
class _Thumbnail:
    """One image as the survey sees it: its header and some pixels, NaN where missing."""

    index: int
    size: tuple[int, int]
    channels: int
    dtype: str
    pixels: Float[np.ndarray, "channel count"]


def survey(
    source: Source,
    value_range: str | Sequence[float] | ValueRange = "auto",
    channels: int | str = "auto",
    seed: int = 0,
    count: int = 1000,
) -> Survey:
    """Look at up to ``count`` images, drawn by the seed, to find out what all of them are like.

    Args:
        source: the images.
        value_range: ``auto``: the full range of the type where images have 8 bits, else from the 0.1 to the
            99.9 percentile of all values seen; where types are mixed, for each its own; ``dtype``: the full
            range of the type; ``LOW,HIGH``; a range.
        channels: ``auto``: the commonest count; or a number.
        seed: which images are looked at.
        count: how many at most.

    Raises:
        UserError: an option is wrong, or not one of the images can be used.
    """
    given = value_range if isinstance(value_range, ValueRange) else ValueRange.parse(value_range)
    indices = some_images(count, len(source), source.blocks(), seed, _SURVEY_BLOCKS)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders let go of the interpreter's lock
        # some at a time: to hand one over costs as much as to decode a small one
        parts = [indices[first : first + 16] for first in range(0, len(indices), 16)]
        done = pool.map(lambda part: [_thumbnail(source, index) for index in part], parts)
        looked_at = [thumbnail for part in done for thumbnail in part]
    seen = [thumbnail for thumbnail in looked_at if isinstance(thumbnail, _Thumbnail)]
    bad = [(source.name(i), why) for i, why in zip(indices, looked_at, strict=True) if isinstance(why, str)]
    if not seen:
        reason = f"; the first, {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise UserError(f"none of the {len(indices)} images looked at can be used{reason}")
    wanted, why = _choose_channels(channels, seen)
    usable = []
    for thumbnail in seen:
        try:
            check_channels(thumbnail.channels, wanted, convert=channels != "auto")
            usable.append(thumbnail)
        except BadImage as error:
            bad.append((source.name(thumbnail.index), error.reason))
    if not usable:
        raise UserError(
            f"channels ({wanted}): none of the {len(seen)} images looked at can have them; {bad[0][1]}"
        )
    resolved, why_range = (given, "as asked") if given else _choose_range(usable)
    units = [_unit_values(thumbnail, wanted, resolved) for thumbnail in usable]
    notes = [why, *_range_notes(resolved, why_range, usable, units)]
    return _summarize(len(indices), seen, units, wanted, resolved, bad, notes)


def _thumbnail(source: Source, index: int) -> _Thumbnail | str:
    """An image's header and a grid of its pixels, or the reason why it cannot be used."""
    try:
        with as_bad_image():
            picture = source.open(index)
            image = picture.decode(None, (_SURVEY_PIXELS, _SURVEY_PIXELS))
    except BadImage as error:
        return error.reason
    missing = missing_pixels(image, picture.nodata)
    reason = is_empty(image, missing)
    if reason is not None:
        return reason
    rows = np.linspace(0, image.shape[1] - 1, min(_GRID, image.shape[1])).astype(int)
    columns = np.linspace(0, image.shape[2] - 1, min(_GRID, image.shape[2])).astype(int)
    pixels = image[:, rows[:, None], columns].astype(np.float32)
    if missing is not None:
        pixels[missing[:, rows[:, None], columns]] = np.nan
        if np.isnan(pixels).all():  # what was measured lies between them
            return "most of its values are missing (NaN or nodata)"
    return _Thumbnail(index, picture.size, image.shape[0], image.dtype.name, pixels.reshape(len(pixels), -1))


def _choose_channels(channels: int | str, seen: Sequence[_Thumbnail]) -> tuple[int, str]:
    if channels != "auto":
        try:
            wanted = int(channels)
        except ValueError:
            wanted = 0
        if wanted < 1:
            raise UserError(f"channels ({channels}) must be auto or a number from 1")
        return wanted, f"Channels: {wanted}, as asked."
    counts = Counter(thumbnail.channels for thumbnail in seen).most_common()
    # Of two equally common counts the smaller one, so that the choice does not hang on the order.
    wanted = min(channel for channel, number in counts if number == counts[0][1])
    others = sum(number for channel, number in counts if channel != wanted)
    if not others:
        return wanted, f"Channels: {wanted}, as all images looked at."
    converted = sum(number for channel, number in counts if {channel, wanted} == {1, 3})
    kind = "color images become gray" if wanted == 1 else "gray images become color"
    parts = [f"{converted} {kind}"] if converted else []
    if others > converted:
        parts.append(f"{others - converted} of another count are skipped")
    why = f"Channels: {wanted}, the commonest count of {len(seen)} images looked at; {', '.join(parts)}."
    return wanted, why


def _choose_range(thumbnails: Sequence[_Thumbnail]) -> tuple[ValueRange, str]:
    kinds = sorted({thumbnail.dtype for thumbnail in thumbnails})
    if kinds == ["uint8"]:
        return ValueRange(), "8 bits a value"
    values = [
        np.concatenate([one.pixels.ravel() for one in thumbnails if one.dtype == kind]) for kind in kinds
    ]
    ends = [_percentiles(part) for part in values]
    span = max(high for _, high in ends) - min(low for low, _ in ends)
    # The same quantity in several types, such as heights in int16 and float32, keeps thumbnail scale.
    if len(kinds) == 1 or ("uint8" not in kinds and all(high - low >= span / 4 for low, high in ends)):
        together = _percentiles(np.concatenate(values))
        return ValueRange(*together), f"the 0.1 and 99.9 percentiles of {len(thumbnails)} images"
    ranges = tuple((kind, *_range_of_type(kind, *limits)) for kind, limits in zip(kinds, ends, strict=True))
    full = all((low, high) == ValueRange().limits(np.dtype(kind)) for kind, low, high in ranges)
    reason = f"{len(kinds)} sample types, each by its own values"
    return ValueRange(by_type=() if full else ranges), reason


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    """The 0.1 and 99.9 percentiles, or the ends where these are one."""
    low, high = (float(end) for end in np.nanpercentile(values, [0.1, 99.9]))
    return (low, high) if low < high else (float(np.nanmin(values)), float(np.nanmax(values)))


def _range_of_type(kind: str, low: float, high: float) -> tuple[float, float]:
    """The range of one type among others: 0 to the number of bits that the values fill, else their own ends.

    >>> _range_of_type("uint16", 592, 3440), _range_of_type("float32", 37, 215), _range_of_type("float32", -3, 9)
    ((0.0, 4095.0), (0.0, 255.0), (-3, 9))
    """
    if kind == "uint8":
        return 0.0, 255.0
    scales = [float(2**bits - 1) for bits in (8, 10, 12, 14, 15, 16)]
    full = next((scale for scale in ([1.0, *scales] if kind == "float32" else scales) if high <= scale), None)
    if low < 0 or full is None or (kind == "float32" and high < full / 8):
        return (low, high) if low < high else (low, low + 1)
    return 0.0, full


def _range_notes(
    value_range: ValueRange, why: str, thumbnails: Sequence[_Thumbnail], units: Sequence[np.ndarray]
) -> list[str]:
    """What becomes 0 and 1, and a warning where some images would come out all but black or white."""
    named = [f"{name} {low:g} to {high:g}" for name, low, high in value_range.by_type]
    if named:
        notes = [f"Value range: {', '.join(named)} becomes 0 to 1 ({why})."]
    elif value_range.low is None:
        notes = [f"Value range: the full range of the sample type ({why})."]
    else:
        notes = [f"Value range: {value_range.low:g} to {value_range.high:g} becomes 0 to 1 ({why})."]
    # shares, not percentiles of a thousand images: a fifth of a second less at every start
    dark = [int((unit < _LOST).sum()) > _NEARLY * unit.size for unit in units]
    light = [int((unit > 1 - _LOST).sum()) > _NEARLY * unit.size for unit in units]
    for word, lost in (("black", dark), ("white", light)):
        if sum(lost) > _LOST * len(thumbnails):
            odd = thumbnails[lost.index(True)].pixels
            notes.append(
                f"{sum(lost)} of {len(thumbnails)} images are nearly {word} in this range; the first holds "
                f"{np.nanmin(odd):g} to {np.nanmax(odd):g}. Give a --value_range that fits all, or part them by folder."
            )
    return notes


def _summarize(
    count: int,
    seen: Sequence[_Thumbnail],
    units: Sequence[Float[np.ndarray, "channel count"]],
    channels: int,
    value_range: ValueRange,
    bad: list[tuple[str, str]],
    notes: list[str],
) -> Survey:
    values = np.concatenate(units, axis=1)
    sizes = np.array([thumbnail.size for thumbnail in seen])
    height, width = (int(side) for side in np.median(sizes, axis=0))
    return Survey(
        count=count,
        median_size=(height, width),
        shorter_side=int(np.median(sizes.min(axis=1))),
        min_size=(int(sizes[:, 0].min()), int(sizes[:, 1].min())),
        max_size=(int(sizes[:, 0].max()), int(sizes[:, 1].max())),
        channel_counts=dict(Counter(thumbnail.channels for thumbnail in seen).most_common()),
        dtypes=dict(Counter(thumbnail.dtype for thumbnail in seen).most_common()),
        channels=channels,
        value_range=value_range,
        mean=[round(float(mean), 6) for mean in values.mean(axis=1)],
        # a channel that never varies would otherwise be divided by zero
        std=[round(max(float(std), 1 / 255), 6) for std in values.std(axis=1)],
        bad=bad,
        notes=notes,
        mean_pixels=float(sizes.prod(axis=1).mean()),
        with_gaps=sum(bool(np.isnan(thumbnail.pixels).any()) for thumbnail in seen),
    )


def _unit_values(
    thumbnail: _Thumbnail, channels: int, value_range: ValueRange
) -> Float[np.ndarray, "channel count"]:
    """A thumbnail's pixels in [0, 1] with the run's channels, as the method will see them."""
    pixels = thumbnail.pixels[:, :, None]
    filled = convert_channels(fill_missing(pixels, ~np.isfinite(pixels)), channels)
    low, high = value_range.limits(np.dtype(thumbnail.dtype))
    return np.clip((filled[:, :, 0].astype(np.float64) - low) / (high - low), 0, 1)
