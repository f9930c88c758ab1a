"""What a segmentation is trained and evaluated on: the classes, and every mask looked at before any training."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int16, Int64

from freqmask.console import plain_name, say
from freqmask.data.cache import cache_file, read_arrays, write_arrays
from freqmask.data.source import JoinedSource, Source, Subset
from freqmask.data.splits import joined_groups, split_indices
from freqmask.errors import BadImage, UserError
from freqmask.evaluation.labelled import SPLITS, Round, choose_parts, keep_parts, pixel_hashes, split_file
from freqmask.evaluation.mask_files import (
    IGNORED,
    MOST_LABEL,
    PairSource,
    Part,
    find_parts,
    parts_of,
    read_mask,
)
from freqmask.options.of_evaluation import Parts, Scenes

UNKNOWN = -2  # in a lookup: a label that is neither a class nor ignored
DEFAULT_IGNORED = 255
VOID_NAMES = ("void", "unlabelled", "unlabeled", "ignore", "ignored")
CLASS_FILES = ("classes.txt", "objectInfo150.txt")  # the second is ADE20K's own
_ADE20K = {("annotations", "training"), ("annotations", "validation")}  # its scene parsing release
_LAYOUT = 2  # raised when the cached arrays would mean something else
_NUMBERED = re.compile(r"(\d+)\s*[\s,:;]\s*(\S.*)")


@dataclass(frozen=True)
class Labels:
    """The classes 0, 1, ... of an evaluation."""

    values: tuple[int, ...]  # the label of each class in the masks
    names: tuple[str, ...]
    ignored: tuple[int, ...]
    named: bool  # whether the names were given; else they are the labels themselves

    def __len__(self) -> int:
        return len(self.values)

    def lookup(self) -> Int16[np.ndarray, " label"]:
        """Label -> class, ``IGNORED`` or ``UNKNOWN``."""
        table = np.full(MOST_LABEL + 1, UNKNOWN, np.int16)
        table[list(self.values)] = np.arange(len(self.values))
        table[[label for label in self.ignored if 0 <= label <= MOST_LABEL]] = IGNORED
        return table

    def describe_ignored(self) -> str:
        """For the lines before a run."""
        return " and ".join(str(label) for label in sorted(self.ignored)) or "none"


def read_classes(path: Path) -> dict[int, str]:
    """Label -> name, from a file with a name a line, with ``NUMBER NAME`` lines, or ADE20K's ``objectInfo150.txt``.

    Raises:
        UserError: it is empty, or numbers stand in some lines only, twice, or are no labels.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"class_names ({path}) cannot be read ({error}); give a text file") from error
    lines = [line for line in lines if line]
    if lines and lines[0].split("\t")[0] == "Idx":  # made lines of NUMBER NAME
        rows = [line.split("\t") for line in lines[1:]]
        lines = [f"{row[0]} {re.split('[,;]', row[-1])[0].strip()}" for row in rows]
    if not lines:
        raise UserError(f"class_names ({path}) is empty; it must hold a name a line")
    numbered = [(int(match[1]), match[2]) for line in lines if (match := _NUMBERED.fullmatch(line))]
    if not numbered:
        return dict(enumerate(lines))
    if len(numbered) < len(lines) or len(dict(numbered)) < len(numbered):
        raise UserError(f"class_names ({path}) must number every line or none, and no number twice")
    largest, name = max(numbered)
    if largest > MOST_LABEL:
        raise UserError(
            f"class_names ({path}): {name} has the label {largest}; labels go from 0 to {MOST_LABEL}"
        )
    return dict(numbered)


def name_labels(
    class_names: Sequence[str] | None, folder: Path | None, ignored: Sequence[int] | None, first: int = 0
) -> tuple[dict[int, str] | None, tuple[int, ...]]:
    """Label -> name of the classes, None where nothing names them, and the ignored labels.

    Args:
        class_names: names in the order of the labels, or one file; None looks for ``classes.txt`` in the folder.
        folder: DATA, or None.
        ignored: labels; None takes 255, labels below ``first``, and classes that are called void or unlabelled.
        first: the first label that is a class, where names come without numbers (1 for ADE20K).

    Raises:
        UserError: the names cannot be read, are given twice, are one alone, or all are ignored.
    """
    named = _named(class_names, folder, first)
    if ignored is None:
        voids = [label for label, name in (named or {}).items() if name.lower() in VOID_NAMES]
        taken = set(named or ()) - set(voids)
        ignored = [label for label in (*range(first), *voids, DEFAULT_IGNORED) if label not in taken]
    chosen = tuple(sorted(set(ignored)))
    if named is None:
        return None, chosen
    kept = {label: name for label, name in sorted(named.items()) if label not in chosen}
    if len(set(kept.values())) < len(kept):
        raise UserError("class_names must differ from each other; number equal ones apart")
    return kept, chosen


