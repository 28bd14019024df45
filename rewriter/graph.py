"""Trace a trained network to a torch.fx graph, and look things up in it.

Plain symbolic tracing gives up where the user's code asks a tensor for its shape. Here every proxy also carries
the real value that a small example batch has at that point, so ``x.shape[2]``, ``len(x)``, ``isinstance(x, Tensor)`` and
loops over a static size work; the batch size alone stays symbolic. A sub-module that still cannot be
traced becomes one opaque leaf, with the reason and the line; only if the outermost ``forward`` is the one that
fails is the model refused.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rewriter.errors import TraceError

LAYER_TYPES = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
RECURRENT_TYPES = (nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell)
TORCH_FOLDER = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Opaque:
    """A sub-module that is kept whole: it is run as it is, and nothing inside it is rewritten."""

    name: str
    kind: str
    reason: str
    line: str = ""


# ------------------------------------------------------------------------------------ tracing


class _Untraceable(Exception):
    """Carries the path of the innermost module whose forward could not be traced."""

    def __init__(self, path: str, cause: BaseException) -> None:
        super().__init__(path)
        self.path, self.cause = path, cause


class _Proxy(fx.Proxy):
    """A proxy that knows the value of the example at its place (``value``)."""

    value: Any

    @property
    def __class__(self) -> type:  # isinstance(x, Tensor) in user code must answer as for the value
        return type(self.value) if isinstance(self.__dict__.get("value"), Tensor) else _Proxy

    @property
    def shape(self) -> Any:
        if not isinstance(self.value, Tensor):
            return fx.proxy.Attribute(self, "shape")
        return self._sizes()

    def size(self, dim: int | None = None) -> Any:
        return self._sizes() if dim is None else self._sizes()[dim]

    def _sizes(self) -> tuple[Any, ...]:
        sizes = tuple(self.value.shape)
        if not sizes or sizes[0] % BATCH:
            return sizes  # not a batch: sizes are constants of the model
        node = self.tracer.create_proxy("call_method", "size", (self, 0), {})
        return (node, *sizes[1:])

    @property
    def ndim(self) -> int:
        return self.value.ndim

    def dim(self) -> int:
        return self.value.dim()

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def is_cuda(self) -> bool:
        return False

    @property
    def requires_grad(self) -> bool:
        return False

    def numel(self) -> Any:
        return self.tracer.create_proxy("call_method", "numel", (self,), {})

    def __len__(self) -> int:
        if isinstance(self.value, Tensor):
            raise fx.proxy.TraceError(
                "len() of a tensor is its batch size, which is not a constant"
            )
        return len(self.value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in {"node", "tracer", "value"}:
            raise AttributeError(name)
        return fx.proxy.Attribute(self, name)


# The example is traced with this batch size: prime and unusual, so that a size that is no multiple of it is surely
# not the batch, and checked with another one afterwards.
BATCH = 7


class _Tracer(fx.Tracer):
    def __init__(self, examples: tuple[Tensor, ...], leaves: set[str]) -> None:
        super().__init__()
        self.examples = iter(examples)
        self.leaves = leaves
        self.path: list[str] = [""]
        self.evaluating = False  # fx has patched every module call; a leaf that runs on values must run plainly

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or (
            type(m).__module__.startswith("torch.nn")
            and not isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.evaluating:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self.path.append(path)
        try:
            return super().call_module(m, forward, args, kwargs)
        except _Untraceable:
            raise
        except Exception as cause:
            raise _Untraceable(self.path[-1], cause) from cause
        finally:
            self.path.pop()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return attr_val  # parameters stay values: what is computed from them alone is a constant

    def create_arg(self, a: Any) -> Any:
        # a proxy passes for a tensor (see __class__), and so must be asked for first
        return a.node if type(a) in (_Proxy, fx.proxy.Attribute) else super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        proxy.value = None
        self.evaluating = True
        try:
            with torch.no_grad():
                proxy.value = self._evaluate(kind, target, _values(args), _values(kwargs))
        finally:
            self.evaluating = False
        return proxy

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return next(self.examples, args[0] if args else None)
        if kind == "get_attr":
            return operator.attrgetter(target)(self.root)
        if kind == "call_function":
            return target(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return self.root.get_submodule(target)(*args, **kwargs)

    def iter(self, obj: Any) -> Iterator[Any]:
        if isinstance(obj.value, (tuple, list)):
            return (obj[i] for i in range(len(obj.value)))
        return super().iter(obj)

    def to_bool(self, obj: Any) -> bool:
        if isinstance(obj.value, (bool, int)):
            return bool(obj.value)  # a condition on sizes; verified with another batch size
        return super().to_bool(obj)


def _values(tree: Any) -> Any:
    return fx.node.map_aggregate(tree, lambda a: a.value if type(a) is _Proxy else _attribute(a))


def _attribute(a: Any) -> Any:
    return getattr(a.root.value, a.attr) if type(a) is fx.proxy.Attribute else a


def trace(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> fx.GraphModule:
    """Trace a float network to a graph in the normal form of ``rewriter.canonical``.

    Args:
        model: the trained network; it is copied and never touched.
        example: one input, or one for each input of ``forward``, each (N, ...) with any N >= 1.

    Returns:
        A graph module with the same outputs; ``meta`` holds ``opaque``, ``example`` (input shapes without
        the batch) and ``structure`` (how the outputs are nested).

    Raises:
        TraceError: the outermost forward cannot be traced, or the graph does not compute what the model does.
    """
    from rewriter.canonical import canonicalise  # canonical uses this file's look-ups

    examples = example if isinstance(example, tuple) else (example,)
    examples = tuple(e.detach().float().cpu() for e in examples)
    model = _prepared_copy(model)
    batch = tuple(_batch(e, BATCH) for e in examples)
    graph, root, opaque = _trace_with_leaves(model, batch)
    gm = fx.GraphModule(root, graph, class_name=type(model).__name__)
    with torch.no_grad():
        expected = model(*batch)
        flat, structure = pytree.tree_flatten(expected)
    gm.meta["structure"] = structure
    gm.meta["example"] = tuple(tuple(e.shape[1:]) for e in examples)
    gm.meta["opaque"] = tuple(opaque.values())
    gm = canonicalise(gm)
    _verify(model, gm, examples)
    del flat
    return gm


def _prepared_copy(model: nn.Module) -> nn.Module:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            if tensor.dtype not in (torch.float32, torch.float64):
                raise TraceError(
                    f"model: {name} is {tensor.dtype}, expected torch.float32; call .float()"
                )
            if not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise TraceError(f"model: {name} holds {bad} values that are NaN or infinite")
    model = copy.deepcopy(model).cpu().eval()
    for p in model.parameters():
        p.requires_grad_(False)
    return model.float()


def _batch(example: Tensor, size: int) -> Tensor:
    """(N, ...) repeated to ``size`` samples that differ from each other."""
    rows = example[torch.arange(size) % len(example)].clone()
    scale = torch.linspace(1.0, 0.5, size).view(-1, *[1] * (rows.ndim - 1))
    return rows * scale


def _trace_with_leaves(
    model: nn.Module, batch: tuple[Tensor, ...]
) -> tuple[fx.Graph, nn.Module, dict[str, Opaque]]:
    opaque: dict[str, Opaque] = {}
    while True:
        tracer = _Tracer(batch, set(opaque))
        try:
            graph = tracer.trace(model, _unused_arguments(model, len(batch)))
        except _Untraceable as failure:
            if failure.path in opaque:
                raise TraceError(
                    f"{failure.path}: cannot be run: {failure.cause}"
                ) from failure.cause
            kind = type(model.get_submodule(failure.path)).__name__
            opaque[failure.path] = Opaque(
                failure.path, kind, _one_line(failure.cause), _line(failure.cause)
            )
            continue
        except Exception as cause:
            raise TraceError(
                f"{type(model).__name__}.forward: {_one_line(cause)} at {_line(cause)}; move this part into a "
                "sub-module of its own (it is then kept as it is) or out of the model"
            ) from cause
        for node in reversed(graph.nodes):
            if node.op == "placeholder" and not node.users and node.args:
                graph.erase_node(node)  # an argument with a default, which we leave at its default
        return graph, tracer.root, opaque


def _unused_arguments(model: nn.Module, given: int) -> dict[str, Any] | None:
    parameters = list(inspect.signature(model.forward).parameters.values())[given:]
    return {
        p.name: p.default
        for p in parameters
        if p.default is not inspect.Parameter.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    } or None


def _one_line(cause: BaseException) -> str:
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:200]}" if text else type(cause).__name__


def _line(cause: BaseException) -> str:
    """The innermost line of the user's code in a traceback, as file:line."""
    here = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_tb(cause.__traceback__)):
        if not frame.filename.startswith((TORCH_FOLDER, here, "<")):
            return f"{frame.filename}:{frame.lineno}"
    return "unknown line"


