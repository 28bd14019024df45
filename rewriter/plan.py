"""A plan is a set of steps, each one rule at one place: a line of text that rewrites a graph."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from rewriter.errors import PlanError
from rewriter.graph.channel_ranges import describe, has_ranges_of, weight_mark
from rewriter.graph.edit import copy_graph
from rewriter.graph.facts import PROFILED, REWRITTEN_BY, named
from rewriter.graph.lookup import layers, module_of
from rewriter.rules import RULES, RewriteRule, Site
from rewriter.rules._model_rule import WholeModelRule

__all__ = ["Plan", "Step", "find_sites", "in_order", "rewrite", "rule_named"]


@dataclass(frozen=True, order=True)
class Step:
    """One rule at one anchor; its text is one word, ``merge_separable@blocks_0_dw_0``."""

    rule: str
    anchor: str

    @classmethod
    def at(cls, site: Site) -> Step:
        """The step of a site's rule there."""
        return cls(site.rule, site.anchor)

    def __str__(self) -> str:
        return f"{self.rule}@{self.anchor}"


@dataclass(frozen=True)
class Plan:
    """A set of steps, sorted and unique; ``str`` and ``Plan.parse`` are inverse.

    >>> str(Plan.parse("keep_float@fc equalize@model equalize@model"))
    'equalize@model keep_float@fc'
    >>> Plan.parse("keep_float@fc").steps[0].anchor
    'fc'
    """

    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(sorted(set(self.steps))))

    def __str__(self) -> str:
        return " ".join(map(str, self.steps))

    @staticmethod
    def parse(text: str) -> Plan:
        """The plan that ``text`` spells, words ``rule@anchor`` separated by blanks.

        Raises:
            PlanError: a word is no step, or its rule is unknown.
        """
        steps = []
        for word in text.split():
            rule, at, anchor = word.partition("@")
            if not (rule and at and anchor):
                raise PlanError(f"plan: {word!r}: expected rule@anchor")
            rule_named(rule)
            steps.append(Step(rule, anchor))
        return Plan(tuple(steps))


def rule_named(name: str) -> RewriteRule:
    """The rule in the catalogue called ``name``."""
    for rule in RULES:
        if rule.name == name:
            return rule
    near = difflib.get_close_matches(name, [r.name for r in RULES], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise PlanError(
        f"plan: rule {name!r}: unknown{hint} (known: {', '.join(r.name for r in RULES)})"
    )


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """Every site of every rule in a graph, blocked ones too, in the order of the catalogue."""
    return [site for rule in RULES for site in rule.match(gm)]


def rewrite(
    gm: fx.GraphModule,
    plan: Plan,
    weights: Mapping[str, Mapping[str, Tensor]] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> fx.GraphModule:
    """A copy of the graph with every step of the plan applied, in the order of the catalogue.

    Args:
        gm: canonical graph; it is not touched.
        plan: what to do.
        weights: fitted tensors of the layer that an approximate step makes, by ``str(step)``, and
            of layers after it that were fitted with it, their names before a dot. They are put in
            before the next step is applied, so that an exact rule divides or scales the fitted
            layers.
        facts: what the rules of the whole model may read in the copy's meta ("scheme": the
            target).

    Raises:
        PlanError: a step has no site, its site is blocked, or two steps exclude each other.
    """
    known = has_ranges_of(gm) and not any(_moves_ranges(rule_named(s.rule)) for s in plan.steps)
    gm = copy_graph(gm)
    for key, value in (facts or {}).items():
        named(key).put(gm, value)
    taken: dict[tuple[str, str], Step] = {}
    for rule, step in in_order(gm, plan):
        # in what the steps before have made of the graph
        site = _site(gm, rule, step, taken)
        for name in site.nodes if rule.exclusive else ():
            if (rule.stage, name) in taken:
                other = taken[rule.stage, name]
                raise PlanError(f"plan: {other} and {step}: both change {name}")
            taken[rule.stage, name] = step
        state = (weights or {}).get(str(step), {})
        if not (state and rule.apply_fitted(gm, site, state)):
            rule.apply(gm, site)
            _load(gm, step, state)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()
    if any(rule_named(s.rule).contract != "annotation" for s in plan.steps):
        describe(gm)
    if known:
        PROFILED.put(gm, (weight_mark(gm), *PROFILED.of(gm)[1:]))
    else:
        PROFILED.drop(gm)
    return gm


def _moves_ranges(rule: RewriteRule) -> bool:
    """Whether values have other ranges behind a rule than their nodes know; the rules of the whole model see to them."""
    return rule.contract != "annotation" and not isinstance(rule, WholeModelRule)


def in_order(gm: fx.GraphModule, plan: Plan) -> list[tuple[RewriteRule, Step]]:
    """The steps of a plan as they are applied: by the catalogue, and where a rule says so by their place in the graph."""
    place = {n.name: i for i, n in enumerate(gm.graph.nodes)}
    ranked: list[tuple[tuple[int, int, Step], RewriteRule]] = []
    first: dict[type[RewriteRule], int] = {}
    for number, rule in enumerate(RULES):
        ordered = rule.in_graph_order
        rank = first.setdefault(type(rule), number) if ordered else number
        for step in plan.steps:
            if step.rule == rule.name:
                here = place.get(step.anchor, len(place)) if ordered else 0
                ranked.append(((rank, here, step), rule))
    return [(rule, key[2]) for key, rule in sorted(ranked, key=lambda r: r[0])]


def _load(gm: fx.GraphModule, step: Step, state: Mapping[str, Tensor]) -> None:
    """Put fitted tensors into the layer that ``step`` has just made, and those after it, in place."""
    if not state:
        return
    made = [n for n in layers(gm) if REWRITTEN_BY.get(n) == str(step)]
    if len(made) != 1:
        raise PlanError(f"{step}: {len(made)} layers for the fitted weights, expected 1")
    owners = {"": made[0]} | {n.name: n for n in layers(gm)}
    found: dict[str, dict[str, Tensor]] = {}
    for path, value in state.items():
        owner, _, name = path.rpartition(".")
        found.setdefault(owner, {})[name] = value
    for owner, tensors in found.items():
        if owner not in owners:
            raise PlanError(f"{step}: its fitted weights are of {owner!r} too, which is not there")
        module_of(gm, owners[owner]).load_state_dict(tensors)


def _site(
    gm: fx.GraphModule,
    rule: RewriteRule,
    step: Step,
    taken: dict[tuple[str, str], Step],
) -> Site:
    site = rule.site_at(gm, step.anchor)
    if site is not None and not site.blocked:
        return site
    for (_, name), other in taken.items():
        if name == step.anchor:
            raise PlanError(f"plan: {other} and {step}: both change {step.anchor}")
    if site is not None:
        raise PlanError(f"{step}: not applicable: {site.blocked}")
    names = [n.name for n in gm.graph.nodes]
    if step.anchor not in names:
        near = difflib.get_close_matches(step.anchor, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PlanError(f"{step}: no node is called {step.anchor!r}{hint}")
    raise PlanError(f"{step}: the rule does not match there")
