"""Trace a trained network to a torch.fx graph in the normal form.

``rewriter.tracing.tracer`` does the tracing and ``rewriter.tracing.canonicalize`` the normal form; what comes out
is compared with the model before anyone else sees it.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rewriter.errors import TraceError
from rewriter.graph import facts
from rewriter.graph.interpret import without_fast_path
from rewriter.tracing.canonicalize import canonicalize
from rewriter.tracing.open_attention import open_attention
from rewriter.tracing.tracer import BATCHES, line_of, one_line, trace_graph
from rewriter.tracing.unwrap import plain_weights, unwrap_parts, unwrapped
from rewriter.tracing.verify import batch_of, verify


def trace(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> fx.GraphModule:
    """Trace a float network to a graph in the normal form of ``rewriter.tracing.canonicalize``.

    A sub-module that cannot be traced becomes one opaque leaf, with the reason and the line.

    Args:
        model: the trained network; it is copied and never touched.
        example: one input, or one for each input of ``forward``, each (N, ...) with any N >= 1.

    Returns:
        A graph module with the same outputs; ``meta`` holds ``opaque``, ``example`` (input
        shapes without the batch), ``structure`` (how the outputs are nested) and ``names`` (of
        inputs and outputs, where the model has ``input_names`` and ``output_names``).

    Raises:
        TraceError: the outermost forward cannot be traced, or the graph does not compute what
            the model does.
    """
    examples = example if isinstance(example, tuple) else (example,)
    examples = tuple(e.detach().float().cpu() for e in examples)
    names: Any = tuple(getattr(model, k, ()) for k in ("input_names", "output_names"))
    model = _prepared_copy(model)
    reference = copy.deepcopy(model)  # the graph shares its modules with the model
    few, many = (tuple(batch_of(e, size) for e in examples) for size in BATCHES)
    open_attention(model)
    try:
        with without_fast_path():
            graph, opaque = trace_graph(model, tuple(zip(few, many, strict=True)))
    except TraceError:
        _must_run(reference, few)
        raise
    gm = fx.GraphModule(model, graph, class_name=type(model).__name__)
    facts.EXAMPLE.put(gm, tuple(tuple(e.shape[1:]) for e in examples))
    facts.OPAQUE.put(gm, opaque)
    facts.NAMES.put(gm, names)
    _record_structure(gm)
    try:
        gm = canonicalize(gm)
    except TraceError:
        raise
    except Exception as cause:
        raise TraceError(
            f"{type(model).__name__}: no normal form of the graph: {one_line(cause)}"
        ) from cause
    verify(reference, gm, examples)
    return gm


def _must_run(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    try:
        with torch.no_grad():
            model(*[b.clone() for b in batch])
    except Exception as cause:
        shapes = ", ".join(str(tuple(b.shape)) for b in batch)
        raise TraceError(
            f"model: fails by itself on an input of shape {shapes}: {one_line(cause)} "
            f"at {line_of(cause)}"
        ) from cause


def _prepared_copy(model: nn.Module) -> nn.Module:
    """A float copy in eval mode on the CPU, without wrappers, with plain weights."""
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("model: a TorchScript module cannot be traced: give the nn.Module itself")
    for name, _ in model.named_children():
        if hasattr(fx.GraphModule, name):
            raise TraceError(
                f"model: {name}: torch.fx keeps this name for itself; give the sub-module another"
            )
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TraceError(f"model: {name}: is {tensor.dtype}, expected float32; call .float()")
        parameter = isinstance(tensor, nn.Parameter)  # a mask in a buffer may well be infinite
        bad = int((~torch.isfinite(tensor)).sum() if parameter else tensor.isnan().sum())
        if bad:
            raise TraceError(f"model: {name}: holds {bad} values that are NaN or infinite")
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # deepcopy refuses these
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(model, memo).cpu().eval().float()
    for p in copied.parameters():
        p.requires_grad_(False)
    for module in copied.modules():
        plain_weights(module)
    unwrap_parts(copied)
    return copied


def _record_structure(gm: fx.GraphModule) -> None:
    """How the outputs are nested, and those of them that are no tensors."""
    (output,) = gm.graph.find_nodes(op="output")
    leaves = pytree.tree_leaves(output.args[0])
    facts.STRUCTURE.put(gm, facts.STRUCTURE.of(output))
    constants = {i: v for i, v in enumerate(leaves) if not isinstance(v, fx.Node)}
    facts.CONSTANT_OUTPUTS.put(gm, constants)
    for node in leaves:
        if isinstance(node, fx.Node) and node.op != "get_attr" and not facts.DTYPE.known(node):
            raise TraceError(
                f"output: {node.name}: is neither a tensor nor a constant; return tensors in a "
                "tuple, list or dict"
            )
