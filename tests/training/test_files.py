"""Tables survive new columns, kills and odd names."""

import os
import random
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from freqmask.errors import UserError
from freqmask.interop.weight_files import write_tensors
from freqmask.training.files import (
    append_row,
    clear_leftovers,
    cut_back,
    new_folder,
    read_rows,
    replace_atomically,
)


def test_a_new_column_leaves_empty_cells_above(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    append_row(table, {"step": 1, "loss": 0.5})
    append_row(table, {"step": 2, "held_out": 0.25})
    assert table.read_text().splitlines() == ["step,loss,held_out", "1,0.5,", "2,,0.25"]


def test_cutting_back_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    for step in (1, 2, 3):
        append_row(table, {"step": step, "loss": step / 2})
    with table.open("a") as file:
        file.write("4,0.")
    assert len(read_rows(table)) == 3
    cut_back(table, "step", 2)
    assert [row["step"] for row in read_rows(table)] == ["1", "2"]


def test_a_table_that_a_spreadsheet_saved_is_read_and_goes_on(tmp_path: Path) -> None:
    table = tmp_path / "s.csv"
    table.write_bytes("name,reason\r\na.png,broken\r\n".encode("utf-8-sig"))
    append_row(table, {"name": "b.png", "reason": "empty"})
    assert read_rows(table) == [
        {"name": "a.png", "reason": "broken"},
        {"name": "b.png", "reason": "empty"},
    ]


def test_names_with_newlines_commas_and_broken_bytes_come_back(tmp_path: Path) -> None:
    table = tmp_path / "s.csv"
    name = b'a,\n"b"\xff.jpg'.decode(errors="surrogateescape")
    append_row(table, {"name": name, "reason": "broken"})
    assert read_rows(table) == [{"name": name, "reason": "broken"}]


def test_a_row_after_a_torn_line_is_a_line_of_its_own(tmp_path: Path) -> None:
    table = tmp_path / "s.csv"
    append_row(table, {"name": "a.png", "reason": "broken"})
    with table.open("a") as file:
        file.write('b.png,"it is')
    append_row(table, {"name": "c.png", "reason": "empty"})
    assert [row["name"] for row in read_rows(table)] == ["a.png", "c.png"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("step,loss\n1,0.5\nx,y\n,\n2\n9,0.1\n", ["1", "2"]),
        ("", []),
        ("loss\n0.5\n", []),
        ("step,loss\n1,0.5\n\0\0\0\n", ["1"]),
    ],
)
def test_lines_that_are_no_steps_are_cut_back_and_foreign_tables_kept(
    tmp_path: Path, text: str, left: list[str]
) -> None:
    table = tmp_path / "m.csv"
    table.write_text(text)
    cut_back(table, "step", 5)
    append_row(table, {"step": 6, "loss": 1.0})
    assert [row["step"] for row in read_rows(table)] == [*left, "6"]
    kept = tmp_path / "m.damaged"
    assert kept.exists() == ("step" not in text)
    assert not kept.exists() or kept.read_text() == text


def test_what_no_reader_of_csv_takes_is_a_sentence(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    table.write_bytes(b'step,loss\n1,"' + b"9" * 200_000 + b'"\n')
    with pytest.raises(UserError, match="move it away"):
        cut_back(table, "step", 5)


def test_no_garbage_in_a_table_ends_in_anything_but_a_sentence(tmp_path: Path) -> None:
    table, written, read = tmp_path / "m.csv", set(), 0
    for seed in range(50):
        garbage = b"step,loss\n1,2\n" * (seed % 2) + random.Random(seed).randbytes(400)
        written.add(garbage)
        table.write_bytes(garbage)
        with suppress(UserError):
            cut_back(table, "step", 5)
            append_row(table, {"step": 6, "loss": 1.0})
            assert read_rows(table)[-1]["step"] == "6"
            read += 1
    assert len(written) == 50
    assert read >= 30


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_what_is_written_may_be_read_by_whom_the_user_lets(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "weights.safetensors", {"w": torch.zeros(2)})
        replace_atomically(tmp_path / "numbers.txt", lambda path: path.write_text("1"))
        with new_folder(tmp_path / "model") as folder:
            write_tensors(folder / "weights.safetensors", {"w": torch.zeros(2)})
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) >= 3 and set(modes.values()) == {0o666 & ~mask}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~mask


def test_only_files_of_dead_processes_are_cleared(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = [f".a.ckpt.{dead.pid}.tmp", f".a.ckpt.{os.getpid()}.tmp", "a.tmp", "b.ckpt"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    clear_leftovers(tmp_path, tmp_path / "missing")
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:]}


def test_a_folder_that_cannot_be_replaced_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, replace = tmp_path / "model", Path.replace
    folder.mkdir()
    (folder / "old").touch()

    def fail_for_new(path: Path, target: Path) -> Path:
        if (path / "new").exists():
            raise OSError("the disk is gone")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail_for_new)
    with pytest.raises(OSError, match="the disk is gone"), new_folder(folder) as scratch:
        (scratch / "new").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "model",
        "model/old",
    ]
