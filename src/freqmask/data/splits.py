"""Train and held-out parts: found by their usual names, or drawn by us without dividing a group or a block."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from freqmask.data.source import Source
from freqmask.errors import UserError, nearest
from freqmask.rng import combine, uniform

ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""What the three usual splits are called."""
_FEWEST = 10  # of fewer images none can be held out
_FILLERS = frozenset({
    "set", "sets", "data", "dataset", "images", "image", "imgs", "img", "pictures", "photos", "folder", "split", "seg",
    "files",
})  # fmt: skip


def split_of(name: str) -> str | None:
    """``train``, ``val`` or ``test`` for one of their usual names in any case, else None.

    >>> split_of("training_set"), split_of("TestImages"), split_of("val2017"), split_of("train_station")
    ('train', 'test', 'val', None)
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = [word for word in re.split(r"[\W_]+|(?<=[a-z])(?=(?:19|20)\d\d$)", spaced.lower()) if word]
    words = [re.sub(r"(?<=^train)set$|(?<=^test)set$|(?<=^val)set$", "", word) for word in words]
    kept = [word for word in words if word not in _FILLERS and not re.fullmatch(r"(19|20)\d\d", word)]
    if len(kept) != 1:
        return None
    return next((split for split, names in ALIASES.items() if kept[0] in names), None)


def split_of_shard(name: str) -> str | None:
    """The split that a shard's folder or file name tells.

    >>> split_of_shard("val/000001.tar"), split_of_shard("imagenet-train-000007.tar"), split_of_shard("7.tar")
    ('val', 'train', None)
    """
    *folders, file = name.split("/")
    words = [*folders[-1:], *re.split(r"[-_.]", file.removesuffix(".tar"))]
    return next((word for word in words if split_of(word)), None)


def choose_split(names: Iterable[str], split: str, where: str) -> str | None:
    """Which of the splits that there are is to be used, by the name that it bears; None for everything.

    ``split`` is ``auto`` (train where there is one beside val or test), ``all``, or a name; a UserError that names
    ``where`` for any other.
    """
    known = sorted(names)
    if split == "all":
        return None
    wanted = "train" if split == "auto" else split_of(split) or split
    fitting = [name for name in known if split in (name, name.lower())] or [
        name for name in known if split_of(name) == wanted
    ]
    if split == "auto":
        return fitting[0] if fitting and any(split_of(name) in ("val", "test") for name in known) else None
    if not fitting:
        raise UserError(f"split ({split}) must be one that {where} holds; {nearest(split, [*known, 'all'])}")
    return fitting[0]


@dataclass
class Located:
    """What DATA names, before an image is read."""

    where: str  # DATA as it was typed
    open: Callable[[str | None, list[str]], Source]  # (split or None for all, notes) -> its images
    splits: Sequence[str] | None = None  # None where there cannot be any, and any is everything
    certain: bool = True  # False where the splits may as well be classes and are taken by their names only

    def source(self, split: str) -> Source:
        """The images of a split; of ``auto``, with a sentence on what that leaves out; of ``all``."""
        asked = self.certain or split not in ("auto", "all")
        names = list(self.splits or ()) if asked else []
        chosen = None if self.splits is None else choose_split(names, split, self.where)
        others = " and ".join(sorted(name for name in names if name != chosen))
        note = f"Only {chosen} is used, not {others} beside it (--split all takes everything)."
        return self.open(chosen, [note] if chosen and split == "auto" else [])


def split_indices(
    labels: Sequence[int | None] | np.ndarray | None,
    groups: Sequence[str | None] | None,
    fractions: Sequence[float],
    seed: int,
) -> list[np.ndarray]:
    """Divides images into parts with the same mix of classes, never dividing a group.

    Groups are dealt out from the largest to the smallest, in random order among equals, each to the part
    that lacks its classes most. Without groups every image is its own.

    Args:
        labels: class of each image, None or negative where unknown; None for no labels at all.
        groups: group of each image, None where it belongs to none; None for no groups at all.
        fractions: share of each part, positive; their sum is made 1.
        seed: decides the draw.

    Returns:
        One sorted int64 array of image numbers a part, none of them empty; together they hold every image once.
    """
    if not fractions or min(fractions) <= 0:
        raise UserError(f"fractions ({', '.join(map(str, fractions))}) must all be above 0")
    total = len(labels if labels is not None else groups or ())
    if not total:
        raise UserError("there are no images to split; check DATA")
    shares = np.asarray(fractions, float) / sum(fractions)
    # Classes counted from 0; unknown ones are a class of their own.
    known = [0] * total if labels is None else [-1 if label is None else int(label) for label in labels]
    classes = np.unique(known, return_inverse=True)[1]
    generator = np.random.default_rng(seed)
    if groups is None or all(group is None for group in groups):
        part_of = _deal_images(classes, shares, generator)
    else:
        # An object of its own as the key of a group-less image: no text can collide with it.
        keys = [object() if group is None else group for group in groups]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        part_of = _deal_groups(classes, np.array([numbers[key] for key in keys]), shares, generator)
    parts = [np.flatnonzero(part_of == part) for part in range(len(shares))]
    if any(len(part) == 0 for part in parts):
        raise UserError(
            f"{total} images in {len(set(groups or range(total)))} groups are too few for parts of "
            f"{', '.join(f'{share:.0%}' for share in shares)}; take larger parts or fewer of them"
        )
    return parts


def _deal_images(classes: np.ndarray, shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The part of each image, (image,): every class is shuffled and cut at the shares.

    What rounding takes from one class it gives to the next, so that the parts have their sizes, too. A class
    never misses from the largest part.
    """
    part_of = np.empty(len(classes), np.int64)
    edges, dealt = np.cumsum(shares), 0
    by_class = np.split(np.argsort(classes, kind="stable"), np.cumsum(np.bincount(classes))[:-1])
    for number in generator.permutation(len(by_class)):
        members = generator.permutation(by_class[number])
        cuts = np.rint(edges * (dealt + len(members))) - np.rint(edges * dealt)
        cuts[-1], dealt = len(members), dealt + len(members)
        parts = np.searchsorted(np.maximum.accumulate(cuts), np.arange(len(members)), side="right")
        if shares.argmax() not in parts:
            parts[0] = shares.argmax()
        part_of[members] = parts
    return part_of


