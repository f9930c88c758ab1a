"""Where images and masks lie: the folder layouts that people have, and which file belongs to which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from freqmask.data.splits import split_of
from freqmask.errors import UserError

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit")
MASK_FOLDERS = ("masks", "mask", "annotations", "annotation", "labels", "label", "segmentationclass", "gt")
# What tools put behind a mask's name; CamVid's own masks end in _L.
MASK_ENDINGS = ("", "_mask", "-mask", "_label", "_labels", "_seg", "_gt", "_L")
LAYOUTS = (
    "images/SPLIT beside masks/SPLIT, SPLIT/images beside SPLIT/masks, or images beside masks without splits "
    "(annotations or labels will do for masks)"
)


@dataclass(frozen=True)
class Part:
    """The folders of one part of the images.

    Attributes:
        name: of the split, empty where there is none.
        images: folder of images.
        masks: folder of masks.
    """

    name: str
    images: Path
    masks: Path


def find_parts(folder: Path) -> list[Part]:
    """The parts below DATA.

    Args:
        folder: DATA.

    Returns:
        One part a split, sorted by name, or a single part without a name.

    Raises:
        UserError: DATA is laid out otherwise.
    """
    if not folder.is_dir():
        raise UserError(f"DATA ({folder}) must be a folder with images and masks: {LAYOUTS}")
    images, masks = _named(folder, IMAGE_FOLDERS), _named(folder, MASK_FOLDERS)
    if images is not None and masks is not None:
        return parts_of(images, masks)
    parts = []
    for split in _folders(folder):
        images, masks = _named(split, IMAGE_FOLDERS), _named(split, MASK_FOLDERS)
        if split_of(split.name) and images is not None and masks is not None:
            parts.append(Part(split.name, images, masks))
    if not parts:
        there = ", ".join(path.name for path in _folders(folder)[:6]) or "no folder"
        raise UserError(
            f"DATA ({folder}) holds {there}; it must hold {LAYOUTS}; or name both folders with --images and --masks"
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
    there = {path.name.lower(): path for path in _folders(masks)}
    parts = []
    for split in splits:
        partner = there.get(split.name.lower()) or next(
            (path for name, path in there.items() if split_of(name) == split_of(split.name)), None
        )
        # A test split whose masks nobody published is left out; the others are what can be measured on.
        if partner is not None:
            parts.append(Part(split.name, split, partner))
    if not parts:
        raise UserError(f"masks ({masks}) must hold the splits of images, such as {splits[0].name}")
    return parts


def is_ade20k(parts: Iterable[Part]) -> bool:
    """Whether the folders are those of ADE20K's scene parsing release: annotations/training and validation."""
    return all(
        part.masks.parent.name == "annotations" and part.name in ("training", "validation") for part in parts
    )


def match_masks(images: list[str], masks: list[str], part: Part) -> list[int]:
    """The number of each image's mask.

    Args:
        images: paths relative to the folder of images.
        masks: paths relative to the folder of masks.
        part: whose they are, for the message.

    Raises:
        UserError: an image without a mask, a mask without an image, or two masks for an image.
    """
    by_stem: dict[str, int] = {}
    for number, name in enumerate(masks):
        if _stem(name) in by_stem:
            raise UserError(f"masks ({part.masks}) hold {name} in two file formats; remove one of them")
        by_stem[_stem(name)] = number
    found = [_partner(_stem(name), by_stem) for name in images]
    alone = [name for name, number in zip(images, found, strict=True) if number is None]
    partners = [number for number in found if number is not None]
    used = set(partners)
    spare = [name for number, name in enumerate(masks) if number not in used]
    problems = [
        f"{_some(names)} in {where} without {other}"
        for names, where, other in ((alone, part.images, "a mask"), (spare, part.masks, "an image"))
        if names
    ]
    if len(used) < len(partners) and not problems:
        twice = next(
            name for name, number in zip(images, partners, strict=True) if partners.count(number) > 1
        )
        problems = [f"{part.images / twice} and another image would share one mask"]
    if problems:
        raise UserError(
            f"{'; '.join(problems)}; the mask of a.jpg is called a.png or a_mask.png, in the same subfolder"
        )
    return partners


def _partner(stem: str, by_stem: dict[str, int]) -> int | None:
    return next((by_stem[stem + end] for end in MASK_ENDINGS if stem + end in by_stem), None)


def _stem(name: str) -> str:
    """The relative path without the last suffix."""
    head, slash, tail = name.rpartition("/")
    return head + slash + (tail.rpartition(".")[0] or tail)


def _some(names: list[str]) -> str:
    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names):,} {'file' if len(names) == 1 else 'files'} ({first})"


def _named(folder: Path, names: Iterable[str]) -> Path | None:
    there = {path.name.lower(): path for path in _folders(folder)}
    return next((there[name] for name in names if name in there), None)


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
