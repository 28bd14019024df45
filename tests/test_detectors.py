"""Detectors as exporters ship them: what int8 does to them, and what the rewrites give back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rewriter import Plan, find_sites, profile, quantize, rewrite, target, trace
from rewriter.graph.edit import copy_graph
from rewriter.graph.lookup import layers
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.lint import lint
from rewriter.int8.onnx.session import Session
from tests.detectors import CLASSES, Yolov5, Yolov8, Yolox, images, trained

SHALLOW: dict[str, Callable[[], nn.Module]] = {
    "raw": lambda: Yolox(n=0),
    "pixels": lambda: Yolox(n=0, decode=True),
    "bins": lambda: Yolov8(n=0),
    "weighted_sum": lambda: Yolov8(n=0, weighted_sum=True),
    "anchors": lambda: Yolov5(n=0),
}
HEADS = {"raw": 6, "pixels": 6, "bins": 6, "weighted_sum": 6, "anchors": 3}
# Box coordinates come first in their dimension.
BOXES = 4


def graph_of(model: nn.Module) -> tuple[fx.GraphModule, Tensor]:
    x = images(16, seed=3)
    gm = trace(model, x[:2])
    profile(gm, [x])
    return gm, x


def full_plan(gm: fx.GraphModule) -> str:
    """The tail in float, every head split, the stem split in three."""
    heads = [f"split_head_auto@{h}" for h in heads_of(gm)]
    return " ".join(["float_tail@output", f"split_range_3@{layers(gm)[0].name}", *heads])


def heads_of(gm: fx.GraphModule) -> list[str]:
    sites = [s for s in find_sites(gm) if s.rule == "split_head_auto" and not s.blocked]
    return [s.anchor for s in sites]


def in_int8(gm: fx.GraphModule, plan: str, x: Tensor, name: str):
    quantized = quantize(rewrite(gm, Plan.parse(plan)), target(name), [x])
    model = to_onnx(quantized)
    return [torch.from_numpy(o) for o in Session(model).run(x)], quantized, model


def errors(found: list[Tensor], expected: list[Tensor], ending: str) -> list[float]:
    """Squared error of each group relative to its energy: boxes, scores, and the other outputs."""
    axis = 1 if ending in ("bins", "weighted_sum") else 2
    parts: list[tuple[Tensor, Tensor]] = []
    for pair in zip(found, expected, strict=True):
        sizes = [BOXES, pair[1].shape[axis] - BOXES]
        first = pair[1].ndim == 3 and pair[1].shape[axis] in (BOXES + CLASSES, BOXES + 1 + CLASSES)
        parts += zip(*(t.split(sizes, axis) for t in pair), strict=True) if first else [pair]
    return [float((a - b).square().mean() / b.square().mean()) for a, b in parts]


@pytest.mark.parametrize("name", ["onnxruntime", "per_tensor"])
@pytest.mark.parametrize("ending", SHALLOW)
def test_plain_int8_collapses_and_the_rewritten_one_is_within_one_percent(
    ending: str, name: str
) -> None:
    gm, x = graph_of(trained(SHALLOW[ending]()))
    with torch.no_grad():
        expected = pytree.tree_leaves(gm(x))
    plain, _, _ = in_int8(gm, "", x, name)
    assert max(errors(plain, expected, ending)) > 0.1
    found, quantized, model = in_int8(gm, full_plan(gm), x, name)
    assert max(errors(found, expected, ending)) < 0.01
    assert not [f for f in lint(quantized, model) if f.code == "merged_range"]


@pytest.mark.parametrize("ending", SHALLOW)
def test_heads_are_found_through_the_decoding(ending: str) -> None:
    gm, _ = graph_of(trained(SHALLOW[ending]()))
    assert len(heads_of(gm)) == HEADS[ending]
    tail = next(s for s in find_sites(gm) if s.rule == "float_tail")
    kept = {n for n in tail.nodes if n in {m.name for m in layers(gm)}}
    assert kept == ({"dfl_conv"} if ending == "bins" else set())


@pytest.mark.parametrize("ending", SHALLOW)
def test_every_part_has_its_own_range_in_the_file_up_to_the_output(ending: str) -> None:
    gm, x = graph_of(trained(SHALLOW[ending]()))
    plan = full_plan(gm)
    found = scales_at_the_end(in_int8(gm, plan, x, "onnxruntime")[2])
    values = float_values(rewrite(gm, Plan.parse(plan)), x)
    widths = [v.amax().clamp_min(0) - v.amin().clamp_max(0) for v in values.values()]
    expected = sorted(float(w) / 255 for w in widths)
    assert len(expected) > HEADS[ending]
    np.testing.assert_allclose(found, expected, rtol=0.02)


def scales_at_the_end(model: onnx.ModelProto) -> list[float]:
    """Scales of the int8 tensors from which the outputs are computed in float."""
    maker = {name: n for n in model.graph.node for name in n.output}
    known = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    queue, seen, found = [o.name for o in model.graph.output], set(), []
    while queue:
        name = queue.pop()
        node = maker.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        assert node.op_type != "QuantizeLinear", f"{name} is rounded once more"
        if node.op_type == "DequantizeLinear":
            found.append(float(known[node.input[1]]))
        else:
            queue += list(node.input)
    return sorted(found)


def float_values(gm: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """What the last layers make in float, by name; those of a head's parts and whole heads."""
    last = [n for n in layers(gm) if n.name != "dfl_conv" and not reaches_a_layer(n)]
    found: dict[str, Tensor] = {}
    modules = dict(gm.named_modules())
    hooks = [
        modules[str(n.target)].register_forward_hook(
            lambda module, args, value, name=n.name: found.update({name: value})
        )
        for n in last
    ]
    with torch.no_grad():
        gm(x)
    for hook in hooks:
        hook.remove()
    return found


