"""What a rule for the whole model is: one site, whose anchor is the word ``model``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import fx

from rewriter.graph import facts
from rewriter.rules._rule import RewriteRule, Site

MODEL = "model"


class WholeModelRule(RewriteRule):
    """A free rule that acts on all layers at once, after the rules for single places and after fitting.

    It reads what is known of the graph: ``channel_range`` and, where there, ``influence`` in the
    nodes' meta, and the target in ``facts.SCHEME`` of the graph.

    Attributes:
        weighs: whether it is better with ``influence``, which costs a backward pass over the
            calibration inputs.
        replaces: whether ``apply`` changes the structure, and not only numbers.
        repair: what ``assemble`` is to do after calibration; "" for a rule whose ``apply`` does
            all.
    """

    exclusive: ClassVar[bool] = False
    free: ClassVar[bool] = True
    weighs: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    repair: ClassVar[str] = ""

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        yield Site(self.name, (MODEL,), self.problem(gm))

    def problem(self, gm: fx.GraphModule) -> str:
        """Why the rule has nothing to do in this graph; "" if it has."""
        raise NotImplementedError

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        facts.REPAIRS.put(gm, facts.REPAIRS.get(gm, frozenset()) | {self.repair})
