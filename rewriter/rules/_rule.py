"""What a rule is: it names the sites where it may act, and edits a graph at one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, fx

from rewriter.graph import facts
from rewriter.graph.lookup import find, layer_name, layers

# exact: the float function is kept; approximate: it is kept only after fitting; annotation: only
# int8 changes.
Contract = Literal["exact", "approximate", "annotation"]


@dataclass(frozen=True)
class Site:
    """One place where one rule may act; names, not nodes: it survives a copy and a new trace.

    Args:
        rule: the rule's name.
        nodes: names of the nodes the rule takes; the first is the anchor that a plan names.
        blocked: why the rule may not act here, "" where it may: a near miss that is shown to the
            user.
        readers: names of nodes that are not taken, but read in int8 what the rule improves.
    """

    rule: str
    nodes: tuple[str, ...]
    blocked: str = ""
    readers: tuple[str, ...] = ()

    @property
    def anchor(self) -> str:
        return self.nodes[0]


class RewriteRule(ABC):
    """A rewrite of the architecture, or of what int8 does to it.

    ``match`` only looks. ``apply`` edits the graph in place, only at a site that ``match`` gave
    for this very graph, and keeps the names of the values that the rest of the graph reads. The
    caller recompiles.

    Attributes:
        name: how a plan calls it, verb_object.
        contract: what ``apply`` promises; the shared tests hold it to that.
        version: raised when the result of ``apply`` changes, so that stored scores are not reused.
        exclusive: whether a node can take part in only one step with such a rule.
        free: whether it adds no MACs.
        stage: rules of different stages may act on the same node, in the order of the catalogue: a
            layer that one step replaced can be split by another, and what is left of the
            network can be thinned in between.
        in_graph_order: whether steps of such rules are applied in the order of their anchors in
            the graph, whatever their rules are called.
        saves: whether it takes MACs away and answers nothing that int8 does: offered only where
            less compute is wanted.
        float_layers: how many layers it leaves in float, which limits count.
        scales: whether what it saves is a share of the MACs that the other steps leave.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]
    version: ClassVar[int] = 1
    exclusive: ClassVar[bool] = True
    free: ClassVar[bool] = False
    stage: ClassVar[Literal["replace", "split", "thin", "resize"]] = "replace"
    in_graph_order: ClassVar[bool] = False
    saves: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    float_layers: ClassVar[int] = 0

    @abstractmethod
    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        """Every site in the graph, near misses included (with ``blocked``)."""

    def site_at(self, gm: fx.GraphModule, anchor: str) -> Site | None:
        """The site of ``match`` with this anchor, None where there is none.

        Rules whose sites cost something to judge find it without judging all others.
        """
        return next((site for site in self.match(gm) if site.anchor == anchor), None)

    def near(self, gm: fx.GraphModule, names: Set[str]) -> Iterator[Site]:
        """The sites of ``match`` that these nodes take part in, as nodes or as readers."""
        return (site for site in self.match(gm) if names & {*site.nodes, *site.readers})

    @abstractmethod
    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        """Edit gm in place at ``site``."""

    def apply_fitted(self, gm: fx.GraphModule, site: Site, state: Mapping[str, Tensor]) -> bool:
        """Edit gm in place with fitted tensors; False: ``apply`` does, and the caller loads them."""
        del gm, site, state
        return False

    def added_macs(self, gm: fx.GraphModule, site: Site) -> int | None:
        """MACs that the rule adds at a site, where that is known without a rewrite; else None."""
        del gm, site
        return None

    def site(self, *nodes: fx.Node, blocked: str = "", readers: Iterable[fx.Node] = ()) -> Site:
        """A site of this rule at these nodes, the anchor first."""
        names = tuple(dict.fromkeys(n.name for n in readers))
        return Site(self.name, tuple(n.name for n in nodes), blocked, names)


def mark(node: fx.Node, site: Site) -> None:
    """Write into a node's meta which step made or changed it."""
    facts.REWRITTEN_BY.put(node, f"{site.rule}@{site.anchor}")


def mark_layer(gm: fx.GraphModule, site: Site, word: str) -> None:
    """Write ``word`` into the meta of the layer at a site; one that an earlier step split is several nodes now, and all get it."""
    name = layer_name(find(gm, site.anchor))
    for node in layers(gm):
        if layer_name(node) == name:
            facts.named(word).put(node, True)
            mark(node, site)
