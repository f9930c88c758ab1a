"""``freqmask runs``: what has been trained, and how it came out."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import make_run, result

from freqmask.cli import main


def test_runs_are_listed_with_state_cost_and_best_probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [result("a", 0.4), result("a", 0.5, variant="k=100"), result("a", 0.9, protocol="bands")]
    make_run(tmp_path / "a", results=rows)
    make_run(tmp_path / "b", {"steps": 100}, finished=False)
    main(["runs", str(tmp_path)])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "run"
    assert first.split()[:3] == ["a", "finished", "mfm"]
    assert "1.0 minutes" in first
    assert first.endswith("50.0 % (knn k=100)")
    assert "40 of 100" in second
    assert second.split()[:2] == ["b", "stopped"]


def test_a_run_is_listed_by_itself_and_a_damaged_one_is_listed_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "a")
    (folder / "config.yaml").write_text("[")
    main(["runs", str(folder)])
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["a", "finished", "?"]


def test_a_name_that_would_move_the_cursor_is_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a\x1b[2J\nb")
    main(["runs", str(tmp_path)])
    assert "a\\x1b[2J\\nb" in capsys.readouterr().out


def test_a_folder_of_runs_with_a_table_of_results_is_a_folder_of_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "out" / "mine-seed0")
    (tmp_path / "out" / "results.csv").write_text("protocol,model\n")
    main(["runs", str(tmp_path / "out")])
    assert "mine-seed0" in capsys.readouterr().out
    make_run(tmp_path / "other")
    main(["runs", str(tmp_path)])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "other"]
