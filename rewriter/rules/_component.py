"""What a rule for components is: one site for each, at its first dense layer (``rewriter.surgery.channel_component``)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Set
from typing import ClassVar, Literal

from torch import fx

from rewriter.rules._rule import RewriteRule, Site
from rewriter.surgery.channel_component import Component, component_at, components


class ComponentRule(RewriteRule):
    """A rule that splits the channels of a component; judging a site costs more than finding it."""

    stage: ClassVar[Literal["replace", "split", "thin", "resize"]] = "split"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        return (self._site(gm, component) for component in components(gm))

    def site_at(self, gm: fx.GraphModule, anchor: str) -> Site | None:
        component = component_at(gm, anchor)
        return None if component is None else self._site(gm, component)

    def near(self, gm: fx.GraphModule, names: Set[str]) -> Iterator[Site]:
        for component in components(gm):
            nodes = (*component.entries, *component.inside, *self._readers(component))
            if any(n.name in names for n in nodes):
                yield self._site(gm, component)

    def _site(self, gm: fx.GraphModule, component: Component) -> Site:
        nodes = (*component.entries, *component.inside)
        blocked = self._problem(gm, component)
        return self.site(*nodes, blocked=blocked, readers=self._readers(component))

    def _readers(self, component: Component) -> Iterator[fx.Node]:
        """Layers that read in int8 what the rule improves."""
        return iter(())

    @abstractmethod
    def _problem(self, gm: fx.GraphModule, component: Component) -> str:
        """Why the rule may not act on a component, "" where it may."""
