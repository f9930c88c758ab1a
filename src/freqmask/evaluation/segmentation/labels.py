"""Which labels of the masks are classes, what they are called, and which are ignored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int16, Int64

from freqmask.errors import UserError
from freqmask.evaluation.segmentation.masks import MOST_LABEL

IGNORED = -1  # in targets: counted neither in a loss nor in a score
UNKNOWN = -2  # in a lookup: a label that is neither a class nor ignored
DEFAULT_IGNORED = 255
VOID_NAMES = ("void", "unlabelled", "unlabeled", "ignore", "ignored")
CLASS_FILES = ("classes.txt", "objectInfo150.txt")  # the second is ADE20K's own
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
    """Names that count from 0 belong to the labels from ``first`` on, unless the first is that of the void."""
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
