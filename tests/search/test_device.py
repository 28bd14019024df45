"""`device:` in a config: a GPU that is not there is refused, and `auto` takes one where there is one."""

from __future__ import annotations

import pytest
import torch

from search.config.schema import ConfigError, load_config, shipped_config
from search.job import device_of_run


@pytest.mark.parametrize(
    ("device", "seen", "expected"),
    [
        ("auto", 0, "cpu"),
        ("auto", 1, "cuda"),
        ("cpu", 1, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
        ("cuda", 0, "digits.yaml: device: cuda: torch sees 0 CUDA devices here"),
        ("cuda:2", 2, "digits.yaml: device: cuda:2: torch sees 2 CUDA devices here"),
    ],
)
def test_device(monkeypatch: pytest.MonkeyPatch, device: str, seen: int, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    config = load_config(shipped_config("digits.yaml")).model_copy(update={"device": device})
    if "sees" in expected:
        with pytest.raises(ConfigError) as raised:
            device_of_run(config)
        assert str(raised.value) == expected
        return
    assert device_of_run(config) == expected
    # a float network in 10 bits of mantissa would look like damage
    assert torch.backends.cudnn.allow_tf32 == (not expected.startswith("cuda"))
