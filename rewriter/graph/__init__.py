"""Graphs in the normal form: the table of operators, look-ups, edits, values and ranges, cost."""

from rewriter.graph import facts
from rewriter.graph.cost import layer_macs
from rewriter.graph.edit import copy_graph
from rewriter.graph.interpret import channels_last, walk
from rewriter.graph.lookup import kind_of, layer_name, layers, module_of, unflatten
from rewriter.graph.lookup import outputs as output_nodes

__all__ = [
    "channels_last",
    "copy_graph",
    "facts",
    "kind_of",
    "layer_macs",
    "layer_name",
    "layers",
    "module_of",
    "output_nodes",
    "unflatten",
    "walk",
]
