"""Images with labels, split into training and test images, all labels or a few; identical images among them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from freqmask.console import shell_paths
from freqmask.data.cache import bytes_of, cache_file, hash_of, read_arrays, write_arrays
from freqmask.data.source import JoinedSource, Source
from freqmask.data.sources import open_source, splits_there
from freqmask.data.splits import choose_split, joined_groups, split_indices, split_of
from freqmask.errors import BadImage, UserError
from freqmask.options.of_evaluation import Labelled
from freqmask.training.files import read_rows, write_rows

SPLITS = Path("runs") / "splits"  # where splits of ours are kept
DATA_WITH_LABELS = (
    "a folder with one folder a class, a parquet file with a label column, an .npz with labels, "
    "or --labels FILE.csv (columns path and label)"
)


@dataclass(frozen=True)
class Round:
    """One training of a head and its test: numbers of images, sorted."""

    train: Int64[np.ndarray, " train"]
    test: Int64[np.ndarray, " test"]


@dataclass
class LabelledData:
    """All images of an evaluation under one numbering."""

    source: Source
    labels: Int64[np.ndarray, " image"]  # the class of each
    groups: list[str | None] | None  # of each image, what it must not be separated from; None without any
    class_names: list[str]
    rounds: list[Round]  # one, or one a fold; every image is in the test part of at most one
    name: str  # DATA as it was typed
    split: str  # how the images were split, in a few words
    notes: list[str] = field(default_factory=list)  # sentences for the user

    @property
    def tested(self) -> Int64[np.ndarray, " tested"]:
        """All test images, over the rounds."""
        return np.concatenate([one.test for one in self.rounds])

    def describe(self) -> str:
        """What is said of them before anything is measured."""
        n_train = len(np.unique(np.concatenate([one.train for one in self.rounds])))
        return (
            f"{self.name}: {n_train:,} training images, {len(self.tested):,} test images, "
            f"{len(self.class_names)} classes ({self.split})"
        )

    def groups_of(self, images: np.ndarray) -> list[str | None] | None:
        """The groups of some images."""
        return None if self.groups is None else [self.groups[int(index)] for index in images]

    def drawn(self, train: np.ndarray, shot: object, seed: int) -> np.ndarray:
        """Of training images those whose labels are used: all of them, or those of a ``shot`` of :func:`draw_shots`."""
        return train if shot is None else train[draw_shots(self.labels[train], str(shot), seed)]

    def parted(self, train: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the training images of a network those it is trained on, and those on which its accuracy is watched."""
        if share == 0:
            return train, train[:0]
        use, way_out = "accuracy is watched on", "give --held_out 0"
        parts = held_out_parts(self.labels[train], self.groups_of(train), share, seed, use, way_out)
        return train[parts[0]], train[parts[1]]

    def without(self, images: set[int]) -> LabelledData:
        """The same with some images taken out of every part, such as those that cannot be read.

        Raises:
            UserError: what is left cannot be trained or tested on.
        """
        if not images:
            return self
        rounds = _without(self.rounds, np.array(sorted(images)))
        left = replace(self, rounds=rounds, notes=[*self.notes, f"{len(images)} images are left out."])
        _check_classes(left, trained=bool(len(self.rounds[0].train)))
        return left


@dataclass(frozen=True, kw_only=True)
class SplitConfig(Labelled):
    """How the images are to be split, by the options of a command."""

    splits_in: Path = SPLITS  # the folder where splits of ours are kept; no option is called so
    train: bool = True  # False where DATA trains nothing: every image outside a training split is then tested


