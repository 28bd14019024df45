"""ONNX operators that move values: reshape, transpose, slice, concatenate, pad, gather, ..."""

from __future__ import annotations

import math
import operator as py
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx, nn
from torch.nn import functional

from rewriter.errors import TraceError
from rewriter.onnx_import.importer import Importer, label, operator
from rewriter.onnx_import.layers import torch_pad

F = functional


@operator("Identity", "Dropout")
def identity(im: Importer, node: onnx.NodeProto) -> fx.Node:
    return im.value(node.input[0])


@operator("Reshape", "Squeeze", "Unsqueeze")
def reshape(im: Importer, node: onnx.NodeProto) -> fx.Node:
    return im.method("reshape", im.value(node.input[0]), *im.sizes(node))


@operator("Flatten")
def flatten(im: Importer, node: onnx.NodeProto) -> fx.Node:
    if int(im.attribute(node, "axis", 1)) == 1:
        return im.call(torch.flatten, im.value(node.input[0]), 1)
    return reshape(im, node)


@operator("Transpose")
def transpose(im: Importer, node: onnx.NodeProto) -> fx.Node:
    rank = len(im.shape(node.input[0]))
    order = [int(p) for p in im.attribute(node, "perm") or reversed(range(rank))]
    return im.method("permute", im.value(node.input[0]), *order)


@operator("Concat")
def concat(im: Importer, node: onnx.NodeProto) -> fx.Node:
    axis = int(im.attribute(node, "axis")) % len(im.shape(node.output[0]))
    parts = [_as_wide(im, node, i, axis) for i in node.input]
    return im.call(torch.cat, parts, axis)


def _as_wide(im: Importer, node: onnx.NodeProto, name: str, axis: int) -> fx.Node:
    """A part of a concatenation; a constant (a class token) is repeated for each sample."""
    if name not in im.values.static:
        return im.value(name)
    source = next(i for i in node.input if i not in im.values.static)
    carries = im.batch_axis.get(source, 0) if not im.values.free else _varying(im, source)
    if (
        carries is None
        or carries == axis
        or im.shape(name)[carries] not in (1, im.shape(source)[carries])
    ):
        return im.value(name)
    one, two = im.values.static[name]
    row = np.take(one, [0], carries)
    if not np.array_equal(np.broadcast_to(row, one.shape), one) or (
        one.shape == two.shape and one.shape[carries] != 1
    ):
        return im.value(name)
    constant = im.buffer(torch.from_numpy(np.array(row)), name)
    count = im.call(torch.narrow, im.value(source), axis, 0, 1)
    for a in range(len(one.shape)):
        if a != carries and a != axis:
            count = im.call(torch.narrow, count, a, 0, 1)
    zero = im.call(
        torch.mul, count, 0.0
    )  # (..., N, ...): repeats the constant without reading a size
    return im.call(torch.add, zero, constant)


def _varying(im: Importer, name: str) -> int | None:
    one, two = im.values.shapes[name]
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), None)


@operator("Split")
def split(im: Importer, node: onnx.NodeProto) -> tuple[Any, ...]:
    axis = int(im.attribute(node, "axis", 0)) % len(im.shape(node.input[0]))
    parts, start = [], 0
    x = im.value(node.input[0])
    for name in node.output:
        size = im.shape(name)[axis]
        index = (*[slice(None)] * axis, slice(start, start + size))
        parts.append(im.call(py.getitem, x, index))
        start += size
    return tuple(parts)


@operator("Slice")
def slice_(im: Importer, node: onnx.NodeProto) -> fx.Node:
    shape, x = im.shape(node.input[0]), im.value(node.input[0])
    starts, ends = im.numbers(node, "starts", 1), im.numbers(node, "ends", 2)
    assert starts is not None and ends is not None
    axes = im.numbers(node, "axes", 3) or list(range(len(starts)))
    steps = (im.numbers(node, "steps", 4) if im.given(node, 4) else None) or [1] * len(starts)
    index: list[Any] = [slice(None)] * len(shape)
    for axis, start, end, step in zip(
        (a % len(shape) for a in axes), starts, ends, steps, strict=True
    ):
        size = shape[axis]
        if step < 0:
            if (start, step) == (-1, -1) or ((start >= size - 1 and step == -1) and end < -size):
                x = im.call(torch.flip, x, [axis])
                continue
            raise TraceError(f"onnx: {label(node)}: step {step} is not supported")
        low = max(start + size, 0) if start < 0 else start
        high = None if end >= size else end
        index[axis] = slice(low or None, high, None if step == 1 else step)
    while index and index[-1] == slice(None):
        index.pop()
    return im.call(py.getitem, x, tuple(index)) if index else x


