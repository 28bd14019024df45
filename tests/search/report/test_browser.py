"""The report in a browser: it opens without errors and without the network, and points answer the mouse."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.report import write_report
from tests.search.report.test_report import PLANS, make

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = os.environ.get("QUANTFIX_CHROMIUM") or next(
        filter(None, map(shutil.which, NAMES)), None
    )
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with sync_api.sync_playwright() as driver:
        # without a sandbox, since continuous integration runs as root
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


def open_page(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str], list[str]]:
    """The page, its console errors, and what it asked for; both lists go on growing."""
    page = browser.new_page(viewport={"width": 1100, "height": 900}, **options)
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    page.goto(path.as_uri())
    page.wait_for_selector("#front-plot .scatterlayer .point")
    return page, errors, requests


def hovered(page: Any, plot: str, index: int) -> str:
    point = page.locator(f"{plot} .cartesianlayer .point").nth(index)
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector(f"{plot} .hoverlayer .hovertext")
    return str(page.locator(f"{plot} .hoverlayer").text_content())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_opens_answers_and_asks_for_nothing(
    browser: Any, tmp_path: Path, scheme: str
) -> None:
    results = make(tmp_path, PLANS)
    path, _ = write_report(results)
    page, errors, requests = open_page(browser, path, color_scheme=scheme)
    names = [str(t) for t in page.locator("#front-plot .legendtext").all_text_contents()]
    assert {"front", "plain int8", "float"} <= set(names)
    said = hovered(
        page, "#front-plot", page.locator("#front-plot .cartesianlayer .point").count() - 1
    )
    assert "MACs" in said or "float, as it is" in said
    seen = [
        hovered(page, "#front-plot", i)
        for i in range(page.locator("#front-plot .cartesianlayer .point").count())
    ]
    assert any(results.best().plan.split()[0] in text for text in seen)
    assert "weight_channel_spread" in hovered(page, "#layers-plot", 0)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    drawn = page.evaluate("document.getElementById('front-plot')._fullLayout.paper_bgcolor")
    numbers = [int(n) for n in paper.strip("rgb()").split(",")]
    assert (sum(numbers) > 600) == (scheme == "light")
    assert drawn.lower() in ("#fff", "#0d1117")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function(
        "document.documentElement.scrollWidth <= innerWidth"
    )  # plots follow later
    assert errors == []
    assert [r for r in requests if not r.startswith("data:")] == [path.as_uri()]
    page.close()


@pytest.mark.slow
def test_every_picture_has_a_text_and_the_page_landmarks(browser: Any, tmp_path: Path) -> None:
    path, _ = write_report(make(tmp_path, PLANS))
    page, _, _ = open_page(browser, path)
    unnamed = page.evaluate(
        "[...document.querySelectorAll('[role=img]')].filter(e => !e.getAttribute('aria-label')).length"
    )
    assert unnamed == 0
    for landmark in ("header", "nav", "main", "h1"):
        assert page.locator(landmark).count() == 1, landmark
    assert page.locator("section:not([aria-labelledby])").count() == 0
    assert page.locator("th:not([scope])").count() == 0
    targets = page.evaluate(
        "[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))"
    )
    assert targets
    assert all(page.locator(t).count() == 1 for t in targets)
    page.close()


@pytest.mark.slow
def test_printed_in_dark_it_is_light(browser: Any, tmp_path: Path) -> None:
    path, _ = write_report(make(tmp_path, PLANS))
    page, errors, _ = open_page(browser, path, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    assert (
        page.evaluate("document.getElementById('front-plot')._fullLayout.paper_bgcolor") == "#fff"
    )
    assert page.locator("details:not([open])").count() == 0
    assert page.locator("nav").is_hidden()
    page.set_viewport_size({"width": 690, "height": 980})  # A4 within its margins
    beyond = (
        "[...document.querySelectorAll('table')].filter(t => t.scrollWidth > innerWidth).length"
    )
    assert page.evaluate(beyond) == 0
    assert errors == []
    page.close()
