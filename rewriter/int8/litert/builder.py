"""A LiteRT graph under construction from a canonical graph: values in int8 and in float, in NHWC.

A value with four dimensions, (N, C, H, W) in torch, is stored as (N, H, W, C); all others are stored as torch has
them. Every value has an int8 form, a float form, or both, and a form that is asked for and missing is made by QUANTIZE
or DEQUANTIZE. The batch is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rewriter.graph.lookup import is_call, module_of
from rewriter.int8.annotate import annotation
from rewriter.int8.litert.writer import Array, Grid, Writer, options
from rewriter.int8.scheme import CLIPS
from rewriter.int8.simulate import Quantized

NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
ACTIVATION = {"none": 0, "relu": 1, "relu_n1_to_1": 2, "relu6": 3}
Params = tuple[float, int]


class UnsupportedError(Exception):
    """An operation that no operator of LiteRT computes, or not with these settings."""


@dataclass(frozen=True)
class Value:
    """A tensor of the file.

    Args:
        index: its number.
        shape: as torch has it, whatever the layout.
        params: scale and zero point; None: float (or whole numbers).
    """

    index: int
    shape: tuple[int, ...]
    params: Params | None = None


def stored_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes under which a value lies in the file."""
    return tuple(shape[i] for i in NHWC) if len(shape) == 4 else tuple(shape)


def stored(value: Tensor) -> Array:
    """A constant as it lies in the file."""
    array = value.detach().cpu().numpy()
    return np.ascontiguousarray(array.transpose(NHWC) if array.ndim == 4 else array)


def clip_bounds(m: nn.Module) -> tuple[float, float]:
    """What a clip lets through."""
    if isinstance(m, nn.Hardtanh):  # ReLU6 is one
        return float(m.min_val), float(m.max_val)
    return 0.0, float("inf")


