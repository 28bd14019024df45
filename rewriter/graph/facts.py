"""What is known of a node or of a graph, beyond its structure: every fact that is kept in ``meta``, with its type.

A fact is written in one place and read through its name here; ``meta`` is touched nowhere else but where a node inherits all that
is known of another. ``writers`` and ``readers`` are the packages that may write and read it; a test holds them to the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, overload

import torch
from torch import Tensor, fx

T = TypeVar("T")
D = TypeVar("D")


class HasMeta(Protocol):
    """A node or a graph module."""

    meta: dict[str, Any]


@dataclass(frozen=True)
class Fact(Generic[T]):
    """One thing that is known of nodes or graphs.

    Args:
        key: its name in ``meta``.
        writers: packages that write it.
        readers: packages that read it.
    """

    key: str
    writers: tuple[str, ...]
    readers: tuple[str, ...] = ()

    def of(self, owner: HasMeta) -> T:
        """The fact, which must be known."""
        return owner.meta[self.key]

    @overload
    def get(self, owner: HasMeta) -> T | None: ...

    @overload
    def get(self, owner: HasMeta, default: D) -> T | D: ...

    def get(self, owner: HasMeta, default: Any = None) -> Any:
        """The fact where it is known, else a default."""
        return owner.meta.get(self.key, default)

    def put(self, owner: HasMeta, value: T) -> None:
        """Write it."""
        owner.meta[self.key] = value

    def drop(self, owner: HasMeta) -> None:
        """Forget it, where it is known."""
        owner.meta.pop(self.key, None)

    def known(self, owner: HasMeta) -> bool:
        """Whether it is known."""
        return self.key in owner.meta


def inherit(new: HasMeta, old: HasMeta, *without: Fact[Any]) -> None:
    """Edit ``new``: it knows what ``old`` does, but for some facts."""
    left_out = {f.key for f in without}
    new.meta = {k: v for k, v in old.meta.items() if k not in left_out}


def keep(new: HasMeta, old: HasMeta, *only: Fact[Any]) -> None:
    """Edit ``new``: it takes over these facts, where ``old`` knows them."""
    new.meta.update({f.key: old.meta[f.key] for f in only if f.key in old.meta})


Shape = tuple[int, ...]
Ranges = tuple[Tensor, Tensor]

# ---- of a node
SHAPE: Fact[Any] = Fact(
    "shape",
    ("graph", "rules", "surgery", "tracing"),
    (
        "damage",
        "fitting",
        "graph",
        "int8",
        "repair",
        "rules",
        "search",
        "sensitivity",
        "surgery",
        "tracing",
    ),
)
"""Shape of its value with a batch of 1; a nest of shapes for several tensors, None where it is no tensor."""
DTYPE: Fact[torch.dtype] = Fact(
    "dtype", ("graph", "surgery", "tracing"), ("damage", "int8", "tracing")
)
"""Of its value; unknown where that is no tensor."""
LAYER: Fact[str] = Fact("layer", ("rules", "tracing"), ("graph", "rules", "tracing"))
"""Qualified name of the user's module that it came from."""
CHANNEL_RANGE: Fact[Ranges] = Fact(
    "channel_range",
    ("damage", "graph", "plan", "rules", "sensitivity", "surgery"),
    ("damage", "fitting", "graph", "repair", "rules", "sensitivity", "surgery"),
)
"""Smallest and largest calibration value of each channel, (C,) each."""
INFLUENCE: Fact[Tensor] = Fact(
    "influence",
    ("damage", "export", "surgery"),
    ("damage", "export", "fitting", "surgery"),
)
"""(C,) squared gradients of the damage, by channel of its value."""
WEIGHT_INFLUENCE: Fact[Tensor] = Fact(
    "weight_influence", ("damage", "export", "surgery"), ("surgery",)
)
"""(C_out, C_in / groups) the same of the weights of a layer."""
KEEP_FLOAT: Fact[bool] = Fact(
    "keep_float",
    ("rules", "sensitivity", "surgery"),
    ("graph", "int8", "rules", "search", "sensitivity", "surgery"),
)
"""Whether it stays in float."""
READS_FLOAT: Fact[bool] = Fact("reads_float", ("rules",), ("int8",))
"""Of an operation in float: whether it reads in float what a layer's kernel can write so."""
GRID: Fact[tuple[float, int]] = Fact("grid", ("rules",), ("int8", "rules"))
"""Scale and zero point that its int8 form has whatever calibration sees: it lies on that grid."""
KEEP_INT16: Fact[bool] = Fact("keep_int16", ("rules",), ("int8",))
"""Whether its value has 16 bits where the target has them."""
RESIDUAL_OF: Fact[str] = Fact("residual_of", ("rules",), ("rules",))
"""Of a layer with what int8 leaves over of another one's weights: the name of that one."""
INT8: Fact[Any] = Fact(
    "int8", ("int8", "sensitivity"), ("export", "int8", "repair", "search", "sensitivity")
)
"""What int8 does there: a ``rewriter.int8.annotate.Annotation``."""
NOISE: Fact[float] = Fact("noise", ("assemble", "repair"), ("assemble", "repair"))
"""Power of the int8 errors in the input of a layer, relative to the variance of that input."""
REWRITTEN_BY: Fact[str] = Fact(
    "rewritten_by",
    ("rules", "surgery"),
    ("damage", "export", "fitting", "int8", "plan", "rules", "search", "sensitivity"),
)
"""The step that made it."""
FOLDED: Fact[bool] = Fact("folded_batch_norm", ("tracing",), ("export",))
"""Whether a batch norm was behind it, which is folded into it now."""

