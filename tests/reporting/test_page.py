"""The page: self-contained, complete, harmless whatever a name holds."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import make_run, result
from PIL import Image

from freqmask.errors import UserError
from freqmask.reporting.page import _images as images_of
from freqmask.reporting.page import embed_images, refresh_report, render, write_report
from freqmask.reporting.reading import read_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


class Elements(HTMLParser):
    """Collects the elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def written(*args: Any, **options: Any) -> str:
    return write_report(*args, **options).read_text(encoding="utf-8")


def data_of(text: str) -> Any:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def test_everything_is_in_the_page(tmp_path: Path) -> None:
    rows = [result("a", 0.40), result("a", 0.44, seed=1)]
    text = written([make_run(tmp_path / "a", skipped=[("broken.jpg", "cut short")], results=rows)])
    said = html.unescape(text)
    for part in ("40 steps of 8 images", "broken.jpg", "cut short", "42.0 ± 2.8 over 2 seeds", "config.yaml"):
        assert part in said
    keys = {chart["key"] for chart in data_of(text)["charts"]}
    assert {"loss", "zero", "bands", "lr", "grad_norm", "bars-0"} <= keys
    assert len(re.findall("data-step=", text)) == 3


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "a",
        {"filter": HOSTILE, "data": [HOSTILE]},
        skipped=[(HOSTILE, HOSTILE)],
        results=[result(HOSTILE, 0.4, data=HOSTILE, variant=HOSTILE)],
    )
    metrics = folder / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("grad_norm", '"<script>alert(3)</script>"', 1))
    elements = Elements(written([folder]))
    assert len(elements.named("script")) == 3
    assert not [
        attributes for _, attributes in elements.found if any(name.startswith("on") for name in attributes)
    ]
    assert len(elements.named("img")) == 3
    assert all(str(image["src"]).startswith("data:") for image in elements.named("img"))


def test_nothing_points_outside(tmp_path: Path) -> None:
    text = written([make_run(tmp_path / "a")])
    elements = Elements(text)
    links = [
        value
        for _, attributes in elements.found
        for name, value in attributes.items()
        if name in ("src", "href")
    ]
    assert any(str(link).startswith("data:") for link in links)
    assert all(str(link).startswith(("data:", "#")) for link in links)
    policy = next(meta["content"] for meta in elements.named("meta") if meta.get("http-equiv"))
    assert str(policy).startswith("default-src 'none'; script-src 'sha256-")


def test_every_picture_and_field_has_words(tmp_path: Path) -> None:
    elements = Elements(written([make_run(tmp_path / "a"), make_run(tmp_path / "b")], tmp_path / "r.html"))
    assert elements.named("img")
    assert all(image.get("alt") for image in elements.named("img"))
    ids = {attributes.get("id") for _, attributes in elements.found}
    for _, attributes in elements.found:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert attributes.get(name) is None or attributes[name] in ids
    labelled = {label.get("for") for label in elements.named("label")}
    sliders = [field.get("id") for field in elements.named("input") if field.get("type") == "range"]
    assert len(sliders) == 2
    assert set(sliders) <= labelled


def test_several_runs_are_overlaid_and_their_differences_listed(tmp_path: Path) -> None:
    text = written(
        [make_run(tmp_path / "a"), make_run(tmp_path / "b", {"method": "folk", "lr": 0.5})],
        tmp_path / "r.html",
    )
    (loss,) = [chart for chart in data_of(text)["charts"] if chart["key"] == "loss"]
    assert [trace["name"] for trace in loss["traces"]] == ["a", "b"]
    table = text[text.index('id="differences"') : text.index('id="curves"')]
    assert set(re.findall(r"<code>(\w+)</code>", table)) == {"lr", "method"}


def test_no_images_means_none_and_a_refresh_keeps_to_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    assert "data:image/webp" not in written([folder], images=False)
    assert refresh_report(folder) == folder / "report.html"
    assert "data:image/webp" not in (folder / "report.html").read_text(encoding="utf-8")
    assert "data:image/webp" in written([folder])


