"""Rows of results.csv: as they stand, as means over seeds, and as bars with their spread."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from freqmask.reporting.reading import Run

SCORES = ("accuracy", "miou", "mean_iou", "score")  # the first that a row has is what its bar shows
MOST_ROWS = 2_000  # in the page
MOST_BARS = 40
# What is measured; rows that agree in these and in the seed are the same measurement made again.
_SAME = ("protocol", "variant", "data", "split", "test_images", "classes", "model", "feature", "learnt_from")

Row = Mapping[str, str]


@dataclass(frozen=True)
class Measured:
    """One protocol and variant on one data set, over seeds.

    Attributes:
        protocol: of the evaluation.
        variant: such as ``k=20``.
        data: the images' name.
        model: as the row names it.
        score: name of the score.
        values: one a seed, as they stand in the table (accuracy in [0, 1]).
        interval: 95 % over test images, where the rows give one.
    """

    protocol: str
    variant: str
    data: str
    model: str
    score: str
    values: tuple[float, ...]
    interval: tuple[float, float] | None

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def measured(rows: Sequence[Row]) -> list[Measured]:
    """Rows joined over seeds; of a measurement that was made again the last counts; rows without score are left out."""
    newest = {(*(row.get(name, "") for name in _SAME), row.get("seed", "")): row for row in rows}
    families: dict[tuple[str, ...], list[Row]] = {}
    for key, row in newest.items():
        if score_name(row) is not None:
            families.setdefault(key[:-1], []).append(row)
    return [_joined(family) for family in families.values()]


def _joined(family: Sequence[Row]) -> Measured:
    first = family[0]
    score = score_name(first) or ""
    ends = [[_number(row.get(f"{score}_{end}", "")) for row in family] for end in ("low", "high")]
    known = all(math.isfinite(value) for values in ends for value in values)
    return Measured(
        first.get("protocol", ""),
        first.get("variant", ""),
        first.get("data", ""),
        first.get("model", ""),
        score,
        tuple(_number(row[score]) for row in family),
        (statistics.fmean(ends[0]), statistics.fmean(ends[1])) if known else None,
    )


def score_name(row: Row) -> str | None:
    """The score of a row that a bar shows, or None where there is no number."""
    return next((name for name in SCORES if math.isfinite(_number(row.get(name, "")))), None)


@dataclass(frozen=True)
class Rows:
    """The rows of one results.csv.

    Attributes:
        owner: the run that they belong to; empty for a table of models that are no runs (``--results``).
        colour: number of the owner's colour in the page.
        rows: as read.
    """

    owner: str
    colour: int
    rows: Sequence[Row]


def rows_of(runs: Sequence[Run], extra: Sequence[Row] = ()) -> list[Rows]:
    """The rows of all runs and those of other models."""
    own = [Rows(run.name, number, run.results) for number, run in enumerate(runs)]
    return own + ([Rows("", len(runs), extra)] if extra else [])


def evaluation_table(tables: Sequence[Rows]) -> dict[str, Any]:
    """Every evaluation row.

    Returns:
        ``header`` and ``rows``, the last so many; ``count``: how many there are; ``alike``: columns that say the
        same in every row, with what they say, which are left out of the rows.
    """
    pairs = [(table.owner or row.get("model", ""), row) for table in tables for row in table.rows]
    columns = list(dict.fromkeys(name for _, row in pairs for name in row))
    alike = {
        name: pairs[0][1].get(name, "")
        for name in columns
        if len(pairs) > 1 and len({row.get(name, "") for _, row in pairs}) == 1
    }
    shown = [name for name in columns if name not in alike]
    rows = [[owner, *(row.get(name, "") for name in shown)] for owner, row in pairs]
    return {
        "header": ["run", *shown],
        "rows": rows[-MOST_ROWS:],
        "count": len(rows),
        "alike": [(name, text) for name, text in alike.items() if text],
    }


def evaluation_charts(tables: Sequence[Rows]) -> list[dict[str, Any]]:
    """Bars, a chart for each protocol and data set; the same mapping as of the curves, with ``bars``."""
    found = [(table, one) for table in tables for one in measured(table.rows)]
    kinds = list(dict.fromkeys((one.protocol, one.data, one.score) for _, one in found))
    return [
        _chart(
            f"bars-{number}",
            kind,
            [(table, one) for table, one in found if (one.protocol, one.data, one.score) == kind],
        )
        for number, kind in enumerate(kinds)
    ]


def _chart(key: str, kind: tuple[str, str, str], parts: Sequence[tuple[Rows, Measured]]) -> dict[str, Any]:
    protocol, data, score = kind
    shown = parts[:MOST_BARS]
    labels = [_label(table, one) for table, one in shown]
    cells = [_cell(one) for _, one in shown]
    spreads = [_spread(one) for _, one in shown]
    named = f"{protocol} on {data}" if data else protocol
    more = f" The first {MOST_BARS} of {len(parts)}." if len(parts) > MOST_BARS else ""
    return {
        "key": key,
        "bars": True,
        "title": named,
        "unit": f"{score} in %",
        "meaning": f"{score} in %. Whiskers: standard deviation over seeds where there are several, else the "
        f"95 % interval over test images.{more}",
        "summary": " ".join(f"{label}: {cell}." for label, cell in zip(labels, cells, strict=True)),
        "traces": [
            {
                "name": html.escape(named),
                "labels": [html.escape(label) for label in labels],
                "values": [round(100 * one.mean, 3) for _, one in shown],
                "below": [round(100 * below, 3) for below, _ in spreads],
                "above": [round(100 * above, 3) for _, above in spreads],
                "colours": [table.colour for table, _ in shown],
            }
        ],
        "header": ["model", f"{score} in %"],
        "rows": [list(pair) for pair in zip(labels, cells, strict=True)],
    }


def _label(table: Rows, one: Measured) -> str:
    who = table.owner or one.model
    return f"{who} · {one.variant}" if one.variant else who


def _spread(one: Measured) -> tuple[float, float]:
    if one.deviation is not None:
        return one.deviation, one.deviation
    if one.interval is not None:
        return max(one.mean - one.interval[0], 0.0), max(one.interval[1] - one.mean, 0.0)
    return 0.0, 0.0


def _cell(one: Measured) -> str:
    text = f"{100 * one.mean:.1f}"
    if one.deviation is not None:
        return f"{text} ± {100 * one.deviation:.1f} over {len(one.values)} seeds"
    if one.interval is not None:
        return f"{text}, interval {100 * one.interval[0]:.1f} to {100 * one.interval[1]:.1f}"
    return text


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
