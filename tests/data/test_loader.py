from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from freqmask.data.loader import (
    OrderedSampler,
    TrainDataset,
    TrainLoader,
    TrainSampler,
    calibration_images,
    make_loader,
    worker_failure,
)
from freqmask.data.source import BlockLayout
from freqmask.data.transforms import Geometry
from freqmask.data.values import ValueRange
from freqmask.errors import BadImage, UserError
from freqmask.rng import combine, sample_key

TWO_VIEWS = (Geometry(8), Geometry((8, 10), scale=(0.5, 1.0)))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def loaded(dataset: TrainDataset, workers: int = 0, batch: int = 4, **settings: Any) -> list[dict[str, Any]]:
    sampler = TrainSampler(len(dataset), 0, batch, **{"total_steps": 6} | settings)
    return list(make_loader(dataset, sampler, batch, workers))


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    tensors = [(first[name], second[name]) for name in ("keys", "labels", "indices")]
    pairs = tensors + list(zip(first["views"], second["views"], strict=True))
    return first["skipped"] == second["skipped"] and all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def dataset(memory_source: Any, photographs: Any) -> TrainDataset:
    images = photographs(9)
    images[4] = "cut off"
    return TrainDataset(memory_source(images, labels=[*range(8), None]), TWO_VIEWS, seed=7)


def test_a_batch_holds_what_the_contract_says(dataset: TrainDataset) -> None:
    batch = loaded(dataset)[0]
    assert [(view.dtype, tuple(view.shape)) for view in batch["views"]] == [
        (torch.uint8, (4, 3, 8, 8)),
        (torch.uint8, (4, 3, 8, 10)),
    ]
    assert [batch[name].dtype for name in ("keys", "labels", "indices")] == [torch.int64] * 3
    assert all(view.is_contiguous() for view in batch["views"])


def test_two_workers_load_the_same_batches_as_none(dataset: TrainDataset) -> None:
    alone, helped = loaded(dataset), loaded(dataset, workers=2)
    assert len(alone) == len(helped) == 6
    assert all(same(first, second) for first, second in zip(alone, helped, strict=True))
    assert any(batch["skipped"] for batch in alone)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="takes the lock before it forks")
