"""Reading files of ``torch.save`` without running anything that they hold.

Tensors are read from the file only when they are asked for, so that the optimiser's state of a released
checkpoint costs nothing.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from freqmask.errors import UserError
from freqmask.interop.inert_pickle import Inert, InertUnpickler, Storage

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of files written before PyTorch 1.6
_LEGACY_PROTOCOL = 1001
_LARGEST_PICKLE = 256 * 2**20  # bytes; that of a ViT-B with its optimiser has a tenth of a megabyte
_MOST_ENTRIES = 1_000_000


@dataclass
class TorchFile:
    """What a file holds.

    Attributes:
        content: plain containers, numbers and texts; tensors as :class:`StoredTensor`, foreign objects as
            :class:`Inert`.
        foreign: ``module.name`` of every class and function that the file names and we did not touch.
    """

    content: Any
    foreign: list[str] = field(default_factory=list)


def read_torch_file(path: str | Path) -> TorchFile:
    """Read a file of ``torch.save``, of today's zip form or that of before PyTorch 1.6.

    Args:
        path: the file; it must not change until the last of its tensors is read.

    Raises:
        UserError: it is cut short, no such file, holds a program (TorchScript), or declares more than it has.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"file ({path}) does not exist")
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start[:4] == b"PK\x03\x04" or zipfile.is_zipfile(path):
            return _read_zip(path)
        if tarfile.is_tarfile(path):
            raise UserError("it is of the tar form of PyTorch before 0.2, which is not read; save it again")
        return _read_legacy(path)
    except UserError as error:
        raise UserError(f"file ({path}) was refused: {error}") from error
    except zipfile.BadZipFile as error:
        raise UserError(f"file ({path}) cannot be read, it is cut short or damaged ({error})") from error
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        OSError,
        RecursionError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"file ({path}) cannot be read, it is no torch file or cut short ({reason})"
        ) from error


def _read_zip(path: Path) -> TorchFile:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        _check_entries(entries, path.stat().st_size)
        names = {entry.filename: entry for entry in entries}
        pickles = [name for name in names if name.endswith("data.pkl") and name.count("/") <= 1]
        if len(pickles) != 1:
            raise UserError("it is a zip file, but none of torch.save")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in names or any(name.startswith(f"{root}code/") for name in names):
            raise UserError("it is a TorchScript program; save the state dict of the model instead")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise UserError("it was written on a big-endian machine; save it again on another")
        known: dict[str, Storage] = {}

        def storage(pid: tuple[Any, ...]) -> Storage:
            dtype, key, count = pid[1], str(pid[2]), pid[4]
            name = f"{root}data/{key}"
            if name not in names or names[name].file_size != count * dtype.itemsize:
                raise pickle.UnpicklingError(
                    f"the numbers of storage {key[:20]} are missing or of another size"
                )
            return known.setdefault(key, Storage(dtype, count, lambda: _read_entry(path, name)))

        unpickler = InertUnpickler(io.BytesIO(archive.read(pickles[0])), storage)
        return TorchFile(unpickler.load(), list(unpickler.foreign))


def _read_entry(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    """A zip bomb declares more than the file has: by compressing, or by entries that share their bytes."""
    if len(entries) > _MOST_ENTRIES:
        raise UserError(f"it declares {len(entries):,} entries, which no checkpoint has")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(
            "its entries are compressed, which torch.save never does; it could unpack to any size"
        )
    declared = sum(entry.file_size for entry in entries)
    if declared > size:
        raise UserError(f"it declares {declared:,} bytes but has {size:,}")
    for entry in entries:
        parts = entry.filename.replace("\\", "/").split("/")
        if ".." in parts or entry.filename.startswith(("/", "\\")):
            raise UserError(f"one of its entries is named {entry.filename[:60]!r}, outside of the file")
        if entry.filename.endswith(".pkl") and entry.file_size > _LARGEST_PICKLE:
            raise UserError(f"its description alone has {entry.file_size:,} bytes, which no checkpoint has")


def _read_legacy(path: Path) -> TorchFile:
    """Magic, protocol, system, the object, the storages' keys, then each storage: a count and its numbers."""
    size = path.stat().st_size
    positions: dict[str, tuple[int, int]] = {}  # key -> position of its numbers, how many
    known: dict[str, Storage] = {}

    def storage(pid: tuple[Any, ...]) -> Storage:
        dtype, key, count = pid[1], str(pid[2]), pid[4]
        if not isinstance(count, int) or not 0 <= count * dtype.itemsize <= size:
            raise pickle.UnpicklingError(f"storage {key[:20]} declares more than the file has")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("it shares storages in a way that is not read; save it again")
        return known.setdefault(
            key, Storage(dtype, count, lambda: _read_numbers(path, positions[key], dtype))
        )

    with path.open("rb") as file:
        foreign: dict[str, type[Inert]] = {}

        def load() -> Any:
            unpickler = InertUnpickler(file, storage)
            unpickler.foreign = foreign
            return unpickler.load()

        if file.peek(1)[:1] != b"\x80" or load() != _LEGACY_MAGIC or load() != _LEGACY_PROTOCOL:
            raise pickle.UnpicklingError("it does not begin as a torch file does")
        if not load().get("little_endian", True):
            raise UserError("it was written on a big-endian machine; save it again on another")
        content, keys = load(), load()
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            stored = known[str(key)]
            positions[str(key)] = (file.tell(), count)
            if count != stored.count or file.tell() + count * stored.dtype.itemsize > size:
                raise pickle.UnpicklingError("the numbers at its end are missing")
            file.seek(count * stored.dtype.itemsize, os.SEEK_CUR)
    return TorchFile(content, list(foreign))


def _read_numbers(path: Path, place: tuple[int, int], dtype: torch.dtype) -> bytes:
    with path.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1] * dtype.itemsize)
