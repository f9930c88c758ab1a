"""A table of runs as Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
import re

from freqmask.reporting.seeds import Cell, Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "±": r"$\pm$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def markdown(table: Table) -> str:
    """Columns under each other, so that the source reads as well as the page."""
    header = [*table.settings, *table.numbers]
    rows = [[*line.settings, *map(_plain, line.cells)] for line in table.lines]
    cells = [[_markdown_text(cell) for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    left = len(table.settings)
    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [cells[0], rule, *cells[1:]]
    ]
    return "\n".join([*lines, "", *(f"{_markdown_text(note)}  " for note in table.notes)]).rstrip()


def comma_separated(table: Table) -> str:
    """For a program: mean, standard deviation and n of every number in columns of their own."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    parts = [f"{name} {part}" for name in table.numbers for part in ("mean", "std", "n")]
    writer.writerow([*table.settings, *parts])
    for line in table.lines:
        writer.writerow([*line.settings, *(text for cell in line.cells for text in _apart(cell))])
    return buffer.getvalue().rstrip("\n")


def latex(table: Table) -> str:
    """A tabular for the booktabs package."""
    header = [*table.settings, *table.numbers]
    rows = [[*line.settings, *map(_plain, line.cells)] for line in table.lines]
    lines = [
        *(f"% {note}" for note in table.notes),
        r"\begin{tabular}{" + "l" * len(table.settings) + "r" * len(table.numbers) + "}",
        r"\toprule",
        _latex_row(header),
        r"\midrule",
        *map(_latex_row, rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines)


FORMS = {"md": markdown, "csv": comma_separated, "latex": latex}


def _plain(cell: Cell | None) -> str:
    """Mean ± standard deviation (n).

    >>> _plain(Cell((40.0, 42.0)))
    '41.0 ± 1.4 (2)'
    """
    if cell is None:
        return "–"
    spread = f" ± {cell.deviation:.{cell.digits}f}" if cell.deviation is not None else ""
    return f"{cell.mean:.{cell.digits}f}{spread} ({len(cell.values)})"


def _apart(cell: Cell | None) -> list[str]:
    if cell is None:
        return ["", "", "0"]
    deviation = f"{cell.deviation:.6g}" if cell.deviation is not None else ""
    return [f"{cell.mean:.6g}", deviation, str(len(cell.values))]


def _markdown_text(text: str) -> str:
    """A value as text: no cell divider, no HTML, no line break."""
    return re.sub(r"\s+", " ", text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|"))


def _latex_row(cells: list[str]) -> str:
    return " & ".join("".join(_LATEX.get(sign, sign) for sign in cell) for cell in cells) + r" \\"
