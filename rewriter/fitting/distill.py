"""Fit one new layer, and the few after it, so that the whole network answers as before.

The closed form makes the layer's values right in the mean square, but the network does not need
all of them equally, and one layer in place of two cannot make all of them right. So the layers
that read what it makes are moved with it: Adam on the mean damage (KL divergence for class scores,
relative squared error for other outputs) against the original network's answers, at a rate that
falls to nothing. A layer's rate is a share of its own weights' size, so that networks of any scale
are fitted alike. The new layer's input and what the fitted layers give are rounded to int8 all the
while (the gradient passes straight through), so that no range grows for little; their weights are
not: rounding those is made good afterwards, by the biases and by the choice of the integers.

What comes before the new layer is computed once for each input, and only what follows it is run
at each step. How many inputs, views and steps there are follows from the network's
multiply-accumulates, not from a clock: the same fit comes out on any machine. The last epoch
counts if it takes away a tenth of the damage on inputs held out; else the best that does; else
the closed form stays.
Source: block-wise distillation, Li et al., 2020 (arXiv:1911.13053); Kingma and Ba, 2015
(arXiv:1412.6980); straight-through gradients, Bengio et al., 2013 (arXiv:1308.3432).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriter.damage.grouping import fidelity_of
from rewriter.graph import facts
from rewriter.graph.cost import layer_macs
from rewriter.graph.interpret import run_node, walk
from rewriter.graph.lookup import is_call, module_of, outputs
from rewriter.graph.ops import LAYER_TYPES
from rewriter.int8.integer_grid import dequantized_weight, fake_quantize
from rewriter.int8.scheme import QuantScheme, channel_axis, weight_scale

log = logging.getLogger(__name__)
Batches = Sequence[Tensor | tuple[Tensor, ...]]

# Multiply-accumulates that the steps of one fit may cost: about a minute of one core.
BUDGET = 6e11
# Inputs that all steps together see at most, and passes over the views that are wanted at least.
SEEN = 2560
EPOCHS = 4
# Each image is seen in this many views at most: as it is, and mirrored or enlarged by up to a half.
VIEWS = 8
# What the kept inputs of the new layer may take, in bytes.
MEMORY = 2**29
# Step of each weight, as a share of the root mean square of its layer's weights.
RATE = 1.2e-3
# Share of the damage on inputs held out that distilling must take away; less could be chance.
LEAST_GAIN = 0.1
# Inputs in one step; every fifth input is held out.
PIECE = 10
HELD = 5


@dataclass
class _Student:
    """The rewritten network from its new layer on."""

    gm: fx.GraphModule
    node: fx.Node
    scheme: QuantScheme
    input_scale: tuple[float, int] | None
    neighbors: Sequence[fx.Node] = ()

    def __post_init__(self) -> None:
        self.moving = {self.node}  # what the fitted layers give, up to the layers that read it
        self.after: set[fx.Node] = {self.node}
        for n in self.gm.graph.nodes:
            if self.after & set(n.all_input_nodes):
                self.after.add(n)
            weighted = is_call(self.gm, n, *LAYER_TYPES)
            if n in self.neighbors or (not weighted and self.moving & set(n.all_input_nodes)):
                self.moving.add(n)
        ends = outputs(self.gm)
        reads = {r for n in self.after if n.op != "output" for r in n.all_input_nodes}
        self.border = (reads | set(ends)) - self.after

    @property
    def layer(self) -> nn.Module:
        return module_of(self.gm, self.node)

    def before(self, inputs: tuple[Tensor, ...]) -> dict[fx.Node, Any]:
        """What the new layer and the nodes after it read."""
        with torch.no_grad():
            return {n: v for n, v in walk(self.gm, inputs) if n in self.border}

    def run(self, known: dict[fx.Node, Any]) -> list[Tensor]:
        """The answers."""
        values = dict(known)
        for node in self.gm.graph.nodes:
            if node is self.node:
                source = node.args[0]
                assert isinstance(source, fx.Node)
                values[node] = self.layer(self._input(values[source]))
            elif node in self.after and node.op != "output":
                read = values
                rounds = self.input_scale is not None and node.args[0] in self.moving
                if rounds and is_call(self.gm, node, *LAYER_TYPES):
                    read = {n: self._as_read(values[n]) for n in node.all_input_nodes}
                values[node] = run_node(self.gm, node, read)
        return [values[n] for n in outputs(self.gm)]

    def _input(self, x: Tensor) -> Tensor:
        if self.input_scale is None:
            return x
        return fake_quantize(x, *self.input_scale, self.scheme.activations)

    def _as_read(self, x: Tensor) -> Tensor:
        """A value rounded in its own range, with the gradient as if it were not."""
        exact, spec = x.detach(), self.scheme.activations
        ends = spec.params(float(exact.min()), float(exact.max()))
        return x + (fake_quantize(exact, *ends, spec) - exact)

    def macs(self) -> int:
        """Multiply-accumulates from the new layer on, for one input."""
        names = {n.name for n in self.after}
        return sum(m for name, m in layer_macs(self.gm).items() if name in names)

    def numbers(self) -> int:
        """Size of what is kept of one input."""
        shapes = [facts.SHAPE.get(n) for n in self.border if n.op != "get_attr"]
        return sum(math.prod(s) for s in shapes if isinstance(s, tuple))


def rounded_weight(layer: nn.Conv2d, scheme: QuantScheme) -> Tensor:
    """The layer's weight as int8 holds it."""
    weight, spec = layer.weight.detach(), scheme.weights
    axis = channel_axis(layer, spec)
    return dequantized_weight(weight, weight_scale(weight, spec, axis), spec, axis)


