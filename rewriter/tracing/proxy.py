"""Symbols for tracing that carry real values, and what can be asked of them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.fx.proxy import Attribute
from torch.fx.proxy import TraceError as FxTraceError

from rewriter.tracing.assignment import assign_, spans


class Proxy(fx.Proxy):
    """A symbol with the values that both batches have at its place.

    Attributes:
        known: the value for each of ``BATCHES``.
        of_shapes: it follows from shapes alone.
    """

    known: tuple[Any, Any]
    of_shapes: bool

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        # isinstance(x, Tensor) in user code must answer as for the value
        values = self.__dict__.get("known")
        return Tensor if values is not None and isinstance(values[0], Tensor) else Proxy

    @property
    def shape(self) -> Any:
        return self.size()

    def size(self, dim: int | None = None) -> Any:
        a, b = (v.shape for v in self.known)
        if len(a) != len(b):
            raise FxTraceError("the number of dimensions depends on the batch size")
        if dim is not None:
            return self._size(dim % len(a))
        return torch.Size(a) if a == b else tuple(self._size(i) for i in range(len(a)))

    def _size(self, dim: int) -> Any:
        return self.tracer.create_proxy("call_method", "size", (self, dim), {})

    def __len__(self) -> int:
        a, b = (len(v) for v in self.known)
        if a != b:
            raise FxTraceError("len() is the batch size, which is no constant")
        return a

    def __index__(self) -> int:
        raise FxTraceError("the batch size, or a value, is used as a plain number")

    __int__ = __float__ = __index__

    def __contains__(self, item: Any) -> bool:
        if isinstance(self.known[0], dict):
            return item in self.known[0]
        raise FxTraceError("a condition on values of the input")

    def __setitem__(self, index: Any, value: Any) -> None:
        x = self.known[0]
        if not isinstance(x, Tensor) or spans(tuple(x.shape), index) is None:
            raise FxTraceError("assignment to other than a block of channels or positions")
        given = value.known[0] if type(value) is Proxy else value
        if isinstance(given, Tensor) and given.dtype != x.dtype:
            raise FxTraceError(f"assignment of {given.dtype} to a part of {x.dtype}")
        self.tracer.create_proxy("call_function", assign_, (self, index, value), {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in {"node", "tracer", "known", "of_shapes"}:
            raise AttributeError(name)
        first, second = (getattr(v, name) for v in self.known)
        if isinstance(self.known[0], dict) and name in ("keys", "items", "values"):
            this: Any = self
            pairs = {k: this[k] for k in self.known[0]}
            return getattr(pairs, name)
        if callable(first):
            return Attribute(self, name)
        if isinstance(first, Tensor) or not equal(first, second):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return first  # dtype, device, ndim, ...


@contextmanager
def offered(owner: Any, names: tuple[str, ...], tracer: Any) -> Generator[None]:
    """While tracing, ``torch.zeros(x.shape[0], 8)`` becomes a node if a size is symbolic."""

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not proxies((args, kwargs)):
                return function(*args, **kwargs)
            if owner is Tensor:
                return tracer.create_proxy("call_method", name, args, kwargs)
            return tracer.create_proxy("call_function", function, args, kwargs)

        return call

    own = {name: vars(owner).get(name) for name in names}
    try:
        for name in names:
            setattr(owner, name, wrapped(name, getattr(owner, name)))
        yield
    finally:
        for name, function in own.items():
            if function is None:
                delattr(owner, name)  # inherited
            else:
                setattr(owner, name, function)


def _leaves(tree: Any) -> list[Any]:
    found: list[Any] = []

    def keep(a: Any) -> Any:
        found.append(a)
        return a

    map_aggregate(tree, keep)
    return found


def proxies(tree: Any) -> list[Proxy]:
    roots = (a.root if type(a) is Attribute else a for a in _leaves(tree))
    return [a for a in roots if type(a) is Proxy]


def tensors(tree: Any) -> list[Tensor]:
    """The tensors among the arguments that are no proxies: parameters, buffers and constants."""
    return [a for a in _leaves(tree) if type(a) is not Proxy and isinstance(a, Tensor)]


def known_values(tree: Any, i: int) -> Any:
    def value(a: Any) -> Any:
        if type(a) is Attribute:
            return getattr(a.root.known[i], a.attr)  # type: ignore[attr-defined]
        return a.known[i] if type(a) is Proxy else a

    return map_aggregate(tree, value)


def holds_tensor(value: Any) -> bool:
    return any(isinstance(v, Tensor) for v in _leaves(value))


def equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def version(proxy: Proxy) -> int:
    value = proxy.known[0]
    return value._version if isinstance(value, Tensor) else 0


def storage(value: Any) -> int | None:
    return (value.untyped_storage().data_ptr() or None) if isinstance(value, Tensor) else None


def place(value: Any) -> Any:
    """What tells two views of one storage apart."""
    if not isinstance(value, Tensor):
        return None
    return (value.data_ptr(), tuple(value.shape), value.stride())
