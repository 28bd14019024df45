from __future__ import annotations

import random
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from rewriter import plan as planning
from rewriter.errors import PlanError
from rewriter.graph.channel_ranges import profile
from rewriter.graph.edit import copy_graph
from rewriter.graph.lookup import find, is_call, layers, module_of
from rewriter.int8.scheme import target
from rewriter.plan import Plan, Step, find_sites, rewrite
from rewriter.rules import RULES, RewriteRule, Site
from rewriter.tracing.trace import TraceError, trace
from tests.networks import SIZE, Affine, network, randomise, relative_error

NAMES = [r.name for r in RULES]
steps = st.builds(
    Step, st.sampled_from(NAMES), st.from_regex(r"[a-z_][a-z0-9_]{0,12}", fullmatch=True)
)


# ---------------------------------------------------------------------------------------- text


@given(st.lists(steps, max_size=6))
def test_text_and_plan_are_inverse(found: list[Step]) -> None:
    plan = Plan(tuple(found))
    assert Plan.parse(str(plan)) == plan
    assert str(Plan.parse(str(plan))) == str(plan)
    assert hash(Plan.parse(str(plan))) == hash(plan)
    turned = Plan(tuple(reversed(found)) + tuple(found))
    assert turned == plan
    assert list(plan.steps) == sorted(set(found))
    assert "\n" not in str(plan)


def test_spelling() -> None:
    assert str(Plan()) == ""
    assert Plan.parse("  ") == Plan()
    text = "merge_separable@blocks_0_dw_0 keep_float@stem"
    assert str(Plan.parse(text)) == "keep_float@stem merge_separable@blocks_0_dw_0"
    assert Plan.parse(text + "\n" + text) == Plan.parse(text)


@pytest.mark.parametrize("word", ["keep_float", "@stem", "keep_float@", "keep float@stem"])
def test_words_that_are_no_steps(word: str) -> None:
    with pytest.raises(PlanError, match="expected rule@anchor"):
        Plan.parse(f"keep_float@a {word}")


def test_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(PlanError, match="'keep_flaot': unknown; did you mean 'keep_float'"):
        Plan.parse("keep_flaot@stem")
    with pytest.raises(PlanError, match=r"unknown \(known: "):
        Plan.parse("zzz@stem")


def test_rule_names_are_unique_and_spellable() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(name.replace("_", "").isalnum() and name.islower() for name in NAMES)


# ------------------------------------------------------------------------------------- rewrite


class DoubleWeights(RewriteRule):
    """A toy: takes a layer and the node that reads it."""

    name: ClassVar[str] = "double_weights"
    contract: ClassVar = "approximate"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for node in layers(gm):
            blocked = "it is linear" if is_call(gm, node, nn.Linear) else ""
            yield self.site(node, *node.users, blocked=blocked)

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        module_of(gm, find(gm, site.anchor)).weight.data.mul_(2)


class AddOne(DoubleWeights):
    name: ClassVar[str] = "add_one"

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        module_of(gm, find(gm, site.anchor)).weight.data.add_(1)


class Mark(DoubleWeights):
    name: ClassVar[str] = "mark_all"
    exclusive: ClassVar[bool] = False

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        find(gm, site.anchor).meta["marked"] = True


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> fx.GraphModule:
    monkeypatch.setattr(planning, "RULES", (DoubleWeights(), AddOne(), Mark()))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(4 * 17 * 15, 2))
    return trace(randomise(model), torch.randn(2, *SIZE))


def weights(gm: fx.GraphModule) -> list[torch.Tensor]:
    return [module_of(gm, n).weight.clone() for n in layers(gm)]


def test_order_of_rules_is_that_of_the_catalog(toys: fx.GraphModule) -> None:
    source = weights(toys)
    done = weights(rewrite(toys, Plan.parse("double_weights@_1")))
    assert torch.equal(done[1], source[1] * 2)
    assert torch.equal(done[0], source[0])
    again = weights(toys)
    assert all(torch.equal(a, b) for a, b in zip(source, again, strict=True))


def test_overlap_names_both_steps(toys: fx.GraphModule) -> None:
    for text, shared in (
        ("double_weights@_0 add_one@_0", "_0"),
        (
            "double_weights@_0 double_weights@_1",
            "_1",
        ),  # the second node of one is the first of the other
        ("add_one@_1 double_weights@_0", "_1"),
    ):
        with pytest.raises(PlanError) as caught:
            rewrite(toys, Plan.parse(text))
        assert all(word in str(caught.value) for word in text.split())
        assert f"both change {shared}" in str(caught.value)


def test_rules_that_share_a_node(toys: fx.GraphModule) -> None:
    done = rewrite(toys, Plan.parse("double_weights@_0 mark_all@_0 mark_all@_1"))
    assert find(done, "_0").meta["marked"]
    assert "marked" not in find(toys, "_0").meta