def reaches_a_layer(node: fx.Node) -> bool:
    return any(
        (
            ("weight" in u.name or (u.op == "call_module" and hasattr(module(u), "weight")))
            and u.name != "dfl_conv"
        )
        or reaches_a_layer(u)
        for u in node.users
    )


def module(node: fx.Node) -> nn.Module:
    return node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Yolox, id="x", marks=pytest.mark.slow),
        pytest.param(lambda: Yolox(decode=True), id="xd", marks=pytest.mark.slow),
        pytest.param(Yolov8, id="8", marks=pytest.mark.slow),
        pytest.param(Yolov5, id="5", marks=pytest.mark.slow),
    ],
)
def test_a_whole_network_is_split_exactly_at_every_place(make: Callable[[], nn.Module]) -> None:
    gm, x = graph_of(trained(make()))
    assert gm.meta["opaque"] == ()
    exact = copy_graph(gm).double()
    with torch.no_grad():
        expected = pytree.tree_leaves(exact(x.double()))
    rules = ("float_tail", "split_cat", "split_range_3", "split_head_auto")
    sites = [s for s in find_sites(gm) if s.rule in rules and not s.blocked]
    taken: set[str] = set()
    steps: list[str] = []
    for site in sites:
        if not taken & set(site.nodes):
            steps.append(f"{site.rule}@{site.anchor}")
            taken |= set(site.nodes) if site.rule != "float_tail" else set()
    assert len(steps) > 15
    new = rewrite(gm, Plan.parse(" ".join(steps))).double()
    with torch.no_grad():
        found = pytree.tree_leaves(new(x.double()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    in_int8(gm, " ".join(steps), x, "onnxruntime")  # can be written and runs


@pytest.mark.parametrize("name", ["onnxruntime", "per_tensor"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Yolox, id="x", marks=pytest.mark.slow),
        pytest.param(Yolov8, id="8", marks=pytest.mark.slow),
        pytest.param(Yolov5, id="5", marks=pytest.mark.slow),
    ],
)
def test_splitting_the_stem_is_what_brings_a_deep_network_back(
    make: Callable[[], nn.Module], name: str
) -> None:
    gm, x = graph_of(trained(make()))
    with torch.no_grad():
        expected = pytree.tree_leaves(gm(x))
    tail = "float_tail@output"
    plain = sum(errors(in_int8(gm, tail, x, name)[0], expected, "raw"))
    split = f"{tail} split_range_3@{layers(gm)[0].name}"
    assert sum(errors(in_int8(gm, split, x, name)[0], expected, "raw")) < 0.25 * plain
