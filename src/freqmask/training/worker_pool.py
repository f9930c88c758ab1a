"""The same work on several devices: one process each, fed from this one, whose results come back here.

Kept beside joblib and ``ProcessPoolExecutor``: those bind no worker to a device, give a task's results only at its end,
send what all tasks share with each of them, do not tell by which signal a worker died, and leave workers behind when
this process is killed.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import signal
import sys
import time
import traceback
import types
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

import torch
from torch import Tensor, nn

from freqmask.console import be_quiet, silence_third_party_loggers
from freqmask.errors import UserError
from freqmask.training.auto import is_out_of_memory

Work = Callable[..., Iterable[Any]]

_CHECK_EVERY = 1.0  # seconds after which a process that sends nothing is looked after
_PATIENCE = 5.0  # seconds that a process has to leave by itself
_TERMINATED = 143  # as a shell tells SIGTERM
_LASTING, _TENSOR = "lasting", "tensor"
_RESULT, _DONE, _FAILED = "result", "done", "failed"


class Serializer:
    """Writes objects for other processes and knows which of them need not be sent again."""

    def __init__(self) -> None:
        self._lasting: dict[int, object] = {}
        self._numbers = itertools.count()  # never used twice: a receiver may still hold what we have dropped

    def keep(self, objects: Iterable[object]) -> list[int]:
        """The numbers of what is sent once, by object and not by value; what is not named any more is dropped.

        Args:
            objects: they must not change while they are kept.
        """
        known = {id(item): number for number, item in self._lasting.items()}
        self._lasting = {
            known[id(item)] if id(item) in known else next(self._numbers): item for item in objects
        }
        return list(self._lasting)

    def pack_lasting(self, number: int) -> bytes:
        """A kept object, whole."""
        return _written(self._lasting[number], {})

    def pack(self, thing: object) -> bytes:
        """Any object; kept ones in it are named by their number.

        Raises:
            UserError: it cannot be written.
        """
        return _written(thing, {id(item): number for number, item in self._lasting.items()})


class Deserializer:
    """Reads what a `Serializer` wrote.

    Args:
        device: where tensors of an accelerator arrive; those of the CPU stay there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lasting: dict[int, object] = {}

    def keep(self, numbers: Iterable[int], packed: Mapping[int, bytes]) -> None:
        """Hold the objects of these numbers, those in ``packed`` being new, and nothing else any more."""
        held, self._lasting = (
            self._lasting,
            {},
        )  # first: two models need not fit into the memory of the device
        self._lasting.update((number, held[number]) for number in numbers if number in held)
        held.clear()
        self._lasting.update((number, self.unpack(message)) for number, message in packed.items())

    def unpack(self, message: bytes) -> Any:
        """The object.

        Raises:
            UserError: it is defined where another process cannot find it.
        """
        try:
            return _Unpickler(io.BytesIO(message), self.device, self._lasting).load()
        except (AttributeError, ImportError) as error:
            raise UserError(
                f"another process cannot find what it needs ({error}); define it in a module of its own rather "
                "than in the script, or try --devices 1"
            ) from error


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, numbers: Mapping[int, int]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._numbers = numbers

    def persistent_id(self, obj: Any) -> tuple[str, Any] | None:
        if id(obj) in self._numbers:
            return _LASTING, self._numbers[id(obj)]
        if isinstance(obj, Tensor) and not isinstance(obj, nn.Parameter) and obj.device.type != "cpu":
            return _TENSOR, obj.detach().cpu()  # a parameter is written as one, around its plain tensor
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, device: torch.device, lasting: Mapping[int, object]) -> None:
        super().__init__(file)
        self._device, self._lasting = device, lasting

    def persistent_load(self, pid: tuple[str, Any]) -> Any:
        kind, value = pid
        return self._lasting[value] if kind == _LASTING else value.to(self._device)


def _written(thing: object, numbers: Mapping[int, int]) -> bytes:
    file = io.BytesIO()
    try:
        _Pickler(file, numbers).dump(thing)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"model or data cannot be sent to other processes ({error}); try --devices 1"
        ) from error
    return file.getvalue()


class DiedError(UserError):
    """A process is gone, with what it was at."""


@dataclass
class _Member:
    """One process, and the numbers of the lasting objects that it has."""

    process: SpawnProcess
    connection: Connection
    device: torch.device
    held: set[int] = field(default_factory=set)


