"""Tables survive new columns, kills and odd names."""

from pathlib import Path

from freqmask.training.files import append_row, cut_back, read_rows


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


def test_names_with_newlines_commas_and_broken_bytes_come_back(tmp_path: Path) -> None:
    table = tmp_path / "s.csv"
    name = b'a,\n"b"\xff.jpg'.decode(errors="surrogateescape")
    append_row(table, {"name": name, "reason": "broken"})
    assert read_rows(table) == [{"name": name, "reason": "broken"}]