def _named(class_names: Sequence[str] | None, folder: Path | None, first: int) -> dict[int, str] | None:
    files = [] if folder is None else [folder / name for name in CLASS_FILES]
    if class_names:
        files = [Path(class_names[0]).expanduser()]
        if len(class_names) == 1 and not files[0].is_file():
            raise UserError(
                f"class_names ({class_names[0]}) is not there as a file, and alone it names fewer than two classes; "
                "give a file with a name a line, or all names in order"
            )
        if len(class_names) > 1:
            return {first + number: name for number, name in enumerate(class_names)}
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    named = read_classes(file)
    # names that count from 0 belong to the labels from ``first`` on, unless the first is that of the void
    starts_below = min(named) < first and named[min(named)].lower() not in VOID_NAMES
    return {label + first: name for label, name in named.items()} if starts_below else named


def labels_of(
    named: dict[int, str] | None, ignored: tuple[int, ...], present: Int64[np.ndarray, " label"]
) -> Labels:
    """The classes: those that are named (label -> name), else the labels that training masks hold.

    Raises:
        UserError: there are fewer than two classes.
    """
    values = sorted(named) if named is not None else [int(x) for x in present if int(x) not in ignored]
    if np.isin(values, present).sum() < 2:
        held = ", ".join(str(int(label)) for label in present[:5]) or "nothing"
        raise UserError(
            f"the training masks hold fewer than two classes (labels: {held}; ignored: "
            f"{', '.join(map(str, ignored)) or 'none'}); say which labels count for nothing with --ignore_label, "
            "-1 for none"
        )
    names = [named[value] if named is not None else str(value) for value in values]
    return Labels(tuple(values), tuple(names), ignored, named is not None)


@dataclass
class MaskSurvey:
    """What the masks of a source hold."""

    source: PairSource
    pixels: Int64[np.ndarray, "entry 3"]  # image number, label, how many pixels of the mask have it
    unreadable: dict[int, str]  # number of an image that cannot be opened -> reason

    def of(self, images: Int64[np.ndarray, " some"]) -> MaskSurvey:
        """What the masks of some images hold, by their numbers."""
        return replace(self, pixels=self.pixels[np.isin(self.pixels[:, 0], images)])

    def labels(self) -> Int64[np.ndarray, " label"]:
        """Labels that some mask holds, sorted."""
        return np.unique(self.pixels[:, 1])

    def share(self, label: int) -> float:
        """Of all pixels."""
        return float(self.pixels[self.pixels[:, 1] == label, 2].sum() / max(self.pixels[:, 2].sum(), 1))

    def usable(self) -> Int64[np.ndarray, " image"]:
        """Numbers of the images that can be opened."""
        return np.array([n for n in range(len(self.source)) if n not in self.unreadable], np.int64)

    def readable(self) -> Source:
        """The images that can be opened."""
        return self.source if not self.unreadable else Subset(self.source, self.usable())


