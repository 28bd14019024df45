"""Which exact splits to try before anything else: all heads together, then the widest values.

Each is free and keeps the float function, and both answer the commonest harm of int8 in a
detector. One at a time they show little: with six heads, five others still have one range each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from rewriter.graph import outputs
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
        ("outputs split", tuple(Step.at(s) for s in ends)),
        ("channels split by range", tuple(_by_range(free, damage))),
    ]
    return tuple((name, steps) for name, steps in found if steps)


def _classes(gm: fx.GraphModule) -> bool:
    """Whether the only output is one score for each class: of one kind, and so of one range."""
    found = outputs(gm)
    alone = len(found) == 1 and len(found[0].meta.get("shape", ())) == 2
    return alone and gm.meta.get("kind") != "values"


def _by_range(sites: Sequence[Site], damage: Mapping[str, float]) -> Iterator[Step]:
    """Splits where layers are hurt most, none of which shares a layer with another.

    A layer is hurt by its input as much as by its weights: those that read the values count, the
    one that makes them does not.
    """
    best: dict[str, Site] = {}
    for rule in RANGES:
        for site in sites:
            if site.rule == rule:
                best.setdefault(site.anchor, site)
    harm = {
        a: sum(damage.get(n, 0.0) for n in (*s.nodes[1:], *s.readers)) for a, s in best.items()
    }
    least = SHARE * sum(damage.values())
    taken: set[str] = set()
    for anchor in sorted(best, key=lambda a: -harm[a])[:MOST]:
        if harm[anchor] > least and not taken.intersection(best[anchor].nodes):
            taken.update(best[anchor].nodes)
            yield Step(best[anchor].rule, anchor)
