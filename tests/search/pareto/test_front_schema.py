"""front.json is what its schema says, and the documented schema is the one in use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from search.pareto.front_schema import FrontFile, Point, StepEntry, front_schema
from search.results import write_front
from tests.search.report.test_report import PLANS, make

ROOT = Path(__file__).resolve().parents[3]


def test_what_is_written_is_what_is_documented(tmp_path: Path) -> None:
    write_front(make(tmp_path, PLANS))
    content = json.loads((tmp_path / "front.json").read_text())
    front = FrontFile.model_validate(content)
    assert content.keys() == set(FrontFile.model_fields)
    optional = {"selection", "confirmation", "finetuned"}
    names = {f.alias or n for n, f in Point.model_fields.items()}
    assert all(p.keys() | optional == names | optional for p in content["points"])
    best = next(p for p in front.points if p.plan == front.best)
    assert [s.step for s in best.steps] == best.plan.split()
    two = next(p for p in content["points"] if p["plan"] == "keep_float@dw0 keep_float@dw1")
    assert [(s["damage"], s["beside"], s["macs"]) for s in two["steps"]] == [
        (pytest.approx(-0.2), 0, 0),
        (pytest.approx(-0.08), 1, 0),
    ]
    with pytest.raises(ValidationError, match="extra"):
        FrontFile.model_validate({**content, "nobody_knows": 1})


def test_the_documented_schema_is_the_one_in_use() -> None:
    path = ROOT / "docs" / "front.schema.json"
    assert json.loads(path.read_text()) == front_schema(), (
        "python -c 'import json; from search.pareto.front_schema import front_schema; "
        "print(json.dumps(front_schema(), indent=1))' > docs/front.schema.json"
    )
    said = (ROOT / "docs" / "report.md").read_text()
    for name, field in [
        *FrontFile.model_fields.items(),
        *Point.model_fields.items(),
        *StepEntry.model_fields.items(),
    ]:
        assert f"`{field.alias or name}`" in said, f"docs/report.md does not explain {name}"
