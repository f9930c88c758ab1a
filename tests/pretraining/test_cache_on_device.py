"""Where images come from: chosen with a reason, said, kept to over a restart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TINY

import freqmask
from freqmask.data.in_memory import InMemoryBatches
from freqmask.data.values import Survey, ValueRange
from freqmask.errors import UserError
from freqmask.pretraining import cache_on_device
from freqmask.pretraining.cache_on_device import choose_place, largest_side
from freqmask.training.callbacks import Monitor
from freqmask.training.run_folder import RunFolder

OFTEN = {"checkpoint_every_steps": 2, "quarter_turns": True}
OPTIONS = {
    "images_from": "auto",
    "channels": 3,
    "steps": 1_000,
    "batch_size": 100,
    "image_size": 32,
    "devices": 1,
    "accelerator": "cpu",
}


def survey_of(size: int = 32, dtypes: tuple[str, ...] = ("uint8",), gaps: int = 0) -> Survey:
    sizes = dict.fromkeys(("median_size", "min_size", "max_size"), (size, size))
    return Survey(
        count=10,
        shorter_side=size,
        channel_counts={3: 10},
        dtypes=dict.fromkeys(dtypes, 10),
        channels=3,
        value_range=ValueRange(),
        mean=[0.5] * 3,
        std=[0.2] * 3,
        mean_pixels=float(size * size),
        with_gaps=gaps,
        **sizes,
    )


def test_small_images_that_are_seen_often_stay_on_the_device() -> None:
    assert choose_place(OPTIONS, survey_of(), 50_000).value == "device"
    assert choose_place(OPTIONS, survey_of(), 50_000).reason == "153.6 MB of small images, each seen 2 times"


@pytest.mark.parametrize(
    ("survey", "images", "reason"),
    [
        (survey_of(500), 5_000, "the largest has 500 pixels a side, and up to 127 are kept in memory"),
        (survey_of(), 80_000, "each is seen 1.2 times"),
        (survey_of(dtypes=("uint8", "uint16")), 5_000, "they hold uint16 and uint8"),
        (survey_of(gaps=3), 5_000, "3 of 10 looked at have missing values"),
        (survey_of(), 10**9, r"they take 3\.1 TB, and a quarter of the free memory is"),
    ],
)
def test_the_loader_is_chosen_with_its_reason(
    survey: Survey, images: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_on_device, "memory_limit", lambda options: 10**10)
    choice = choose_place(OPTIONS, survey, images)
    assert choice.value == "loader"
    assert re.match(reason, choice.reason)


def test_by_hand_larger_images_stay_but_not_more_than_memory_holds() -> None:
    options = {**OPTIONS, "images_from": "device"}
    assert choose_place(options, survey_of(500), 500).value == "device"
    with pytest.raises(
        UserError, match=r"images_from \(device\) cannot be: they take .*; try --images_from auto"
    ):
        choose_place(options, survey_of(), 10**9)


def test_images_that_the_loader_would_decode_reduced_are_left_to_it() -> None:
    assert largest_side({**OPTIONS, "accelerator": "cuda"}) == 127
    assert largest_side({**OPTIONS, "accelerator": "cuda", "image_size": (64, 96)}) == 160


def pretrain(out: Path, data: str = "builtin:digits", **options: Any) -> Path:
    return freqmask.pretrain(data, **{**TINY, **options}, out=str(out))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "backbone" / "model.safetensors")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose images stayed on the device."""
    return pretrain(tmp_path_factory.mktemp("runs") / "kept", **OFTEN, images_from="device")


def assert_identical(one: Path, other: Path) -> None:
    assert weights(one).keys() == weights(other).keys()
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name]), name


def test_a_run_of_images_on_the_device_that_was_stopped_ends_with_the_same_bits(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut: list[int] = []
    whole_batch, whole_end = InMemoryBatches._batch, Monitor.on_train_batch_end

    def counted(self: Any, *drawn: Any) -> Any:
        cut.append(1)
        return whole_batch(self, *drawn)

    def broken(self: Any, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("killed here")
        whole_end(self, trainer, *rest)

    monkeypatch.setattr(InMemoryBatches, "_batch", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "on_train_batch_end", broken)
        with pytest.raises(RuntimeError, match="killed here"):
            pretrain(tmp_path / "parts", **OFTEN, images_from="device")
    shown = capsys.readouterr().out
    assert "loading     once: images stay on the cpu (1.8 MB, as asked)" in shown
    assert "read        1,761 images in " in shown
    assert_identical(kept, pretrain(tmp_path / "parts", **OFTEN, images_from="device"))
    assert len(cut) == 3 + 4  # the checkpoint is that of step 2


def test_both_paths_learn_the_same(kept: Path, tmp_path: Path) -> None:
    loaded = weights(pretrain(tmp_path / "loaded", **OFTEN, images_from="loader"))
    for name, value in weights(kept).items():
        torch.testing.assert_close(value, loaded[name], atol=2e-3, rtol=0)


def test_auto_keeps_small_images_of_a_long_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(tmp_path / "long", steps=1000, dry_run=True)
    assert "images stay on the cpu (1.8 MB of small images, each seen 5 times)" in capsys.readouterr().out
    pretrain(tmp_path / "short", dry_run=True)
    assert "images are read anew at every step (each is seen 0.0 times" in capsys.readouterr().out


@pytest.fixture
def hidden_gap(tmp_path: Path) -> str:
    """Float images of which one has a gap where the survey does not look."""
    images = np.random.default_rng(0).random((60, 40, 40)).astype(np.float32)
    seen = np.linspace(0, 39, 32).astype(int)
    images[7, next(row for row in range(40) if row not in seen), 3] = np.nan
    np.save(tmp_path / "images.npy", images)
    return str(tmp_path / "images.npy")


def test_an_image_that_turns_out_unfit_sends_all_to_the_loader(
    hidden_gap: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain(tmp_path / "run", hidden_gap, steps=15)
    shown = capsys.readouterr().out
    assert "images stay on the cpu" in shown
    assert "note: images come from the loader after all: 7 has missing values" in shown
    assert RunFolder(run).config()["images_from"] == "loader"


def test_by_hand_an_unfit_image_is_an_error_that_leaves_nothing(hidden_gap: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"7 has missing values.*; try --images_from loader"):
        pretrain(tmp_path / "runs" / "run", hidden_gap, images_from="device")
    assert not (tmp_path / "runs").exists()


def test_a_run_from_before_the_option_goes_on_with_the_loader() -> None:
    geometry: Any = None
    assert cache_on_device.keep_images({"images_from": None}, None, geometry, False, False) is None  # type: ignore[arg-type]