class Emission:
    """The operators emitted so far; emitters add to it.

    Args:
        quantized: annotated, calibrated graph.
        exposed: nodes whose values the file returns besides its outputs.
    """

    def __init__(self, quantized: Quantized, exposed: frozenset[fx.Node] = frozenset()) -> None:
        self.quantized, self.gm, self.exposed = quantized, quantized.gm, exposed
        self.w = Writer()
        self.place = ""
        self.int8_forms: dict[fx.Node, Value] = {}
        self.float_forms: dict[fx.Node, Value] = {}
        self.several: dict[fx.Node, Any] = {}  # nodes that make several tensors
        self.pads: dict[fx.Node, tuple[int, int, int, int]] = {}  # left, right, top, bottom
        self.done: set[fx.Node] = set()  # clips that the operation before them computed
        self._layouts: dict[int, Value] = {}
        self._ints: dict[bytes, int] = {}

    # ------------------------------------------------------------------------------ writing

    def new(self, shape: Sequence[int], params: Params | None = None, name: str = "") -> Value:
        """A tensor for a value of torch's shape, in the layout of values."""
        index = self._raw(stored_shape(shape), params, name)
        return Value(index, tuple(shape), params)

    def _raw(self, shape: Sequence[int], params: Params | None, name: str = "") -> int:
        grid = None if params is None else Grid(np.float32(params[0]), params[1])  # type: ignore[arg-type]
        return self.w.tensor(
            name or self.place, shape, "float32" if params is None else "int8", grid
        )

    def ints(self, values: Sequence[int] | Array) -> int:
        """A constant of int32, stored once."""
        array = np.asarray(values, dtype=np.int32)
        key = array.tobytes() + bytes(str(array.shape), "ascii")
        if key not in self._ints:
            self._ints[key] = self.w.constant(f"{self.place}.ints", array)
        return self._ints[key]

    def constant(self, value: Tensor, label: str) -> Value:
        """A float constant in the layout of values."""
        return Value(
            self.w.constant(f"{self.place}.{label}", stored(value.float())), tuple(value.shape)
        )

    def scalar(self, value: float) -> Value:
        """A float number without dimensions."""
        return Value(self.w.constant(f"{self.place}.scalar", np.array(value, np.float32)), ())

    def op(
        self,
        code: str,
        inputs: Sequence[Value | int],
        shape: Sequence[int],
        params: Params | None = None,
        opts: Any = None,
    ) -> Value:
        """Add an operator with one output of torch's shape."""
        made = self.new(shape, params)
        self.w.op(code, [i if isinstance(i, int) else i.index for i in inputs], [made.index], opts)
        return made

    # ------------------------------------------------------------------------------ forms

    def params(self, node: fx.Node) -> Params:
        """Scale and zero point of the int8 form of a value."""
        return self.quantized.value_params(node)

    def int8(self, node: fx.Node) -> Value:
        """The int8 form of a value."""
        if node not in self.int8_forms:
            self.int8_forms[node] = self.quantize(self.float_forms[node], self.params(node))
        return self.int8_forms[node]

    def floats(self, node: fx.Node) -> Value:
        """The float form of a value."""
        if node not in self.float_forms:
            if node not in self.int8_forms:
                raise UnsupportedError(f"{node.name} is not one tensor")
            self.float_forms[node] = self.dequantize(self.int8_forms[node])
        return self.float_forms[node]

    def read(self, source: Any, reader: fx.Node) -> Value:
        """What ``reader`` sees of a value: int8 where it is annotated so.

        Raises:
            UnsupportedError: it is no value of the graph, or no single tensor.
        """
        if not isinstance(source, fx.Node):
            raise UnsupportedError("input is no value of the graph")
        if source.name in annotation(reader).reads:
            return self.int8(source)
        return self.floats(source)

    def read_float(self, source: Any, reader: fx.Node) -> Value:
        """The same in float: for operations without an int8 kernel."""
        value = self.read(source, reader)
        if value.params is None:
            return value
        return self.dequantize(value)

    def quantize(self, value: Value, params: Params) -> Value:
        """``value`` on another grid, from float or from int8."""
        if value.params == params:
            return value
        return self.op("QUANTIZE", [value], value.shape, params, options("Quantize"))

    def dequantize(self, value: Value) -> Value:
        return self.op("DEQUANTIZE", [value], value.shape, None, options("Dequantize"))

    def set(self, node: fx.Node, value: Value) -> None:
        """Note what a node makes."""
        (self.float_forms if value.params is None else self.int8_forms)[node] = value

    # ------------------------------------------------------------------------------ layouts

    def in_torch_order(self, value: Value) -> Value:
        """The same values lying as torch has them."""
        if len(value.shape) != 4 or _one_order(value.shape):
            return value
        return self._transposed(value, NCHW, value.shape)

    def in_stored_order(self, value: Value) -> Value:
        """Undo ``in_torch_order``."""
        if len(value.shape) != 4 or _one_order(value.shape):
            return value
        return self._transposed(value, NHWC, stored_shape(value.shape))

    def _transposed(self, value: Value, order: Sequence[int], sizes: Sequence[int]) -> Value:
        if value.index in self._layouts:
            return self._layouts[value.index]
        made = replace(value, index=self._raw(sizes, value.params))
        self.w.op("TRANSPOSE", [value.index, self.ints(order)], [made.index], options("Transpose"))
        self._layouts[value.index], self._layouts[made.index] = made, value
        return made

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """Torch's reshape, of a value in the layout of values, to one."""
        shape = tuple(shape)
        if shape == value.shape:
            return value
        plain = self.in_torch_order(value)
        made = Value(self._raw(shape, value.params), shape, value.params)
        if len(shape) == 4 and _one_order(shape):
            made = self.new(shape, value.params)
        sizes = stored_shape(shape) if len(shape) == 4 and _one_order(shape) else shape
        self.w.op(
            "RESHAPE",
            [plain.index, self.ints(sizes)],
            [made.index],
            options("Reshape", newShape=np.array(sizes, np.int32)),
        )
        return self.in_stored_order(made)

    def reshape_plain(self, value: Value, shape: Sequence[int]) -> Value:
        """Reshape a value that lies as torch has it; the result does too."""
        count = int(np.prod(value.shape))
        known = int(np.prod([s for s in shape if s != -1]))
        sizes = tuple(count // known if s == -1 else s for s in shape)
        made = Value(self._raw(sizes, value.params), sizes, value.params)
        opts = options("Reshape", newShape=np.array(sizes, np.int32))
        self.w.op("RESHAPE", [value.index, self.ints(sizes)], [made.index], opts)
        return made

    def laid_out(self, made: Value, shape: Sequence[int]) -> Value:
        """A value of torch's shape that lies as torch has it, in the layout of values."""
        return self.in_stored_order(replace(made, shape=tuple(shape)))

    def plain(self, shape: Sequence[int], params: Params | None) -> Value:
        """A tensor that lies as torch has it."""
        return Value(self._raw(shape, params), tuple(shape), params)

    # ------------------------------------------------------------------------------ fusion

    def written(self, node: fx.Node) -> tuple[fx.Node, nn.Module | None] | None:
        """The value that the int8 kernel of ``node`` writes, and the clip in it; None: it writes floats."""
        if annotation(node).output is not None:
            return node, None
        users = list(node.users)
        if len(users) != 1 or not is_call(self.gm, users[0], *CLIPS):
            return None
        clip = users[0]
        if annotation(clip).output is None or annotation(clip).reads:
            return None
        return clip, module_of(self.gm, clip)

    def fused(
        self, clip: nn.Module | None, params: Params
    ) -> tuple[int, tuple[float, float] | None]:
        """The activation that an operator computes for a clip, and the bounds that are left to do."""
        if clip is None:
            return ACTIVATION["none"], None
        low, high = clip_bounds(clip)
        named = {(0.0, float("inf")): "relu", (0.0, 6.0): "relu6", (-1.0, 1.0): "relu_n1_to_1"}
        if (low, high) in named:
            return ACTIVATION[named[low, high]], None
        return ACTIVATION["none"], (low, high)

    def finish(
        self, made: Value, owner: fx.Node, node: fx.Node, bounds: tuple[float, float] | None
    ) -> None:
        """Clip what an operator wrote where it could not, and note it as the value of ``owner``."""
        if bounds is not None and made.params is not None:
            made = self.clipped(made, *bounds)
        if owner is not node:
            self.done.add(owner)
        self.set(owner, made)

    def clipped(self, value: Value, low: float, high: float) -> Value:
        """An int8 value cut to bounds, where its type does not end before."""
        assert value.params is not None
        scale, zero = value.params
        for code, bound in (("MAXIMUM", low), ("MINIMUM", high)):
            if abs(bound) == float("inf"):
                continue
            q = round(bound / scale) + zero
            if not -128 < q < 127:
                continue
            grid = Grid(np.float32(scale), zero)  # type: ignore[arg-type]
            limit = self.w.constant(f"{self.place}.bound", np.array([q], np.int8), grid)
            value = self.op(
                code, [value, limit], value.shape, value.params, options("MaximumMinimum")
            )
        return value


def _one_order(shape: Sequence[int]) -> bool:
    """Whether (N, C, H, W) and (N, H, W, C) lie alike."""
    return shape[1] == 1 or shape[2] * shape[3] == 1


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value for a batch of 1.

    Raises:
        UnsupportedError: it makes several tensors.
    """
    shape = node.meta.get("shape")
    if not isinstance(shape, tuple) or (shape and not isinstance(shape[0], int)):
        raise UnsupportedError(f"{node.name} is not one tensor")
    return shape


def source_of(node: fx.Node) -> fx.Node:
    """The first argument, a value of the graph."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        raise UnsupportedError("input is no value of the graph")
    return node.args[0]


def is_float(node: fx.Node) -> bool:
    return node.meta.get("dtype") is torch.float32
