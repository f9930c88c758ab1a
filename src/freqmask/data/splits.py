"""Train and held-out parts: found by their usual names, or drawn by us without dividing a group or a block. Classes:
numbered in one way for every source, or told by a table, a CSV file with path and label, perhaps split and group.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freqmask.console import counted
from freqmask.data.source import Source, SourceSummary, Subset, in_order
from freqmask.errors import UserError, nearest
from freqmask.rng import combine, uniform

ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""What the three usual splits are called."""
COLUMNS = ("path", "label", "split", "group")
_FOREIGN = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8
_composed = partial(unicodedata.normalize, "NFC")  # letters with accents as one character: a Mac has two
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
    fitting = (
        [name for name in known if name == split]
        or [name for name in known if name.lower() == split]
        or [name for name in known if split_of(name) == wanted]
    )
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


def joined_groups(groups: Sequence[object], hashes: Sequence[int]) -> list[str]:
    """Groups (None: an image by itself), joined wherever they share an identical image; a name for each image."""
    keys = [object() if group is None else group for group in groups]
    pictures = [("pixels", value) for value in hashes]
    numbers = {key: number for number, key in enumerate(dict.fromkeys([*keys, *pictures]))}
    rows, columns = ([numbers[key] for key in side] for side in (keys, pictures))
    # here, since no training needs them
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(numbers), len(numbers)))
    component = connected_components(links, directed=False)[1]
    return [str(component[row]) for row in rows]


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
    generator, keys = np.random.default_rng(seed), None
    if groups is None or all(group is None for group in groups):
        part_of = _deal_images(classes, shares, generator)
    else:
        # An object of its own as the key of a group-less image: no text can collide with it.
        keys = [object() if group is None else group for group in groups]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        part_of = _deal_groups(classes, np.array([numbers[key] for key in keys]), shares, generator)
    parts = [np.flatnonzero(part_of == part) for part in range(len(shares))]
    if any(len(part) == 0 for part in parts):
        of = f"{counted(total, 'image')} of {counted(classes.max() + 1, 'class', 'classes')}"
        hint = "take larger parts or fewer of them"
        if keys is not None:
            count = len(set(keys))
            of = f"{counted(total, 'image')} in {counted(count, 'group')}, none of which is divided,"
            hint = f"there must be {len(shares)} groups at least" if count < len(shares) else hint
        elif classes.max() + 1 == total:
            hint = "every image is a class of its own: are these its labels?"
        raise UserError(f"{of} are too few for parts of {', '.join(f'{s:.0%}' for s in shares)}; {hint}")
    return parts


