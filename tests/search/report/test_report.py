from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rewriter.plan import Plan
from search.cli.tables import front_table
from search.pareto.front import Front
from search.pareto.plan_summary import plan_summary
from search.report import html_report, write_report
from search.report.facts import commands
from search.report.front import front_figure, groups, height
from search.report.layers import layers_figure
from search.report.verdict import advice
from search.results import Results, load_results, write_front
from search.run_dir.files import RunError, write_json
from search.run_dir.scores import Records, Score, fingerprint
from search.scoring.confirm import Confirmed
from search.strategy.space import Budget
from tests.search import fake

PARTS = {"model": "m"}


def make(folder: Path, plans: list[str], **facts: Any) -> Results:
    records = Records(folder, fingerprint(PARTS))
    evaluate = fake.FakeEvaluator(records, fails=frozenset({"keep_float@pw1"}))
    for plan in plans:
        evaluate(Plan.parse(plan))
    empty = records.get("")
    layers = [
        {"layer": n.replace("w", "w."), "node": n, "kind": "conv", "macs": 10, "damage": d,
         "causes": ["weight_channel_spread"], "answers": [f"keep_float@{n}"]}
        for n, d in sorted(fake.DAMAGE.items(), key=lambda item: -item[1])
    ]  # fmt: skip
    baseline = {"float": 0.8, "int8": empty and empty.metric, "macs": fake.MACS, "damage": 0.4}
    head = {"target": "t", "metric": "top1", "higher_is_better": True, "samples": 400}
    write_json(
        folder / "sensitivity.json",
        {**head, "engine": "simulate", "exact": False, "fingerprint": records.fingerprint,
         "baseline": baseline, "layers": layers},
    )  # fmt: skip
    about = {
        "config": "configs/<x>.yaml", "task": "classification", "engine": "formula",
        "calibration_samples": 16, "versions": {"torch": "2"}, "objective": "metric",
        "limits": {"macs": 1.15 * fake.MACS, "float_layers": 2}, "baseline": baseline,
        "parts": PARTS,
    } | head | facts  # fmt: skip
    write_json(folder / "run.json", about)
    return load_results(folder)


PLANS = ["", "keep_float@dw0", "keep_float@dw0 keep_float@dw1", "merge_separable@dw0",
         "keep_float@dw0 keep_float@dw1 keep_float@stem", "merge_separable@dw0 replace_block@stem",
         "keep_float@pw1"]  # fmt: skip


def test_front_json_is_the_contract(tmp_path: Path) -> None:
    results = make(tmp_path, PLANS)
    write_front(results)
    front = json.loads((tmp_path / "front.json").read_text())
    assert front["format"] == 1
    assert front.keys() >= {
        "target",
        "metric",
        "higher_is_better",
        "samples",
        "baseline",
        "points",
    }
    keys = {
        "plan",
        "macs",
        "macs_ratio",
        "float_layers",
        "int8",
        "int8_interval",
        "float",
        "damage",
    }
    assert all(p.keys() >= keys | {"engine"} for p in front["points"])
    assert front["baseline"]["damage"] == 0.4
    assert front["plans_scored"] == 7
    assert front["plans_failed"] == 1
    points = [(p["macs"], p["int8"]) for p in front["points"]]
    assert points == sorted(points)


def test_references_are_the_curve_of_float_layers_also_beyond_the_limit(tmp_path: Path) -> None:
    results = make(tmp_path, PLANS)
    assert [s.float_layers for s in results.references] == [0, 1, 2, 3]
    assert all(s.float_layers <= 2 for s in results.front.all())


def test_the_page_needs_no_network_and_escapes_what_users_wrote(tmp_path: Path) -> None:
    path, _ = write_report(make(tmp_path, PLANS))
    page = path.read_text()
    found = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'> ]+)", page)
    assert all(link.startswith(("#", "data:")) for link in found), found
    assert not re.search(r"url\(|@import|https?://", page)
    assert "<x>" not in page
    assert "&lt;x&gt;" in page or "&lt;x&gt" in page


def test_the_page_is_well_formed_and_says_everything(tmp_path: Path) -> None:
    page = html_report(make(tmp_path, PLANS))
    stack: list[str] = []

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "link"):
                stack.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert stack.pop() == tag

    Check().feed(page)
    assert stack == []
    for said in ("400 evaluation", "formula", "target", "95 %", "dw.0", "weight_channel_spread",
                 "planted", "quantfix export", "keep_float@dw0 keep_float@dw1"):  # fmt: skip
        assert said in page
    assert stack == []


def test_every_usable_plan_is_a_point_of_the_figure(tmp_path: Path) -> None:
    results = make(tmp_path, PLANS)
    drawn = {s.plan for scores in groups(results).values() for s in scores}
    assert drawn == {s.plan for s in results.scores if s.error is None}
    fig = front_figure(results)
    names = [t.name for t in fig.data]
    assert {"front", "plain int8", "harmful layers in float", "float"} <= set(names)
    front = fig.data[names.index("front")]
    assert [round(y, 6) for y in front.y] == [
        round(s.metric or 0, 6) for s in results.front.points
    ]
    said = " ".join(front.text)
    for score in results.front.points:
        assert f"{score.metric:.2%}" in said
        assert f"{score.macs / 1e6:.2f} M MACs" in said


