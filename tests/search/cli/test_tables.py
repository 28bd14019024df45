"""What the terminal shows of a run: narrow, in words, and in full where asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.cli import summary
from search.cli.front_plot import front_plot
from search.report.rows import apart, chosen_few, in_all, numbered
from tests.search.report.long_front import make_front
from tests.search.report.test_report import PLANS, make


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("count", [1, 8, 40])
def test_the_front_has_five_columns_in_a_hundred_and_no_exact_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    results = make(tmp_path, PLANS) if count == 1 else make_front(tmp_path, count)
    summary.show_results(results, quiet=False)
    shown = lines(capsys)
    tables = [line for line in shown if line[:1] in "┏┃┡│└"]
    assert tables
    assert max(map(len, tables)) <= 100
    assert {line.count("┃") for line in tables if line.startswith("┃")} == {6}
    assert not any("keep_float@" in line or "merge_separable@" in line for line in shown)


def test_in_full_every_plan_of_the_front_is_there_as_it_is_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = make_front(tmp_path, 20)
    summary.show_results(results, quiet=False, full=True)
    shown = [line.strip() for line in lines(capsys)]
    assert all(s.plan in shown for s in results.front.all())
    assert any("most harmful layers left in float" in line for line in shown)


def test_the_plot_puts_dearer_plans_to_the_right_and_better_ones_above(tmp_path: Path) -> None:
    results = make_front(tmp_path, 8)
    plot = front_plot(results)
    rows = [line.partition("|")[2] for line in plot if "|" in line]
    at = {
        mark.split()[0]: (row.index(mark.split()[0]), -i)
        for mark, _ in numbered(results)
        for i, row in enumerate(rows)
        if mark.split()[0] in row
    }
    places = [at[mark.split()[0]] for mark, s in numbered(results) if s in results.front.points]
    assert len(places) >= 6
    assert places == sorted(places)
    assert [height for _, height in places] == sorted(height for _, height in places)


def test_a_long_front_is_thinned_and_what_matters_is_kept(tmp_path: Path) -> None:
    results = make_front(tmp_path, 40)
    few = chosen_few(results, 12)
    assert len(few) <= 12
    kept = [s for _, s in few]
    assert {results.best(), results.knee(), results.front.all()[0]} <= set(kept)
    assert [s.macs for s in kept] == sorted(s.macs for s in kept)
    shared = in_all(results)
    assert shared
    assert all(set(shared) <= set(s.plan.split()) for s in results.front.all())
    assert all("rounding" not in apart(results, s.plan) for s in kept)
    assert all(apart(results, s.plan).exact == s.plan for s in kept)


def test_plans_of_one_cost_are_no_plot(tmp_path: Path) -> None:
    assert front_plot(make(tmp_path, ["", "keep_float@dw0"])) == []
