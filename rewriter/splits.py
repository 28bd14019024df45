"""Which exact splits to try before anything else: all heads together, then the widest values.

Each is free and keeps the float function, and both answer the commonest harm of int8 in a
detector. One at a time they show little: with six heads, five others still have one range each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from rewriter.component import component_of
from rewriter.graph import find, outputs
from rewriter.plan import Step
from rewriter.rules import Site

TAIL, HEAD = "float_tail", "split_head_auto"
# Three groups recovered most in what was measured, two nearly as much.
RANGES = ("split_range_3", "split_range_2")
# Places are split by range that have this share of the damage of all layers, and this many at
# most.
SHARE = 0.1
MOST = 4


def exact_splits(
    gm: fx.GraphModule, sites: Sequence[Site], damage: Mapping[str, float]
) -> tuple[tuple[str, tuple[Step, ...]], ...]:
    """Rungs of splits for ``rewriter.ladder.climb``; none where nothing matches.

    Args:
        gm: profiled canonical graph.
        sites: of its rules.
        damage: of quantizing each layer alone, by node name.
    """
    free = [s for s in sites if not s.blocked]
    ends = [] if _classes(gm) else [s for s in free if s.rule in (TAIL, HEAD)]
    found = [
        ("outputs split", tuple(Step(s.rule, s.anchor) for s in ends)),
        ("channels split by range", tuple(_by_range(gm, free, damage))),
    ]
    return tuple((name, steps) for name, steps in found if steps)


def _classes(gm: fx.GraphModule) -> bool:
    """Whether the only output is one score for each class: of one kind, and so of one range."""
    found = outputs(gm)
    alone = len(found) == 1 and len(found[0].meta.get("shape", ())) == 2
    return alone and gm.meta.get("kind") != "values"


def _by_range(
    gm: fx.GraphModule, sites: Sequence[Site], damage: Mapping[str, float]
) -> Iterator[Step]:
    """Splits of the most harmful components, none of which shares a layer with another."""
    best: dict[str, Site] = {}
    for rule in RANGES:
        for site in sites:
            if site.rule == rule:
                best.setdefault(site.anchor, site)
    harm = {anchor: _harm(gm, site, damage) for anchor, site in best.items()}
    least = SHARE * sum(damage.values())
    taken: set[str] = set()
    for anchor in sorted(best, key=lambda a: -harm[a])[:MOST]:
        if harm[anchor] > least and not taken.intersection(best[anchor].nodes):
            taken.update(best[anchor].nodes)
            yield Step(best[anchor].rule, anchor)


def _harm(gm: fx.GraphModule, site: Site, damage: Mapping[str, float]) -> float:
    """Damage of the layers that read a component's values: a layer's is that of its input too."""
    component = component_of(gm, find(gm, site.anchor))
    readers = {n.name for n in component.inside} | {user.name for user, _ in component.exits}
    return sum(damage.get(name, 0.0) for name in readers)
