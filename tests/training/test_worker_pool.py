"""Processes that do the same work: what comes back, what is sent, and what happens when one of them dies."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import torch
from tiny_runs import spawned

from freqmask.errors import UserError
from freqmask.training.auto import choose_devices
from freqmask.training.worker_pool import Deserializer, DiedError, Serializer, WorkerPool

CPU = torch.device("cpu")


@dataclass
class Heavy:
    """Something that should be sent once; counts how often it was."""

    name: str
    sent: int = 0

    def __getstate__(self) -> dict[str, Any]:
        self.sent += 1
        return self.__dict__


@dataclass
class Around:
    """Something light around it, made anew for every call."""

    inside: Heavy


def tell(device: torch.device, around: Around, number: int) -> Iterator[tuple[int, str, int]]:
    """Who works, with what, on what."""
    for turn in range(2):
        yield os.getpid(), around.inside.name, 10 * number + turn


def fail(device: torch.device, error: Exception) -> Iterator[None]:
    raise error
    yield


def die(device: torch.device, number: int) -> Iterator[int]:
    """The first process works on; the second is killed, and a worker that it has forked is not."""
    if not number:
        yield 0
        signal.pause()
    worker = os.fork()
    if not worker:
        signal.alarm(60)
        signal.pause()
    yield worker
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def two() -> Iterator[WorkerPool]:
    with contextlib.closing(WorkerPool([CPU, CPU])) as replicas:
        yield replicas


def test_two_processes_answer_and_live_on_and_heavy_things_are_sent_to_each_once(two: WorkerPool) -> None:
    heavy, found = Heavy("weights"), []
    for _ in range(2):
        arguments = [(Around(heavy), number) for number in range(2)]
        found.append(sorted(two.run(tell, arguments, [heavy]), key=lambda one: one[2]))
    assert [number for *_, number in found[0]] == [0, 1, 10, 11]
    assert len({process for process, *_ in found[0] + found[1]} - {os.getpid()}) == 2
    assert {name for _, name, _ in found[0] + found[1]} == {"weights"}
    assert heavy.sent == 1  # packed once, for both
    other = Heavy("others")
    assert {one[1] for one in two.run(tell, [(Around(other), 0), (Around(other), 1)], [other])} == {"others"}


def test_work_for_one_is_done_here(two: WorkerPool) -> None:
    assert {process for process, *_ in two.run(tell, [(Around(Heavy("")), 0)])} == {os.getpid()}


def test_nobody_waits_for_work_that_nobody_wants_any_more(two: WorkerPool) -> None:
    answers = two.run(die, [(0,), (0,)])
    assert next(answers) == 0
    two.close()
    assert spawned(psutil.Process()) == []
    answers.close()  # type: ignore[attr-defined]


def test_errors_arrive_as_they_were_and_the_processes_end(two: WorkerPool) -> None:
    with pytest.raises(KeyError, match="lost") as caught:
        list(two.run(fail, [(KeyError("lost"),)] * 2))
    assert "in process" in str(caught.value.__cause__) and "in fail" in str(caught.value.__cause__)
    assert spawned(psutil.Process()) == []
    with pytest.raises(UserError, match=r"^out of memory on cpu; try a smaller --batch_size$"):
        list(two.run(fail, [(torch.OutOfMemoryError("CUDA"),)]))


def test_a_dead_process_is_a_sentence_and_takes_the_others_along(two: WorkerPool) -> None:
    said = []
    with pytest.raises(DiedError, match=r"^process 2 of 2 \(cpu\) was killed by signal 9, most often"):
        said.extend(two.run(die, [(0,), (1,)]))
    assert spawned(psutil.Process()) == []
    worker = psutil.Process(max(said))
    assert worker.status() != psutil.STATUS_ZOMBIE  # it holds the line open, and nobody waited for it
    worker.kill()


def born(device: torch.device) -> list[tuple[int, bool]]:
    """Threads, and whether Ctrl-C was kept away from the first moment on."""
    return [(torch.get_num_threads(), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))]


def test_each_process_has_the_threads_of_this_one_and_leaves_ctrl_c_to_it() -> None:
    """With fewer threads, convolutions of small batches end in other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with contextlib.closing(
            WorkerPool([CPU, CPU])
        ) as pool:  # processes take the number when they are born
            assert list(pool.run(born, [(), ()])) == [(3, True), (3, True)]
    finally:
        torch.set_num_threads(before)
    assert born(CPU) == [(before, False)]


def test_what_a_script_defines_is_named_and_so_is_what_cannot_be_sent(
    two: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own:
        pass

    with pytest.raises(UserError, match=r"cannot be sent to other processes .*; try --devices 1"):
        list(two.run(tell, [(Own(), 0), (Own(), 1)]))
    Own.__module__, Own.__qualname__ = "__main__", "Own"
    monkeypatch.setattr(sys.modules["__main__"], "Own", Own, raising=False)
    with pytest.raises(UserError, match="define it in a module of its own rather than in the script"):
        list(two.run(tell, [(Own(), 0), (Own(), 1)]))


def test_tied_parameters_and_buffers_arrive_as_they_were() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    model[2].weight = model[0].weight
    serializer, deserializer = Serializer(), Deserializer(CPU)
    numbers = serializer.keep([model])
    deserializer.keep(numbers, {number: serializer.pack_lasting(number) for number in numbers})
    one, other = deserializer.unpack(serializer.pack([model, model[2]]))
    assert one is not model and one[2].weight is one[0].weight
    assert isinstance(other.weight, torch.nn.Parameter)
    assert all(torch.equal(tensor, one.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert serializer.keep([model]) == numbers and serializer.keep([model[0]]) != numbers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_lay_on_the_gpu_arrives_on_that_of_the_receiver() -> None:
    model = torch.nn.Linear(2, 2).cuda()
    there = Deserializer(torch.device("cuda", 0)).unpack(
        Serializer().pack([model, torch.ones(2, device="cuda"), torch.ones(2)])
    )
    assert [there[0].weight.device.type, there[1].device.type, there[2].device.type] == [
        "cuda",
        "cuda",
        "cpu",
    ]
    here = Deserializer(CPU).unpack(Serializer().pack(model))
    assert here.weight.device.type == "cpu" and isinstance(here.weight, torch.nn.Parameter)


def test_devices_are_all_gpus_or_as_many_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu = torch.device("cuda")
    assert choose_devices("auto", gpu, "auto") == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert choose_devices(1, gpu, "auto") == [gpu] and choose_devices("auto", CPU, "auto") == [CPU]
    assert choose_devices(2, CPU, "cpu") == [CPU, CPU]


@pytest.mark.parametrize(
    ("devices", "first", "accelerator", "sentence"),
    [
        (3, "cuda", "auto", r"devices \(3\) must be at most 2, as many as cuda has here; try auto"),
        (2, "mps", "auto", r"devices \(2\) must be at most 1, as many as mps has here; try auto"),
        (2, "cpu", "auto", r"devices \(2\) must be 1 or auto where no GPU is; --accelerator cpu starts 2"),
        (10_000, "cpu", "cpu", r"devices \(10000\) must be at most \d+ on this CPU"),
        (0, "cpu", "cpu", r"devices \(0\) must be a whole number"),
        ("two", "cpu", "cpu", r"devices \(two\) must be a whole number"),
        (True, "cpu", "cpu", r"devices \(True\) must be a whole number"),
    ],
)
def test_devices_that_are_not_there_are_a_sentence(
    devices: Any, first: str, accelerator: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=f"^{sentence}"):
        choose_devices(devices, torch.device(first), accelerator)
