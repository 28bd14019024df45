"""ONNX operators with weights, normalizations, pooling and resizing as torch.nn modules."""

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

F = functional


def parameter(array: Any) -> nn.Parameter:
    """A frozen float32 parameter from a numpy array."""
    return nn.Parameter(torch.from_numpy(np.array(array, np.float32)), requires_grad=False)


def _pads(
    im: Importer,
    node: onnx.NodeProto,
    size: list[int],
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
) -> list[int]:
    """Begins and ends of the padding, as ONNX orders them, ``auto_pad`` resolved for the input's size."""
    mode = im.attribute(node, "auto_pad", "NOTSET")
    if mode in ("NOTSET", "", "VALID"):
        return [int(p) for p in im.attribute(node, "pads", [0] * 2 * len(kernel))]
    begins, ends = [], []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        small, large = total // 2, total - total // 2
        begins.append(large if mode == "SAME_LOWER" else small)
        ends.append(small if mode == "SAME_LOWER" else large)
    return begins + ends


def torch_pad(pads: list[int]) -> list[int]:
    """ONNX's (begins, ends) in the order of ``torch.nn.functional.pad``: last axis first."""
    half = len(pads) // 2
    return [p for i in reversed(range(half)) for p in (pads[i], pads[half + i])]


def _windows(
    im: Importer, node: onnx.NodeProto, kernel: list[int]
) -> tuple[list[int], list[int], list[int]]:
    rank = len(kernel)
    stride = [int(s) for s in im.attribute(node, "strides", [1] * rank)]
    dilation = [int(d) for d in im.attribute(node, "dilations", [1] * rank)]
    size = list(im.shape(node.input[0])[2:])
    return stride, dilation, _pads(im, node, size, kernel, stride, dilation)


def _padded(
    im: Importer, x: fx.Node, pads: list[int], value: float = 0.0
) -> tuple[fx.Node, list[int]]:
    """The input, padded where torch's layer cannot do it itself, and the padding that is left."""
    half = len(pads) // 2
    if pads[:half] == pads[half:]:
        return x, pads[:half]
    return im.call(F.pad, x, torch_pad(pads), "constant", value), [0] * half


@operator("Conv")
def conv(im: Importer, node: onnx.NodeProto) -> fx.Node:
    if not im.is_static(node.input[1]):
        return _dynamic_conv(im, node)
    weight = im.constant(node, 1, "weight")
    kernel, groups = list(weight.shape[2:]), int(im.attribute(node, "group", 1))
    stride, dilation, pads = _windows(im, node, kernel)
    x, padding = _padded(im, im.value(node.input[0]), pads)
    kinds: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    if len(kernel) not in kinds:
        raise TraceError(f"onnx: {label(node)}: {len(kernel)} spatial dimensions, expected 1 to 3")
    bias = im.constant(node, 2, "bias") if im.given(node, 2) else None
    layer = kinds[len(kernel)](
        weight.shape[1] * groups, weight.shape[0], tuple(kernel), tuple(stride), tuple(padding),
        tuple(dilation), groups, bias=bias is not None,
    )  # fmt: skip
    layer.weight = parameter(weight)
    if bias is not None:
        layer.bias = parameter(bias)
    return im.module(layer, node, x)


def _dynamic_conv(im: Importer, node: onnx.NodeProto) -> fx.Node:
    kernel = list(im.shape(node.input[1])[2:])
    stride, dilation, pads = _windows(im, node, kernel)
    x, padding = _padded(im, im.value(node.input[0]), pads)
    bias = im.value(node.input[2]) if im.given(node, 2) else None
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    groups = int(im.attribute(node, "group", 1))
    return im.call(
        function,
        x,
        im.value(node.input[1]),
        bias,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
    )


