"""What is done to one image: decoded, put in range, cut into views; and what stands in where that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from freqmask.data.pictures import Picture
from freqmask.data.pixels import check_channels, convert_channels, fill_missing, is_empty, missing_pixels
from freqmask.data.sampler import Item
from freqmask.data.sources import Source
from freqmask.data.values import ValueRange
from freqmask.data.views import Geometry, decode_windows
from freqmask.errors import BadImage, UserError
from freqmask.rng import sample_key, uniform_numbers

Skipped = list[tuple[str, str]]  # names of images that cannot be read, with reasons
SUBSTITUTES = 32  # with a tenth of the images bad, that many bad ones in a row do not happen
WINDOWS = 4  # windows tried in an image with gaps before the whole image stands in


@dataclass
class Sample:
    """One image of a batch: its views, key and label, and which images it stands in for."""

    views: list[Tensor]
    key: int
    label: int
    index: int
    skipped: Skipped


class TrainDataset(Dataset[Sample]):
    """Views of the images of a source, for the items of a sampler.

    Args:
        source: the images.
        geometries: how each view is cut; as many as the method has views.
        value_range: the values that become 0 and 1.
        channels: the channels of every view.
        convert_channels: True makes grey into colour and the other way round; False skips images that have
            other channels.
        seed: the run's seed; with epoch and image it makes the sample's key.
    """

    def __init__(
        self,
        source: Source,
        geometries: Sequence[Geometry],
        value_range: ValueRange | None = None,
        channels: int = 3,
        convert_channels: bool = True,
        seed: int = 0,
    ) -> None:
        self.source = source
        self.geometries = tuple(geometries)
        self.value_range = value_range or ValueRange()
        self.channels = channels
        self.convert_channels = convert_channels
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: Item) -> Sample:
        """The sample of an item; where its image cannot be read, that of another image.

        The key stays that of the image asked for: what stands in, and how it is cut and filtered, follows
        from it, and an image that stands in is not shown twice alike.

        Args:
            item: (epoch, position, index) from the sampler.

        Raises:
            UserError: image after image cannot be read.
        """
        epoch, _, asked = item
        identity = self.source.identity(asked)
        key = sample_key(self.seed, epoch, identity)
        keys = [sample_key(self.seed, epoch, identity, view) for view in range(len(self.geometries))]
        skipped: Skipped = []
        for index in candidates(asked, key, len(self.source)):
            try:
                views = self._views(self._open(index), keys)
            except BadImage as error:
                skipped.append((self.source.name(index), error.reason))
                continue
            label = self.source.label(index)
            return Sample(views, key, -1 if label is None else label, index, skipped)
        raise none_usable(skipped)

    def __getitems__(self, items: Sequence[Item]) -> list[Sample] | UserError:
        """The samples of a batch, or the error for the user: torch buries a raised one in a traceback."""
        try:
            return [self[item] for item in items]
        except UserError as error:
            return error

    def _open(self, index: int) -> Picture:
        with as_bad_image():
            picture = self.source.open(index)
        check_channels(picture.channels, self.channels, self.convert_channels)
        return picture

    def _views(self, picture: Picture, keys: Sequence[int]) -> list[Tensor]:
        """All views of one picture."""
        at_least = [geometry.at_least() for geometry in self.geometries]
        for attempt in range(WINDOWS):
            boxes = [g.box(picture.size, key, attempt) for g, key in zip(self.geometries, keys, strict=True)]
            with as_bad_image():
                windows = decode_windows(picture, boxes, at_least)
            gaps = [missing_pixels(window, picture.nodata) for window in windows]
            if not any(is_empty(window, gap) for window, gap in zip(windows, gaps, strict=True)):
                break
        else:
            windows, gaps = self._whole(picture)
        tensors = [self._tensor(window, gap) for window, gap in zip(windows, gaps, strict=True)]
        return [g.finish(tensor, key) for g, tensor, key in zip(self.geometries, tensors, keys, strict=True)]

    def _whole(self, picture: Picture) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        """The whole picture for every view, because window after window of it was empty."""
        with as_bad_image():
            image = picture.decode(None, self.geometries[0].at_least())
        gap = missing_pixels(image, picture.nodata)
        reason = is_empty(image, gap)
        if reason is not None:
            raise BadImage(reason)
        return [image] * len(self.geometries), [gap] * len(self.geometries)

    def _tensor(self, window: np.ndarray, gap: np.ndarray | None) -> Tensor:
        """A window with the run's channels and value range; no copy where none is needed."""
        filled = convert_channels(fill_missing(window, gap), self.channels)
        scaled = self.value_range.apply(filled)
        return torch.from_numpy(scaled if scaled.flags.writeable else scaled.copy(order="K"))


def candidates(asked: int, key: int, images: int) -> Iterator[int]:
    """The image asked for, then those that may stand in for it.

    Args:
        asked: index of the image.
        key: key of the sample, which decides what stands in.
        images: how many there are.
    """
    yield asked
    for number in uniform_numbers(key, "substitute", SUBSTITUTES):
        yield int(number * images)


def none_usable(skipped: Skipped) -> UserError:
    """The error where neither an image nor any that may stand in for it can be read."""
    name, reason = skipped[0]
    return UserError(
        f"{len(skipped)} images in a row cannot be used; the first, {name}: {reason}; check DATA"
    )


@contextlib.contextmanager
def as_bad_image() -> Iterator[None]:
    """Whatever a decoder raises on a broken file is a bad image: the run goes on and lists it."""
    try:
        yield
    except (BadImage, UserError):
        raise
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error
