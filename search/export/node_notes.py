"""Damage, cause and rule at each node of the exported ONNX, for Netron; the same as node data for Model Explorer.

Netron shows a node's ``metadata_props`` and ``doc_string`` when it is clicked. Model Explorer colors nodes by the values of
a JSON file that is loaded beside the model (``--node_data_paths``), keyed by the nodes' output tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from torch import fx

from rewriter.graph import facts, layer_name, layers
from rewriter.storage import replacing
from search.pareto.plan_summary import Places, plan_summary
from search.run_dir.files import write_json
from search.sensitivity.run import Sensitivity

NODE_DATA = "model_int8.node_data.json"
PREFIX = "quantfix."
MOVERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
GRADIENT = [{"stop": 0, "bgColor": "white"}, {"stop": 1, "bgColor": "red"}]


def node_notes(
    gm: fx.GraphModule, sensitivity: Sensitivity | None, places: Places | None = None
) -> dict[str, dict[str, str]]:
    """What is known of each node of a rewritten graph, by its name: layer, damage, cause, rule, float.

    Args:
        gm: The rewritten network, as it was exported.
        sensitivity: Of the network before; damage and cause are those of the layer alone in int8, before any rewrite.
        places: Of the network before, to name a rule's place.
    """
    ranked = {} if sensitivity is None else {d.node: d for d in sensitivity.layers}
    by_layer = {} if sensitivity is None else {d.layer: d for d in sensitivity.layers}
    weighted = set(layers(gm))
    found: dict[str, dict[str, str]] = {}
    for node in gm.graph.nodes:
        note: dict[str, str] = {}
        name = layer_name(node) if node in weighted else ""
        known = ranked.get(node.name) or by_layer.get(name)
        if name:
            note["layer"] = name
        if known is not None and name:
            note["damage"] = f"{known.damage:.4g}"
            if known.causes:
                note["cause"] = ", ".join(known.causes)
        step = str(facts.REWRITTEN_BY.get(node) or "")
        if step:
            note |= {"rule": step, "what": plan_summary(step, places)}
        if facts.KEEP_FLOAT.get(node):
            note["float"] = "left in float"
        if note:
            found[node.name] = note
    return found


def annotate(file: Path, notes: Mapping[str, Mapping[str, str]]) -> Path | None:
    """Write the notes into an ONNX file, and node data beside it; what the file computes stays as it is.

    Returns:
        The node data; None where the file is no ONNX file.
    """
    if file.suffix != ".onnx":
        return None
    model = onnx.load(str(file))
    results: dict[str, dict[str, Any]] = {}
    for node in model.graph.node:
        note = notes.get(node.name.partition(".")[0])
        if note is None or node.op_type in MOVERS:
            continue
        for key, value in note.items():
            entry = node.metadata_props.add()
            entry.key, entry.value = PREFIX + key, value
        node.doc_string = said(note)
        if "damage" in note:
            results.update({name: {"value": float(note["damage"])} for name in node.output})
    with replacing(file, "wb") as stream:
        stream.write(model.SerializeToString())
    data = file.with_name(NODE_DATA)
    write_json(data, {model.graph.name: {"results": results, "gradient": GRADIENT}})
    return data


def said(note: Mapping[str, str]) -> str:
    """A note as one line."""
    parts = [f"{note['layer']}"] if "layer" in note else []
    if "damage" in note:
        cause = f" ({note['cause']})" if "cause" in note else ""
        parts.append(f"damage alone in int8 {note['damage']}{cause}")
    parts += [note["what"]] if "what" in note else []
    parts += [note["float"]] if "float" in note else []
    return "; ".join(parts)
