"""What the method sees of a picture: a window of it, brought to the asked size, perhaps mirrored or turned.

All randomness comes from the sample's key, so a view does not depend on worker, batch, device or restart.
Windows are chosen from the picture's size alone, before anything is decoded, on the host in float64: one by one in a
loader's worker, together for images in memory, in a tenth of the time. :func:`draw_flips` is `Geometry.finish` for a
whole batch.

:func:`cut_windows` and :func:`resample` cut a batch out of images in memory on a GPU. A loop over images, as on a
CPU, would take a launch of some microseconds for every image and step. Each window has a matrix for its columns and
one for its rows, Pillow's antialiased bicubic, which `resize` computes, too. A sampling grid (``grid_sample``) would
not do: it does not smooth before it reduces, and the spectrum it changes is what is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional

from freqmask.data.pixels import Box, Picture
from freqmask.errors import UserError, nearest
from freqmask.rng import Keys, uniform, uniform_numbers

CROPS = ("resized", "native", "whole", "center")
TRIES = 10  # random windows tried before the largest centered one stands in, as in torchvision
OVERSAMPLING = 2  # a reduced JPEG keeps twice the asked pixels, so that reducing it leaves no trace
_REACH = 2  # pixels of the coarser of the two grids to which the kernel reaches

Sizes = Int64[Tensor, "batch 2"]
Boxes = Int64[Tensor, "batch 4"]
Side = Any  # in pixels: of one picture, or an array of those of a batch


@dataclass(frozen=True)
class Geometry:
    """How one view is cut out of a picture; a UserError names all that is wrong with the settings.

    The default is MFM's (docs/methods.md, MFM): a random window of 20 to 100 % of the area, bicubic, mirrored
    half of the time. Every resampling is bicubic (a = -0.5) with antialiasing, as Pillow's. ``"resized"`` resamples a
    random window. ``"native"`` takes one of the view's size, neither resampled nor decoded reduced, for signals that
    live in single pixels. ``"whole"`` resamples the whole picture, ``"center"`` the largest centered window. A picture
    smaller than the window is enlarged, whatever ``crop`` says.
    """

    image_size: int | tuple[int, int] = 224  # side, or (height, width), of the view in pixels
    scale: tuple[float, float] = (0.2, 1.0)  # least and most of the area in a "resized" window, in (0, 1]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # its width over height in the view's, log-uniform
    crop: str = "resized"  # one of CROPS
    horizontal_flip: float = 0.5  # probability of mirroring left and right
    vertical_flip: float = 0.0  # probability of mirroring top and bottom
    quarter_turns: bool = False  # True turns it by 0, 90, 180 or 270 degrees, equally likely
    center_share: float = 1.0  # of its side in a "center" window, in (0, 1]: 224/256 is usual

    def __post_init__(self) -> None:
        problems = []
        if min(self.size) < 1:
            problems.append(f"image_size ({self.image_size}) must be at least 1 pixel")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            problems.append(
                f"crop_scale {self.scale} must be two shares of the area, 0 < smallest <= largest <= 1"
            )
        if not 0 < self.center_share <= 1:
            problems.append(f"center_share ({self.center_share}) must be a share of the side, above 0 to 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            problems.append(f"ratio {self.ratio} must be two positive numbers, the smaller first")
        if self.crop not in CROPS:
            problems.append(f"crop ({self.crop!r}) is not known; {nearest(self.crop, CROPS)}")
        flips = {"horizontal_flip": self.horizontal_flip, "vertical_flip": self.vertical_flip}
        wrong = [(name, share) for name, share in flips.items() if not 0 <= share <= 1]
        problems += [f"{name} ({share}) must be a probability, 0 to 1" for name, share in wrong]
        if self.quarter_turns and self.size[0] != self.size[1]:
            problems.append(f"quarter_turns needs a square view, image_size is {self.size}; switch it off")
        if problems:
            raise UserError("; ".join(problems))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the view in pixels."""
        side = self.image_size
        return (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))

    def box(self, picture_size: tuple[int, int], key: int, attempt: int = 0) -> Box:
        """The window of this view in a picture of (height, width), by the view's key (:func:`freqmask.rng.sample_key`).

        Another ``attempt`` draws another window, for when the first one held nothing.
        """
        box: Sequence[Any] | None = None
        for tries in (1, TRIES) if self.crop == "resized" else ():
            # the first one nearly always fits, and drawing numbers takes most of the time
            numbers = uniform_numbers(key, f"crop/{attempt}", 2 + 2 * tries)
            windows = (self._window(*picture_size, *numbers[k : k + 2]) for k in range(2, len(numbers), 2))
            box = next((_placed(*picture_size, window, numbers) for *window, fits in windows if fits), None)
            if box is not None:
                break
        box = box or self._unplaced(*picture_size)
        if self.crop == "native":
            box = _placed(*picture_size, box[2:], uniform_numbers(key, f"crop/{attempt}", 2))
        top, left, height, width = (int(number) for number in box)
        return top, left, height, width

    def boxes(self, sizes: Sizes, keys: Keys, attempt: int = 0) -> Boxes:
        """`box` for every image of a batch; ``sizes`` are (height, width) of each picture, on the host."""
        height, width = sizes.double().numpy().T
        box: Any = self._unplaced(height, width)
        if self.crop in ("native", "resized"):
            numbers = uniform(keys, f"crop/{attempt}", (2 + 2 * TRIES,)).double().numpy().T
            if self.crop == "native":
                box = _placed(height, width, box[2:], numbers)
            else:
                *windows, fits = self._window(height, width, numbers[2::2], numbers[3::2])  # (try, batch)
                first, every = fits.argmax(axis=0), np.arange(len(keys))
                placed = _placed(height, width, [side[first, every] for side in windows], numbers)
                box = np.where(fits.any(axis=0), placed, box)
        return torch.from_numpy(np.stack(box, axis=1)).long()

    def _unplaced(self, height: Side, width: Side) -> tuple[Side, Side, Side, Side]:
        """The window that no number is drawn for, or that stands in where none of the drawn ones fits."""
        if self.crop == "whole":
            return 0.0 * height, 0.0 * width, height, width
        rows, columns = self.size
        if self.crop == "native":
            enlarged = np.maximum(np.maximum(rows / height, columns / width), 1.0)
            return 0.0, 0.0, _at_most(height, rows / enlarged), _at_most(width, columns / enlarged)
        factor = np.minimum(height / rows, width / columns)
        factor = factor * self.center_share if self.crop == "center" else factor
        tall, wide = _at_most(height, rows * factor), _at_most(width, columns * factor)
        return (height - tall) // 2, (width - wide) // 2, tall, wide

    def _window(self, height: Side, width: Side, first: Side, second: Side) -> tuple[Side, Side, Side]:
        """Height and width of a window of random area and shape, and whether it fits."""
        smallest, largest = self.scale
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        area = height * width * (smallest + first * (largest - smallest))
        aspect = self.size[1] / self.size[0] * np.exp(low + second * (high - low))
        tall, wide = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
        return tall, wide, (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)

    def at_least(self) -> tuple[int, int] | None:
        """The pixels that a reduced decoding of the window must keep; None where it must not be reduced."""
        if self.crop == "native":
            return None
        return (OVERSAMPLING * self.size[0], OVERSAMPLING * self.size[1])

    def finish(
        self, window: Shaped[Tensor, "channel window_height window_width"], key: int
    ) -> Shaped[Tensor, "channel height width"]:
        """Bring a decoded window (uint8, or float32 in [0, 1]) to the view's size; mirror and turn it by the key."""
        view = resize(window, self.size)
        horizontal, vertical, turn = uniform_numbers(key, "flip", 3)
        if horizontal < self.horizontal_flip:
            view = view.flip(-1)
        if vertical < self.vertical_flip:
            view = view.flip(-2)
        if self.quarter_turns:
            view = torch.rot90(view, int(4 * turn), (-2, -1))
        return view


