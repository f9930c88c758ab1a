"""One self-contained HTML page from run folders."""

from __future__ import annotations

import base64
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
from freqmask.console import rank, say, shell_word
from freqmask.errors import UserError
from freqmask.reporting.charts import charts, evaluation_charts, spread_out
from freqmask.reporting.reading import Run, read_results, read_runs
from freqmask.reporting.summary import differences, metadata, remarks, repeat_command
from freqmask.reporting.tables import Row, evaluation_table
from freqmask.training.files import replace_atomically
from freqmask.training.run_folder import now

WIDEST = 1400  # pixels; previews are drawn about this wide
NARROWEST = 640  # below it the titles in a preview cannot be read
MOST = 60  # previews of a run; a slider with more is no finer to the hand
WANTED = 24  # previews for which sharpness is given up
QUALITY = 75  # of WebP

REPORT = "report.html"
LIMIT = 4_300_000  # bytes of a page, 1.2 million of them the charting library
PREVIEW_BYTES = 2_600_000  # of all runs, where so much is left
PLAN_SHARE = 0.15  # of a run's bytes for images; half of them where the plan does not fit into that
MOST_RUNS = 24  # overlaid, a chart with more cannot be read
_NO_ROOM = "{} left out: this page has no room for more; name fewer runs, or open {}."
_LISTED = 200  # skipped images a run; skipped.csv has them all
_WITHOUT_IMAGES = '<meta name="freqmask-images" content="no">'
_HERE = Path(__file__).parent
# plotly.js-basic-dist-min of npm, its licence beside it: scatter and bars are all that the page draws, in a quarter of
# the whole library's size
_SCRIPTS = ("plotly-basic.min.js", "page.js")


@dataclass(frozen=True)
class Embedded:
    """An image as the page holds it: the step that it shows, a data URI, width and height in pixels."""

    step: int
    source: str
    width: int
    height: int


def embed(path: Path, step: int = 0, widest: int = WIDEST) -> Embedded | None:
    """The image as WebP in a data URI; None where the file is no image that can be read."""
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
    return Embedded(step, source, image.width, image.height)


def embed_images(files: Sequence[tuple[int, Path]], budget: int) -> tuple[list[Embedded], list[str]]:
    """Images spread evenly over the files, first and last among them, that fit into the budget.

    Args:
        files: step and file, rising.
        budget: bytes in the page.

    Returns:
        The images, and a sentence for each file that is no image.
    """
    samples, widest = spread_out(files, 3), WIDEST
    while True:
        sizes = [
            len(image.source) if image else 1 for image in (embed(path, 0, widest) for _, path in samples)
        ]
        size = sum(sizes) // max(len(sizes), 1) + 1
        if size * min(WANTED, len(files)) <= budget or widest <= NARROWEST:
            break
        widest = max(int(widest * 0.8), NARROWEST)
    chosen = spread_out(files, max(min(MOST, budget // size), 1))
    images = {path: embed(path, step, widest) for step, path in chosen}
    damaged = [f"{path.name} cannot be read as an image." for path, image in images.items() if image is None]
    good = [image for image in images.values() if image is not None]
    while good and sum(len(image.source) for image in good) > budget:
        good = spread_out(good, len(good) - 1)
    return good, damaged


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
        images: False leaves out previews and the image of the plan.
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
    # a file name may hold bytes that are no text; they are shown escaped
    content = render(runs, images, read_results(results)).encode("utf-8", "backslashreplace")
    try:
        replace_atomically(target, lambda path: path.write_bytes(content))
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
        return write_report([run], images=not _is_without_images(Path(run) / REPORT))
    except (UserError, OSError, ValueError) as error:
        say(f"note: the report was not written: {error}; `freqmask report {shell_word(run)}` tries again")
        return None


def _is_without_images(report: Path) -> bool:
    if not report.is_file():
        return False
    with report.open(encoding="utf-8", errors="replace") as file:
        return _WITHOUT_IMAGES in file.read(4096)


def render(runs: Sequence[Run], images: bool = True, others: Sequence[Row] = ()) -> str:
    """The page's HTML.

    Args:
        runs: in the order of their colors.
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
    environment.filters["options"] = _mark_options
    scripts = [(_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    evaluated = [*((run.name, run.results) for run in runs), ("", others)]
    drawn = [*charts(runs), *evaluation_charts(evaluated)]
    in_words = {"header", "rows", "meaning", "summary"}  # the template's; the script needs the rest
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
        "data": {
            "runs": len(runs),
            "charts": [{name: chart[name] for name in chart if name not in in_words} for chart in drawn],
        },
        "groups": _grouped(runs),
        "differences": differences(runs),
        "evaluation": evaluation_table(evaluated),
    }
    template = environment.get_template("page.html")
    parts = [_run_context(run) for run in runs]
    without = template.render(**context, runs=parts)
    if not images:
        return without
    # the words come first; images take what is left
    left = min(LIMIT - len(without.encode("utf-8", "backslashreplace")), PREVIEW_BYTES) // len(runs)
    parts = [part | _images(run, max(left, 0)) for part, run in zip(parts, runs, strict=True)]
    return template.render(**context, runs=parts)


def _mark_options(sentence: str) -> Markup:
    return Markup(re.sub(r"(?<!\S)--[\w-]+", r"<code>\g<0></code>", str(escape(sentence))))


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy: nothing is fetched, and no script runs but ours, whatever a name holds."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _grouped(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """What was run, by group, each line with its text in every run; lines that no run fills are left out."""
    texts = [metadata(run) for run in runs]
    groups: dict[str, list[tuple[str, list[str]]]] = {}
    for group, name in [(group, name) for group, names in texts[0].items() for name in names]:
        cells = [one[group][name] for one in texts]
        if any(cells):
            groups.setdefault(group, []).append((name, [cell or "–" for cell in cells]))
    return list(groups.items())


def _run_context(run: Run) -> dict[str, Any]:
    """One run as the template wants it, without images."""
    path = str(run.path.resolve()).encode("utf-8", "surrogateescape")
    # numbers apart, reasons of one kind are counted together
    reasons = (re.sub(r"\d+", "N", row.get("reason", "").split(":")[0]) for row in run.skipped)
    return {
        "name": run.name,
        "id": f"run-{hashlib.sha256(path).hexdigest()[:8]}",
        "path": str(run.path),
        "status": run.status,
        "remarks": remarks(run),
        "missing": run.missing,
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100),
        "repeat": repeat_command(run) if run.config else "",
        "images": [],
        "drawn": len(run.previews),
        "plan": None,
        "skipped": run.skipped[:_LISTED],
        "skipped_count": len(run.skipped),
        "reasons": Counter(reason or "no reason given" for reason in reasons).most_common(10),
    }


def _images(run: Run, budget: int) -> dict[str, Any]:
    """The plan and the previews within so many bytes of the page, and a sentence on each that has no room there."""
    plan: list[Embedded] = []
    broken: list[str] = []
    if run.plan is not None:
        for share in (PLAN_SHARE, 0.5):  # beside many runs 15 % are too few for any
            plan, broken = embed_images([(0, run.plan)], int(share * budget))
            if plan or broken:
                break
        else:
            broken = [_NO_ROOM.format("The image of the plan", run.plan)]
    images, damaged = embed_images(run.previews, budget - sum(len(image.source) for image in plan))
    if run.previews and not images and not damaged:
        damaged = [_NO_ROOM.format("The previews", run.path / "previews")]
    return {
        "images": images,
        "plan": plan[0] if plan else None,
        "missing": [*run.missing, *damaged, *broken],
    }
