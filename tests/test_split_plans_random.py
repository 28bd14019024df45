"""Random plans of several splits, equalized, on random networks with recurrent, attention and flattened parts."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rewriter import Plan, PlanError, Step, find_sites, profile, rewrite, target, trace
from rewriter.assemble import assemble
from rewriter.graph.axes import channel_axes
from rewriter.graph.channel_ranges import range_of
from rewriter.graph.interpret import walk
from tests.networks import ACTIVATIONS, _block, randomise

F = nn.functional
SIZE = (3, 19, 17)
STRUCTURAL = ("split", "densify", "drop_dead")


def tokens(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2)


class Hybrid(nn.Module):
    """Convolutions, then one part that is none, then linear layers."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        torch.manual_seed(seed)
        act = rng.choice(ACTIVATIONS)
        c = rng.choice((6, 8, 12))
        blocks: list[nn.Module] = [nn.Conv2d(3, c, 3, 2, 1), nn.BatchNorm2d(c), act()]
        for _ in range(rng.randint(1, 3)):
            block, c = _block(rng, c, act)
            blocks.append(block)
        self.body, self.kind = nn.Sequential(*blocks), kind
        self.pre, self.act, self.mid = nn.Conv2d(c, 16, 1), act(), nn.Conv2d(16, 16, 3, padding=1)
        made: dict[str, Callable[[], nn.Module]] = {
            "flatten": lambda: nn.Linear(16 * 4, 16),
            "lstm": lambda: nn.LSTM(16, 8, bidirectional=True, batch_first=True),
            "attention": lambda: nn.MultiheadAttention(16, 4, batch_first=True),
            "sequence_first": lambda: nn.TransformerEncoderLayer(16, 2, 24),
            "convolution": lambda: nn.Conv1d(16, 16, 3, padding=1),
        }
        self.part, self.head = made[kind](), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Any:
        y = self.act(self.pre(self.body(x)))
        y = y + self.act(self.mid(y))
        if self.kind == "flatten":
            return self.head(torch.relu(self.part(F.adaptive_avg_pool2d(y, 2).flatten(1))))
        if self.kind == "convolution":
            return self.head(torch.relu(self.part(y.flatten(2))).transpose(1, 2))
        if self.kind == "lstm":
            return self.head(self.part(tokens(y))[0])
        if self.kind == "attention":
            t = tokens(y)
            return self.head(t + self.part(t, t, t)[0]), y
        z = self.part(y.flatten(2).permute(2, 0, 1))
        return self.head(z).permute(1, 0, 2), torch.relu(z).mean(0)


def random_plan(gm: fx.GraphModule, rng: random.Random) -> Plan:
    """Up to five structural steps that can be carried out together."""
    sites = [s for s in find_sites(gm) if not s.blocked and s.rule.startswith(STRUCTURAL)]
    rng.shuffle(sites)
    kept: list[Step] = []
    for site in sites:
        if len(kept) < 5 and site.anchor not in {s.anchor for s in kept}:
            try:
                rewrite(gm, Plan((*kept, Step.at(site))))
            except PlanError:
                continue
            kept.append(Step.at(site))
    return Plan(tuple(kept))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flatten", "lstm", "attention", "sequence_first", "convolution"])
@pytest.mark.parametrize("seed", range(3))
def test_several_splits_and_equalization(kind: str, seed: int) -> None:
    model = randomise(Hybrid(kind, seed), seed)
    with torch.no_grad():  # channels of different range, so that there is something to split
        model.pre.weight *= torch.logspace(-1.5, 1, 16).view(-1, 1, 1, 1)
    x = torch.randn(6, *SIZE, generator=torch.Generator().manual_seed(seed))
    gm = trace(model, x[:2])
    batches = [x[:4], x[4:]]
    profile(gm, batches)
    plan = random_plan(gm, random.Random(seed))
    made = rewrite(gm, plan)
    axes = channel_axes(made)
    with torch.no_grad():
        for node, value in walk(made, (x[:1],)):
            if isinstance(value, Tensor):
                assert node.meta["shape"] == tuple(value.shape), (plan, node)
            if "channel_range" in node.meta:
                assert range_of(node, node.meta["shape"][axes[node]]) is not None, (plan, node)
        expected = pytree.tree_leaves(gm(x))
    whole = [s for s in find_sites(made) if s.rule == "equalize" and not s.blocked]
    plan = Plan((*plan.steps, *map(Step.at, whole)))
    quantized = assemble(gm, plan, target("per_tensor"), batches).quantized
    with torch.no_grad():
        found = pytree.tree_leaves(quantized.gm(x))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * float(a.abs().max()))
