"""Images with masks: where they lie, which file belongs to which, one class number a pixel, views of both."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int16, Int32, Shaped
from PIL import Image
from torch import Tensor

from freqmask.console import counted
from freqmask.data.cache import hash_of
from freqmask.data.decode import quiet_pillow, read_netpbm
from freqmask.data.image_folder import IMAGE_WORDS, MASK_WORDS, FolderSource
from freqmask.data.index import MASK_FILE, FolderIndex, index_folder
from freqmask.data.loader import TrainDataset
from freqmask.data.pixels import (
    EXIF_TAG,
    Box,
    Orientation,
    Pages,
    Picture,
    Pixels,
    as_bad_image,
    missing_pixels,
    orientation_of,
)
from freqmask.data.source import Source
from freqmask.data.splits import split_of
from freqmask.data.tiff import open_tifffile, turn_of
from freqmask.data.transforms import Geometry, resize
from freqmask.data.values import ValueRange
from freqmask.errors import BadImage, UserError
from freqmask.rng import uniform_numbers

# Lossless ones only: JPEG and its like invent labels along every edge.
MASK_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".npy"})
MOST_LABEL = 65_535
IGNORED = -1  # in targets: counted neither in a loss nor in a score
MOST_OF_ONE_CLASS = 0.75  # a crop that holds more of it is drawn again, as mmsegmentation's recipes do
PACKED_GRAY = {"L;2": 85, "L;4": 17}  # what Pillow makes of a level of PNG's 2- and 4-bit gray, for viewers
HALVED = frozenset({"LA;16B", "RGB;16B", "RGBA;16B"})  # of a PNG: Pillow gives the high byte alone
_TRIES = 10
_MASK_FOLDERS = ("masks", "mask", *MASK_WORDS)  # beside masks, annotations may hold boxes
LAYOUTS = (
    "images/SPLIT beside masks/SPLIT, SPLIT/images beside SPLIT/masks, or images beside masks without splits "
    "(annotations or labels will do for masks)"
)


def read_mask(path: Path) -> Int32[np.ndarray, "height width"]:
    """The labels of a mask (PNG, TIFF, BMP, GIF, PGM, ``.npy``) as it has them: of a palette numbers, of GIF grays.

    Raises:
        BadImage: it cannot be read, holds colors or fractions, or a label is out of 0 to 65,535.
    """
    with as_bad_image("it cannot be read"):
        stored = _read(path)
    labels = stored[..., 0] if stored.ndim == 3 and stored.shape[-1] == 1 else _squeezed(stored)
    # gray that was saved as color is gray; real colors are no labels
    if labels.ndim == 3 and labels.shape[-1] in (3, 4) and (labels[..., :1] == labels[..., :3]).all():
        labels = labels[..., 0]
    if labels.ndim != 2:
        shape = "×".join(map(str, stored.shape))
        raise BadImage(f"it holds {shape} values, which is more than one class number a pixel (colors?)")
    if labels.dtype.kind not in "iub":
        raise BadImage(f"it holds numbers of the type {labels.dtype}; labels are whole numbers")
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) <= MOST_LABEL:
        raise BadImage(
            f"it holds labels from {labels.min()} to {labels.max()}; they go from 0 to {MOST_LABEL}"
        )
    return labels.astype(np.int32)


def _read(path: Path) -> np.ndarray:
    """The numbers in a file, turned as its metadata says, because its image is turned so, too."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if suffix in (".tif", ".tiff"):
        with open_tifffile(path) as tiff:
            return _turned(_squeezed(tiff.asarray()), turn_of(tiff.series[0].keyframe))
    if suffix == ".pgm" and (gray := read_netpbm(path.read_bytes(), above=0)) is not None:
        return gray
    # Labels are numbers as stored: palettes, but those of GIF, and key colors are not looked at
    with quiet_pillow, Image.open(path, formats=["PNG", "BMP", "GIF", "PPM"]) as image:
        stored = str(image.tile[0].args) if image.tile else ""
        if stored in HALVED:
            raise BadImage(
                "it holds 16 bits with colors or opacity, of which half are read; save it as plain gray"
            )
        step = PACKED_GRAY.get(stored, 1)
        orientation = orientation_of(image.getexif().get(EXIF_TAG))
        shown: Image.Image = image
        if image.mode == "LA":  # opacity is left out of gray, as it is where gray was saved as color
            shown = image.getchannel("L")
        elif image.format == "GIF":  # writers number its palette anew in every file
            shown = image.convert("RGB")
        return _turned(np.asarray(shown), orientation) // step


