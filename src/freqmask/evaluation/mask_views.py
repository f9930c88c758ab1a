"""Training and test views of an image and its mask: one random scale, crop and flip for both, or the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int16, Shaped
from torch import Tensor

from freqmask.data.loader import TrainDataset, as_bad_image
from freqmask.data.pixels import Box, Picture, missing_pixels
from freqmask.data.source import Source
from freqmask.data.transforms import Geometry, resize
from freqmask.data.values import ValueRange
from freqmask.evaluation.mask_data import IGNORED
from freqmask.evaluation.mask_files import PairedPicture
from freqmask.rng import uniform_numbers

MOST_OF_ONE_CLASS = 0.75  # a crop that holds more of it is drawn again, as mmsegmentation's recipes do
_TRIES = 10


@dataclass(frozen=True)
class RandomCrop:
    """How a training sample is cut: scaled by a random factor, cropped, mirrored half of the time."""

    crop: int  # side of the sample in pixels
    scale: tuple[float, float] = (0.5, 2.0)  # smallest and largest factor, drawn uniformly
    image_size: int | None = (
        None  # shorter side that images are brought to before; None leaves them as they are
    )
    flip: float = 0.5  # probability

    def window(self, size: tuple[int, int], key: int, attempt: int = 0) -> tuple[Box, tuple[int, int]]:
        """The window of an image of (height, width), and what it is resampled to: the crop, or less of a small image.

        Another ``attempt`` draws another place.
        """
        drawn, _ = uniform_numbers(key, "scale", 2)
        factor = self.scale[0] + drawn * (self.scale[1] - self.scale[0])
        scaled = scaled_size(size, self.image_size, factor)
        place = uniform_numbers(key, f"crop/{attempt}", 2)
        box, shown = [], []
        for side, large, where in zip(size, scaled, place, strict=True):
            part = min(self.crop, large)
            length = max(1, min(side, round(part * side / large)))
            box.append((int(where * (side - length + 1)), length))
            shown.append(part)
        return (box[0][0], box[1][0], box[0][1], box[1][1]), (shown[0], shown[1])


def scaled_size(size: tuple[int, int], image_size: int | None, factor: float = 1.0) -> tuple[int, int]:
    """Height and width after bringing the shorter side to ``image_size`` and scaling by ``factor``.

    >>> scaled_size((360, 480), 180), scaled_size((360, 480), None, 0.5)
    ((180, 240), (180, 240))
    """
    factor *= 1.0 if image_size is None else image_size / min(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


class PairDataset(TrainDataset):
    """Samples of two views: the image, uint8 or float32 in [0, 1], and the classes of its pixels, int16.

    Args:
        source: images with masks.
        lookup: label -> class, or ``IGNORED``.
        value_range: the values that become 0 and 1.
        channels: of the image.
        seed: of the draws.
        crop: how samples are cut; None gives whole images at their evaluated size beside whole masks.
        image_size: shorter side of whole images in pixels; None leaves them as they are.
        fill: what stands beyond the image's edge, one number in [0, 1] a channel.
    """

    def __init__(
        self,
        source: Source,
        lookup: Int16[np.ndarray, " label"],
        value_range: ValueRange,
        channels: int,
        seed: int = 0,
        crop: RandomCrop | None = None,
        image_size: int | None = None,
        fill: Sequence[float] = (),
    ) -> None:
        # One geometry for one key a sample; windows are chosen here, for image and mask together.
        super().__init__(source, [Geometry(crop="whole")], value_range, channels, seed=seed)
        self.lookup, self.crop, self.image_size = lookup, crop, image_size
        self.fill = np.array(fill or [0.5] * channels, np.float32)

    def _views(self, picture: Picture, keys: Sequence[int]) -> list[Tensor]:
        assert isinstance(picture, PairedPicture)
        classes = self.lookup[picture.mask()]
        if self.crop is None:
            image = self._image(picture, (0, 0, *picture.size))
            return [resize(image, scaled_size(picture.size, self.image_size)), torch.from_numpy(classes)]
        return self._cropped(picture, classes, self.crop, keys[0])

    def _cropped(
        self, picture: PairedPicture, classes: np.ndarray, crop: RandomCrop, key: int
    ) -> list[Tensor]:
        box, shown, window = self._choose(picture, classes, crop, key)
        image = resize(self._image(picture, box), shown)
        target = nearest(window, shown)
        image, target = self._padded(image, target, crop.crop)
        if uniform_numbers(key, "flip", 1)[0] < crop.flip:
            image, target = image.flip(-1), target.flip(-1)
        return [image, target]

    def _choose(
        self, picture: PairedPicture, classes: np.ndarray, crop: RandomCrop, key: int
    ) -> tuple[Box, tuple[int, int], np.ndarray]:
        """The first window that no class fills, what it is resampled to, and its classes."""
        for attempt in range(_TRIES):
            box, shown = crop.window(picture.size, key, attempt)
            window = classes[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
            counts = np.bincount(window[window >= 0])
            if counts.size and counts.max() < MOST_OF_ONE_CLASS * counts.sum():
                break
        return box, shown, window

    def _image(self, picture: Picture, box: Box) -> Tensor:
        """A part of an image with the model's channels and value range."""
        with as_bad_image():
            window = picture.decode(box)
        gap = missing_pixels(window, picture.nodata)
        if gap is not None and gap.all():  # beside a satellite's track, say
            values = np.broadcast_to(self.fill[:, None, None], (self.channels, *window.shape[1:]))
            return torch.from_numpy(values.copy())
        return self._tensor(window, gap)

    def _padded(self, image: Tensor, target: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Both made square, at the bottom and the right; what is added does not count."""
        height, width = target.shape
        if (height, width) == (side, side):
            return image, target
        fill = torch.from_numpy(self.fill)
        fill = (255 * fill).round().to(torch.uint8) if image.dtype == torch.uint8 else fill
        square = fill[:, None, None].expand(-1, side, side).clone()
        square[:, :height, :width] = image
        padded = torch.full((side, side), IGNORED, dtype=target.dtype)
        padded[:height, :width] = target
        return square, padded


def nearest(
    mask: Shaped[np.ndarray, "old_height old_width"], size: tuple[int, int]
) -> Int16[Tensor, "height width"]:
    """A mask at another size: every pixel takes the class of the old pixel in which its center lies."""
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.int64), old - 1)
        for new, old in zip(size, mask.shape, strict=True)
    )
    return torch.from_numpy(np.ascontiguousarray(mask[rows[:, None], columns], dtype=np.int16))
