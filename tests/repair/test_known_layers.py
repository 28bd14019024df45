from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rewriter import profile, quantize, target, trace
from rewriter.graph.lookup import layers
from rewriter.int8.simulate import Quantized
from rewriter.repair import bias_and_rounding as module
from rewriter.repair.bias_and_rounding import refine
from tests.rules import check

SHAPE = (3, 10, 12)
BOTH = frozenset({"biases", "rounding"})


class Net(nn.Module):
    """Two branches that meet, so that what is behind one of them is not behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, groups=8, padding=1),
        )
        self.right, self.join = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.join(torch.relu(self.left(x)) + self.right(x)))
        return self.head(x.mean((2, 3)))


def made(
    seed: int = 0, target_name: str = "per_tensor", floats: tuple[str, ...] = ()
) -> Quantized:
    x = check.inputs(SHAPE, 16, seed=seed).float()
    gm = trace(check.randomise(Net()), x[:2])
    profile(gm, [x])
    for node in layers(gm):
        node.meta["keep_float"] = node.name in floats
    return quantize(gm, target(target_name), [x])


def same(a: Quantized, b: Quantized) -> bool:
    one, other = a.gm.state_dict(), b.gm.state_dict()
    weights, others = a.calibration.weights, b.calibration.weights
    return (
        one.keys() == other.keys()
        and all(torch.equal(one[k], other[k]) for k in one)
        and weights.keys() == others.keys()
        and all(torch.equal(weights[k], others[k]) for k in weights)
    )


@pytest.fixture
def repaired_anew(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers whose weights are rounded, as they are."""
    seen: list[str] = []
    before = module._round

    def watched(quantized: Quantized, node: object, *rest: object) -> None:
        seen.append(node.name)  # type: ignore[attr-defined]
        before(quantized, node, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_round", watched)
    return seen


@pytest.mark.parametrize("target_name", ["per_tensor", "onnxruntime"])
@pytest.mark.parametrize("repairs", [frozenset({"biases"}), BOTH])
def test_a_plan_that_begins_like_another_comes_out_as_from_nothing(
    target_name: str, repairs: frozenset[str], tmp_path: Path, repaired_anew: list[str]
) -> None:
    batches = check.inputs(SHAPE, 16).float().split(8)
    first, second = made(0, target_name), made(0, target_name, ("right",))
    refine(first, batches, repairs, tmp_path)
    repaired_anew.clear()
    reused = refine(second, batches, repairs, tmp_path)
    if "rounding" in repairs:  # what is before the change or beside it is not made again
        assert repaired_anew == ["join", "head"]
    assert same(reused, refine(second, batches, repairs))
    assert same(refine(first, batches, repairs, tmp_path), refine(first, batches, repairs))


def test_whatever_a_layer_depends_on_makes_it_another(
    tmp_path: Path, repaired_anew: list[str]
) -> None:
    batches = check.inputs(SHAPE, 16).float().split(8)
    plain = made()
    refine(plain, batches, BOTH, tmp_path)

    def anew(quantized: Quantized, inputs: tuple[Tensor, ...] = batches) -> list[str]:
        repaired_anew.clear()
        assert same(refine(quantized, inputs, BOTH, tmp_path), refine(quantized, inputs, BOTH))
        names = [n.name for n in layers(quantized.gm)]
        return repaired_anew[: len(repaired_anew) - len(names)]

    assert anew(plain) == []
    ranged = made()
    name = str(next(n for n in layers(ranged.gm) if n.name == "join").args[0])
    low, high = ranged.calibration.values[name]
    ranged.calibration.values[name] = (low, 0.8 * high)
    assert anew(ranged) == ["join", "head"]
    heavier = made()
    with torch.no_grad():
        heavier.gm.get_submodule("left").weight[0, 0, 0, 0] += 1e-3  # type: ignore[index]
    assert anew(heavier) == ["left", "join", "head"]
    other = tuple(x + 1e-3 for x in batches)
    assert len(anew(plain, other)) == len(layers(plain.gm))
