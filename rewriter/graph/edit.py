"""Copy a graph and add modules to it."""

from __future__ import annotations

import copy
import operator
from typing import Any

from torch import fx, nn

from rewriter.graph import facts


def add_module(gm: fx.GraphModule, path: str, module: nn.Module) -> str:
    """Add a sub-module at ``path``, or the next free name like it, in place; return its path."""
    taken, target, number = set(dict(gm.named_modules())), path, 0
    while target in taken or _attribute_exists(gm, target):
        number += 1
        target = f"{path}_{number}"
    parent = ""
    for part in target.split(".")[:-1]:
        parent = f"{parent}.{part}" if parent else part
        if parent not in taken:
            gm.add_submodule(parent, nn.Module())
    gm.add_submodule(target, module)
    module.train(mode=False)
    return target


def _attribute_exists(gm: fx.GraphModule, path: str) -> bool:
    """Whether a parameter, buffer or other attribute of that name is in the way."""
    try:
        operator.attrgetter(path)(gm)
    except AttributeError:
        return False
    return True


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A deep copy with the same node names and meta; no tensor is shared with gm."""
    memo: dict[int, Any] = {}
    for module in gm.modules():
        if type(module).__module__.startswith("torch.nn.modules.") and not any(module.children()):
            memo[id(module)] = _copied(module, memo)
    new = copy.deepcopy(gm, memo)
    for a, b in zip(gm.graph.nodes, new.graph.nodes, strict=True):
        facts.inherit(b, a)
    facts.inherit(new, gm)
    return new


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of one of torch's own layers.

    Each has some twenty dictionaries of hooks, nearly always empty, on which ``deepcopy`` spends most
    of the time that it takes for a whole network.
    """
    new = object.__new__(type(module))
    for name, value in vars(module).items():
        plain = value is None or isinstance(value, (bool, int, float, str))
        empty = isinstance(value, (dict, set, list)) and not value
        if plain:
            new.__dict__[name] = value
        elif empty:
            new.__dict__[name] = copy.copy(value)
        else:
            new.__dict__[name] = copy.deepcopy(value, memo)
    return new
