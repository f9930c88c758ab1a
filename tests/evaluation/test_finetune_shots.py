"""Few labels, fine-tuned: three settings on the same draw, their average and the best."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tiny_runs import make_run

import freqmask
from freqmask.errors import UserError
from freqmask.evaluation.fewshot import SETTINGS, TunedFewshot, summarize_settings
from freqmask.evaluation.labelled import LabelledData, Round
from freqmask.evaluation.results import ClassificationResult
from freqmask.training.files import read_rows
from freqmask.training.run_folder import RunFolder


class Named:
    """Stands for a model in a result."""

    text = name = "m"


def made(settings: dict[str, list[list[int]]]) -> list[ClassificationResult]:
    labels = np.array([0, 1, 0, 1])
    data: Any = LabelledData(None, labels, None, ["a", "b"], [Round(labels, labels)], "d", "s")  # type: ignore[arg-type]
    subject: Any = Named()
    return [
        ClassificationResult(subject, data, f"1 a class, {name}", seed, np.arange(4), np.array(said))
        for name, answers in settings.items()
        for seed, said in enumerate(answers)
    ]


def test_the_average_is_over_settings_and_the_best_is_the_best_on_average() -> None:
    right, half, wrong = [0, 1, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0]
    results = made({"a": [right, wrong], "b": [right, half], "c": [half, half]})
    found = {one.variant: one.accuracies for one in summarize_settings(results, "1 a class, ")}
    assert found["1 a class, average"] == pytest.approx([(1 + 1 + 0.5) / 3, (0 + 0.5 + 0.5) / 3])
    assert found["1 a class, best"] == found["1 a class, b"] == [1.0, 0.5]


def test_intervals_are_drawn_once_a_setting_and_once_for_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    from freqmask.evaluation import results

    drawn: list[int] = []
    whole = results.bootstrap_interval
    monkeypatch.setattr(
        results, "bootstrap_interval", lambda units, of: drawn.append(len(units)) or whole(units, of)
    )
    summarize_settings(made({"a": [[0, 1, 0, 1]], "b": [[0, 1, 1, 0]]}), "1 a class, ")
    assert len(drawn) == 3


def make_images_and_run(folder: Path) -> None:
    """``two.npz``, dark and bright noise in two classes, and ``mine``, a run of its size."""
    make_run(folder / "mine", image_size=16, model_args={"depth": 1, "embed_dim": 32, "num_heads": 1})
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", 20), ("test", 10)):
        labels = np.arange(count) % 2
        noise = np.random.default_rng(count).integers(0, 60, (count, 16, 16, 3))
        arrays |= {f"{split}_images": (noise + 120 * labels[:, None, None, None]).astype(np.uint8)}
        arrays |= {f"{split}_labels": labels}
    np.savez(folder / "two.npz", **arrays)


def test_frozen_and_fine_tuned_stand_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_images_and_run(tmp_path)
    monkeypatch.setitem(SETTINGS["lr 2e-4, 100 epochs"], "epochs", 2.0)
    found = freqmask.evaluate.fewshot(
        ["pixels", "mine"],
        data="two.npz",
        shots=["2"],
        tune="both",
        epochs=1,
        seeds=[0, 1],
        out="out",
        workers=0,
    )
    variants = [(one.name, one.variant) for one in found]
    assert ("pixels", "2 a class, frozen") in variants
    assert {variant for name, variant in variants if name == "mine"} == {
        f"2 a class, {setting}" for setting in ("frozen", *SETTINGS, "average", "best")
    }
    assert "6 fine-tunings" in capsys.readouterr().out
    configs = [RunFolder(tmp_path / "out" / f"mine-seed0-2-{number}").config() for number in (1, 2, 3)]
    assert [config["lr"] for config in configs] == [2e-3, 2e-4, 2e-4]
    images = {
        RunFolder(tmp_path / "out" / f"mine-seed0-2-{n}").state()["deciding"]["images"] for n in (1, 2, 3)
    }
    assert len(images) == 1
    assert (tmp_path / "out" / "fewshot-tuned.png").is_file()
    classes = read_rows(tmp_path / "out" / "fewshot-tuned-classes.csv")
    assert {(row["model"], row["variant"]) for row in classes} == {
        (name, variant) for name, variant in variants if not variant.endswith(("average", "best"))
    }


@pytest.mark.parametrize("tune", ["both", "finetune"])
def test_of_two_fine_tuned_models_the_averages_are_compared(
    tune: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_images_and_run(tmp_path)
    for setting, lr in zip(SETTINGS.values(), (2e-3, 1e-9, 1e-9), strict=True):
        monkeypatch.setitem(setting, "epochs", 4.0)
        monkeypatch.setitem(setting, "lr", lr)
    freqmask.evaluate.fewshot(
        ["random:mine", "mine"], data="two.npz", shots=["2"], tune=tune, seeds=[0, 1], out="out", workers=0
    )
    rows = [row for row in read_rows(tmp_path / "out" / "results.csv") if "frozen" not in row["variant"]]
    assert len(rows) == 2 * 2 * len(SETTINGS)
    means = [
        100 * np.mean([float(row["accuracy"]) for row in rows if row["model"] == name])
        for name in ("random:mine", "mine")
    ]
    first, second = [
        line for line in capsys.readouterr().out.splitlines() if re.match(r"(random:)?mine  +\d", line)
    ]
    behind, ahead = (first, second) if means[0] < means[1] else (second, first)
    assert re.search(rf"  {max(means) - min(means):.1f} \(-?\d+\.\d to \d+\.\d\)  ", behind), behind
    assert "(" not in ahead and "  -  " in ahead


def test_the_lead_of_an_average_draws_the_same_images_for_all_settings() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 60)
    right = {
        name: [draw.random((len(SETTINGS), 60)) < share for _ in range(2)]
        for name, share in (("good", 0.9), ("bad", 0.5))
    }
    data: Any = LabelledData(None, labels, None, ["a", "b"], [Round(labels, labels)], "d", "s")  # type: ignore[arg-type]
    results = []
    for name, seeds in right.items():
        subject: Any = SimpleNamespace(text=name, name=name)
        results += [
            ClassificationResult(
                subject,
                data,
                f"1 a class, {setting}",
                seed,
                np.arange(60),
                np.where(one[row], labels, 1 - labels),
            )
            for seed, one in enumerate(seeds)
            for row, setting in enumerate(SETTINGS)
        ]
    protocol = TunedFewshot.__new__(TunedFewshot)
    protocol.shots = ["1"]
    (table,) = protocol.tables(results).values()
    line = next(line for line in table.lines() if line.startswith("bad"))
    found = [float(one) for one in re.search(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)", line).groups()]  # type: ignore[union-attr]
    apart = np.mean(right["good"], axis=(0, 1)) - np.mean(right["bad"], axis=(0, 1))
    ends = stats.bootstrap((apart,), np.mean, rng=0, method="percentile").confidence_interval
    np.testing.assert_allclose(found, [100 * apart.mean(), 100 * ends.low, 100 * ends.high], atol=1)
    assert found[0] == round(100 * apart.mean(), 1)


def test_pixels_alone_are_not_fine_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3), dtype=np.uint8), np.arange(8) % 2
    np.savez(
        "two.npz", train_images=images, train_labels=labels, test_images=255 - images, test_labels=labels
    )
    with pytest.raises(UserError, match=r"model \(pixels\) has no weights to be fine-tuned"):
        freqmask.evaluate.fewshot("pixels", data="two.npz", tune="both", workers=0)


def test_a_setting_without_a_number_has_no_part_in_an_average() -> None:
    results = made({"a": [[0, 1, 0, 1]], "b": [[0, 1, 1, 0]]})
    results[0].error = "not finite"
    found = {one.variant: one.percent() for one in summarize_settings(results, "1 a class, ")}
    assert found == {"1 a class, a": "-", "1 a class, b": "50.0"}


def test_options_of_fine_tuning_are_refused_where_nothing_is() -> None:
    with pytest.raises(UserError, match="epochs \\(3\\) are those of fine-tuning"):
        freqmask.evaluate.fewshot("pixels", data="builtin:digits", epochs=3)
    with pytest.raises(UserError, match="pixels"):
        freqmask.evaluate.fewshot("pixels", data="builtin:digits", tune="finetune")
    with pytest.raises(UserError, match=r"strength \(2\.0\) is of frozen features; leave it out"):
        freqmask.evaluate.fewshot("random:test_vit", data="builtin:digits", tune="finetune", strength=2.0)