def survey_masks(source: PairSource) -> MaskSurvey:
    """Read every mask and the header of every image, once; kept in the cache.

    Raises:
        UserError: a mask is broken, or has another size than its image.
    """
    folder = str(source.part.masks.absolute())
    file = cache_file("masks", _LAYOUT, source.content_stamp(), len(source), folder)
    cached = read_arrays(file, holding=["pixels"])
    if cached is not None:
        pixels, unreadable = np.array(cached[1]["pixels"]), {int(n): r for n, r in cached[0]["unreadable"]}
        # where one can be opened now, a right or the disk was missing then
        if all(isinstance(_count_labels(source, number), str) for number in unreadable):
            return MaskSurvey(source, pixels, unreadable)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders let go of the interpreter's lock
        counts = list(pool.map(lambda index: _count_labels(source, index), range(len(source))))
    unreadable = {number: reason for number, reason in enumerate(counts) if isinstance(reason, str)}
    if len(unreadable) == len(counts):
        number, reason = next(iter(unreadable.items()))
        raise UserError(f"none of the {len(source)} images can be opened; {source.name(number)}: {reason}")
    entries = [
        np.column_stack([np.full(len(count), number), count])
        for number, count in enumerate(counts)
        if not isinstance(count, str)
    ]
    pixels = np.concatenate(entries).astype(np.int64)
    write_arrays(file, {"unreadable": list(unreadable.items())}, {"pixels": pixels})
    return MaskSurvey(source, pixels, unreadable)


def _count_labels(source: PairSource, index: int) -> np.ndarray | str:
    """(label, 2) of labels and pixels of one mask, or why its image cannot be opened."""
    try:
        size = source.images.open(index).size
    except BadImage as error:
        return error.reason
    path = source.mask_path(index)
    try:
        mask = read_mask(path)
    except BadImage as error:
        raise UserError(
            f"mask ({path}): {error.reason}; save one class number a pixel, such as an 8-bit PNG"
        ) from error
    if mask.shape != size:
        raise UserError(
            f"mask ({path}) is {mask.shape[1]}x{mask.shape[0]} pixels and its image {size[1]}x{size[0]}; both must "
            "have the same size"
        )
    counts = np.bincount(mask.ravel())
    present = np.flatnonzero(counts)
    return np.column_stack([present, counts[present]])


def check_labels(survey: MaskSurvey, labels: Labels) -> None:
    """Raises a UserError where a mask holds a label that is neither a class nor ignored; says what is left out."""
    table = labels.lookup()
    unknown = survey.pixels[table[survey.pixels[:, 1]] == UNKNOWN]
    if len(unknown):
        number, label, pixels = (int(value) for value in unknown[0])
        why = "the classes" if labels.named else "what the training masks hold"
        raise UserError(
            f"mask ({survey.source.mask_path(number)}) holds the label {label} ({pixels:,} pixels), which is not "
            f"among {why} ({labels.values[0]} to {labels.values[-1]}) and not ignored "
            f"({labels.describe_ignored()}); mend it, name the class, or give --ignore_label "
            f"{' '.join(map(str, [*labels.ignored, label]))}"
        )
    for number, reason in survey.unreadable.items():
        say(f"left out    {plain_name(survey.source.name(number))}: {reason}")


@dataclass(frozen=True, kw_only=True)
class MaskConfig(Scenes, Parts):
    """Which images and masks, by the options of the command."""

    data: str | None = None  # DATA, or None where both folders are named


@dataclass
class SegmentationData:
    """Images and masks, split."""

    train: Source
    test: Source
    labels: Labels
    name: str  # as it was typed
    split: str  # how the images were split, in a few words
    notes: list[str] = field(default_factory=list)  # sentences for the user

    @property
    def class_names(self) -> Sequence[str]:
        """By class."""
        return self.labels.names

    @property
    def source(self) -> Source:
        """All images, the training images first."""
        return JoinedSource([self.train, self.test])

    @property
    def tested(self) -> Int64[np.ndarray, " tested"]:
        """All test images among them."""
        return np.arange(len(self.train), len(self.train) + len(self.test))

    @property
    def rounds(self) -> list[Round]:
        """The one training and its test, as of images with labels."""
        return [Round(np.arange(len(self.train)), self.tested)]

    def describe(self) -> str:
        """What is said of them before anything is measured."""
        return (
            f"{self.name}: {len(self.train):,} training images, {len(self.test):,} test images, {len(self.labels)} "
            f"classes ({self.split}); ignored labels: {self.labels.describe_ignored()}"
        )


