"""From a quantized graph to a ``.tflite`` file, operator by operator, in milliseconds.

The file has our own scales and zero points to the last bit, one image as its batch, and images as (N, H, W, C).
Source of the operators' int8 rules: LiteRT's quantization specification and the kernels of its interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from rewriter.errors import QuantizeError
from rewriter.graph.lookup import find, is_call, layer_name, module_of, outputs
from rewriter.int8.annotate import annotation
from rewriter.int8.litert.activations import MODULES
from rewriter.int8.litert.builder import Emission, UnsupportedError, Value, is_float, stored_shape
from rewriter.int8.litert.data_movement import pixel_shuffle, shuffle_module
from rewriter.int8.litert.functions import function_emitter
from rewriter.int8.litert.layers import LAYERS, Emitter
from rewriter.int8.simulate import Quantized

Ends = Literal["float", "int8"]
_MODULES: dict[type[nn.Module], Emitter] = {
    **LAYERS,
    **MODULES,
    nn.ChannelShuffle: shuffle_module,
    nn.PixelShuffle: pixel_shuffle,
}


def to_tflite(
    quantized: Quantized, extra_outputs: Sequence[str] = (), ends: Ends = "float"
) -> bytes:
    """The int8 network as a flatbuffer.

    Args:
        quantized: annotated, calibrated graph of a target with signed affine values ("tflite").
        extra_outputs: names of nodes whose int8 values are returned too, behind the outputs.
        ends: whether inputs and outputs that have an int8 form are floats all the same.

    Raises:
        QuantizeError: an operator cannot be written; the message names it.
    """
    try:
        exposed = [find(quantized.gm, name) for name in extra_outputs]
    except KeyError as missing:
        raise QuantizeError(f"extra output: no node called {missing}") from None
    e = Emission(quantized, frozenset(exposed))
    inputs: list[int] = []
    with torch.no_grad():
        for node in quantized.gm.graph.nodes:
            e.place = node.name
            try:
                _emit(e, node, inputs, ends)
            except UnsupportedError as reason:
                raise QuantizeError(f"tflite: {_described(e, node)}: {reason}") from None
        e.place = "output"
        try:
            returned = [_returned(e, node, ends) for node in outputs(quantized.gm)]
        except UnsupportedError as reason:
            raise QuantizeError(f"tflite: output: {reason}") from None
        returned += [e.int8(node) for node in exposed]
    # a value that is returned twice, or is an input, needs a tensor of its own
    taken = set(inputs)
    numbers: list[int] = []
    for value in returned:
        if value.index in taken:
            value = e.op("RESHAPE", [value, e.ints(_sizes(value))], value.shape, value.params)
        taken.add(value.index)
        numbers.append(value.index)
    return e.w.file(inputs, numbers, f"quantfix {type(quantized.gm).__name__}")


def _sizes(value: Value) -> Sequence[int]:
    return stored_shape(value.shape)


def unsupported(gm: fx.GraphModule) -> list[str]:
    """The operations of a canonical graph that no emitter here writes at all, whatever their settings."""
    found: list[str] = []
    for node in gm.graph.nodes:
        if node.op == "call_module" and type(module_of(gm, node)) not in _MODULES:
            found.append(f"{layer_name(node)} ({type(module_of(gm, node)).__name__})")
        elif node.op in ("call_function", "call_method") and function_emitter(node) is None:
            found.append(f"{node.name} ({getattr(node.target, '__name__', node.target)})")
    return found


def _emit(e: Emission, node: fx.Node, inputs: list[int], ends: Ends) -> None:
    if node.op == "placeholder":
        shape = tuple(node.meta["shape"])
        int8 = ends == "int8" and annotation(node).output is not None
        value = e.new(shape, e.params(node) if int8 else None)
        inputs.append(value.index)
        e.set(node, value)
    elif node.op == "get_attr":
        constant: Any = e.gm
        for part in str(node.target).split("."):
            constant = getattr(constant, part)
        if isinstance(constant, Tensor) and constant.is_floating_point():
            e.set(node, e.constant(constant, "value"))
    elif node.op == "call_module":
        module = module_of(e.gm, node)
        if node in e.done:
            return
        if _pads_convolutions_only(e, node):
            e.pads[node] = module.padding
            return
        emit = _MODULES.get(type(module))
        if emit is None:
            raise UnsupportedError("LiteRT has no such operator, or no emitter writes it")
        emit(e, node, module)
    elif node.op != "output":
        function = function_emitter(node)
        if function is None:
            raise UnsupportedError("LiteRT has no such operator, or no emitter writes it")
        function(e, node)


def _described(e: Emission, node: fx.Node) -> str:
    if node.op == "call_module":
        return f"{layer_name(node)} ({type(module_of(e.gm, node)).__name__})"
    return f"{node.name} ({getattr(node.target, '__name__', node.target)})"


def _pads_convolutions_only(e: Emission, node: fx.Node) -> bool:
    """Whether a zero pad can become the padding of the convolutions that read it."""
    if not is_call(e.gm, node, nn.ZeroPad2d) or not node.users or node in e.exposed:
        return False
    (source,) = node.all_input_nodes
    int8 = source.name in annotation(node).reads
    return min(module_of(e.gm, node).padding) >= 0 and all(
        is_call(e.gm, user, nn.Conv2d)
        and module_of(e.gm, user).padding_mode == "zeros"
        and user.args[0] is node
        and (node.name in annotation(user).reads) == int8
        for user in node.users
    )


def _returned(e: Emission, node: fx.Node, ends: Ends) -> Value:
    if not is_float(node):
        raise UnsupportedError(f"{node.name} is {node.meta.get('dtype')}")
    (output,) = e.gm.graph.find_nodes(op="output")
    value = e.read(node, output)
    if value.params is not None and ends == "float":
        return e.dequantize(value)
    return value
