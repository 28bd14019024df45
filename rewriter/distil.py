"""Fit one new layer so that the whole network answers as before: natural-gradient steps.

The closed form makes the layer's values right in the mean square, but the network does not need
all of them equally. With w the layer's weights, D the mean damage (KL divergence for class scores,
relative squared error for other outputs), J the derivatives of random projections of the answers,
one row for each input and draw (so that J'J is the Gauss-Newton matrix of D), and A = x'x / n of
the closed form, a step of a few inputs solves

    (J'J + mu A) d = -(grad D + mu A (w - w_closed))        w <- w + rate d

through the rows of J (Woodbury), so that a layer of any size costs one n x n solution. The
weights' mean over an epoch counts, and the epoch with the least damage on inputs held out wins;
the closed form stays where none is better. The layer's input is rounded to
int8 all the while. Its weights are rounded when damage is measured; the gradient is taken once at
the rounded weights (straight through; better where one scale serves the whole layer) and once
at the float ones (better where rounding is fine), and the better result is kept.
Source: Amari, 1998 (doi:10.1162/089976698300017746); Schraudolph, 2002
(doi:10.1162/08997660260028683); Polyak and Juditsky, 1992.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriter.fidelity import (
    OutputGroups,
    is_class_output,
    kl_divergence,
    output_groups,
    relative_error,
)
from rewriter.graph import module_of, outputs, run_node
from rewriter.int8.scheme import (
    QuantScheme,
    channel_axis,
    dequantized_weight,
    fake_quantize,
    weight_scale,
)
from rewriter.least_squares import NormalEquations, unfold

log = logging.getLogger(__name__)
Batches = Sequence[Tensor | tuple[Tensor, ...]]

EPOCHS = 3
RATE = 0.3
ROWS = 400
# The rows of J are kept in this many numbers at most.
NUMBERS = 4e7
DAMPING = 10.0
# Inputs in one backward pass.
PIECE = 10
# Each image is seen as it is, and in this many views in all: mirrored and enlarged by up to a
# half.
VIEWS = 4


@dataclass
class _Student:
    """The rewritten network around its new layer."""

    gm: fx.GraphModule
    node: fx.Node
    scheme: QuantScheme
    input_scale: tuple[float, int]
    rounded: bool = True

    @property
    def layer(self) -> nn.Conv2d:
        layer = module_of(self.gm, self.node)
        assert isinstance(layer, nn.Conv2d)
        return layer

    def run(
        self, inputs: tuple[Tensor, ...], differentiate: bool
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The answers, the layer's input as it reads it, and its output."""
        values: dict[fx.Node, Any] = {}
        feed = iter(inputs)
        x = z = torch.empty(0)
        with torch.set_grad_enabled(differentiate):
            for node in self.gm.graph.nodes:
                if node is self.node:
                    source = node.args[0]
                    assert isinstance(source, fx.Node)
                    with torch.no_grad():
                        x = fake_quantize(
                            values[source], *self.input_scale, self.scheme.activations
                        )
                        weight = self.layer.weight
                        if self.rounded:
                            weight = rounded_weight(self.layer, self.scheme)
                        z = torch.func.functional_call(self.layer, {"weight": weight}, (x,))
                    z.requires_grad_(differentiate)
                    values[node] = z
                elif node.op != "output":
                    values[node] = run_node(self.gm, node, values, feed)
        return [values[n] for n in outputs(self.gm)], x, z

    def gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """(N, groups, K, O / groups) derivative of each score by the weights, the bias last."""
        groups = self.layer.groups
        patches = unfold(self.layer, x).unflatten(1, (groups, -1))
        patches = F.pad(patches, (0, 0, 0, 1), value=1.0)
        return patches @ g.flatten(2).unflatten(1, (groups, -1)).mT


def rounded_weight(layer: nn.Conv2d, scheme: QuantScheme) -> Tensor:
    """The layer's weight as int8 holds it."""
    weight, spec = layer.weight.detach(), scheme.weights
    axis = channel_axis(layer, spec)
    return dequantized_weight(weight, weight_scale(weight, spec, axis), spec, axis)