def open_segmentation(config: MaskConfig) -> SegmentationData:
    """Find the images, pair them with their masks, look at all labels, split them.

    Raises:
        UserError: a folder is missing or empty, a file has no partner, a mask does not fit its image, holds an
            unknown label, or there are fewer than two classes.
    """
    parts, name, folder = _parts(config)
    released = {(part.masks.parent.name, part.name) for part in parts} <= _ADE20K
    first = int(config.layout == "ade20k" or (config.layout == "auto" and released))
    named, ignored = name_labels(config.class_names, folder, config.ignore_label, first)
    if len(parts) == 1 and not parts[0].name:
        return _split_ourselves(parts[0], config, name, named, ignored)
    by_name = {part.name: part for part in parts}
    missing = (
        f"DATA ({name}) has masks for {', '.join(by_name)} only; it must have a train and a test or val part, or no "
        "such folders at all, and we hold images out"
    )
    chosen = choose_parts(list(by_name), config.train_split, config.test_split, name, missing)
    train, test = (survey_masks(PairSource(by_name[one], config.pages)) for one in chosen)
    labels = labels_of(named, ignored, train.labels())
    for one in (train, test):
        check_labels(one, labels)
    notes = _notes(labels, train, test)
    if others := [part for part in by_name if part not in chosen]:
        notes.append(f"The part {' and '.join(others)} is not used.")
    return SegmentationData(train.readable(), test.readable(), labels, name, " / ".join(chosen), notes)


def _parts(config: MaskConfig) -> tuple[list[Part], str, Path | None]:
    """The parts, what the data is called, and the folder that may hold classes.txt."""
    if (config.images is None) != (config.masks is None):
        raise UserError("images and masks must be given together, or DATA with both in it by --data")
    if config.images is not None and config.masks is not None:
        if config.data is not None:
            raise UserError("data must not be given beside --images and --masks; leave one of them out")
        images, masks = Path(config.images).expanduser(), Path(config.masks).expanduser()
        return parts_of(images, masks), config.images, masks.parent
    if config.data is None:
        raise UserError("DATA is missing; name a folder with images and masks by --data")
    folder = Path(config.data).expanduser()
    return find_parts(folder), config.data, folder


def _notes(labels: Labels, train: MaskSurvey, test: MaskSurvey) -> list[str]:
    """What the user should know of the labels of the training and of the test masks.

    Raises:
        UserError: no pixel of the test masks counts.
    """
    held = {"training": set(train.labels().tolist()), "test": set(test.labels().tolist())}
    if not held["test"] & set(labels.values):
        raise UserError(
            f"the test masks hold no class, only ignored labels ({labels.describe_ignored()}); test on other images, "
            "or say which labels count for nothing with --ignore_label"
        )
    notes = [
        f"Label {label} counts for nothing: {train.share(label):.1%} of the training pixels."
        for label in labels.ignored
        if label in held["training"]
    ]
    classes = list(zip(labels.values, labels.names, strict=True))
    for which, present in held.items():
        if missing := [name for value, name in classes if value not in present]:
            more = " ..." if len(missing) > 5 else ""
            notes.append(f"No {which} mask holds {', '.join(missing[:5])}{more}.")
    return notes


def _split_ourselves(
    part: Part, config: MaskConfig, name: str, named: dict[int, str] | None, ignored: tuple[int, ...]
) -> SegmentationData:
    """Hold a share of the images out; identical images, and pages of one file, stay on one side."""
    source = PairSource(part, config.pages)
    whole = survey_masks(source)
    images = whole.usable()
    names = [source.name(int(index)) for index in images]
    key = f"{source.fingerprint()} {config.test_share} {config.split_seed}"
    file = split_file(SPLITS, part.images.parent.name or "masks", key.encode())

    def draw() -> list[np.ndarray]:
        masks = [source.mask_numbers[index] for index in images]  # pages of a file have one
        groups = joined_groups(masks, pixel_hashes(source, images.tolist()))
        return split_indices(None, groups, [1 - config.test_share, config.test_share], config.split_seed)

    is_test = keep_parts(file, names, ["train", "test"], draw, {}) == 1
    train, test = whole.of(images[~is_test]), whole.of(images[is_test])
    labels = labels_of(named, ignored, train.labels())
    check_labels(whole, labels)
    words = f"{config.test_share:.0%} held out"
    notes = [f"DATA has no test part: {words} by us, written to {file}.", *_notes(labels, train, test)]
    parts = (Subset(source, images[~is_test]), Subset(source, images[is_test]))
    return SegmentationData(*parts, labels, name, f"{words}, {file}", notes)