def open_labelled(
    data: str | Path | Source | Sequence[str | Path | Source], config: SplitConfig | None = None
) -> LabelledData:
    """The images and labels that DATA, as for :func:`freqmask.data.sources.open_source`, names, split.

    DATA's own splits are used where there are any; else, or with ``folds``, we draw one that holds the mix of
    classes and divides no group, write it down, and take the same one next time.

    Raises:
        UserError: there are no labels, one class only, a test class without training images, an empty part.
    """
    config = config or SplitConfig()
    data = data[0] if isinstance(data, (list, tuple)) and len(data) == 1 else data
    several = isinstance(data, (list, tuple))
    splits = [] if several else splits_there(data, config.labels)  # type: ignore[arg-type]
    named = data if isinstance(data, Source) or several else str(data)
    kinds = {split_of(name) for name in splits}
    # Beside a training part the same images have the same numbers as where a head is trained: identities are
    # counted over both, and draws (corruptions, attacks) follow from them.
    if not config.train and not ("train" in kinds and kinds & {"test", "val"}):
        return _test_only(named, splits, config)
    asked = (config.train_split, config.test_split)
    undivided = asked == ("auto", "auto") and len(splits) < 2 and default_splits(splits)["test"] is None
    if undivided or (config.folds is not None and config.train):
        every: Any = data if several else [data]
        own = dict.fromkeys(name for one in every for name in splits_there(one, config.labels))
        parted = len(own) > 1 or default_splits(list(own))["test"] is not None
        why = f"DATA's own parts ({', '.join(own)}) are joined and parted anew"
        opened = _split_ourselves(named, config, why if parted else "DATA has no test part")
    else:
        missing = (
            f"DATA ({data}) has the splits {', '.join(splits)}; say which are which with --train_split and "
            "--test_split, or part it anew with --folds 5"
        )
        opened = _use_splits(named, choose_parts(splits, *asked, str(data), missing), config)
    if config.train:
        _check_classes(opened)
    else:
        opened.rounds = [Round(one.train[:0], one.test) for one in opened.rounds]
    return opened


def default_splits(names: Sequence[str]) -> dict[str, str | None]:
    """Which of the splits are taken for ``train`` and for ``test`` (val where there is none), None for none."""
    kinds = {split_of(name): name for name in reversed(names)}
    return {"train": kinds.get("train"), "test": kinds.get("test") or kinds.get("val")}


def choose_parts(splits: Sequence[str], train: str, test: str, where: str, missing: str) -> tuple[str, str]:
    """The names of the training and of the test split, by what was asked for each: a name, or ``auto``.

    Raises:
        UserError: there is no such split, or none that ``auto`` can mean, which the sentence ``missing`` says.
    """
    # what was named goes first: a name that is none says more than what auto lacks
    named = [asked if asked == "auto" else choose_split(splits, asked, where) for asked in (train, test)]
    pairs = list(zip(named, default_splits(splits).values(), strict=True))
    if ("auto", None) in pairs:
        raise UserError(missing)
    first, second = (usual if name == "auto" else name for name, usual in pairs)
    if first is None or second is None or first == second:
        raise UserError(f"train_split and test_split ({first}, {second}) must be two different splits")
    return first, second


def _typed(data: Any) -> str:
    return shell_paths(data, "DATA") if isinstance(data, (list, tuple)) else str(data)


def _open(data: Any, split: str, config: SplitConfig) -> Source:
    return open_source(data, config.pages, split, config.labels)


def _test_only(data: object, splits: list[str], config: SplitConfig) -> LabelledData:
    """All images of the test split, else of those that are no training split, else of DATA."""
    split, where = config.test_split, _typed(data)
    if split == "auto":
        split = default_splits(splits)["test"] or "all"
    source = _open(data, split, config)
    rounds = [Round(np.arange(0), np.arange(len(source)))]
    opened = _labelled(source, rounds, where, "all tested" if split == "all" else split)
    if len(opened.tested) == 0:
        raise UserError(f"DATA ({where}): no image of {split} has a label; it must be {DATA_WITH_LABELS}")
    return opened


def _use_splits(data: object, names: tuple[str, str], config: SplitConfig) -> LabelledData:
    parts = [_open(data, split, config) for split in names]
    for name, part in zip(names, parts, strict=True):
        if part.class_names is None and part.why_unlabelled:
            raise UserError(
                f"DATA ({data}): the images of {name} have no labels: {part.why_unlabelled}; or name their labels by "
                "--labels FILE.csv"
            )
    source = JoinedSource(parts)
    first = len(parts[0])
    rounds = [Round(np.arange(first), np.arange(first, len(source)))]
    return _labelled(source, rounds, str(data), f"{names[0]} / {names[1]}")


