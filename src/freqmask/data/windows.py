"""The windows of a whole batch at once: those that :class:`freqmask.data.views.Geometry` draws one by one.

The numbers, the order of the operations and the type (float64) are those of ``Geometry.box`` and
``Geometry.finish``, so that an image is cut, mirrored and turned alike whichever of them does it. They are drawn on
the host, where float64 is the same everywhere, and take a few numbers an image to the device.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from freqmask.data.views import TRIES, Geometry
from freqmask.rng import uniform

Sizes = Int64[Tensor, "batch 2"]
Boxes = Int64[Tensor, "batch 4"]
_DOUBT = 1e-9  # the exponential of torch and that of Python differ by 1e-16 of a side of some hundred pixels


def draw_boxes(geometry: Geometry, sizes: Sizes, keys: Int64[Tensor, " batch"], attempt: int = 0) -> Boxes:
    """``geometry.box`` for every image of a batch.

    Args:
        geometry: how the view is cut.
        sizes: (height, width) of each picture, on the host.
        keys: the views' keys.
        attempt: another number draws other windows.

    Returns:
        (top, left, height, width) of each window.
    """
    if geometry.crop == "whole":
        return torch.cat((torch.zeros_like(sizes), sizes), dim=1)
    if geometry.crop == "center":
        return _centred(sizes, geometry.size)
    numbers = uniform(keys, f"crop/{attempt}", (2 * TRIES + 2,)).double()
    if geometry.crop == "native":
        return _placed(sizes, _native(sizes, geometry.size), numbers[:, :2])
    sides = _random_sides(geometry, sizes, numbers[:, 2:])
    boxes = _first_that_fits(geometry, sizes, sides, numbers[:, :2])
    # Where a side may round either way, the formula for one image decides.
    doubtful = ((sides.frac() - 0.5).abs() < _DOUBT).flatten(1).any(dim=1)
    for row in doubtful.nonzero()[:, 0].tolist():
        height, width = sizes[row].tolist()
        boxes[row] = torch.tensor(geometry.box((height, width), int(keys[row]), attempt))
    return boxes


def draw_attitudes(geometry: Geometry, keys: Int64[Tensor, " batch"]) -> Bool[Tensor, "batch 3"]:
    """How ``geometry.finish`` mirrors and turns every view of a batch.

    A quarter turn is a mirroring followed by an exchange of rows and columns.

    Args:
        geometry: how the view is cut.
        keys: the views' keys.

    Returns:
        Whether each view is mirrored left to right, top to bottom, and has then its rows and columns exchanged.
    """
    horizontal, vertical, turn = uniform(keys, "flip", (3,)).double().unbind(1)
    mirrored = horizontal < geometry.horizontal_flip
    upended = vertical < geometry.vertical_flip
    quarters = (4 * turn).long() if geometry.quarter_turns else torch.zeros_like(keys)
    mirrored = mirrored ^ ((quarters == 1) | (quarters == 2))
    upended = upended ^ (quarters >= 2)
    return torch.stack((mirrored, upended, quarters % 2 == 1), dim=1)


def smallest_side(geometry: Geometry, picture_size: tuple[int, int]) -> int:
    """A side in pixels that no window of the picture falls below, at least 1."""
    height, width = picture_size
    if geometry.crop == "whole":
        return min(height, width)
    _, _, *centred = _centred(torch.tensor([picture_size]), geometry.size)[0].tolist()
    if geometry.crop == "center":
        return int(min(centred))
    if geometry.crop == "native":
        return int(_native(torch.tensor([picture_size]), geometry.size).min())
    area, shape = geometry.scale[0] * height * width, geometry.size[1] / geometry.size[0]
    random = math.sqrt(area * min(1 / (shape * geometry.ratio[1]), shape * geometry.ratio[0]))
    return max(1, min(math.floor(random), *centred))


def _random_sides(
    geometry: Geometry, sizes: Sizes, numbers: Float[Tensor, "batch twice_tries"]
) -> Float[Tensor, "batch tries 2"]:
    """Height and width of the windows of random area and shape, not rounded, one a try."""
    shape = geometry.size[1] / geometry.size[0]
    low, high = math.log(geometry.ratio[0]), math.log(geometry.ratio[1])
    smallest, largest = geometry.scale
    first, second = numbers[:, 0::2], numbers[:, 1::2]
    area = sizes.prod(dim=1, keepdim=True).double() * (smallest + first * (largest - smallest))
    aspect = shape * torch.exp(low + second * (high - low))
    return torch.stack((torch.sqrt(area / aspect), torch.sqrt(area * aspect)), dim=-1)


def _first_that_fits(
    geometry: Geometry,
    sizes: Sizes,
    sides: Float[Tensor, "batch tries 2"],
    place: Float[Tensor, "batch 2"],
) -> Boxes:
    """The first window that lies inside the picture; where none does, the largest centred one."""
    windows = sides.round().long()
    fits = ((windows > 0) & (windows <= sizes[:, None])).all(dim=-1)
    first = fits.int().argmax(dim=1)
    boxes = _placed(sizes, windows[torch.arange(len(first)), first], place)
    return torch.where(fits.any(dim=1, keepdim=True), boxes, _centred(sizes, geometry.size))


def _native(sizes: Sizes, view_size: tuple[int, int]) -> Sizes:
    """The view's own size; for a smaller picture, the largest window of the view's shape."""
    view = torch.tensor(view_size, dtype=torch.float64)
    enlarged = (view / sizes).amax(dim=1, keepdim=True).clamp(min=1.0)
    return (view / enlarged).round().long().minimum(sizes).clamp(min=1)


def _centred(sizes: Sizes, view_size: tuple[int, int]) -> Boxes:
    """The largest centred window of the view's shape."""
    view = torch.tensor(view_size, dtype=torch.float64)
    factor = (sizes / view).amin(dim=1, keepdim=True)
    windows = (view * factor).round().long().minimum(sizes).clamp(min=1)
    return torch.cat(((sizes - windows) // 2, windows), dim=1)


def _placed(sizes: Sizes, windows: Sizes, place: Float[Tensor, "batch 2"]) -> Boxes:
    """Put each window at one of the places it can take."""
    return torch.cat(((place * (sizes - windows + 1)).long(), windows), dim=1)
