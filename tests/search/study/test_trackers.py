"""Trackers are told of every usable score, and closed whatever ends the search."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from search.config.schema import ConfigError
from search.run_dir.scores import Score
from search.study import trackers
from search.study.trackers import TRACKERS, tracked

SCORES = (
    Score("", 100, metric=0.5, damage=0.4),
    Score("keep_float@a", 100, metric=0.7, damage=0.1),
    Score("keep_float@b", 100, error="no"),
    Score("keep_float@c", 100, metric=0.1, stopped=True),
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The three packages as they are called here, writing down what they are told."""
    found: list[tuple[str, Any]] = []

    def note(name: str) -> Any:
        return lambda *words, **more: found.append((name, (words, more)))

    class Writer:
        def __init__(self, folder: str) -> None:
            self.add_scalar, self.add_text = note("scalar"), note("text")
            self.close = note("close")

    run = SimpleNamespace(log=note("log"), finish=note("close"))
    board = SimpleNamespace(SummaryWriter=Writer)
    mlflow = SimpleNamespace(set_experiment=note("experiment"), start_run=note("start"),
                             log_metrics=note("metrics"), set_tag=note("tag"), end_run=note("close"))  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **more: run))
    return found


@pytest.mark.parametrize(
    ("name", "call"), [("tensorboard", "scalar"), ("mlflow", "metrics"), ("wandb", "log")]
)
def test_every_usable_score_is_told_and_the_tracker_closed(
    calls: list[tuple[str, Any]], tmp_path: Path, name: str, call: str
) -> None:
    def interrupted() -> None:
        with tracked([name], tmp_path, "run") as told:
            for i, score in enumerate(SCORES, 1):
                told(score, i)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert calls[-1][0] == "close"
    said = str([c for c in calls if c[0] in (call, "text", "tag")])
    assert "0.7" in said
    assert "a in float" in said
    assert "0.1, 4" not in said
    assert "c in float" not in said


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"), tracked(["wandb"], tmp_path, "r"):
        pass


def test_the_config_knows_the_same_names() -> None:
    from typing import get_args

    from search.config.schema import SearchConfig

    (kind,) = get_args(SearchConfig.model_fields["trackers"].annotation)[:1]
    assert set(get_args(kind)) == set(TRACKERS) == set(trackers.TRACKERS)
