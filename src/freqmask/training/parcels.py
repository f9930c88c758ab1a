"""Objects on their way to other processes: large ones once, what lay on an accelerator to that of the receiver."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from freqmask.errors import UserError

_LASTING, _TENSOR = "lasting", "tensor"


class Packer:
    """Writes objects for other processes and knows which of them need not be sent again."""

    def __init__(self) -> None:
        self._lasting: list[tuple[int, object]] = []
        self._numbers = itertools.count()  # never used twice: a receiver may still hold what we have dropped

    def keep(self, objects: Iterable[object]) -> list[int]:
        """Name what is sent once, by object and not by value; what was kept before and is not named is dropped.

        Args:
            objects: they must not change while they are kept.

        Returns:
            The number of each.
        """
        known = {id(one): number for number, one in self._lasting}
        self._lasting = [
            (known[id(one)] if id(one) in known else next(self._numbers), one) for one in objects
        ]
        return [number for number, _ in self._lasting]

    def pack_lasting(self, number: int) -> bytes:
        """A kept object, whole.

        Raises:
            UserError: it cannot be written.
        """
        return _written(dict(self._lasting)[number], {})

    def pack(self, thing: object) -> bytes:
        """Any object; kept ones in it are named by their number.

        Raises:
            UserError: it cannot be written.
        """
        return _written(thing, {id(one): number for number, one in self._lasting})


class Unpacker:
    """Reads what a `Packer` wrote.

    Args:
        device: where tensors of an accelerator arrive; those of the CPU stay there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lasting: dict[int, object] = {}

    def keep(self, numbers: Iterable[int], packed: Mapping[int, bytes]) -> None:
        """Hold what lasts, and nothing else any more.

        Args:
            numbers: of all that lasts.
            packed: those that are new.
        """
        held = self._lasting
        self._lasting = {}  # first: two models need not fit into the memory of the device
        self._lasting.update((number, held[number]) for number in numbers if number in held)
        held.clear()
        self._lasting.update((number, self.unpack(parcel)) for number, parcel in packed.items())

    def unpack(self, parcel: bytes) -> Any:
        """The object.

        Raises:
            UserError: it is defined where another process cannot find it.
        """
        try:
            return _Reader(io.BytesIO(parcel), self.device, self._lasting).load()
        except (AttributeError, ImportError) as error:
            raise UserError(
                f"another process cannot find what it needs ({error}); define it in a module of its own rather "
                "than in the script, or try --devices 1"
            ) from error


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, numbers: Mapping[int, int]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._numbers = numbers

    def persistent_id(self, obj: Any) -> tuple[str, Any] | None:
        if id(obj) in self._numbers:
            return _LASTING, self._numbers[id(obj)]
        if isinstance(obj, Tensor) and not isinstance(obj, nn.Parameter) and obj.device.type != "cpu":
            return _TENSOR, obj.detach().cpu()  # a parameter is written as one, around its plain tensor
        return None


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, device: torch.device, lasting: Mapping[int, object]) -> None:
        super().__init__(file)
        self._device, self._lasting = device, lasting

    def persistent_load(self, pid: tuple[str, Any]) -> Any:
        kind, value = pid
        return self._lasting[value] if kind == _LASTING else value.to(self._device)


def _written(thing: object, numbers: Mapping[int, int]) -> bytes:
    file = io.BytesIO()
    try:
        _Writer(file, numbers).dump(thing)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"model or data cannot be sent to other processes ({error}); try --devices 1"
        ) from error
    return file.getvalue()
