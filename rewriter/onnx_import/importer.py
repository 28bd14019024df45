"""Turn an ONNX graph into a torch.fx graph module, operator by operator.

Static values (``rewriter.onnx_import.file``) are folded. The batch is freed also where the file fixes it
at 1: the axis that carries it is followed through the graph, and a reshape leaves it open. The result is
compared with ONNX Runtime on several inputs before anyone else sees it.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, fx, nn

from rewriter.errors import TraceError
from rewriter.onnx_import.against_runtime import compare
from rewriter.onnx_import.file import (
    DEFAULT_DOMAINS,
    SHAPES,
    Array,
    Values,
    depends_on_data,
    input_shapes,
    read_file,
    values_of,
)

Emitter = Callable[["Importer", onnx.NodeProto], Any]
# One function for each ONNX operator; the files beside this one fill it.
OPERATORS: dict[str, Emitter] = {}


def operator(*names: str) -> Callable[[Emitter], Emitter]:
    """Register the function that imports the ONNX operators ``names``."""

    def register(function: Emitter) -> Emitter:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


class OnnxNetwork(fx.GraphModule):
    """An imported network; ``input_names``, ``output_names`` and ``input_sizes`` (without batch) are the file's."""

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    input_sizes: tuple[tuple[int, ...], ...]


