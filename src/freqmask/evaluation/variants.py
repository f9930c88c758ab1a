"""Test sets of other people's making: ImageNet-C trees, and class folders such as ImageNet-A, -R, -Sketch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from freqmask.data.sources import Source, open_source
from freqmask.errors import UserError
from freqmask.evaluation.corruptions import CORRUPTIONS, FAMILIES, SEVERITIES
from freqmask.evaluation.labelled import LabelledData, Round


@dataclass(frozen=True)
class Variant:
    """One folder of classes that is tested on.

    Attributes:
        name: for tables: that of the folder, or the corruption and its severity.
        folder: classes lie in it.
        corruption: which, and in what severity; None for a natural test set.
    """

    name: str
    folder: Path
    corruption: tuple[str, int] | None = None


def find_variants(folder: Path, corruptions: Sequence[str], severities: Sequence[int]) -> list[Variant]:
    """What a folder holds.

    ImageNet-C's layout is CORRUPTION/SEVERITY/CLASS/image, where the corruptions may lie in folders of their
    families (noise, blur, weather, digital, extra), as the archives unpack. Anything else is one set of class
    folders.

    Args:
        folder: as typed.
        corruptions: those that are wanted of an ImageNet-C tree.
        severities: those that are wanted.

    Raises:
        UserError: there is no such folder, or what is wanted is not in it.
    """
    if not folder.is_dir():
        raise UserError(
            f"folder ({folder}) must be a folder: of ImageNet-C, or of classes as ImageNet-A, -R, -Sketch"
        )
    trees = _corruption_folders(folder)
    if not trees:
        return [Variant(folder.resolve().name, folder)]
    missing = [
        f"{name}/{severity}"
        for name in corruptions
        for severity in severities
        if name not in trees or not (trees[name] / str(severity)).is_dir()
    ]
    if missing:
        raise UserError(
            f"folder ({folder}) has no {missing[0]} ({len(missing)} missing); there are "
            f"{', '.join(trees)}; name those wanted with --corruptions and --severities"
        )
    return [
        Variant(f"{name} {severity}", trees[name] / str(severity), (name, severity))
        for name in corruptions
        for severity in severities
    ]


def _corruption_folders(folder: Path) -> dict[str, Path]:
    places = [folder, *(folder / family for family in FAMILIES)]
    found = {
        name: place / name
        for name in CORRUPTIONS
        for place in places
        if any((place / name / str(severity)).is_dir() for severity in SEVERITIES)
    }
    return {name: found[name] for name in CORRUPTIONS if name in found}


def open_variant(variant: Variant, known: Sequence[str] | None) -> LabelledData:
    """The images of a variant, all of them to test.

    Args:
        variant: from `find_variants`.
        known: the classes that a head was learnt for; None where the model has its own.

    Raises:
        UserError: it has no classes, or some that the head does not know.
    """
    source = open_source(variant.folder, split="all")
    data = all_tested(source, str(variant.folder))
    unknown = [name for name in data.class_names if known is not None and name not in known]
    if unknown:
        raise UserError(
            f"folder ({variant.folder}) has {len(unknown)} classes that DATA lacks ({', '.join(unknown[:3])}); "
            "they must be a part of DATA's"
        )
    return data


def all_tested(source: Source, name: str) -> LabelledData:
    """A source of class folders of which every image is tested and none learnt from.

    Raises:
        UserError: it has no classes.
    """
    if source.class_names is None:
        raise UserError(f"folder ({name}) must hold two folders or more, one a class (n01440764 ...)")
    every = np.arange(len(source))
    rounds = [Round(every[:0], every)]
    return LabelledData(
        source, source.all_labels(), None, list(source.class_names), rounds, name, "all tested"
    )
