"""Images with labels, parted into what a head learns from and what it is judged on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64

from freqmask.data.labels import read_labels
from freqmask.data.source import JoinedSource, Pages, Source, Subset
from freqmask.data.sources import open_source, splits_there
from freqmask.data.splits import choose_split, split_indices, split_of
from freqmask.errors import UserError
from freqmask.evaluation.duplicates import pixel_hashes
from freqmask.training.files import replace_atomically

DATA_WITH_LABELS = (
    "a folder with one folder a class, a parquet file with a label column, an .npz with labels, "
    "or --labels FILE.csv (columns path and label)"
)


@dataclass(frozen=True)
class Round:
    """One training of a head and its judgement: numbers of images, sorted."""

    train: Int64[np.ndarray, " train"]
    test: Int64[np.ndarray, " test"]


@dataclass
class LabelledData:
    """All images of an evaluation under one numbering.

    Attributes:
        source: the images.
        labels: (image,) class of each.
        groups: of each image, what it must not be separated from; None where there are none.
        class_names: by class.
        rounds: one, or one a fold. Every image is in the test part of at most one.
        name: DATA as it was typed.
        split: how the images were parted, in a few words.
        notes: sentences for the user.
    """

    source: Source
    labels: Int64[np.ndarray, " image"]
    groups: list[str | None] | None
    class_names: list[str]
    rounds: list[Round]
    name: str
    split: str
    notes: list[str] = field(default_factory=list)

    @property
    def tested(self) -> Int64[np.ndarray, " tested"]:
        """All images that are judged on, over the rounds."""
        return np.concatenate([one.test for one in self.rounds])

    def without(self, images: set[int]) -> LabelledData:
        """The same with some images taken out of every part, such as those that cannot be read."""
        if not images:
            return self
        lost = np.array(sorted(images))
        rounds = [Round(_minus(one.train, lost), _minus(one.test, lost)) for one in self.rounds]
        return LabelledData(
            **{**vars(self), "rounds": rounds, "notes": [*self.notes, f"{len(lost)} images are left out."]}
        )


@dataclass(frozen=True)
class Parting:
    """How the images are to be parted.

    Attributes:
        train_split: a split of DATA, or auto.
        test_split: a split of DATA, or auto (test, else val).
        test_share: of a split of ours, in (0, 1).
        folds: parts for cross-validation instead of one test part; None for none.
        seed: of a split of ours; another one than those of the heads.
        duplicates: what to do where a split of ours has identical images: refuse, or keep them together.
        folder: where splits of ours are kept.
        learn: False where nothing is learnt from DATA (a classifier's own head): every image that is not in a
            training split is then tested.
    """

    train_split: str = "auto"
    test_split: str = "auto"
    test_share: float = 0.2
    folds: int | None = None
    seed: int = 0
    duplicates: Literal["refuse", "together"] = "refuse"
    folder: Path = Path("runs") / "splits"
    learn: bool = True


def open_labelled(
    data: str | Path | Source | Sequence[str | Path | Source],
    labels: str | Path | None = None,
    parting: Parting | None = None,
    pages: Pages = "channels",
) -> LabelledData:
    """The images and labels that DATA names, parted.

    DATA's own splits are used where there are any; else, or with ``folds``, we draw one that holds the mix of
    classes and divides no group, write it down, and take the same one next time.

    Args:
        data: as for :func:`freqmask.data.sources.open_source`.
        labels: a CSV table with the columns path and label, and optionally split and group.
        parting: how to part them.
        pages: what the pages of a TIFF are.

    Raises:
        UserError: there are no labels, one class only, a class to test that cannot be learnt, an empty part.
    """
    parting = parting or Parting()
    _check(parting)
    data = data[0] if isinstance(data, (list, tuple)) and len(data) == 1 else data
    several = isinstance(data, (list, tuple))
    splits = [] if several else splits_there(data, labels)  # type: ignore[arg-type]
    named = data if isinstance(data, Source) or several else str(data)
    kinds = {split_of(name) for name in splits}
    # Beside a training part the same images have the same numbers as where a head is trained: identities are
    # counted over both, and draws (corruptions, attacks) follow from them.
    if not parting.learn and not ("train" in kinds and kinds & {"test", "val"}):
        return _test_only(named, labels, splits, parting, pages)
    whole = parting.folds is None or not parting.learn
    own = _own_splits(splits, parting, str(data)) if whole else None
    if own is not None:
        opened = _use_splits(named, labels, own, pages)
    else:
        opened = _part_ourselves(named, labels, parting, pages)
    if not parting.learn:
        opened.rounds = [Round(one.train[:0], one.test) for one in opened.rounds]
        return opened
    _check_classes(opened)
    return opened


def _check(parting: Parting) -> None:
    if parting.folds is not None and parting.folds < 2:
        raise UserError(f"folds ({parting.folds}) must be at least 2; try 5")
    if not 0 < parting.test_share < 1:
        raise UserError(f"test_share ({parting.test_share}) must be above 0 and below 1; try 0.2")
    if parting.duplicates not in ("refuse", "together"):
        raise UserError(f"duplicates ({parting.duplicates}) must be refuse or together")


def _own_splits(splits: list[str], parting: Parting, where: str) -> tuple[str, str] | None:
    """The names of the training and of the test split that DATA has; None where we have to part it."""
    if (parting.train_split, parting.test_split) == ("auto", "auto"):
        kinds = {split_of(name): name for name in reversed(splits)}
        test = kinds.get("test") or kinds.get("val")
        if test is None and len(splits) < 2:
            return None
        if test is None or "train" not in kinds:
            raise UserError(
                f"DATA ({where}) has the splits {', '.join(splits)}; say which are which with "
                "--train_split and --test_split, or part it anew with --folds 5"
            )
        return kinds["train"], test
    chosen = [
        choose_split(splits, usual if name == "auto" else name, where)
        for name, usual in ((parting.train_split, "train"), (parting.test_split, "test"))
    ]
    if chosen[0] == chosen[1] or None in chosen:
        raise UserError(f"train_split and test_split ({chosen[0]}, {chosen[1]}) must be two different splits")
    return str(chosen[0]), str(chosen[1])


def _test_only(
    data: object, labels: str | Path | None, splits: list[str], parting: Parting, pages: Pages
) -> LabelledData:
    """All images of the test split, else of those that are no training split, else of DATA."""
    split, where = parting.test_split, str(data)
    if split == "auto":
        kinds = {split_of(name): name for name in reversed(splits)}
        split = kinds.get("test") or kinds.get("val") or "all"
    source = open_source(data, pages, split, labels)  # type: ignore[arg-type]
    rounds = [Round(np.arange(0), np.arange(len(source)))]
    opened = _labelled(source, rounds, where, "all tested" if split == "all" else split, [])
    if len(opened.tested) == 0:
        raise UserError(f"DATA ({where}): no image of {split} has a label; it must be {DATA_WITH_LABELS}")
    return opened


def _use_splits(
    data: object, labels: str | Path | None, names: tuple[str, str], pages: Pages
) -> LabelledData:
    parts = [open_source(data, pages, split, labels) for split in names]  # type: ignore[arg-type]
    for name, part in zip(names, parts, strict=True):
        if part.class_names is None and part.why_unlabelled:
            raise UserError(
                f"DATA ({data}): the images of {name} have no labels: {part.why_unlabelled}; or name their labels by "
                "--labels FILE.csv"
            )
    source = JoinedSource(parts)
    first = len(parts[0])
    rounds = [Round(np.arange(first), np.arange(first, len(source)))]
    return _labelled(source, rounds, str(data), f"{names[0]} / {names[1]}", [])


def _labelled(source: Source, rounds: list[Round], name: str, split: str, notes: list[str]) -> LabelledData:
    """Images without a label are taken out of every part."""
    numbers = source.all_labels()
    unknown = np.flatnonzero(numbers < 0)
    if len(unknown) == len(source) or source.class_names is None:
        why = f": {source.why_unlabelled}" if source.why_unlabelled else ""
        raise UserError(f"DATA ({name}) has no labels{why}; it must be {DATA_WITH_LABELS}")
    if len(unknown):
        notes = [*notes, f"{len(unknown):,} images without a label are left out."]
        rounds = [Round(_minus(one.train, unknown), _minus(one.test, unknown)) for one in rounds]
    groups = [source.group(index) for index in range(len(source))]
    known = None if all(group is None for group in groups) else groups
    return LabelledData(source, numbers, known, list(source.class_names), rounds, name, split, notes)


def _minus(indices: np.ndarray, lost: np.ndarray) -> np.ndarray:
    return indices[~np.isin(indices, lost)]


def _part_ourselves(data: object, labels: str | Path | None, parting: Parting, pages: Pages) -> LabelledData:
    source = open_source(data, pages, "all", labels)  # type: ignore[arg-type]
    whole = _labelled(source, [Round(np.arange(len(source)), np.arange(0))], str(data), "", [])
    images = whole.rounds[0].train
    file = _split_file(whole, parting)
    part_of = _read_parts(file, whole, images)
    if part_of is None:
        part_of = _draw_parts(whole, images, parting)
        _write_parts(file, whole, images, part_of, parting.folds is not None)
    if parting.folds is None:
        rounds, words = (
            [Round(images[part_of == 0], images[part_of == 1])],
            f"{parting.test_share:.0%} held out",
        )
    else:
        numbers = range(parting.folds)
        rounds = [Round(images[part_of != one], images[part_of == one]) for one in numbers]
        words = f"{parting.folds} folds"
    whole.rounds, whole.split = rounds, f"{words}, {file}"
    whole.notes.append(f"DATA has no test part: {words} by us, written to {file}.")
    return whole


def _draw_parts(data: LabelledData, images: np.ndarray, parting: Parting) -> np.ndarray:
    """The part of each image: the fold, or 0 for training and 1 for testing."""
    groups = _with_duplicates(data, images, parting)
    shares = [1.0] * parting.folds if parting.folds else [1 - parting.test_share, parting.test_share]
    parts = split_indices(data.labels[images], groups, shares, parting.seed)
    part_of = np.empty(len(images), np.int64)
    for number, members in enumerate(parts):
        part_of[members] = number
    return part_of


def _with_duplicates(data: LabelledData, images: np.ndarray, parting: Parting) -> list[str | None] | None:
    """Groups in which identical images stay together; refused where that was not asked for."""
    groups = None if data.groups is None else [data.groups[index] for index in images]
    hashes = pixel_hashes(data.source, images)
    first = {value: place for place, value in reversed(list(enumerate(hashes)))}
    twins = [place for place, value in enumerate(hashes) if first[value] != place]
    loose = [
        place for place in twins if groups is None or not _same_group(groups, first[hashes[place]], place)
    ]
    if not loose:
        return groups
    if parting.duplicates == "refuse":
        one, other = images[first[hashes[loose[0]]]], images[loose[0]]
        raise UserError(
            f"{len(loose)} images are identical to others (first {data.source.name(int(other))!r} and "
            f"{data.source.name(int(one))!r}) and could be on both sides of a split; remove them, or keep each "
            "with its twin by --duplicates together"
        )
    return _united(groups or [None] * len(hashes), hashes)


def _same_group(groups: list[str | None], one: int, other: int) -> bool:
    return groups[one] is not None and groups[one] == groups[other]


def _united(groups: list[str | None], hashes: list[int]) -> list[str | None]:
    """Groups joined wherever they share an identical image."""
    # The number of the component that each group and each picture belongs to; the smaller one wins a union.
    component: dict[object, int] = {}
    keys: list[object] = [object() if group is None else group for group in groups]
    pairs = list(zip(keys, [("pixels", value) for value in hashes], strict=True))
    for number, pair in enumerate(pairs):
        old = {component[one] for one in pair if one in component}
        new = min(old, default=number)
        if len(old) > 1:
            component = {one: new if value in old else value for one, value in component.items()}
        component.update(dict.fromkeys(pair, new))
    return [str(component[key]) for key in keys]


def _split_file(data: LabelledData, parting: Parting) -> Path:
    """Where a split of ours is kept; its name says by what it was drawn."""
    how = (parting.folds, None if parting.folds else parting.test_share, parting.seed, parting.duplicates)
    key = hashlib.blake2b(f"{data.source.fingerprint()} {how}".encode(), digest_size=5)
    key.update(data.labels.tobytes())
    key.update(repr(data.groups).encode(errors="surrogateescape"))
    stem = "".join(letter if letter.isalnum() else "-" for letter in Path(data.name).stem)[:40]
    return parting.folder / f"{stem}-{key.hexdigest()}.csv"


def _read_parts(file: Path, data: LabelledData, images: np.ndarray) -> np.ndarray | None:
    """The part of each image as it was written; None where there is no such file."""
    if not file.is_file():
        return None
    part_of = {row.path: row.split for row in read_labels(file)}
    names = [data.source.name(int(index)) for index in images]
    if not all(name in part_of for name in names):
        raise UserError(f"split ({file}) does not list the images of DATA; delete it to have it drawn again")
    words = {"train": 0, "test": 1}
    found = [words.get(str(part_of[name])) for name in names]
    try:
        return np.array(
            [
                int(str(part_of[name]).removeprefix("fold")) if n is None else n
                for n, name in zip(found, names, strict=True)
            ]
        )
    except ValueError as error:
        raise UserError(f"split ({file}) has an unknown part; delete it to have it drawn again") from error


def _write_parts(
    file: Path, data: LabelledData, images: np.ndarray, part_of: np.ndarray, folds: bool
) -> None:
    """As a table that ``--labels`` takes, too."""
    import csv

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as handle:
            table = csv.writer(handle)
            table.writerow(["path", "label", "split", "group"])
            for index, part in zip(images.tolist(), part_of.tolist(), strict=True):
                word = f"fold{part}" if folds else ("train", "test")[part]
                group = "" if data.groups is None else data.groups[index] or ""
                table.writerow([data.source.name(index), data.class_names[data.labels[index]], word, group])

    replace_atomically(file, write)


def _check_classes(data: LabelledData) -> None:
    """Every part must be there, hold several classes, and be tested on what it has learnt."""
    for one in data.rounds:
        if len(one.train) == 0 or len(one.test) == 0:
            empty = "training" if len(one.train) == 0 else "test"
            raise UserError(f"DATA ({data.name}): the {empty} part is empty ({data.split})")
        learnt, tested = set(data.labels[one.train].tolist()), set(data.labels[one.test].tolist())
        if len(learnt) < 2:
            raise UserError(
                f"DATA ({data.name}) has one class only ({data.class_names[learnt.pop()]}) to learn from; "
                "there must be two or more"
            )
        unknown = sorted(data.class_names[number] for number in tested - learnt)
        if unknown:
            raise UserError(
                f"{len(unknown)} classes of the test part are missing from the training part "
                f"({', '.join(unknown[:3])}); add images of them, or leave them out of the test part"
            )


def subset(data: LabelledData, indices: np.ndarray) -> Source:
    """Some of the images as a source."""
    return Subset(data.source, indices)