@operator("Gather")
def gather(im: Importer, node: onnx.NodeProto) -> fx.Node:
    axis = int(im.attribute(node, "axis", 0)) % len(im.shape(node.input[0]))
    if not im.is_static(node.input[1]):
        if node.input[1] in im.values.static and axis == 0:
            return _gather_rows(im, node)
        if axis == 0:
            return im.call(F.embedding, im.value(node.input[1]), im.value(node.input[0]))
        raise TraceError(
            f"onnx: {label(node)}: its indices are computed from the input, not constant"
        )
    index, x = im.constant(node, 1, "indices"), im.value(node.input[0])
    size = im.shape(node.input[0])[axis]
    if index.ndim == 0:
        return im.call(py.getitem, x, (*[slice(None)] * axis, int(index) % size))
    flat = index.reshape(-1) % size
    steps = np.diff(flat)
    if len(flat) == 1 or (len(set(steps.tolist())) == 1 and steps[0] > 0):
        step = int(steps[0]) if len(flat) > 1 else 1
        part = slice(int(flat[0]), int(flat[-1]) + 1, None if step == 1 else step)
        y = im.call(py.getitem, x, (*[slice(None)] * axis, part))
    else:
        y = im.call(
            torch.index_select,
            x,
            axis,
            im.buffer(torch.from_numpy(flat), f"{node.output[0]}_index"),
        )
    return y if index.ndim == 1 else im.method("reshape", y, *im.sizes(node))


def _gather_rows(im: Importer, node: onnx.NodeProto) -> fx.Node:
    """The same places of each sample, from a value that has all samples behind one another (a view with strides)."""
    one, two = im.values.static[node.input[1]]
    small, large = (s[0] for s in im.values.shapes[node.input[0]])
    few, many = (im.shape(im.batch_source)[0], im.values.shapes[im.batch_source][1][0])
    step, rest = divmod(large - small, many - few)
    row = one[:1]
    for found, count in ((one, few), (two, many)):
        starts = np.arange(count).reshape(-1, *[1] * (one.ndim - 1)) * step
        if rest or len(found) != count or not np.array_equal(found, row + starts):
            raise TraceError(f"onnx: {label(node)}: its indices depend on the batch size")
    if row.min() < 0 or row.max() >= step or small != step * few:
        raise TraceError(f"onnx: {label(node)}: its indices mix samples")
    tail = im.shape(node.input[0])[1:]
    x = im.method("reshape", im.value(node.input[0]), -1, step, *tail)
    index = im.buffer(torch.from_numpy(row.reshape(-1)), f"{node.output[0]}_index")
    return im.method("reshape", im.call(torch.index_select, x, 1, index), *im.sizes(node))


@operator("GatherND")
def gather_nd(im: Importer, node: onnx.NodeProto) -> fx.Node:
    """Constant places along the first axes."""
    index, shape = im.constant(node, 1, "indices"), im.shape(node.input[0])
    if im.attribute(node, "batch_dims", 0):
        raise TraceError(f"onnx: {label(node)}: batch_dims is not supported")
    depth = index.shape[-1]
    carries = (
        im.batch_axis.get(node.input[0]) if not im.values.free else _varying(im, node.input[0])
    )
    if carries is not None and carries < depth:
        raise TraceError(f"onnx: {label(node)}: its indices choose among samples")
    flat = np.ravel_multi_index(
        tuple(index.reshape(-1, depth).T % np.array(shape[:depth])[:, None]), shape[:depth]
    )
    merged = [
        math.prod(shape[:depth]),
        *(-1 if a == carries else shape[a] for a in range(depth, len(shape))),
    ]
    x = (
        im.value(node.input[0])
        if depth == 1
        else im.method("reshape", im.value(node.input[0]), *merged)
    )
    where = im.buffer(torch.from_numpy(flat), f"{node.output[0]}_index")
    y = im.call(torch.index_select, x, 0, where)
    return y if index.ndim == 2 else im.method("reshape", y, *im.sizes(node))


@operator("GatherElements")
def gather_elements(im: Importer, node: onnx.NodeProto) -> fx.Node:
    axis = int(im.attribute(node, "axis", 0))
    return im.call(torch.gather, im.value(node.input[0]), axis, im.value(node.input[1]))


@operator("Expand")
def expand(im: Importer, node: onnx.NodeProto) -> fx.Node:
    return im.method("expand", im.value(node.input[0]), *im.sizes(node))


