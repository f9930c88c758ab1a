"""What `auto` stands for."""

import os
import timeit
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freqmask.console import readable_time
from freqmask.training import auto
from freqmask.training.auto import Cost
from freqmask.training.loop import keep_threads


@pytest.mark.parametrize(("median", "size"), [(20, 32), (33, 32), (128, 128), (375, 224), (3000, 224)])
def test_image_size_is_what_the_median_image_fills(median: int, size: int) -> None:
    assert auto.choose_image_size(median).value == size


@pytest.mark.parametrize(("size", "patch"), [(32, 4), (64, 8), (96, 8), (128, 16), (16, 2)])
def test_small_images_get_small_patches(size: int, patch: int) -> None:
    choice = auto.choose_patch_size(size, "vit_tiny_patch16_224")
    assert choice is not None
    assert choice.value == patch
    assert auto.choose_patch_size(224, "vit_tiny_patch16_224") is None
    assert auto.choose_patch_size(32, "resnet18") is None


def test_batch_size_is_bounded_by_memory_and_by_the_images() -> None:
    cost = Cost(0.01, bytes_per_image=1_000_000, fixed_bytes=0)
    assert auto.choose_batch_size(cost, 10**6, "cpu", 1, 10**10).value == 256
    assert auto.choose_batch_size(cost, 10**6, "cuda", 1, 10**10).value == 1024
    assert auto.choose_batch_size(cost, 10**6, "cpu", 1, 20_000_000).value == 16
    assert auto.choose_batch_size(cost, 300, "cpu", 1, 10**10).value == 32


def test_a_batch_is_smaller_where_the_time_would_hold_too_few_steps() -> None:
    cost = Cost(0.01, bytes_per_image=1_000_000, fixed_bytes=5_000_000)
    long = 5_000 * 256 * 0.01  # seconds of 5,000 steps of 256 images
    assert auto.choose_batch_size(cost, 10**4, "cpu", 1, 10**10, long).value == 256
    assert auto.choose_batch_size(cost, 10**4, "cpu", 1, 10**10, long / 2).value == 128
    few = auto.choose_batch_size(cost, 10**4, "cpu", 1, 10**10, long / 100)
    assert few.value == 64
    assert "the time" in few.reason
    assert auto.choose_batch_size(cost, 300, "cpu", 1, 10**10, 1.0).value == 32  # small already
    assert (
        auto.choose_batch_size(cost, 10**4, "cpu", 2, 10**10, long / 4).value == 128
    )  # two devices share it


@pytest.mark.parametrize("devices", [1, 2, 3, 5, 6, 8, 12])
def test_a_chosen_batch_gives_every_device_the_same_pairs(devices: int) -> None:
    cost = Cost(0.01, bytes_per_image=1_000_000, fixed_bytes=5_000_000)
    batch = auto.choose_batch_size(cost, 10**4, "cpu", devices, 10**10).value
    assert batch % (2 * devices) == 0
    assert 256 - 2 * devices < batch <= 1024


def test_accumulation_is_the_least_that_fits() -> None:
    cost = Cost(0.01, bytes_per_image=1_000_000, fixed_bytes=5_000_000)
    assert auto.choose_accumulation(cost, 64, 10**9).value == 1
    assert auto.choose_accumulation(cost, 64, 25_000_000).value == 4
    assert auto.choose_accumulation(cost, 64, 1).value == 64


def test_epochs_are_the_published_ones_or_more_for_few_images() -> None:
    assert auto.choose_epochs(1_281_167, 1024).value == 300
    assert auto.choose_epochs(4_000, 128).value == 320
    assert auto.choose_epochs(10, 8).value == 1600


def test_cost_counts_what_the_backward_pass_keeps() -> None:
    layer = nn.Linear(1000, 1000, bias=False)

    def loss(images: int) -> Tensor:
        return layer(torch.rand(images, 1000)).tanh().sum()

    cost = auto.measure_cost(layer, loss, torch.device("cpu"))
    assert cost.bytes_per_image == 2 * 4 * 1000  # the input for the weight, the output for tanh
    assert cost.fixed_bytes == 16 * 10**6
    assert cost.seconds_per_image > 0
    assert layer.weight.grad is None


