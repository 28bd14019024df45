from __future__ import annotations

from pathlib import Path

import pytest

from search.cli.init import FILL_IN, KINDS, write_start
from search.config.schema import ConfigError, load_config
from search.data.datasets import load_data
from search.data.model import load_model

BUILD = f'raise NotImplementedError("{FILL_IN}: build() must return your network")'


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_loads_up_to_the_place_to_fill_in(tmp_path: Path, kind: str) -> None:
    config, code = write_start(kind, tmp_path, f"my_{kind}")
    cfg = load_config(config)
    assert cfg.task == kind
    with pytest.raises(ConfigError, match=f"{FILL_IN}: build"):
        load_model(cfg)
    with pytest.raises(ConfigError, match=f"{FILL_IN}: Calibration"):
        load_data(cfg)
    assert code.read_text().count(f"# {FILL_IN}: ") == (6 if kind == "detection" else 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_is_filled_in_is_used(tmp_path: Path, kind: str) -> None:
    config, code = write_start(kind, tmp_path, f"done_{kind}")
    text = code.read_text()
    assert BUILD in text
    code.write_text(text.replace(BUILD, "return nn.Conv2d(3, 4, 3)"))
    assert type(load_model(load_config(config))).__name__ == "Conv2d"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_start("video", tmp_path, "mine")
    with pytest.raises(ConfigError, match="is there already"):
        write_start("detection", tmp_path, "mine")
