"""An ONNX graph under construction from a canonical graph: tensors, constants, int8 values.

A value that is annotated with int8 goes through QuantizeLinear once; who reads it in int8 gets
DequantizeLinear of that, who reads it in float gets the tensor before it. Tensors are called after
the graph's nodes: ``stem.q`` is the int8 form of ``stem`` and ``stem.dq`` what int8 readers see;
constants are ``stem.weight`` and so on.

Where values of 8 and of 16 bits meet at one operation, all that it reads and writes is 16 bits wide,
as QNN's kernels want it: the 8-bit ones are converted on the way (``stem.up``, ``stem.down``). A step
of 8 bits is 257 steps of 16, so that no value changes by it.
Source: onnxruntime.quantization, MixedPrecisionTensorQuantOverridesFixer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, fx

from rewriter.errors import QuantizeError
from rewriter.int8.annotate import Annotation, annotation, moves_values, operation_of
from rewriter.int8.scheme import QuantSpec
from rewriter.int8.simulate import Quantized

# ONNX Runtime's fusions know the operators up to opset 21; torch exports opaque parts up to 20.
OPSET = 20
# Where QuantizeLinear takes 16 bits before opset 21.
CONTRIB = "com.microsoft"
STEPS = 257  # of 16 bits in one of 8: 65535 / 255
IR_VERSION = 10

# One tensor name, or as many as a node makes tensors, nested as torch nests them.
Value = str | tuple[Any, ...]

_FLOAT = Annotation()
_ONNX_TYPES: dict[torch.dtype, int] = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.int64: onnx.TensorProto.INT64,
    torch.int32: onnx.TensorProto.INT32,
    torch.int16: onnx.TensorProto.INT16,
    torch.int8: onnx.TensorProto.INT8,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.bool: onnx.TensorProto.BOOL,
}


class UnsupportedError(Exception):
    """An emitter does not know this setting; torch's own exporter is asked instead."""


def onnx_type(dtype: torch.dtype) -> int:
    """The ONNX element type of a torch dtype."""
    return _ONNX_TYPES[dtype]


def integer_type(spec: QuantSpec) -> type[np.integer[Any]]:
    """The numpy type that holds a quantized activation.

    Raises:
        QuantizeError: it is neither 8 nor 16 bits wide.
    """
    if spec.bits not in (8, 16):
        raise QuantizeError(
            f"onnx: bits of an activation: {spec.bits}, only 8 and 16 can be stored"
        )
    if spec.bits == 16:
        return np.int16 if spec.signed else np.uint16
    return np.int8 if spec.signed else np.uint8


