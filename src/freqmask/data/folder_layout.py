"""How people lay folders of images out: splits, classes, masks, and folders that wrap everything."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from freqmask.data.index import MASK_FILE, FolderIndex
from freqmask.data.splits import choose_split, split_of

IMAGE_WORDS = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit", "rgb", "photos", "pictures")
MASK_WORDS = (
    "segmentationclass", "segmentationobject", "segmentations", "segmentation", "annotations", "annotation", "annot",
    "labelmaps", "labels", "label", "masks", "mask", "groundtruth", "gtfine", "gtcoarse", "gts", "gt", "trimaps",
    "trimap", "mattes", "segs", "seg",
)  # fmt: skip
_SIBLINGS = 8
_LOOKED_AT = 3  # files of a folder that may hold masks


@dataclass
class Layout:
    """How a folder is laid out.

    Attributes:
        index: the images, masks passed over.
        base: the folder on the way to all of them below which classes or splits begin; empty for the root.
        splits: names of the folders below the base that are splits.
        certain: False where those may as well be classes, such as ``test`` beside ``apple``.
        notes: sentences for the user.
    """

    index: FolderIndex
    base: bytes = b""
    splits: list[str] = field(default_factory=list)
    certain: bool = False
    notes: list[str] = field(default_factory=list)

    def part(self, split: str) -> str:
        """The relative path of a split."""
        return os.fsdecode(_joined(self.base, os.fsencode(split)))


def lay_out(index: FolderIndex, is_mask: Callable[[bytes], bool] | None = None) -> Layout:
    """How the images of a folder are laid out.

    Args:
        index: its files.
        is_mask: whether a file looks like a mask; None where files cannot be looked at.
    """
    masks = _mask_folders(index, is_mask)
    kept = [
        number
        for number, folder in enumerate(index.folders)
        if not any(folder == mask or folder.startswith(mask + b"/") for mask in masks)
    ]
    notes = [
        f"{os.fsdecode(mask)} holds masks of {os.fsdecode(images)} and is passed over."
        for mask, images in masks.items()
    ]
    if len(kept) < len(index.folders):
        index = index.select(kept)
    if index.masks:
        notes.append(f"{index.masks:,} masks beside their images (such as a_mask.png) are passed over.")
    base, splits, certain = _find_splits(index)
    return Layout(index, base, splits, certain, notes)


def _find_splits(index: FolderIndex) -> tuple[bytes, list[str], bool]:
    """Where classes or splits begin, the splits there, and whether they can be nothing else."""
    children, base = _children(index), b""
    while True:
        names = children.get(base, [])
        loose = bool(_files_in(index, base))
        kinds = {os.fsdecode(name): split_of(os.fsdecode(name)) for name in names}
        splits = sorted(name for name, kind in kinds.items() if kind)
        if splits:
            found = {kinds[name] for name in splits}
            certain = len(splits) == len(names) or ("train" in found and len(found) > 1)
            return base, splits, certain
        if len(names) != 1 or loose:
            return base, [], False
        base = _joined(base, names[0])


def _children(index: FolderIndex) -> dict[bytes, list[bytes]]:
    """Relative path of each folder -> the names of those in it."""
    found: dict[bytes, list[bytes]] = {}
    for folder in index.folders:
        if folder:
            parent, _, name = folder.rpartition(b"/")
            found.setdefault(parent, []).append(name)
    return found


def _files_in(index: FolderIndex, folder: bytes) -> int:
    number = index.folders.index(folder)
    return int(index.starts[number + 1] - index.starts[number])


def _joined(*parts: bytes) -> bytes:
    return b"/".join(part for part in parts if part)


def _mask_folders(index: FolderIndex, is_mask: Callable[[bytes], bool] | None) -> dict[bytes, bytes]:
    """Folder of masks -> the folder beside it that holds their images."""
    found = {}
    for parent, names in _children(index).items():
        for name in names:
            word = _mask_word(name)
            if word is None:
                continue
            siblings = [other for other in names if other != name and _mask_word(other) is None]
            named = [other for other in siblings if _belongs(name, word, other)]
            # Among very many folders a mask is a class like the others (ImageNet has three of them).
            for other in named or (siblings if len(siblings) <= _SIBLINGS else []):
                pair = _joined(parent, name), _joined(parent, other)
                if other in named or _looks_like_masks(index, *pair, is_mask):
                    found[pair[0]] = pair[1]
                    break
    return found


def _plain(name: bytes) -> str:
    return "".join(letter for letter in os.fsdecode(name).lower() if letter.isalnum())


def _mask_word(name: bytes) -> str | None:
    plain = _plain(name)
    return next((word for word in MASK_WORDS if plain.startswith(word) or plain.endswith(word)), None)


def _belongs(mask: bytes, word: str, images: bytes) -> bool:
    """Whether names alone say so: masks/images, train_masks/train, labelsTr/imagesTr."""
    rest, plain = _without(_plain(mask), word), _plain(images)
    if rest and rest == plain:
        return split_of(os.fsdecode(images)) is not None
    return any(
        (plain.startswith(image) or plain.endswith(image)) and _without(plain, image) == rest
        for image in IMAGE_WORDS
    )


def _without(plain: str, word: str) -> str:
    return plain.removeprefix(word) if plain.startswith(word) else plain.removesuffix(word)


def _looks_like_masks(
    index: FolderIndex, masks: bytes, images: bytes, is_mask: Callable[[bytes], bool] | None
) -> bool:
    """Whether a folder's files have the names of those beside it, and few colours where those have many."""
    wanted, there = dict(_stems_below(index, masks)), dict(_stems_below(index, images))
    partners = [stem for stem in wanted if stem in there]
    if is_mask is None or len(partners) < 0.9 * len(wanted):
        return False
    some = partners[:_LOOKED_AT]
    return all(is_mask(wanted[stem]) and not is_mask(there[stem]) for stem in some)


