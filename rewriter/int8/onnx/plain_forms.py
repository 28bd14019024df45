"""Operations that torch's exporter cannot write, as functions of plain operations that it can.

They run in float. Each gives what torch does on the CPU to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.lookup import module_of

F = nn.functional

# What an operation is from plain ones, and the nodes whose values the function takes.
Form = tuple[Callable[..., Tensor], list[fx.Node]]


def plain_form(gm: fx.GraphModule, node: fx.Node) -> Form | None:
    """The plain form of what ``node`` computes; None where there is none, or where it needs none."""
    if node.op == "call_module":
        module = module_of(gm, node)
        made = _MODULES.get(type(module))
        if type(module).__name__ == "DeformConv2d":  # torchvision's, or one written after it
            made = _deformed_module
        return None if made is None else made(module, node)
    name = getattr(node.target, "__name__", str(node.target))
    made = (
        _FUNCTIONS.get(name.removeprefix("torchvision.")) if node.op == "call_function" else None
    )
    return None if made is None else made(node)


def _given(node: fx.Node, names: str, **defaults: Any) -> dict[str, Any]:
    """Arguments of a call by name."""
    return {**defaults, **dict(zip(names.split(), node.args, strict=False)), **node.kwargs}


def _nodes(*values: Any) -> list[fx.Node]:
    return [v for v in values if isinstance(v, fx.Node)]


# ------------------------------------------------------------------------------------ separable


def _separable(resize: Callable[[Tensor, int], Tensor], node: fx.Node) -> Form:
    """A resize that is linear and acts on rows and columns apart: one matrix for each.

    Args:
        resize: acts on one axis (2 or 3) of (1, 1, n, m) and leaves the other as it is.
        node: what resizes (N, C, H, W).
    """
    source = node.all_input_nodes[0]
    height, width = facts.SHAPE.of(source)[2:]
    rows = resize(torch.eye(height)[None, None], 2)[0, 0]  # (H', H)
    columns = resize(torch.eye(width)[None, None], 3)[0, 0]  # (W, W')
    return lambda x: rows @ x @ columns, [source]


def _interpolate(node: fx.Node) -> Form | None:
    names = "input size scale_factor mode align_corners recompute_scale_factor antialias"
    given = _given(node, names, size=None, scale_factor=None)
    return _resized(node, given)


def _resized(node: fx.Node, given: dict[str, Any]) -> Form | None:
    source = node.all_input_nodes[0]
    if (
        given.get("mode") not in ("bilinear", "bicubic", "area")
        or len(facts.SHAPE.of(source)) != 4
    ):
        return None
    rest = {k: v for k, v in given.items() if k not in ("input", "size", "scale_factor")}

    def resize(x: Tensor, axis: int) -> Tensor:
        sizes = {}
        if given["scale_factor"] is not None and given["mode"] != "area":
            factor = given["scale_factor"]
            factor = factor[axis - 2] if isinstance(factor, (tuple, list)) else factor
            sizes["scale_factor"] = (factor, 1.0) if axis == 2 else (1.0, factor)
        else:
            target = facts.SHAPE.of(node)[axis]
            sizes["size"] = (target, x.shape[3]) if axis == 2 else (x.shape[2], target)
        return F.interpolate(x, **sizes, **rest)

    return _separable(resize, node)


def _upsample(module: nn.Upsample, node: fx.Node) -> Form | None:
    kept = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    return _resized(node, {k: getattr(module, k) for k in kept})


def _average(module: Any, node: fx.Node) -> Form:
    del module

    def resize(x: Tensor, axis: int) -> Tensor:
        target = facts.SHAPE.of(node)[axis]
        size = (target, x.shape[3]) if axis == 2 else (x.shape[2], target)
        return F.adaptive_avg_pool2d(x, size)

    return _separable(resize, node)


def _maximum(module: nn.AdaptiveMaxPool2d, node: fx.Node) -> Form | None:
    if module.return_indices:
        return None
    (source,) = node.all_input_nodes
    before, after = facts.SHAPE.of(source), facts.SHAPE.of(node)

    def pool(x: Tensor) -> Tensor:
        for axis in (2, 3):
            n, m = before[axis], after[axis]
            cells = [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
            x = torch.cat(
                [x.narrow(axis, a, b - a).amax(axis, keepdim=True) for a, b in cells], axis
            )
        return x

    return pool, [source]


# -------------------------------------------------------------------------------------- norms


def _root_mean_square(shape: Any, weight: Tensor | None, eps: float | None) -> Any:
    axes = tuple(range(-len(shape), 0))
    least = torch.finfo(torch.float32).eps if eps is None else eps

    def norm(x: Tensor, scale: Tensor | None = weight) -> Tensor:
        made = x / torch.sqrt((x * x).mean(axes, keepdim=True) + least)
        return made if scale is None else made * scale

    return norm


def _rms_norm_module(module: nn.RMSNorm, node: fx.Node) -> Form:
    return _root_mean_square(module.normalized_shape, module.weight, module.eps), _nodes(
        *node.args[:1]
    )


def _rms_norm(node: fx.Node) -> Form:
    given = _given(node, "input normalized_shape weight eps", weight=None, eps=None)
    norm = _root_mean_square(given["normalized_shape"], None, given["eps"])
    return norm, _nodes(given["input"], given["weight"])


# ------------------------------------------------------------------------------------- layers


def _bilinear(module: nn.Bilinear, node: fx.Node) -> Form:
    def apply(a: Tensor, b: Tensor) -> Tensor:
        left = a @ module.weight.permute(1, 0, 2).flatten(1)  # (..., O * J)
        made = (left.unflatten(-1, module.weight.shape[::2]) * b.unsqueeze(-2)).sum(-1)
        bias: Any = module.bias
        return made if bias is None else made + bias

    return apply, _nodes(*node.args)


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[-1]) if isinstance(value, (tuple, list)) else (value, value)


def _computed_kernel(node: fx.Node) -> Form | None:
    """A convolution with kernels of its own for each input, in groups over (1, N C, H, W)."""
    names = "input weight bias stride padding dilation groups"
    given = _given(node, names, bias=None, stride=1, padding=0, dilation=1, groups=1)
    x, weight, groups = given["input"], given["weight"], given["groups"]
    if not isinstance(weight, fx.Node) or not isinstance(groups, fx.Node):
        return None
    if given["bias"] is not None or isinstance(given["padding"], str):
        return None
    (outs, inner, *kernel), channels = facts.SHAPE.of(weight), facts.SHAPE.of(x)[1]
    out = outs * inner // channels  # of one group
    height, width = facts.SHAPE.of(node)[2:]
    taps = inner * kernel[0] * kernel[1]
    settings = {k: _pair(given[k]) for k in ("dilation", "padding", "stride")}

    def convolve(value: Tensor, kernels: Tensor) -> Tensor:
        rows = value.reshape(-1, inner, *value.shape[2:])  # groups as a batch
        patches = F.unfold(rows, tuple(kernel), **settings)
        made = kernels.reshape(-1, out, taps) @ patches
        return made.reshape(1, -1, height, width)

    return convolve, [x, weight]


def _affine_grid(node: fx.Node) -> Form | None:
    given = _given(node, "theta size align_corners", align_corners=None)
    theta, size = given["theta"], given["size"]
    if not isinstance(theta, fx.Node) or not isinstance(size, (tuple, list)) or len(size) != 4:
        return None
    if not all(isinstance(v, int) for v in size[2:]):
        return None
    corners = bool(given["align_corners"])
    identity = torch.eye(2, 3)[None]
    places = F.affine_grid(identity, [1, 1, *size[2:]], align_corners=corners)  # (1, H, W, 2)
    base = torch.cat([places, torch.ones_like(places[..., :1])], -1).reshape(-1, 3)

    def grid(m: Tensor) -> Tensor:
        return (base @ m.transpose(1, 2)).reshape(-1, *size[2:], 2)

    return grid, [theta]


def _deformed(node: fx.Node) -> Form | None:
    """The function of torchvision, or the operator that it calls, where its weights are constants or values."""
    if len(node.args) >= 14:
        names = "input weight offset mask bias s0 s1 p0 p1 d0 d1 groups parts masked"
        given = _given(node, names)
        given |= {
            n: (given[f"{n[0]}0"], given[f"{n[0]}1"]) for n in ("stride", "padding", "dilation")
        }
        mask = given["mask"] if given["masked"] else None
    else:
        names = "input offset weight bias stride padding dilation mask"
        given = _given(node, names, bias=None, stride=1, padding=0, dilation=1, mask=None)
        mask = given["mask"]
    weight, bias = given["weight"], given["bias"]
    convolve = _deformable(node, given, facts.SHAPE.of(weight))

    def apply(*values: Tensor) -> Tensor:
        rest = list(values[3:])
        factor = None if mask is None else rest.pop(0)
        return convolve(values[0], values[1], factor, values[2], rest[0] if rest else None)

    return apply, _nodes(given["input"], given["offset"], weight, mask, bias)


def _deformed_module(module: Any, node: fx.Node) -> Form:
    given = _given(node, "input offset mask", mask=None)
    given |= {n: getattr(module, n) for n in ("stride", "padding", "dilation")}
    convolve = _deformable(node, given, tuple(module.weight.shape))

    def apply(x: Tensor, shift: Tensor, factor: Tensor | None = None) -> Tensor:
        return convolve(x, shift, factor, module.weight, module.bias)

    return apply, _nodes(given["input"], given["offset"], given["mask"])


def _deformable(
    node: fx.Node, given: dict[str, Any], shape: tuple[int, ...]
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None], Tensor]:
    """A deformable convolution: each tap is read where its offset points, then summed as a 1 x 1 convolution.

    Source: Dai et al., 2017 (arXiv:1703.06211); the mask: Zhu et al., 2019 (arXiv:1811.11168).
    """
    channels, height, width = facts.SHAPE.of(given["input"])[1:]
    outs, inner, *kernel = shape
    taps, (rows, columns) = kernel[0] * kernel[1], facts.SHAPE.of(node)[2:]
    parts = facts.SHAPE.of(given["offset"])[1] // (2 * taps)
    stride, padding, dilation = (_pair(given[k]) for k in ("stride", "padding", "dilation"))
    down, right = (
        torch.arange(n)[None, :] * s - p + torch.arange(k)[:, None] * d  # (k, n)
        for n, k, s, p, d in zip((rows, columns), kernel, stride, padding, dilation, strict=True)
    )
    down = down[:, None, :, None].expand(*kernel, rows, columns).reshape(taps, rows, columns)
    right = right[None, :, None, :].expand(*kernel, rows, columns).reshape(taps, rows, columns)

    def convolve(
        x: Tensor, shift: Tensor, factor: Tensor | None, filters: Tensor, bias: Tensor | None
    ) -> Tensor:
        shift = shift.reshape(-1, taps, 2, rows, columns)
        y, z = shift[:, :, 0] + down, shift[:, :, 1] + right
        grid = torch.stack([(2 * z + 1) / width - 1, (2 * y + 1) / height - 1], -1)
        seen = F.grid_sample(
            x.reshape(-1, channels // parts, height, width),
            grid.reshape(-1, taps * rows, columns, 2),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        seen = seen.reshape(-1, channels // parts, taps, rows, columns)
        if factor is not None:
            seen = seen * factor.reshape(-1, 1, taps, rows, columns)
        seen = seen.reshape(-1, channels * taps, rows, columns)
        flat = filters.reshape(outs, inner * taps, 1, 1)
        return F.conv2d(seen, flat, bias, groups=channels // inner)

    return convolve


_MODULES: dict[type[nn.Module], Callable[[Any, fx.Node], Form | None]] = {
    nn.AdaptiveAvgPool2d: _average,
    nn.AdaptiveMaxPool2d: _maximum,
    nn.Bilinear: _bilinear,
    nn.RMSNorm: _rms_norm_module,
    nn.Upsample: _upsample,
}
_FUNCTIONS: dict[str, Callable[[fx.Node], Form | None]] = {
    "affine_grid": _affine_grid,
    "conv2d": _computed_kernel,
    "deform_conv2d": _deformed,
    "interpolate": _interpolate,
    "rms_norm": _rms_norm,
}
