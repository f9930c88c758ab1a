"""What a tar holds, told from its headers: images, and labels beside them as WebDataset lays them out."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO

from freqmask.data.decode import read_suffixes
from freqmask.data.shard_index import Row, ShardRows
from freqmask.data.splits import split_of
from freqmask.errors import UserError

LABEL_KEYS = ("label", "cls", "class", "class_name", "target")
LARGEST_NOTE = 1_000_000  # bytes of a .cls or .json that is read for its label


@dataclass
class _Sample:
    """The members of one key, as WebDataset groups them: ``000.jpg``, ``000.cls``."""

    key: str
    images: list[Row] = field(default_factory=list)
    label: str | None = None
    group: str | None = None
    name: str | None = None


def read_headers(name: str, file: BinaryIO, size: int) -> ShardRows:
    """The images of a tar; their pixels are not read.

    Args:
        name: what the shard is called, relative to its set.
        file: the tar, seekable.
        size: its bytes.

    Raises:
        UserError: it is compressed, damaged or no tar.
    """
    suffixes, ignored = read_suffixes(), Counter[str]()
    rows: list[Row] = []
    others = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for sample in _samples(tar, suffixes, ignored):
                chosen = _chosen(sample.images)
                others += len(sample.images) - len(chosen)
                rows += [
                    row._replace(label=sample.label, group=sample.group, name=sample.name) for row in chosen
                ]
    except (tarfile.TarError, EOFError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"DATA: the shard {name} is truncated, compressed or no tar ({reason}); fetch it again, or unpack it"
        ) from error
    notes = [f"Of samples with several images the first is read ({name} and others)."] if others else []
    return ShardRows(name, size, split_of_shard(name), rows, dict(ignored.most_common()), notes)


def _samples(tar: tarfile.TarFile, suffixes: frozenset[str], ignored: Counter[str]) -> Iterator[_Sample]:
    """Members of one key stand one behind the other."""
    sample = _Sample("")
    for info in tar:
        path = PurePosixPath(info.name)
        if not info.isreg() or path.name.startswith("."):
            continue
        stem, _, extension = path.name.partition(".")
        key = str(path.with_name(stem))
        if key != sample.key:
            yield sample
            sample = _Sample(key)
        suffix = path.suffix.lower()
        if suffix in suffixes:
            sample.images.append(Row(info.name, info.offset_data, info.size))
        elif extension.lower() in ("cls", "json") and info.size <= LARGEST_NOTE:
            _read_note(sample, extension.lower(), tar, info)
        else:
            ignored[suffix] += 1
    yield sample


def _chosen(images: list[Row]) -> list[Row]:
    """The image of a sample: ``000.jpg``, not ``000.mask.png``; where there are none such, each is its own."""
    plain = [row for row in images if PurePosixPath(row.member).name.count(".") == 1]
    return plain[:1] or images


def _read_note(sample: _Sample, kind: str, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
    """The label in a ``.cls``; label, group and name in a ``.json``."""
    file = tar.extractfile(info)
    text = "" if file is None else file.read().decode("utf-8", "replace").strip()
    if kind == "cls":
        sample.label = text or sample.label
        return
    try:
        facts = json.loads(text)
    except ValueError:
        return
    if isinstance(facts, dict):
        found = next((facts[key] for key in LABEL_KEYS if isinstance(facts.get(key), str | int)), None)
        sample.label = sample.label or (None if found is None else str(found))
        sample.group = str(facts["group"]) if facts.get("group") is not None else None
        sample.name = facts["name"] if isinstance(facts.get("name"), str) else None


def split_of_shard(name: str) -> str | None:
    """The split that a shard's folder or file name tells.

    >>> split_of_shard("val/000001.tar"), split_of_shard("imagenet-train-000007.tar"), split_of_shard("7.tar")
    ('val', 'train', None)
    """
    *folders, file = name.split("/")
    words = [*folders[-1:], *re.split(r"[-_.]", file.removesuffix(".tar"))]
    return next((word for word in words if split_of(word)), None)
