"""Which layer in float helps a network that is repaired already, against networks with that layer in float."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rewriter import Plan, profile
from rewriter.assemble import assemble
from rewriter.graph.edit import copy_graph
from rewriter.graph.lookup import find, layer_name, layers
from rewriter.int8.annotate import annotate
from rewriter.int8.scheme import target
from rewriter.int8.simulate import Quantized, simulate
from rewriter.sensitivity import float_gains
from rewriter.tracing.trace import trace
from tests.sensitivity.planted import healthy, inputs
from tests.sensitivity.test_causes import weight_channel_spread

CALIBRATION = [inputs(16, 2), inputs(16, 3)]


def broken() -> nn.Module:
    """Two faults: scales that equalization mends, and an output of another size, which it does not."""
    model = healthy()
    weight_channel_spread(model)
    model.head.weight.data[3] *= 6
    return model


def quantized(plan: str) -> Quantized:
    gm = trace(broken(), inputs(2))
    profile(gm, CALIBRATION)
    return assemble(gm, Plan.parse(plan), target("per_tensor"), CALIBRATION).quantized


def divergence(q: Quantized, reference: Tensor, x: Tensor) -> float:
    with torch.no_grad():
        log_q, log_p = simulate(q)(x).log_softmax(1), reference.log_softmax(1)
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def with_float(q: Quantized, node: str) -> Quantized:
    gm = copy_graph(q.gm)
    find(gm, node).meta["keep_float"] = True
    annotate(gm, q.scheme)
    return Quantized(gm, q.calibration, q.scheme)


def best(gains: dict[str, float]) -> str:
    return max(gains, key=lambda name: gains[name])


@pytest.mark.parametrize("plan", ["", "equalize@model"])
def test_the_gains_are_those_of_networks_with_the_layer_in_float(plan: str) -> None:
    q, x = quantized(plan), inputs(256)
    with torch.no_grad():
        reference = broken()(x)
    whole = divergence(q, reference, x)
    gains = float_gains(q, x)
    assert set(gains) == {layer_name(n) for n in layers(q.gm)}
    true = {
        layer_name(n): 1 - divergence(with_float(q, n.name), reference, x) / whole
        for n in layers(q.gm)
    }
    assert best(gains) == best(true)
    pairs = np.array([[gains[name], true[name]] for name in true])
    assert np.corrcoef(pairs.T)[0, 1] > 0.9
    # to second order: what roundings do to each other beyond it is not in the prediction
    assert np.abs(pairs[:, 0] - pairs[:, 1]).max() < 0.35


def test_what_a_repair_has_mended_is_not_asked_for_any_more() -> None:
    x = inputs(256)
    plain, mended = float_gains(quantized(""), x), float_gains(quantized("equalize@model"), x)
    assert {best(plain)} <= {"dw", "head"}
    assert plain["dw"] > 3 * max(mended["dw"], 0.01)
    assert best(mended) == "head"


def test_the_parts_of_a_split_layer_count_together() -> None:
    q = quantized("split_range_2@stem")
    gains = float_gains(q, inputs())
    assert len(layers(q.gm)) > len(gains)
    assert set(gains) == {layer_name(n) for n in layers(q.gm)}


def test_one_seed_gives_one_result() -> None:
    q, x = quantized(""), inputs()
    assert float_gains(q, x) == float_gains(q, x)
    assert float_gains(q, x, seed=1) != float_gains(q, x)
