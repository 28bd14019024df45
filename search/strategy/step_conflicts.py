"""Which two steps of a network do not go together: after the one the other finds nothing any more.

A depthwise layer that a step has merged away cannot be split, one that has become dense ends the
channels that a split would carry through it, and of a split head no layer is left to be kept in
float. In a network with a dozen such places nearly
every random plan has such a pair, so the space leaves them out from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from rewriter import Plan, Step
from rewriter.errors import RewriteError
from rewriter.plan import rewrite, rule_named
from rewriter.rules import Site


def clashes(gm: fx.GraphModule, sites: Sequence[Site]) -> Iterator[tuple[Step, Step]]:
    """Pairs of steps of which the second cannot be carried out after the first.

    Looked at are splits after steps that replace layers, and layers in float after splits, where
    both act on the same nodes.

    Args:
        gm: Profiled canonical graph.
        sites: The places that are looked at, none of them blocked.
    """
    makes_layers = [s for s in sites if _stage(s) == "replace" and not _only_marks(s)]
    splits = [s for s in sites if _stage(s) == "split"]
    # one that replaces layers leaves other channels there than were thinned
    for site in (s for s in sites if _stage(s) == "thin"):
        for other in makes_layers:
            if _all_of(site) & _all_of(other):
                yield Step.at(other), Step.at(site)
    marks = [s for s in sites if _stage(s) == "replace" and _only_marks(s)]
    for site in makes_layers:
        near = [other for other in splits if _all_of(site) & _all_of(other)]
        yield from _lost(gm, [site], near)
    for anchor in {s.anchor for s in splits}:
        after = [other for other in marks if other.anchor == anchor]
        here = [s for s in splits if s.anchor == anchor]
        # what a split makes of a layer is the same for any number of groups
        for kind in {type(rule_named(s.rule)) for s in here}:
            yield from _lost(gm, [s for s in here if type(rule_named(s.rule)) is kind], after)


def _lost(
    gm: fx.GraphModule, alike: Sequence[Site], later: Sequence[Site]
) -> Iterator[tuple[Step, Step]]:
    """Each of the steps ``alike``, with each later step that finds nothing after the first of them."""
    if not later:
        return
    try:
        made = rewrite(gm, Plan((Step.at(alike[0]),)))
    except RewriteError:
        return
    for other in later:
        found = rule_named(other.rule).site_at(made, other.anchor)
        if found is None or found.blocked:
            yield from ((Step.at(site), Step.at(other)) for site in alike)


def _stage(site: Site) -> str:
    rule = rule_named(site.rule)
    return rule.stage if rule.exclusive else ""


def _only_marks(site: Site) -> bool:
    return rule_named(site.rule).contract == "annotation"


def _all_of(site: Site) -> set[str]:
    return {*site.nodes, *site.readers}