def _verify(model: nn.Module, gm: fx.GraphModule, examples: tuple[Tensor, ...]) -> None:
    """The graph must compute what the model computes, also with a batch size it was not traced with."""
    batch = tuple(_batch(e, 3) for e in examples)
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*batch))
        try:
            found = pytree.tree_leaves(gm(*batch))
        except Exception as cause:
            raise TraceError(
                f"{type(model).__name__}: the traced graph fails for a batch of 3: {_one_line(cause)}; "
                "the forward depends on the batch size"
            ) from cause
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(a, Tensor):
            continue
        if not torch.isfinite(a).all():
            raise TraceError(f"model: output {i} of the float model holds NaN or infinite values")
        scale = float(a.abs().max()) or 1.0
        error = float((a - b).abs().max()) if a.shape == b.shape else float("inf")
        if error > 1e-4 * scale:
            raise TraceError(
                f"{type(model).__name__}: output {i} of the traced graph differs from the model's by "
                f"{error:.2g} (largest value {scale:.2g}); the forward depends on values or modifies its inputs"
            )


# ----------------------------------------------------------------------------------- look-ups


def module_of(gm: fx.GraphModule, node: fx.Node) -> nn.Module:
    """The module that a ``call_module`` node calls."""
    return gm.get_submodule(str(node.target))


