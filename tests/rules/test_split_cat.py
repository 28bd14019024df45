from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewriter import quantize, target
from rewriter.int8.annotate import annotation
from rewriter.rules.split_cat import SplitCat
from tests.rules import check

RULE = SplitCat()
SHAPE = (3, 12, 9)


class Joined(nn.Module):
    """A wide and a narrow branch, concatenated and read by ``reader``."""

    def __init__(self, reader: nn.Module, elsewhere: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 2, 1)
        self.reader, self.elsewhere, self.twice = reader, elsewhere, twice

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        wide, narrow = self.wide(x) * 30, self.narrow(x).relu()
        joined = torch.cat([narrow, wide, narrow] if self.twice else [narrow, wide], 1)
        y = self.reader(joined)
        return (y, joined) if self.elsewhere else (y,)


@pytest.mark.parametrize(
    "model",
    [
        Joined(nn.Conv2d(7, 4, (3, 1), stride=2, dilation=2)),
        Joined(nn.Conv2d(7, 4, 1, bias=False), elsewhere=True),
        Joined(nn.ConvTranspose2d(7, 4, 3, 2), elsewhere=True),
        Joined(nn.Conv2d(9, 4, 1), twice=True),
    ],
)
def test_the_function_is_kept(model: nn.Module) -> None:
    new = check.rewrites(RULE, model, SHAPE)
    joined = [n for n in new.graph.nodes if n.target is torch.cat]
    assert len(joined) == (1 if model.elsewhere else 0)


@pytest.mark.parametrize("name", ["onnxruntime", "tflite"])
def test_each_input_keeps_its_own_range(name: str) -> None:
    gm = check.graph_of(check.randomise(Joined(nn.Conv2d(7, 4, 1))), SHAPE).float()
    q = quantize(
        check.rewritten_by_plan(gm, "split_cat@cat"), target(name), [check.inputs(SHAPE).float()]
    )
    reads = [n for n in q.gm.graph.nodes if n.name.startswith("reader")]
    assert len({annotation(n.args[0]).range_of for n in reads}) == 2


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Joined(nn.MaxPool2d(2)), "no convolution or linear layer reads"),
        (Joined(nn.Conv2d(7, 7, 1, groups=7)), "no convolution or linear layer reads"),
    ],
)
def test_refuses(model: nn.Module, reason: str) -> None:
    check.refuses(RULE, model, reason, SHAPE)


def test_refuses_inputs_of_like_ranges() -> None:
    gm = check.graph_of(check.randomise(Joined(nn.Conv2d(7, 4, 1))), SHAPE)
    node = next(n for n in gm.graph.nodes if n.target is torch.cat)
    sources = node.args[0]
    for source in sources:
        count = source.meta["shape"][1]
        source.meta["channel_range"] = (torch.zeros(count), torch.ones(count))
    (site,) = RULE.match(gm)
    assert "alike" in site.blocked
    del sources[-1].meta["channel_range"]
    (site,) = RULE.match(gm)
    assert site.blocked == "no calibrated channel ranges"


class AlongHeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reader = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(torch.cat([x, x * 50], 2))


def test_ignores_a_concatenation_of_another_dimension() -> None:
    check.ignores(RULE, AlongHeight(), SHAPE)