def _deal_images(classes: np.ndarray, shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The part of each image, (image,): every class is shuffled and cut at the shares.

    What rounding takes from one class it gives to the next, so that the parts have their sizes, too. A class
    never misses from the largest part. Three equal parts or more are folds, to which images are dealt in turn.
    """
    part_of = np.empty(len(classes), np.int64)
    edges, dealt = np.cumsum(shares), 0
    by_class = np.split(np.argsort(classes, kind="stable"), np.cumsum(np.bincount(classes))[:-1])
    for number in generator.permutation(len(by_class)):
        members = generator.permutation(by_class[number])
        if len(shares) > 2 and shares.max() == shares.min():
            part_of[members] = np.arange(dealt, dealt + len(members)) % len(shares)
            dealt += len(members)
            continue
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
    sizes, all_counts = np.bincount(groups), np.bincount(classes)
    missing = shares[:, None] * all_counts  # (part, class): images still to come
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1])
    order = generator.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    part_of_group = np.empty(len(sizes), np.int64)
    for group in order:
        counts = np.bincount(classes[members[group]], minlength=len(all_counts))
        # What dealing the group to a part does to the sum of squared shortfalls, per part.
        change = ((missing - counts) ** 2 - missing**2).sum(1) / shares
        part = int(np.argmin(change))
        part_of_group[group] = part
        missing[part] -= counts
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
    drawn = uniform(combine(torch.from_numpy(source.identities()), "hold out", seed), 0).numpy()
    blocks = source.blocks()
    if blocks is None or not blocks.whole:
        order = np.argsort(drawn, kind="stable")
    else:
        _, first, block = np.unique(blocks.numbers, return_index=True, return_inverse=True)
        order = np.lexsort((drawn, drawn[first][block]))
    return np.sort(order[wanted:]), np.sort(order[:wanted])


@dataclass(frozen=True)
class Row:
    """A line of the table; what is empty there is None."""

    path: str
    label: str | None
    split: str | None
    group: str | None


def read_labels(file: Path) -> list[Row]:
    """The lines of a CSV table with a header; commas, semicolons or tabs; in UTF-8, UTF-16 or Windows-1252.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    try:
        text = decode_table(file.read_bytes())
    except OSError as error:
        raise UserError(f"labels ({file}) cannot be read ({error.strerror}); check the path") from error
    table = text.lstrip("\r\n")
    first, _, rest = table.partition("\n")
    told = re.fullmatch(r"sep=(.)\r?", first)  # Excel's way to name the delimiter
    delimiter = told[1] if told else max(",;\t", key=first.count)
    table = rest if told else table
    reader = csv.DictReader(io.StringIO(table, newline=""), delimiter=delimiter)
    try:
        return _rows(reader, file, text.count("\n") - table.count("\n"))
    except csv.Error as error:
        raise UserError(f"labels ({file}) is no CSV table ({error}); check its quotes") from error


def _rows(reader: csv.DictReader[str], file: Path, above: int) -> list[Row]:
    """The rows of a table that ``above`` lines of the file precede."""
    header = [name.strip().lower() for name in reader.fieldnames or ()]
    columns = dict(zip(header, reader.fieldnames or (), strict=True))
    missing = [name for name in COLUMNS[:2] if name not in columns]
    if missing:
        found = ", ".join(repr(name) for name in reader.fieldnames or ())
        hint = f"its first line has {found}; rename columns there" if found else "the file is empty"
        raise UserError(
            f"labels ({file}) must have the columns path and label, {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; {hint}"
        )
    twice = next((name for name in COLUMNS if header.count(name) > 1), None)
    if twice:
        raise UserError(
            f"labels ({file}) must have one column {twice}, it has {header.count(twice)}; rename the others"
        )
    spelled: dict[str, str] = {}  # of Train and train, which are one split, the first

    def cell(record: dict[str, str], name: str) -> str | None:
        # a column without a name is there, too: pandas' index
        text = (record[columns[name]] or "").strip() if name in columns else ""
        text = _composed(as_text(text))
        return (spelled.setdefault(text.lower(), text) if name == "split" else text) or None

    rows = []
    for record in reader:
        beyond: Any = record.get(None, [])
        if any(text.strip() for text in beyond):
            raise UserError(
                f"labels ({file}) has more cells in line {above + reader.line_num} than columns (last {beyond[-1]!r}); "
                f"a cell that holds {reader.reader.dialect.delimiter!r} must stand in quotes"
            )
        if (record[columns["path"]] or "").strip():
            rows.append(Row(record[columns["path"]], *(cell(record, name) for name in COLUMNS[1:])))
    return rows


def decode_table(data: bytes) -> str:
    """The text of a table in the encoding that its bytes speak for; bytes that are no UTF-8 become surrogates."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return data.decode("utf-32", errors="replace")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    beginning = data[:200]
    if beginning.count(0) > len(beginning) // 4:  # in UTF-16 every other byte of plain letters is 0
        order = "utf-16-le" if beginning[1::2].count(0) > beginning[::2].count(0) else "utf-16-be"
        return data.decode(order, errors="replace")
    return data.decode("utf-8-sig", errors="surrogateescape")


def as_text(cell: str) -> str:
    """A cell whose bytes are no UTF-8 as Windows-1252 has it, which most of such tables are written in."""
    if not _FOREIGN.search(cell):
        return cell
    data = cell.encode("utf-8", errors="surrogateescape")
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def locate_labelled(table: str | Path, source: Callable[[], Source]) -> Located:
    """The images that a table lists, with its labels, groups and splits; its paths are names of ``source()``."""
    file = Path(table).expanduser()
    splits = sorted({row.split for row in read_labels(file) if row.split})
    return Located(str(file), lambda split, notes: LabelledSource(source(), file, split, notes), splits)


class LabelledSource(Subset):
    """Images of a source, by their names, that a split of a table lists (None: all of it), with its labels and groups.

    Raises:
        UserError: the table names images that are not there, or names one twice.
    """

    def __init__(self, source: Source, file: Path, chosen: str | None, notes: list[str]) -> None:
        table = read_labels(file)
        rows = [row for row in table if chosen is None or row.split == chosen]
        super().__init__(source, _find(source, rows, file))
        self.notes = [*notes]
        if _FOREIGN.search(decode_table(file.read_bytes())):
            self.notes.append(f"{file.name} is not in UTF-8; it is read as Windows-1252.")
        unlisted, unsplit = len(source) - len(self), sum(row.split is None for row in table)
        if unlisted and chosen is None:
            self.notes.append(f"{unlisted:,} images that {file.name} does not list are left out.")
        if unsplit and chosen is not None:
            self.notes.append(f"{unsplit:,} images of {file.name} have no split and are left out.")
        self.class_names = in_order({row.label for row in rows if row.label is not None}) or None
        numbers = {name: number for number, name in enumerate(self.class_names or ())}
        self._labels = np.array([-1 if row.label is None else numbers[row.label] for row in rows], np.int64)
        self._groups = [row.group for row in rows] if any(row.group for row in rows) else None

    label, all_labels = Source.label, Source.all_labels

    def group(self, index: int) -> str | None:
        return super().group(index) if self._groups is None else self._groups[index]

    def summary(self) -> SourceSummary:
        whole = super().summary()
        # which column DATA's own labels are of is no matter now
        whole.notes = [note for note in whole.notes if not note.startswith("Labels are read")] + [*self.notes]
        return whole


def told_apart(names: Sequence[str]) -> list[str]:
    """Names of classes, one that stands there twice (ImageNet's crane, a bird and a machine) numbered from then on.

    >>> told_apart(["crane", "dog", "crane"])
    ['crane', 'dog', 'crane (2)']
    """
    times = Counter[str]()
    numbered = []
    for name in names:
        times[name] += 1
        numbered.append(f"{name} ({times[name]})" if times[name] > 1 else name)
    return numbered


def are_classes(array: np.ndarray, count: int) -> bool:
    """Whether an array holds a class of each of ``count`` images: a text, or a whole number, NaN for none."""
    whole = array.dtype.kind in "iubSU" or (array.dtype.kind == "f" and not (np.floor(array) < array).any())
    return whole and array.shape[:1] == (array.size,) == (count,)


def number_classes(
    values: Sequence[float | str | None], names: list[str] | None = None
) -> tuple[np.ndarray, list[str] | None]:
    """Labels counted from 0, int64 (image,) and -1 where there is none, and what they are called; or None.

    Values are a name or a number of each image, None, empty, NaN or negative without one; names are those of 0, 1, ...
    if known. Fractions are no classes.

    >>> number_classes(["dog", None, "cat"])[1], number_classes([2, -1, 0])[1], number_classes([2, -1, 70])[1]
    (['cat', 'dog'], ['0', '1', '2'], ['2', '70'])
    """
    # whole numbers come as floats from a column of pandas that lacks one
    values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    known = {value for value in values if value not in (None, "") and (isinstance(value, str) or value >= 0)}
    if any(isinstance(value, float) for value in known) or (not known and names is None):
        return np.full(len(values), -1, np.int64), None
    if names is None and all(isinstance(value, int) for value in known):
        most = max(int(value) for value in known) + 1
        # a part may lack some classes; where most would be lacking, the numbers are ids
        names = [str(number) for number in range(most)] if most <= 2 * len(known) else None
    places: dict[Any, int]
    if names is not None:
        places = {number: number for number in range(len(names))}
        names = told_apart(names)
    else:
        ordered = sorted(known, key=lambda value: (isinstance(value, str), value))
        places, names = {value: place for place, value in enumerate(ordered)}, [str(v) for v in ordered]
    return np.array([places.get(value, -1) for value in values], np.int64), names


def _find(source: Source, rows: list[Row], file: Path) -> np.ndarray:
    if not rows:
        raise UserError(f"labels ({file}) lists no images; it needs a line for each below its header")
    names = [source.name(index) for index in range(len(source))]
    numbers = {name: index for index, name in enumerate(names)}
    # a name may begin with a space or hold a backslash; more often, they are of the table
    paths = [row.path if row.path in numbers else _as_name(row.path.strip(), source) for row in rows]
    if any(path not in numbers for path in paths):
        # a table may write ü as one character and the disc as two, or in another encoding
        spelled = {_composed(name): name for name in numbers}
        paths = [path if path in numbers else spelled.get(_composed(as_text(path)), path) for path in paths]
    missing = [path for path in paths if path not in numbers]
    if missing:
        close = nearest(missing[0], list(numbers)[:10_000])
        relative = f"names are relative to DATA, like {source.name(0)!r}"
        hint = close if close.startswith("did you mean") else relative
        raise UserError(
            f"labels ({file}) names {counted(len(missing), 'image')} that DATA lacks (first {missing[0]!r}); {hint}"
        )
    if len(set(paths)) < len(paths):
        twice = Counter(paths).most_common(1)[0][0]
        raise UserError(f"labels ({file}) names {twice!r} twice; one line an image")
    if len(numbers) < len(names):
        alike = Counter(names)
        unclear = next((path for path in paths if alike[path] > 1), None)
        if unclear is not None:
            raise UserError(
                f"labels ({file}) names {unclear!r}, as {alike[unclear]} images of DATA are called; each of those that "
                "are labelled needs a name of its own"
            )
    return np.array([numbers[path] for path in paths], np.int64)


def _as_name(path: str, source: Source) -> str:
    """A path of the table as sources name images: relative to the folder, with forward slashes."""
    root = getattr(source, "root", None)
    if root is not None and Path(path).is_absolute():
        for base in (Path(root).absolute(), Path(root).resolve()):
            if Path(path).is_relative_to(base):
                return Path(path).relative_to(base).as_posix()
    files = getattr(source, "files", None)
    if files is not None and files.remote:
        path = path.removeprefix(f"{files.url('').rstrip('/')}/")
    return path.replace("\\", "/").removeprefix("./")