def is_call(gm: fx.GraphModule, node: Any, *kinds: type[nn.Module]) -> bool:
    """Whether ``node`` calls a module whose type is exactly one of ``kinds``."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and type(module_of(gm, node)) in kinds
    )


def layers(gm: fx.GraphModule) -> list[fx.Node]:
    """The layers with weights that int8 touches (convolution, linear), in the order in which they run."""
    return [n for n in gm.graph.nodes if is_call(gm, n, *LAYER_TYPES)]


def layer_name(node: fx.Node) -> str:
    """The qualified name of the module that the user wrote, such as ``blocks.0.dw.0``."""
    return str(node.meta.get("layer", node.target))


def kind_of(gm: fx.GraphModule, node: fx.Node) -> str:
    """What a layer is, in one word: depthwise, pointwise, conv, linear, transposed, ... or the operation."""
    if node.op != "call_module":
        return getattr(node.target, "__name__", str(node.target))
    m = module_of(gm, node)
    if isinstance(m, nn.Linear):
        return "linear"
    if isinstance(m, nn.ConvTranspose2d):
        return "transposed"
    if isinstance(m, (nn.Conv1d, nn.Conv2d)):
        if m.groups > 1:
            return "depthwise" if m.groups == m.in_channels else "grouped"
        return "pointwise" if all(k == 1 for k in m.kernel_size) else "conv"
    return type(m).__name__.lower()


def find(gm: fx.GraphModule, name: str) -> fx.Node:
    """The node called ``name``."""
    node = next((n for n in gm.graph.nodes if n.name == name), None)
    if node is None:
        raise KeyError(name)
    return node


def outputs(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose values the graph returns, flattened, in order."""
    (output,) = gm.graph.find_nodes(op="output")
    return [n for n in pytree.tree_leaves(output.args[0]) if isinstance(n, fx.Node)]


def unflatten(gm: fx.GraphModule, flat: list[Any]) -> Any:
    """Nest flat outputs as the user's ``forward`` returned them."""
    return pytree.tree_unflatten(flat, gm.meta["structure"])


def propagate_shapes(gm: fx.GraphModule) -> None:
    """Write ``shape`` (batch 1) and ``dtype`` into every node's meta, by one pass over zeros."""

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            n.meta["shape"] = pytree.tree_map(
                lambda v: tuple(v.shape) if isinstance(v, Tensor) else None, value
            )
            if isinstance(value, Tensor):
                n.meta["shape"], n.meta["dtype"] = tuple(value.shape), value.dtype
            return value

    zeros = [torch.zeros(1, *shape) for shape in gm.meta["example"]]
    with torch.no_grad():
        Shapes(gm).run(*zeros)


def walk(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Iterator[tuple[fx.Node, Any]]:
    """Run the graph node by node and yield each node with its value; a value is dropped after its last use."""
    values: dict[fx.Node, Any] = {}
    last: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for used, user in last.items():
        dying.setdefault(user, []).append(used)
    feed = iter(inputs)
    for node in gm.graph.nodes:
        if node.op == "output":
            return
        values[node] = run_node(gm, node, values, feed)
        yield node, values[node]
        for used in dying.get(node, ()):
            del values[used]


def run_node(
    gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], feed: Iterator[Tensor] = iter(())
) -> Any:
    """The value of one node, from the values of those before it."""
    if node.op == "placeholder":
        x = next(feed)
        # channels_last is about twice as fast for depthwise convolutions on CPU
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(gm)
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        return gm.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
