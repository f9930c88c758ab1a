"""The report in a real browser: from the disk, without a network, by mouse, keyboard and finger."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run, result

from freqmask.reporting.page import write_report

HOSTILE = "<script>document.title='broken'</script><img src=http://example.invalid/x>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytest.importorskip("playwright.sync_api", reason="playwright comes with freqmask[dev]")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [
        make_run(
            folder / "first", {"filter": HOSTILE}, skipped=[(HOSTILE, "bad")], results=[result("x", 0.4)]
        ),
        make_run(folder / "second", {"lr": 0.5}, rows=400, results=[result("x", 0.6, variant=HOSTILE)]),
    ]
    return write_report(runs, folder / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=[1280, 390], ids=["desk", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Any]:
    """The report opened; at its end nothing was requested and nothing complained."""
    context = browser.new_context(viewport={"width": request.param, "height": 800})
    tab = context.new_page()
    trouble: list[str] = []
    tab.on("console", lambda message: trouble.append(message.text))
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on(
        "request",
        lambda sent: trouble.append(sent.url) if not sent.url.startswith(("file:", "data:")) else None,
    )
    tab.goto(report.as_uri())
    tab.wait_for_selector("html[data-drawn='1']", timeout=60_000)
    yield tab
    assert trouble == []
    context.close()


def test_the_page_fits_and_charts_are_drawn_for_both_runs(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.locator("#chart-loss .legendtext").all_text_contents() == ["first", "second"]
    width, room = page.evaluate(
        "['.main-svg', '.plot'].map(name => document.querySelector('#chart-loss ' + name).clientWidth)"
    )
    assert 0.9 * room <= width <= room + 1


def test_the_slider_changes_the_picture_by_keyboard_in_all_runs(page: Any) -> None:
    sliders = page.locator("input[type=range]")
    shown = page.locator("[data-previews] img:visible")
    before = [shown.nth(number).get_attribute("src") for number in range(2)]
    sliders.first.focus()
    page.keyboard.press("ArrowLeft")
    assert [shown.nth(number).get_attribute("data-step") for number in range(2)] == ["20", "20"]
    assert all(shown.nth(number).get_attribute("src") != before[number] for number in range(2))
    assert sliders.nth(1).get_attribute("aria-valuetext") == "step 20"
    page.locator("#linked").uncheck()
    page.keyboard.press("Shift+Tab")
    sliders.first.focus()
    page.keyboard.press("Home")
    assert [shown.nth(number).get_attribute("data-step") for number in range(2)] == ["10", "20"]


VALUES = """[...document.querySelector('#chart-loss .plot').data].flatMap(
    trace => [...trace.y].filter((value, at) => trace.x[at] >= 5 && trace.x[at] <= 20))"""


def steps_shown(page: Any, key: str) -> list[float]:
    shown: list[float] = page.evaluate(f"document.querySelector('#chart-{key} .plot').layout.xaxis.range")
    return shown


def test_the_fields_zoom_every_chart(page: Any) -> None:
    page.fill("#from-step", "5")
    page.keyboard.press("Tab")
    page.wait_for_selector("html[data-drawn='2']")
    page.keyboard.type("20")
    page.keyboard.press("Tab")
    page.wait_for_selector("html[data-drawn='3']")
    assert [steps_shown(page, key) for key in ("loss", "lr")] == [[5, 20], [5, 20]]
    low, high = page.evaluate("document.querySelector('#chart-loss .plot').layout.yaxis.range")
    values = page.evaluate(VALUES)
    assert low < min(values) and max(values) < high < 1.2 * max(values) - 0.2 * min(
        values
    )  # the values shown fill it
    page.click("#reset")
    page.wait_for_selector("html[data-drawn='4']")
    assert steps_shown(page, "loss")[1] > 300


def test_a_hostile_name_stays_text(page: Any) -> None:
    assert page.title() == "2 runs · freqmask report"
    assert HOSTILE in page.locator("#skipped").inner_text()
    assert page.locator("img[src^=http]").count() == 0
    assert "<script>" in page.locator("#evaluation .plot").last.text_content()


def test_colours_follow_the_system(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-drawn='2']")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert page.evaluate("document.querySelector('#chart-loss .plot').layout.font.color") == "#e8eaee"
