"""Recipes: plans of one training, tried first on another of the same architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from rewriter import Plan, trace
from search.cli.recipe_command import recipe_of
from search.config.schema import ConfigError
from search.run_dir.files import RunError
from search.strategy.recipe import architecture_digest, first, read_recipe, write_recipe
from tests.search.report.long_front import make_front


def network(seed: int, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 1)
    ).eval()


def test_two_trainings_share_an_architecture_and_other_widths_do_not() -> None:
    x = torch.randn(2, 3, 12, 12)
    a, b = (architecture_digest(trace(network(s), x)) for s in (0, 1))
    assert a == b
    assert architecture_digest(trace(network(0, 16), x)) != a
    assert architecture_digest(trace(network(0), torch.randn(2, 3, 16, 16))) == a


def test_a_recipe_of_a_run_is_read_again_best_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gm = trace(network(0), torch.randn(2, 3, 12, 12))
    results = make_front(tmp_path / "run", 8, architecture=architecture_digest(gm))
    path = tmp_path / "recipes" / "lite.yaml"
    write_recipe(path, recipe_of(results))
    plans = read_recipe(path, gm, "per_tensor")
    assert str(plans[0]) == str(Plan.parse(results.best().plan))
    assert len(plans) == len([s for s in results.front.points if s.plan])
    assert caplog.text == ""
    read_recipe(path, gm, "onnxruntime")
    assert "measured on per_tensor" in caplog.text
    other = trace(network(0, 16), torch.randn(2, 3, 12, 12))
    with pytest.raises(ConfigError, match="another architecture"):
        read_recipe(path, other, "per_tensor")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not YAML"),
        ("1", "the file"),
        ("{format: 1}", "network"),
        ("{plans: [{plan: 'no rule'}]}", "plan"),
    ],
)
def test_what_is_no_recipe_is_refused_in_words(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    content = {"format": 1, "network": "n", "architecture": "a", "target": "t", "metric": "m",
               "samples": 1, "float": None, "int8": None}  # fmt: skip
    plain = text if "plans" not in text else yaml.safe_dump(content | yaml.safe_load(text))
    path.write_text(plain)
    gm = trace(network(0), torch.randn(2, 3, 12, 12))
    with pytest.raises(ConfigError, match=said):
        read_recipe(path, gm, "per_tensor")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "missing.yaml", gm, "per_tensor")


def test_its_plans_come_first_once_and_only_within_the_limits() -> None:
    a, b, c = (Plan.parse(f"keep_float@{n}") for n in "abc")
    worth = first([a, b], lambda scores: [c], lambda plan: plan != b)
    assert list(worth({})) == [Plan(()), a, c]
    assert list(worth({"": None, str(a): None})) == [c]  # type: ignore[dict-item]


def test_a_run_without_a_plan_or_an_architecture_makes_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="did not note the architecture"):
        recipe_of(make_front(tmp_path, 3))
