"""How far a network is from its float original, without labels: the one definition of damage.

What the damage of one input is follows from what the outputs mean (``rewriter.damage.meaning``). Each output is divided
into groups of channels that mean one thing, and the damage is the mean over all groups of

    logits, probabilities    KL(float || int8) of the class distributions, in nats, mean over positions
    values                   squared error / mean square of the float network's values
    sigmoid, sigmoid_logits  the same of the scores in 0..1, whichever side of the sigmoid the output is on
    coordinates              squared error / variance of each number about its own mean over inputs: the unit, the
                             origin and the order of the numbers do not matter
    embeddings               1 - cosine, mean over positions
    numbers of a class       share of those that differ (integer outputs)

Groups and sizes are found once, from the float network on the calibration inputs. After that the damage of an input depends on
that input alone, so that it is the same whichever inputs come beside it, and a mean over inputs is a mean over batches.

Near the float network the damage is quadratic; ``probe`` draws r with E[r r^T] = half its Hessian, so that E[(r . change)^2] is the
damage of a small change of the outputs. Source: Hutchinson, 1990 (doi:10.1080/03610919008812866) for the random
projections; Martens, 2014 (arXiv:1412.1193) for the Fisher matrix as the curvature of the divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.damage.meaning import Kind
from rewriter.storage.digest import key

TINY = 1e-30
SMALLEST = 1e-12  # probability whose logarithm is taken
_DISTRIBUTIONS = ("logits", "probabilities")


@dataclass(frozen=True)
class Group:
    """Channels of one output that count as one.

    Args:
        output: number of the flat output.
        kind: what they mean; ``labels`` for integers.
        axis: of the channels in (N, ...); 0: there is none.
        channels: which of them; none: all.
        size: what squared errors are divided by.
    """

    output: int
    kind: Kind | str
    axis: int = 0
    channels: tuple[int, ...] = ()
    size: float = 1.0

    def take(self, x: Tensor) -> Tensor:
        """The group's own numbers of an output."""
        if not self.channels:
            return x
        first, count = self.channels[0], len(self.channels)
        if self.channels[-1] - first + 1 == count:
            return x.narrow(self.axis, first, count)
        return x.index_select(self.axis, self._index(x))

    def put(self, x: Tensor, part: Tensor) -> Tensor:
        """Edit ``x``: set the group's own numbers."""
        return x.index_copy_(self.axis, self._index(x), part) if self.channels else x.copy_(part)

    def _index(self, x: Tensor) -> Tensor:
        return torch.tensor(self.channels, device=x.device)

    def rows(self, x: Tensor) -> Tensor:
        """(N, C) or (N, C, positions) float64 of the group's own numbers."""
        part = self.take(x).double()
        return part.movedim(self.axis, 1).flatten(2) if x.ndim > 2 else part