def _labelled(source: Source, rounds: list[Round], name: str, split: str, *parting: Any) -> LabelledData:
    """Images without a label are taken out of every part; ``parting``: shares and seed of a split of ours."""
    notes = list(dict.fromkeys(source.summary().notes))
    numbers = source.all_labels()
    unknown = np.flatnonzero(numbers < 0)
    if len(unknown) == len(source) or source.class_names is None:
        why = f": {source.why_unlabelled}" if source.why_unlabelled else ""
        raise UserError(f"DATA ({name}) has no labels{why}; it must be {DATA_WITH_LABELS}")
    if len(unknown):
        notes.append(f"{len(unknown):,} images without a label are left out.")
        rounds = _without(rounds, unknown)
    groups = [source.group(index) for index in range(len(source))]
    known = None if all(group is None for group in groups) else groups
    if known is not None and (why := _why_parted(source, known, numbers, rounds[0].train, *parting)):
        known = None
        notes.append(f"{why}: pages of one file, near copies as they may be, are on both sides of splits.")
    return LabelledData(source, numbers, known, list(source.class_names), rounds, name, split, notes)


def _why_parted(
    source: Source, groups: list[str | None], numbers: np.ndarray, train: np.ndarray, *parting: Any
) -> str:
    """Why files of pages cannot be kept whole: there are too few of them; empty: they can, or groups were given."""
    files: defaultdict[int, set[str]] = defaultdict(set)
    for index in train.tolist():
        name, group = source.name(index), groups[index]
        if group is not None and not name.rpartition("#")[0].endswith(group):
            return ""
        files[int(numbers[index])].add(group or name)
    alone = next((min(members) for members in files.values() if len(members) == 1), "")
    if alone:
        return f"{alone} is the only file of its class"
    try:
        if parting:
            split_indices(numbers[train], [groups[index] for index in train.tolist()], *parting)
    except UserError as error:
        return str(error).partition(";")[0]
    return ""


def _without(rounds: list[Round], lost: np.ndarray) -> list[Round]:
    return [Round(one.train[~np.isin(one.train, lost)], one.test[~np.isin(one.test, lost)]) for one in rounds]


def _split_ourselves(data: object, config: SplitConfig, why: str) -> LabelledData:
    source = _open(data, "all", config)
    folds, seed = config.folds, config.split_seed
    words = [f"fold{number}" for number in range(folds)] if folds else ["train", "test"]
    shares = [1.0] * folds if folds else [1 - config.test_share, config.test_share]
    everything = [Round(np.arange(len(source)), np.arange(0))]
    whole = _labelled(source, everything, _typed(data), "", shares, seed)
    images = whole.rounds[0].train
    names = [source.name(int(index)) for index in images]
    how = (folds, None if folds else config.test_share, seed, config.duplicates)
    key = [f"{source.fingerprint()} {how}".encode(), whole.labels.tobytes()]
    groups = repr(whole.groups).encode(errors="surrogateescape")
    file = split_file(config.splits_in, Path(str(data)).stem, *key, groups)

    def draw() -> list[np.ndarray]:
        groups = _with_duplicates(whole, images, config)
        return split_indices(whole.labels[images], groups, shares, seed)

    classes = [whole.class_names[number] for number in whole.labels[images]]
    columns = {"label": classes, "group": whole.groups_of(images) or [None] * len(images)}
    part_of = keep_parts(file, names, words, draw, columns)
    if folds:
        whole.rounds = [Round(images[part_of != one], images[part_of == one]) for one in range(folds)]
    else:
        whole.rounds = [Round(images[part_of == 0], images[part_of == 1])]
    told = f"{folds} folds" if folds else f"{config.test_share:.0%} held out"
    whole.split = f"{told}, {file}"
    whole.notes.append(f"{why}: {told} by us, written to {file}.")
    return whole


def split_file(folder: Path, stem: str, *key: bytes) -> Path:
    """Where a split of ours is kept; its name says by what it was drawn."""
    digest = hashlib.blake2b(digest_size=5)
    for part in key:
        digest.update(part)
    plain = "".join(letter if letter.isalnum() else "-" for letter in stem)[:40]
    return folder / f"{plain}-{digest.hexdigest()}.csv"


