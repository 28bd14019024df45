"""SiLU, hard-swish, GELU or Mish -> ReLU, ReLU6 or hard-swish, at one layer.

Before: x -> layer -> f -> readers
After:  x -> layer' -> g -> readers'     g = ReLU, ReLU6 or hard-swish

    f(z) ~ s g(a z + b) + c     a, b, s, c (C,): one each for a channel

a and b go into the layer (with s where g is a ReLU), s and c into the readers, whose weights are
then found again by least squares on what they read now, so that they make what they made; after
that a few gradient steps on the network's output move both (``rewriter.fitting.activations``).
Without a fit the rule only swaps the function.

Why: these functions have a long positive tail beside a dense stretch of small negative values, and
    scaling their channels changes them, so that no equalization passes. Most kernels compute them
    from a rounded input to a rounded output, two roundings where a ReLU has one. Behind a ReLU
    channels can be scaled, split in two or absorbed again; a ReLU6 is given channels that all span
    [0, 6].
Exact: no; the layer before and those that read the value are refitted on unlabeled inputs.
Cost: no MACs, and one operation less where the kernel of the layer clips by itself.
Source: replacing them everywhere, with full retraining, is what edge toolchains do (Texas Instruments,
    edgeai-torchmodelopt, 2024); Zhong et al., 2025 (APHQ-ViT, arXiv:2504.02508), GELU -> ReLU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.lookup import find, is_call, module_of
from rewriter.int8.annotate import is_layer
from rewriter.rules._rule import Contract, RewriteRule, Site, mark

SMOOTH = (nn.SiLU, nn.Hardswish, nn.GELU, nn.Mish)
KINDS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
}
# Layers that read the value, at most: behind a residual trunk there may be dozens.
READERS = 4


@dataclass(frozen=True)
class ReplaceActivation(RewriteRule):
    """One site for each layer with such a function behind it, at the layer."""

    kind: str = "relu"
    contract: ClassVar[Contract] = "approximate"
    free: ClassVar[bool] = True
    in_graph_order: ClassVar[bool] = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"replace_activation_{self.kind}"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for node in gm.graph.nodes:
            if is_call(gm, node, *SMOOTH) and not is_call(gm, node, KINDS[self.kind]):
                site = self._site(gm, node)
                if not site.blocked or self.kind == "relu":  # a near miss is shown once
                    yield site

    def _site(self, gm: fx.GraphModule, node: fx.Node) -> Site:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if not is_layer(gm, source):
            return self.site(node, blocked=f"{source.name}, which it reads, is no layer")
        if not is_call(gm, source, nn.Conv2d, nn.Linear):
            kind = type(module_of(gm, source)).__name__
            return self.site(source, node, blocked=f"a {kind} is not refitted")
        if len(source.users) > 1:
            many = f"{source.name} is read by {len(source.users)} nodes"
            return self.site(source, node, blocked=many)
        readers = next_layers(gm, node)
        if not readers:
            return self.site(source, node, blocked="no layer reads the value")
        if self.kind == "relu6" and not reads_directly(gm, node):
            why = "what a channel spans cannot be chosen: not only layers read the value"
            return self.site(source, node, blocked=why)
        return self.site(source, node, readers=readers)

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        source, node = (find(gm, name) for name in site.nodes)
        made = KINDS[self.kind]().eval()
        gm.set_submodule(str(node.target), made)
        if facts.CHANNEL_RANGE.known(source):  # none of the three falls where it matters
            low, high = facts.CHANNEL_RANGE.of(source)
            facts.CHANNEL_RANGE.put(node, (made(low), made(high)))
        mark(source, site)
        mark(node, site)

    def apply_fitted(self, gm: fx.GraphModule, site: Site, state: Mapping[str, Tensor]) -> bool:
        self.apply(gm, site)
        put_tensors(gm, site.anchor, state)
        return True


def put_tensors(gm: fx.GraphModule, anchor: str, state: Mapping[str, Tensor]) -> None:
    """Edit gm: weights and biases of layers by node name, those of the anchor without one."""
    for path, value in state.items():
        owner, _, name = path.rpartition(".")
        layer = module_of(gm, find(gm, owner or anchor))
        setattr(layer, name, nn.Parameter(value.to(layer.weight), requires_grad=False))


def next_layers(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The first layers behind a value, on every way, in graph order; a few at most."""
    reached, found = {node}, list[fx.Node]()
    later = node.next
    while later.op != "root" and len(found) < READERS:
        if reached & set(later.all_input_nodes):
            if is_layer(gm, later):
                found.append(later)
            else:
                reached.add(later)
        later = later.next
    return found


def reads_directly(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether only layers with weights for each input channel read a value."""
    return all(
        is_call(gm, user, nn.Conv2d, nn.Linear) and user.args[0] is node for user in node.users
    )
