"""``freqmask report``: one page, or one table, of one or several runs; ``freqmask runs``: the list of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from freqmask.commands.given import command
from freqmask.console import say
from freqmask.errors import UserError


@command()
def report(
    run: list[str],
    *,
    out: str | None = None,
    table: Literal["md", "csv", "latex"] | None = None,
    results: list[str] | None = None,
    no_images: bool = False,
) -> Path | str:
    """Writes one HTML page on one or several runs, or a table of them.

    The page opens from the disk without a network: what was run, its curves, its previews by step, skipped
    images, every evaluation. Several runs are overlaid and the settings in which they differ listed. It may be
    written while a run is being trained. The table joins runs that differ in their seed only into mean and
    standard deviation, names the settings that vary, and puts the evaluations beside them.

    Args:
        run: run folders, or a folder that holds them.
        out: the file to write. The page goes to RUN/report.html, or report.html here where there are several
            runs; a table is printed.
        table: a table instead of the page: md (Markdown), csv or latex.
        results: further results.csv, of models that are no runs: raw pixels, random or public weights.
        no_images: leave previews and the picture of the inputs out, for those who may not share them. Names of
            files stay.

    Returns:
        The path of the page; of a table its path, or its text where there is no ``out``.

    Raises:
        UserError: no run where one was named.
    """
    if isinstance(run, (str, Path)):
        run = [str(run)]
    if table is not None:
        return _table(run, out, table, results or [])
    from freqmask.reporting.page import write_report

    path = write_report(run, out, images=not no_images, results=results or [])
    say(f"{path}    ({path.stat().st_size / 1e6:.1f} MB; open it in a browser)")
    return path


def _table(run: list[str], out: str | None, form: str, results: list[str]) -> Path | str:
    from freqmask.reporting.reading import read_results, read_runs
    from freqmask.reporting.tables import FORMS, join_seeds
    from freqmask.training.run_folder import write_text

    text = FORMS[form](join_seeds(read_runs(run), read_results(results)))
    if out is None:
        say(text)
        return text
    try:
        write_text(Path(out), text + "\n")
    except OSError as error:
        raise UserError(f"out ({out}) cannot be written: {error.strerror}; name another file") from error
    say(out)
    return Path(out)


@command()
def runs(folder: str = "runs") -> list[str]:
    """Lists runs: state, method, steps, time, loss, best probe.

    Args:
        folder: where the run folders are.

    Returns:
        The names of the runs.

    Raises:
        UserError: the folder does not exist or holds no run.
    """
    from freqmask.reporting.tables import list_runs, table_lines

    found = list_runs(Path(folder))
    for line in table_lines(found):
        say(line)
    return [run.name for run in found]
