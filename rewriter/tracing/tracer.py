"""Symbolic tracing with real values beside the symbols.

Plain torch.fx gives up where the user's code asks a tensor for its shape. Here every proxy also
carries the values that two small batches of different size have at its place: what is equal in
both is a constant of the model (``x.shape[2]``, ``x.ndim``, a loop over a static size, a
condition on them), what differs is the batch size and stays symbolic, and a condition on the
values themselves is refused. In-place operations are seen by the tensors' version counters.
"""

from __future__ import annotations

import inspect
import operator
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute
from torch.fx.proxy import TraceError as FxTraceError
from torch.utils import _pytree as pytree

from rewriter.errors import TraceError
from rewriter.graph import facts
from rewriter.graph.lookup import Opaque
from rewriter.tracing.assignment import assign_
from rewriter.tracing.isolation import attributes_kept, without_autograd
from rewriter.tracing.open_attention import ENTERED, opened_attention_forward
from rewriter.tracing.proxy import (
    Proxy,
    equal,
    holds_tensor,
    known_values,
    offered,
    place,
    proxies,
    storage,
    tensors,
    version,
)

BATCHES = (2, 3)  # 1 would be ambiguous: squeeze() and broadcasting treat it apart
_FOLDERS = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}", "<")
# What these say of a tensor depends on its shape and type alone.
_ABOUT_SHAPE = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "get_device"),
    *("is_floating_point", "is_complex", "is_contiguous", "__len__"),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
# What is of these types depends on types alone, such as x.type().
_ABOUT_TYPE = (str, torch.dtype, torch.device)
# Functions that take sizes, but no tensor that could be a proxy: torch does not offer them to a
# proxy by itself.
_MAKERS = ("zeros", "ones", "full", "empty", "arange", "eye", "linspace")
_EMPTY = ("new_zeros", "new_ones", "new_full")
# What is written in other libraries' Python and only wrapped as one call (``torch.fx.wrap``) is entered.
_CLOSED = ("torch", "operator", "_operator", "builtins", "math", "rewriter", "numpy")
# torch 2.15 crashes the interpreter where these, given a proxy beside a number, are dispatched in C
_CRASHING = (
    *("pow", "float_power", "remainder", "where", "addcmul", "addcdiv"),
    *("baddbmm", "addmm", "addbmm", "addmv", "addr"),
)
_METHODS = ("expand", "repeat", "view", "reshape", "new_zeros", "new_ones", "new_full", "tile")


class UntraceableError(Exception):
    """Carries the path of the innermost module whose forward could not be traced."""

    def __init__(self, path: str, cause: BaseException, line: str = "") -> None:
        super().__init__(path)
        self.path, self.cause, self.line = path, cause, line or line_of(cause)