def _turned(array: np.ndarray, orientation: Orientation) -> np.ndarray:
    planes = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return array if array.ndim not in (2, 3) else np.moveaxis(orientation.show(planes), 0, -1)


def _squeezed(array: np.ndarray) -> np.ndarray:
    """Without axes of one, as of a single channel or page; a row or a column of pixels stays one."""
    return array if array.ndim <= 2 else np.squeeze(array)


@dataclass(frozen=True)
class Part:
    """The folders of one split of the images; its name is empty where there is none."""

    name: str
    images: Path
    masks: Path


def find_parts(folder: Path) -> list[Part]:
    """One part a split below DATA, sorted by name, or a single part without a name.

    Raises:
        UserError: DATA is laid out otherwise.
    """
    if not folder.is_dir():
        raise UserError(f"DATA ({folder}) must be a folder with images and masks: {LAYOUTS}")
    images, masks = _named(folder, IMAGE_WORDS), _named(folder, _MASK_FOLDERS)
    if images is not None and masks is not None:
        return parts_of(images, masks)
    parts = []
    for split in _folders(folder):
        images, masks = _named(split, IMAGE_WORDS), _named(split, _MASK_FOLDERS)
        if split_of(split.name) and images is not None and masks is not None:
            parts.append(Part(split.name, images, masks))
    if not parts:
        held = ", ".join(path.name for path in _folders(folder)[:6]) or "no folder"
        raise UserError(
            f"DATA ({folder}) holds {held}; it must hold {LAYOUTS}; or name both folders with --images and --masks"
        )
    return parts


def parts_of(images: Path, masks: Path) -> list[Part]:
    """The splits below a folder of images and one of masks; where there are none, both as one part.

    Raises:
        UserError: a folder is missing, or a split of the images has no masks.
    """
    for name, path in (("images", images), ("masks", masks)):
        if not path.is_dir():
            raise UserError(f"{name} ({path}) must be a folder; check the path")
    splits = [path for path in _folders(images) if split_of(path.name)]
    if not splits:
        return [Part("", images, masks)]
    by_name = {path.name.lower(): path for path in _folders(masks)}
    parts = []
    for split in splits:
        alike = (path for name, path in by_name.items() if split_of(name) == split_of(split.name))
        partner = by_name.get(split.name.lower()) or next(alike, None)
        # A test split whose masks nobody published is left out; the others are what can be measured on.
        if partner is not None:
            parts.append(Part(split.name, split, partner))
    if not parts:
        raise UserError(f"masks ({masks}) must hold the splits of images, such as {splits[0].name}")
    return parts


def match_masks(images: list[str], masks: list[str], part: Part) -> list[int]:
    """The number of each image's mask, by paths relative to their folders.

    Raises:
        UserError: an image without a mask, a mask without an image, or two masks for an image.
    """
    exact: dict[str, int] = {}
    for number, name in enumerate(masks):
        if _stem(name) in exact:
            raise UserError(f"masks ({part.masks}) hold {name} in two file formats; remove one of them")
        exact[_stem(name)] = number
    ends = {stem: MASK_FILE.fullmatch(os.fsencode(stem)) for stem in exact}
    marked = {os.fsdecode(end[1]): exact[stem] for stem, end in ends.items() if end}
    numbers = [exact.get(_stem(name), marked.get(_stem(name))) for name in images]
    partners = [number for number in numbers if number is not None]
    used = set(partners)
    alone = [name for name, number in zip(images, numbers, strict=True) if number is None]
    spare = [name for number, name in enumerate(masks) if number not in used]
    problems = [
        f"{_some(names)} in {where} without {other}"
        for names, where, other in ((alone, part.images, "a mask"), (spare, part.masks, "an image"))
        if names
    ]
    if len(used) < len(partners) and not problems:
        shared = Counter(partners).most_common(1)[0][0]
        problems = [f"{part.images / images[numbers.index(shared)]} and another image would share one mask"]
    if problems:
        raise UserError(
            f"{'; '.join(problems)}; the mask of a.jpg is called a.png or a_mask.png, in the same subfolder"
        )
    return partners


def _stem(name: str) -> str:
    head, slash, tail = name.rpartition("/")
    return head + slash + (tail.rpartition(".")[0] or tail)