class WorkerPool:
    """Processes that do the same work on different images, one per device.

    Nothing is started before the first `run` that needs it. On one device the work is done in this process.

    Args:
        devices: of torch; the CPU may come several times.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(devices)
        self._members: list[_Member] = []
        self._serializer = Serializer()
        self._busy = False
        weakref.finalize(self, _end, self._members)  # at the latest when Python ends

    def __len__(self) -> int:
        return len(self.devices)

    def run(
        self, work: Work, arguments: Sequence[tuple[Any, ...]], lasting: Sequence[object] = ()
    ) -> Iterator[Any]:
        """Call ``work(device, *arguments)`` in as many processes as there are arguments.

        Args:
            work: a function of a module, which returns an iterable of things that can be pickled.
            arguments: of each process, at most one a device. Tensors that lie on an accelerator here arrive on
                the process's own.
            lasting: objects among the arguments, or within them, that the next call has again: they are sent
                once, and must not change.

        Yields:
            What the work yields, as it comes.

        Raises:
            DiedError: a process is gone; all of them are ended then, as after the next.
            UserError: a device ran out of memory, or something cannot be sent.
        """
        if len(arguments) == 1:
            with _translate_memory_errors(self.devices[0]):
                yield from work(self.devices[0], *arguments[0])
            return
        if self._busy:
            self.close()  # of the last call somebody did not want to see the end
        self._busy = True
        try:
            self._send(work, arguments, lasting)
            yield from self._gather(len(arguments))
            self._busy = False
        finally:
            if self._busy:
                self.close()

    def close(self) -> None:
        """End the processes: at once where they are at work."""
        _end(self._members, at_once=self._busy)
        self._busy = False
        self._serializer = Serializer()

    def _send(self, work: Work, arguments: Sequence[tuple[Any, ...]], lasting: Sequence[object]) -> None:
        numbers = self._serializer.keep(lasting)
        messages = [self._serializer.pack((work, own)) for own in arguments]
        while len(self._members) < len(arguments):
            self._members.append(_start(self.devices[len(self._members)]))
        members = self._members[: len(arguments)]
        new = {number for member in members for number in numbers if number not in member.held}
        packed = {number: self._serializer.pack_lasting(number) for number in new}
        for member, message in zip(members, messages, strict=True):
            lacking = {number: packed[number] for number in numbers if number not in member.held}
            try:
                member.connection.send_bytes(pickle.dumps((numbers, lacking, message)))
            except (BrokenPipeError, ConnectionResetError) as error:
                raise self._died(member) from error
            member.held = set(numbers)

    def _gather(self, count: int) -> Iterator[Any]:
        working: dict[Any, _Member] = {member.connection: member for member in self._members[:count]}
        while working:
            for connection in wait(list(working), timeout=_CHECK_EVERY):
                member = working[connection]
                try:
                    kind, result = pickle.loads(member.connection.recv_bytes())
                except (EOFError, ConnectionResetError) as error:
                    raise self._died(member) from error
                if kind == _RESULT:
                    yield result
                elif kind == _DONE:
                    del working[connection]
                else:
                    failure, text = result
                    if not isinstance(failure, UserError):
                        failure.__cause__ = RuntimeError(f"in {self._name(member)}:\n{text}")
                    raise failure
            for member in working.values():
                # its loader workers hold the line open for seconds after its death
                if not member.process.is_alive() and not member.connection.poll():
                    raise self._died(member)

    def _died(self, member: _Member) -> DiedError:
        member.process.join(_PATIENCE)
        code = member.process.exitcode or 0
        how = f"ended with code {code}"
        if code < 0:
            how = f"was killed by signal {-code}, most often for want of memory"
        return DiedError(
            f"{self._name(member)} {how}; try fewer --devices, fewer --workers or a smaller --batch_size"
        )

    def _name(self, member: _Member) -> str:
        return f"process {self._members.index(member) + 1} of {len(self)} ({member.device})"


def _start(device: torch.device) -> _Member:
    here, theirs = Pipe()
    threads = torch.get_num_threads()  # not fewer: their number shows in the last bits of convolutions
    with _deaf_and_without_script():
        process = SpawnContext().Process(target=_serve, args=(theirs, str(device), threads))
        process.start()
    theirs.close()  # ours, or we would not notice when the other end closes
    return _Member(process, here, device)


def _end(members: list[_Member], at_once: bool = True) -> None:
    for member in members:
        member.connection.close()
        if at_once:
            member.process.terminate()
    until = time.monotonic() + _PATIENCE
    for member in members:
        member.process.join(max(until - time.monotonic(), 0))
        if member.process.is_alive():
            member.process.kill()
            member.process.join()
    members.clear()


@contextmanager
def _deaf_and_without_script() -> Iterator[None]:
    """A process that is started inside leaves Ctrl-C to this one, and does not run the user's script again."""
    script = sys.modules["__main__"]
    before = None
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # started inside, Python before 3.12 would let the signal through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, device_name: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit()
    )  # an exception, so that loader workers are ended, too
    be_quiet()
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deserializer = Deserializer(device)
    code = 0
    with silence_third_party_loggers():
        try:
            while True:
                with closing(_answer(deserializer, connection.recv_bytes())) as messages:
                    for message in messages:
                        connection.send_bytes(message)
        except SystemExit:
            code = _TERMINATED
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # the process that started us has closed the line, or is gone
    os._exit(code)  # taking torch apart takes seconds, and nothing is left to be done


def _answer(deserializer: Deserializer, message: bytes) -> Generator[bytes]:
    try:
        numbers, packed, call = pickle.loads(message)
        with _translate_memory_errors(deserializer.device):
            deserializer.keep(numbers, packed)
            work, arguments = deserializer.unpack(call)
            for result in work(deserializer.device, *arguments):
                yield pickle.dumps((_RESULT, result), pickle.HIGHEST_PROTOCOL)
        yield pickle.dumps((_DONE, None))
    except Exception as error:
        text = traceback.format_exc()
        try:
            failure = pickle.dumps((_FAILED, (error, text)))
            pickle.loads(failure)
        except Exception:  # exceptions with constructors of their own do not survive the journey
            failure = pickle.dumps((_FAILED, (RuntimeError(str(error)), text)))
        yield failure


@contextmanager
def _translate_memory_errors(device: torch.device) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise UserError(f"out of memory on {device}; try a smaller --batch_size") from error
        raise
