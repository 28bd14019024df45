from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from search.cli.init import FILL_IN, KINDS, write_start
from search.config.schema import Config, ConfigError, load_config
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
    assert code.read_text().count(f"# {FILL_IN}: ") == (
        6 if kind in ("detection", "custom") else 5
    )


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


def test_every_task_has_a_start_and_every_built_in_form_in_it_is_read(tmp_path: Path) -> None:
    assert set(KINDS) == set(get_args(Config.model_fields["task"].annotation))
    for kind in KINDS:
        config, _ = write_start(kind, tmp_path, f"{kind}_form")
        text = config.read_text()
        # the example as it stands in the comment, in place of the factory
        start, _, tail = text.partition("\ndata:\n")
        section, _, after = tail.partition("\n\n")
        lines = [line[4:] for line in section.splitlines() if line.startswith("  # ")]
        keys = "".join(f"  {line}\n" for line in lines if ": " in line and line[0].islower())
        assert keys or kind == "custom"
        if not keys:
            continue
        config.write_text(f"{start}\ndata:\n{keys}\n{after}")
        assert load_config(config).data.factory is None, kind