def test_the_advice_names_the_plan_what_it_gains_and_what_it_costs(tmp_path: Path) -> None:
    results = make(tmp_path, PLANS)
    best = results.best()
    assert plan_summary(best.plan) in advice(results)
    number = results.front.all().index(best) + 1
    assert f"Ship plan {number} (" in advice(results)
    assert results.picked(str(number)) == best
    assert f"{best.metric:.2%}" in advice(results)
    assert "float 80.00%" in advice(results)
    alone = make(tmp_path / "alone", [""])
    assert advice(alone).startswith("Ship the network as it is")


def test_the_cheapest_plan_meets_both_goals(tmp_path: Path) -> None:
    results = make(tmp_path, PLANS)
    for drop in (0.5, 2.0, 6.0, 20.0):
        for ratio in (1.0, 1.1):
            meeting = [
                s for s in results.scores
                if s.error is None and s.metric is not None and s.float_layers <= 2
                and 100 * (0.8 - s.metric) <= drop and s.macs_ratio <= ratio
            ]  # fmt: skip
            found = results.cheapest(drop, ratio)
            assert (found is None) == (not meeting)
            if found is not None:
                assert found in meeting
                assert found.macs == min(s.macs for s in meeting)


def test_a_plan_is_picked_by_its_text_in_any_order(tmp_path: Path) -> None:
    results = make(tmp_path, PLANS)
    assert results.picked("keep_float@dw1 keep_float@dw0").float_layers == 2
    with pytest.raises(RunError, match="not among the 7 plans"):
        results.picked("keep_float@head")
    with pytest.raises(RunError, match="planted"):
        results.picked("keep_float@pw1")


def test_a_run_without_a_score_says_what_to_type(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"parts": PARTS, "config": "c.yaml"})
    with pytest.raises(RunError, match=r"quantfix run c\.yaml"):
        load_results(tmp_path)


def test_without_labels_the_page_shows_the_damage(tmp_path: Path) -> None:
    results = make(tmp_path, PLANS, objective="damage")
    assert "damage of int8, lower is better" in html_report(results)
    assert "damage" in advice(results)
    damages = [s.damage for s in results.front.points]
    assert damages == sorted(damages, key=lambda d: -(d or 0))


def test_the_table_marks_best_and_knee(tmp_path: Path) -> None:
    table = front_table(make(tmp_path, PLANS))
    marks = " ".join(str(c) for c in table.columns[0].cells)
    assert "best" in marks
    assert "knee" in marks


def test_limits_keep_plans_off_the_front_but_never_the_empty_one(tmp_path: Path) -> None:
    results = make(tmp_path, PLANS, limits={"macs": 10.0, "float_layers": 0})
    assert [s.plan for s in results.front.points] == [""]
    assert Budget(macs=10.0).meets(11, 0) is False
    assert results.within_limits(Score(plan="", macs=99))


def test_front_where_plain_int8_is_infinitely_bad(tmp_path: Path) -> None:
    """JSON has no infinity: such a damage is stored as none, which must not count as no damage."""
    records = Records(tmp_path, fingerprint(PARTS))
    records.add(Score(plan="", macs=fake.MACS, damage=float("inf")))
    results = make(tmp_path, PLANS, objective="damage")
    assert results.front.points
    content = results.front_dict()
    assert content["hypervolume"] > 0
    worst = max(s.damage for s in results.scores if s.damage is not None)
    assert content["hypervolume_reference"][1] == -worst
    points = [s.plan for s in results.front.points]
    assert results.knee().plan in points
    assert "" not in points


def test_how_to_repeat_says_the_trials_that_were_asked_for(tmp_path: Path) -> None:
    results = make(tmp_path, PLANS, options={"trials": 12, "seed": 3})
    assert commands(results)[0].endswith(f"--out {tmp_path} --trials 12 --seed 3")
    assert commands(make(tmp_path / "b", PLANS))[0].endswith(f"--out {tmp_path / 'b'}")


def test_a_plan_of_the_choosing_images_is_drawn_by_its_drop(tmp_path: Path) -> None:
    results = make(tmp_path, PLANS)
    score = replace(results.scores[1], metric=0.7, original=0.75, samples=200)
    known = Confirmed(score, score, score)
    whole = replace(results, held_back=200, chosen=Front(()), confirmed={score.plan: known})
    assert height(whole, score) == pytest.approx(0.8 - 0.05)
    assert height(whole, replace(score, samples=400)) == 0.7
    assert height(results, score) == 0.7


def test_a_value_that_no_layer_reads_is_shown_with_its_damage(tmp_path: Path) -> None:
    make(tmp_path, PLANS)
    path = tmp_path / "sensitivity.json"
    content = json.loads(path.read_text())
    value = {"layer": "", "range": [-1, 90], "channels": [], "spread": 1.0}
    content["simulated_baseline"] = {"damage": 0.5}
    content["values"] = [
        {**value, "value": "boxes", "feeds": [], "ends": True, "damage": 0.4},
        {**value, "value": "act", "feeds": ["dw.0"], "ends": False, "damage": 0.3},
        {**value, "value": "small", "feeds": [], "ends": True, "damage": 0.01},
    ]
    path.write_text(json.dumps(content))
    found = load_results(tmp_path).sensitivity
    assert found is not None
    assert [v.value for v in found.uncharged()] == ["boxes"]
    assert found.remarks[0].startswith("value boxes, which ends in an output, does 0.4 damage")
    (trace,) = [t for t in layers_figure(found).data if list(t.y) == ["boxes"]]
    assert list(trace.x) == [0.4]
    assert "value boxes, which ends" in html_report(load_results(tmp_path))