class Emission:
    """The nodes and constants emitted so far; emitters add to it.

    Args:
        gm: canonical graph.
        quantized: its int8 form; None emits float.
        exposed: nodes whose values the ONNX graph returns besides its outputs.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        quantized: Quantized | None = None,
        exposed: frozenset[fx.Node] = frozenset(),
    ) -> None:
        self.gm, self.quantized, self.exposed = gm, quantized, exposed
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.values: dict[fx.Node, Value] = {}
        self.pads: dict[fx.Node, tuple[int, int, int, int]] = {}  # left, right, top, bottom
        self.place = ""  # the node that is being emitted
        self._dequantized: dict[fx.Node, str] = {}
        self._widened: dict[fx.Node, str] = {}
        self._shared: dict[tuple[bytes, str, tuple[int, ...]], str] = {}
        self._taken: set[str] = set()

    def snapshot(self) -> tuple[Any, ...]:
        """How far the emission has come; for ``restore``."""
        caches = dict(self._dequantized), dict(self._widened), dict(self._shared)
        return len(self.nodes), len(self.constants), *caches

    def restore(self, before: tuple[Any, ...]) -> None:
        """Take back all that was emitted since a snapshot."""
        nodes, constants, *caches = before
        del self.nodes[nodes:]
        for name in list(self.constants)[constants:]:
            del self.constants[name]
        self._dequantized, self._widened, self._shared = caches

    def drop_unread(self, returned: Sequence[str]) -> None:
        """Take back what nobody reads: a runtime would compute it all the same, in floats and another layout."""
        read = set(returned)
        kept: list[onnx.NodeProto] = []
        for made in reversed(self.nodes):
            if read.intersection(made.output):
                kept.append(made)
                read.update(made.input)
        self.nodes = kept[::-1]

    # ------------------------------------------------------------------------------ building

    def name(self, wanted: str) -> str:
        """``wanted``, with a number behind it if it is taken."""
        name, number = wanted, 0
        while name in self._taken:
            number += 1
            name = f"{wanted}.{number}"
        self._taken.add(name)
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add one ONNX node with one output; return its name. "" stands for an absent input."""
        return self.op_many(kind, inputs, 1, **attributes)[0]

    def op_many(
        self, kind: str, inputs: Sequence[str], outputs: int, **attributes: Any
    ) -> tuple[str, ...]:
        """Add one ONNX node and return the names of its outputs."""
        label = self.name(f"{self.place}.{kind}")
        suffixes = [""] if outputs == 1 else [f":{i}" for i in range(outputs)]
        names = [label + s for s in suffixes]
        self.nodes.append(helper.make_node(kind, inputs, names, label, **attributes))
        return tuple(names)

    def constant(self, value: Tensor | np.ndarray[Any, Any], label: str) -> str:
        """Store a tensor and return its name; small equal ones are stored once."""
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else value
        key = (array.tobytes(), array.dtype.str, array.shape) if array.size <= 16 else None
        if key is not None and key in self._shared:
            return self._shared[key]
        name = self.name(f"{self.place}.{label}")
        self.constants[name] = numpy_helper.from_array(np.asarray(array), name)
        if key is not None:
            self._shared[key] = name
        return name

    def scalar(self, value: float, dtype: torch.dtype = torch.float32) -> str:
        """A number as a constant without dimensions."""
        return self.constant(torch.tensor(value, dtype=dtype), "scalar")

    def number_in_int8(self, value: float, kind: int) -> str:
        """A number as DequantizeLinear of one step of a scale of its own: exact in any integer type.

        Args:
            value: the number.
            kind: the ONNX type of the values that it is added to or multiplied with.
        """
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        step, zero = (int(value > 0), 0) if value >= 0 else (0, 1)
        stored = self.constant(np.array(step, dtype=dtype), "number")
        scale = self.constant(np.array(abs(value) or 1.0, dtype=np.float32), "number_scale")
        point = self.constant(np.array(zero, dtype=dtype), "number_zero_point")
        short = kind in (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
        domain = {} if short else {"domain": CONTRIB}
        return self.op("DequantizeLinear", stored, scale, point, **domain)

    def integer_kind(self, dequantized: str) -> int:
        """The ONNX type of the integers behind a tensor that DequantizeLinear made."""
        made = next(n for n in reversed(self.nodes) if dequantized in n.output)
        return self.constants[made.input[2]].data_type

    def is_dequantized(self, value: str) -> bool:
        """Whether a tensor is one that DequantizeLinear made."""
        made = next((n for n in reversed(self.nodes) if value in n.output), None)
        return made is not None and made.op_type == "DequantizeLinear"

    def integers_behind(self, dequantized: str) -> tuple[str, tuple[str, str]]:
        """The integers behind a tensor that DequantizeLinear made, and the names of their scale and zero point."""
        made = next(n for n in reversed(self.nodes) if dequantized in n.output)
        return made.input[0], (made.input[1], made.input[2])

    def stored_behind(self, dequantized: str) -> tuple[str, np.float32, str]:
        """The integers behind a tensor that DequantizeLinear made, their scale, and the name of their zero point."""
        integers, (scale, zero) = self.integers_behind(dequantized)
        return integers, np.float32(numpy_helper.to_array(self.constants[scale])), zero

    def ints(self, values: Sequence[Any]) -> str:
        """A vector of int64 from numbers and from nodes that compute a number."""
        if all(isinstance(v, int) for v in values):
            return self.constant(np.array(values, dtype=np.int64), "ints")
        parts = [
            self.op("Reshape", self.read(v), self.ints([1]))
            if isinstance(v, fx.Node)
            else self.ints([v])
            for v in values
        ]
        return self.op("Concat", *parts, axis=0)

    def cast(self, value: str, dtype: torch.dtype) -> str:
        """``value`` as another element type."""
        return self.op("Cast", value, to=onnx_type(dtype))

    # ------------------------------------------------------------------------------ reading

    def note(self, node: fx.Node) -> Annotation:
        """What int8 does at a node; nothing at all while float is emitted."""
        return _FLOAT if self.quantized is None else annotation(node)

    def read(
        self, source: fx.Node, reader: fx.Node | None = None, into: fx.Node | None = None
    ) -> str:
        """The tensor that ``reader`` (else the node that is being emitted) sees of ``source``.

        Args:
            source: the value.
            reader: the node that reads it.
            into: the operation that ``reader`` is emitted with, where that is another node.

        Raises:
            UnsupportedError: ``source`` makes several tensors.
        """
        if reader is not None and source.name in self.note(reader).reads:
            if not self._is_wide(source) and self._computes_wide(into or reader):
                return self._widen(source)
            return self.dequantized(source)
        value = self.values[source]
        if not isinstance(value, str):
            raise UnsupportedError(f"{source.name} is not one tensor")
        return value

    def dequantized(self, source: fx.Node) -> str:
        """The float tensor that int8 readers of ``source`` see."""
        if source not in self._dequantized:
            value = self.values[source]
            assert isinstance(value, str), source.name
            if not self._is_wide(source) and self._computes_wide(source):
                value = self._through(value, self._written_wide(source), f"{source.name}.down")
            self._dequantized[source] = self._through_int8(value, source, source.name)
        return self._dequantized[source]

    def _is_wide(self, value: fx.Node) -> bool:
        output = self.note(value).output
        return output is not None and output.bits > 8

    def _computes_wide(self, node: fx.Node) -> bool:
        """Whether the operation that ``node`` is part of has 16 bits in or out."""
        if self.quantized is None or self.quantized.scheme.wide is None:
            return False
        if moves_values(self.gm, node) or node.op in ("placeholder", "output"):
            return False
        first, last = node, node
        if not self.note(node).reads and len(node.all_input_nodes) == 1:
            (first,) = node.all_input_nodes  # an activation that the operation before it computes
        users = list(node.users)
        if self.note(node).output is None and len(users) == 1:
            (last,) = users
        reads = (v for v in first.all_input_nodes if v.name in self.note(first).reads)
        return self._is_wide(last) or any(self._is_wide(v) for v in reads)

    def _widen(self, source: fx.Node) -> str:
        """An 8-bit value as 16 bits hold it: the same numbers."""
        if source not in self._widened:
            value, label = self.dequantized(source), f"{source.name}.up"
            self._widened[source] = self._through(value, self._wide_constants(source), label)
        return self._widened[source]

    def _written_wide(self, source: fx.Node) -> tuple[str, str]:
        assert self.quantized is not None
        operation = operation_of(self.gm, source)
        fixed = self.quantized.scheme.fixed(operation, bits=16)
        if fixed is not None:
            return self._pair_of(f"{operation}.wide", *fixed, np.uint16)
        return self._wide_constants(source)

    def _wide_constants(self, source: fx.Node) -> tuple[str, str]:
        assert self.quantized is not None and self.quantized.scheme.wide is not None
        scale, zero, spec = self.value_params(source)
        wide = self.quantized.scheme.wide
        zero = (zero - spec.qmin) * STEPS + wide.qmin
        return self._pair_of(
            f"{annotation(source).range_of}.wide", scale / STEPS, zero, integer_type(wide)
        )

    def rounded(self, value: str, node: fx.Node) -> str:
        """``value`` through the int8 form that ``node``'s value has, if it has one."""
        if self.note(node).output is None:
            return value
        return self._through_int8(value, node, f"{node.name}.inner")

    def _through_int8(self, value: str, owner: fx.Node, label: str) -> str:
        return self._through(value, self.value_constants(owner), label)

    def _through(self, value: str, params: tuple[str, str], label: str) -> str:
        """``value`` rounded to the grid of a scale and a zero point, whose type decides the bits."""
        kind = self.constants[params[1]].data_type
        short = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
        domain = {} if kind in short else {"domain": CONTRIB}
        quantized, read = self.name(f"{label}.q"), self.name(f"{label}.dq")
        q = helper.make_node("QuantizeLinear", [value, *params], [quantized], quantized, **domain)
        dq = helper.make_node("DequantizeLinear", [quantized, *params], [read], read, **domain)
        self.nodes.extend((q, dq))
        return read

    def rounded_to(self, value: str, params: tuple[float, int], node: fx.Node) -> str:
        """``value`` through an int8 form inside the operation of ``node``, with a scale and zero point of its own."""
        spec = self.note(node).output
        if spec is None:
            return value
        pair = self._pair_of(f"{node.name}.gate", *params, integer_type(spec))
        return self._through(value, pair, f"{node.name}.gate")

    def value_params(self, source: fx.Node) -> tuple[float, int, QuantSpec]:
        """Scale, zero point and spec of the int8 form of a value.

        Raises:
            QuantizeError: the value was not calibrated.
        """
        assert self.quantized is not None
        note = annotation(source)
        if note.output is None or note.range_of not in self.quantized.calibration.values:
            raise QuantizeError(f"{source.name}: range: not calibrated")
        return *note.output.params(*self.quantized.calibration.values[note.range_of]), note.output

    def value_constants(self, source: fx.Node) -> tuple[str, str]:
        """Names of the scale and zero point of a value; all that share a range share them."""
        owner = annotation(source).range_of
        if f"{owner}.scale" in self.constants:
            return f"{owner}.scale", f"{owner}.zero_point"
        scale, zero, spec = self.value_params(source)
        return self._pair_of(owner, scale, zero, integer_type(spec))

    def _pair_of(
        self, owner: str, scale: float, zero: int, kind: type[np.integer[Any]]
    ) -> tuple[str, str]:
        """Names of a scale and a zero point, stored once for each owner."""
        names = f"{owner}.scale", f"{owner}.zero_point"
        if names[0] not in self.constants:
            arrays = np.array(scale, dtype=np.float32), np.array(zero, dtype=kind)
            for name, array in zip(names, arrays, strict=True):
                self._taken.add(name)
                self.constants[name] = numpy_helper.from_array(array, name)
        return names