def test_a_measurement_that_something_else_disturbs_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2, 2)
    taken = iter([9.0, 0.4, 0.08, 0.2])
    monkeypatch.setattr(auto, "_timed", lambda loss, images, device: next(taken))
    loss = lambda images: layer(torch.rand(images, 2)).sum()  # noqa: E731
    slow = auto.measure_cost(layer, loss, torch.device("cpu"), most=4)
    assert slow.seconds_per_image == pytest.approx(0.4 / 4)  # two slow ones are enough
    taken = iter([0.4, 0.3, 0.08, 0.3, 9.0])
    quick = auto.measure_cost(layer, loss, torch.device("cpu"), most=4)
    assert quick.seconds_per_image == pytest.approx(0.08 / 4)


def test_an_image_costs_what_it_does_among_many_not_what_a_pass_does_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, seen = nn.Linear(2, 2), []

    a_pass = 0.03

    def timed(loss: Any, images: int, device: Any) -> float:
        seen.append(images)
        return a_pass + 0.001 * images  # so 4 are 8.5 ms an image, and many 1 ms

    def measured(most: int) -> float:
        seen.clear()
        loss = lambda images: layer(torch.rand(images, 2)).sum()  # noqa: E731
        return auto.measure_cost(layer, loss, torch.device("cpu"), most=most).seconds_per_image

    monkeypatch.setattr(auto, "_timed", timed)
    assert measured(256) == pytest.approx(0.094 / 64)  # enough for a CPU
    monkeypatch.setitem(auto.MOST_AT_ONCE, "cpu", 256)
    assert measured(256) == pytest.approx(0.286 / 256)
    assert list(dict.fromkeys(seen)) == [4, 16, 64, 256]
    assert measured(8) == pytest.approx(0.038 / 8)  # the batch that was asked for
    assert measured(1) == pytest.approx(0.034 / 4)
    monkeypatch.setattr(auto, "usable_memory", lambda device: 16 * 6 + 2 * 64 * 8)  # of 64 images, not of 256
    assert measured(256) == pytest.approx(0.094 / 64)
    a_pass = 0.0  # more at once make an image no cheaper
    assert measured(256) == pytest.approx(0.001)
    assert max(seen) == 16
    a_pass = 0.25  # long enough as it is
    assert measured(256) == pytest.approx(0.254 / 4)


