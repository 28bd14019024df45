"""Trace a trained network to a torch.fx graph in the normal form, and look things up in it.

``rewriter.tracer`` does the tracing and ``rewriter.canonical`` the normal form; what comes out
is compared with the model before anyone else sees it.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from rewriter.errors import TraceError
from rewriter.tracer import BATCHES, line_of, one_line, trace_graph
from rewriter.tracer import Opaque as Opaque
from rewriter.verify import batch_of, verify

LAYER_TYPES = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
# functions of each value alone, whatever its channel (a PReLU has a slope for each channel)
ACTIVATION_TYPES = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.PReLU,
    nn.SiLU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Tanh,
    nn.GELU,
    nn.ELU,
    nn.Mish,
    nn.Softplus,
)
RECURRENT_TYPES = (nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell)


def trace(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> fx.GraphModule:
    """Trace a float network to a graph in the normal form of ``rewriter.canonical``.

    A sub-module that cannot be traced becomes one opaque leaf, with the reason and the line.

    Args:
        model: the trained network; it is copied and never touched.
        example: one input, or one for each input of ``forward``, each (N, ...) with any N >= 1.

    Returns:
        A graph module with the same outputs; ``meta`` holds ``opaque``, ``example`` (input
        shapes without the batch) and ``structure`` (how the outputs are nested).

    Raises:
        TraceError: the outermost forward cannot be traced, or the graph does not compute what
            the model does.
    """
    from rewriter.canonical import canonicalise  # canonical uses this file's look-ups

    examples = example if isinstance(example, tuple) else (example,)
    examples = tuple(e.detach().float().cpu() for e in examples)
    model = _prepared_copy(model)
    reference = copy.deepcopy(model)  # the graph shares its modules with the model
    few, many = (tuple(batch_of(e, size) for e in examples) for size in BATCHES)
    try:
        graph, opaque = trace_graph(model, tuple(zip(few, many, strict=True)))
    except TraceError:
        _must_run(reference, few)
        raise
    gm = fx.GraphModule(model, graph, class_name=type(model).__name__)
    gm.meta["example"] = tuple(tuple(e.shape[1:]) for e in examples)
    gm.meta["opaque"] = opaque
    _record_structure(gm)
    try:
        gm = canonicalise(gm)
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
    """A float copy in eval mode on the CPU, with plain weights."""
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
        _plain_weights(module)
    return copied


def _plain_weights(module: nn.Module) -> None:
    """Replace weight normalisation and other parametrizations by the weight itself, in place."""
    if parametrize.is_parametrized(module):
        # torch's own removal would change the class, which the copy shares with the user's module
        names = list(module.parametrizations)  # type: ignore[arg-type]
        weights = {name: getattr(module, name).detach().clone() for name in names}
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, weight in weights.items():
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    hooks: dict[int, Any] = vars(module)["_forward_pre_hooks"]
    for key, hook in list(hooks.items()):
        if type(hook).__name__ in ("WeightNorm", "SpectralNorm"):
            with torch.no_grad():
                hook(module, ())
                hook.remove(module)
            del hooks[key]
            getattr(module, hook.name).requires_grad_(False)


def _record_structure(gm: fx.GraphModule) -> None:
    """How the outputs are nested, and those of them that are no tensors."""
    (output,) = gm.graph.find_nodes(op="output")
    leaves, gm.meta["structure"] = pytree.tree_leaves(output.args[0]), output.meta["structure"]
    constants = {i: v for i, v in enumerate(leaves) if not isinstance(v, fx.Node)}
    gm.meta["constant_outputs"] = constants
    for node in leaves:
        if isinstance(node, fx.Node) and node.op != "get_attr" and "dtype" not in node.meta:
            raise TraceError(
                f"output: {node.name}: is neither a tensor nor a constant; return tensors in a "
                "tuple, list or dict"
            )


def module_of(gm: fx.GraphModule, node: fx.Node) -> Any:
    """The module that a ``call_module`` node calls (Any: its attributes depend on its class)."""
    target = str(node.target)
    found: Any = gm
    for part in target.split("."):  # get_submodule asks twice for each part, and rules ask often
        found = found._modules.get(part)
        if found is None:
            return gm.get_submodule(target)
    return found


def is_call(gm: fx.GraphModule, node: Any, *kinds: type[nn.Module]) -> bool:
    """Whether ``node`` calls a module whose type is exactly one of ``kinds``."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and type(module_of(gm, node)) in kinds
    )


