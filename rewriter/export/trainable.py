"""A rewritten network for the user's own training: with batch norm again, and back from its trained weights to int8.

A graph in the normal form has its batch norms folded, which trains badly. So each convolution that had one, and each that a
rule has made, is followed by a batch norm that changes nothing at first: with the mean m and variance v of what it reads
as running statistics, gain sqrt(v + eps) and shift m. After training it is folded again. Modules are called as in the
rewritten graph, a batch norm as the convolution before it with ``_bn``.

Source: Ioffe and Szegedy 2015, Batch Normalization, section 3 (gain and shift can undo the normalization).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.assemble import repaired
from rewriter.damage.fisher import weigh
from rewriter.errors import RewriteError
from rewriter.graph import facts
from rewriter.graph.channel_ranges import profile
from rewriter.graph.edit import copy_graph
from rewriter.graph.lookup import is_call, module_of
from rewriter.int8.scheme import QuantScheme
from rewriter.int8.simulate import Quantized
from rewriter.tracing.fold_affine import scaled_outputs

__all__ = ["SUFFIX", "retrained", "trainable"]

SUFFIX = "_bn"
Batches = Sequence[Tensor]


def trainable(
    gm: fx.GraphModule, batches: Batches | None = None, *, batch_norm: bool = True
) -> fx.GraphModule:
    """A copy whose weights can be trained, computing the same at first.

    Args:
        gm: a rewritten canonical graph.
        batches: inputs, each (N, ...), over which the statistics of the batch norms are taken. None: mean 0, variance 1.
        batch_norm: whether convolutions get batch norms.
    """
    found = copy_graph(gm)
    nodes = _normalized(found) if batch_norm else []
    moments = _moments(found, nodes, batches) if batches is not None else {}
    for node in nodes:
        module = module_of(found, node)
        mean, var = moments.get(
            node.name, (torch.zeros(module.out_channels), torch.ones(module.out_channels))
        )
        name = f"{node.target}{SUFFIX}"
        found.add_submodule(name, _neutral(module, mean, var))
        with found.graph.inserting_after(node):
            new = found.graph.call_module(name, (node,))
        facts.keep(new, node, facts.SHAPE, facts.DTYPE)
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    found.graph.lint()
    found.recompile()
    for parameter in found.parameters():
        parameter.requires_grad_(True)
    return found


def retrained(
    gm: fx.GraphModule, state: Mapping[str, Tensor], scheme: QuantScheme, batches: Batches
) -> Quantized:
    """Quantize a rewritten graph with the trained weights of what `trainable` made of it.

    Args:
        gm: the rewritten graph; not edited.
        state: state dict of the trained network, with batch norms or without.
        scheme: the target.
        batches: calibration inputs.

    Raises:
        RewriteError: the weights are not those of this network.
    """
    net = trainable(gm, batch_norm=any(f"{SUFFIX}." in name for name in state))
    try:
        result = net.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise RewriteError(
            f"weights: of another network: {' '.join(str(error).split())}"
        ) from error
    missing = [k for k in result.missing_keys if not k.endswith("num_batches_tracked")]
    for what, keys in (("lack", missing), ("have unknown", result.unexpected_keys)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise RewriteError(
                f"weights: of another network or plan: they {what} {', '.join(keys[:3])}{more}"
            )
    bad = next((k for k, v in net.state_dict().items() if not bool(v.isfinite().all())), None)
    if bad is not None:
        raise RewriteError(f"weights: {bad}: holds values that are NaN or infinite")
    made, normalized = copy_graph(gm), dict(net.named_modules())
    for node in made.graph.nodes:
        if node.op != "call_module":
            continue
        module = net.get_submodule(str(node.target))
        if f"{node.target}{SUFFIX}" in normalized:
            module = _folded(module, normalized[f"{node.target}{SUFFIX}"])
        made.set_submodule(str(node.target), module.eval())
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    weighed = any(facts.INFLUENCE.known(n) for n in made.graph.nodes)
    for node in made.graph.nodes:  # of the weights before
        facts.INFLUENCE.drop(node)
        facts.WEIGHT_INFLUENCE.drop(node)
    profile(made, batches)
    if weighed:
        weigh(made, batches)
    return repaired(made, scheme, batches)


def _normalized(gm: fx.GraphModule) -> list[fx.Node]:
    """Convolutions of two dimensions that get a batch norm: where the network had one, and where a rule has made them."""
    found: list[fx.Node] = []
    calls = [n for n in gm.graph.nodes if is_call(gm, n, nn.Conv2d, nn.ConvTranspose2d)]
    had_any = any(facts.FOLDED.get(n) for n in calls)
    for node in calls:
        shared = sum(other.target == node.target for other in calls) > 1
        made = had_any and facts.REWRITTEN_BY.known(node)
        if not shared and (facts.FOLDED.get(node) or made):
            found.append(node)
    return found


def _moments(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], batches: Batches
) -> dict[str, tuple[Tensor, Tensor]]:
    """(C,) mean and variance of each convolution's output over all inputs, by node name."""
    sums: dict[str, list[Any]] = {n.name: [0, 0.0, 0.0] for n in nodes}

    def seen(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            y = output.detach().double().transpose(0, 1).flatten(1)
            row = sums[name]
            row[0] += y.shape[1]
            row[1] = row[1] + y.sum(1)
            row[2] = row[2] + y.square().sum(1)

        return hook

    hooks = [module_of(gm, n).register_forward_hook(seen(n.name)) for n in nodes]
    with torch.no_grad():
        for x in batches:
            gm(x)
    for hook in hooks:
        hook.remove()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count
        found[name] = mean.float(), (squares / count - mean.square()).clamp_min(0.0).float()
    return found


def _folded(layer: nn.Module, bn: Any) -> Any:
    """A copy of a convolution that computes bn(layer(x))."""
    scale = bn.weight.detach().double() * (bn.running_var.double() + bn.eps).rsqrt()
    return scaled_outputs(
        layer, scale, bn.bias.detach().double() - bn.running_mean.double() * scale
    )


def _neutral(module: Any, mean: Tensor, var: Tensor) -> nn.BatchNorm2d:
    """A batch norm that changes nothing while it uses these statistics."""
    made = nn.BatchNorm2d(module.out_channels)
    with torch.no_grad():
        made.running_mean.copy_(mean)  # type: ignore[union-attr]
        made.running_var.copy_(var)  # type: ignore[union-attr]
        made.weight.copy_((var + made.eps).sqrt())
        made.bias.copy_(mean)
    return made.eval()
