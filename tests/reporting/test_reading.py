"""Runs are read whatever state their folder is in; curves are thinned for the eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import make_run, result
from tiny_runs import close

from freqmask.errors import UserError
from freqmask.interop.formats import find_backbone
from freqmask.reporting.page import spread_out, write_report
from freqmask.reporting.reading import Curve, read_results, read_run, read_runs
from freqmask.training.files import append_row
from freqmask.training.run_folder import RunFolder

HUGE = b"step,model\n1," + b"x" * 200_000 + b"\n"  # a cell beyond what the module csv takes


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a"))
    assert (run.name, run.status, len(run.curves["loss"].steps), run.last_step) == ("a", "finished", 40, 40)
    assert run.curves["loss"].last == pytest.approx(1 / 40)
    assert [step for step, _ in run.previews] == [10, 20, 30]
    assert run.missing == []


def test_a_run_that_is_closed_to_us_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "theirs"):
        make_run(tmp_path / name)
    close(tmp_path / "theirs", monkeypatch)
    assert [run.name for run in read_runs([tmp_path])] == ["mine"]
    with pytest.raises(PermissionError):
        read_runs([tmp_path / "theirs"])  # one that was named is not passed over
    with pytest.raises(UserError, match=r"it holds the run .*mine"):
        find_backbone(tmp_path)


def test_curves_that_are_closed_to_us_hide_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = make_run(tmp_path / "a"), Path.read_bytes

    def closed(path: Path) -> bytes:
        if path.name == "metrics.csv":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", closed)
    run = read_run(folder)
    assert run.config and not run.curves
    assert "metrics.csv cannot be read" in run.missing[0]


def test_a_run_that_is_trained_is_running_and_one_that_was_killed_is_stopped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", finished=False)
    assert read_run(folder).status == "stopped"
    training = RunFolder(folder)
    training.lock()
    try:
        assert read_run(folder).status == "running"
    finally:
        training.unlock()


def test_a_run_that_stopped_between_two_rows_is_at_the_step_of_its_checkpoint(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", finished=False)
    (folder / "checkpoints").mkdir(exist_ok=True)
    for name in ("step-00000038.ckpt", "step-00000106.ckpt", "last.ckpt"):
        (folder / "checkpoints" / name).touch()
    assert read_run(folder).last_step == 106


@pytest.mark.parametrize(
    ("models", "own"),
    [
        (["pixels", "a", "b"], ["a"]),
        (["mine/a", "other/a"], ["mine/a"]),  # two of one name are called by their paths
        (["a", "../mine/a", "../other/a"], ["a", "../mine/a"]),  # evaluated twice, from two folders
        (["~/mine/a", "~/other/a"], ["~/mine/a"]),
        (["a/backbone", "timm:a"], ["a/backbone"]),
        (["pixels", "random:a", "as-it-was-called"], ["as-it-was-called"]),
        (["pixels", "random:a"], []),
        (["b", "c"], []),
    ],
)
def test_a_run_knows_itself_in_a_table_of_several_models(
    models: list[str], own: list[str], tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "mine" / "a", results=[result(model, 0.5) for model in models])
    run = read_run(folder)
    assert [row["model"] for row in run.results] == own
    assert [row["model"] for row in run.others] == [model for model in models if model not in own]


def test_a_cut_line_is_left_out_and_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    metrics = folder / "metrics.csv"
    metrics.write_bytes(metrics.read_bytes()[:-7])
    run = read_run(folder)
    assert len(run.curves["loss"].steps) == 39
    assert any("1 lines of metrics.csv are cut short" in sentence for sentence in run.missing)


def test_numbers_that_are_none_are_counted_and_not_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", rows=2)
    with (folder / "metrics.csv").open("a") as file:
        file.write("3,nan,inf,,0.5,1,1\n")
    curves = read_run(folder).curves
    assert (curves["loss"].not_finite, len(curves["loss"].values)) == (1, 2)
    assert curves["relative_loss/lowpass"].not_finite == 0


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("metrics.csv", None, "metrics.csv is missing"),
        ("metrics.csv", b"", "no column named step"),
        ("metrics.csv", b"loss\n1\n", "no column named step"),
        ("metrics.csv", b"step,loss\n", "no row yet"),
        ("metrics.csv", b"\xff\xfe\x00\x01", "no column named step"),
        ("metrics.csv", HUGE, "1 lines of metrics.csv are cut short or garbled and were left out."),
        ("results.csv", HUGE, "results.csv cannot be read"),
        (
            "results.csv",
            b"model;accuracy\r\na;0,5\r\n",
            "separated by commas (it has model;accuracy)",
        ),
        ("results.csv", b"model,accuracy\na,0.5", "The last line of results.csv has no line break"),
        ("skipped.csv", HUGE, "skipped.csv cannot be read"),
        ("config.yaml", b"a: [", "config.yaml cannot be read"),
        ("config.yaml", b"\xff", "config.yaml cannot be read"),
        ("run.json", b"{", "run.json cannot be read"),
        ("run.json", b"[1]", "run.json holds no options"),
        ("summary.json", b"", "summary.json cannot be read"),
    ],
)
def test_what_is_missing_or_damaged_is_said(
    tmp_path: Path, name: str, content: bytes | None, sentence: str
) -> None:
    folder = make_run(tmp_path / "a")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    assert any(sentence in one for one in read_run(folder).missing)


def test_tables_with_the_mark_of_excel_are_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", results=[result("a", 0.5)])
    for name in ("metrics.csv", "results.csv"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    run = read_run(folder)
    assert (run.missing, len(run.curves["loss"].steps), run.results[0]["protocol"]) == ([], 40, "knn")
    append_row(folder / "results.csv", result("b", 0.25))
    run = read_run(folder)
    assert [row["protocol"] for row in (*run.results, *run.others)] == ["knn", "knn"]


def test_folders_of_other_programs_and_files_that_vanish_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, strange = tmp_path / "a", {"steps": "many", "data": {"train": 1}, "image_size": ["x", None]}
    config = {**strange, "method": ["a"], "batch_size": "auto", "lr": {"max": 1}, "warmup_epochs": None}
    make_run(folder, {**config, "crop_scale": ["a", 2], "model_args": 3, "channels": "RGB"})
    (folder / "run.json").write_text('{"images": "many", "given": 3, "probe_images": "x", "parts": 4}')
    (folder / "summary.json").write_text('{"steps": "all", "seconds": "long", "ended": [1]}')
    table = (folder / "metrics.csv").read_text().splitlines()
    probes = [
        "step," + ",".join(f"{kind}_{name}" for kind in ("probe", "pixels") for name in ("knn", "linear"))
    ]
    probes += [f"{step},0.5,0.5,0.5,0.5" for step in range(len(table) - 1)]
    (folder / "metrics.csv").write_text("\n".join(probes) + "\n")
    there = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: [*there(path, pattern), path / "gone.tmp"])
    page = write_report([folder], tmp_path / "x.html").read_text(encoding="utf-8")
    assert "Finished: 39 steps" in page
    assert "too few images to judge by" in page


def test_a_folder_of_runs_stands_for_its_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b")
    (tmp_path / "runs" / "splits").mkdir()
    assert [run.name for run in read_runs([tmp_path / "runs"])] == ["a", "b"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / parent / "a") for parent in ("x", "y")]
    assert len({run.name for run in read_runs([*paths, paths[0]])}) == 2


def test_no_run_is_one_sentence(tmp_path: Path) -> None:
    make_run(tmp_path / "mfm-small")
    (tmp_path / "mfm-smaal").mkdir()  # nearer, but no run: a dry run leaves its plan alone
    with pytest.raises(UserError, match="does not exist; did you mean 'mfm-small'"):
        read_runs([tmp_path / "mfm-smal"])
    with pytest.raises(UserError, match="must be a run folder, it is a file"):
        read_runs([tmp_path / "mfm-small" / "metrics.csv"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(UserError, match=r"must be a results.csv of `freqmask evaluate`: it is a folder"):
        read_results([tmp_path])


@given(st.integers(1, 400), st.integers(4, 60), st.integers(0, 1000))
def test_a_thinned_curve_keeps_its_ends_and_its_extremes(count: int, most: int, seed: int) -> None:
    steps = np.arange(count) * 10.0
    values = np.random.default_rng(seed).normal(size=count)
    thin = Curve(steps, values).thinned(most)
    thin_steps, thin_values = thin.steps, thin.values
    assert len(thin_steps) <= max(most, 4)
    assert (np.diff(thin_steps) > 0).all()
    assert (thin_steps[0], thin_steps[-1]) == (steps[0], steps[-1])
    assert (thin_values.min(), thin_values.max()) == (values.min(), values.max())
    assert all(values[int(step / 10)] == value for step, value in zip(thin_steps, thin_values, strict=True))


def test_a_trend_goes_through_the_means() -> None:
    trend = Curve(np.arange(6.0), np.array([0.0, 2, 4, 6, 8, 10])).trend(3)
    np.testing.assert_allclose(trend.steps, [0.5, 2.5, 4.5])
    np.testing.assert_allclose(trend.values, [1, 5, 9])


@pytest.mark.parametrize(("count", "most"), [(1, 5), (5, 5), (200, 24), (3, 2), (9, 1)])
def test_spread_out_items_hold_the_last_one(count: int, most: int) -> None:
    chosen = spread_out(range(count), most)
    assert len(chosen) == min(count, most)
    assert chosen[-1] == count - 1
    assert most == 1 or chosen[0] == 0
    assert len(set(chosen)) == len(chosen)
