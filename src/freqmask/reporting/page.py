"""One self-contained HTML page from run folders: its curves, thinned for the eye, its images, its words."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
import yaml
from markupsafe import Markup, escape
from PIL import Image

from freqmask import __version__
from freqmask.console import rank, say, shell_path
from freqmask.errors import UserError
from freqmask.reporting.reading import Curve, Run, read_results, read_runs
from freqmask.reporting.summary import differences, metadata, remarks, repeat_command, wording
from freqmask.reporting.tables import Row, evaluation_charts, evaluation_table
from freqmask.training.files import replace_atomically
from freqmask.training.run_folder import now

Item = TypeVar("Item")

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

POINTS = 60_000  # in the whole page, over all curves of all runs: about 1 MB
MOST_A_CURVE = 2_000  # no screen shows more
TREND_FROM = 300  # points from which a curve is too ragged to be read without its mean
TREND_PARTS = 100
TABLE_ROWS = 12
WIDE = 5  # largest over smallest value from which a linear scale hides the smaller lines
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_LINES_TOGETHER = 3  # columns of several runs that one chart can hold and be read


def spread_out(items: Sequence[Item], most: int) -> list[Item]:
    """At most ``most`` of the items, evenly spaced, the first and the last among them.

    >>> spread_out(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= most:
        return list(items)
    if most <= 1:
        return [items[-1]][:most]
    places = np.linspace(0, len(items) - 1, most).round().astype(int)
    return [items[place] for place in places]


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
    image.thumbnail((widest, image.height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Embedded(step, source, image.width, image.height)


def embed_images(files: Sequence[tuple[int, Path]], budget: int) -> tuple[list[Embedded], list[str]]:
    """Images spread evenly over the files, first and last among them, that fit into ``budget`` bytes of the page.

    Beside them a sentence for each file that is no image.
    """
    if not files or budget <= 0:
        return [], []
    samples, widest = spread_out(files, 3), WIDEST
    while True:
        sizes = [
            len(image.source) if image else 1 for image in (embed(path, 0, widest) for _, path in samples)
        ]
        size = sum(sizes) // len(sizes) + 1
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
    target = (
        Path(out).expanduser() if out is not None else (runs[0].path if len(runs) == 1 else Path()) / REPORT
    )
    # a file name may hold bytes that are no text; they are shown escaped
    content = render(runs, images, read_results(results)).encode("utf-8", "backslashreplace")
    replace_atomically(target, lambda path: path.write_bytes(content))
    return target


def refresh_report(run: str | Path) -> Path | None:
    """Write a run's own report again; a report never stops what calls it.

    One that was asked for without images stays without.

    Returns:
        The file, or None where it could not be written, after a sentence that says why.
    """
    if rank() != 0:
        return None
    report = Path(run) / REPORT
    try:
        images = True
        if report.is_file():
            with report.open(encoding="utf-8", errors="replace") as file:
                images = _WITHOUT_IMAGES not in file.read(4096)
        return write_report([run], images=images)
    except (UserError, OSError, ValueError) as error:
        say(f"note: the report was not written: {error}; `freqmask report {shell_path(run)}` tries again")
        return None


def render(runs: Sequence[Run], images: bool = True, others: Sequence[Row] = ()) -> str:
    """The page's HTML, of runs in the order of their colors and of evaluation rows of models that are no runs."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,  # names of files, classes and runs are data
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["options"] = lambda sentence: Markup(
        re.sub(r"(?<!\S)--[\w-]+", r"<code>\g<0></code>", str(escape(sentence)))
    )
    scripts = [(_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    compared = [*(row for run in runs for row in run.others), *others]
    evaluated: list[tuple[str, Sequence[Row]]] = [*((run.name, run.results) for run in runs), ("", compared)]
    drawn = [*charts(runs), *evaluation_charts(evaluated)]
    of_template = {"header", "rows", "meaning", "summary", "columns"}  # the script needs the rest
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
            "charts": [{name: chart[name] for name in chart if name not in of_template} for chart in drawn],
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
        cells = [text[group][name] for text in texts]
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


@dataclass(frozen=True)
class Panel:
    """One chart of curves."""

    key: str  # its anchor in the page
    title: str  # above it
    meaning: str  # how to read it, for somebody who has not read the papers
    columns: str  # pattern of the columns that it shows
    reference: float | None = None  # a level that means something
    logarithmic: bool = True  # whether the scale may be switched to a logarithmic one
    wide: bool = False  # whether it is logarithmic at once where the lines lie far apart


PANELS = (
    Panel(
        "zero",
        "Relative loss (1 = zero prediction)",
        "1 means that nothing has been learned: an empty prediction would do as well. Apart for each filter, and "
        "for held-out images where there are some.",
        r"(held_out_)?relative_loss(/(?!band_).*)?",
        reference=1.0,
        logarithmic=False,
    ),
    Panel(
        "bands",
        "The same by frequency",
        "Bands of radii in the spectrum, in cycles per shorter side: low numbers are shapes, high numbers are fine "
        "detail. Low bands fall first; a band that stays at 1 is not being learned.",
        r"relative_loss/band_.*",
        reference=1.0,
        wide=True,
    ),
    Panel(
        "loss",
        "Loss and its parts",
        "What the training lowers. Its height means little by itself; the first chart gives it a scale.",
        r"loss|held_out_loss",  # and the parts that a run names
    ),
    Panel(
        "probe",
        "Probes on labelled images",
        "How well the frozen features tell classes apart during the training. Higher is better.",
        r".*(knn|linear|probe|accuracy).*",
        logarithmic=False,
    ),
    Panel(
        "rankme",
        "RankMe",
        "The effective number of dimensions that the features use. A fall towards 1 is a collapse.",
        r".*rank_?me.*",
    ),
    Panel(
        "collapse",
        "Collapse number of the teacher, in nats",
        "Entropy of the teacher's mean answer minus its mean entropy. Below 0.1 after warm-up nearly all images get "
        "the same answer: the run has collapsed.",
        r"collapse",
        reference=0.1,
        logarithmic=False,
    ),
    Panel("lr", "Learning rate", "A linear warm-up, then a cosine.", r"lr|learning_rate.*"),
    Panel(
        "grad_norm",
        "Gradient norm",
        "Before it is clipped. Rare spikes are harmless; a steady rise comes before a loss that is not a number.",
        r"grad(ient)?_norm.*",
    ),
    Panel("speed", "Images per second", "Without previews and checkpoints.", r"images_per_second"),
    Panel(
        "wait",
        "Share of the time spent waiting for images",
        "Above some 0.1 the loader slows the training: more workers, smaller files.",
        r"data_wait_share",
        logarithmic=False,
    ),
    Panel("weight_decay", "Weight decay", "Constant unless weight_decay_end is given.", r"weight_decay"),
)


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Everything the page needs to draw the curves of all runs.

    Returns:
        One mapping a chart: ``key``, ``title``, ``meaning``, ``summary`` (a sentence for those who cannot see
        it), ``traces``, ``reference``, ``logarithmic``, ``wide``, and ``header`` and ``rows`` of its table.
    """
    columns = list(dict.fromkeys(name for run in runs for name in run.curves))
    left = [name for name in columns if name not in ("step", "epoch")]
    most = max(min(POINTS // max(sum(len(run.curves) for run in runs), 1), MOST_A_CURVE), 50)
    drawn: list[dict[str, Any]] = []
    for panel in PANELS:
        parts = {name for run in runs for name in run.loss_parts} if panel.key == "loss" else ()
        chosen = sorted((n for n in left if n in parts or re.fullmatch(panel.columns, n)), key=_in_order)
        left = [name for name in left if name not in chosen]
        drawn += _panel_charts(panel, chosen, runs, most)
    for name in left:  # columns that a method of somebody's own logs
        panel = Panel(f"other-{len(drawn)}", name, "Logged by the method.", re.escape(name))
        drawn += _panel_charts(panel, [name], runs, most)
    return drawn


def _in_order(column: str) -> tuple[int, float, str]:
    band = re.search(r"band_([\d.]+)", column)
    order = 0 if column in ("loss", "relative_loss") else 1 if column.startswith("held_out") else 2
    return (order, float(band[1]) if band else 0.0, column)


def _panel_charts(panel: Panel, columns: list[str], runs: Sequence[Run], most: int) -> list[dict[str, Any]]:
    curves = [run.curves[name] for run in runs for name in columns if name in run.curves]
    if not curves or (panel.key == "weight_decay" and all(np.ptp(curve.values) == 0 for curve in curves)):
        return []
    if len(runs) == 1 or len(columns) <= _LINES_TOGETHER:
        return [_chart(panel, columns, runs, most)]
    return [
        _chart(
            replace(panel, key=f"{panel.key}-{number}", title=f"{panel.title}: {wording(column)}"),
            [column],
            runs,
            most,
        )
        for number, column in enumerate(columns)
    ]


def _chart(panel: Panel, columns: list[str], runs: Sequence[Run], most: int) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    named: list[tuple[str, Curve]] = []
    for number, run in enumerate(runs):
        for part, column in enumerate(name for name in columns if name in run.curves):
            words = [run.name] * (len(runs) > 1) + [wording(column)] * (len(runs) == 1 or len(columns) > 1)
            name, curve = ": ".join(words), run.curves[column]
            color, dash = (number, DASHES[part % len(DASHES)]) if len(runs) > 1 else (part, "solid")
            named.append((name, curve))
            for line, faint in _lines(curve, most):
                points = {
                    "x": np.round(line.steps).astype(int).tolist(),
                    "y": [float(f"{y:.5g}") for y in line.values],
                }
                traces.append(
                    {"name": html.escape(name), "color": color, "dash": dash, **points, "faint": faint}
                )
    header, rows = _numbers(named)
    lowest = min(curve.values.min() for _, curve in named)
    spread = max(curve.values.max() for _, curve in named) / lowest if lowest > 0 else 0.0
    return asdict(panel) | {
        "summary": " ".join(_sentence(name, curve) for name, curve in named),
        "traces": traces,
        "logarithmic": bool(panel.logarithmic and lowest > 0),
        "wide": bool(panel.wide and spread > WIDE),
        "header": header,
        "rows": rows,
    }


def _lines(curve: Curve, most: int) -> Iterator[tuple[Curve, bool]]:
    """The curve; a long one as a faint band of its extremes under the line of its mean."""
    if len(curve.steps) < TREND_FROM:
        yield curve, False
        return
    yield curve.thinned(most - TREND_PARTS if most > 200 else most), True
    yield curve.trend(TREND_PARTS), False


def _sentence(name: str, curve: Curve) -> str:
    low, high = float(curve.values.min()), float(curve.values.max())
    text = (
        f"{name}: from {curve.values[0]:.4g} at step {curve.steps[0]:,.0f} to {curve.last:.4g} "
        f"at step {curve.steps[-1]:,.0f}, lowest {low:.4g}, highest {high:.4g}"
    )
    return text + (f", {curve.not_finite:,} values that are no numbers." if curve.not_finite else ".")


def _numbers(named: Sequence[tuple[str, Curve]]) -> tuple[list[str], list[list[str]]]:
    """A few rows of the chart as a table: at these steps the last value known."""
    steps = np.unique(np.concatenate([curve.steps for _, curve in named]))
    rows = []
    for step in spread_out(steps.tolist(), TABLE_ROWS):
        cells = [f"{step:,.0f}"]
        for _, curve in named:
            before = np.searchsorted(curve.steps, step, side="right")
            cells.append(f"{curve.values[before - 1]:.4g}" if before and step <= curve.steps[-1] else "")
        rows.append(cells)
    return ["step", *(name for name, _ in named)], rows