def layers(gm: fx.GraphModule) -> list[fx.Node]:
    """The layers with weights that int8 touches (convolution, linear), in running order."""
    return [n for n in gm.graph.nodes if is_call(gm, n, *LAYER_TYPES)]


def layer_name(node: fx.Node) -> str:
    """The qualified name of the module that the user wrote, such as ``blocks.0.dw.0``."""
    return str(node.meta.get("layer", node.target))


def kind_of(gm: fx.GraphModule, node: fx.Node) -> str:
    """What a layer is, in one word: depthwise, pointwise, conv, linear, ... or the operation."""
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
    """Nest flat outputs (those of ``outputs``) as the user's ``forward`` returned them."""
    rest, structure = iter(flat), gm.meta["structure"]
    constants = gm.meta["constant_outputs"]
    leaves = [constants[i] if i in constants else next(rest) for i in range(structure.num_leaves)]
    return pytree.tree_unflatten(leaves, structure)


def add_module(gm: fx.GraphModule, path: str, module: nn.Module) -> str:
    """Add a sub-module at ``path``, or the next free name like it, in place; return its path."""
    taken, target, number = set(dict(gm.named_modules())), path, 0
    while target in taken or _attribute_exists(gm, target):
        number += 1
        target = f"{path}_{number}"
    parent = ""
    for part in target.split(".")[:-1]:
        parent = f"{parent}.{part}" if parent else part
        if parent not in taken:
            gm.add_submodule(parent, nn.Module())
    gm.add_submodule(target, module)
    module.train(mode=False)
    return target


def _attribute_exists(gm: fx.GraphModule, path: str) -> bool:
    """Whether a parameter, buffer or other attribute of that name is in the way."""
    try:
        operator.attrgetter(path)(gm)
    except AttributeError:
        return False
    return True


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


def last_uses(gm: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """The values that no node after this one reads, by node; a value that nobody reads dies where it is made."""
    last: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        last[node] = node
        for used in node.all_input_nodes:
            last[used] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for used, user in last.items():
        dying.setdefault(user, []).append(used)
    return dying


def device_of(gm: nn.Module) -> torch.device:
    """Where the weights of a network are, and so where it runs."""
    return next((p.device for p in gm.parameters()), torch.device("cpu"))


def walk(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Iterator[tuple[fx.Node, Any]]:
    """Run the graph where its weights are; yield each node with its value, which is dropped after its last use."""
    values: dict[fx.Node, Any] = {}
    dying = last_uses(gm)
    device = device_of(gm)
    feed = iter([x.to(device) for x in inputs])
    for node in gm.graph.nodes:
        if node.op == "output":
            return
        values[node] = run_node(gm, node, values, feed)
        yield node, values[node]
        for used in dying.get(node, ()):
            del values[used]


def channels_last(x: Tensor) -> Tensor:
    """Images (N, C, H, W) and sequences (N, T, C, H, W) with the channels of a pixel side by side.

    This is about twice as fast for depthwise convolutions on the CPU; others are left alone.
    """
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    # so that the frames, moved into the batch, are channels_last without a copy
    return x.movedim(2, -1).contiguous().movedim(-1, 2) if x.ndim == 5 else x


def run_node(
    gm: fx.GraphModule,
    node: fx.Node,
    values: dict[fx.Node, Any],
    feed: Iterator[Tensor] | None = None,
) -> Any:
    """The value of one node, from the values of those before it."""
    if node.op == "placeholder":
        assert feed is not None, node.name
        x = next(feed)
        return channels_last(x)
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(gm)
    args = map_arg(node.args, values.__getitem__)
    kwargs = map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        return gm.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
