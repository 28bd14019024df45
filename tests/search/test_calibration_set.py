"""Calibration sets that are good, too small, and of another kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rewriter import trace
from search.sensitivity.calibration_set import calibration_set
from tests.search.cli.test_main import quantfix, write_config


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 4),
    ).eval()


def images(count: int, seed: int, contrast: float = 1.0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return contrast * torch.randn(count, 3, 11, 11, generator=made)


def test_images_of_one_kind_are_covered_and_few_of_them_are_enough() -> None:
    gm = trace(network(), images(2, 0))
    found = calibration_set(gm, [images(200, 1)], [images(100, 2)])
    assert (found.images, found.evaluation) == (200, 100)
    assert found.warnings() == []
    assert found.apart < 0.3
    assert found.outside < 0.03
    shares = [share for _, share in found.curve]
    assert shares == sorted(shares)
    assert found.enough in (64, 128)


def test_another_contrast_is_another_kind() -> None:
    gm = trace(network(), images(2, 0))
    found = calibration_set(gm, [images(100, 1, 0.3)], [images(100, 2)])
    assert any("another kind" in w for w in found.warnings())
    assert any("leave the calibrated ranges" in w for w in found.warnings())


def test_images_that_grow_to_the_last_are_not_enough() -> None:
    gm = trace(network(), images(2, 0))
    growing = images(64, 1) * torch.linspace(0.2, 3, 64)[:, None, None, None]
    found = calibration_set(gm, [growing], [images(64, 2)])
    assert found.growing > 0.3
    assert any("still grow" in w for w in found.warnings())


def test_batches_do_not_matter_and_ranges_are_those_of_the_values() -> None:
    gm = trace(network(), images(2, 0))
    whole = calibration_set(gm, [images(40, 1)], [images(20, 2)])
    parts = calibration_set(gm, images(40, 1).split(7), images(20, 2).split(3))
    assert whole.curve == parts.curve
    assert whole.outside == parts.outside
    assert whole.apart == pytest.approx(parts.apart, rel=1e-4)


def test_check_says_what_the_calibration_set_is_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantfix(monkeypatch, "check", write_config(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "calibration" in said
    assert "leave a range by more than a tenth" in said
