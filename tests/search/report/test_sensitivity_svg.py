from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from rewriter.sensitivity.causes import THRESHOLDS
from search.report.cause_style import LOOKS, NO_CAUSE
from search.report.sensitivity_svg import BAR, sensitivity_svg
from search.sensitivity.notes import remarks

SPACE = "{http://www.w3.org/2000/svg}"


def row(layer: str, damage: float, *causes: str, exact: bool = True) -> dict[str, Any]:
    evidence = [{"cause": c, "number": 9.0, "threshold": 3.0, "about": layer} for c in causes]
    return {
        "layer": layer,
        "kind": "conv",
        "damage": damage,
        "exact": exact,
        "causes": list(causes),
        "evidence": evidence,
    }


def content() -> dict[str, Any]:
    point = {"layer": "", "metric": 0.5, "measured": True}
    return {
        "target": "per_tensor",
        "layer_samples": 32,
        "baseline": {"damage": 9.0},
        "simulated_baseline": {"damage": 1.0},
        "layers": [
            row("a<b>", 0.8, "shared_range", "weight_outliers"),
            row("stem", 0.4, "weight_channel_spread"),
            row("dw", 0.1, exact=False),
            row("none", 0.0),
        ],
        "values": [
            {
                "value": "act_1",
                "layer": "stem",
                "range": [-2.6, 21.6],
                "channels": [3, 7],
                "spread": 41.2,
                "feeds": ["dw", "pw"],
                "damage": 0.3,
            },
            {"value": "x", "layer": "", "range": [0, 1], "channels": [], "damage": 0.01},
        ],
        "interaction": [
            {"layer": "dw", "alone": 0.1, "gain": -0.2, "measured": True, "disagrees": True},
            {"layer": "stem", "alone": 0.4, "gain": 0.4, "measured": True, "disagrees": False},
        ],
        "curve": [
            {**point, "float_layers": 0, "damage": 1.0},
            {**point, "float_layers": 1, "damage": 0.25, "layer": "a<b>"},
            {**point, "float_layers": 2, "damage": 0.5, "layer": "stem", "measured": False},
        ],
    }


def test_bars_are_as_long_as_the_damage_and_colored_by_the_first_cause() -> None:
    root = ET.fromstring(sensitivity_svg(content()))
    bars = [r for r in root.iter(f"{SPACE}rect") if r.get("height") == str(BAR)]
    widths = [float(b.get("width", "0")) for b in bars]
    assert len(bars) == 3  # a layer without damage has no bar
    assert [w / widths[0] for w in widths] == pytest.approx([1, 0.5, 0.125], rel=1e-3)
    assert [b.get("fill") for b in bars] == [
        LOOKS["shared_range"].color,
        LOOKS["weight_channel_spread"].color,
        "#fff",
    ]
    assert bars[2].get("stroke") == NO_CAUSE.color
    titles = [t.text or "" for t in root.iter(f"{SPACE}title")]
    assert "a<b> (conv): damage 0.8. shared_range 9 (threshold 3) of a<b>" in titles[0]


def test_the_curve_falls_as_the_damage_does() -> None:
    root = ET.fromstring(sensitivity_svg(content()))
    points = list(root.iter(f"{SPACE}circle"))
    x, y = ([float(p.get(a, "0")) for p in points] for a in ("cx", "cy"))
    assert x == sorted(x)
    assert (y[1] - y[0]) / (y[2] - y[0]) == pytest.approx(0.75 / 0.5, rel=1e-2)
    assert [p.get("class") for p in points] == ["measured", "measured", "predicted"]


def test_a_network_without_damage_has_a_picture() -> None:
    empty = {**content(), "layers": [row("a", 0.0)], "curve": []}
    assert ET.fromstring(sensitivity_svg(empty)).tag == f"{SPACE}svg"


def test_remarks_name_the_value_its_range_its_channels_and_its_readers() -> None:
    value, layer = remarks(content())
    assert value == (
        "value act_1, made by stem, does 0.3 damage alone, all of int8 1: range [-2.6, 21.6] set by channels 3, 7, "
        "the widest 41.2 times the middle one; read by dw, pw"
    )
    assert layer == (
        "layer dw interacts with others: alone in int8 it does 0.1 damage, and leaving it in "
        "float adds 0.2"
    )


def test_every_cause_that_is_found_has_its_look() -> None:
    assert set(LOOKS) == set(THRESHOLDS)
    assert len({each.color for each in LOOKS.values()} | {NO_CAUSE.color}) == len(LOOKS) + 1


def test_a_layer_alone_has_one_damage_or_the_inputs_are_said() -> None:
    layer = {"layer": "dw", "damage": 0.0289, "samples": 300}
    alone = {"layer": "dw", "alone": 0.0041, "gain": 0.02, "measured": False, "disagrees": True}
    found = {
        "baseline": {"damage": 1.0},
        "screened_samples": 32,
        "layers": [layer],
        "interaction": [alone],
    }
    (line,) = remarks(found)
    assert line.startswith("layer dw interacts with others, as predicted from 32 inputs: ")
    assert "0.0041 damage (0.0289 in the table, of 300 inputs)" in line
    found["interaction"] = [alone | {"alone": 0.0289, "measured": True}]
    assert "in the table" not in remarks(found)[0]
