"""Test sets of other people's making: ImageNet-C trees, and class folders such as ImageNet-A, -R, -Sketch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from freqmask.data.sources import open_source
from freqmask.errors import UserError
from freqmask.evaluation.corruption_constants import SEVERITIES
from freqmask.evaluation.corruptions import CORRUPTIONS, FAMILIES
from freqmask.evaluation.labelled import LabelledData, Round


@dataclass(frozen=True)
class TestFolder:
    """One folder of classes that is tested on.

    Attributes:
        name: for tables: that of the folder, or the corruption and its severity.
        folder: classes lie in it.
        corruption: which, and in what severity; None for a natural test set.
    """

    __test__ = False  # for pytest

    name: str
    folder: Path
    corruption: tuple[str, int] | None = None


def find_folders(folder: Path, corruptions: Sequence[str], severities: Sequence[int]) -> list[TestFolder]:
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
    parents = [folder, *(folder / family for family in FAMILIES)]
    found = {
        name: parent / name
        for name in CORRUPTIONS
        for parent in parents
        if any((parent / name / str(severity)).is_dir() for severity in SEVERITIES)
    }
    if not found:
        return [TestFolder(folder.resolve().name, folder)]
    wanted = [(name, severity) for name in corruptions for severity in severities]
    missing = [
        f"{name}/{severity}"
        for name, severity in wanted
        if name not in found or not (found[name] / str(severity)).is_dir()
    ]
    if missing:
        raise UserError(
            f"folder ({folder}) has no {missing[0]} ({len(missing)} missing); there are "
            f"{', '.join(found)}; name those wanted with --corruptions and --severities"
        )
    return [
        TestFolder(f"{name} {severity}", found[name] / str(severity), (name, severity))
        for name, severity in wanted
    ]


def open_folder(folder: TestFolder, known: Sequence[str] | None) -> LabelledData:
    """The images of a folder of classes, all of them to test.

    Args:
        folder: from `find_folders`.
        known: the classes that a head was trained for; None where the model has its own.

    Raises:
        UserError: it has no classes, or some that the head does not know.
    """
    source, name = open_source(folder.folder, split="all"), str(folder.folder)
    if source.class_names is None:
        raise UserError(f"folder ({name}) must hold two folders or more, one a class (n01440764 ...)")
    unknown = [one for one in source.class_names if known is not None and one not in known]
    if unknown:
        raise UserError(
            f"folder ({name}) has {len(unknown)} classes that DATA lacks ({', '.join(unknown[:3])}); "
            "they must be a part of DATA's"
        )
    names = list(source.class_names)
    return all_tested(LabelledData(source, source.all_labels(), None, names, [], name, "all tested"))


def all_tested(data: LabelledData) -> LabelledData:
    """The same images, all of them to test and none to train on."""
    every = np.arange(len(data.source))
    return dataclasses.replace(data, rounds=[Round(every[:0], every)])


def check_tree(folders: Sequence[tuple[TestFolder, LabelledData]]) -> None:
    """All folders of an ImageNet-C tree hold the same images, or their mean would be of nothing."""
    trees = [(folder, data) for folder, data in folders if folder.corruption]
    if len({folder.corruption for folder, _ in trees}) < len(trees):
        raise UserError("folder names two ImageNet-C trees; measure one after the other")
    for folder, data in trees[1:]:
        first, same = trees[0]
        if not np.array_equal(data.labels, same.labels) or data.class_names != same.class_names:
            raise UserError(f"folder ({folder.folder}) must hold the same images as {first.folder}")
