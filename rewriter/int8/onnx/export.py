"""From a canonical graph to an ONNX file, node by node: float, or int8 as QDQ with our ranges.

Emitting takes milliseconds where an exporter takes seconds, so that a search can score each
candidate on the kernels that will run it. Weights are stored as int8, biases as int32; the first
dimension of inputs and outputs is the batch.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import onnx
import torch
from onnx import helper
from torch import fx, nn

from rewriter.errors import QuantizeError
from rewriter.graph import facts
from rewriter.graph.lookup import find, is_call, module_of, outputs
from rewriter.int8.onnx.arithmetic import ARITHMETIC, Emitter
from rewriter.int8.onnx.builder import (
    CONTRIB,
    IR_VERSION,
    OPSET,
    Emission,
    UnsupportedError,
    Value,
    onnx_type,
)
from rewriter.int8.onnx.clips import clip_is_free
from rewriter.int8.onnx.data_movement import MOVES
from rewriter.int8.onnx.modules import MODULES
from rewriter.int8.onnx.names import original_names, rename
from rewriter.int8.onnx.opaque import emit_opaque
from rewriter.int8.onnx.recurrent import RECURRENT
from rewriter.int8.simulate import Quantized


def to_onnx(quantized: Quantized, extra_outputs: Sequence[str] = ()) -> onnx.ModelProto:
    """The int8 model with QuantizeLinear / DequantizeLinear at every annotated value.

    Args:
        quantized: annotated, calibrated graph.
        extra_outputs: names of nodes whose values are returned too, behind the outputs, as int8
            readers see them.

    Raises:
        QuantizeError: a value was not calibrated, a bias does not fit 32 bits, or an operator
            cannot be written.
    """
    return _emit(quantized.gm, quantized, extra_outputs)


def float_onnx(gm: fx.GraphModule, extra_outputs: Sequence[str] = ()) -> onnx.ModelProto:
    """The float model of the same graph; arguments and errors as for ``to_onnx``."""
    return _emit(gm, None, extra_outputs)


def _emit(
    gm: fx.GraphModule, quantized: Quantized | None, extra_outputs: Sequence[str]
) -> onnx.ModelProto:
    try:
        exposed = [find(gm, name) for name in extra_outputs]
    except KeyError as missing:
        raise QuantizeError(f"extra output: no node called {missing}") from None
    e = Emission(gm, quantized, frozenset(exposed))
    inputs: list[onnx.ValueInfoProto] = []
    with torch.no_grad():
        for node in gm.graph.nodes:
            e.place = node.name
            if node.op == "placeholder":
                shape = ["batch", *facts.SHAPE.of(node)[1:]]
                kind = onnx_type(facts.DTYPE.of(node))
                inputs.append(helper.make_tensor_value_info(node.name, kind, shape))
                e.values[node] = node.name
            elif node.op != "output":
                e.values[node] = _emit_node(e, node)
        returned = _returned(e, exposed)
    e.drop_unread([value.name for value in returned])
    graph = helper.make_graph(
        e.nodes, type(gm).__name__, inputs, returned, list(e.constants.values())
    )
    opsets = [helper.make_opsetid("", OPSET)]
    if any(n.domain == CONTRIB for n in e.nodes):
        opsets.append(helper.make_opsetid(CONTRIB, 1))
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="quantfix"
    )
    rename(model, {} if exposed else original_names(gm, model))
    return model


def _emit_node(e: Emission, node: fx.Node) -> Value:
    if node.op == "get_attr":
        value = e.gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, torch.Tensor):
            raise QuantizeError(
                f"{node.name}: constant: {type(value).__name__}, expected a tensor"
            )
        return e.constant(value, "value")
    if clip_is_free(e, node):
        (source,) = node.all_input_nodes
        return e.values[source]
    if _pads_convolutions_only(e, node):
        e.pads[node] = module_of(e.gm, node).padding  # type: ignore[assignment]
        return ""
    before = e.snapshot()
    try:
        if node.op == "call_module":
            module = module_of(e.gm, node)
            emit = MODULES.get(type(module)) or RECURRENT.get(type(module))
            if emit is not None:
                return emit(e, node, module)
        else:
            function = function_emitter(node)
            if function is not None:
                return function(e, node)
        reason = "no emitter for it"
    except UnsupportedError as unsupported:
        e.restore(before)
        reason = str(unsupported)
    return emit_opaque(e, node, reason)


def _pads_convolutions_only(e: Emission, node: fx.Node) -> bool:
    """Whether a zero pad can become the padding of the convolutions that read it."""
    if not is_call(e.gm, node, nn.ZeroPad2d) or node in e.exposed or not node.users:
        return False
    (source,) = node.all_input_nodes
    int8 = source.name in e.note(node).reads
    return min(module_of(e.gm, node).padding) >= 0 and all(
        is_call(e.gm, user, nn.Conv2d)
        and module_of(e.gm, user).padding_mode == "zeros"
        and user.args[0] is node
        and (node.name in e.note(user).reads) == int8
        for user in node.users
    )


def _returned(e: Emission, exposed: list[fx.Node]) -> list[onnx.ValueInfoProto]:
    (output,) = e.gm.graph.find_nodes(op="output")
    returned: list[onnx.ValueInfoProto] = []
    taken = {node.name for node in e.gm.graph.find_nodes(op="placeholder")} | set(e.constants)
    for i, node in enumerate([*outputs(e.gm), *exposed]):
        e.place = f"output_{i}"
        extra = i >= len(returned) and node in exposed
        if e.note(node).output is not None and (extra or node.name in e.note(output).reads):
            name = e.dequantized(node)
        else:
            name = e.read(node)
        if name in taken:
            name = e.op("Identity", name)
        taken.add(name)
        kind = onnx_type(facts.DTYPE.of(node))
        returned.append(helper.make_tensor_value_info(name, kind, _dimensions(node)))
    return returned


def _dimensions(node: fx.Node) -> list[str | int | None]:
    """Sizes; a first one that is not 1 for a batch of 1 holds the batch and more."""
    first, *rest = facts.SHAPE.of(node) or (None,)
    if not facts.SHAPE.of(node):
        return []
    return ["batch" if first == 1 else None, *rest]


_EMITTERS = ARITHMETIC | MOVES


def _functions() -> dict[Any, Emitter]:
    """The callables of torch and operator with these names; a user's namesake is none of them."""
    named: dict[Any, Emitter] = {getattr: _EMITTERS["getattr"]}
    for place in (nn.functional, torch, torch.special, operator):
        for name, emitter in _EMITTERS.items():
            function = getattr(place, name, None)
            if callable(function) and not isinstance(function, type):
                named[function] = emitter
    return named


_BY_FUNCTION = _functions()


def function_emitter(node: fx.Node) -> Emitter | None:
    """The emitter of a ``call_function`` or ``call_method`` node, None if there is none."""
    if node.op == "call_method":
        return _EMITTERS.get(str(node.target))
    return _BY_FUNCTION.get(node.target)
