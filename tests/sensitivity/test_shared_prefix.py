"""Forks compute what switching one simulation by hand computes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from rewriter.graph.edit import copy_graph
from rewriter.graph.lookup import find, layers
from rewriter.int8.integer_grid import fake_quantize, round_to_int8
from rewriter.int8.scheme import QuantSpec, target
from rewriter.int8.simulate import Quantized, QuantizedLayer, quantize, simulate, switches
from rewriter.sensitivity.error_terms import parts_of
from rewriter.sensitivity.shared_prefix import Forks, int8_variant, keeping, only
from rewriter.tracing.trace import trace
from tests.networks import SIZE, network, randomise

SEEDS = range(12)


class SideBranch(nn.Module):
    """A branch that starts late and does not depend on the layers before it in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.side = nn.Conv2d(3, 6, 1)
        self.late = nn.Conv2d(6, 6, 1, bias=False)
        self.act = nn.ReLU6()
        self.heads = nn.ModuleList([nn.Conv2d(6, 4, 1), nn.Conv2d(12, 5, (1, 3), stride=2)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.act(self.b(self.act(self.a(x))))
        side = self.late(self.act(self.side(x)))
        return self.heads[0](y + side), self.heads[1](torch.cat([y, side], 1)).flatten(2)


def quantized(model: nn.Module, target_name: str = "onnxruntime", seed: int = 0) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(4, *SIZE, generator=generator) for _ in range(2)]
    q = quantize(trace(model, batches[0]), target(target_name), batches)
    q.gm.double()  # kernels differ in the last bit, which in float32 turns some roundings over
    return q


def some_inputs(seed: int) -> Tensor:
    x = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(seed + 1)).double()
    return x.contiguous(memory_format=torch.channels_last)


def some_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(SideBranch(), seed) if seed % 4 == 0 else network(seed)


def flat(outputs: object) -> list[Tensor]:
    from torch.utils import _pytree as pytree

    return pytree.tree_leaves(outputs)


def switched(q: Quantized, layer: fx.Node) -> fx.GraphModule:
    """An oracle: a simulation with only one layer switched on, and the rounding of its result."""
    sim = simulate(q)
    for part in switches(sim).values():
        part.enabled = False
    one = sim.get_submodule(str(layer.target))
    assert isinstance(one, QuantizedLayer)
    one.enabled = True
    if one.read is not None:
        one.read.enabled = True
    for _, value in parts_of(q.gm).returned[layer.name]:
        fake = f"int8_{value}"
        if value in (n.name for n in find(q.gm, "output").all_input_nodes):
            while not hasattr(sim, fake):  # a moved value is rounded before it is moved
                value = find(q.gm, value).all_input_nodes[0].name
                fake = f"int8_{value}"
            switches(sim)[fake].enabled = True
    return sim


@pytest.mark.parametrize("seed", SEEDS)
def test_whole_int8_network_equals_the_simulation(seed: int) -> None:
    q = quantized(some_network(seed), seed=seed)
    x = some_inputs(seed)
    with torch.no_grad():
        expected = flat(simulate(q)(x))
    for a, b in zip(expected, Forks(q).run((x,), int8_variant(q.gm)), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-9 * float(a.abs().max()))


@pytest.mark.parametrize(("seed", "name"), [*itertools.product(SEEDS, ["onnxruntime", "tflite"])])
def test_one_layer_equals_one_switch(seed: int, name: str) -> None:
    q = quantized(some_network(seed), name, seed)
    x = some_inputs(seed)
    parts = parts_of(q.gm)
    # the oracle rounds a returned value for all that read it, a fork only where it is returned
    weighted = [n for n in layers(q.gm) if not parts.returned[n.name] or len(n.users) == 1]
    assert len(weighted) > 1
    found = dict(Forks(q).walk((x,), {}, [only(parts, n) for n in weighted]))
    assert set(found) == {-1, *range(len(weighted))}
    for i, node in enumerate(weighted):
        with torch.no_grad():
            expected = flat(switched(q, node)(x))
        for a, b in zip(expected, found[i], strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-9 * float(a.abs().max()))


@pytest.mark.parametrize("seed", SEEDS)
def test_all_but_one_equals_the_rule_keep_float(seed: int) -> None:
    q = quantized(some_network(seed), seed=seed)
    x = some_inputs(seed)
    weighted = layers(q.gm)
    before = [n.meta["int8"] for n in q.gm.graph.nodes]
    variants = [keeping(q.gm, q.scheme, [n]) for n in weighted]
    assert [n.meta["int8"] for n in q.gm.graph.nodes] == before
    assert not any("keep_float" in n.meta for n in q.gm.graph.nodes)
    found = dict(Forks(q).walk((x,), int8_variant(q.gm), variants))
    for i, node in enumerate(weighted):
        gm = copy_graph(q.gm)
        find(gm, node.name).meta["keep_float"] = True
        from rewriter.int8.annotate import annotate

        annotate(gm, q.scheme)
        with torch.no_grad():
            sim = simulate(Quantized(gm, q.calibration, q.scheme))
            expected = flat(sim(x))
        for a, b in zip(expected, found[i], strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-9 * float(a.abs().max()))


def test_a_fork_runs_only_what_depends_on_it() -> None:
    q = quantized(randomise(SideBranch()))
    forks, parts = Forks(q), parts_of(q.gm)
    share = {n.name: forks.share({}, only(parts, n)) for n in layers(q.gm)}
    assert share["a"] < 1  # the side branch does not depend on it
    assert share["heads_0"] < share["late"] < share["side"]
    assert forks.share({}, int8_variant(q.gm)) == 1


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(symmetric=True, signed=True)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rounding_is_that_of_the_scheme(spec: QuantSpec, layout: torch.memory_format) -> None:
    x = torch.randn(5, 17, 61, 59, generator=torch.Generator().manual_seed(3)) * 3
    scale, zero = spec.params(-5.3, 7.1)
    steps = np.round(x.double().numpy() / scale)
    expected = (np.clip(steps + zero, spec.qmin, spec.qmax) - zero) * scale
    found = round_to_int8(x.contiguous(memory_format=layout), scale, zero, spec)
    assert found.is_contiguous(memory_format=layout)
    wrong = (found.double().numpy() - expected).__abs__() > 1e-5
    assert wrong.mean() < 1e-5  # float32 has a few values on the other side of a tie
    again = round_to_int8(x.transpose(0, 2), scale, zero, spec)
    assert torch.equal(again, found.transpose(0, 2))
    assert torch.equal(fake_quantize(found, scale, zero, spec), found)
