"""Rows of results.csv: what another process writes at the same time stays."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from freqmask.cli import main
from freqmask.evaluation import protocol
from freqmask.training.files import read_rows

OTHER = """
import sys
from pathlib import Path
from freqmask.evaluation.protocol import add_rows
table = Path(sys.argv[1])
table.with_name("ready").touch()
add_rows(table, [{"model": "other", "accuracy": "0.5"}])
"""


def test_a_row_of_another_process_is_not_lost_while_rows_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, others = tmp_path / "results.csv", []
    protocol.add_rows(table, [{"model": "own", "accuracy": "0.1"}])

    def reading(path: Path) -> list[dict[str, str]]:
        rows = read_rows(path)
        others.append(subprocess.Popen([sys.executable, "-c", OTHER, str(table)]))
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        time.sleep(0.5)  # the other one would have written by now
        return rows

    monkeypatch.setattr(protocol, "read_rows", reading)
    protocol.add_rows(table, [{"model": "own", "accuracy": "0.2"}])
    assert [other.wait() for other in others] == [0]
    assert {row["model"]: row["accuracy"] for row in read_rows(table)} == {"own": "0.2", "other": "0.5"}


@pytest.mark.parametrize(
    ("last", "kept"), [("b,1,2.14", True), ("b,1", False), ('b,1,"2.1', False), ('"b",1,"2"', True)]
)
def test_a_last_line_that_an_editor_left_without_its_end_is_kept(
    tmp_path: Path, last: str, kept: bool
) -> None:
    table = tmp_path / "results.csv"
    table.write_text(f"model,seed,torch\na,1,2\n{last}")
    protocol.add_rows(table, [{"model": "own", "seed": "1", "torch": "2"}])
    assert [row["model"] for row in read_rows(table)] == ["a", *(["b"] if kept else []), "own"]


def test_a_file_system_without_locks_costs_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    protocol.add_rows(tmp_path / "results.csv", [{"model": "own", "accuracy": "0.1"}])
    assert [row["model"] for row in read_rows(tmp_path / "results.csv")] == ["own"]


def test_a_lock_that_nobody_gives_free_costs_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_PATIENCE", 0.1)
    with FileLock(tmp_path / ".results.csv.lock"):
        protocol.add_rows(tmp_path / "results.csv", [{"model": "own", "accuracy": "0.1"}])
    assert [row["model"] for row in read_rows(tmp_path / "results.csv")] == ["own"]


def test_a_table_of_thousands_of_named_images_can_be_read_again(tmp_path: Path) -> None:
    several, many = ([f"photographs/{number:060d}.jpg" for number in range(count)] for count in (8, 3000))
    commands = [
        protocol.command_of("knn", "mine", {"data": data, "labels": "a.csv"}) for data in (several, many)
    ]
    assert [command.count(".jpg") for command in commands] == [8, 0]
    assert commands[1] == "freqmask evaluate knn mine --data DATA --labels a.csv"
    for command in commands:
        protocol.add_rows(tmp_path / "results.csv", [{"model": "mine", "command": command}])
    assert [row["command"] for row in read_rows(tmp_path / "results.csv")] == commands


@pytest.mark.parametrize("seen", ["few lines", "no disk"])
def test_of_a_table_and_its_rows_either_is_kept_where_the_other_cannot_be_written(
    seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``freqmask evaluate ... | head`` had ended with 0 and without its rows."""
    whole = protocol.say

    def say(text: str = "") -> None:
        if text.startswith("k-NN by cosine"):
            raise BrokenPipeError
        whole(text)

    def full(file: Path, rows: object) -> None:
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(*((protocol, "say", say) if seen == "few lines" else (protocol, "add_rows", full)))
    with pytest.raises(SystemExit) as left:
        main(["evaluate", "knn", "pixels", "--data", "builtin:digits", "--k", "20", "--out", str(tmp_path)])
    if seen == "no disk":
        assert left.value.code == 2 and "k-NN by cosine" in capsys.readouterr().out
        return
    assert left.value.code == 141  # as a shell has it of what SIGPIPE ended
    (row,) = read_rows(tmp_path / "results.csv")
    assert float(row["accuracy"]) > 0.9
