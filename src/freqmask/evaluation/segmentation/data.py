"""What a segmentation is learnt from and judged on."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from freqmask.data.joined import JoinedSource
from freqmask.data.sources import Pages, Source
from freqmask.data.splits import choose_split, split_indices, split_of
from freqmask.data.subset import Subset
from freqmask.errors import UserError
from freqmask.evaluation.duplicates import pixel_hashes
from freqmask.evaluation.segmentation.labels import Labels, labels_of, name_labels
from freqmask.evaluation.segmentation.layout import Part, find_parts, is_ade20k, parts_of
from freqmask.evaluation.segmentation.pairs import PairSource
from freqmask.evaluation.segmentation.survey import MaskSurvey, check_labels, survey_masks
from freqmask.training.checkpoint import replace_atomically

SPLITS = Path("runs") / "splits"
LAYOUT_NAMES = ("auto", "plain", "ade20k")


@dataclass(frozen=True)
class SegmentationConfig:
    """Which images and masks, as the command's options give it.

    Attributes:
        data: DATA, or None where both folders are named.
        images: folder of images, or None.
        masks: folder of masks, or None.
        layout: auto, plain or ade20k (label 0 counts for nothing, names begin with label 1).
        class_names: of the labels in order, or one file; None looks for classes.txt.
        ignore_label: labels that count for nothing; None takes the usual ones.
        train_split: a split, or auto.
        test_split: a split, or auto (test, else val).
        test_share: of a split of ours, in (0, 1).
        split_seed: of a split of ours.
        pages: what the pages of a TIFF are.
    """

    data: str | None = None
    images: str | None = None
    masks: str | None = None
    layout: str = "auto"
    class_names: Sequence[str] | None = None
    ignore_label: Sequence[int] | None = None
    train_split: str = "auto"
    test_split: str = "auto"
    test_share: float = 0.2
    split_seed: int = 0
    pages: Pages = "channels"


@dataclass
class SegmentationData:
    """Images and masks, parted.

    Attributes:
        train: what is learnt from.
        test: what is judged on.
        labels: the classes.
        name: as it was typed.
        split: how the images were parted, in a few words.
        notes: sentences for the user.
    """

    train: Source
    test: Source
    labels: Labels
    name: str
    split: str
    notes: list[str] = field(default_factory=list)

    @property
    def class_names(self) -> Sequence[str]:
        """By class."""
        return self.labels.names

    @property
    def source(self) -> Source:
        """All images, the training images first."""
        return JoinedSource([self.train, self.test])


def open_segmentation(wanted: SegmentationConfig) -> SegmentationData:
    """Find the images, pair them with their masks, look at all labels, part them.

    Raises:
        UserError: a folder is missing or empty, a file has no partner, a mask does not fit its image, holds an
            unknown label, or there are fewer than two classes.
    """
    parts, name, folder = _parts(wanted)
    first = _first_label(wanted.layout, parts)
    named, ignored = name_labels(wanted.class_names, folder, wanted.ignore_label, first)
    if len(parts) == 1 and not parts[0].name:
        return _part_ourselves(parts[0], wanted, name, named, ignored)
    train, test = (survey_masks(PairSource(part, wanted.pages)) for part in _chosen(parts, wanted, name))
    labels = labels_of(named, ignored, train.labels())
    for one in (train, test):
        check_labels(one, labels)
    notes = [*_notes(labels, train, test.labels()), *_unused(parts, train, test)]
    split = f"{train.source.part.name} / {test.source.part.name}"
    return SegmentationData(_usable(train), _usable(test), labels, name, split, notes)


def _parts(wanted: SegmentationConfig) -> tuple[list[Part], str, Path | None]:
    """The parts, what the data is called, and the folder that may hold classes.txt."""
    if (wanted.images is None) != (wanted.masks is None):
        raise UserError("images and masks must be given together, or DATA with both in it by --data")
    if wanted.images is not None and wanted.masks is not None:
        if wanted.data is not None:
            raise UserError("data must not be given beside --images and --masks; leave one of them out")
        images, masks = Path(wanted.images).expanduser(), Path(wanted.masks).expanduser()
        return parts_of(images, masks), wanted.images, masks.parent
    if wanted.data is None:
        raise UserError("DATA is missing; name a folder with images and masks by --data")
    folder = Path(wanted.data).expanduser()
    return find_parts(folder), wanted.data, folder


def _first_label(layout: str, parts: Sequence[Part]) -> int:
    """The label of the first class: 1 where 0 stands for nothing, as in ADE20K."""
    if layout not in LAYOUT_NAMES:
        raise UserError(f"layout ({layout}) must be one of {', '.join(LAYOUT_NAMES)}")
    return int(layout == "ade20k" or (layout == "auto" and is_ade20k(parts)))


def _chosen(parts: Sequence[Part], wanted: SegmentationConfig, where: str) -> tuple[Part, Part]:
    """The part to learn from and the one to judge on."""
    by_name = {part.name: part for part in parts}
    kinds = {split_of(name): name for name in reversed(list(by_name))}
    test = wanted.test_split if wanted.test_split != "auto" else kinds.get("test") or kinds.get("val")
    train = wanted.train_split if wanted.train_split != "auto" else kinds.get("train")
    if train is None or test is None:
        raise UserError(
            f"DATA ({where}) has masks for {', '.join(by_name)} only; it must have a train and a test or val "
            "part, or no such folders at all, and we hold images out"
        )
    names = [choose_split(list(by_name), name, where) for name in (train, test)]
    if names[0] is None or names[1] is None or names[0] == names[1]:
        raise UserError(f"train_split and test_split ({names[0]}, {names[1]}) must be two different splits")
    return by_name[names[0]], by_name[names[1]]


def _usable(survey: MaskSurvey) -> Source:
    return survey.source if not survey.unreadable else Subset(survey.source, survey.usable())


def _notes(labels: Labels, train: MaskSurvey, tested: np.ndarray) -> list[str]:
    """What the user should know of the labels."""
    there = [label for label in labels.ignored if label in set(train.labels().tolist())]
    notes = [
        f"Label {label} counts for nothing: {train.share(label):.1%} of the training pixels."
        for label in there
    ]
    learnt = set(train.labels().tolist())
    for which, seen in (("training", learnt), ("test", set(tested.tolist()))):
        missing = [name for value, name in zip(labels.values, labels.names, strict=True) if value not in seen]
        if missing:
            notes.append(
                f"No {which} mask holds {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}."
            )
    return notes


def _unused(parts: Sequence[Part], *used: MaskSurvey) -> list[str]:
    others = [part.name for part in parts if part.name not in {one.source.part.name for one in used}]
    return [f"The part {' and '.join(others)} is not used."] if others else []


def _part_ourselves(
    part: Part, wanted: SegmentationConfig, name: str, named: dict[int, str] | None, ignored: tuple[int, ...]
) -> SegmentationData:
    """Hold a share of the images out; identical images stay on one side."""
    if not 0 < wanted.test_share < 1:
        raise UserError(f"test_share ({wanted.test_share}) must be above 0 and below 1; try 0.2")
    whole = survey_masks(PairSource(part, wanted.pages))
    images = whole.usable()
    file = _split_file(whole.source, wanted)
    is_test = _read_split(file, whole.source, images)
    if is_test is None:
        hashes = [str(number) for number in pixel_hashes(whole.source, images.tolist())]
        shares = [1 - wanted.test_share, wanted.test_share]
        is_test = np.zeros(len(images), bool)
        is_test[split_indices(None, hashes, shares, wanted.split_seed)[1]] = True
        _write_split(file, whole.source, images, is_test)
    learnt = np.unique(whole.pixels[np.isin(whole.pixels[:, 0], images[~is_test]), 1])
    labels = labels_of(named, ignored, learnt)
    check_labels(whole, labels)
    tested = np.unique(whole.pixels[np.isin(whole.pixels[:, 0], images[is_test]), 1])
    words = f"{wanted.test_share:.0%} held out"
    notes = [f"DATA has no test part: {words} by us, written to {file}.", *_notes(labels, whole, tested)]
    train, test = Subset(whole.source, images[~is_test]), Subset(whole.source, images[is_test])
    return SegmentationData(train, test, labels, name, f"{words}, {file}", notes)


def _split_file(source: PairSource, wanted: SegmentationConfig) -> Path:
    """Where a split of ours is kept; its name says by what it was drawn."""
    key = f"{source.fingerprint()} {wanted.test_share} {wanted.split_seed}"
    digest = hashlib.blake2b(key.encode(), digest_size=5).hexdigest()
    stem = "".join(letter if letter.isalnum() else "-" for letter in source.part.images.parent.name)[:40]
    return SPLITS / f"{stem or 'masks'}-{digest}.csv"


def _read_split(file: Path, source: Source, images: Int64[np.ndarray, " image"]) -> np.ndarray | None:
    """Whether each image is judged on, as it was written; None where there is no such file."""
    if not file.is_file():
        return None
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as handle:
        parts = {row.get("path"): row.get("split") for row in csv.DictReader(handle)}
    found = [parts.get(source.name(int(index))) for index in images]
    if not set(found) == {"train", "test"}:
        raise UserError(
            f"split ({file}) must say train or test for every image; delete it to have it drawn again"
        )
    return np.array([part == "test" for part in found])


def _write_split(file: Path, source: Source, images: np.ndarray, is_test: np.ndarray) -> None:
    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as handle:
            table = csv.writer(handle)
            table.writerow(["path", "split"])
            for index, test in zip(images.tolist(), is_test.tolist(), strict=True):
                table.writerow([source.name(index), "test" if test else "train"])

    replace_atomically(file, write)