@dataclass(frozen=True)
class _Amounts:
    """How much of everything one fit takes."""

    images: int
    views: int
    epochs: int


def amounts(images: int, macs: int, numbers: int, share: float = 1.0) -> _Amounts:
    """What is affordable.

    Args:
        images: inputs at hand.
        macs: of one input from the new layer on.
        numbers: that are kept of one view of one input.
        share: of what one fit takes at most.
    """
    # forwards, and the gradient back through the same layers twice
    seen = max(1, int(share * min(SEEN, BUDGET / (3 * max(1, macs)))))
    kept = MEMORY // (4 * max(1, numbers))
    images = max(min(images, seen, kept), min(images, 2 * PIECE))
    used = max(1, images - images // HELD)
    views = max(1, min(VIEWS, seen // (EPOCHS * used), kept // used))
    return _Amounts(images, views, max(1, round(seen / (used * views))))


def distill(
    teacher: fx.GraphModule,
    rewritten: fx.GraphModule,
    node: fx.Node,
    batches: Batches,
    scheme: QuantScheme,
    input_scale: tuple[float, int] | None,
    neighbors: Sequence[fx.Node] = (),
    seed: int = 0,
    share: float = 1.0,
) -> int:
    """Improve the weights of the new layer ``node`` of ``rewritten`` and of its neighbors, in place.

    Args:
        teacher: the original network.
        rewritten: the same with the new layer, whose weights are the closed form's.
        node: the new layer.
        batches: unlabelled inputs; every fifth is held out.
        scheme: how the new layer's weights and input are rounded.
        input_scale: scale and zero point of the new layer's input; None: nothing is rounded, for what later steps scale
            or split, whose ranges are not those of now.
        neighbors: layers after it that are moved with it.
        seed: of the views and of the order of the inputs.
        share: of the steps that a whole new layer takes.

    Returns:
        The number of steps that were kept.
    """
    student = _Student(rewritten, node, scheme, input_scale, neighbors)
    inputs = _joined(batches)
    amount = amounts(len(inputs[0]), student.macs(), student.numbers(), share)
    chosen = range(amount.images)
    held = [i for i in chosen if i % HELD == 0]
    used = [i for i in chosen if i % HELD] or held
    generator = torch.Generator().manual_seed(seed)
    data = _seen(teacher, student, inputs, used, amount.views, generator)
    judges = _seen(teacher, student, inputs, held, 1, generator)  # as they are: views are easier
    answers = [a for _, a in (*data, *judges)]
    if not all(a.is_floating_point() for a in answers[0]):
        return 0
    damage = fidelity_of(teacher, batches).damage
    groups = list(_groups([module_of(rewritten, n) for n in (node, *neighbors)]))
    weights: list[Tensor] = [w for g in groups for w in g["params"]]
    optimizer = torch.optim.Adam(groups)
    total = amount.epochs * len(data)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    best, least, kept = [w.detach().clone() for w in weights], _mean(student, damage, judges), 0
    first = least
    log.info("%s: %d steps of %d inputs", node.name, total, PIECE)
    for w in weights:
        w.requires_grad_(True)
    for epoch in range(amount.epochs):
        for i in torch.randperm(len(data), generator=generator, device="cpu").tolist():
            known, reference = data[i]
            optimizer.zero_grad()
            damage(student.run(known), reference).mean().backward()
            optimizer.step()
            falling.step()
        found = _mean(student, damage, judges)
        log.info(
            "%s: %d of %d steps: held-out damage %.4g (%.4g before)",
            node.name,
            (epoch + 1) * len(data),
            total,
            found,
            first,
        )
        last = (
            epoch == amount.epochs - 1
        )  # where the rate has fallen to nothing; others are chosen by chance
        if found < (1 - LEAST_GAIN) * first and (last or found < least):
            best, least = [w.detach().clone() for w in weights], found
            kept = (epoch + 1) * len(data)
    for w, value in zip(weights, best, strict=True):
        w.requires_grad_(False).copy_(value)
        w.grad = None
    return kept


def _groups(layers: Sequence[nn.Module]) -> Iterator[dict[str, Any]]:
    """The weights of each layer with their rate."""
    for layer in layers:
        found = [p for p in (layer.weight, layer.bias) if isinstance(p, nn.Parameter)]
        size = float(found[0].detach().square().mean().sqrt())
        yield {"params": found, "lr": RATE * size}


def _joined(batches: Batches) -> tuple[Tensor, ...]:
    parts = [b if isinstance(b, tuple) else (b,) for b in batches]
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


_Seen = list[tuple[dict[fx.Node, Any], list[Tensor]]]


def _seen(
    teacher: fx.GraphModule,
    student: _Student,
    inputs: tuple[Tensor, ...],
    rows: list[int],
    views: int,
    generator: torch.Generator,
) -> _Seen:
    """Views of some inputs, a few at a time: what the new layer on reads, and the teacher's answers."""
    found: _Seen = []
    for view in range(views):
        order = torch.randperm(len(rows), generator=generator, device="cpu").tolist()
        for start in range(0, len(rows), PIECE):
            some = [rows[i] for i in order[start : start + PIECE]]
            piece = tuple(x[some] for x in inputs)
            if view:
                images = [random_view(x[None], view % 2 == 1, generator) for x in piece[0]]
                piece = (torch.cat(images), *piece[1:])
            with torch.no_grad():
                ends = outputs(teacher)
                values = {n: v for n, v in walk(teacher, piece) if n in ends}
            found.append((student.before(piece), [values[n] for n in ends]))
    return found


def _mean(student: _Student, damage: Callable[..., Tensor], data: _Seen) -> float:
    with torch.no_grad():
        parts = [damage(student.run(known), reference) for known, reference in data]
    return float(torch.cat(parts).mean())


def random_view(x: Tensor, mirror: bool, generator: torch.Generator) -> Tensor:
    """(N, C, H, W) mirrored, and the same random window of each enlarged to the old size.

    Sequences (N, T, C, H, W) are seen so too, with one window for all frames.
    """
    if x.ndim == 5:
        return random_view(x.flatten(0, 1), mirror, generator).view_as(x)
    if x.ndim != 4 or min(x.shape[2:]) < 16:
        return x
    size = tuple(x.shape[2:])
    share = 2 / 3 + float(torch.rand((), generator=generator, device="cpu")) / 3
    height, width = (max(1, round(s * share)) for s in size)
    top = int(torch.randint(size[0] - height + 1, (), generator=generator, device="cpu"))
    left = int(torch.randint(size[1] - width + 1, (), generator=generator, device="cpu"))
    window = x[:, :, top : top + height, left : left + width]
    window = window.flip(3) if mirror else window
    return F.interpolate(window, size, mode="bilinear", align_corners=False)
