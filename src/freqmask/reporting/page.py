"""One self-contained HTML page from run folders."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape
from PIL import Image

from freqmask import __version__
from freqmask.console import rank, say
from freqmask.errors import UserError
from freqmask.reporting.curves import charts, spread_out
from freqmask.reporting.evaluations import Row, evaluation_charts, evaluation_table, rows_of
from freqmask.reporting.facts import differences, facts, repeat_command
from freqmask.reporting.reading import Run, read_results, read_runs
from freqmask.reporting.remarks import remarks
from freqmask.training.files import replace_atomically
from freqmask.training.run_folder import now

WIDEST = 1400  # pixels; previews are drawn about this wide
NARROWEST = 640  # below it the titles in a preview cannot be read
MOST = 60  # pictures of a run; a slider with more is no finer to the hand
WANTED = 24  # pictures for which sharpness is given up
QUALITY = 75  # of WebP


@dataclass(frozen=True)
class Picture:
    """An image as the page holds it.

    Attributes:
        step: the step that it shows.
        source: a data URI.
        width: in pixels.
        height: in pixels.
    """

    step: int
    source: str
    width: int
    height: int


def embed(path: Path, step: int = 0, widest: int = WIDEST) -> Picture | None:
    """The picture as WebP in a data URI; None where the file is no image that can be read."""
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if image.width > widest:
        image = image.resize((widest, round(image.height * widest / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(step, source, image.width, image.height)


def embed_within(path: Path, budget: int) -> Picture | None:
    """The picture, narrower where it would take more bytes of the page than ``budget``; at worst none."""
    widest = WIDEST
    picture = embed(path, widest=widest)
    while picture is not None and len(picture.source) > budget:
        widest = int(min(widest, picture.width) * 0.75)
        picture = embed(path, widest=widest) if widest >= NARROWEST // 2 else None
    return picture


def embed_previews(previews: Sequence[tuple[int, Path]], budget: int) -> tuple[list[Picture], list[str]]:
    """Previews spread evenly over the run, first and last among them, that fit into the budget.

    Args:
        previews: step and file, rising.
        budget: bytes in the page.

    Returns:
        The pictures, and a sentence for each file that is no image.
    """
    if not previews:
        return [], []
    widest, size = _width_and_size(previews, budget)
    chosen = spread_out(previews, max(min(MOST, budget // size), 1))
    pictures = {path: embed(path, step, widest) for step, path in chosen}
    damaged = [
        f"{path.name} cannot be read as an image." for path, picture in pictures.items() if picture is None
    ]
    good = [picture for picture in pictures.values() if picture is not None]
    while sum(map(_bytes_of, good)) > budget and good:
        good = spread_out(good, len(good) - 1)
    return good, damaged


def _width_and_size(previews: Sequence[tuple[int, Path]], budget: int) -> tuple[int, int]:
    """Width at which the wanted number fits, and the mean bytes of three samples at that width."""
    samples = [path for _, path in spread_out(previews, 3)]
    widest = WIDEST
    while True:
        size = sum(_bytes_of(embed(path, widest=widest)) for path in samples) // len(samples) + 1
        if size * min(WANTED, len(previews)) <= budget or widest <= NARROWEST:
            return widest, size
        widest = max(int(widest * 0.8), NARROWEST)


def _bytes_of(picture: Picture | None) -> int:
    return len(picture.source) if picture is not None else 1


REPORT = "report.html"
LIMIT = 4_300_000  # bytes of a page, 1.2 million of them the charting library
PREVIEW_BYTES = 2_600_000  # of all runs, where so much is left
PLAN_SHARE = 0.15  # of the pictures' bytes
MOST_RUNS = 24  # overlaid, a chart with more cannot be read
_LISTED = 200  # skipped images a run; skipped.csv has them all
_WITHOUT_IMAGES = '<meta name="freqmask-images" content="no">'
CHARTS = "plotly-basic.min.js"  # plotly.js-basic-dist-min of npm, its licence beside it
_HERE = Path(__file__).parent


def write_report(
    paths: Sequence[str | Path],
    out: str | Path | None = None,
    images: bool = True,
    results: Sequence[str | Path] = (),
) -> Path:
    """Write the report of one or several runs.

    Args:
        paths: run folders, or folders of them.
        out: the HTML file; by default in the run's folder, or here where there are several runs.
        images: False leaves out previews and the plan's picture.
        results: further results.csv, of models that are no runs.

    Returns:
        The file written.

    Raises:
        UserError: no run, too many, or a file that cannot be written.
    """
    runs = read_runs(paths)
    if not runs:
        raise UserError("run must be named; `freqmask runs` lists the runs under runs/")
    if len(runs) > MOST_RUNS:
        raise UserError(f"run ({len(runs)} runs) must be at most {MOST_RUNS} in one report; name fewer")
    target = Path(out) if out is not None else (runs[0].path if len(runs) == 1 else Path()) / REPORT
    text = render(runs, images, read_results(results))
    try:
        replace_atomically(target, lambda path: _write(path, text))
    except OSError as error:
        raise UserError(f"out ({target}) cannot be written: {error.strerror}; name another file") from error
    return target


def refresh_report(run: str | Path) -> Path | None:
    """Write a run's own report again; a report never stops what calls it.

    One that was asked for without images stays without.

    Returns:
        The file, or None where it could not be written, after a sentence that says why.
    """
    if rank() != 0:
        return None
    try:
        return write_report([run], images=not _without_images(Path(run) / REPORT))
    except (UserError, OSError, ValueError, csv.Error) as error:
        say(f"note: the report was not written: {error}; `freqmask report {run}` tries again")
        return None


def _without_images(report: Path) -> bool:
    if not report.is_file():
        return False
    with report.open(encoding="utf-8", errors="replace") as file:
        return _WITHOUT_IMAGES in file.read(4096)


def _write(path: Path, text: str) -> None:
    # a file name may hold bytes that are no text; they are shown escaped
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def render(runs: Sequence[Run], images: bool = True, others: Sequence[Row] = ()) -> str:
    """The page's HTML.

    Args:
        runs: in the order of their colours.
        images: whether previews are embedded.
        others: evaluation rows of models that are no runs.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,  # names of files, classes and runs are data
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # plotly.js-basic has scatter and bars, all that the page draws, in a quarter of the whole library's size
    scripts = [(_HERE / name).read_text(encoding="utf-8") for name in (CHARTS, "page.js")]
    environment.filters["options"] = _mark_options
    evaluated = rows_of(runs, others)
    drawn = [*charts(runs), *evaluation_charts(evaluated)]
    template = environment.get_template("page.html")
    context = {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "version": __version__,
        "written": now(),
        "with_images": images,
        "images_mark": Markup("") if images else Markup(_WITHOUT_IMAGES),
        "policy": _policy(scripts),
        "style": Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        "scripts": [Markup(text) for text in scripts],
        "charts": drawn,
        "data": {"runs": len(runs), "charts": [_for_script(chart) for chart in drawn]},
        "groups": _grouped(runs),
        "differences": differences(runs),
        "evaluation": evaluation_table(evaluated),
    }
    without = template.render(**context, runs=[_told(run, 0) for run in runs])
    if not images:
        return without
    # the words come first; pictures take what is left
    left = min(LIMIT - len(without.encode("utf-8", "backslashreplace")), PREVIEW_BYTES) // len(runs)
    return template.render(**context, runs=[_told(run, max(left, 0)) for run in runs])