@operator("Tile")
def tile(im: Importer, node: onnx.NodeProto) -> fx.Node:
    before, after = im.shape(node.input[0]), im.shape(node.output[0])
    return im.method(
        "repeat", im.value(node.input[0]), *[a // b for b, a in zip(before, after, strict=True)]
    )


@operator("Pad")
def pad(im: Importer, node: onnx.NodeProto) -> fx.Node:
    rank, x = len(im.shape(node.input[0])), im.value(node.input[0])
    pads = im.numbers(node, "pads", 1) or im.numbers(node, "paddings", 1) or []
    if im.given(node, 3):
        full = [0] * 2 * rank
        axes = [int(a) % rank for a in im.constant(node, 3, "axes")]
        for i, a in enumerate(axes):
            full[a], full[rank + a] = pads[i], pads[len(axes) + i]
        pads = full
    value = float(im.attribute(node, "value", 0.0))
    if im.given(node, 2):
        value = float(im.constant(node, 2, "value").item())
    order = torch_pad(list(pads))
    while len(order) > 2 and order[-2:] == [0, 0]:
        order = order[:-2]
    if not any(order):
        return x
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}[
        im.attribute(node, "mode", "constant")
    ]
    if mode != "constant":
        return im.call(F.pad, x, order, mode)
    if value == 0 and rank == 4 and len(order) <= 4 and min(order) >= 0:
        sides: Any = tuple(order + [0] * (4 - len(order)))
        return im.module(nn.ZeroPad2d(sides), node, x)
    return im.call(F.pad, x, order, mode, value)


@operator("DepthToSpace")
def depth_to_space(im: Importer, node: onnx.NodeProto) -> fx.Node:
    block, x = int(im.attribute(node, "blocksize")), im.value(node.input[0])
    if im.attribute(node, "mode", "DCR") == "CRD":
        return im.module(nn.PixelShuffle(block), node, x)
    _, c, h, w = im.shape(node.input[0])
    y = im.method("reshape", x, -1, block, block, c // block**2, h, w)
    y = im.method("permute", y, 0, 3, 4, 1, 5, 2)
    return im.method("reshape", y, -1, c // block**2, h * block, w * block)


@operator("SpaceToDepth")
def space_to_depth(im: Importer, node: onnx.NodeProto) -> fx.Node:
    block, x = int(im.attribute(node, "blocksize")), im.value(node.input[0])
    _, c, h, w = im.shape(node.input[0])
    y = im.method("reshape", x, -1, c, h // block, block, w // block, block)
    y = im.method("permute", y, 0, 3, 5, 1, 2, 4)
    return im.method("reshape", y, -1, c * block**2, h // block, w // block)


@operator("ConstantOfShape", "Range", "NonZero")
def computed_size(im: Importer, node: onnx.NodeProto) -> fx.Node:
    raise TraceError(f"onnx: {label(node)}: its size is computed from the data")


@operator("TopK")
def top_k(im: Importer, node: onnx.NodeProto) -> tuple[Any, ...]:
    count = int(im.constant(node, 1, "k").reshape(-1)[0])
    axis = int(im.attribute(node, "axis", -1))
    largest = bool(im.attribute(node, "largest", 1))
    found = im.call(torch.topk, im.value(node.input[0]), count, axis, largest)
    return im.call(py.getitem, found, 0), im.call(py.getitem, found, 1)


@operator("GridSample")
def grid_sample(im: Importer, node: onnx.NodeProto) -> fx.Node:
    modes = {
        "linear": "bilinear",
        "bilinear": "bilinear",
        "nearest": "nearest",
        "cubic": "bicubic",
        "bicubic": "bicubic",
    }
    mode, border = (
        modes[im.attribute(node, "mode", "linear")],
        im.attribute(node, "padding_mode", "zeros"),
    )
    corners = bool(im.attribute(node, "align_corners", 0))
    return im.call(
        F.grid_sample, im.value(node.input[0]), im.value(node.input[1]), mode, border, corners
    )


@operator("ScatterND")
def scatter_nd(im: Importer, node: onnx.NodeProto) -> fx.Node:
    """An assignment to a constant part of a value, as decoders of boxes write it: slices side by side."""
    shape = im.shape(node.input[0])
    index = im.constant(node, 1, "indices")
    rank = index.shape[-1]
    if rank != len(shape) or index.shape[:-1] != im.shape(node.input[2]):
        raise TraceError(
            f"onnx: {label(node)}: only an assignment to a rectangular part is supported"
        )
    flat = index.reshape(-1, rank)
    low, high = flat.min(0), flat.max(0) + 1
    if len(flat) != math.prod((high - low).tolist()):
        raise TraceError(f"onnx: {label(node)}: its indices are no rectangular part")
    x = im.value(node.input[0])
    part = im.value(node.input[2])
    for axis in range(rank):
        if low[axis] == 0 and high[axis] == shape[axis]:
            continue
        if any(low[a] != 0 or high[a] != shape[a] for a in range(rank) if a != axis):
            raise TraceError(
                f"onnx: {label(node)}: an assignment along more than one axis is not supported"
            )
        before = im.call(py.getitem, x, (*[slice(None)] * axis, slice(0, int(low[axis]))))
        after = im.call(py.getitem, x, (*[slice(None)] * axis, slice(int(high[axis]), None)))
        return im.call(torch.cat, [before, part, after], axis)
    return part
