"""Writes one tar shard: members in WebDataset's names, always the same bytes for the same images."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from freqmask.data.encode import EncodedImage
from freqmask.data.shard_index import Row
from freqmask.training.files import replace_atomically


class Packed(NamedTuple):
    """An image on its way into a shard.

    Attributes:
        name: what it is called in DATA.
        image: its file; or the reason why there is none.
        label: number of its class, or None.
        class_name: name of its class, or None.
        group: what it must not be separated from, or None.
    """

    name: str
    image: EncodedImage | str
    label: int | None
    class_name: str | None
    group: str | None


def write_shard(path: Path, images: Iterable[Packed]) -> list[Row]:
    """A tar that is whole or not there.

    Args:
        path: the tar.
        images: in order; those without a file are left out.

    Returns:
        What lies where in it.
    """
    rows: list[Row] = []

    def write(temporary: Path) -> None:
        taken: set[str] = set()
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            rows.extend(_add(tar, one, one.image, taken) for one in images if not isinstance(one.image, str))

    replace_atomically(path, write)
    return rows


def _add(tar: tarfile.TarFile, one: Packed, image: EncodedImage, taken: set[str]) -> Row:
    """One image, and its label beside it."""
    key = member_key(one.name, taken)
    offset = _append(tar, key + image.suffix, image.data)
    if one.label is not None:
        _append(tar, key + ".cls", str(one.label).encode())
    return Row(
        key + image.suffix,
        offset,
        len(image.data),
        one.class_name,
        one.group,
        one.name,
        *image.size,
        image.channels,
        image.bits,
    )


def _append(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Adds a member; where its bytes begin. Owner, rights and time are left at 0, or no two tars were equal."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE  # type: ignore[attr-defined, no-any-return, unused-ignore]


def member_key(name: str, taken: set[str]) -> str:
    """What a member is called before its suffix: no dots, which part a sample's name in WebDataset, and no twins.

    Args:
        name: of the image.
        taken: keys of the shard so far; the new one is added.

    >>> member_key("cat/my photo.v2.jpg", set())
    'cat/my_photo_v2'
    """
    path = PurePosixPath(name.replace("\\", "/"))
    stem = str(path.with_name(path.stem)) if path.suffix else str(path)
    key = re.sub(r"[^\w/+=-]", "_", stem).strip("/") or "image"
    number, unique = 1, key
    while unique in taken:
        number += 1
        unique = f"{key}_{number}"
    taken.add(unique)
    return unique