@pytest.mark.parametrize("gone", ["metrics.csv", "config.yaml", "run.json", "previews", "summary.json"])
def test_a_page_is_written_whatever_is_missing(tmp_path: Path, gone: str) -> None:
    folder = make_run(tmp_path / "a", results=[result("a", 0.4)])
    if (folder / gone).is_dir():
        for picture in (folder / gone).iterdir():
            picture.write_bytes(b"no picture")
    else:
        (folder / gone).unlink()
    text = written([folder])
    assert (
        "Not finished" if gone == "summary.json" else "missing" if gone != "previews" else "cannot be read"
    ) in text


def test_settings_of_the_wrong_kind_do_not_stop_the_page(tmp_path: Path) -> None:
    odd = {
        "steps": "many",
        "batch_size": None,
        "lr": "x",
        "crop_scale": [1],
        "devices": [0],
        "image_size": "q",
    }
    assert "many" in written([make_run(tmp_path / "a", odd)])


def test_a_long_run_is_thinned_and_not_cut(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", rows=6000, previews=0)
    text = written([folder])
    (loss,) = [chart for chart in data_of(text)["charts"] if chart["key"] == "loss"]
    faint, strong = loss["traces"]
    assert (faint["x"][0], faint["x"][-1], len(faint["x"]) <= 2000) == (1, 6000, True)
    assert len(strong["x"]) == 100


def test_a_part_that_a_method_declares_is_drawn_beside_the_loss_whatever_its_name(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("old", "new")]
    for folder in folders:
        metrics = folder / "metrics.csv"
        metrics.write_text(
            metrics.read_text().replace("grad_norm", "agreement", 1).replace("lr", "word_loss", 1)
        )
    state = json.loads((folders[1] / "run.json").read_text())
    (folders[1] / "run.json").write_text(json.dumps({**state, "parts": ["agreement"]}))
    old, new = (
        {
            chart["title"]: [trace["name"] for trace in chart["traces"]]
            for chart in data_of(written([folder]))["charts"]
        }
        for folder in folders
    )
    assert old["Loss and its parts"] == ["training", "word loss"]  # by the names of today's methods
    assert old["agreement"] == ["agreement"]
    assert new["Loss and its parts"] == ["training", "agreement"]
    assert new["word_loss"] == ["word loss"]


def test_of_many_runs_each_kind_of_image_is_kept_and_what_has_no_room_is_said(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (400, 1000, 3), dtype=np.uint8)
    runs = []
    for number in range(3):
        folder = make_run(tmp_path / f"run{number}", previews=0)
        for name in ("plan.png", "previews/step-000010.png", "previews/step-000020.png"):
            Image.fromarray(noise).save(folder / name)
        runs.append(read_run(folder))
    shown = render(runs)
    assert len(re.findall("data-step=", shown)) >= 3
    assert shown.count("drawn before the first step") == 3
    assert "left out" not in shown
    size = len(embed_images([(0, runs[0].plan)], 10**9)[0][0].source)
    plan, images, missing = (images_of(runs[0], size)[part] for part in ("plan", "images", "missing"))
    assert plan is not None and images and not missing
    nothing = images_of(runs[0], 1000)
    assert (nothing["plan"], nothing["images"]) == (None, [])
    assert [sentence.split(" left out")[0] for sentence in nothing["missing"]] == [
        "The previews",
        "The image of the plan",
    ]
    assert str(runs[0].plan) in nothing["missing"][1]


def test_the_page_carries_its_charting_library_and_stays_small(tmp_path: Path) -> None:
    text = written([make_run(tmp_path / "a")])
    assert "plotly.js (basic - minified)" in text
    assert len(text) < 1_400_000


def test_a_file_name_that_is_no_text_is_shown_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", skipped=[(b"caf\xe9.jpg".decode(errors="surrogateescape"), "bad")])
    assert "caf\\udce9.jpg" in written([folder])


def test_too_many_runs_and_an_unwritable_file_are_sentences(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    with pytest.raises(UserError, match=r"results .* must be a results\.csv .* does not exist"):
        write_report([folder], results=[tmp_path / "none.csv"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([folder], tmp_path / "file" / "report.html")


def test_a_refresh_that_fails_says_so_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refresh_report(tmp_path / "none") is None
    assert "the report was not written" in capsys.readouterr().out