# ---- of a node while a network is traced
GROUP: Fact[fx.Node] = Fact("group", ("tracing",), ("tracing",))
"""The first node whose value has the same storage."""
PLACE: Fact[Any] = Fact("place", ("tracing",), ("tracing",))
"""Where in that storage its value lies."""
OVERWRITES: Fact[Any] = Fact("overwrites", ("tracing",), ("tracing",))
"""The nodes whose values it changes in place."""
PATH: Fact[str] = Fact("path", ("tracing",), ("tracing",))
"""Qualified name of the module whose forward made it."""
LINE: Fact[str] = Fact("line", ("tracing",), ("tracing",))
"""Line of the user's code that made it."""
MODULE_STACK: Fact[Any] = Fact("nn_module_stack", (), ("int8", "tracing"))
"""Written by torch.fx: the modules whose forward was running."""
WRAPPED: Fact[bool] = Fact("is_wrapped", ("tracing",), ())
"""Written by torch.fx."""

# ---- of a graph
EXAMPLE: Fact[tuple[Shape, ...]] = Fact(
    "example",
    ("export", "tracing"),
    ("assemble", "export", "graph", "search", "storage", "tracing"),
)
"""Shapes of the inputs without the batch."""
OPAQUE: Fact[Any] = Fact("opaque", ("tracing",), ("search", "sensitivity", "tracing"))
"""The sub-modules that are kept whole: ``rewriter.graph.lookup.Opaque``."""
NAMES: Fact[tuple[tuple[str, ...], tuple[str, ...]]] = Fact("names", ("tracing",), ("int8",))
"""What the file that a network was imported from calls its inputs and outputs; empty for other networks."""
STRUCTURE: Fact[Any] = Fact("structure", ("export", "tracing"), ("damage", "graph", "tracing"))
"""How the outputs are nested, a torch pytree."""
CONSTANT_OUTPUTS: Fact[dict[int, Any]] = Fact(
    "constant_outputs", ("export", "tracing"), ("damage", "graph")
)
"""The outputs that are no tensors, by number."""
PROFILED: Fact[tuple[float, ...]] = Fact(
    "profiled", ("damage", "graph", "plan"), ("graph", "plan")
)
"""Marks (``graph.channel_ranges``) of the weights and the inputs that the channel ranges of all nodes are of."""
CALIBRATION: Fact[Any] = Fact("calibration", ("search",), ("assemble", "sensitivity"))
"""How ranges are found: ``minmax``, ``percentile`` or ``mse``."""
SCHEME: Fact[Any] = Fact("scheme", ("plan", "quantfix", "search"), ("rules",))
"""The target, a ``rewriter.int8.QuantScheme``."""
LOG_SCALES: Fact[dict[str, Tensor]] = Fact("log_scales", ("rules",), ("assemble",))
"""(C,) float64, logarithms of the scales that equalization gave the channels of each value, by node."""
KNOWN_SCALES: Fact[dict[str, Tensor]] = Fact("known_scales", ("rules",), ("rules",))
"""The same of another plan, for equalization to keep; ``plan.rewrite`` is given it."""
REPAIRS: Fact[frozenset[str]] = Fact("repairs", ("rules",), ("assemble", "rules"))
"""The repairs that steps of a plan asked for."""
HEAD_GROUPS: Fact[dict[str, list[list[int]]]] = Fact("head_groups", (), ("rules",))
"""Groups of channels of a head that the user named, by node."""
FIDELITY: Fact[Any] = Fact("fidelity", ("damage", "search"), ("damage", "ladder", "search"))
"""The damage, a ``rewriter.damage.Fidelity``."""

FACTS: tuple[Fact[Any], ...] = tuple(v for v in list(globals().values()) if isinstance(v, Fact))
_BY_KEY = {f.key: f for f in FACTS}


def named(key: str) -> Fact[Any]:
    """The fact with this key.

    Raises:
        KeyError: there is none.
    """
    return _BY_KEY[key]