def keep_parts(
    file: Path,
    names: Sequence[str],
    words: Sequence[str],
    draw: Callable[[], Sequence[np.ndarray]],
    columns: Mapping[str, Sequence[Any]],
) -> Int64[np.ndarray, " image"]:
    """The part of each image, by its name, from a table that ``--labels`` takes, too; drawn and written once.

    Args:
        file: the table.
        names: of the images; where one repeats, its rows are in the order of its images.
        words: what the parts are called.
        draw: numbers of the images of each part.
        columns: of the table, beside path and split.

    Raises:
        UserError: an image is not listed, a word is unknown, or a part is empty.
    """
    if not file.is_file():
        part_of = np.empty(len(names), np.int64)
        for number, members in enumerate(draw()):
            part_of[members] = number
        table = {"path": names, "split": [words[part] for part in part_of.tolist()], **columns}
        rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
        write_rows(file, list(table), rows)
        return part_of
    known: defaultdict[str | None, deque[str | None]] = defaultdict(deque)
    for row in read_rows(file):
        known[row.get("path")].append(row.get("split"))
    if any(len(known[name]) < count for name, count in Counter(names).items()):
        raise UserError(f"split ({file}) does not list the images of DATA; delete it to have it drawn again")
    # several images may have one name (a member that a tar holds twice): its rows are theirs in turn
    parts = [known[name].popleft() for name in names]
    if set(parts) != set(words):
        raise UserError(
            f"split ({file}) must say {' or '.join(words)} for every image; delete it to have it drawn again"
        )
    return np.array([words.index(str(part)) for part in parts], np.int64)


def _with_duplicates(
    data: LabelledData, images: np.ndarray, config: SplitConfig
) -> Sequence[str | None] | None:
    """Groups in which identical images stay together; refused where that was not asked for."""
    groups, hashes = data.groups_of(images), pixel_hashes(data.source, images)
    known: list[str | None] = groups or [None] * len(hashes)
    first = {value: place for place, value in reversed(list(enumerate(hashes)))}
    twins = [(first[value], place) for place, value in enumerate(hashes) if first[value] != place]
    loose = [(one, other) for one, other in twins if known[one] is None or known[one] != known[other]]
    if not loose:
        return groups
    if config.duplicates == "refuse":
        one, other = (data.source.name(int(images[place])) for place in loose[0])
        raise UserError(
            f"{len(loose)} images are identical to others (first {other!r} and {one!r}) and could be on both sides of "
            "a split; remove them, or keep each with its twin by --duplicates together"
        )
    return joined_groups(known, hashes)


def _check_classes(data: LabelledData, trained: bool = True) -> None:
    """Every part must be there, hold several classes, and be tested on those that it was trained on."""
    for one in data.rounds:
        for part, images in (("training", one.train), ("test", one.test)):
            if len(images) == 0 and (trained or part == "test"):
                raise UserError(f"DATA ({data.name}): the {part} part is empty ({data.split})")
        if not trained:
            continue
        known, tested = set(data.labels[one.train].tolist()), set(data.labels[one.test].tolist())
        if len(known) < 2:
            raise UserError(
                f"DATA ({data.name}) has one class only ({data.class_names[known.pop()]}) to train on; "
                "there must be two or more"
            )
        unknown = sorted(data.class_names[number] for number in tested - known)
        if unknown:
            many = f"{len(unknown)} class{'' if len(unknown) == 1 else 'es'}"
            shown = ", ".join(unknown[:3])
            if len(data.rounds) > 1:
                raise UserError(
                    f"folds ({len(data.rounds)}) leave {many} without an image to train on ({shown}); add images of "
                    "them, or leave them out of DATA"
                )
            raise UserError(
                f"the training part misses {many} of the test part ({shown}); add images of them, or leave them out of "
                "the test part"
            )


