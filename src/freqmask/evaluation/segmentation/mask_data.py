"""What a segmentation is trained and evaluated on: the classes, and every mask looked at before any training."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int16, Int64

from freqmask.console import say
from freqmask.data.cache import cache_file, read_arrays, write_arrays
from freqmask.data.source import JoinedSource, Pages, Source, Subset
from freqmask.data.splits import choose_split, split_indices, split_of
from freqmask.errors import BadImage, UserError
from freqmask.evaluation.duplicates import pixel_hashes
from freqmask.evaluation.segmentation.mask_files import (
    MOST_LABEL,
    PairSource,
    Part,
    find_parts,
    is_ade20k,
    parts_of,
    read_mask,
)
from freqmask.training.files import replace_atomically

IGNORED = -1  # in targets: counted neither in a loss nor in a score
UNKNOWN = -2  # in a lookup: a label that is neither a class nor ignored
DEFAULT_IGNORED = 255
VOID_NAMES = ("void", "unlabelled", "unlabeled", "ignore", "ignored")
CLASS_FILES = ("classes.txt", "objectInfo150.txt")  # the second is ADE20K's own
SPLITS = Path("runs") / "splits"
LAYOUT_NAMES = ("auto", "plain", "ade20k")
_LAYOUT = 1  # raised when the cached arrays would mean something else
_NUMBERED = re.compile(r"(\d+)\s*[\s,:;]\s*(\S.*)")


@dataclass(frozen=True)
class Labels:
    """The classes 0, 1, ... of an evaluation.

    Attributes:
        values: the label of each class in the masks.
        names: of the classes.
        ignored: labels that are not looked at.
        named: whether the names were given; else they are the labels themselves.
    """

    values: tuple[int, ...]
    names: tuple[str, ...]
    ignored: tuple[int, ...]
    named: bool

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
    """Label -> name, from a file with a name a line, or with ``NUMBER NAME`` lines.

    ADE20K's ``objectInfo150.txt`` is read as well.

    Raises:
        UserError: it is empty, or numbers stand in some lines only or twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"class_names ({path}) cannot be read ({error}); give a text file") from error
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"class_names ({path}) is empty; it must hold a name a line")
    if lines[0].split("\t")[0] == "Idx":
        rows = [line.split("\t") for line in lines[1:]]
        return {int(row[0]): row[-1].split(",")[0].split(";")[0].strip() for row in rows}
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    found = [(int(match[1]), match[2]) for match in numbered if match]
    if not found:
        return dict(enumerate(lines))
    if len(found) < len(lines) or len(dict(found)) < len(found):
        raise UserError(f"class_names ({path}) must number every line or none, and no number twice")
    return dict(found)


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
        UserError: the names cannot be read, are given twice, or all are ignored.
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
    if class_names and len(class_names) == 1 and Path(class_names[0]).expanduser().is_file():
        return _shifted(read_classes(Path(class_names[0]).expanduser()), first)
    if class_names:
        return {first + number: name for number, name in enumerate(class_names)}
    files = [] if folder is None else [folder / name for name in CLASS_FILES if (folder / name).is_file()]
    return _shifted(read_classes(files[0]), first) if files else None


def _shifted(named: dict[int, str], first: int) -> dict[int, str]:
    # names that count from 0 belong to the labels from ``first`` on, unless the first is that of the void
    starts_below = min(named) < first and named[min(named)].lower() not in VOID_NAMES
    return {label + first: name for label, name in named.items()} if starts_below else named


def labels_of(
    named: dict[int, str] | None, ignored: tuple[int, ...], seen: Int64[np.ndarray, " label"]
) -> Labels:
    """The classes: those that are named, else the labels that training masks hold.

    Args:
        named: label -> name, or None.
        ignored: labels that are none.
        seen: labels of the training masks.

    Raises:
        UserError: there are fewer than two classes.
    """
    values = sorted(named) if named is not None else [int(x) for x in seen if int(x) not in ignored]
    there = [value for value in values if value in set(seen.tolist())]
    if len(there) < 2:
        held = ", ".join(str(int(label)) for label in seen[:5]) or "nothing"
        raise UserError(
            f"the training masks hold fewer than two classes (labels: {held}; ignored: "
            f"{', '.join(map(str, ignored)) or 'none'}); say which labels count for nothing with --ignore_label, "
            "-1 for none"
        )
    names = [named[value] if named is not None else str(value) for value in values]
    return Labels(tuple(values), tuple(names), ignored, named is not None)


@dataclass
class MaskSurvey:
    """What the masks of a source hold.

    Attributes:
        source: images and masks.
        pixels: (entry, 3) of image number, label, and how many pixels of the mask have it.
        unreadable: number of an image that cannot be opened -> reason.
    """

    source: PairSource
    pixels: Int64[np.ndarray, "entry 3"]
    unreadable: dict[int, str]

    def labels(self) -> Int64[np.ndarray, " label"]:
        """Labels that some mask holds, sorted."""
        return np.unique(self.pixels[:, 1])

    def share(self, label: int) -> float:
        """Of all pixels."""
        return float(self.pixels[self.pixels[:, 1] == label, 2].sum() / max(self.pixels[:, 2].sum(), 1))

    def usable(self) -> Int64[np.ndarray, " image"]:
        """Numbers of the images that can be opened."""
        return np.array([n for n in range(len(self.source)) if n not in self.unreadable], np.int64)


def survey_masks(source: PairSource) -> MaskSurvey:
    """Read every mask and the header of every image, once; kept in the cache.

    Raises:
        UserError: a mask is broken, or has another size than its image.
    """
    file = cache_file("masks", _LAYOUT, source.fingerprint(), len(source), str(source.part.masks.absolute()))
    cached = read_arrays(file)
    if cached is not None:
        about, arrays = cached
        return MaskSurvey(source, np.array(arrays["pixels"]), {int(n): r for n, r in about["unreadable"]})
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders let go of the interpreter's lock
        looks = list(pool.map(lambda index: _look(source, index), range(len(source))))
    unreadable = {number: look for number, look in enumerate(looks) if isinstance(look, str)}
    found = [
        np.column_stack([np.full(len(look), number), look])
        for number, look in enumerate(looks)
        if not isinstance(look, str)
    ]
    if not found:
        number, reason = next(iter(unreadable.items()))
        raise UserError(f"none of the {len(source)} images can be opened; {source.name(number)}: {reason}")
    pixels = np.concatenate(found).astype(np.int64)
    write_arrays(file, {"unreadable": list(unreadable.items())}, {"pixels": pixels})
    return MaskSurvey(source, pixels, unreadable)


def _look(source: PairSource, index: int) -> np.ndarray | str:
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
    there = np.flatnonzero(counts)
    return np.column_stack([there, counts[there]])


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
        say(f"left out    {survey.source.name(number)}: {reason}")


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
