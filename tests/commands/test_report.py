"""``freqmask report`` and ``freqmask runs`` as they are typed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

import pytest
from made_runs import make_run, result, write_table

import freqmask
from freqmask.cli import main
from freqmask.commands.command import declared
from freqmask.errors import UserError
from freqmask.reporting.tables import FORMS


def test_the_page_goes_into_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "a")
    main(["report", str(folder)])
    assert (folder / "report.html").stat().st_size < 8e6
    assert str(folder / "report.html") in capsys.readouterr().out


def test_several_runs_go_where_out_says(tmp_path: Path) -> None:
    folders = [str(make_run(tmp_path / name)) for name in ("a", "b")]
    main(["report", *folders, "--out", str(tmp_path / "both.html"), "--no-images"])
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "2 runs" in text
    assert "data:image/webp" not in text


def test_a_table_is_printed_with_other_models_below(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(make_run(tmp_path / f"a{seed}", {"seed": seed})) for seed in (0, 1)]
    write_table(tmp_path / "results.csv", [result("pixels", 0.388)])
    main(["report", *folders, "--table", "md", "--results", str(tmp_path / "results.csv")])
    printed = capsys.readouterr().out
    assert "| a0, a1 " in printed
    assert "± 0.000 (2)" in printed
    assert "| pixels " in printed
    assert "38.8 (1)" in printed


def test_models_that_a_run_was_compared_with_are_not_taken_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What ``freqmask evaluate knn pixels random:a a b --out a`` leaves; and a table of results beside runs."""
    rows = [result("pixels", 0.9), result("random:a", 0.2), result("a", 0.4), result("b", 0.6)]
    folder = make_run(tmp_path / "a", results=rows)
    make_run(tmp_path / "renamed", results=[rows[0], rows[3]])
    write_table(tmp_path / "baselines" / "results.csv", rows[:2])
    with pytest.raises(UserError, match=r"holds no run.*--results .*results\.csv shows"):
        freqmask.report(tmp_path / "baselines")
    main(["runs", str(tmp_path)])
    listed = capsys.readouterr().out.splitlines()[1:]
    assert [(line.split()[0], line.split("  ")[-1]) for line in listed] == [
        ("a", "40.0 % (knn k=20)"),
        ("renamed", "60.0 % (knn k=20)"),
    ]
    main(["report", str(folder), "--table", "csv"])
    table = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    at = table[0].index("knn k=20 % mean")
    means = {line[0]: float(line[at]) for line in table[1:] if len(line) > at}
    assert means == {"a": 40.0, "pixels": 90.0, "random:a": 20.0, "b": 60.0}


@pytest.mark.parametrize("form", ["md", "csv", "latex"])
def test_a_table_goes_to_a_file(tmp_path: Path, form: str) -> None:
    out = tmp_path / "table.txt"
    folder = make_run(tmp_path / os.fsdecode(b"a\xff"))  # a name that is no UTF-8
    main(["report", str(folder), "--table", form, "--out", str(out)])
    assert b"relative loss" in out.read_bytes()
    assert b"a\xff" in out.read_bytes()
    with pytest.raises(UserError, match="cannot be written: Is a directory; name a file"):
        freqmask.report(folder, table=form, out=tmp_path)


def test_the_twin_returns_the_path(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    assert freqmask.report([str(folder)], no_images=True) == folder / "report.html"
    assert freqmask.report(folder, no_images=True) == folder / "report.html"
    with pytest.raises(UserError, match="run must be named"):
        freqmask.report([])
    for number in range(25):
        write_table(tmp_path / str(number) / "metrics.csv", [{"step": 1, "loss": 0.5}])
    with pytest.raises(UserError, match=r"run \(26 runs\) must be at most 24 in one report; name fewer"):
        freqmask.report(tmp_path)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["report", "NONE"], "does not exist"),
        (["report", "."], "holds no run"),
        (["report", ".", "--table", "docx"], "table (docx) must be one of"),
        (["runs", "NONE"], "folder (NONE) does not exist"),
        (["runs", "."], "holds no run"),
    ],
)
def test_mistakes_are_sentences(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_table_stops_neither_the_report_nor_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "a")
    for name in ("results.csv", "skipped.csv", "metrics.csv"):
        with (folder / name).open("a") as file:
            file.write("1," + "x" * 200_000 + "\n")  # beyond what the module csv takes
    main(["report", str(folder), "--no-images"])
    main(["runs", str(tmp_path)])
    assert "40" in capsys.readouterr().out
    page = (folder / "report.html").read_text(encoding="utf-8")
    for words in ("results.csv cannot be read", "skipped.csv cannot be read", "1 lines of metrics.csv"):
        assert words in page


def test_every_form_of_table_can_be_asked_for() -> None:
    (choices, _) = get_args(declared(freqmask.report)["table"].kind)
    assert set(get_args(choices)) == set(FORMS)
