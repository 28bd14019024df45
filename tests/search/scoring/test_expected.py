"""A float metric that is not what the user knows it to be is warned of."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from search.config.schema import ConfigError, load_config
from search.job import float_metric, load_network
from search.scoring.expected import unexpected
from tests.search.cli.test_main import write_config


@pytest.mark.parametrize(
    ("wanted", "found", "samples", "said"),
    [
        (None, 0.1, 100, ""),
        (75.48, None, 100, ""),
        (0.7548, 0.7548, 100, ""),
        (75.48, 0.70, 100, ""),  # five points are within the noise of 100 samples
        (75.48, 0.70, 50_000, "preprocessing"),
        (75.48, 0.01, 100, "preprocessing"),
        (50.0, 0.95, 1000, "easier"),
    ],
)
def test_chance_is_let_pass_and_a_fault_is_not(
    wanted: float | None, found: float | None, samples: int, said: str
) -> None:
    text = unexpected(wanted, found, samples, "top1")
    assert bool(text) == bool(said)
    assert said in text


def test_check_warns_of_another_float_metric(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for wanted, warned in ((87.5, False), (20, True)):
        caplog.clear()
        network = load_network(load_config(write_config(tmp_path, expect={"float": wanted})))
        with caplog.at_level(logging.WARNING):
            float_metric(network)
        assert ("expect.float" in caplog.text) == warned


def test_a_wrong_expectation_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    for value, said in (({"float": 120}, "expect.float"), ({"flaot": 70}, "did you mean")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"expect": value}))
        with pytest.raises(ConfigError, match=said):
            load_config(path)
