"""What the numbers in the images mean: the range that becomes [0, 1], and the survey that finds it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Shaped

from freqmask.data.lanes import some_images
from freqmask.data.pixels import check_channels, convert_channels, fill_missing, is_empty, missing_pixels
from freqmask.data.sources import Source
from freqmask.errors import BadImage, UserError

_GRID = 32  # a survey keeps 32x32 pixels of each image: a thousand images give a million per channel
_SURVEY_BLOCKS = 16  # from that many row groups of tables behind a URL, which come whole: some 200 MB
_SURVEY_PIXELS = 128  # and decodes no more than it must for those to be pixels of a usual view


@dataclass(frozen=True)
class ValueRange:
    """The values that become 0 and 1; what lies outside is clamped.

    Args:
        low: the value that becomes 0; None: the smallest that the image's own type can hold (0 for floats).
        high: the value that becomes 1; None: the largest that the type can hold (1 for floats).

    Raises:
        UserError: ``low`` is not below ``high``, or only one of them is given.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise UserError(
                f"value_range ({self.low}, {self.high}) must give both ends; try --value_range auto"
            )
        if self.low is not None and self.high is not None and not self.low < self.high < float("inf"):
            raise UserError(
                f"value_range ({self.describe()}) must be LOW,HIGH with LOW below HIGH, such as 0,4095"
            )

    @classmethod
    def parse(cls, text: str | Sequence[float]) -> ValueRange | None:
        """Read the option ``--value_range``.

        Args:
            text: ``auto``, ``dtype``, ``LOW,HIGH`` or two numbers.

        Returns:
            The range; None for ``auto``, which a survey resolves.

        Raises:
            UserError: it is none of these.
        """
        if text == "auto":
            return None
        if text == "dtype":
            return cls()
        try:
            low, high = (float(end) for end in (text.split(",") if isinstance(text, str) else text))
        except (TypeError, ValueError):
            raise UserError(f"value_range ({text}) must be auto, dtype or LOW,HIGH such as 0,4095") from None
        return cls(low, high)

    def describe(self) -> str:
        """The text that :meth:`parse` reads back."""
        return "dtype" if self.low is None else f"{self.low:.9g},{self.high:.9g}"

    def limits(self, dtype: np.dtype) -> tuple[float, float]:
        """The values that become 0 and 1 in an image of that type."""
        if self.low is not None and self.high is not None:
            return self.low, self.high
        if dtype.kind == "f":
            return 0.0, 1.0
        return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)

    def apply(
        self, image: Shaped[np.ndarray, "channel height width"]
    ) -> Shaped[np.ndarray, "channel height width"]:
        """Map an image to [0, 1].

        Args:
            image: any type, without missing values.

        Returns:
            float32 in [0, 1], clamped; an 8-bit image with its full range stays uint8, 0 to 255, because the
            device divides it faster than a worker.
        """
        if image.dtype == np.uint8 and (self.low, self.high) in ((None, None), (0.0, 255.0)):
            return image
        low, high = self.limits(image.dtype)
        scaled = (image.astype(np.float32) - np.float32(low)) / np.float32(high - low)
        return np.clip(scaled, 0, 1, out=scaled)


@dataclass
class Survey:
    """What up to a thousand images of a source look like.

    Attributes:
        count: images looked at.
        median_size: median height and width in pixels.
        min_size: smallest height and smallest width.
        max_size: largest height and largest width.
        channel_counts: channels -> how many images have them.
        dtypes: sample type -> how many images have it.
        channels: the channels of the run.
        value_range: the range that becomes [0, 1].
        mean: mean of each channel after that, over pixels.
        std: standard deviation of each channel after that, over pixels; at least 1/255.
        bad: (name, reason) of the images that cannot be used.
        notes: sentences for the user: what was chosen, and why.
        mean_pixels: mean of height times width.
        with_gaps: how many have missing values.
    """

    count: int
    median_size: tuple[int, int]
    min_size: tuple[int, int]
    max_size: tuple[int, int]
    channel_counts: dict[int, int]
    dtypes: dict[str, int]
    channels: int
    value_range: ValueRange
    mean: list[float]
    std: list[float]
    bad: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    mean_pixels: float = 0.0
    with_gaps: int = 0


@dataclass
class _Look:
    """One image as the survey sees it: its header and some pixels, NaN where missing."""

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
    """Look at some images to find out what all of them are like.

    Args:
        source: the images.
        value_range: ``auto``: the full range of the type where images have 8 bits, else from the 0.1 to the
            99.9 percentile of all values seen; ``dtype``: the full range of the type; ``LOW,HIGH``; a range.
        channels: ``auto``: the commonest count; or a number.
        seed: which images are looked at.
        count: how many at most.

    Returns:
        The survey.

    Raises:
        UserError: an option is wrong, or not one of the images can be used.
    """
    given = value_range if isinstance(value_range, ValueRange) else ValueRange.parse(value_range)
    indices = some_images(count, len(source), source.blocks(), seed, _SURVEY_BLOCKS)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders let go of the interpreter's lock
        looks = list(pool.map(lambda index: _look(source, index), indices))
    seen = [look for look in looks if isinstance(look, _Look)]
    bad = [(source.name(i), look) for i, look in zip(indices, looks, strict=True) if isinstance(look, str)]
    if not seen:
        reason = f"; the first, {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise UserError(f"none of the {len(indices)} images looked at can be used{reason}")
    wanted, why = _choose_channels(channels, seen)
    usable = []
    for index, look in zip(indices, looks, strict=True):
        if isinstance(look, _Look):
            try:
                check_channels(look.channels, wanted, convert=channels != "auto")
                usable.append(look)
            except BadImage as error:
                bad.append((source.name(index), error.reason))
    if not usable:
        raise UserError(
            f"channels ({wanted}): none of the {len(seen)} images looked at can have them; {bad[0][1]}"
        )
    resolved, why_range = (given, "as asked") if given else _choose_range(usable)
    return _summarise(
        len(indices), seen, usable, wanted, resolved, bad, [why, _range_note(resolved, why_range)]
    )