def resize(
    image: Shaped[Tensor, "channel old_height old_width"], size: tuple[int, int]
) -> Shaped[Tensor, "channel height width"]:
    """Bicubic (a = -0.5) with antialiasing; for uint8 the same as Pillow's to one level.

    uint8 or float32 in [0, 1], which stays; floats are clamped because bicubic overshoots.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    resized = functional.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]
    return resized.clamp_(0, 1) if resized.is_floating_point() else resized


def decode_windows(
    picture: Picture, boxes: Sequence[Box], at_least: Sequence[tuple[int, int] | None]
) -> list[np.ndarray]:
    """Decode a window for each view of one picture, in one go where they lie close together; or a BadImage.

    ``at_least`` are the pixels that each view's window must keep, or None for all.
    """
    top, left = min(box[0] for box in boxes), min(box[1] for box in boxes)
    bottom, right = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    around = (top, left, bottom - top, right - left)
    # Far apart, the rectangle around them can be a whole 30,000-pixel scan for two small windows.
    if len(boxes) == 1 or around[2] * around[3] > 2 * sum(box[2] * box[3] for box in boxes):
        return [picture.decode(box, least) for box, least in zip(boxes, at_least, strict=True)]
    # The rectangle keeps as many pixels as it must for each window to keep its own.
    kept = [(box, least) for box, least in zip(boxes, at_least, strict=True) if least is not None]
    rows = [math.ceil(least[0] * around[2] / box[2]) for box, least in kept]
    columns = [math.ceil(least[1] * around[3] / box[3]) for box, least in kept]
    decoded = picture.decode(around, (max(rows), max(columns)) if len(kept) == len(boxes) else None)
    # It may have come back reduced.
    vertical, horizontal = decoded.shape[1] / around[2], decoded.shape[2] / around[3]
    windows = []
    for box in boxes:
        height, width = max(1, round(box[2] * vertical)), max(1, round(box[3] * horizontal))
        row = min(round((box[0] - top) * vertical), decoded.shape[1] - height)
        column = min(round((box[1] - left) * horizontal), decoded.shape[2] - width)
        windows.append(decoded[:, row : row + height, column : column + width])
    return windows


def _at_most(side: Side, wanted: Side) -> Side:
    return np.maximum(np.minimum(np.rint(wanted), side), 1)


def _placed(height: Side, width: Side, window: Sequence[Side], place: Any) -> tuple[Side, ...]:
    tall, wide = window
    return place[0] * (height - tall + 1) // 1, place[1] * (width - wide + 1) // 1, tall, wide


def draw_flips(geometry: Geometry, keys: Keys) -> Bool[Tensor, "batch 3"]:
    """How ``geometry.finish`` mirrors and turns every view of a batch, by the views' keys.

    Whether each is mirrored left to right, top to bottom, and has then its rows and columns exchanged: a quarter
    turn is a mirroring followed by that.
    """
    horizontal, vertical, turn = uniform(keys, "flip", (3,)).double().unbind(1)
    mirrored = horizontal < geometry.horizontal_flip
    upside_down = vertical < geometry.vertical_flip
    quarters = (4 * turn).long() if geometry.quarter_turns else torch.zeros_like(keys)
    mirrored = mirrored ^ ((quarters == 1) | (quarters == 2))
    upside_down = upside_down ^ (quarters >= 2)
    return torch.stack((mirrored, upside_down, quarters % 2 == 1), dim=1)


def smallest_side(geometry: Geometry, picture_size: tuple[int, int]) -> int:
    """A side in pixels that no window of the picture falls below, at least 1."""
    unplaced = int(min(geometry._unplaced(*picture_size)[2:]))
    if geometry.crop != "resized":
        return unplaced
    area, shape = geometry.scale[0] * math.prod(picture_size), geometry.size[1] / geometry.size[0]
    random = math.sqrt(area * min(1 / (shape * geometry.ratio[1]), shape * geometry.ratio[0]))
    return max(1, min(math.floor(random), unplaced))


def cut_windows(
    pixels: Shaped[Tensor, "pixel channel"],
    starts: Int64[Tensor, " batch"],
    strides: Int64[Tensor, " batch"],
    boxes: Int64[Tensor, "batch 4"],
    padded: tuple[int, int],
) -> Shaped[Tensor, "batch padded_height channel padded_width"]:
    """The windows of some images, each in the corner of a frame of the same size.

    ``boxes`` are (top, left, height, width). The frame (height, width) is at least as large as every window; beyond
    one it holds whatever lies behind.
    """
    first = starts + boxes[:, 0] * strides + boxes[:, 1]
    lines = first[:, None] + torch.arange(padded[0], device=pixels.device) * strides[:, None]
    places = lines[:, :, None] + torch.arange(padded[1], device=pixels.device)
    taken = pixels.index_select(0, places.clamp_(max=len(pixels) - 1).flatten())
    return taken.view(*places.shape, pixels.shape[1]).transpose(2, 3)


def are_empty(
    pixels: Tensor, starts: Tensor, strides: Tensor, boxes: Tensor, frame: tuple[int, int]
) -> Shaped[Tensor, " flat"]:
    """Which windows hold one value only in each channel; arguments as for `cut_windows`."""
    windows = cut_windows(pixels, starts, strides, boxes, frame)  # (flat, height, channel, width)
    below = torch.arange(frame[0], device=pixels.device) >= boxes[:, 2, None]
    beside = torch.arange(frame[1], device=pixels.device) >= boxes[:, 3, None]
    outside = below[:, :, None] | beside[:, None]
    same: Tensor = (windows == windows[:, :1, :, :1]) | outside[:, :, None]
    return same.flatten(1).all(dim=1)


def resample(
    windows: Float[Tensor, "batch padded_height channel padded_width"],
    sizes: Int64[Tensor, "batch 2"],
    size: tuple[int, int],
    flips: Bool[Tensor, "batch 3"],
    levels: bool,
    turned: bool = False,
) -> Shaped[Tensor, "batch channel height width"]:
    """Bring windows to one size, mirrored and turned.

    Args:
        windows: float32 pixels, lines of all channels one below the other. What lies beyond a window's own size may be
            any finite number.
        sizes: (height, width) of each window in pixels.
        size: (height, width) asked.
        flips: whether each is mirrored, upside_down, and has then rows and columns exchanged.
        levels: True for values from 0 to 255, which are rounded after each of the two products as Pillow does, and
            come back as uint8; False for values in [0, 1], which are clamped to it.
        turned: whether rows and columns of any may be exchanged, which wants a square size.
    """
    batch, height, channels, width = windows.shape
    mirrored, upside_down, exchanged = flips.unbind(1)
    if (height, size[0]) == (width, size[1]):  # together they take half of the small operations
        both = resampling_matrices(sizes.T.flatten(), width, size[0], torch.cat((upside_down, mirrored)))
        rows, columns = both.split(batch)
    else:
        rows = resampling_matrices(sizes[:, 0], height, size[0], upside_down)
        columns = resampling_matrices(sizes[:, 1], width, size[1], mirrored)
    lines = windows.reshape(batch, height * channels, width) @ columns.mT
    if levels:
        lines.round_().clamp_(0, 255)
    views = (rows @ lines.view(batch, height, channels * size[1])).view(batch, size[0], channels, size[1])
    views = (views.round_().clamp_(0, 255) if levels else views.clamp_(0, 1)).transpose(1, 2)
    views = views.to(torch.uint8 if levels else views.dtype, memory_format=torch.contiguous_format)
    return torch.where(exchanged[:, None, None, None], views.mT, views) if turned else views


def resampling_matrices(
    lengths: Int64[Tensor, " batch"], padded: int, out: int, reverse: Bool[Tensor, " batch"]
) -> Float[Tensor, "batch out padded"]:
    """What each of ``out`` pixels of a line takes from each of its ``lengths`` pixels, in ``padded`` columns.

    ``w[i, j] = cubic((j + 1/2 - s (i + 1/2)) / max(s, 1))`` with ``s = length / out``, for ``j < length``, each row
    divided by its sum: a line is smoothed where it is reduced, and its ends are not repeated. Only the few weights
    of a row that can differ from zero are computed, in a third of the time at 64 pixels. The identity where length
    and ``out`` agree; lines in ``reverse`` come out backwards.
    """
    target = torch.arange(out, device=lengths.device) + 0.5
    step = (lengths / out)[:, None]
    width = step.clamp(min=1)
    center = step * torch.where(reverse[:, None], out - target, target)  # (batch, out), in pixels of the line
    taps = min(padded, 2 * math.ceil(_REACH * max(padded / out, 1)) + 1)
    first = (center - _REACH * width).floor_().clamp_(0, padded - taps)
    source = first[:, :, None] + torch.arange(taps, device=lengths.device)
    weights = cubic((source - (center - 0.5)[:, :, None]).div_(width[:, :, None]))
    weights.mul_(source < lengths[:, None, None])
    weights.div_(weights.sum(dim=2, keepdim=True))
    empty = torch.zeros(len(lengths), out, padded, device=lengths.device)
    return empty.scatter_(2, source.long(), weights)


def cubic(distance: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Keys' cubic kernel with a = -0.5 (1981, equation 15), 1 at 0 and 0 at every other integer; overwrites its input.

    Written as ``t^2 (t - 1) / 2 + s^2 (1 - 2 s)`` with ``t = max(2 - |x|, 0)`` and ``s = max(1 - |x|, 0)``, which
    takes less than half the time of choosing between its two pieces.
    """
    outer = distance.abs_().neg_().add_(2)
    inner = (outer - 1).clamp_(min=0)
    outer = outer.clamp_(min=0)
    wide = (outer - 1).mul_(outer).mul_(outer).mul_(0.5)
    return wide.addcmul_(inner * inner, inner.mul_(-2).add_(1))
