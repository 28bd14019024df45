from __future__ import annotations

import torch
from torch import Tensor, nn

from rewriter import find_sites, quantize, target
from rewriter.int8.annotate import annotation
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.session import Session
from rewriter.int8.simulate import simulate
from rewriter.rules.float_trunk import FloatTrunk
from tests.rules import check

RULE = FloatTrunk()
SHAPE = (6, 8, 7)


class Trunk(nn.Module):
    """Residual blocks."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv2d(6, 6, 3, 1, 1) for _ in range(blocks))
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x.relu())
        return self.head(x)


def sums(gm: torch.fx.GraphModule, on: str, *steps: str) -> dict[str, bool]:
    """Which sums are stored in int8."""
    q = quantize(check.rewritten_by_plan(gm, *steps), target(on), [check.inputs(SHAPE).float()])
    return {n.name: annotation(n).output is not None for n in q.gm.graph.nodes if "add" in n.name}


def test_one_site_holds_all_sums_and_the_code_stays() -> None:
    new = check.rewrites(RULE, Trunk(), SHAPE, sites=1, on="onnxruntime")
    kept = [n.name for n in new.graph.nodes if n.meta.get("keep_float")]
    assert kept == ["add", "add_1", "add_2"]


def test_the_layers_behind_are_the_readers() -> None:
    gm = check.graph_of(check.randomise(Trunk()), SHAPE, "onnxruntime")
    (site,) = RULE.match(gm)
    assert set(site.readers) == {"parts_1", "parts_2", "head"}


def test_layers_stay_in_int8_and_read_the_sum_rounded() -> None:
    gm = check.graph_of(check.randomise(Trunk()), SHAPE, "onnxruntime").float()
    assert all(sums(gm, "onnxruntime").values())
    new = check.rewritten_by_plan(gm, "float_trunk@add")
    for on in ("onnxruntime", "tensorrt", "tflite"):
        q = quantize(new, target(on), [check.inputs(SHAPE).float()])
        weights = [annotation(n).weight for n in q.gm.graph.nodes if "parts" in n.name]
        assert all(w is not None for w in weights)
    assert annotation(next(n for n in q.gm.graph.nodes if n.name == "head")).reads == ("add_2",)


def errors(model: nn.Module, shape: tuple[int, ...]) -> list[float]:
    """Squared error of the simulation without and with the step; the file agrees with the simulation."""
    gm = check.graph_of(model, shape, "onnxruntime").float()
    x = check.inputs(shape, 8).float()
    found: list[float] = []
    for steps in ((), ("float_trunk@add",)):
        q = quantize(check.rewritten_by_plan(gm, *steps), target("onnxruntime"), [x])
        with torch.no_grad():
            made, wanted = simulate(q)(x), gm(x)
        found.append(float((made - wanted).square().mean()))
        file = torch.from_numpy(Session(to_onnx(q)).run(x)[0])
        assert float((file - made).abs().max()) < 0.03 * float(wanted.abs().max())
    return found


def test_sums_are_not_rounded_again_and_again() -> None:
    """Planted: the first of eight blocks adds far more than the others."""
    model = check.randomise(Trunk(8))
    with torch.no_grad():
        for i, part in enumerate(model.parts):
            for p in part.parameters():
                p.mul_(100 if i == 0 else 0.03)
    plain, kept = errors(model, SHAPE)
    assert kept < 0.7 * plain, (plain, kept)


class Sequence(nn.Module):
    """Blocks of a transformer: what linear layers add is not rounded at all."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, self.parts, strict=False):
            x = x + part(norm(x))
        return torch.sin(self.head(self.norms[-1](x)))


def test_linear_layers_write_floats_for_it() -> None:
    """Planted: two features of the trunk are large and nearly constant, and the norms take them back to size."""
    model = check.randomise(Sequence())
    with torch.no_grad():
        model.parts[0].bias[:2] += 300
        for norm in model.norms[1:]:
            norm.weight[2:] *= 60
    plain, kept = errors(model, (5, 8))
    assert kept < 0.2 * plain, (plain, kept)


def test_a_trunk_in_float_already_is_a_near_miss() -> None:
    gm = check.graph_of(check.randomise(Trunk()), SHAPE, "onnxruntime")
    for node in gm.graph.nodes:
        if "add" in node.name:
            node.meta["keep_float"] = True
    assert [s.blocked for s in RULE.match(gm)] == ["its sums are in float already"]


def test_ignores_a_single_sum_and_an_unknown_target() -> None:
    check.ignores(RULE, Trunk(1), SHAPE, on="onnxruntime")
    check.ignores(RULE, Trunk(), SHAPE)


def test_a_trunk_that_is_split_by_range_stays_in_float() -> None:
    model = check.spread(check.randomise(nn.Sequential(nn.Conv2d(6, 6, 1), Trunk())))
    gm = check.graph_of(model, SHAPE, "onnxruntime")
    split = next(
        s.anchor
        for s in find_sites(gm)
        if s.rule == "split_weights_2" and not s.blocked and "add" in s.nodes
    )
    new = check.rewritten_by_plan(gm, "float_trunk@add", f"split_weights_2@{split}")
    kept = [n.name for n in new.graph.nodes if n.meta.get("keep_float")]
    assert {"add", "add_1", "add_2"} <= set(kept)
    x = check.inputs(SHAPE)
    torch.testing.assert_close(new(x), gm(x))
