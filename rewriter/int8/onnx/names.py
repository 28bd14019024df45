"""Inputs and outputs of the int8 file are called as those of the ONNX file that the network came from."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from torch import fx

from rewriter.graph import facts


def original_names(gm: fx.GraphModule, model: onnx.ModelProto) -> dict[str, str]:
    """Names of the emitted inputs and outputs, with those that the network's source gave them; empty where it gave none."""
    inputs, outputs = facts.NAMES.get(gm, ((), ()))
    pairs = [(model.graph.input, inputs), (model.graph.output, outputs)]
    if any(len(values) != len(names) for values, names in pairs):
        return {}
    return {v.name: n for values, names in pairs for v, n in zip(values, names, strict=True)}


def rename(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Edit model: values are called ``names[old]``; others of that name get another."""
    graph = model.graph
    made = [o for n in graph.node for o in n.output] + [t.name for t in graph.initializer]
    taken = {*made, *names.values(), *(v.name for v in graph.input)}
    change = dict(names)
    for name in {*made, *(v.name for v in graph.input)} - set(names):
        if name in names.values():
            number = 1
            while f"{name}_{number}" in taken:
                number += 1
            change[name] = f"{name}_{number}"
            taken.add(change[name])
    for node in graph.node:
        node.input[:] = [change.get(i, i) for i in node.input]
        node.output[:] = [change.get(o, o) for o in node.output]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = change.get(value.name, value.name)
