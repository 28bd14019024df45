"""The table of operators: what each one does, and what each target's kernels make of it.

One row for each operator of the normal form. Every list of types in the project is a question to this
table (``types``, ``calls``), so that an operator is added by one row here, its emitter and a test row.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

F = nn.functional

# Targets by how their kernels are built. Those of ONNX Runtime saturate at the ends of the output's type and
# compute nothing else behind a layer: with another activation and no int8 value in between the layer runs in float.
SATURATING = frozenset({"onnxruntime", "per_tensor", "tflite", "qnn"})
FUSING = frozenset({"tensorrt"})
EVERY = SATURATING | FUSING
NONE: frozenset[str] = frozenset()

Bounds = Callable[[Any], tuple[float, float]]


@dataclass(frozen=True)
class Operator:
    """One row.

    Args:
        module: the torch.nn class of the normal form; None: only functions and methods do this.
        calls: functions, and names of methods, that mean the same.
        layer: has weights that int8 stores.
        recurrent: has a state; kept whole.
        pointwise: a function of each value alone, whatever its channel (a PReLU has a slope for each).
        channelwise: channel i of the output depends on channel i of the input alone (pools, pads, resizing).
        homogeneous: f(s x) = s f(x) for s > 0.
        moves: only selects or rearranges values, or pads with zero.
        pools: averages over places.
        norm: normalizes by statistics that were fixed when the network was trained.
        bounded: its output spans [-1, 1] at most.
        squashes: turns logits into scores.
        normal: whether the normal form has it; if not it is kept whole.
        bounds: where it clips, if that is all it does, from the module.
        fused_by: targets that compute it inside the kernel of the operation before it.
        int8: targets on which it reads and writes int8.
        fixed: (low, high) of the output by target, where the target's kernels fix it.
        float_output: targets whose int8 kernel of this layer can write floats; on the others a float reader of its
            output reads the int8 value, or the layer would run in float.
        tensors: float tensors that it must read for an int8 kernel to exist; None: any number.
    """

    module: type[nn.Module] | None
    calls: tuple[Any, ...] = ()
    layer: bool = False
    recurrent: bool = False
    pointwise: bool = False
    channelwise: bool = False
    homogeneous: bool = False
    moves: bool = False
    pools: bool = False
    norm: bool = False
    bounded: bool = False
    squashes: bool = False
    normal: bool = True
    bounds: Bounds | None = None
    fused_by: frozenset[str] = NONE
    int8: frozenset[str] = NONE
    fixed: Mapping[str, tuple[float, float]] = field(
        default_factory=dict[str, tuple[float, float]]
    )
    float_output: frozenset[str] = NONE
    tensors: int | None = None

    @property
    def clips(self) -> bool:
        """Whether it does nothing but cut values off."""
        return self.bounds is not None


def _layer(kind: type[nn.Module], *calls: Any, **more: Any) -> Operator:
    settings: dict[str, Any] = {"int8": EVERY, "float_output": FUSING, **more}
    return Operator(kind, calls, layer=True, **settings)


def _clip(
    kind: type[nn.Module], *calls: Any, bounds: Bounds, homogeneous: bool = False
) -> Operator:
    return Operator(
        kind,
        calls,
        pointwise=True,
        homogeneous=homogeneous,
        bounds=bounds,
        fused_by=EVERY,
        int8=EVERY,
    )


def _activation(kind: type[nn.Module], *calls: Any, **more: Any) -> Operator:
    settings: dict[str, Any] = {"fused_by": FUSING, "int8": EVERY, **more}
    return Operator(kind, calls, pointwise=True, **settings)


def _window(kind: type[nn.Module], *calls: Any, **more: Any) -> Operator:
    return Operator(kind, calls, channelwise=True, homogeneous=True, **more)


def _moves(*calls: Any, kind: type[nn.Module] | None = None) -> Operator:
    return Operator(kind, calls, moves=True)


# The order matters where a class inherits ``forward`` from another: the more special first.
OPERATORS: tuple[Operator, ...] = (
    _layer(nn.Conv1d, F.conv1d, torch.conv1d),
    _layer(nn.Conv2d, F.conv2d, torch.conv2d),
    # ONNX Runtime has no kernel: see ``rewriter.int8.onnx.layers``
    _layer(
        nn.ConvTranspose2d,
        *(F.conv_transpose2d, torch.conv_transpose2d),
        int8=EVERY - {"onnxruntime", "per_tensor"},
    ),
    _layer(nn.Linear, F.linear, float_output=FUSING | {"onnxruntime", "per_tensor"}),
    Operator(nn.BatchNorm1d, norm=True),
    Operator(nn.BatchNorm2d, norm=True, channelwise=True),
    _clip(
        nn.ReLU,
        *(F.relu, torch.relu, "relu"),
        bounds=lambda m: (0.0, math.inf),
        homogeneous=True,
    ),
    _clip(nn.ReLU6, F.relu6, bounds=lambda m: (0.0, 6.0)),
    _clip(nn.Hardtanh, F.hardtanh, bounds=lambda m: (float(m.min_val), float(m.max_val))),
    _activation(nn.LeakyReLU, F.leaky_relu, homogeneous=True),
    _activation(nn.PReLU, homogeneous=True),
    _activation(nn.SiLU, F.silu),
    _activation(nn.Hardswish, F.hardswish),
    _activation(nn.Hardsigmoid, F.hardsigmoid, bounded=True),
    _activation(
        nn.Sigmoid,
        *(torch.sigmoid, F.sigmoid, "sigmoid", torch.special.expit),
        bounded=True,
        squashes=True,
    ),
    _activation(nn.Tanh, torch.tanh, F.tanh, "tanh", bounded=True, squashes=True),
    _activation(nn.GELU, F.gelu),
    _activation(nn.ELU, F.elu),
    _activation(nn.Mish, F.mish),
    _activation(nn.Softplus, F.softplus, fused_by=NONE, int8=NONE),
    Operator(nn.Softmax, (F.softmax, torch.softmax, "softmax"), squashes=True),
    Operator(
        nn.LogSoftmax,
        (F.log_softmax, torch.log_softmax, "log_softmax"),
        squashes=True,
        normal=False,
    ),
    Operator(nn.LogSigmoid, squashes=True, normal=False),
    _window(nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, moves=True),
    _window(nn.AvgPool2d, F.avg_pool2d, pools=True, int8=EVERY),
    _window(nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, pools=True, int8=EVERY),
    _window(nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d, moves=True),
    _window(nn.ZeroPad2d, moves=True),
    # moves values by its mode "nearest" alone: see ``rewriter.int8.annotate.moves_values``
    _window(nn.Upsample, int8=EVERY),
    Operator(nn.LayerNorm),
    _moves(F.pixel_shuffle, torch.pixel_shuffle, kind=nn.PixelShuffle),
    _moves(kind=nn.ChannelShuffle),
    Operator(nn.RNN, recurrent=True, normal=False),
    Operator(nn.GRU, recurrent=True, normal=False),
    Operator(nn.LSTM, recurrent=True, normal=False),
    Operator(nn.RNNCell, recurrent=True, normal=False),
    Operator(nn.GRUCell, recurrent=True, normal=False),
    Operator(nn.LSTMCell, recurrent=True, normal=False),
    # functions and methods that stay what they are in the normal form
    Operator(None, (operator.add,), int8=EVERY, tensors=2),
    Operator(None, (operator.mul,), int8=EVERY, tensors=2),
    Operator(None, (torch.cat,), int8=EVERY),
    Operator(None, (torch.mean,), int8=EVERY),
    _moves(torch.flatten),
    _moves(operator.getitem),
    _moves(torch.chunk, "chunk"),
    _moves(torch.split, "split"),
    _moves(torch.squeeze, "squeeze"),
    _moves(torch.unsqueeze, "unsqueeze"),
    _moves("reshape"),
    _moves("permute"),
    _moves("transpose"),
    _moves("expand"),
)

_BY_MODULE = {row.module: row for row in OPERATORS if row.module is not None}
# those that have a module become that module
_CALLED = {call: row for row in OPERATORS if row.module is None for call in row.calls}


def row_of(kind: Any) -> Operator | None:
    """The row of a torch.nn class, or of a function or the name of a method that stays one; None: there is none."""
    return _BY_MODULE.get(kind) if isinstance(kind, type) else _CALLED.get(kind)


def types(holds: Callable[[Operator], Any]) -> tuple[type[nn.Module], ...]:
    """The torch.nn classes of the rows for which ``holds`` is true, in the order of the table."""
    return tuple(row.module for row in OPERATORS if row.module is not None and holds(row))


def calls(holds: Callable[[Operator], Any]) -> tuple[Any, ...]:
    """Functions and names of methods of the rows for which ``holds`` is true, those without a module."""
    return tuple(c for row in OPERATORS if row.module is None and holds(row) for c in row.calls)


def modules_by_call() -> dict[Any, type[nn.Module]]:
    """The torch.nn class that says the same as a function or method."""
    return {c: row.module for row in OPERATORS if row.module is not None for c in row.calls}


def clip_bounds(module: nn.Module) -> tuple[float, float] | None:
    """Where an activation that only clips does so; None for any other module."""
    row = _BY_MODULE.get(type(module))
    return None if row is None or row.bounds is None else row.bounds(module)


@functools.cache
def fused_on(target: str) -> frozenset[type[nn.Module]]:
    """The activations that a target computes inside the operation before them."""
    return frozenset(types(lambda row: target in row.fused_by))


LAYER_TYPES = types(lambda row: row.layer)
RECURRENT_TYPES = types(lambda row: row.recurrent)
NORM_TYPES = types(lambda row: row.norm)
# functions of each value alone, whatever its channel (a PReLU has a slope for each channel)
ACTIVATION_TYPES = types(lambda row: row.pointwise)
CLIP_TYPES = types(lambda row: row.clips)