@operator("ConvTranspose")
def conv_transpose(im: Importer, node: onnx.NodeProto) -> fx.Node:
    weight = im.constant(node, 1, "weight")
    kernel, groups = list(weight.shape[2:]), int(im.attribute(node, "group", 1))
    rank = len(kernel)
    stride = [int(s) for s in im.attribute(node, "strides", [1] * rank)]
    dilation = [int(d) for d in im.attribute(node, "dilations", [1] * rank)]
    before, after = im.shape(node.input[0])[2:], im.shape(node.output[0])[2:]
    full = [
        (n - 1) * s + (k - 1) * d + 1
        for n, s, k, d in zip(before, stride, kernel, dilation, strict=True)
    ]
    pads = [int(p) for p in im.attribute(node, "pads", [0] * 2 * rank)]
    if im.attribute(node, "auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        lower = im.attribute(node, "auto_pad") == "SAME_LOWER"
        total = [max(f - a, 0) for f, a in zip(full, after, strict=True)]
        begins = [t - t // 2 if lower else t // 2 for t in total]
        pads = begins + [t - b for t, b in zip(total, begins, strict=True)]
    begins = pads[:rank]
    extra = [a - (f - 2 * b) for a, f, b in zip(after, full, begins, strict=True)]
    kinds: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
    bias = im.constant(node, 2, "bias") if im.given(node, 2) else None
    grow = [max(e, 0) for e in extra]
    fits = all(0 <= e < max(s, d) for e, s, d in zip(grow, stride, dilation, strict=True))
    layer = kinds[rank](
        weight.shape[0], weight.shape[1] * groups, tuple(kernel), tuple(stride),
        tuple(begins) if fits else 0, tuple(grow) if fits else 0, groups, bias is not None, tuple(dilation),
    )  # fmt: skip
    layer.weight = parameter(weight)
    if bias is not None:
        layer.bias = parameter(bias)
    y = im.module(layer, node, im.value(node.input[0]))
    starts = [0] * rank if fits else begins
    if fits and all(e >= 0 for e in extra):
        return y
    cut = tuple(slice(b, b + a) for b, a in zip(starts, after, strict=True))
    return im.call(py.getitem, y, (slice(None), slice(None), *cut))


@operator("Gemm")
def gemm(im: Importer, node: onnx.NodeProto) -> fx.Node:
    alpha, beta = float(im.attribute(node, "alpha", 1.0)), float(im.attribute(node, "beta", 1.0))
    x = im.value(node.input[0])
    if im.attribute(node, "transA", 0):
        x = im.call(torch.transpose, x, 0, 1)
    flip = bool(im.attribute(node, "transB", 0))
    third = im.given(node, 2)
    if im.is_static(node.input[1]) and (not third or im.is_static(node.input[2])):
        weight = im.constant(node, 1, "weight")
        weight = (weight if flip else weight.T) * alpha
        bias = im.constant(node, 2, "bias") * beta if third else None
        if bias is None or bias.size in (1, len(weight)):
            return _linear(im, node, x, weight, bias)
    w = im.value(node.input[1])
    y = im.call(torch.matmul, x, im.call(torch.transpose, w, 0, 1) if flip else w)
    y = y if alpha == 1 else im.call(torch.mul, y, alpha)
    if not third:
        return y
    c = im.value(node.input[2])
    return im.call(torch.add, y, c if beta == 1 else im.call(torch.mul, c, beta))


def _linear(im: Importer, node: onnx.NodeProto, x: fx.Node, weight: Any, bias: Any) -> fx.Node:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = parameter(weight)
    if bias is not None:
        layer.bias = parameter(np.broadcast_to(np.asarray(bias).reshape(-1), (len(weight),)))
    return im.module(layer, node, x)


@operator("MatMul")
def matmul(im: Importer, node: onnx.NodeProto) -> fx.Node:
    """A constant right side is a linear layer; a bias added behind it is taken into the layer."""
    a, b = node.input
    if im.is_static(b) and len(im.shape(b)) == 2 and not im.is_static(a) and len(im.shape(a)) > 1:
        return _linear(im, node, im.value(a), im.constant(node, 1, "weight").T, None)
    return im.call(torch.matmul, im.value(a), im.value(b))


def add_bias(im: Importer, node: onnx.NodeProto) -> fx.Node | None:
    """The layer before an ``Add`` with the constant as its bias; None where it is no such pair."""
    for x, c in (tuple(node.input), tuple(reversed(node.input))):
        source = im.nodes.get(x)
        if not isinstance(source, fx.Node) or source.op != "call_module" or not im.is_static(c):
            continue
        layer: Any = im.root.get_submodule(str(source.target))
        value = im.values.static[c][0]
        linear = isinstance(layer, nn.Linear)
        if not linear and not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            continue
        if im.uses[x] != 1 or layer.bias is not None or value.dtype.kind != "f":
            continue
        channels = layer.out_features if linear else layer.out_channels
        rank = len(im.shape(x))
        shape = (1,) * (rank - value.ndim) + value.shape
        axis = rank - 1 if linear else 1
        if value.ndim > rank or any(
            s != (channels if i == axis else 1) for i, s in enumerate(shape)
        ):
            continue
        layer.bias = parameter(value.reshape(-1))
        return source
    return None


@operator("BatchNormalization")
def batch_norm(im: Importer, node: onnx.NodeProto) -> fx.Node:
    scale, shift, mean, variance = (im.constant(node, i, "statistics") for i in range(1, 5))
    rank = len(im.shape(node.input[0]))
    kinds: dict[int, Any] = {
        2: nn.BatchNorm1d,
        3: nn.BatchNorm1d,
        4: nn.BatchNorm2d,
        5: nn.BatchNorm3d,
    }
    layer = kinds[rank](len(scale), eps=float(im.attribute(node, "epsilon", 1e-5)))
    layer.weight, layer.bias = parameter(scale), parameter(shift)
    layer.running_mean = parameter(mean).data
    layer.running_var = parameter(variance).data
    return im.module(layer, node, im.value(node.input[0]))


@operator("InstanceNormalization")
def instance_norm(im: Importer, node: onnx.NodeProto) -> fx.Node:
    scale, shift = (im.constant(node, i, "scale") for i in (1, 2))
    layer = nn.GroupNorm(len(scale), len(scale), float(im.attribute(node, "epsilon", 1e-5)))
    layer.weight, layer.bias = parameter(scale), parameter(shift)
    return im.module(layer, node, im.value(node.input[0]))


@operator("GroupNormalization")
def group_norm(im: Importer, node: onnx.NodeProto) -> fx.Node:
    scale, shift = (im.constant(node, i, "scale") for i in (1, 2))
    channels, groups = im.shape(node.input[0])[1], int(im.attribute(node, "num_groups"))
    if len(scale) == groups != channels:  # before opset 21 there was one for each group
        scale, shift = (np.repeat(v, channels // groups) for v in (scale, shift))
    layer = nn.GroupNorm(groups, channels, float(im.attribute(node, "epsilon", 1e-5)))
    layer.weight, layer.bias = parameter(scale), parameter(shift)
    return im.module(layer, node, im.value(node.input[0]))


@operator("LayerNormalization")
def layer_norm(im: Importer, node: onnx.NodeProto) -> fx.Node:
    shape = im.shape(node.input[0])
    sizes = list(shape[int(im.attribute(node, "axis", -1)) % len(shape) :])
    layer = nn.LayerNorm(sizes, float(im.attribute(node, "epsilon", 1e-5)))
    layer.weight = parameter(np.broadcast_to(im.constant(node, 1, "scale"), sizes))
    shift = im.constant(node, 2, "shift") if im.given(node, 2) else np.zeros(sizes)
    layer.bias = parameter(np.broadcast_to(shift, sizes))
    return im.module(layer, node, im.value(node.input[0]))


@operator("MaxPool", "AveragePool")
def pool(im: Importer, node: onnx.NodeProto) -> fx.Node:
    kernel = [int(k) for k in im.attribute(node, "kernel_shape")]
    stride, dilation, pads = _windows(im, node, kernel)
    ceil = bool(im.attribute(node, "ceil_mode", 0))
    if len(kernel) not in (1, 2):
        raise TraceError(f"onnx: {label(node)}: {len(kernel)} spatial dimensions, expected 1 or 2")
    x = im.value(node.input[0])
    flat = len(kernel) == 1
    if node.op_type == "MaxPool":
        half = len(kernel)
        small = all(2 * p <= k for p, k in zip(pads[:half], kernel, strict=True))
        if pads[:half] != pads[half:] or not small:
            x = im.call(F.pad, x, torch_pad(pads), "constant", -math.inf)
            pads = [0] * 2 * half
        kind: Any = nn.MaxPool1d if flat else nn.MaxPool2d
        layer = kind(_one(kernel), _one(stride), _one(pads[:half]), _one(dilation), ceil_mode=ceil)
        return im.module(layer, node, x)
    counts = bool(im.attribute(node, "count_include_pad", 0))
    half = len(kernel)
    even = pads[:half] == pads[half:]
    if not even and not counts:
        return _uneven_average(im, node, x, kernel, stride, pads)
    x, padding = _padded(im, x, pads)
    kind = nn.AvgPool1d if flat else nn.AvgPool2d
    return im.module(kind(_one(kernel), _one(stride), _one(padding), ceil, counts), node, x)


def _one(values: list[int]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)


def _uneven_average(
    im: Importer,
    node: onnx.NodeProto,
    x: fx.Node,
    kernel: list[int],
    stride: list[int],
    pads: list[int],
) -> fx.Node:
    """Padding that is not counted, more of it on one side: the mean with zeros, times a constant for each place."""
    size = im.shape(node.input[0])[2:]
    inside = F.pad(torch.ones(1, 1, *size), torch_pad(pads))
    share = F.avg_pool2d(
        inside.reshape(1, 1, *([1] * (2 - len(kernel))), *inside.shape[2:]),
        tuple([1] * (2 - len(kernel)) + kernel),
        tuple([1] * (2 - len(kernel)) + stride),
    )
    factor = 1 / share.reshape(1, 1, *share.shape[4 - len(kernel) :])
    kind: Any = nn.AvgPool1d if len(kernel) == 1 else nn.AvgPool2d
    y = im.module(
        kind(_one(kernel), _one(stride)), node, im.call(F.pad, x, torch_pad(pads), "constant", 0.0)
    )
    return im.call(torch.mul, y, im.buffer(factor, f"{node.output[0]}_share"))


@operator("GlobalAveragePool", "GlobalMaxPool")
def global_pool(im: Importer, node: onnx.NodeProto) -> fx.Node:
    x, rank = im.value(node.input[0]), len(im.shape(node.input[0]))
    average = node.op_type == "GlobalAveragePool"
    if rank == 4:
        return im.module(nn.AdaptiveAvgPool2d(1) if average else nn.AdaptiveMaxPool2d(1), node, x)
    return im.call(torch.mean if average else torch.amax, x, list(range(2, rank)), True)


@operator("Resize", "Upsample")
def resize(im: Importer, node: onnx.NodeProto) -> fx.Node:
    before, after = im.shape(node.input[0]), im.shape(node.output[0])
    mode = im.attribute(node, "mode", "nearest")
    how = im.attribute(node, "coordinate_transformation_mode", "half_pixel")
    old = node.op_type == "Upsample" or im.opset < 11
    if before[:2] != after[:2] or len(before) not in (3, 4):
        raise TraceError(
            f"onnx: {label(node)}: resizes {before} to {after}; only height and width are supported"
        )
    if before == after:
        return im.value(node.input[0])
    names = {("nearest", 3): "nearest", ("nearest", 4): "nearest", ("linear", 3): "linear",
             ("linear", 4): "bilinear", ("bilinear", 4): "bilinear", ("cubic", 4): "bicubic"}  # fmt: skip
    kind = names.get((mode, len(before)))
    if kind is None:
        raise TraceError(
            f"onnx: {label(node)}: mode {mode!r} of {len(before)} dimensions is not supported"
        )
    keywords: dict[str, Any] = {}
    if kind == "nearest":
        rounding = im.attribute(node, "nearest_mode", "round_prefer_floor")
        whole = all(a % b == 0 for b, a in zip(before[2:], after[2:], strict=True))
        if not (old or (how == "asymmetric" and rounding == "floor")) and not whole:
            kind = "nearest-exact"
    else:
        # before opset 11 positions were scaled from the corner
        keywords["align_corners"] = how == "align_corners"
        if old or how == "asymmetric":
            return _from_the_corner(im, node, kind)
    if im.attribute(node, "antialias", 0):
        keywords["antialias"] = True
        return im.call(
            F.interpolate, im.value(node.input[0]), list(after[2:]), None, kind, **keywords
        )
    ratios = [a / b for b, a in zip(before[2:], after[2:], strict=True)]
    if all(float(r).is_integer() for r in ratios):
        module = nn.Upsample(scale_factor=tuple(ratios), mode=kind, **keywords)
    else:
        module = nn.Upsample(size=tuple(after[2:]), mode=kind, **keywords)
    return im.module(module, node, im.value(node.input[0]))


def _from_the_corner(im: Importer, node: onnx.NodeProto, kind: str) -> fx.Node:
    """Linear resizing at positions i n / m, which no mode of torch has.

    With the last row and column repeated once, n / m is the step of aligned corners from n + 1 to m + 1 places.
    """
    before, after = im.shape(node.input[0])[2:], im.shape(node.output[0])[2:]
    if kind == "bicubic":
        raise TraceError(f"onnx: {label(node)}: cubic with asymmetric positions is not supported")
    x = im.call(F.pad, im.value(node.input[0]), [0, 1] * len(before), "replicate")
    module = nn.Upsample(size=tuple(a + 1 for a in after), mode=kind, align_corners=True)
    cut = tuple(slice(0, a) for a in after)
    return im.call(py.getitem, im.module(module, node, x), (slice(None), slice(None), *cut))