def test_workers_are_forked_when_threads_of_a_collective_rest(
    dataset: TrainDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fork = os.fork
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    clock = SimpleNamespace(sleep=lambda seconds: done.append(f"slept {seconds}"))
    monkeypatch.setattr("freqmask.data.loader.time", clock)
    monkeypatch.setattr(os, "fork", lambda: done.append("forked") or fork())
    try:
        loaded(dataset, workers=1)
    finally:
        torch.distributed.destroy_process_group()
    assert done == ["slept 0.05", "forked"]


def test_a_restart_loads_the_rest_of_the_same_batches(dataset: TrainDataset) -> None:
    whole, rest = loaded(dataset), loaded(dataset, workers=2, start_step=4)
    assert [same(first, second) for first, second in zip(whole[4:], rest, strict=True)] == [True, True]


def test_two_processes_together_load_the_batch_of_one(dataset: TrainDataset) -> None:
    alone = loaded(dataset)
    halves = [loaded(dataset, batch=2, rank=rank, world_size=2) for rank in (0, 1)]
    for whole, first, second in zip(alone, *halves, strict=True):
        for number, view in enumerate(whole["views"]):
            assert torch.equal(view, torch.cat([first["views"][number], second["views"][number]]))
        assert torch.equal(whole["keys"], torch.cat([first["keys"], second["keys"]]))


def test_the_key_is_that_of_seed_epoch_and_image(dataset: TrainDataset) -> None:
    sample = dataset[(3, 0, 5)]
    assert sample.key == sample_key(7, 3, dataset.source.identity(5))
    view_key = int(combine(torch.tensor([sample.key]), 1))
    picture = dataset.source.open(5)
    top, left, height, width = TWO_VIEWS[1].box(picture.size, view_key)
    window = torch.from_numpy(picture.decode()[:, top : top + height, left : left + width])
    assert torch.equal(sample.views[1], TWO_VIEWS[1].finish(window, view_key))


def test_views_differ_between_epochs_and_between_each_other(memory_source: Any, photographs: Any) -> None:
    dataset = TrainDataset(memory_source(photographs(1)), (Geometry(8), Geometry(8)))
    first, second = dataset[(0, 0, 0)], dataset[(1, 0, 0)]
    assert not torch.equal(first.views[0], first.views[1])
    assert not torch.equal(first.views[0], second.views[0])


def test_another_image_stands_in_for_a_bad_one_by_its_key(dataset: TrainDataset) -> None:
    sample = dataset[(0, 0, 4)]
    assert sample.skipped[0] == ("image-4", "cut off")
    assert sample.index != 4
    assert sample.key == sample_key(7, 0, dataset.source.identity(4))
    assert sample.label == (-1 if sample.index == 8 else sample.index)
    assert not torch.equal(sample.views[0], dataset[(0, 0, sample.index)].views[0])
    assert len({dataset[(epoch, 0, 4)].index for epoch in range(12)}) > 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_of_bad_images_ends_with_one_sentence(memory_source: Any, workers: int) -> None:
    dataset = TrainDataset(memory_source(["cut off"] * 3), TWO_VIEWS)
    with pytest.raises(UserError) as caught:
        loaded(dataset, workers)
    assert str(caught.value).startswith("3 images in a row cannot be used; the first, image-")
    assert "\n" not in str(caught.value)


def test_whatever_a_decoder_raises_is_a_bad_image(memory_source: Any, photographs: Any) -> None:
    def broken() -> None:
        raise SyntaxError("broken chunk")

    sample = TrainDataset(memory_source([broken, *photographs(3)]), TWO_VIEWS)[(0, 0, 0)]
    assert sample.skipped[0] == ("image-0", "SyntaxError: broken chunk")


def test_a_worker_that_dies_of_an_image_ends_with_one_sentence(memory_source: Any, photographs: Any) -> None:
    images = photographs(40)
    images[30] = die
    loader = make_loader(TrainDataset(memory_source(images), TWO_VIEWS), OrderedSampler(40), 4, workers=1)
    with pytest.raises(UserError, match=r"worker was killed.*--workers") as caught:
        for _ in loader:
            pass
    assert "\n" not in str(caught.value)


def test_other_runtime_errors_are_not_blamed_on_workers() -> None:
    assert worker_failure(RuntimeError("CUDA error")) is None
    assert worker_failure(ValueError("DataLoader worker exited unexpectedly")) is None
    assert "/dev/shm" in str(
        worker_failure(RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error."))
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("with_the_lock", [False, True])
def test_a_worker_killed_from_outside_ends_the_training_where_a_batch_is_fetched(
    with_the_lock: bool, dataset: TrainDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freqmask.data.loader.ASKED_SECONDS", 0.5)
    loader = make_loader(dataset, TrainSampler(9, 0, 4, total_steps=10**6), 4, workers=2)
    batches = iter(loader)
    next(batches)
    pid = torch.multiprocessing.active_children()[0].pid
    assert pid is not None
    if (
        with_the_lock
    ):  # of the event that all workers ask for their end: no worker gives it back that is killed
        loader._iterator._workers_done_event.workers_own._cond.acquire()  # type: ignore[union-attr]
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # nothing is raised here, in the midst of a step
    with pytest.raises(UserError, match="worker was killed") as caught:
        for _ in batches:
            pass
    assert "\n" not in str(caught.value)
    assert torch.multiprocessing.active_children() == []


_LEAVES_IN_THE_MIDST = """
from freqmask.data.loader import TrainDataset, TrainSampler, make_loader
from freqmask.data.sources import open_source
from freqmask.data.source import BlockLayout
from freqmask.data.transforms import Geometry
dataset = TrainDataset(open_source({data!r}), [Geometry(8)])
batches = iter(make_loader(dataset, TrainSampler(8, 0, 2, total_steps=99), 2, workers=1))
print(len(next(batches)["keys"]))
raise SystemExit(3)
"""


def test_python_can_exit_in_the_midst_of_a_training(tmp_path: Path) -> None:
    np.save(
        tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), dtype=np.uint8)
    )
    script = _LEAVES_IN_THE_MIDST.format(data=str(tmp_path / "images.npy"))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "2\n", "")


def test_held_out_images_can_be_gone_through_again_with_the_same_workers(dataset: TrainDataset) -> None:
    loader = make_loader(dataset, OrderedSampler(9), 4, workers=1)
    first = list(loader)
    (worker,) = torch.multiprocessing.active_children()
    again = list(loader)
    assert torch.multiprocessing.active_children() == [worker]
    assert [len(batch["keys"]) for batch in first] == [4, 4, 1]
    assert all(same(one, other) for one, other in zip(first, again, strict=True))
    loader.close()


def test_workers_stop_where_an_iteration_is_left_early(dataset: TrainDataset) -> None:
    loader = make_loader(dataset, TrainSampler(9, 0, 4, total_steps=1000), 4, workers=2)
    next(iter(loader))
    assert torch.multiprocessing.active_children() == []


def test_workers_leave_interrupts_to_the_main_process(dataset: TrainDataset) -> None:
    loader = make_loader(dataset, TrainSampler(9, 0, 4, total_steps=30), 4, workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = torch.multiprocessing.active_children()
    assert worker.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert len(list(batches)) == 29
    assert worker.is_alive()


def test_the_length_is_that_of_the_whole_training(dataset: TrainDataset) -> None:
    loader = make_loader(dataset, TrainSampler(9, 0, 4, start_step=2, total_steps=6), 4)
    assert isinstance(loader, TrainLoader)
    assert len(loader) == 6


@pytest.mark.parametrize("convert", [True, False])
def test_grey_and_color_mix_and_four_bands_only_where_asked(
    memory_source: Any, photographs: Any, convert: bool
) -> None:
    source = memory_source(photographs(2) + photographs(1, channels=1) + photographs(1, channels=4))
    dataset = TrainDataset(source, TWO_VIEWS, channels=3, convert_channels=convert)
    grey = dataset[(0, 0, 2)]
    assert grey.skipped == []
    assert torch.equal(grey.views[0][0], grey.views[0][2])
    skipped = [] if convert else [("image-3", "it has 4 channels, the other images have 3")]
    assert dataset[(0, 0, 3)].skipped == skipped


def test_sixteen_bits_arrive_as_floats_in_the_given_range(memory_source: Any) -> None:
    image = np.linspace(0, 4095, 900).astype(np.uint16).reshape(1, 30, 30)
    geometry = Geometry(30, crop="whole", horizontal_flip=0.0)
    dataset = TrainDataset(memory_source([image]), [geometry], ValueRange(0, 4095), channels=1)
    (view,) = dataset[(0, 0, 0)].views
    assert view.dtype == torch.float32
    np.testing.assert_allclose(view, image / 4095, atol=1e-6)


def test_a_batch_of_bytes_and_floats_is_of_floats(memory_source: Any, photographs: Any) -> None:
    (image,) = photographs(1)
    source = memory_source([image, image.astype(np.float32) / 255])
    geometry = Geometry(24, crop="center", horizontal_flip=0.0)
    loader = make_loader(TrainDataset(source, [geometry]), OrderedSampler(2), 2)
    view: Tensor = next(iter(loader))["views"][0]
    assert view.dtype == torch.float32
    torch.testing.assert_close(view[0], view[1])


def test_a_gap_is_filled_with_the_channels_mean(memory_source: Any) -> None:
    image = np.random.default_rng(0).random((2, 16, 16), dtype=np.float32)
    image[1, 3:5] = np.nan
    geometry = Geometry(16, crop="whole", horizontal_flip=0.0)
    (view,) = TrainDataset(memory_source([image]), [geometry], channels=2)[(0, 0, 0)].views
    np.testing.assert_allclose(view[1, 3:5], np.nanmean(image[1]), rtol=1e-5)


def test_an_empty_window_is_drawn_anew(memory_source: Any) -> None:
    image = np.full((1, 64, 64), np.nan, dtype=np.float32)
    image[:, :32] = np.random.default_rng(0).random((32, 64), dtype=np.float32)
    dataset = TrainDataset(memory_source([image]), [Geometry(8, crop="native")], channels=1)
    samples = [dataset[(epoch, 0, 0)] for epoch in range(60)]
    assert all(sample.views[0].std() > 0 and sample.skipped == [] for sample in samples)
    drawn = [np.isin(sample.views[0], image).sum() > 1 for sample in samples]  # else resampled from the whole
    assert sum(drawn) > 48


def test_an_image_that_is_mostly_missing_or_constant_is_skipped(memory_source: Any, photographs: Any) -> None:
    missing = np.full((3, 20, 24), np.nan, dtype=np.float32)
    missing[:, 0] = 1.0
    constant = np.zeros((3, 20, 24), dtype=np.uint8)
    dataset = TrainDataset(memory_source([missing, constant, *photographs(30)]), TWO_VIEWS)
    assert dataset[(0, 0, 0)].skipped[0] == ("image-0", "95% of its values are missing (NaN or nodata)")
    assert dataset[(0, 0, 1)].skipped[0] == ("image-1", "every pixel has the same value")


def test_a_mistake_in_our_own_code_is_not_taken_for_a_bad_image(memory_source: Any, photographs: Any) -> None:
    class Broken(Geometry):
        def finish(self, window: Tensor, key: int) -> Tensor:
            raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        TrainDataset(memory_source(photographs(2)), [Broken(8)])[(0, 0, 0)]


def test_a_negative_number_of_workers_is_refused(dataset: TrainDataset) -> None:
    with pytest.raises(UserError, match=r"workers \(-1\)"):
        make_loader(dataset, OrderedSampler(9), 4, workers=-1)


def test_a_bad_image_keeps_its_reason_on_the_way_from_a_worker() -> None:
    import pickle

    assert pickle.loads(pickle.dumps(BadImage("cut off"))).reason == "cut off"


def test_workers_that_hang_are_told_and_then_end_with_one_sentence(
    memory_source: Any, photographs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = memory_source(photographs(9))
    source.open = lambda index: time.sleep(600)
    monkeypatch.setattr("freqmask.data.loader.NOTED_SECONDS", 0.1)
    monkeypatch.setattr("freqmask.data.loader.STUCK_SECONDS", 0.4)
    monkeypatch.setattr("freqmask.data.loader.ASKED_SECONDS", 0.1)
    # torch waits for it twice for each worker at the end
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
    with pytest.raises(UserError, match="no loader worker gave a batch for"):
        loaded(TrainDataset(source, TWO_VIEWS), workers=2)
    assert "note: no batch for 0 seconds" in capsys.readouterr().out
    assert torch.multiprocessing.active_children() == []


def test_statistics_of_batch_norm_are_of_every_class_in_every_batch(memory_source, monkeypatch):
    """Folders lie class by class."""
    source, labels = memory_source([np.zeros((1, 1, 1), np.uint8)] * 1200), np.repeat(np.arange(4), 300)
    places = calibration_images(source)
    assert len(set(places)) == 256
    assert np.bincount(labels[places]).tolist() == [64] * 4
    for start in range(0, 256, 64):
        assert np.bincount(labels[places[start : start + 64]], minlength=4).min() >= 8
    for kept in (4, 8):
        far = BlockLayout(np.arange(1200) // 50, kept, whole=True)  # an image costs its block
        monkeypatch.setattr(type(source), "blocks", lambda _, far=far: far)
        read = far.numbers[calibration_images(source)]
        assert np.unique(read).tolist() == [0, 3, 7, 10, 13, 16, 20, 23]
        assert (np.count_nonzero(np.diff(read)) == 7) == (kept < 8), (
            "a block is read once where few can be kept"
        )
