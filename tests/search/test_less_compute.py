"""A run that is asked for less compute: from its config to the front, the file, and the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from search.config.schema import SearchConfig
from tests.search.cli.test_main import load, quantfix
from tests.search.small import Splits, Unlabeled

CONFIG = """
task: classification
model: {factory: "tests.search.test_less_compute:wide"}
data: {factory: "tests.search.test_less_compute:images"}
target: onnxruntime
search: {trials: 26, macs: [0.7, 1.1], seed: 0}
"""


class Wide(nn.Module):
    """Two inverted residuals whose hidden channels are partly combinations of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 4, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 48, 1),
                nn.ReLU(),
                nn.Conv2d(48, 48, 3, padding=1, groups=48),
                nn.ReLU(),
                nn.Conv2d(48, 8, 1),
            )
            for _ in range(2)
        )
        self.fc = nn.Linear(8, 5)
        with torch.no_grad():
            for block in self.blocks:
                for m in (block[0], block[2]):
                    m.weight[24:] = m.weight[:24]
                    m.bias[24:] = m.bias[:24]
            self.fc.weight *= 10

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


def wide() -> nn.Module:
    torch.manual_seed(0)
    return Wide().eval()


def images() -> Splits:
    generator = torch.Generator().manual_seed(1)
    x, calibration = (
        torch.randn(n, 3, 80, 80, generator=generator)
        + 2 * torch.randn(n, 3, 1, 1, generator=generator)
        for n in (40, 24)
    )
    with torch.no_grad():
        y = wide()(x).argmax(1)
    return Splits(Unlabeled(calibration), TensorDataset(x, y))


@pytest.mark.slow
def test_a_run_covers_the_range_and_its_file_costs_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "wide.yaml", tmp_path / "out"
    config.write_text(CONFIG)
    assert quantfix(monkeypatch, "run", config, "--out", out) == 0
    front = load(out / "front.json")
    ratios = [p["macs_ratio"] for p in front["points"]]
    # half of the hidden channels are twins of others: nothing is lost without them
    assert min(ratios) < 0.8
    cheap = front["points"][0]
    assert "thinned" in cheap["summary"]
    assert cheap["damage"] < 0.05
    assert {c["how"] for c in front["control"]} >= {"lower resolution"}
    assert front["separable"] >= 1
    assert front["plans_failed"] == 0
    cheap = tmp_path / "cheap"
    assert quantfix(monkeypatch, "export", out, "--pick", "macs<=0.85", "--out", cheap) == 0
    assert list(cheap.glob("*.onnx"))
    capsys.readouterr()
    assert quantfix(monkeypatch, "export", out, "--pick", "macs<=0.1") == 2
    assert "the cheapest plan of the front has" in capsys.readouterr().err


@pytest.mark.slow
def test_fix_finds_a_plan_below_the_network_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = tmp_path / "wide.yaml", tmp_path / "out"
    config.write_text(CONFIG.replace("macs: [0.7, 1.1], ", ""))
    asked = ("--max-macs", 0.85, "--max-drop", 20, "--out", out)
    assert quantfix(monkeypatch, "fix", config, *asked) == 0
    assert load(out / "front.json")["points"][0]["macs_ratio"] <= 0.85


def test_the_range_of_the_config() -> None:
    def bounds(**given: object) -> tuple[float, float]:
        found = SearchConfig.model_validate(given)
        return found.least_macs, found.most_macs

    assert bounds() == (1.0, 1.15)
    assert bounds(max_macs=1.3) == (1.0, 1.3)
    assert bounds(macs=[0.6, 1.2]) == (0.6, 1.2)
    assert bounds(macs=[0.6, 1.2], max_macs=0.8) == (0.6, 0.8)
    assert bounds(macs=[0.9, 1.2], max_macs=0.8) == (0.8, 0.8)
    least, most = bounds(max_macs=0.8)
    assert 0.7 <= least < most == 0.8
    for wrong in ([1.1, 0.9], [0, 1], [0.5]):
        with pytest.raises(ValueError, match="macs"):
            SearchConfig.model_validate({"macs": wrong})