@dataclass(frozen=True)
class Fidelity:
    """The damage of one network's outputs. It never changes once it is made.

    Args:
        groups: all that is judged.
        about: for each flat output, in words, what it is taken for.
        assumed: whether some of it was assumed and not told.
        ranks: whether the task sorts scores, as average precision does, so that their order counts beyond their size.
    """

    groups: tuple[Group, ...]
    about: tuple[str, ...] = ()
    assumed: bool = False
    ranks: bool = False

    @property
    def digest(self) -> str:
        """Identity of the definition for this network."""
        return key([repr(self.groups), str(self.ranks)])

    @property
    def only_classes(self) -> bool:
        """Whether all that is judged is class scores: numbers of one kind."""
        return all(g.kind in _DISTRIBUTIONS for g in self.groups)

    def damage(self, found: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
        """(N,) float64 damage of each input, differentiable; infinite where an output is not finite.

        Args:
            found: flat outputs, each (N, ...).
            reference: the float network's on the same inputs.
        """
        total = torch.zeros(len(reference[0]), dtype=torch.float64, device=reference[0].device)
        for g in self.groups:
            total = total + _DAMAGES[g.kind](g, found[g.output], reference[g.output])
        total = total / max(len(self.groups), 1)
        return torch.where(total.isnan(), torch.inf, total)

    def noise(self, found: Sequence[Tensor], reference: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(N,) energies of the float outputs and of the error, groups weighted alike."""
        if not self.only_classes:
            damage = self.damage(found, reference)
            return torch.ones_like(damage), damage
        (g, *_) = self.groups
        r, f = (o[g.output].double().flatten(1) for o in (reference, found))
        return r.square().sum(1), (f - r).square().sum(1)

    def probe(self, output: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """One random direction in output space for each input: the shapes of ``output``, the float network's."""
        found = [torch.zeros_like(o, dtype=torch.float64) for o in output]
        judged = {g.output for g in self.groups if g.kind != "labels"}
        signs = {i: _signs(output[i], generator) for i in range(len(output)) if i in judged}
        for g in self.groups:
            if g.kind == "labels":
                continue
            value = output[g.output].detach()
            part = _PROBES[g.kind](g, value, g.take(signs[g.output]))
            g.put(found[g.output], part / max(len(self.groups), 1) ** 0.5)
        return [
            r.to(o.dtype) if o.is_floating_point() else r
            for r, o in zip(found, output, strict=True)
        ]

    def scalar(self, output: Sequence[Tensor], probe: Sequence[Tensor]) -> Tensor:
        """The sum over inputs of probe . output, to be differentiated."""
        parts = [(o * r).sum() for o, r in zip(output, probe, strict=True) if o.requires_grad]
        return torch.stack(parts).sum()

    def project(self, change: Sequence[Tensor], probe: Sequence[Tensor]) -> Tensor:
        """(N,) float64 probe . change for a change made at the outputs themselves."""
        total = torch.zeros(len(change[0]), dtype=torch.float64)
        for c, r in zip(change, probe, strict=True):
            total += (c.double() * r.double()).flatten(1).sum(1).cpu()
        return total


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """(N, ...) float64 KL(softmax(reference) || softmax(logits)) of class logits (N, classes, ...), in nats.

    Logits that are not finite do infinite damage, so that no ranking lets them pass.
    """
    p, q = reference.double().log_softmax(1), logits.double().log_softmax(1)
    # a class that the reference rules out (log p = -inf) adds nothing
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
    divergence = terms.sum(1).clamp_min(0.0)  # rounding can leave -1e-17
    return torch.where(divergence.isnan(), torch.inf, divergence)


def _logits_of(group: Group, x: Tensor) -> Tensor:
    """(N, C, positions) logits whose softmax the output means."""
    rows = group.rows(x)
    return rows.clamp_min(SMALLEST).log() if group.kind == "probabilities" else rows


def _divergence(group: Group, found: Tensor, reference: Tensor) -> Tensor:
    each = kl_divergence(_logits_of(group, found), _logits_of(group, reference))
    return each.flatten(1).mean(1) if each.ndim > 1 else each


def _relative(group: Group, found: Tensor, reference: Tensor) -> Tensor:
    f, r = (_scores(group, x) for x in (found, reference))
    return (f - r).square().flatten(1).mean(1) / group.size


def _scores(group: Group, x: Tensor) -> Tensor:
    part = group.take(x).double()
    return part.sigmoid() if group.kind == "sigmoid_logits" else part


def _cosine(group: Group, found: Tensor, reference: Tensor) -> Tensor:
    f, r = group.rows(found), group.rows(reference)
    # half the squared distance of the unit vectors: exact where they are nearly equal
    return 0.5 * (_unit(f) - _unit(r)).square().sum(1).reshape(len(r), -1).mean(1)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True).clamp_min(TINY)


def _differing(group: Group, found: Tensor, reference: Tensor) -> Tensor:
    return group.take(found).ne(group.take(reference)).double().flatten(1).mean(1)


def _class_probe(group: Group, value: Tensor, signs: Tensor) -> Tensor:
    logits, s = _logits_of(group, value), Group(0, "", group.axis).rows(signs)
    p = logits.softmax(1)
    root = p.sqrt()
    # F = diag(p) - p p^T = B B^T with B = diag(sqrt p) - p sqrt(p)^T
    r = (root * s - p * (root * s).sum(1, keepdim=True)) * (0.5 / _positions(p)) ** 0.5
    if group.kind == "probabilities":  # the gradient is with respect to them
        r = r / group.rows(value).clamp_min(SMALLEST)
    return _back(group, r, signs)


def _value_probe(group: Group, value: Tensor, signs: Tensor) -> Tensor:
    r = signs.double() * (group.size * signs[0].numel()) ** -0.5
    if group.kind == "sigmoid_logits":
        p = group.take(value).double().sigmoid()
        r = r * p * (1 - p)
    return r


def _cosine_probe(group: Group, value: Tensor, signs: Tensor) -> Tensor:
    x, s = group.rows(value), Group(0, "", group.axis).rows(signs)
    unit = _unit(x)
    across = s - unit * (unit * s).sum(1, keepdim=True)
    length = x.norm(dim=1, keepdim=True).clamp_min(TINY)
    return _back(group, across / (length * (2 * _positions(x)) ** 0.5), signs)


def _positions(rows: Tensor) -> int:
    return rows[0, 0].numel()


def _back(group: Group, rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``Group.rows``."""
    if like.ndim <= 2:
        return rows
    moved = like.movedim(group.axis, 1).shape
    return rows.view(moved).movedim(1, group.axis)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, tuple(like.shape), generator=generator, dtype=torch.int8)
    return (signs * 2.0 - 1.0).to(like.device)


SQUARED = ("values", "sigmoid", "sigmoid_logits", "coordinates")
_DAMAGES: dict[str, Callable[[Group, Tensor, Tensor], Tensor]] = {
    **dict.fromkeys(_DISTRIBUTIONS, _divergence),
    **dict.fromkeys(SQUARED, _relative),
    "embeddings": _cosine,
    "labels": _differing,
}
_PROBES: dict[str, Callable[[Group, Tensor, Tensor], Tensor]] = {
    **dict.fromkeys(_DISTRIBUTIONS, _class_probe),
    **dict.fromkeys(SQUARED, _value_probe),
    "embeddings": _cosine_probe,
}