def test_blocked_unknown_and_unmatched_anchors(toys: fx.GraphModule) -> None:
    with pytest.raises(PlanError, match="add_one@_4: not applicable: it is linear"):
        rewrite(toys, Plan.parse("add_one@_4"))
    with pytest.raises(PlanError, match="no node is called '_11'; did you mean '_1'"):
        rewrite(toys, Plan.parse("add_one@_11"))
    with pytest.raises(PlanError, match="add_one@_2: the rule does not match there"):
        rewrite(toys, Plan.parse("add_one@_2"))


def test_an_anchor_that_another_step_removed_is_an_overlap() -> None:
    model = nn.Sequential(
        Affine(nn.Conv2d(3, 3, 3, groups=3), nn.ReLU6), Affine(nn.Conv2d(3, 4, 1), None)
    )
    gm = trace(randomise(model), torch.randn(2, *SIZE))
    with pytest.raises(PlanError) as caught:
        rewrite(gm, Plan.parse("keep_float@_0_conv merge_separable@_0_conv"))
    assert "keep_float@_0_conv" in str(caught.value)
    assert "merge_separable@_0_conv" in str(caught.value)


# ------------------------------------------------------------------------------ real rules


def profiled(seed: int) -> fx.GraphModule:
    gm = trace(network(seed), torch.randn(2, *SIZE))
    profile(gm, [inputs(seed)])
    return gm


def inputs(seed: int) -> torch.Tensor:
    """Calibration inputs, on which a rule that is exact within the ranges must be exact."""
    return torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(seed))


def some_plan(gm: fx.GraphModule, seed: int, contracts: tuple[str, ...]) -> Plan:
    """A random plan of up to four steps that can be carried out."""
    rng = random.Random(seed)
    allowed = {r.name for r in RULES if r.contract in contracts}
    sites = [s for s in find_sites(gm) if not s.blocked and s.rule in allowed]
    rng.shuffle(sites)
    plan = Plan()
    for site in sites[:8]:
        wider = Plan((*plan.steps, Step(site.rule, site.anchor)))
        try:
            rewrite(gm, wider, facts=FACTS)
        except PlanError:
            continue
        plan = wider
        if len(plan.steps) == 4:
            break
    return plan


FACTS = {"scheme": target("onnxruntime")}


@pytest.mark.parametrize(
    "seed", [*range(6), *[pytest.param(s, marks=pytest.mark.slow) for s in range(6, 30)]]
)
def test_random_plans_on_random_networks(seed: int) -> None:
    gm, x = profiled(seed), inputs(seed)
    code, state = gm.code, {k: v.clone() for k, v in gm.state_dict().items()}
    meta = {n.name: dict(n.meta) for n in gm.graph.nodes}
    plan = some_plan(gm, seed, ("exact", "annotation"))
    assert plan.steps
    first, second = (
        rewrite(gm, p, facts=FACTS) for p in (plan, Plan(tuple(reversed(plan.steps))))
    )
    with torch.no_grad():
        assert relative_error(gm(x), first(x)) < 1e-4, str(plan)
        assert relative_error(first(x), second(x)) == 0
    assert first.code == second.code
    assert [n.name for n in first.graph.nodes] == [n.name for n in second.graph.nodes]
    # the source is as it was
    assert gm.code == code
    for name, tensor in gm.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for node in gm.graph.nodes:
        assert node.meta.keys() == meta[node.name].keys()
        assert node.meta.get("keep_float") == meta[node.name].get("keep_float")
    assert rewrite(gm, plan, facts=FACTS).code == first.code


@pytest.mark.parametrize("seed", range(3))
def test_empty_plan_is_the_identity_on_a_copy(seed: int) -> None:
    gm = profiled(seed)
    done = rewrite(gm, Plan())
    assert done is not gm
    assert done.code == gm.code
    mine = {id(t) for t in gm.state_dict(keep_vars=True).values()}
    assert not mine & {id(t) for t in done.state_dict(keep_vars=True).values()}
    x = torch.randn(2, *SIZE)
    with torch.no_grad():
        assert relative_error(gm(x), done(x)) == 0


def test_sites_are_names_that_exist_and_matching_only_looks() -> None:
    gm = profiled(5)
    code = gm.code
    names = {n.name for n in gm.graph.nodes}
    for site in find_sites(gm):
        assert site.rule in NAMES
        assert set(site.nodes) - {"model"} <= names
        assert site.anchor == site.nodes[0]
    assert gm.code == code
    assert find_sites(gm) == find_sites(copy_graph(gm))


def test_errors_are_of_one_family() -> None:
    assert issubclass(PlanError, planning.PlanError.__mro__[1])
    assert issubclass(TraceError, PlanError.__mro__[1])