class Importer:
    """The state of one import: values by name, the graph that grows, the module that owns its weights."""

    def __init__(self, model: onnx.ModelProto, values: Values) -> None:
        self.model = model
        self.values = values
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.nodes: dict[str, Any] = {}
        # axis of each value that carries the batch, None where none does; and, where a reshape has
        # merged the batch with what stood before it, how many entries of that axis stand before it
        self.batch_axis: dict[str, int | None] = {}
        self.outer: dict[str, int] = {}
        self.batch_source = ""  # an input, whose first axis is the batch
        self.opset = max(
            [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")] or [1]
        )
        self.uses = Counter(i for n in model.graph.node for i in n.input)
        self.uses.update(o.name for o in model.graph.output)

    # reading a node

    def attribute(self, node: onnx.NodeProto, name: str, default: Any = None) -> Any:
        """The value of an attribute; text as str."""
        for a in node.attribute:
            if a.name == name:
                value = helper.get_attribute_value(a)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def given(self, node: onnx.NodeProto, index: int) -> bool:
        """Whether an optional input is there."""
        return len(node.input) > index and bool(node.input[index])

    def is_static(self, name: str) -> bool:
        """Whether a value is known before the network runs, whatever the batch."""
        if name not in self.values.static:
            return False
        a, b = self.values.static[name]
        return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))

    def constant(self, node: onnx.NodeProto, index: int, what: str) -> Array:
        """A static input as an array.

        Raises:
            TraceError: it depends on the data or on the batch.
        """
        name = node.input[index]
        if not self.is_static(name):
            raise TraceError(
                f"onnx: {label(node)}: its {what} is computed from the input, not constant"
            )
        return self.values.static[name][0]

    def numbers(self, node: onnx.NodeProto, name: str, index: int) -> list[int] | None:
        """Integers that are an attribute in old operator sets and an input in new ones."""
        found = self.attribute(node, name)
        if found is not None:
            return [int(v) for v in (found if isinstance(found, Sequence) else [found])]
        if not self.given(node, index):
            return None
        return [int(v) for v in self.constant(node, index, name).reshape(-1)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a value with the first batch."""
        return self.values.shapes[name][0]

    # writing nodes

    def value(self, name: str) -> fx.Node:
        """The fx node of a value; a constant becomes a buffer."""
        if name in self.nodes:
            return self.nodes[name]
        if name not in self.values.static:
            raise TraceError(f"onnx: value {name!r} is read before it is made")
        a, b = self.values.static[name]
        if not self.is_static(name):
            a = self._one_row(name, a, b)
        self.nodes[name] = self.buffer(torch.from_numpy(np.array(a)), name)
        return self.nodes[name]

    def _one_row(self, name: str, a: Array, b: Array) -> Array:
        """What a constant with a row for each sample is for one of them, if all rows are alike."""
        differs = [i for i, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if x != y]
        if len(differs) == 1:
            row = np.take(a, [0], differs[0])
            if np.array_equal(np.broadcast_to(row, a.shape), a):
                return row
        raise TraceError(
            f"onnx: value {name!r} depends on the batch size in a way that is not supported"
        )

    def buffer(self, tensor: Tensor, name: str) -> fx.Node:
        """A constant tensor of the network; floating-point ones in float32."""
        if tensor.is_floating_point():
            tensor = tensor.float()
        path = self.free_name(name)
        self.root.register_buffer(path, tensor)
        return self.graph.get_attr(path)

    def module(self, module: nn.Module, node: onnx.NodeProto, *inputs: fx.Node) -> fx.Node:
        """Call a new sub-module named after an ONNX node."""
        path = self.free_name(node.name or node.output[0])
        self.root.add_module(path, module)
        return self.graph.call_module(path, inputs)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Call a function of torch."""
        return self.graph.call_function(function, args, kwargs)

    def method(self, name: str, *args: Any) -> fx.Node:
        """Call a method of the first argument."""
        return self.graph.call_method(name, args)

    def free_name(self, name: str) -> str:
        """A Python identifier like ``name`` that no module or buffer has yet."""
        plain = re.sub(r"\W+", "_", name).strip("_") or "value"
        plain = f"n_{plain}" if plain[0].isdigit() or hasattr(fx.GraphModule, plain) else plain
        number, found = 0, plain
        while hasattr(self.root, found):
            number += 1
            found = f"{plain}_{number}"
        return found

    # the batch

    def sizes(self, node: onnx.NodeProto, index: int = 0) -> tuple[int, ...]:
        """Sizes of an output for a reshape: -1 where the batch is, plain numbers elsewhere."""
        one, two = self.values.shapes[node.output[index]]
        if self.values.free:
            varies = [i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
        else:
            axis = self.batch_axis.get(node.output[index])
            varies = [] if axis is None else [axis]
        if len(varies) > 1:
            raise TraceError(f"onnx: {label(node)}: two of its dimensions depend on the batch")
        return tuple(-1 if i in varies else int(s) for i, s in enumerate(one))

    def follow_batch(self, node: onnx.NodeProto) -> None:
        """Note which axis of a node's outputs carries the batch, where the file fixes it."""
        for name in node.output:
            self.batch_axis[name] = self._axis_of(node, name)

    def _axis_of(self, node: onnx.NodeProto, name: str) -> int | None:
        source = next((i for i in node.input if self.batch_axis.get(i) is not None), None)
        if source is None or name not in self.values.shapes:
            return None
        axis, before, after = self.batch_axis[source], self.shape(source), self.shape(name)
        assert axis is not None
        kind = node.op_type
        if kind == "Transpose":
            order = self.attribute(node, "perm") or list(reversed(range(len(before))))
            return list(order).index(axis)
        if kind in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
            found, self.outer[name] = _axis_after_reshape(
                before, after, axis, self.outer.get(source, 1)
            )
            return found
        self.outer[name] = self.outer.get(source, 1)
        if kind in ("LSTM", "GRU", "RNN"):
            return 2 if name == node.output[0] else 1
        if kind.startswith("Reduce") or kind in ("ArgMax", "ArgMin"):
            axes = self.numbers(node, "axes" if kind.startswith("Reduce") else "axis", 1) or []
            if self.attribute(node, "keepdims", 1):
                return axis
            gone = sorted(a % len(before) for a in axes)
            return None if axis in gone else axis - sum(a < axis for a in gone)
        if kind == "Gather":
            where = int(self.attribute(node, "axis", 0)) % len(before)
            return axis + (len(after) - len(before)) * (where < axis)
        if kind == "GatherND":
            return axis + len(after) - len(before)
        return axis + max(len(after) - len(before), 0)  # broadcasting adds axes in front


def _axis_after_reshape(
    before: tuple[int, ...], after: tuple[int, ...], axis: int, outer: int
) -> tuple[int | None, int]:
    """The axis that carries the batch, of one sample, after a reshape, and how much of that axis stands before it.

    A reshape keeps the row-major order, so the number of entries before the batch stays what it was.
    """
    ahead = math.prod(before[:axis]) * outer
    places = [i for i in range(len(after)) if math.prod(after[:i]) == ahead]
    alone = [i for i in places if after[i] == 1]
    if alone:
        return alone[0], 1
    behind = before[axis + 1 :]
    for i in range(1, len(after) + 1):
        if ahead > 1 and after[i:] == behind and math.prod(after[: i - 1]) < ahead:
            return i - 1, ahead // math.prod(after[: i - 1])
    return (places[0] if places else None), 1


def label(node: onnx.NodeProto) -> str:
    """How messages call an ONNX node."""
    return (
        f"{node.op_type} {node.name!r}"
        if node.name
        else f"{node.op_type} that makes {node.output[0]!r}"
    )


def import_onnx(
    path: Path, sizes: Mapping[str, Sequence[int]] | Sequence[int] | None = None
) -> OnnxNetwork:
    """The float network in an ONNX file, with a free batch, in eval mode.

    Args:
        path: the file.
        sizes: of an input without its batch, needed where the file leaves them open.

    Raises:
        TraceError: the file is no float ONNX model, has operators that are not supported (all are
            named), or what was imported does not compute what ONNX Runtime does.
    """
    return import_model(read_file(path), path, sizes)


def import_model(
    model: onnx.ModelProto,
    path: Path,
    sizes: Mapping[str, Sequence[int]] | Sequence[int] | None = None,
) -> OnnxNetwork:
    """The same of a model in memory; ``path`` names it."""
    for part in ("layers", "arithmetic", "data_movement", "recurrent"):
        importlib.import_module(f"rewriter.onnx_import.{part}")  # each registers its operators
    shapes = input_shapes(model, sizes)
    _check_operators(model, list(shapes), path.name)
    values = values_of(model, shapes)
    importer = Importer(model, values)
    for name in shapes:
        importer.nodes[name] = importer.graph.placeholder(re.sub(r"\W", "_", name))
        importer.batch_axis[name] = 0
        importer.batch_source = name
    for node in model.graph.node:
        if all(o in values.static for o in node.output if o):
            continue
        importer.follow_batch(node)
        try:
            made = OPERATORS[node.op_type](importer, node)
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(f"onnx: {label(node)}: {type(error).__name__}: {error}") from error
        results = made if isinstance(made, tuple) else (made,)
        importer.nodes.update(zip(node.output, results, strict=False))
    outputs = [o.name for o in model.graph.output]
    found = [importer.value(o) for o in outputs]
    importer.graph.output(found[0] if len(found) == 1 else tuple(found))
    network = OnnxNetwork(importer.root, importer.graph, class_name=_class_name(path))
    network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.recompile()
    network.input_names = tuple(shapes)
    network.output_names = tuple(outputs)
    network.input_sizes = tuple(tuple(int(d or 0) for d in s[1:]) for s in shapes.values())
    for p in network.parameters():
        p.requires_grad_(False)
    network.eval()
    compare(network, model, shapes, path.name)
    return network


def file_sizes(
    path: Path, sizes: Mapping[str, Sequence[int]] | Sequence[int] | None = None
) -> tuple[tuple[int, ...], ...]:
    """The shape of each input of a file, without its batch; arguments and errors as for `import_onnx`."""
    return tuple(
        tuple(int(d or 0) for d in s[1:]) for s in input_shapes(read_file(path), sizes).values()
    )


def _class_name(path: Path) -> str:
    return "".join(w.capitalize() for w in re.split(r"\W+|_", path.stem) if w) or "Network"


def _check_operators(model: onnx.ModelProto, inputs: Sequence[str], name: str) -> None:
    """Name what cannot be imported; what is computed from constants and shapes alone never is."""
    moving = depends_on_data(model, inputs)
    missing = Counter(
        n.op_type if n.domain in DEFAULT_DOMAINS else f"{n.domain}.{n.op_type}"
        for n in model.graph.node
        if n.domain not in DEFAULT_DOMAINS
        or (
            n.op_type not in OPERATORS
            and n.op_type not in SHAPES
            and moving.intersection(n.output)
        )
    )
    if missing:
        listed = ", ".join(f"{k} ({v})" for k, v in sorted(missing.items()))
        raise TraceError(f"onnx: {name}: operators that cannot be imported: {listed}")