class Tracer(fx.Tracer):
    """Traces a network on its examples; modules of torch.nn and ``leaves`` are not entered."""

    def __init__(self, examples: tuple[tuple[Tensor, Tensor], ...], leaves: set[str]) -> None:
        super().__init__()
        self.examples = examples
        self.leaves = leaves
        self.path: list[str] = [""]
        # fx has patched every module call; a leaf that runs on values must run plainly
        self.evaluating = False

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with offered(torch, (*_MAKERS, *_CRASHING), self), offered(Tensor, _METHODS, self):
            return super().trace(root, concrete_args)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """One placeholder for each example; Python itself fills in the defaults of the rest."""
        names: list[str] = []
        for p in inspect.signature(self.root.forward).parameters.values():
            if p.kind is p.VAR_POSITIONAL:
                names += [f"{p.name}_{i}" for i in range(len(self.examples) - len(names))]
            elif p.kind is not p.VAR_KEYWORD and p.kind is not p.KEYWORD_ONLY:
                names.append(p.name)
        args: list[Any] = [self.root]
        for name, values in zip(names, self.examples, strict=False):
            proxy = super().create_proxy("placeholder", name, (), {})
            args.append(self._with_values(proxy, values, static=False))
        if len(args) <= len(self.examples):
            raise TypeError(f"takes {len(names)} inputs but {len(self.examples)} were given")
        return lambda *inputs: self._open(root_fn(*inputs)), args

    def _open(self, output: Any) -> Any:
        """The output as tuples, lists and dicts of tensors; remembers how the user nested them."""
        output = pytree.tree_map(_opened, output, is_leaf=_is_proxy)
        self.structure = pytree.tree_flatten(output, is_leaf=_is_proxy)[1]
        return _without_names(output)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves:
            return True
        if type(m).__name__ == "DeformConv2d" and type(m).__module__.startswith("torchvision."):
            return True
        # what hooks compute is part of the graph
        hooked = vars(m)["_forward_hooks"] or vars(m)["_forward_pre_hooks"]
        return (
            not hooked
            and type(m).__module__.startswith("torch.nn")
            and not isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict, *ENTERED))
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if self.evaluating:
            return forward(*args, **kwargs)
        if not proxies((args, kwargs)):
            return self._constant(forward, args, kwargs)
        try:
            path = self.path_of_module(m)
        except NameError:
            if next(m.parameters(), None) is not None:
                raise
            return forward(*args, **kwargs)  # nn.ReLU()(x), made on the spot
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self.path.append(path)
        try:
            return super().call_module(m, forward, args, kwargs)
        except UntraceableError:
            raise
        except Exception as cause:
            raise UntraceableError(path, cause) from cause
        finally:
            self.path.pop()

    def _constant(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a module makes of constants is one too, such as a table of relative positions."""
        self.evaluating = True
        try:
            return forward(*args, **kwargs)
        finally:
            self.evaluating = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return attr_val  # parameters stay values: what is computed from them alone is a constant

    def create_arg(self, a: Any) -> Any:
        # a proxy passes for a tensor (see __class__), and so must be asked for first
        if type(a) in (Proxy, Attribute):
            return a.node
        return super().create_arg(a)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any
    ) -> Any:
        if kind == "call_function" and (inside := _inside(target)) is not None:
            return self._entered(inside, target, args, kwargs)
        return self._called(kind, target, args, kwargs, *rest, **named)

    def _entered(self, inside: Callable[..., Any], target: Any, args: Any, kwargs: Any) -> Any:
        """What a function computes step by step; where that cannot be traced, one call of it."""
        last = next(reversed(self.graph.nodes))
        try:
            made = inside(*args, **kwargs)
        except Exception:
            made = None
        # torch.fx takes one value, and no more, of a function that the user has wrapped
        if type(made) is Proxy or (made is not None and target is not inside):
            return made
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            if facts.OVERWRITES.get(node):
                raise FxTraceError(f"{target.__name__} works in place and cannot be traced")
            self.graph.erase_node(node)
        return self._called("call_function", target, args, kwargs)

    def _called(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any
    ) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        used = proxies((args, kwargs))
        constants = [(t, t._version) for t in tensors((args, kwargs))]
        before = [version(p) for p in used]
        self.evaluating = True
        try:
            with torch.no_grad():
                values = tuple(
                    self._evaluate(kind, target, known_values(args, i), known_values(kwargs, i))
                    for i in (0, 1)
                )
        finally:
            self.evaluating = False
        if any(t._version != version for t, version in constants):
            raise FxTraceError("the forward changes a parameter or buffer of the model")
        overwritten = [p.node for p, v in zip(used, before, strict=True) if version(p) != v]
        if overwritten:
            facts.OVERWRITES.put(proxy.node, overwritten)
            facts.PATH.put(proxy.node, self.path[-1])
            facts.LINE.put(proxy.node, _line_now())
        static = (
            target in _ABOUT_SHAPE
            or isinstance(values[0], _ABOUT_TYPE)
            or (bool(used) and all(p.of_shapes for p in used))
        )
        if (
            target in _EMPTY
            and isinstance(values[0], Tensor)
            and values[0].shape == values[1].shape
        ):
            self.graph.erase_node(proxy.node)
            return values[0]  # a constant, such as the mask of shifted windows
        result = self._with_values(proxy, values, static)
        if static and not holds_tensor(values[0]) and equal(*values):
            self.graph.erase_node(proxy.node)
            return values[0]
        for p in used:
            if storage(values[0]) is not None and storage(values[0]) == storage(p.known[0]):
                facts.GROUP.put(proxy.node, facts.GROUP.of(p.node))
        return result

    def _with_values(self, proxy: Any, values: Any, static: bool) -> Any:
        proxy.known, proxy.of_shapes = values, static
        node = proxy.node
        facts.GROUP.put(node, node)
        facts.PLACE.put(node, place(values[0]))
        if isinstance(values[0], Tensor):
            facts.SHAPE.put(node, tuple(values[0].shape))
            facts.DTYPE.put(node, values[0].dtype)
        return proxy

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_function":
            return target(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if kind == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        return operator.attrgetter(target)(self.root)

    def iter(self, obj: Any) -> Iterator[Any]:
        if isinstance(obj.known[0], dict):
            return iter(list(obj.known[0]))
        return (obj[i] for i in range(len(obj)))

    def to_bool(self, obj: Any) -> bool:
        if type(obj) is Proxy and obj.of_shapes:
            raise FxTraceError("a condition depends on the batch size")
        raise FxTraceError("a condition depends on values of the input")


def trace_graph(
    model: nn.Module, examples: tuple[tuple[Tensor, Tensor], ...]
) -> tuple[fx.Graph, tuple[Opaque, ...]]:
    """The graph of ``model``, with the sub-modules that had to be kept whole.

    Args:
        model: in eval mode on the CPU; new constants become attributes of it.
        examples: for each input, one batch of each size of ``BATCHES``.

    Raises:
        TraceError: the outermost forward cannot be traced.
    """
    opaque: dict[str, Opaque] = {}
    while True:
        tracer = Tracer(tuple((a.clone(), b.clone()) for a, b in examples), set(opaque))
        try:
            with without_autograd(), attributes_kept(model):
                graph = tracer.trace(model)
            _read_what_was_overwritten(graph)
            for node in graph.nodes:  # torch.fx marks what a wrapped function returns
                if _inside(node.target) is None:
                    facts.WRAPPED.drop(node)
        except UntraceableError as failure:
            if failure.path and failure.path not in opaque:
                kind = type(model.get_submodule(failure.path)).__name__
                reason = one_line(failure.cause)
                opaque[failure.path] = Opaque(failure.path, kind, reason, failure.line)
                continue
            raise TraceError(_refusal(model, failure.cause, failure.line)) from failure.cause
        except Exception as cause:
            raise TraceError(_refusal(model, cause, line_of(cause))) from cause
        facts.STRUCTURE.put(graph.output_node(), tracer.structure)
        return graph, tuple(opaque.values())


def _refusal(model: nn.Module, cause: BaseException, line: str) -> str:
    return (
        f"{type(model).__name__}.forward: {one_line(cause)} at {line}; move this part into a "
        "sub-module of its own (it is then kept as it is) or out of the model"
    )


def _read_what_was_overwritten(graph: fx.Graph) -> None:
    """Who reads a value after an in-place operation reads its result; edits the graph."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in graph.nodes:
        for changed in facts.OVERWRITES.get(node, ()):
            for other in list(graph.nodes):
                if facts.GROUP.get(other) is not facts.GROUP.get(changed):
                    continue
                later = [u for u in other.users if order[u] > order[node]]
                if order[other] >= order[node] or not later:
                    continue
                first = min(later, key=order.__getitem__)
                if first.target is assign_ and first.args[2] is node:
                    continue  # x[i] += y: changes a part of x, then assigns it
                if facts.PLACE.of(other) != facts.PLACE.of(node):
                    cause = FxTraceError(
                        f"in-place {node.target} changes {other.name}, of which it sees only "
                        "a part or a view"
                    )
                    raise UntraceableError(facts.PATH.of(node), cause, facts.LINE.of(node))
                for user in later:
                    user.replace_input_with(other, node)


def _inside(target: Any) -> Callable[..., Any] | None:
    """The steps of a function that is offered as one call; None where it is one step."""
    if target is nn.functional.multi_head_attention_forward:
        return opened_attention_forward
    home = str(getattr(target, "__module__", None)).split(".")[0]
    return target if inspect.isfunction(target) and home not in (*_CLOSED, "None") else None


def _is_proxy(a: Any) -> bool:
    return type(a) is Proxy


def _opened(a: Any) -> Any:
    if not _is_proxy(a) or isinstance(a.known[0], Tensor):
        return a
    if isinstance(a.known[0], dict):
        return {k: _opened(a[k]) for k in a.known[0]}
    if isinstance(a.known[0], (tuple, list)):
        return tuple(_opened(a[i]) for i in range(len(a)))
    return a


def _without_names(tree: Any) -> Any:
    """Named tuples as plain ones: generated code does not know their class."""
    if _is_proxy(tree):
        return tree
    if isinstance(tree, dict):
        return {k: _without_names(v) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return (
            [_without_names(v) for v in tree]
            if isinstance(tree, list)
            else tuple(map(_without_names, tree))
        )
    return tree


def one_line(cause: BaseException) -> str:
    """An exception as one short line."""
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:200]}" if text else type(cause).__name__


def line_of(cause: BaseException) -> str:
    """The innermost line of the user's code in a traceback, as file:line."""
    return _innermost(traceback.extract_tb(cause.__traceback__))


def _line_now() -> str:
    return _innermost(traceback.extract_stack())


def _innermost(frames: traceback.StackSummary) -> str:
    for frame in reversed(frames):
        if not frame.filename.startswith(_FOLDERS):
            return f"{frame.filename}:{frame.lineno}"
    return "unknown line"