def _some(names: list[str]) -> str:
    return f"{counted(len(names), 'file')} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _named(folder: Path, names: Iterable[str]) -> Path | None:
    by_name = {path.name.lower(): path for path in _folders(folder)}
    return next((by_name[name] for name in names if name in by_name), None)


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


@dataclass
class PairedPicture(Picture):
    """An image that knows the file of its mask."""

    picture: Picture
    mask_path: Path

    def __post_init__(self) -> None:
        self.size, self.channels = self.picture.size, self.picture.channels
        self.dtype, self.nodata = self.picture.dtype, self.picture.nodata

    def decode(self, box: Box | None = None, at_least: tuple[int, int] | None = None) -> Pixels:
        return self.picture.decode(box, at_least)


class PairSource(Source):
    """The images of a folder with the masks of another; one mask belongs to one file, whatever its pages are.

    Raises:
        UserError: a folder is empty, or a file has no partner.
    """

    def __init__(self, part: Part, pages: Pages = "channels") -> None:
        self.part = part
        self.images = FolderSource(part.images, pages)
        self.masks: FolderIndex = index_folder(part.masks, MASK_SUFFIXES)
        if len(self.masks) == 0:
            ignored = ", ".join(self.masks.ignored) or "nothing"
            raise UserError(
                f"masks ({part.masks}) must hold files of {', '.join(sorted(MASK_SUFFIXES))} with one class "
                f"number a pixel; it holds {ignored}"
            )
        if part.images.resolve() == part.masks.resolve():
            raise UserError(f"images and masks ({part.images}) must be two folders")
        files = self.images.index
        names = [files.relative(number) for number in range(len(files))]
        masks = [self.masks.relative(number) for number in range(len(self.masks))]
        partners = match_masks(names, masks, part)
        of_file = {files.path(number): partner for number, partner in enumerate(partners)}
        self.mask_numbers = [of_file[self.images.path(index)] for index in range(len(self.images))]

    def __len__(self) -> int:
        return len(self.images)

    def mask_path(self, index: int) -> Path:
        """The file of an image's mask."""
        return self.masks.path(self.mask_numbers[index])

    def open(self, index: int) -> Picture:
        return PairedPicture(self.images.open(index), self.mask_path(index))

    def name(self, index: int) -> str:
        name = self.images.name(index)
        return f"{self.part.name}/{name}" if self.part.name else name

    def fingerprint(self) -> str:
        pages = f" {len(self)}" if len(self) != len(self.images.index) else ""
        return hash_of(f"{self.images.fingerprint()} {self.masks.fingerprint}{pages}")

    def content_stamp(self) -> str:
        return hash_of(f"{self.images.content_stamp()} {self.masks.content_stamp}")


@dataclass(frozen=True)
class RandomCrop:
    """How a training sample is cut: scaled by a random factor, cropped, mirrored half of the time."""

    crop: int  # side of the sample in pixels
    scale: tuple[float, float] = (0.5, 2.0)  # smallest and largest factor, drawn uniformly
    image_size: int | None = None  # shorter side that images are brought to before; None leaves it as it is
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
        classes = self.lookup[read_mask(picture.mask_path)]
        if self.crop is None:
            image = self._image(picture, (0, 0, *picture.size))
            return [resize(image, scaled_size(picture.size, self.image_size)), torch.from_numpy(classes)]
        for attempt in range(_TRIES):  # the first window that no class fills
            box, shown = self.crop.window(picture.size, keys[0], attempt)
            window = classes[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
            counts = np.bincount(window[window >= 0])
            if counts.size and counts.max() < MOST_OF_ONE_CLASS * counts.sum():
                break
        image = resize(self._image(picture, box), shown)
        image, target = self._padded(image, nearest(window, shown), self.crop.crop)
        if uniform_numbers(keys[0], "flip", 1)[0] < self.crop.flip:
            image, target = image.flip(-1), target.flip(-1)
        return [image, target]

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
        beside = (0, side - width, 0, side - height)
        return square, torch.nn.functional.pad(target, beside, value=IGNORED)


def nearest(
    mask: Shaped[np.ndarray, "old_height old_width"], size: tuple[int, int]
) -> Int16[Tensor, "height width"]:
    """A mask at another size: every pixel takes the class of the old pixel in which its center lies."""
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.int64), old - 1)
        for new, old in zip(size, mask.shape, strict=True)
    )
    return torch.from_numpy(np.ascontiguousarray(mask[rows[:, None], columns], dtype=np.int16))
