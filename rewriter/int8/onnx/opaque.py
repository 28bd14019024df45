"""Parts that no emitter knows (recurrent layers, custom modules, rare functions).

Torch's own exporter writes each one alone, once for its content and input shapes, and its graph is
copied in with prefixed names.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from onnx import compose, version_converter
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rewriter.errors import QuantizeError
from rewriter.graph import facts
from rewriter.graph.interpret import without_fast_path
from rewriter.graph.lookup import layer_name, module_of
from rewriter.int8.onnx.builder import OPSET, Emission, Value
from rewriter.int8.onnx.plain_forms import plain_form
from rewriter.storage.digest import short

_CACHE: OrderedDict[Any, onnx.ModelProto] = OrderedDict()
_CACHED = 64


class _Part(nn.Module):
    """One node of a graph as a module of its tensor inputs."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node) -> None:
        super().__init__()
        self.called = module_of(gm, node) if node.op == "call_module" else None
        self.op, self.target = node.op, node.target
        places = {n: i for i, n in enumerate(node.all_input_nodes)}
        given = (node.args, node.kwargs)
        self.given: Any = _replaced(given, fx.Node, lambda n: _Place(places[n]))

    def forward(self, *inputs: Any) -> Any:
        args, kwargs = _replaced(self.given, _Place, lambda p: inputs[p.index])
        if self.called is not None:
            return self.called(*args, **kwargs)
        if self.op == "call_method":
            return getattr(args[0], str(self.target))(*args[1:], **kwargs)
        return self.target(*args, **kwargs)  # type: ignore[operator]


class _Function(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.called, self.target = None, function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


class _Place:
    """Stands for the input with this number."""

    def __init__(self, index: int) -> None:
        self.index = index


def _replaced(tree: Any, kind: type, new: Callable[[Any], Any]) -> Any:
    """``tree`` in plain containers, which pickle knows, with ``new`` of each leaf of a kind."""
    if isinstance(tree, kind):
        return new(tree)
    if isinstance(tree, slice):
        return slice(*(_replaced(v, kind, new) for v in (tree.start, tree.stop, tree.step)))
    if isinstance(tree, dict):
        return {k: _replaced(v, kind, new) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return (tuple if isinstance(tree, tuple) else list)(_replaced(v, kind, new) for v in tree)
    return tree


def emit_opaque(e: Emission, node: fx.Node, reason: str) -> Value:
    """Export what ``node`` calls, copy that graph into ``e`` and return its outputs.

    Raises:
        QuantizeError: torch cannot export it either.
    """
    form = plain_form(e.gm, node)
    sources = node.all_input_nodes if form is None else form[1]
    part = _Part(e.gm, node) if form is None else _Function(form[0])
    inputs: list[Any] = []
    for source in sources:
        shape, dtype = facts.SHAPE.get(source), facts.DTYPE.get(source)
        if dtype is None or shape is None:
            raise QuantizeError(
                f"{_what(e.gm, node)}: cannot be written to ONNX: it reads {source.name}, "
                f"which is a size that depends on the batch ({reason})"
            )
        inputs.append(torch.zeros(shape, dtype=dtype))
    shapes, structure = pytree.tree_flatten(facts.SHAPE.of(node), is_leaf=_is_shape)
    tensors = sum(shape is not None for shape in shapes)  # an output may be no tensor
    try:
        exported = _exported(part, tuple(inputs))
    except Exception as cause:
        raise QuantizeError(
            f"{_what(e.gm, node)}: cannot be written to ONNX: {reason}, and torch's exporter "
            "does not know it either"
        ) from cause
    names = _inline(e, node, sources, exported)
    if len(names) != tensors:
        raise QuantizeError(f"{node.name}: outputs after export: {len(names)}, expected {tensors}")
    rest = iter(names)
    found = ["" if shape is None else next(rest) for shape in shapes]
    return _tuples(pytree.tree_unflatten(found, structure))


def _what(gm: fx.GraphModule, node: fx.Node) -> str:
    """An operation by the user's name for it and its kind."""
    if node.op == "call_module":
        return f"{layer_name(node)} ({type(module_of(gm, node)).__name__})"
    owner = list((facts.MODULE_STACK.get(node) or {}).values())
    inside = f" in {owner[-1][0]}" if owner and owner[-1][0] else ""
    return f"{getattr(node.target, '__name__', node.target)}{inside}"


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, int) for v in value)


def _tuples(names: Any) -> Value:
    return names if isinstance(names, str) else tuple(_tuples(n) for n in names)


def _exported(part: _Part | _Function, inputs: tuple[Tensor, ...]) -> onnx.ModelProto:
    try:
        content = short(pickle.dumps(part))
    except Exception:  # what cannot be pickled (a module of a local class) is exported every time
        return _export(part, inputs)
    kind = part.target if part.called is None else type(part.called)
    key = (kind, content, tuple((tuple(i.shape), i.dtype) for i in inputs))
    if key not in _CACHE:
        _CACHE[key] = _export(part, inputs)
        while len(_CACHE) > _CACHED:
            _CACHE.popitem(last=False)
    _CACHE.move_to_end(key)
    return _CACHE[key]


def _export(part: _Part | _Function, inputs: tuple[Tensor, ...]) -> onnx.ModelProto:
    names = [f"in{i}" for i in range(len(inputs))]
    file: Any = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad(), without_fast_path(), _without_dump():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            part.eval(),
            inputs,
            file,
            input_names=names,
            opset_version=OPSET,
            # where a size is 1 in the example it may be the batch
            dynamic_axes={
                n: {d: f"{n}_{d}" for d, s in enumerate(i.shape) if s == 1}
                for n, i in zip(names, inputs, strict=True)
            },
            dynamo=False,
        )
    model = onnx.load_from_string(file.getvalue())
    if model.opset_import[0].version != OPSET:
        model = version_converter.convert_version(model, OPSET)
    return model


@contextmanager
def _without_dump() -> Generator[None]:
    """Keep the exporter from printing its whole graph where it knows an operator not.

    It asks whether the function below exists where it means to call it.
    """
    place: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    asked = place._jit_is_onnx_log_enabled
    place._jit_is_onnx_log_enabled = None
    try:
        yield
    finally:
        place._jit_is_onnx_log_enabled = asked


def _inline(
    e: Emission, node: fx.Node, sources: Sequence[fx.Node], model: onnx.ModelProto
) -> list[str]:
    prefix = e.name(f"{node.name}.part") + "/"
    graph = compose.add_prefix(model, prefix).graph
    for source, name in zip(sources, graph.input, strict=True):
        e.nodes.append(onnx.helper.make_node("Identity", [e.read(source, node)], [name.name]))
    e.nodes.extend(graph.node)
    e.constants.update({tensor.name: tensor for tensor in graph.initializer})
    return [o.name for o in graph.output]
