"""Unpickling without a single name being looked up: what a file calls for becomes data or an inert stub.

A pickle is a program: it names functions and has them called. Here every name in it becomes either one of a
handful of our own functions, which build descriptions of tensors, or an :class:`Inert` stub that takes whatever
it is given and does nothing. No module is imported because a file names it.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from freqmask.errors import UserError

STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


class Inert:
    """What stands where a file names a class or a function that is not ours: it swallows everything."""

    origin = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Whatever the file wants it made from."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is kept."""

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Calling it does nothing."""
        return self

    def __setstate__(self, state: Any) -> None:
        """Nothing is kept."""

    def __setitem__(self, name: Any, value: Any) -> None:
        """Nothing is kept."""

    def append(self, value: Any) -> None:
        """Nothing is kept."""

    extend = append
    add = append


@dataclass(frozen=True)
class Storage:
    """Where the numbers of some tensors lie in the file.

    Attributes:
        dtype: of the numbers.
        count: how many.
        read: gives their bytes.
    """

    dtype: torch.dtype
    count: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read yet; the numbers are checked against its storage when it is."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self, cache: dict[int, Tensor] | None = None) -> Tensor:
        """The tensor itself.

        Args:
            cache: storages read before, so that one that many tensors share is read once.

        Raises:
            UserError: it reaches beyond its storage, or the file is cut short.
        """
        reach = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.storage.dtype)
        if reach > self.storage.count or math.prod(self.shape) > self.storage.count:
            raise UserError("the file is damaged: a tensor in it is larger than what is stored of it")
        cache = {} if cache is None else cache
        if id(self.storage) not in cache:
            content = bytearray(self.storage.read())
            if len(content) != self.storage.count * self.storage.dtype.itemsize:
                raise UserError("the file is cut short: numbers of a tensor are missing")
            cache[id(self.storage)] = torch.frombuffer(content, dtype=self.storage.dtype)
        return cache[id(self.storage)].as_strided(self.shape, self.stride, self.offset).clone()


class InertUnpickler(pickle._Unpickler):
    """Python's own unpickler (its memo is a dictionary: no index in a file makes it allocate) without names."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, storage: Callable[[tuple[Any, ...]], Any]) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.foreign: dict[str, type[Inert]] = {}
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """Our own stand-in for a name; nothing is looked up or imported."""
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        full = f"{module}.{name}"
        return self.foreign.setdefault(full, type("Inert", (Inert,), {"origin": full}))

    def persistent_load(self, pid: Any) -> Any:
        """A storage; whatever else a file asks for is inert."""
        if (
            isinstance(pid, tuple)
            and len(pid) >= 5
            and pid[0] == "storage"
            and isinstance(pid[1], torch.dtype)
        ):
            return self._storage(pid)
        if isinstance(pid, tuple) and len(pid) > 1 and isinstance(pid[1], type) and issubclass(pid[1], Inert):
            return pid[1]  # the old form wraps a module's class in one, to keep its source code with it
        return self.foreign.setdefault("a persistent object", Inert)()

    def refuse_allocation(self) -> None:
        """Of all opcodes this one alone takes memory by a number in the file, before reading anything."""
        raise pickle.UnpicklingError("it holds a byte array, which no checkpoint does")

    def get_extension(self, code: int) -> None:
        """Extension codes name things in this process's registry."""
        raise pickle.UnpicklingError("it uses extension codes, which no checkpoint does")

    dispatch[pickle.BYTEARRAY8[0]] = refuse_allocation


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """In place of torch's function that builds a tensor."""
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or any(not isinstance(n, int) or n < 0 for n in numbers):
        raise pickle.UnpicklingError("it describes a tensor that cannot be")
    if len(shape) != len(stride):
        raise pickle.UnpicklingError("it describes a tensor that cannot be")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _parameter(tensor: Any, *_: Any) -> Any:
    """In place of torch's function that builds a parameter."""
    return tensor


def _bytes(text: Any, *_: Any) -> bytes:
    """In place of ``_codecs.encode``, by which pickles of protocol 2 write bytes."""
    return text.encode("latin1") if isinstance(text, str) else b""


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _bytes,
}


def tensors_in(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, read.

    Args:
        weights: names to :class:`StoredTensor`; tensors pass.

    Raises:
        UserError: something among them is no tensor.
    """
    cache: dict[int, Tensor] = {}
    read: dict[str, Tensor] = {}
    for name, value in weights.items():
        if isinstance(value, Inert):
            raise UserError(f"the weights hold a foreign object ({name}: {value.origin}), which is refused")
        if not isinstance(value, StoredTensor | Tensor):
            raise UserError(f"the weights hold a {type(value).__name__} ({name}) where a tensor belongs")
        read[str(name)] = value.read(cache) if isinstance(value, StoredTensor) else value
    return read
