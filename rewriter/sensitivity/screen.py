"""Every layer's damage from one pass forwards and one or two backwards.

Rounding changes a layer's result by d_l (N, ...), and what reaches the outputs is J_l d_l to first
order. The float network is the minimum of the damage, which is therefore quadratic there: with r a
random direction in output space, E[r r^T] = H / 2 (``Fidelity.probe``),

    damage_l = E[(r^T J_l d_l)^2] = E[(g_l . d_l)^2]        g_l = d (r . outputs) / d z_l

and one backward pass gives g_l for all layers and all samples at once, since samples do not depend
on each other. d_l has two parts, both found in passing: the layer on its rounded weight, and, by
linearity, the gradient at the layer's input times the rounding error of the value it reads. What
is kept are the projections p = g . d, one number for each part, sample and direction: sums of them
price any combination, E[(sum of p)^2], interactions to second order included, and nothing is run
again for it.

Sources: Gauss-Newton / Fisher damage: LeCun et al., 1990 (Optimal Brain Damage); Dong et al., 2019
(HAWQ, arXiv:1905.03696) for its use in quantization. Random projections instead of sampled labels
bound the variance: a sampled label is almost always the likely one, whose gradient is almost
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.damage.fidelity import Fidelity
from rewriter.graph.interpret import device_of, last_uses
from rewriter.graph.lookup import outputs
from rewriter.graph.ops import clip_bounds
from rewriter.int8.annotate import annotation
from rewriter.int8.integer_grid import round_to_int8
from rewriter.int8.scheme import QuantSpec
from rewriter.int8.simulate import Quantized
from rewriter.sensitivity.error_terms import Edge, Parts, parts_of
from rewriter.sensitivity.inner_products import (
    clipped,
    dot,
    rounding_dot,
    weight_dot,
)
from rewriter.sensitivity.ranking_confidence import reliability, sample_weights
from rewriter.sensitivity.shared_prefix import (
    compute,
    may_overwrite,
    modules_of,
    rounded_bias,
    rounded_weight,
    value_params,
)

# Numbers of rounded weights that are kept for the next batch; larger networks round them again.
KEPT_CHANGES = 8 << 20
# What a projection is of: (layer,) its weight, (reader, value) an edge, ("candidate", name, "") a
# rewrite.
Key = tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A rewrite to be priced by its local error alone.

    Args:
        name: what to call the price, such as a step's text.
        reads: name of the value that goes in; it comes in float.
        makes: name of the value that it replaces.
        run: what makes it instead, int8 rounding included: (N, ...) -> (N, ...).
        takes: layers whose own damage it takes the place of, by node name.
    """

    name: str
    reads: str
    makes: str
    run: Callable[[Tensor], Tensor]
    takes: tuple[str, ...] = ()


@dataclass
class Screening:
    """Projections (N, k) of every part of the int8 error: N samples, k random directions.

    Args:
        weights: by layer node name, of the rounded weight and bias.
        edges: by (reader, value) node names, of the value as this reader sees it rounded.
        candidates: by name, of the local error of a rewrite.
        parts: which of them belong to which layer and value.
    """

    parts: Parts
    weights: dict[str, Tensor] = field(default_factory=dict)
    edges: dict[Edge, Tensor] = field(default_factory=dict)
    candidates: dict[str, Tensor] = field(default_factory=dict)
    _counts: Tensor | None = None

    @property
    def samples(self) -> int:
        """On how many samples the projections are."""
        return len(next(iter(self.weights.values()))) if self.weights else 0

    def damage(self, projections: Tensor) -> float:
        """The damage that (N, k) projections estimate, with samples weighted as by ``steady``."""
        return float(self._weighted(projections).mean())

    def error(self, projections: Tensor) -> float:
        """Standard error of that damage over samples, infinite for one sample."""
        damages = self._weighted(projections)
        return float(damages.std()) / len(damages) ** 0.5 if len(damages) > 1 else float("inf")

    def _weighted(self, projections: Tensor) -> Tensor:
        damages = projections.double().square().mean(1)
        if len(damages) != self.samples:  # of nothing at all
            return damages
        if self._counts is None:
            self._counts = sample_weights(self._damages())
        return damages * self._counts

    def reliability(self) -> float:
        """Expected rank correlation of the order of layers with that by endless samples."""
        damages = self._damages()
        return reliability(damages * sample_weights(damages))

    def _damages(self) -> Tensor:
        """(L, N) damage of each layer on each sample, estimated."""
        return torch.stack([self.layer(n).double().square().mean(1) for n in self.parts.inputs])

    def layer(self, name: str) -> Tensor:
        """(N, k) projections of one layer's whole error: weight, input and, for a head, output."""
        parts = [self.weights[name]] if name in self.weights else []
        parts += [self.edges[e] for e in (*self.parts.inputs[name], *self.parts.returned[name])]
        return torch.stack(parts).sum(0)

    def layer_damage(self) -> dict[str, float]:
        """Damage of quantizing each layer alone, by node name."""
        return {name: self.damage(self.layer(name)) for name in self.parts.inputs}

    def value_damage(self) -> dict[str, float]:
        """Damage of rounding each value alone, for all that read it, by node name."""
        return {
            name: self.damage(torch.stack([self.edges[e] for e in edges]).sum(0))
            for name, edges in self.parts.values.items()
        }

    def weight_damage(self) -> dict[str, float]:
        """Damage of rounding each layer's weight alone, by node name."""
        return {name: self.damage(p) for name, p in self.weights.items()}

    def predict(self, kept: Iterable[str] = ()) -> float:
        """Damage of the network in int8 with these layers (by node name) in float, predicted."""
        return self.damage(self._remaining(kept))

    def price(self, candidate: Candidate) -> float:
        """What a rewrite is predicted to take away from the whole damage; negative if it adds."""
        return self.predict() - self.damage(
            self._remaining(candidate.takes) + self.candidates[candidate.name]
        )

    def _remaining(self, kept: Iterable[str]) -> Tensor:
        """(N, k) projections of all error but that of some layers."""
        gone = set(kept)
        free = {e for n in gone for e in (*self.parts.inputs[n], *self.parts.returned[n])}
        total = torch.zeros(1, 1, dtype=torch.float64)
        for name, p in self.weights.items():
            total = total if name in gone else total + p
        for edge, p in self.edges.items():
            total = total if edge in free else total + p
        return total

    def candidate_damage(self) -> dict[str, float]:
        """Damage of each candidate's own local error."""
        return {name: self.damage(p) for name, p in self.candidates.items()}

    def extend(self, part: Mapping[str, Any]) -> None:
        """Append the samples of one batch, as ``screen_batch`` gave them."""
        for kind in ("weights", "edges", "candidates"):
            mine = getattr(self, kind)
            for name, rows in part[kind].items():
                key = tuple(name.split(" ")) if kind == "edges" else name
                p = torch.tensor(rows, dtype=torch.float64)
                mine[key] = torch.cat([mine[key], p]) if key in mine else p
        self._counts = None