def held_out_parts(
    labels: Int64[np.ndarray, " image"],
    groups: Sequence[str | None] | None,
    share: float,
    seed: int,
    use: str,
    way_out: str,
) -> list[np.ndarray]:
    """Numbers of the training images that stay, and of the share that is held out; no group is divided.

    Raises:
        UserError: there are too few, which is told by what they are held out for and the way out.
    """
    try:
        return split_indices(labels, groups, (1 - share, share), seed)
    except UserError as error:
        of = f"{len(labels)} images of {len(np.unique(labels))} classes" + (" in groups" if groups else "")
        raise UserError(
            f"{use} {share:.0%} of the training images, held out, and {of} are too few; add images, or {way_out}"
        ) from error


def pixel_hashes(source: Source, indices: Iterable[int] | None = None) -> list[int]:
    """A 64-bit number of the pixels of each image, or of some: the same for identical images, whatever they are called.

    All images of a source are hashed once and cached; those that cannot be read each have a number of their own.
    """
    file = cache_file("pixels", 2, source.content_stamp(), len(source))
    cached = read_arrays(file, holding=["hashes"])
    # where one can be read now, a right or the disk was missing then
    if cached is None or any(_pixel_hash(source, index) is not None for index in cached[0]["unreadable"]):
        found = [_pixel_hash(source, index) for index in range(len(source))]
        unreadable = [index for index, value in enumerate(found) if value is None]
        for index in unreadable:
            found[index] = int(hash_of(f"unreadable {index}"), 16) - 2**63
        hashes = np.array(found, np.int64)
        write_arrays(file, {"unreadable": unreadable}, {"hashes": hashes})
    else:
        hashes = cached[1]["hashes"]
    return (hashes if indices is None else hashes[np.asarray(list(indices), np.int64)]).tolist()


def identical_notes(source: Source, rounds: Sequence[Round]) -> list[str]:
    """How many test images are identical to a training image of their round, in a sentence; nothing where none is.

    All images are read once, one after the other.
    """
    if not any(len(one.train) for one in rounds):
        return []
    hashes = np.array(pixel_hashes(source), np.int64)
    count = sum(int(np.isin(hashes[one.test], hashes[one.train]).sum()) for one in rounds)
    tested = sum(len(one.test) for one in rounds)
    return [f"{count:,} of the {tested:,} test images are identical to training images."] if count else []


def _pixel_hash(source: Source, index: int) -> int | None:
    """The number of an image, or None where it cannot be read."""
    try:
        picture = source.open(index)
        image = picture.decode()  # whole: at an eighth of the size JPEGs of different fine detail are alike
    except UserError:
        raise
    except (BadImage, Exception):  # decoders raise anything on broken files
        return None
    digest = hashlib.blake2b(f"{picture.size} {image.shape} {image.dtype}".encode(), digest_size=8)
    digest.update(bytes_of(image))
    return int.from_bytes(digest.digest(), "little", signed=True)


def parse_shots(shots: Sequence[str]) -> list[str]:
    """``5`` (images a class) or ``10%`` (of the training images), checked.

    Raises:
        UserError: one is neither.
    """
    for shot in shots:
        number = shot.removesuffix("%")
        if not re.fullmatch(r"\d+(\.\d+)?", number) or float(number) <= 0 or (number == shot and "." in shot):
            raise UserError(f"shots ({shot}) must be images a class such as 5, or a share such as 10%")
        if number != shot and float(number) > 100:
            raise UserError(f"shots ({shot}) must be at most 100%")
    return list(dict.fromkeys(shots))


def shot_name(shot: str) -> str:
    """A number of labels as tables say it.

    >>> shot_name("5"), shot_name("10%")
    ('5 a class', '10%')
    """
    return shot if shot.endswith("%") else f"{shot} a class"


def draw_shots(labels: Int64[np.ndarray, " image"], shot: str, seed: int) -> Int64[np.ndarray, " drawn"]:
    """Which images are trained on, sorted: it depends on labels, shot and seed alone, so all models get the same.

    A shot of ``5`` is that many of each class, all where there are fewer; ``10%`` is that share of each class, at
    least one image.
    """
    share, is_share = float(shot.removesuffix("%")), shot.endswith("%")
    generator = np.random.default_rng([seed, int(share * 1000), is_share])
    chosen = []
    for number in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == number))
        wanted = max(1, round(share / 100 * len(members))) if is_share else int(share)
        chosen.append(members[:wanted])
    return np.sort(np.concatenate(chosen))
