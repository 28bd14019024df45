"""What plans add to a network's cost, before any of them is scored."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import fx

from rewriter import Plan, Step, cost
from rewriter.errors import RewriteError
from rewriter.plan import rewrite, rule_named

log = logging.getLogger(__name__)


def extra_macs(gm: fx.GraphModule, plans: Sequence[Plan], before: int) -> dict[str, int]:
    """MACs that each plan adds to those ``before``, by its text; plans that do not apply are left out."""
    found: dict[str, int] = {}
    for plan in plans:
        if all(rule_named(step.rule).free for step in plan.steps):
            found[str(plan)] = 0
            continue
        known = [_added(gm, step) for step in plan.steps] if len(plan.steps) == 1 else [None]
        if known[0] is not None:
            found[str(plan)] = known[0]
            continue
        try:
            found[str(plan)] = cost(rewrite(gm, plan)).macs - before
        except RewriteError as cause:
            log.warning("plan %r: %s", str(plan), cause)
    return found


def _added(gm: fx.GraphModule, step: Step) -> int | None:
    """MACs of a single step, where its rule knows them without a rewrite."""
    rule = rule_named(step.rule)
    site = rule.site_at(gm, step.anchor) if rule.stage == "thin" else None
    return None if site is None or site.blocked else rule.added_macs(gm, site)
