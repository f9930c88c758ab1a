"""What a run advises before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import freqmask
from freqmask.pretraining.plan import advice_lines, length_lines, next_lines, summary_lines
from freqmask.pretraining.resolve import CHECKPOINTS_A_RUN, PREVIEWS_A_RUN, Resolved, _preview_every
from freqmask.pretraining.task import PROBES_A_RUN, Images
from freqmask.training import auto
from freqmask.training.auto import Cost, Plan
from freqmask.training.run_folder import RunFolder

ENOUGH: dict[str, Any] = {"init": None, "overfit": None, "steps": 10_000, "channels": 3, "method": "mfm"}


def advised(images: int = 100_000, data: str = "photos", **options: Any) -> str:
    return " ".join(advice_lines({**ENOUGH, **options}, images, data))


def told_of_length(takes: float, **given: Any) -> str:
    options = {"steps": 100, "batch_size": 8, "devices": 1, "num_nodes": 1}
    cost = Cost(takes * 3600 / 800, 1, 1)
    resolved = Resolved({}, options, {"epochs": "the published 300 epochs"})
    resolved.cost, resolved.watched = cost, lambda _: 0
    return " ".join(length_lines(resolved, {"data": ["my photos"], **given}))


def test_who_named_no_length_is_told_what_an_hour_takes() -> None:
    assert told_of_length(12.5, method="folk") == (
        "length      you named none, so it is the published 300 epochs, about 12.5 hours here; an hour of it: "
        "freqmask pretrain 'my photos' --method folk --hours 1"
    )


@pytest.mark.parametrize("given", [{"epochs": 3.0}, {"steps": 9}, {"hours": 12.0}, {"overfit": 8}])
def test_who_named_a_length_is_told_nothing_of_it(given: dict[str, Any]) -> None:
    assert told_of_length(12.5, **given) == ""


def test_a_training_below_an_hour_needs_no_word_on_its_length() -> None:
    assert told_of_length(0.9) == ""


@pytest.mark.parametrize(
    ("seconds", "options", "network"),
    [
        ([0.019], {"hours": 1.0}, "width 192 of 4 blocks"),  # 189,474 images
        ([0.019, 0.019], {"hours": 1.0}, "width 96 of 4 blocks"),
        ([0.019], {"hours": 1.0, "method": "mfm"}, "width 192 of 4 blocks"),
        ([0.018], {"hours": 1.0}, "width 192 of 12 blocks"),  # 200,000
        ([0.019], {"steps": 9}, "width 192 of 12 blocks"),
        ([0.019], {"hours": 1.0, "overfit": 8}, "width 192 of 12 blocks"),
        ([0.019], {"hours": 1.0, "model_args": {"depth": 1}}, "width 192 of 1 blocks"),
        ([0.019], {"hours": 1.0, "backbone": "resnet10t"}, "width 512,"),
    ],
)
def test_hours_that_hold_few_images_get_a_smaller_vit(
    seconds: list[float],
    options: dict[str, Any],
    network: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    costs = iter([*seconds, 0.001])  # of one network after the other
    monkeypatch.setattr(auto, "measure_cost", lambda *_: Cost(next(costs), 1, 1))
    fixed = {"accelerator": "cpu", "dry_run": True, "image_size": 32, "workers": 0}
    freqmask.pretrain("builtin:photos", out=str(tmp_path / "run"), **fixed, **options)
    shown = capsys.readouterr().out
    assert network in shown
    told = "(made smaller: in 1 hour the whole one would see 189,474 images, and with fewer than 200,000 a smaller"
    assert (told in shown) == ("of 4 blocks" in network)


@pytest.mark.parametrize(
    ("options", "backbone"),
    [({}, "resnet10t"), ({"patch_size": 8}, "vit_tiny_patch16_224"), ({"backbone": "resnet18"}, "resnet18")],
)
def test_a_teacher_is_given_a_small_cnn_on_a_cpu(
    options: dict[str, Any], backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = {
        "accelerator": "cpu",
        "dry_run": True,
        "image_size": 32,
        "workers": 0,
        "teacher": "random:resnet10t",
    }
    freqmask.pretrain("builtin:photos", out=str(tmp_path / "run"), **fixed, **options)
    assert f"backbone    {backbone}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "mfm"}, "filter fixed, radius 4, low_pass_share 0.3"),
        (
            {"method": "mfm", "radius": 4, "softness": 2, "gamma": 1.5, "clamp": True},
            "filter fixed, radius 4, low_pass_share 0.3, softness 2, gamma 1.5",
        ),
        (
            {"method": "mfm", "filter": "com", "com_share": 0.7, "magnitude": "mean", "patch_size": None},
            "filter com, com_fractions 0.005 0.01 0.05, com_share 0.7, magnitude mean",
        ),
        ({"word_grid": 3, "words": 256}, "filter lowpass, radius 14, word_grid 3"),
    ],
)
def test_options_of_a_method_that_are_not_its_defaults_are_told(
    options: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = {"accelerator": "cpu", "dry_run": True, "image_size": 56, "workers": 0, "backbone": "resnet10t"}
    freqmask.pretrain("builtin:photos", out=str(tmp_path / "run"), **fixed, **options)
    assert f"options     {told}\n" in capsys.readouterr().out


@pytest.mark.parametrize("broken", [0, 1, 5])
def test_images_that_cannot_be_used_are_said_to_be_counted(
    broken: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        Image.linear_gradient("L").rotate(30 * number).save(tmp_path / f"{number}.png")
    for number in range(broken):
        (tmp_path / f"{number}.png").write_bytes(b"")
    fixed = {"accelerator": "cpu", "dry_run": True, "image_size": 32, "workers": 0, "backbone": "resnet10t"}
    freqmask.pretrain(str(tmp_path), out=str(tmp_path / "run"), **fixed)
    shown = capsys.readouterr().out
    assert "images      12 found" in shown
    assert shown.count("cannot be used: ") == min(broken, 3)
    assert shown.count("training passes over such images, which are counted above") == bool(broken)


def test_printed_commands_have_paths_that_are_no_options_and_no_more_of_them_than_one_reads() -> None:
    lines = list(next_lines(Path("-run"), {"data": ["-dash"], "method": "mfm"}, {}, labelled=False))
    assert "freqmask embed ./-run ./-dash --neighbours" in lines[0]
    assert "freqmask pretrain ./-dash --method mfm --init ./-run --out ./-run-continued" in lines[1]
    many = {"data": [f"{number}.png" for number in range(300)], "method": "mfm"}
    assert "freqmask embed run DATA --neighbours" in next(
        iter(next_lines(Path("run"), many, {}, labelled=False))
    )
    assert "an hour of it: freqmask pretrain DATA --hours 1" in told_of_length(12.5, data=many["data"])


def test_enough_steps_and_images_need_no_advice() -> None:
    assert advised() == ""


def test_few_steps_are_told_before_they_are_spent() -> None:
    assert "32 steps are few: little shows before 5,000" in advised(steps=32)
    assert "32 steps are few: little shows before 500" in advised(steps=32, method="words")
    assert advised(steps=800, method="words") == ""


def test_few_images_are_sent_to_a_public_teacher_of_a_cnn() -> None:
    teacher = "freqmask pretrain photos --teacher timm:tf_efficientnet_lite0"
    assert f"{teacher} --backbone resnet10t    (and" in advised(images=4_000)
    assert f"{teacher} --backbone resnet10t " in advised(images=4_000, backbone="vit_tiny_patch16_224")
    assert f"{teacher} --backbone resnet18 " in advised(images=4_000, backbone="resnet18")
    assert f"{teacher} --backbone resnet10t --channels 3 " in advised(images=4_000, channels=1)
    assert "1 image is few" in advised(images=1)
    assert advised(images=4_000, teacher="timm:resnet18") == ""


def test_images_of_other_channels_are_sent_to_public_weights_that_are_adapted() -> None:
    text = advised(images=4_000, channels=12)
    assert "they know three channels and are adapted" in text
    assert "freqmask pretrain photos --method mfm --init timm:vit_small_patch16_224" in text
    assert "--init timm:resnet18 " in advised(images=4_000, channels=12, backbone="resnet18")


@pytest.mark.parametrize("options", [{"init": "timm:resnet18"}, {"overfit": 8}, {"data": "builtin:digits"}])
def test_who_has_chosen_is_not_advised(options: dict[str, Any]) -> None:
    assert advised(**{"images": 8, "steps": 8, **options}) == ""


def test_whether_it_was_worth_it_is_asked_where_there_are_labels() -> None:
    options = {"data": ["my photos"], "method": "words", "init": "timm:resnet18"}
    labelled = "\n".join(next_lines(Path("runs/1"), options, {}, True))
    models = "pixels random:runs/1 timm:resnet18 runs/1"
    assert labelled.startswith(
        f"next        freqmask evaluate knn {models} --data 'my photos'    (was it worth it?)\n   "
    )
    plain = "\n".join(next_lines(Path("runs/1"), options, {}, False))
    assert plain.startswith("next        freqmask embed runs/1 'my photos' --neighbours")
    assert "evaluate" not in plain


def measured(every: int | str, step: float, looked: Any) -> Resolved:
    """A training of batches of one image that cost ``step`` seconds; of so many steps it looks at ``looked`` images."""
    resolved = Resolved({"preview_every_steps": every}, {"batch_size": 1, "devices": 1, "num_nodes": 1})
    resolved.cost, resolved.watched = Cost(step, 1, 1), lambda options: looked(options["steps"])
    return resolved


def test_what_is_measured_and_drawn_between_the_steps_takes_time() -> None:
    assert measured(20, 0.06, lambda _: 400).watching_seconds(100) == pytest.approx(400 * 0.06 + 5 * 0.6)
    for every in (0, 100, 1000):  # one at the end
        assert measured(every, 0.06, lambda _: 0).watching_seconds(100) == 0.6


@pytest.mark.parametrize(
    ("every", "looked"),
    [
        ("auto", lambda _: 500),
        (7, lambda _: 0),
        (50, lambda steps: 3 * steps // 50),
        ("auto", lambda steps: steps // 4),
    ],
)
def test_hours_hold_the_most_steps_that_leave_time_to_measure(every: int | str, looked: Any) -> None:
    resolved = measured(every, 0.1, looked)
    steps = resolved.steps_within(250)
    most = max(steps for steps in range(1, 3000) if 0.1 * steps + resolved.watching_seconds(steps) <= 250)
    assert 0.1 * steps + resolved.watching_seconds(steps) <= 250
    assert most - 6 <= steps <= most < 2500, (
        "a preview takes as long as six: ten or eleven of them, as it divides"
    )


@pytest.mark.parametrize("steps", [1, 4, 9, 14, 19, 99, 100, 1999])
def test_auto_measures_draws_and_saves_no_more_often_than_it_says(steps: int) -> None:
    asked = {"checkpoint_every_minutes": 30, "keep_checkpoints": 3, "max_skipped_share": 0.1}
    plan = Plan(asked, {"steps": steps, "batch_size": 1, "devices": 1, "num_nodes": 1})
    plan.cost = Cost(1.0, 1, 1)
    plan.take_records(CHECKPOINTS_A_RUN)
    few: Any = None  # images, which do not count
    every = {
        PROBES_A_RUN: Images(few, few, few).probe_every({"steps": steps}),
        PREVIEWS_A_RUN: _preview_every(steps),
        CHECKPOINTS_A_RUN: plan.values["checkpoint_every_steps"],
    }
    times = {most: len({*range(between, steps, between), steps}) for most, between in every.items()}
    assert all(min(most, steps) / 2 <= count <= most for most, count in times.items()), times


@pytest.mark.parametrize("seconds", [1e18, 1e30, float("inf")])
def test_hours_may_be_as_many_as_one_likes(seconds: float) -> None:
    assert measured("auto", 0.1, lambda _: 0).steps_within(seconds) > 1e17


def test_steps_get_at_least_half_of_the_hours() -> None:
    assert measured("auto", 0.1, lambda _: 10**6).steps_within(250) == 1250
    assert measured("auto", 400, lambda _: 0).steps_within(250) == 1, "one is needed"


def test_a_run_ends_with_its_last_preview_however_many_steps_it_has(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.begin({"steps": 1_000_000, "method": "mfm"}, {}, "a heading")
    run.previews.mkdir()
    for step in (900_000, 1_000_000):
        (run.previews / f"step-{step:06d}.png").touch()
    summary = {"method": "mfm", "steps": 1_000_000, "seconds": 9.0, "images_per_second": 5.0}
    lines = "\n".join(summary_lines(run, summary))
    assert f"figures     {run.previews / 'step-1000000.png'}" in lines
