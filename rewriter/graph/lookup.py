"""Find nodes, layers, modules and outputs of a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from rewriter.graph import facts
from rewriter.graph.ops import LAYER_TYPES


def module_of(gm: fx.GraphModule, node: fx.Node) -> Any:
    """The module that a ``call_module`` node calls (Any: its attributes depend on its class)."""
    target = str(node.target)
    found: Any = gm
    for part in target.split("."):  # get_submodule asks twice for each part, and rules ask often
        found = found._modules.get(part)
        if found is None:
            return gm.get_submodule(target)
    return found


def is_call(gm: fx.GraphModule, node: Any, *kinds: type[nn.Module]) -> bool:
    """Whether ``node`` calls a module whose type is exactly one of ``kinds``."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and type(module_of(gm, node)) in kinds
    )


def layers(gm: fx.GraphModule) -> list[fx.Node]:
    """The layers with weights that int8 touches (convolution, linear), in running order."""
    return [n for n in gm.graph.nodes if is_call(gm, n, *LAYER_TYPES)]


def layer_name(node: fx.Node) -> str:
    """The qualified name of the module that the user wrote, such as ``blocks.0.dw.0``."""
    return str(facts.LAYER.get(node, node.target))


def kind_of(gm: fx.GraphModule, node: fx.Node) -> str:
    """What a layer is, in one word: depthwise, pointwise, conv, linear, ... or the operation."""
    if node.op != "call_module":
        return getattr(node.target, "__name__", str(node.target))
    m = module_of(gm, node)
    if isinstance(m, nn.Linear):
        return "linear"
    if isinstance(m, nn.ConvTranspose2d):
        return "transposed"
    if isinstance(m, (nn.Conv1d, nn.Conv2d)):
        if m.groups > 1:
            return "depthwise" if m.groups == m.in_channels else "grouped"
        return "pointwise" if all(k == 1 for k in m.kernel_size) else "conv"
    return type(m).__name__.lower()


def find(gm: fx.GraphModule, name: str) -> fx.Node:
    """The node called ``name``."""
    node = next((n for n in gm.graph.nodes if n.name == name), None)
    if node is None:
        raise KeyError(name)
    return node


def outputs(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose values the graph returns, flattened, in order."""
    (output,) = gm.graph.find_nodes(op="output")
    return [n for n in pytree.tree_leaves(output.args[0]) if isinstance(n, fx.Node)]


def unflatten(gm: fx.GraphModule, flat: list[Any]) -> Any:
    """Nest flat outputs (those of ``outputs``) as the user's ``forward`` returned them."""
    rest, structure = iter(flat), facts.STRUCTURE.of(gm)
    constants = facts.CONSTANT_OUTPUTS.of(gm)
    leaves = [constants[i] if i in constants else next(rest) for i in range(structure.num_leaves)]
    return pytree.tree_unflatten(leaves, structure)


@dataclass(frozen=True)
class Opaque:
    """A sub-module that is kept whole: it is run as it is, and nothing inside it is rewritten."""

    name: str
    kind: str
    reason: str
    line: str = ""
