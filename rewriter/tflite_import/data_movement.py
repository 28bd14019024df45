"""Operators of TensorFlow Lite that move values, as ONNX nodes."""

from __future__ import annotations

import numpy as np

from rewriter.errors import TraceError
from rewriter.tflite_import.file import Operator
from rewriter.tflite_import.graph import AXIS, Graph, activated, operator


@operator("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
def reshape(g: Graph, o: Operator) -> None:
    made = g.reshape(g.native(o.inputs[0]), g.shape(o.outputs[0]))
    g.put(o.outputs[0], made, image=False)


@operator("SHAPE")
def shape(g: Graph, o: Operator) -> None:
    g.static[o.outputs[0]] = np.array(g.shape(o.inputs[0]), g.file.values[o.outputs[0]].kind)


@operator("TRANSPOSE")
def transpose(g: Graph, o: Operator) -> None:
    order = g.numbers(o.inputs[1], "order")
    made = g.node("Transpose", [g.native(o.inputs[0])], perm=order)
    g.put(o.outputs[0], made, image=False)


@operator("CONCATENATION")
def concat(g: Graph, o: Operator) -> None:
    rank = len(g.shape(o.outputs[0]))
    axis, image = int(o.options.axis) % rank, any(g.is_image(i) for i in o.inputs)
    names = [g.image(i) if image else g.native(i) for i in o.inputs]
    made = g.node("Concat", names, axis=AXIS[axis] if image else axis)
    g.put(o.outputs[0], activated(g, made, o.options.fusedActivationFunction), image=image)


@operator("PAD", "PADV2", "MIRROR_PAD")
def pad(g: Graph, o: Operator) -> None:
    pairs = g.array(o.inputs[1], "padding").reshape(-1, 2).astype(np.int64)
    image = g.is_image(o.inputs[0]) or (len(pairs) == 4 and not pairs[0].any())
    x = g.image(o.inputs[0]) if image else g.native(o.inputs[0])
    if image:
        pairs = pairs[[0, 3, 1, 2]]
    inputs = [x, g.constant(pairs.T.reshape(-1))]
    if o.kind == "PADV2":
        inputs.append(g.constant(g.array(o.inputs[2], "value").reshape(())))
    mode = "constant"
    if o.kind == "MIRROR_PAD":
        if int(o.options.mode) != 0:
            raise TraceError(f"tflite: {g.label}: symmetric padding is not supported")
        mode = "reflect"
    g.put(o.outputs[0], g.node("Pad", inputs, mode=mode), image=image)


def _sliced(
    g: Graph, o: Operator, starts: list[int], ends: list[int], steps: list[int], gone: list[int]
) -> None:
    image = g.is_image(o.inputs[0]) and not gone
    x = g.image(o.inputs[0]) if image else g.native(o.inputs[0])
    axes = [AXIS[a] if image else a for a in range(len(starts))]
    parts = [g.constant(np.array(v, np.int64)) for v in (starts, ends, axes, steps)]
    made = g.node("Slice", [x, *parts])
    if gone:
        made = g.reshape(made, g.shape(o.outputs[0]))
    g.put(o.outputs[0], made, image=image)


@operator("STRIDED_SLICE")
def strided_slice(g: Graph, o: Operator) -> None:
    options, shape = o.options, g.shape(o.inputs[0])
    if options.ellipsisMask or options.newAxisMask:
        raise TraceError(f"tflite: {g.label}: an ellipsis or a new axis is not supported")
    begin, end, steps = (g.numbers(o.inputs[i], "bounds") for i in (1, 2, 3))
    gone = [a for a in range(len(begin)) if options.shrinkAxisMask >> a & 1]
    far = np.iinfo(np.int64).max
    for a, step in enumerate(steps):
        if step < 0 and a not in gone:
            raise TraceError(f"tflite: {g.label}: step {step} is not supported")
        if options.beginMask >> a & 1:
            begin[a] = 0
        if options.endMask >> a & 1:
            end[a] = far
        if a in gone:
            begin[a] %= shape[a]
            end[a], steps[a] = begin[a] + 1, 1
    if g.is_constant(o.inputs[0]):  # shape arithmetic
        array = g.array(o.inputs[0], "value")[tuple(map(slice, begin, end, steps))]
        g.static[o.outputs[0]] = array.reshape(g.shape(o.outputs[0]))
        return
    _sliced(g, o, begin, end, steps, gone)


@operator("SLICE")
def slice_(g: Graph, o: Operator) -> None:
    begin, size = (g.numbers(o.inputs[i], "bounds") for i in (1, 2))
    far = np.iinfo(np.int64).max
    ends = [far if s < 0 else b + s for b, s in zip(begin, size, strict=True)]
    _sliced(g, o, begin, ends, [1] * len(begin), [])


@operator("SPLIT", "SPLIT_V")
def split(g: Graph, o: Operator) -> None:
    source, where = (o.inputs[1], o.inputs[0]) if o.kind == "SPLIT" else (o.inputs[0], o.inputs[2])
    axis = g.numbers(where, "axis")[0] % len(g.shape(source))
    image = g.is_image(source)
    sizes = g.constant(np.array([g.shape(i)[axis] for i in o.outputs], np.int64))
    x = g.image(source) if image else g.native(source)
    names = g.nodes_of("Split", [x, sizes], len(o.outputs), axis=AXIS[axis] if image else axis)
    for index, name in zip(o.outputs, names, strict=True):
        g.put(index, name, image=image)


@operator("PACK")
def pack(g: Graph, o: Operator) -> None:
    axis = int(o.options.axis) % len(g.shape(o.outputs[0]))
    if all(g.is_constant(i) for i in o.inputs):
        g.static[o.outputs[0]] = np.stack([g.array(i, "value") for i in o.inputs], axis)
        return
    shape = list(g.shape(o.outputs[0]))
    shape[axis] = 1
    names = [g.reshape(g.native(i), shape) for i in o.inputs]
    g.put(o.outputs[0], g.node("Concat", names, axis=axis), image=False)


@operator("UNPACK")
def unpack(g: Graph, o: Operator) -> None:
    axis = int(o.options.axis) % len(g.shape(o.inputs[0]))
    x = g.native(o.inputs[0])
    for number, index in enumerate(o.outputs):
        g.put(index, g.node("Gather", [x, g.constant(np.array(number))], axis=axis), image=False)


@operator("GATHER")
def gather(g: Graph, o: Operator) -> None:
    if getattr(o.options, "batchDims", 0):
        raise TraceError(f"tflite: {g.label}: batch_dims is not supported")
    index = g.constant(g.array(o.inputs[1], "indices").astype(np.int64))
    made = g.node("Gather", [g.native(o.inputs[0]), index], axis=int(o.options.axis))
    g.put(o.outputs[0], made, image=False)


@operator("TILE")
def tile(g: Graph, o: Operator) -> None:
    counts = g.constant(g.array(o.inputs[1], "multiples").astype(np.int64))
    g.put(o.outputs[0], g.node("Tile", [g.native(o.inputs[0]), counts]), image=False)