class _Damage:
    """Damage of answers against the teacher's, the same measure for every part of the data."""

    def __init__(self, reference: list[Tensor], kind: str | None = None) -> None:
        self.classes = is_class_output(reference, kind)
        self.groups: list[OutputGroups] = (
            [] if self.classes else [output_groups(r) for r in reference]
        )

    def __call__(self, answers: list[Tensor], reference: list[Tensor]) -> Tensor:
        """(N,) damage of each input."""
        if self.classes:
            return kl_divergence(answers[0], reference[0])
        return relative_error(answers, reference, self.groups)

    def score(
        self, answers: list[Tensor], reference: list[Tensor], generator: torch.Generator
    ) -> Tensor:
        """A number whose gradient's second moment is the Gauss-Newton matrix of the damage."""
        if self.classes:
            log_p = answers[0].log_softmax(1)
            p = log_p.detach().exp().cpu()  # where the generator is
            drawn = torch.multinomial(p, 1, generator=generator)
            return log_p.gather(1, drawn.to(log_p.device)).sum()
        with torch.enable_grad():
            moved = [(r + 1).requires_grad_() for r in reference]  # the damage is sum w (a - r)^2
            twice = torch.autograd.grad(self(moved, reference).sum(), moved)
        total = answers[0].new_zeros(())
        for answer, weight in zip(answers, twice, strict=True):
            drawn = torch.randint(0, 2, answer.shape, generator=generator, device="cpu")
            signs = drawn.to(answer) * 2 - 1
            total = total + (answer * signs * weight.sqrt()).sum()
        return total