def _look(source: Source, index: int) -> _Look | str:
    """An image's header and a grid of its pixels, or the reason why it cannot be used."""
    try:
        picture = source.open(index)
        image = picture.decode(None, (_SURVEY_PIXELS, _SURVEY_PIXELS))
    except BadImage as error:
        return error.reason
    except UserError:
        raise
    except Exception as error:  # decoders raise anything on broken files
        return f"{type(error).__name__}: {error}"
    missing = missing_pixels(image, picture.nodata)
    reason = is_empty(image, missing)
    if reason is not None:
        return reason
    rows = np.linspace(0, image.shape[1] - 1, min(_GRID, image.shape[1])).astype(int)
    columns = np.linspace(0, image.shape[2] - 1, min(_GRID, image.shape[2])).astype(int)
    pixels = image[:, rows[:, None], columns].astype(np.float32)
    if missing is not None:
        pixels[missing[:, rows[:, None], columns]] = np.nan
    return _Look(picture.size, image.shape[0], image.dtype.name, pixels.reshape(len(pixels), -1))


def _choose_channels(channels: int | str, seen: Sequence[_Look]) -> tuple[int, str]:
    """The channels of the run, and a sentence on them."""
    if channels != "auto":
        try:
            wanted = int(channels)
        except ValueError:
            wanted = 0
        if wanted < 1:
            raise UserError(f"channels ({channels}) must be auto or a number from 1")
        return wanted, f"Channels: {wanted}, as asked."
    counts = Counter(look.channels for look in seen).most_common()
    # Of two equally common counts the smaller one, so that the choice does not hang on the order.
    wanted = min(channel for channel, number in counts if number == counts[0][1])
    others = sum(number for channel, number in counts if channel != wanted)
    if not others:
        return wanted, f"Channels: {wanted}, as all images looked at."
    converted = sum(number for channel, number in counts if {channel, wanted} == {1, 3})
    kind = "colour images become grey" if wanted == 1 else "grey images become colour"
    parts = [f"{converted} {kind}"] * bool(converted) + [
        f"{others - converted} of another count are skipped"
    ] * (others > converted)
    return (
        wanted,
        f"Channels: {wanted}, the commonest count of {len(seen)} images looked at; {', '.join(parts)}.",
    )


def _choose_range(looks: Sequence[_Look]) -> tuple[ValueRange, str]:
    """What ``auto`` means for these images, and why."""
    kinds = {look.dtype for look in looks}
    if kinds == {"uint8"}:
        return ValueRange(), "8 bits a value"
    if "uint8" in kinds:
        return ValueRange(), "8-bit images among others, each by its own type"
    values = np.concatenate([look.pixels.ravel() for look in looks])
    low, high = (float(end) for end in np.nanpercentile(values, [0.1, 99.9]))
    if not low < high:
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return ValueRange(low, high), f"the 0.1 and 99.9 percentiles of {len(looks)} images"


def _range_note(value_range: ValueRange, why: str) -> str:
    if value_range.low is None:
        return f"Value range: the full range of the sample type ({why})."
    return f"Value range: {value_range.low:g} to {value_range.high:g} becomes 0 to 1 ({why})."


def _summarise(
    count: int,
    seen: Sequence[_Look],
    usable: Sequence[_Look],
    channels: int,
    value_range: ValueRange,
    bad: list[tuple[str, str]],
    notes: list[str],
) -> Survey:
    """Put the survey together; mean and std over every pixel kept."""
    values = np.concatenate([_unit_values(look, channels, value_range) for look in usable], axis=1)
    sizes = np.array([look.size for look in seen])
    height, width = (int(side) for side in np.median(sizes, axis=0))
    return Survey(
        count=count,
        median_size=(height, width),
        min_size=(int(sizes[:, 0].min()), int(sizes[:, 1].min())),
        max_size=(int(sizes[:, 0].max()), int(sizes[:, 1].max())),
        channel_counts=dict(Counter(look.channels for look in seen).most_common()),
        dtypes=dict(Counter(look.dtype for look in seen).most_common()),
        channels=channels,
        value_range=value_range,
        mean=[round(float(mean), 6) for mean in values.mean(axis=1)],
        # a channel that never varies would otherwise be divided by zero
        std=[round(max(float(std), 1 / 255), 6) for std in values.std(axis=1)],
        bad=bad,
        notes=notes,
        mean_pixels=float(sizes.prod(axis=1).mean()),
        with_gaps=sum(bool(np.isnan(look.pixels).any()) for look in seen),
    )


def _unit_values(look: _Look, channels: int, value_range: ValueRange) -> Float[np.ndarray, "channel count"]:
    """A look's pixels in [0, 1] with the run's channels, as the method will see them."""
    pixels = look.pixels[:, :, None]
    filled = convert_channels(fill_missing(pixels, ~np.isfinite(pixels)), channels)
    low, high = value_range.limits(np.dtype(look.dtype))
    return np.clip((filled[:, :, 0].astype(np.float64) - low) / (high - low), 0, 1)
