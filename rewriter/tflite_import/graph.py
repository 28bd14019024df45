"""An ONNX graph that grows from the operators of a TensorFlow Lite file.

TensorFlow Lite has channels last. Here every value of four dimensions that an operator on images makes is held with
channels first, and goes back only where an operator reads it as it lies in memory (a reshape, a matrix product).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rewriter.errors import TraceError
from rewriter.tflite_import.file import Array, File, Operator

Emitter = Callable[["Graph", Operator], None]
# One function for each TensorFlow Lite operator.
OPERATORS: dict[str, Emitter] = {}
# Where each axis of a value with channels last lies with channels first.
AXIS = (0, 2, 3, 1)
FIRST, LAST = (0, 3, 1, 2), (0, 2, 3, 1)


def operator(*names: str) -> Callable[[Emitter], Emitter]:
    """Register the function that converts the operators ``names``."""

    def register(function: Emitter) -> Emitter:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


class Graph:
    """The nodes written so far, and under which name and in which layout each value is known."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.held: dict[int, str] = {}
        self.first: set[int] = set()
        self.turned: dict[tuple[int, bool], str] = {}
        self.static: dict[int, Array] = {}
        self.label = ""
        self.count = 0

    # reading

    def shape(self, index: int) -> tuple[int, ...]:
        """As the file has it, channels last."""
        return self.file.values[index].shape

    def is_constant(self, index: int) -> bool:
        """Whether a value is known now."""
        return index in self.static or self.file.values[index].data is not None

    def array(self, index: int, what: str) -> Array:
        """A constant; half precision as float32.

        Raises:
            TraceError: it is computed.
        """
        found = self.static.get(index)
        found = self.file.values[index].data if found is None else found
        if found is None:
            raise TraceError(f"tflite: {self.label}: its {what} is computed, not constant")
        return found.astype(np.float32) if found.dtype == np.float16 else found

    def numbers(self, index: int, what: str) -> list[int]:
        """A constant as plain integers."""
        return [int(v) for v in self.array(index, what).reshape(-1)]

    def native(self, index: int) -> str:
        """A value as the file has it."""
        if self.is_constant(index):
            return self.constant(self.array(index, "value"))
        return self._turned(index, LAST) if index in self.first else self.held[index]

    def image(self, index: int) -> str:
        """A value of four dimensions with channels first."""
        if self.is_constant(index):
            return self.constant(self.array(index, "value").transpose(FIRST))
        return self.held[index] if index in self.first else self._turned(index, FIRST)

    def is_image(self, index: int) -> bool:
        """Whether a computed value is held with channels first."""
        return index in self.first

    def _turned(self, index: int, order: Sequence[int]) -> str:
        key = (index, order is FIRST)
        if key not in self.turned:
            n, h, w, c = self.shape(index)
            if h * w == 1 or c == 1:  # nothing moves
                sizes = [n, c, h, w] if order is FIRST else [n, h, w, c]
                self.turned[key] = self.reshape(self.held[index], sizes)
            else:
                self.turned[key] = self.node("Transpose", [self.held[index]], perm=list(order))
        return self.turned[key]

    # writing

    def constant(self, array: Array) -> str:
        """The name of a new constant."""
        self.count += 1
        self.constants.append(
            numpy_helper.from_array(np.ascontiguousarray(array), f"c{self.count}")
        )
        return f"c{self.count}"

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Write a node with one output and return its name."""
        self.count += 1
        made = helper.make_node(kind, list(inputs), [f"v{self.count}"], self._free(), **attributes)
        self.nodes.append(made)
        return f"v{self.count}"

    def nodes_of(
        self, kind: str, inputs: Sequence[str], outputs: int, **attributes: Any
    ) -> list[str]:
        """Write a node with several outputs and return their names."""
        names = [f"v{self.count + 1 + i}" for i in range(outputs)]
        self.count += outputs
        self.nodes.append(helper.make_node(kind, list(inputs), names, self._free(), **attributes))
        return names

    def _free(self) -> str:
        return f"{self.label}_{self.count}"

    def reshape(self, name: str, sizes: Sequence[int]) -> str:
        """Write a reshape."""
        return self.node("Reshape", [name, self.constant(np.array(sizes, np.int64))])

    def put(self, index: int, name: str, *, image: bool) -> None:
        """Say what a value of the file is called here, and whether with channels first."""
        self.held[index] = name
        if image:
            self.first.add(index)

    def name_of(self, operator: Operator) -> str:
        """What layers of an operator are called: the first part of its output's name."""
        name = self.file.values[operator.outputs[0]].name.split(";")[0]
        return re.sub(r"\W+", "_", name).strip("_") or operator.kind.lower()


def activated(g: Graph, name: str, fused: int) -> str:
    """A value after a fused activation, numbered as in the schema.

    Raises:
        TraceError: there is no such activation.
    """
    if fused == 0:
        return name
    if fused == 1:
        return g.node("Relu", [name])
    if fused in (2, 3):
        low, high = ((-1.0, 1.0), (0.0, 6.0))[fused - 2]
        limits = [g.constant(np.array(v, np.float32)) for v in (low, high)]
        return g.node("Clip", [name, *limits])
    if fused == 4:
        return g.node("Tanh", [name])
    raise TraceError(f"tflite: {g.label}: fused activation {fused} is not supported")