def distil(
    teacher: fx.GraphModule,
    rewritten: fx.GraphModule,
    node: fx.Node,
    equations: NormalEquations,
    batches: Batches,
    scheme: QuantScheme,
    input_scale: tuple[float, int],
    seed: int = 0,
) -> int:
    """Improve the weights of the new layer ``node`` of ``rewritten``, in place.

    Args:
        teacher: the original network.
        rewritten: the same with the new layer, whose weights are the closed form's.
        node: the new layer.
        equations: those of the closed form.
        batches: unlabelled inputs; every fifth is held out.
        scheme: how the weights and the input are rounded.
        input_scale: scale and zero point of the layer's input.
        seed: of the projections.

    Returns:
        The number of steps that were kept.
    """
    student = _Student(rewritten, node, scheme, input_scale)
    pieces = list(_views(_pieces(batches), seed))
    with torch.no_grad():
        answers = [_answers(teacher, p) for p in pieces]
    if not all(a.is_floating_point() for a in answers[0]):
        return 0
    damage = _Damage([torch.cat(a) for a in zip(*answers, strict=True)], teacher.meta.get("kind"))
    data = list(zip(pieces, answers, strict=True))
    # all views of an input are on the same side
    held = [d for i, d in enumerate(data) if i // VIEWS % 5 == 0]
    used = [d for i, d in enumerate(data) if i // VIEWS % 5] or held
    solver = _Solver(student, equations, damage, used, seed)
    closed = equations.weights()
    best, least, kept = closed, _mean_damage(student, damage, held), 0
    first = least
    for rounded in (True, False):
        weights, done = closed, 0
        for epoch in range(EPOCHS):
            mean = torch.zeros_like(weights)
            student.rounded = rounded
            for piece in used:
                rate = RATE * (1 - done / (EPOCHS * len(used)))
                equations.set_weights(weights)
                gradient = _gradient(student, damage, [piece])
                weights = weights + rate * solver.step(gradient, weights, DAMPING)
                mean += weights / len(used)
                done += 1
            student.rounded = True
            equations.set_weights(mean)  # over an epoch the noise of single pieces cancels
            found = _mean_damage(student, damage, held)
            log.debug("%s: epoch %d: held-out damage %.4g", node.name, epoch, found)
            if found < least:
                best, least, kept = mean, found, done
    equations.set_weights(best)
    log.info("%s: held-out damage %.4g -> %.4g in %d steps", node.name, first, least, kept)
    return kept


class _Solver:
    """J and A of a layer, and steps from them."""

    def __init__(
        self,
        student: _Student,
        equations: NormalEquations,
        damage: _Damage,
        data: list[tuple[tuple[Tensor, ...], list[Tensor]]],
        seed: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = equations.xy.numel()
        images = sum(len(inputs[0]) for inputs, _ in data)
        rows = max(images, min(ROWS, int(NUMBERS / size)))
        draws = max(1, rows // images)
        found: list[Tensor] = []
        for inputs, reference in data:
            answers, x, z = student.run(inputs, differentiate=True)
            for draw in range(draws):
                score = damage.score(answers, reference, generator)
                (g,) = torch.autograd.grad(score, z, retain_graph=draw < draws - 1)
                each = student.gradients(x, g)
                # an input may be a sequence, whose frames are so many rows of the layer's input
                found.append(each.unflatten(0, (len(inputs[0]), -1)).sum(1))
        rows_of = torch.cat(found).double() / (images * draws) ** 0.5  # (n, groups, K, O / groups)
        total = equations.xx[:, -1:, -1:].clamp_min(1.0)
        a = equations.xx / total
        ridge = a.diagonal(dim1=1, dim2=2).mean(1) * 1e-6
        a = a + ridge[:, None, None] * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        self.factor = torch.linalg.cholesky(a)  # (groups, K, K)
        self.closed = equations.weights()
        self.white = self._whiten(rows_of)  # J L^-T
        self.gram = self.white.flatten(1) @ self.white.flatten(1).mT  # (n, n)
        # mu = 1: both terms have the same mean eigenvalue in the whitened space
        self.unit = float(self.gram.trace()) / self.white[0].numel()

    def _whiten(self, v: Tensor) -> Tensor:
        """L^-1 v along K; v is (..., groups, K, O / groups)."""
        return torch.linalg.solve_triangular(self.factor, v, upper=False)

    def step(self, gradient: Tensor, weights: Tensor, damping: float) -> Tensor:
        """The change of the weights (groups, K, O / groups) at this damping."""
        mu = damping * self.unit
        pull = self.factor.mT @ (weights - self.closed)  # in the whitened space A is the identity
        b = -(self._whiten(gradient) + mu * pull)
        n = len(self.gram)
        eye = torch.eye(n, dtype=self.gram.dtype, device=self.gram.device)
        inner = self.gram + mu * eye
        rows = self.white.flatten(1)
        solved = torch.linalg.solve(inner, rows @ b.flatten())
        d = (b.flatten() - rows.mT @ solved) / mu
        return torch.linalg.solve_triangular(self.factor.mT, d.view_as(b), upper=True)


def _gradient(
    student: _Student, damage: _Damage, data: list[tuple[tuple[Tensor, ...], list[Tensor]]]
) -> Tensor:
    """(groups, K, O / groups) gradient of the mean damage."""
    total: Tensor | None = None
    images = 0
    for inputs, reference in data:
        answers, x, z = student.run(inputs, differentiate=True)
        (g,) = torch.autograd.grad(damage(answers, reference).sum(), z)
        part = student.gradients(x, g).double().sum(0)
        total = part if total is None else total + part
        images += len(inputs[0])
    assert total is not None
    return total / images


def _mean_damage(
    student: _Student, damage: _Damage, data: list[tuple[tuple[Tensor, ...], list[Tensor]]]
) -> float:
    total, images = 0.0, 0
    for inputs, reference in data:
        answers, _, _ = student.run(inputs, differentiate=False)
        total += float(damage(answers, reference).sum())
        images += len(inputs[0])
    return total / images


def _answers(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    values: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    for node in gm.graph.nodes:
        if node.op != "output":
            values[node] = run_node(gm, node, values, feed)
    return [values[n] for n in outputs(gm)]


def _views(pieces: Iterator[tuple[Tensor, ...]], seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Every piece ``VIEWS`` times: as it is, then (if of images) mirrored and cut out."""
    generator = torch.Generator().manual_seed(seed)
    for inputs in pieces:
        yield inputs
        for view in range(1, VIEWS):
            yield (random_view(inputs[0], view % 2 == 1, generator), *inputs[1:])


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


def _pieces(batches: Batches) -> Iterator[tuple[Tensor, ...]]:
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        yield from zip(*(x.split(PIECE) for x in inputs), strict=True)
