"""Results in a notebook."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from search.report.front_picture import front_picture
from search.report.notebook import load_results, shown
from search.run_dir.files import RunError, write_json
from search.run_dir.scores import Records, fingerprint
from tests.search.report.test_report import PARTS, PLANS, make


def well_formed(page: str) -> bool:
    stack: list[str] = []

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            stack.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert stack.pop() == tag

    Check().feed(page)
    return not stack


def test_results_show_the_advice_the_front_and_its_numbers(tmp_path: Path) -> None:
    results = shown(make(tmp_path, PLANS))
    page = results._repr_html_()
    assert well_formed(page)
    assert results.best().plan in page
    assert "<svg" in page
    assert all(f"{s.metric:.2%}" in page for s in results.front.points)
    assert len(results.plot().data) >= 4


def test_points_that_were_scored_again_on_all_samples_are_drawn_as_points(tmp_path: Path) -> None:
    results = make(tmp_path, PLANS)
    again = replace(
        results.front, points=tuple(replace(s, samples=999) for s in results.front.points)
    )
    results = replace(results, front=again)
    assert front_picture(results).count('class="chosen"') == len(again.points)
    stopped = tuple(replace(s, stopped=True) for s in results.scores)
    drawn = front_picture(replace(results, scores=(*results.scores, *stopped)))
    assert drawn == front_picture(results)


def test_layers_show_their_causes(tmp_path: Path) -> None:
    found = shown(make(tmp_path, PLANS)).sensitivity
    assert found is not None
    page = found._repr_html_()
    assert well_formed(page)
    assert "7 layers" in page
    assert "weight_channel_spread" in page
    (bars,) = found.plot().data
    assert list(bars.x) == sorted(bars.x, reverse=True)


def test_a_run_that_has_only_begun_says_so(tmp_path: Path) -> None:
    make(tmp_path, PLANS)
    (tmp_path / "scores.jsonl").unlink()
    Records(tmp_path, fingerprint(PARTS))
    with pytest.raises(RunError, match="no plan is scored yet"):
        load_results(tmp_path)
    write_json(tmp_path / "run.json", {"parts": PARTS})
    with pytest.raises(Exception, match="no plan is scored yet"):
        load_results(tmp_path)
