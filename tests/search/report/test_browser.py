"""The report in a browser: it opens without errors and without the network, and points answer the mouse."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.report import html_report
from tests.search.report.long_front import exhibits, make_front

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


def open_page(
    browser: Any, path: Path, width: int = 1400, **options: Any
) -> tuple[Any, list[str], list[str]]:
    """The page, its console errors, and what it asked for; both lists go on growing."""
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    page.goto(path.as_uri())
    return page, errors, requests


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Reports with 8 and with 40 plans offered for the front."""
    found: dict[int, Path] = {}
    for count in (8, 40):
        results = make_front(tmp_path_factory.mktemp(f"front{count}"), count)
        path = results.folder / "report.html"
        path.write_text(html_report(results, exhibits(results)))
        found[count] = path
    return found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("count", [8, 40])
def test_the_report_opens_answers_and_asks_for_nothing(
    browser: Any, pages: dict[int, Path], scheme: str, count: int
) -> None:
    page, errors, requests = open_page(browser, pages[count], color_scheme=scheme)
    assert pages[count].stat().st_size < 2_000_000
    dots = page.locator("#front-plot .on-wide .dot[data-plan]")
    assert dots.count() >= min(count, 8) - 1
    dots.nth(0).hover()
    assert "MACs" in str(page.locator("#tip").text_content())
    assert "@" not in str(page.locator("#tip").text_content())
    number = dots.nth(0).get_attribute("data-plan")
    dots.nth(0).click()
    shown = page.locator("article.plan:not([hidden])")
    assert shown.count() == 1
    assert shown.get_attribute("id") == f"plan-{number}"
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    numbers = [int(n) for n in paper.strip("rgb()").split(",")]
    assert (sum(numbers) > 600) == (scheme == "light")
    for width in (1400, 760, 380):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
    assert errors == []
    assert [r for r in requests if not r.startswith("data:")] == [pages[count].as_uri()]
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 380])
def test_labels_and_points_of_the_front_hide_nothing(
    browser: Any, pages: dict[int, Path], width: int
) -> None:
    page, _, _ = open_page(browser, pages[40], width)
    side = "on-wide" if width > 600 else "on-narrow"
    boxes = page.evaluate(
        """(side) => [...document.querySelectorAll(`.${side} circle, .${side} text.strong, .${side} g + text`)]
        .map(e => e.getBoundingClientRect()).map(r => [r.left, r.top, r.right, r.bottom])""",
        side,
    )
    assert len(boxes) > 20
    hidden = [
        (a, b)
        for i, a in enumerate(boxes)
        for b in boxes[:i]
        if min(a[2], b[2]) - max(a[0], b[0]) > 2 and min(a[3], b[3]) - max(a[1], b[1]) > 2
    ]
    assert not hidden


@pytest.mark.slow
def test_the_network_can_be_panned_and_a_click_shows_the_ranges(
    browser: Any, pages: dict[int, Path]
) -> None:
    page, errors, _ = open_page(browser, pages[8])
    frame = page.locator(".graph")
    frame.scroll_into_view_if_needed()
    assert page.evaluate("document.querySelector('.graph').scrollWidth") > 2000
    page.evaluate("document.querySelector('.graph').scrollLeft = 600")
    box = frame.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 200, y, steps=4)
    page.mouse.up()
    assert page.evaluate("document.querySelector('.graph').scrollLeft") == pytest.approx(
        800, abs=3
    )
    far = page.locator(".graph .node[data-layer=blocks_9_pw]").first
    assert page.locator("#ranges-blocks_9_pw").is_hidden()
    far.scroll_into_view_if_needed()
    far.click()
    assert page.locator("#ranges-blocks_9_pw").is_visible()
    before = page.evaluate("document.querySelector('.graph svg').clientWidth")
    page.locator("[data-zoom]").first.click()
    assert page.evaluate("document.querySelector('.graph svg').clientWidth") < before
    assert errors == []
    page.close()


@pytest.mark.slow
def test_every_picture_has_a_text_and_the_page_landmarks(
    browser: Any, pages: dict[int, Path]
) -> None:
    page, _, _ = open_page(browser, pages[8])
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
def test_printed_in_dark_it_is_light(browser: Any, pages: dict[int, Path]) -> None:
    page, errors, _ = open_page(browser, pages[40], color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("details:not([open])").count() == 0
    assert page.locator("nav").is_hidden()
    page.set_viewport_size({"width": 690, "height": 980})  # A4 within its margins
    beyond = (
        "[...document.querySelectorAll('table')].filter(t => t.scrollWidth > innerWidth).length"
    )
    assert page.evaluate(beyond) == 0
    assert errors == []
    page.close()
