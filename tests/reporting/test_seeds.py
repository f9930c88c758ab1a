"""Runs that differ in their seed only are one line of the table."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path

import pytest
from made_runs import make_run, result

from freqmask.reporting.reading import read_runs
from freqmask.reporting.tables import FORMS, join_seeds, measured


def runs(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path / "a0", {"radius": 4, "seed": 0}, results=[result("a0", 0.40)]),
        make_run(tmp_path / "a1", {"radius": 4, "seed": 1, "workers": 3}, results=[result("a1", 0.44)]),
        make_run(tmp_path / "b0", {"radius": 8, "min_lr": 2e-6}, results=[result("b0", 0.50)]),
    ]


def test_seeds_are_joined_into_mean_deviation_and_n(tmp_path: Path) -> None:
    table = join_seeds(read_runs(runs(tmp_path)))
    assert table.settings == ["min_lr", "radius"]
    assert [line.settings[1] for line in table.lines] == ["4", "8"]
    cell = table.lines[0].cells[table.numbers.index("knn k=20 %")]
    assert cell is not None
    assert cell.values == pytest.approx((40, 44))
    assert cell.deviation == pytest.approx(statistics.stdev([40, 44]))


def test_of_losses_the_held_out_one_is_the_last_and_the_other_a_median(tmp_path: Path) -> None:
    folder, trained, held_out = make_run(tmp_path / "a"), [5.0, 4.0, 9.0, 1.0, 2.0, 3.0, 8.0, 1.5], [0.7, 0.9]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "relative_loss", "held_out_relative_loss"])
        writer.writeheader()
        writer.writerows({"step": n, "relative_loss": value} for n, value in enumerate(trained))
        writer.writerows({"step": 7, "held_out_relative_loss": value} for value in held_out)
    table = join_seeds(read_runs([folder]))
    assert table.numbers == ["relative loss", "held-out relative loss"]
    ends = (statistics.median(trained[-2:]), held_out[-1])  # of a quarter of the rows
    assert [cell and (cell.mean, cell.digits) for cell in table.lines[0].cells] == [(end, 3) for end in ends]


def test_what_auto_chose_is_no_setting_that_varies(tmp_path: Path) -> None:
    typed = make_run(tmp_path / "a", {"lr": 1e-3})
    other = make_run(tmp_path / "b", {"lr": 2e-3})
    text = (other / "config.yaml").read_text().replace("warmup_epochs: 1.0", "warmup_epochs: 2.0")
    (other / "config.yaml").write_text(text)
    assert join_seeds(read_runs([typed, other])).settings == ["lr"]


def test_seeds_whose_images_came_from_elsewhere_are_joined_unless_that_was_asked(tmp_path: Path) -> None:
    chosen = [make_run(tmp_path / f"{seed}", {"seed": seed}) for seed in (0, 1)]
    for run, place in zip(chosen, ("device", "loader"), strict=True):  # by the memory that was free
        with (run / "config.yaml").open("a") as file:
            file.write(f"images_from: {place}\n")
    asked = make_run(tmp_path / "asked", {"seed": 2, "images_from": "loader"})
    assert len(join_seeds(read_runs(chosen)).lines) == 1
    assert len(join_seeds(read_runs([*chosen, asked])).lines) == 2


def test_a_run_of_0_1_0_that_recorded_no_default_is_joined_with_one_that_did(tmp_path: Path) -> None:
    old, new = make_run(tmp_path / "a"), make_run(tmp_path / "b", {"seed": 1, "clamp": True})
    (line,) = join_seeds(read_runs([old, new])).lines
    assert line.cells[0] is not None and len(line.cells[0].values) == 2
    other = make_run(tmp_path / "c", {"seed": 1, "clamp": False})
    assert [one.settings for one in join_seeds(read_runs([old, other])).lines] == [["yes"], ["no"]]


def test_a_measurement_made_again_counts_once(tmp_path: Path) -> None:
    rows = [result("a", 0.1, time="1"), result("a", 0.3, time="2"), result("a", 0.5, seed=1, time="3")]
    table = join_seeds(read_runs([make_run(tmp_path / "a", results=rows)]))
    cell = table.lines[0].cells[table.numbers.index("knn k=20 %")]
    assert cell is not None
    assert cell.values == pytest.approx((40,))


def test_a_measurement_by_another_option_hides_none_and_has_a_column_of_its_own(tmp_path: Path) -> None:
    command = "freqmask evaluate knn {} --feature {} --k 20 --seeds {} --batch_size {}".format
    token = [result("a", 0.1, command=command("a", "token", "0 1", 8))]
    token += [result("a", 0.3, seed=1, command=command("a", "token", 1, 64))]  # how, not what
    mean = [result("a", 0.8, command=command("a", "mean", 0, 8))]
    folders = [
        make_run(tmp_path / "a", {"radius": 4}, results=token + mean),
        make_run(
            tmp_path / "b", {"radius": 8}, results=[result("b", 0.6, command=command("b", "mean", 0, 8))]
        ),
    ]
    table = join_seeds(read_runs(folders))
    columns = zip(*(line.cells for line in table.lines), strict=True)
    means = [[cell and cell.mean for cell in column] for column in columns]
    shown = dict(zip(table.numbers, means, strict=True))
    assert shown["knn k=20, feature token %"] == [pytest.approx(20), None]
    assert shown["knn k=20, feature mean %"] == [pytest.approx(80), pytest.approx(60)]


def test_an_option_that_was_left_out_is_its_default_and_how_it_was_trained_is_none(tmp_path: Path) -> None:
    command = "freqmask evaluate knn a --labels {}/l.csv --keep_checkpoints {}{}".format
    rows = [result("a", 0.9, seed=seed, command=command(seed, seed, " --k 20" * seed)) for seed in range(2)]
    rows += [result("a", 0.3, command=command(0, 0, " --image_size 32"))]
    old = [
        result("b", 0.5, command=command(0, 0, ""), freqmask="0.0.9")
    ]  # of a version that had no such option
    runs = [make_run(tmp_path / "a", results=rows), make_run(tmp_path / "b", {"radius": 9}, results=old)]
    table = join_seeds(read_runs(runs))
    shown = {
        name: [cell and cell.values for cell in cells]
        for name, *cells in zip(table.numbers, *(line.cells for line in table.lines), strict=True)
    }
    assert shown["knn k=20, image_size default %"] == [pytest.approx((90,)), None]
    assert shown["knn k=20, image_size 32 %"] == [pytest.approx((30,)), None]
    assert shown["knn k=20 %"] == [None, pytest.approx((50,))]


def test_weights_that_were_trained_further_are_not_joined_with_what_was_measured_before(
    tmp_path: Path,
) -> None:
    old = [result("a", 0.3, seed=seed, model_weights="old") for seed in range(3)]
    new = [result("a", 0.9, model_weights="new")]
    fresh = [result("random:a", 0.1 * seed, seed=seed, model_weights=f"{seed}") for seed in range(1, 3)]
    table = join_seeds(read_runs([make_run(tmp_path / "a", results=[*old, *new, *fresh])]))
    values = [line.cells[table.numbers.index("knn k=20 %")] for line in table.lines]
    assert [cell and cell.values for cell in values] == [pytest.approx((90,)), pytest.approx((10, 20))]


def test_scores_on_images_that_became_others_are_no_seeds_of_the_new_ones() -> None:
    few = [
        result(model, 0.3, seed=seed, data_fingerprint="few")
        for seed in (0, 1)
        for model in ("a", "random:a")
    ]
    more = [result(model, 0.9, seed=2, data_fingerprint="more") for model in ("a", "random:a")]
    assert [entry.percent.values for entry in measured([*few, *more])] == [(90.0,), (90.0,)]


def test_a_measurement_that_failed_hides_none_that_came_out() -> None:
    good = [result("a", score, seed=seed, model_weights="w") for seed, score in enumerate((0.3, 0.5))]
    of_the_same, of_none = (result("a", "", model_weights=w, error="out of memory") for w in ("w", ""))
    for failed in (of_the_same, of_none):
        assert [entry.percent.values for entry in measured([*good, failed])] == [pytest.approx((30, 50))]
    assert measured([of_none]) == []


def test_what_was_measured_before_the_training_ended_is_told(tmp_path: Path) -> None:
    rows = [
        result("a", 0.3, time="2026-01-01 09:00:00"),
        result("a", 0.4, seed=1, time="2026-01-01 11:00:00"),
    ]
    folder = make_run(tmp_path / "a", results=rows)
    for hour, told in ((10, True), (9, False)):  # the end of the training
        (folder / "summary.json").write_text(json.dumps({"steps": 9, "ended": f"2026-01-01 {hour:02}:00:00"}))
        (run,) = read_runs([folder])
        assert ("before the training ended" in " ".join(run.missing)) is told
        assert ("a, measured before the training ended" in FORMS["md"](join_seeds([run]))) is told


def test_a_run_made_again_with_its_seed_is_told(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, {"seed": seed}) for name, seed in (("a", 0), ("again", 0), ("b", 1))]
    table = join_seeds(read_runs(runs))
    assert "of one seed, and counted as several: a, again" in table.notes
    assert len(join_seeds(read_runs(runs[1:])).notes) == len(table.notes) - 1


def test_splits_are_told_apart_and_of_other_test_images_the_last_counts(tmp_path: Path) -> None:
    command = "freqmask evaluate knn a --data labelled --split_seed {}".format
    rows = [
        result("a", 0.2, split="ours", test_images=50, command=command(0)),
        result("a", 0.4, split="ours", test_images=60, command=command(0)),  # DATA has grown
        result("a", 0.9, split="ours", test_images=60, command=command(1)),
    ]
    table = join_seeds(read_runs([make_run(tmp_path / "a", results=rows)]))
    shown = {name: cell and cell.mean for name, cell in zip(table.numbers, table.lines[0].cells, strict=True)}
    assert shown["knn k=20, split_seed 0 %"] == pytest.approx(40)
    assert shown["knn k=20, split_seed 1 %"] == pytest.approx(90)


def test_other_models_are_lines_of_their_own(tmp_path: Path) -> None:
    others = [{name: str(value) for name, value in result("pixels", 0.9).items()}]
    table = join_seeds(read_runs(runs(tmp_path)), others)
    assert table.lines[-1].settings == ["pixels", "–"]
    assert table.lines[-1].cells[-1] is not None
    assert table.lines[-1].cells[0] is None


def test_csv_holds_numbers_in_columns_of_their_own(tmp_path: Path) -> None:
    text = FORMS["csv"](join_seeds(read_runs(runs(tmp_path))))
    row = next(csv.DictReader(io.StringIO(text)))
    assert (row["radius"], row["knn k=20 % mean"], row["knn k=20 % n"]) == ("4", "42", "2")
    assert float(row["knn k=20 % std"]) == pytest.approx(2.82843)


def test_markdown_and_latex_show_hostile_values_as_text(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, {"filter": name}) for name in ("<b>|_%", "plain")]
    table = join_seeds(read_runs(folders))
    assert "| &lt;b>\\|_%" in FORMS["md"](table)
    assert r"\textless{}b\textgreater{}|\_\% &" in FORMS["latex"](table)


def test_unfinished_runs_are_named_below(tmp_path: Path) -> None:
    table = join_seeds(read_runs([make_run(tmp_path / "a", finished=False)]))
    assert "not finished: a" in FORMS["md"](table)