class Screener:
    """Screens one quantized graph batch by batch.

    Args:
        quantized: annotated and calibrated graph; it is not changed.
        fidelity: the damage.
        candidates: rewrites to be priced along the way.
        directions: random directions for each sample; each costs a backward pass.
    """

    def __init__(
        self,
        quantized: Quantized,
        fidelity: Fidelity,
        candidates: Sequence[Candidate] = (),
        directions: int = 1,
    ) -> None:
        self.quantized, self.fidelity, self.gm = quantized, fidelity, quantized.gm
        self.directions, self.parts = directions, parts_of(self.gm)
        self.modules, self.returned = modules_of(self.gm), outputs(self.gm)
        self.nodes = [n for n in self.gm.graph.nodes if n.op != "output"]
        by_name = {n.name: n for n in self.gm.graph.nodes}
        self.rounded = {
            by_name[reader]: [by_name[v] for v in some]
            for reader, some in self.parts.rounded.items()
        }
        self.params = {
            v: value_params(quantized, v) for some in self.rounded.values() for v in some
        }
        self.dying = last_uses(self.gm)
        self.candidates: dict[str, list[Candidate]] = {}
        for c in candidates:
            self.candidates.setdefault(c.makes, []).append(c)
        self.wanted = {c.reads for c in candidates}
        self.clipping = {
            n: bounds
            for n in self.nodes
            if may_overwrite(self.gm, n)
            and not {n.name, n.all_input_nodes[0].name} & {*self.wanted, *self.candidates}
            and (bounds := clip_bounds(self.modules[n]))
        }
        self.device = device_of(self.gm)
        self.changes: dict[fx.Node, tuple[Tensor, Tensor | None]] = {}
        self.room = KEPT_CHANGES

    def batch(self, inputs: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """Projections of every part of the int8 error on one batch (N, ...), as plain JSON values.

        Returns:
            "weights" by layer, "edges" by "reader value", "candidates" by name, each
            (N, directions).
        """
        found: dict[Key, list[Tensor]] = {}
        now: dict[Key, Tensor] = {}
        flat, roots = self._forward(inputs.to(self.device), now)
        plain = [o.detach() for o in flat]
        for k in range(self.directions):
            direction = self.fidelity.probe(plain, generator)
            now.update(self._at_outputs(plain, direction))
            scalar = self.fidelity.scalar(flat, direction)
            more = k + 1 < self.directions
            torch.autograd.grad(scalar, roots, retain_graph=more, allow_unused=True)
            for key, p in now.items():
                found.setdefault(key, []).append(p)
            now.clear()
        return self._rows(found, len(inputs))

    def _forward(
        self, inputs: Tensor, now: dict[Key, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Flat outputs and the inputs to differentiate by; hooks put the products into ``now``."""
        values: dict[fx.Node, Any] = {}
        kept: dict[str, Tensor] = {}
        roots: list[Tensor] = []
        hang = _Hooks(self, now, len(inputs))
        feed = iter([inputs])
        with torch.enable_grad():
            for node in self.nodes:
                seen = {n: values[n] for n in node.all_input_nodes}
                for n in self.rounded.get(node, ()):
                    if seen[n].requires_grad:
                        # a view for each reader, so that its gradient is this reader's alone
                        seen[n] = seen[n].view_as(seen[n]) if len(n.users) > 1 else seen[n]
                        hang.rounding((node.name, n.name), seen[n], self.params[n])
                value = self._value(node, seen, feed)
                if node.op == "placeholder" and value.is_floating_point():
                    value = value.detach().requires_grad_()
                    roots.append(value)
                if node.name in self.parts.inputs:
                    if (
                        not value.requires_grad
                    ):  # a layer of constants, such as a code of positions
                        value = value.detach().requires_grad_()
                        roots.append(value)
                    x = seen[node.all_input_nodes[0]].detach()
                    hang.weight(node, self.modules[node], x, value)
                if node.name in self.wanted:
                    kept[node.name] = value.detach()
                for c in self.candidates.get(node.name, ()):
                    hang.candidate(c, kept[c.reads], value)
                values[node] = value
                for used in self.dying.get(node, ()):
                    del values[used]
        return [values[n] for n in self.returned], roots

    def _value(self, node: fx.Node, seen: dict[fx.Node, Any], feed: Iterator[Tensor]) -> Any:
        if node in self.clipping:
            x = seen[node.all_input_nodes[0]]
            if not x.is_leaf and x._base is None:  # torch allows no change of these
                return clipped(x, *self.clipping[node])
        return compute(self.gm, self.modules, node, seen, feed)

    def change(self, node: fx.Node) -> tuple[Tensor, Tensor | None]:
        """What rounding adds to the weight and the bias of a layer."""
        if node in self.changes:
            return self.changes[node]
        layer: Any = self.modules[node]
        source = node.all_input_nodes[0]
        weight = rounded_weight(self.quantized, node) - layer.weight.detach()
        bias = None
        if source.name in annotation(node).reads:
            bias = rounded_bias(self.quantized, node, self.quantized.value_params(source)[0])
        bias = None if bias is None else bias - layer.bias.detach()
        if self.room >= weight.numel():
            self.room -= weight.numel()
            self.changes[node] = weight, bias
        return weight, bias

    def _at_outputs(self, plain: list[Tensor], direction: list[Tensor]) -> dict[Key, Tensor]:
        """The rounding of what the graph returns."""
        (output,) = self.gm.graph.find_nodes(op="output")
        found: dict[Key, Tensor] = {}
        for node in self.rounded.get(output, ()):
            change = [torch.zeros_like(o) for o in plain]
            for i, returned in enumerate(self.returned):
                if returned is node:
                    change[i] = round_to_int8(plain[i], *self.params[node]) - plain[i]
            found[output.name, node.name] = self.fidelity.project(change, direction)
        return found

    def _rows(self, found: dict[Key, list[Tensor]], samples: int) -> dict[str, Any]:
        zero = [[0.0] * self.directions for _ in range(samples)]

        def rows(key: Key) -> list[list[float]]:
            # what no output depends on does no damage
            return torch.stack(found[key], 1).tolist() if key in found else zero

        edges = {e for some in self.parts.values.values() for e in some}
        edges |= {e for some in self.parts.inputs.values() for e in some}
        return {
            "weights": {name: rows((name,)) for name in self.parts.inputs},
            "edges": {" ".join(e): rows(e) for e in sorted(edges)},
            "candidates": {
                c.name: rows(("candidate", c.name, ""))
                for some in self.candidates.values()
                for c in some
            },
        }


class _Hooks:
    """Hangs the wanted products on the backward pass of one batch; they go into ``now``."""

    def __init__(self, screener: Screener, now: dict[Key, Tensor], samples: int) -> None:
        self.screener, self.now, self.samples = screener, now, samples

    def rounding(self, edge: Edge, x: Tensor, params: tuple[float, int, QuantSpec]) -> None:
        """The rounding error of a value."""
        plain = x.detach()

        def hook(gradient: Tensor) -> None:
            self.now[edge] = rounding_dot(gradient, plain, params, self.samples)

        x.register_hook(hook)

    def weight(self, node: fx.Node, layer: Any, x: Tensor, z: Tensor) -> None:
        """The rounding error of weight and bias acts like a layer of its own."""

        def hook(gradient: Tensor) -> None:
            change = self.screener.change(node)
            self.now[node.name,] = weight_dot(gradient, x, layer, *change, self.samples)

        z.register_hook(hook)

    def candidate(self, candidate: Candidate, x: Tensor, z: Tensor) -> None:
        """The local error of a rewrite."""
        plain = z.detach()

        def hook(gradient: Tensor) -> None:
            with torch.no_grad():
                error = candidate.run(x) - plain
            self.now["candidate", candidate.name, ""] = dot(gradient, error, self.samples)

        z.register_hook(hook)