def _deal_groups(
    classes: np.ndarray, groups: np.ndarray, shares: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """The part of each image, (image,), the same within a group."""
    counts = np.zeros((groups.max() + 1, classes.max() + 1))
    np.add.at(counts, (groups, classes), 1)
    missing = shares[:, None] * counts.sum(0)  # (part, class): images still to come
    order = generator.permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    part_of_group = np.empty(len(counts), np.int64)
    for group in order:
        # What dealing the group to a part does to the sum of squared shortfalls, per part.
        change = ((missing - counts[group]) ** 2 - missing**2).sum(1) / shares
        part = int(np.argmin(change))
        part_of_group[group] = part
        missing[part] -= counts[group]
    return part_of_group[groups]


def hold_out(
    source: Source, share: float = 0.02, at_most: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Choose images to keep out of training, by the hash of their identity.

    Whether an image is held out depends on itself: when images are added or removed, nearly all of the others
    stay on their side. Where one image cannot be had without all of its block, blocks are held out by the hash of
    their first images, and only the last of them is divided.

    Args:
        source: the images.
        share: share of the images, in [0, 1), but ``at_most`` so many; below ten images none is held out, from ten
            on at least one, unless either is 0.
        at_most: the largest number of them.
        seed: another seed holds out others.

    Returns:
        Indices to train on and indices held out, both increasing.
    """
    if not 0 <= share < 1:
        raise UserError(f"held-out share ({share}) must be from 0 to below 1; try 0.02")
    total = len(source)
    wanted = min(at_most, max(1, round(share * total))) if share > 0 and total >= _FEWEST else 0
    if wanted == 0:
        return np.arange(total), np.arange(0)
    identities = torch.tensor([source.identity(index) for index in range(total)], dtype=torch.int64)
    drawn = uniform(combine(identities, "hold out", seed), 0).numpy()
    blocks = source.blocks()
    if blocks is None or not blocks.whole:
        order = np.argsort(drawn, kind="stable")
    else:
        _, first, block = np.unique(blocks.numbers, return_index=True, return_inverse=True)
        order = np.lexsort((drawn, drawn[first][block]))
    return np.sort(order[wanted:]), np.sort(order[:wanted])