@pytest.mark.parametrize(
    ("seconds", "numbers", "at_first", "left", "told"),
    [
        # each waits for the next
        (lambda threads: threads, {}, 6, 1, "1, since with 3 an image takes longer now"),
        (lambda threads: 1 / threads, {}, 4, 4, ""),
        (lambda threads: 1 + abs(threads - 2), {}, 4, 2, "2, since with 4 an image takes longer now"),
        (lambda threads: threads, {"devices": 2}, 4, 4, ""),  # processes with cores of their own
    ],
)
def test_threads_that_only_wait_for_each_other_are_left_out(
    seconds: Any,
    numbers: dict[str, int],
    at_first: int,
    left: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auto, "_timed", lambda *_: seconds(torch.get_num_threads()))
    values = {"accelerator": "cpu", "precision": "32-true", "devices": 1, "num_nodes": 1, **numbers}
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for asked in (None, "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        with keep_threads(), monkeypatch.context() as environment:
            if asked:
                environment.setenv(asked, str(at_first))
            torch.set_num_threads(at_first)
            plan, layer = auto.Plan({}, dict(values)), nn.Linear(2, 2)
            trial, _ = plan.take_cost(layer, (2,), lambda module, images: module(images).sum(), 8)
            expected = at_first if asked else left  # what somebody chose is not chosen again
            assert torch.get_num_threads() == expected
        assert plan.cost.seconds_per_image == seconds(expected) / plan.cost.images
        assert plan.reasons.get("threads", "").startswith("" if asked else told)
        assert ("threads" in plan.reasons) == (expected < at_first)
        assert all(weight.grad is None for weight in trial.parameters())
    assert torch.get_num_threads() == before


def test_what_a_training_makes_of_the_threads_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning writes the variable into the environment where several processes train."""
    before = torch.get_num_threads()
    for asked in (None, "5"):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if asked:
            monkeypatch.setenv("OMP_NUM_THREADS", asked)
        with pytest.raises(KeyError), keep_threads():
            torch.set_num_threads(before + 1)
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            raise KeyError
        assert (torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")) == (before, asked)


@pytest.mark.parametrize(
    ("asked", "batch", "most"),
    [
        ({}, 8, 8),
        ({}, 256, 64),
        ({"accumulate": 16}, 256, 16),
        ({"batch_size": 32}, 256, 32),
        ({"batch_size": 2}, 8, 4),
    ],
)
def test_no_more_images_are_measured_than_a_pass_of_the_training_has(
    asked: dict[str, Any], batch: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "_timed", lambda loss, images, device: 0.03 + 0.001 * images)
    plan = auto.Plan(asked, {"accelerator": "cpu", "precision": "32-true", "devices": 1, "num_nodes": 1})
    plan.take_cost(nn.Linear(2, 2), (2,), lambda layer, samples: layer(samples).sum(), batch)
    assert plan.cost.images == most
    assert plan.cost.seconds_per_image == pytest.approx((0.03 + 0.001 * most) / most)


def test_an_allocation_that_fails_ends_the_measuring_at_the_size_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loss(images: int) -> Tensor:
        if images > 16:
            raise torch.OutOfMemoryError("no room")
        return layer(torch.rand(images, 2)).sum()

    layer = nn.Linear(2, 2)
    monkeypatch.setattr(auto, "CHEAPER", 99.0)
    assert auto.measure_cost(layer, loss, torch.device("cpu")).images == 16


def test_fast_bf16_is_detected_not_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    for gain, value in ((0.55, "32-true"), (1.2, "32-true"), (1.3, "bf16-mixed"), (9.0, "bf16-mixed")):
        monkeypatch.setattr(auto, "bf16_gain", lambda gain=gain: gain)
        assert auto.choose_precision("cpu").value == value
    assert "9 times as fast" in auto.choose_precision("cpu").reason


@pytest.mark.parametrize(("devices", "cores", "workers"), [(1, 64, 32), (1, 8, 8), (8, 64, 8), (4, 2, 1)])
def test_loader_workers_share_the_cores_among_the_devices(
    devices: int, cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "usable_cores", lambda: cores)
    monkeypatch.setattr(auto, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    plan = auto.Plan({"precision": "32-true", "accelerator": "gpu"})
    plan.take_machine()
    assert (plan.values["devices"], plan.values["workers"]) == (devices, workers)


def test_a_precision_that_is_given_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "bf16_gain", lambda: pytest.fail("measured"))
    plan = auto.Plan({"precision": "bf16-mixed", "accelerator": "cpu"})
    plan.take_machine()
    assert plan.values["precision"] == "bf16-mixed" and "precision" not in plan.reasons


def test_what_bf16_gains_is_measured_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(auto.timeit, "repeat", lambda *_, **__: seen.append(torch.get_num_threads()) or [3.0])
    torch.set_num_threads(2)
    try:
        assert auto.bf16_gain.__wrapped__() == 1.0
        assert seen == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_bf16_gains_is_what_a_product_of_matrices_gains() -> None:
    a = torch.rand(256, 256)
    exact, half = (
        min(timeit.repeat("a @ a", number=1, repeat=9, globals={"a": a.to(kind)}))
        for kind in (torch.float32, torch.bfloat16)
    )
    assert auto.bf16_gain() == pytest.approx(exact / half, rel=0.6)


@pytest.mark.parametrize(
    ("limit", "taken", "stat", "prefix"),
    [
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ],
)
def test_free_memory_is_what_a_container_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, taken: str, stat: str, prefix: str
) -> None:
    monkeypatch.setattr(auto, "CGROUP", tmp_path)
    monkeypatch.setattr(auto.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * 10**9))
    (tmp_path / "memory").mkdir()
    cpu = torch.device("cpu")
    assert auto.free_memory(cpu) == 64 * 10**9
    (tmp_path / stat).write_text(
        f"anon 7000000000\nactive_file 1\n{prefix}active_file 100000000\n{prefix}inactive_file 300000000\n"
    )
    for most, now, left in (("8000000000", 7_500_000_000, 900_000_000), ("7000000000", 7_500_000_000, 0)):
        (tmp_path / limit).write_text(f"{most}\n")
        (tmp_path / taken).write_text(f"{now}\n")
        assert auto.free_memory(cpu) == left
    (tmp_path / limit).write_text("max\n")
    assert auto.free_memory(cpu) == 64 * 10**9


@pytest.mark.parametrize(("seconds", "words"), [(20, "20 seconds"), (90, "1.5 minutes"), (7200, "2.0 hours")])
def test_durations_read_as_a_person_says_them(seconds: float, words: str) -> None:
    assert readable_time(seconds) == words
