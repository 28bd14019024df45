"""What an exported int8 file will do that nobody asked for: findings, before it is deployed."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.lookup import layers, module_of
from rewriter.int8.annotate import annotation
from rewriter.int8.findings import Finding
from rewriter.int8.scheme import channel_axis, weight_scale
from rewriter.int8.simulate import Quantized

# A tensor that keeps fewer than this share of the levels after a concatenation lost two bits.
KEPT_LEVELS = 0.25
# A weight scale this many times too coarse has cost a bit; rounded weights alone shift it by a few percent.
COARSE = 2.0
_CLIPS = ("Relu", "Clip")
_FLOAT_ONLY = {
    "ConvTranspose": "ONNX Runtime has no int8 kernel for transposed convolutions on CPU"
}


def lint(quantized: Quantized, model: onnx.ModelProto) -> list[Finding]:
    """Look through an int8 graph and the ONNX model made of it.

    Returns:
        Findings in this order: dead channels whose bias forced a coarser weight scale, ranges
        that a concatenation merges, saturation on this processor, layers that run in float, and
        pairs of quantizers that split what one kernel could compute.
    """
    view = _View(model)
    return [
        *_bias_overflows(quantized),
        *_merged_ranges(quantized),
        *_saturation(quantized),
        *_float_layers(quantized, view),
        *_split_patterns(view),
    ]


def float_layers(quantized: Quantized, model: onnx.ModelProto) -> list[Finding]:
    """Layers that will find no int8 kernel in ONNX Runtime, by the patterns that its fusions look for."""
    return list(_float_layers(quantized, _View(model)))


class _View:
    """Who makes and who reads each tensor of an ONNX graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.maker = {name: n for n in self.nodes for name in n.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for n in self.nodes:
            for name in n.input:
                self.readers.setdefault(name, []).append(n)
        self.returned = {o.name for o in model.graph.output}

    def made_by(self, tensor: str) -> str:
        """The kind of operator that makes a tensor; "" for inputs and constants."""
        return self.maker[tensor].op_type if tensor in self.maker else ""


def _bias_overflows(quantized: Quantized) -> Iterator[Finding]:
    gm = quantized.gm
    for node in layers(gm):
        spec = annotation(node).weight
        if spec is None:
            continue
        layer: Any = module_of(gm, node)
        used = quantized.calibration.weights[node.name]
        axis = channel_axis(layer, spec) if used.ndim else None
        ratio = (used / weight_scale(layer.weight, spec, axis)).reshape(-1)
        felt = ratio >= COARSE
        if felt.any() and axis is not None and not isinstance(layer, nn.ConvTranspose2d):
            felt &= _reach(quantized, node, layer) >= _half_step(quantized, node)
        count = int(felt.sum())
        if layer.bias is not None and count:
            ratio = ratio[felt]
            yield Finding(
                "bias_overflow",
                node.name,
                f"{count} of {len(felt)} weight scales are up to {float(ratio.max()):.3g} times "
                "coarser than their weights need, or the bias would not fit int32",
            )


def _reach(quantized: Quantized, node: fx.Node, layer: Any) -> Tensor:
    """(C_out,) how far the inputs can move each output at most; a channel that they hardly move is its bias."""
    (source,) = node.all_input_nodes
    owner = annotation(source).range_of
    low, high = quantized.calibration.values.get(owner, (-math.inf, math.inf))
    return layer.weight.detach().abs().flatten(1).sum(1) * max(-low, high)


def _half_step(quantized: Quantized, node: fx.Node) -> float:
    """Half a step of the int8 value that a layer's result becomes; 0 where it stays in float."""
    after = node
    while annotation(after).output is None:
        if len(after.users) != 1 or next(iter(after.users)).op == "output":
            return 0.0
        (after,) = after.users
    return quantized.value_params(after)[0] / 2


def _merged_ranges(quantized: Quantized) -> Iterator[Finding]:
    """Concatenations whose one range leaves an input few of the 256 levels."""
    values = quantized.calibration.values
    for node in quantized.gm.graph.nodes:
        note = annotation(node)
        if node.target is not torch.cat or note.output is None or note.range_of not in values:
            continue
        whole = _width(values[note.range_of])
        for source in node.all_input_nodes:
            stats = quantized.calibration.stats.get(source.name)
            owner = annotation(source).range_of
            if stats is not None:
                part = _width((stats.low, stats.high))
            elif owner in values and owner != note.range_of:
                part = _width(values[owner])
            else:
                continue
            if part < KEPT_LEVELS * whole:
                levels = round(255 * part / whole)
                split = facts.REWRITTEN_BY.get(source, "")
                undone = f"; it undoes {split}" if split.startswith("split") else ""
                yield Finding(
                    "merged_range",
                    node.name,
                    f"{source.name} spans {part:.3g} of a joined range of {whole:.3g}: "
                    f"{levels} of 256 levels are left for it{undone}",
                )


def _width(limits: tuple[float, float]) -> float:
    return max(limits[1], 0.0) - min(limits[0], 0.0)


def int8_dot_product(cpuinfo: str | None = None) -> bool | None:
    """Whether this processor adds products of uint8 and int8 without saturating in between.

    Args:
        cpuinfo: text of /proc/cpuinfo; None reads it.

    Returns:
        True with VNNI, AMX or an Arm processor; False on other x86; None where it cannot be known.
    """
    if cpuinfo is None:
        if platform.machine().lower() in ("arm64", "aarch64"):
            return True  # Arm widens each product before it adds
        file = Path("/proc/cpuinfo")
        if not file.is_file():
            return None
        cpuinfo = file.read_text()
    flags = {word for line in cpuinfo.splitlines() if ":" in line for word in line.split()}
    if "asimd" in flags:
        return True
    if "sse2" not in flags:
        return None
    return bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8", "avx_vnni_int8"})


def _saturation(quantized: Quantized) -> Iterator[Finding]:
    scheme = quantized.scheme
    unsigned = not scheme.activations.signed and scheme.weights.signed
    known = int8_dot_product()
    if unsigned and known is not True:
        state = "has no VNNI" if known is False else "may have no VNNI (its flags are unknown)"
        yield Finding(
            "saturation",
            "",
            f"this processor {state}: uint8 activations times int8 weights are added in pairs in "
            "int16, which saturates for large weights; measure on the processor that ships",
        )


def _float_layers(quantized: Quantized, view: _View) -> Iterator[Finding]:
    """Layers without an int8 kernel in ONNX Runtime, by the patterns that its fusions look for."""
    gm = quantized.gm
    names = {n.name: n for n in layers(gm)}
    kinds = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    for made in view.nodes:
        node = names.get(_node_of(made))
        if node is None or made.op_type not in kinds:
            continue
        reason = _why_float(node, made, view)
        if reason:
            yield Finding("float_layer", node.name, reason)


def _why_float(node: fx.Node, made: onnx.NodeProto, view: _View) -> str:
    if facts.KEEP_FLOAT.get(node):
        return "kept in float, as asked"
    if view.made_by(made.input[1]) != "DequantizeLinear":
        return "its weight is float"
    if view.made_by(made.input[0]) != "DequantizeLinear":
        return "its input is float"
    if _reads_wide(node):
        return "it reads 16 bits, for which ONNX Runtime has no integer kernel on CPU"
    if made.op_type in _FLOAT_ONLY:
        return _FLOAT_ONLY[made.op_type]
    if made.op_type in ("MatMul", "Gemm"):
        return ""  # these kernels exist with a float output as well
    readers = view.readers.get(made.output[0], [])
    clip = readers[0] if len(readers) == 1 and readers[0].op_type in _CLIPS else None
    end = made if clip is None else clip
    floats = {
        _node_of(r) for r in view.readers.get(end.output[0], []) if r.op_type != "QuantizeLinear"
    }
    if end.output[0] in view.returned:
        return "its output is returned in float"
    if not floats and clip is None:
        return ""
    if not floats:
        return f"its clip ({_node_of(end)}) is tighter than the int8 range of its output"
    if clip is None and len(readers) <= 2 and _is_fused(node):
        kinds = ", ".join(sorted({r.op_type for r in readers}))
        return f"no int8 kernel computes {kinds} ({', '.join(sorted(floats))}) with it"
    return f"its output is read in float by {', '.join(sorted(floats))}"


def _reads_wide(node: fx.Node) -> bool:
    reads = (v for v in node.all_input_nodes if v.name in annotation(node).reads)
    return any(spec.bits > 8 for v in reads if (spec := annotation(v).output) is not None)


def _is_fused(node: fx.Node) -> bool:
    """Whether the one reader of a value is an activation that the scheme fuses with it."""
    users = list(node.users)
    return len(users) == 1 and not annotation(users[0]).reads and users[0].op == "call_module"


def _node_of(made: onnx.NodeProto) -> str:
    return made.name.rsplit(".", 1)[0]


def _split_patterns(view: _View) -> Iterator[Finding]:
    """A quantizer between a layer and the clip that its kernel could compute, or two in a row."""
    for q in view.nodes:
        if q.op_type != "QuantizeLinear" or view.made_by(q.input[0]) == "":
            continue
        before = view.maker[q.input[0]]
        owner = _node_of(q)
        if before.op_type == "DequantizeLinear":
            if q.domain != before.domain:
                continue  # 8 bits become 16 or 16 become 8, as asked
            yield Finding("split_pattern", owner, "an int8 value is only given another range here")
        elif before.op_type in _CLIPS and view.made_by(before.input[0]) == "DequantizeLinear":
            source = view.maker[before.input[0]].input[0]
            made = view.maker[source].input[0] if source in view.maker else ""
            if view.made_by(made) in ("Conv", "Gemm", "Add"):
                layer = _node_of(view.maker[made])
                yield Finding(
                    "split_pattern", owner, f"a quantizer lies between {layer} and its clip"
                )