def _stems_below(index: FolderIndex, folder: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(path relative to the folder without suffix and without what marks a mask, path) of each file below."""
    for number, path in enumerate(index.folders):
        if path == folder or path.startswith(folder + b"/"):
            for name in index.names_in(number):
                stem = name.rpartition(b".")[0]
                marked = MASK_FILE.fullmatch(stem)
                yield _joined(path[len(folder) + 1 :], marked[1] if marked else stem), _joined(path, name)


def below(index: FolderIndex, folder: str) -> FolderIndex:
    """The images below a folder of an index, whose paths are then relative to it."""
    if not folder:
        return index
    name = os.fsencode(folder)
    chosen = [k for k, path in enumerate(index.folders) if path == name or path.startswith(name + b"/")]
    return index.select(chosen, name)


def classes_of(index: FolderIndex) -> tuple[list[str] | None, np.ndarray, str]:
    """Names of the classes, or None; the class of each folder (folder,), -1 without; why there are none."""
    base, splits, certain = _find_splits(index)
    tops = [_joined(base, os.fsencode(split)) for split in splits] if certain else [base]
    # Where all of train/, val/ and test/ are asked for, classes lie further down, in each of them at its own depth.
    parts = [_class_folders(index, top) for top in tops]
    names = sorted({name for part, _ in parts for name in part.values()})
    reason = next((reason for _, reason in parts if reason), "")
    none = np.full(len(index.folders), -1, np.int64)
    if len(names) < 2:
        return None, none, reason
    numbers = {name: number for number, name in enumerate(names)}
    for part, _ in parts:
        for folder, name in part.items():
            none[folder] = numbers[name]
    return [os.fsdecode(name) for name in names], none, reason


def _class_folders(index: FolderIndex, top: bytes) -> tuple[dict[int, bytes], str]:
    """Number of a folder with images -> its class; or none, and why."""
    base = _joined(top, _find_base(index, top))
    depth = base.count(b"/") + 1 if base else 0
    used = {
        number: folder.split(b"/")
        for number, folder in enumerate(index.folders)
        if index.starts[number + 1] > index.starts[number]
        and (not base or (folder + b"/").startswith(base + b"/"))
    }
    where = os.fsdecode(base) or "the folder itself"
    classes = {
        number: levels[depth] for number, levels in used.items() if len(levels) > depth and levels[depth]
    }
    loose = [number for number in used if number not in classes]
    if not classes:
        return {}, f"its images lie in {where}, and not in a folder a class"
    if loose:
        names = index.names_in(loose[0])
        first = os.fsdecode(_joined(index.folders[loose[0]], names[0]))
        beside = ", ".join(os.fsdecode(name) for name in sorted(set(classes.values()))[:3])
        return (
            {},
            f"{len(names):,} images (first {first!r}) lie beside the class folders ({beside}); move them into one",
        )
    return classes, ""


def _find_base(index: FolderIndex, top: bytes) -> bytes:
    """The folders between a split and where its classes begin."""
    children, base = _children(index), top
    while len(children.get(base, [])) == 1 and not _files_in(index, base):
        base = _joined(base, children[base][0])
    return base[len(top) + 1 :] if top else base


def choose_folder(layout: Layout, split: str, where: str) -> str | None:
    """The folder of the split that is asked for; one that may be a class is taken only by its name."""
    names = layout.splits if layout.certain or split not in ("auto", "all") else []
    return choose_split(names, split, where)