def _mark_options(sentence: str) -> Markup:
    return Markup(re.sub(r"(?<!\S)--[\w-]+", r"<code>\g<0></code>", str(escape(sentence))))


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy: nothing is fetched, and no script runs but ours, whatever a name holds."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _for_script(chart: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in chart.items() if name not in ("header", "rows", "meaning", "summary")
    }


def _grouped(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Facts by group, each with its text in every run."""
    told = [{(group, name): text for group, name, text in facts(run)} for run in runs]
    keys = list(dict.fromkeys(key for one in told for key in one))
    groups = list(dict.fromkeys(group for group, _ in keys))
    return [
        (
            wanted,
            [
                (name, [one.get((group, name), "–") for one in told])
                for group, name in keys
                if group == wanted
            ],
        )
        for wanted in groups
    ]


def _told(run: Run, picture_bytes: int) -> dict[str, Any]:
    """One run as the template wants it, with pictures of so many bytes."""
    plan_bytes = int(PLAN_SHARE * picture_bytes)
    plan = embed_within(run.plan, plan_bytes) if run.plan is not None and plan_bytes else None
    pictures, damaged = (
        embed_previews(run.previews, picture_bytes - plan_bytes) if picture_bytes else ([], [])
    )
    return {
        "name": run.name,
        "id": "run-"
        + hashlib.sha256(str(run.path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:8],
        "path": str(run.path),
        "status": run.status,
        "remarks": remarks(run),
        "missing": [*run.missing, *damaged],
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100)
        if run.config
        else "",
        "repeat": repeat_command(run) if run.config else "",
        "pictures": pictures,
        "picture_alt": _preview_alt(run, pictures),
        "drawn": len(run.previews),
        "plan": plan,
        "skipped": run.skipped[:_LISTED],
        "skipped_count": len(run.skipped),
        "reasons": Counter(_kind(row.get("reason", "")) for row in run.skipped).most_common(10),
    }


def _preview_alt(run: Run, pictures: Sequence[Picture]) -> str:
    """In words what a preview shows; the step is added where it is shown."""
    if not pictures:
        return ""
    return (
        f"Run {run.name}: the same images, one a row. Columns: the original; what the model saw after the filter; "
        "the missing part filled in by the model; and the spectra of the three."
    )


def _kind(reason: str) -> str:
    return re.sub(r"\d+", "N", reason.split(":")[0]) or "no reason given"
