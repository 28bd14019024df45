"""Fix the damage of a network: which channels of its outputs count as one, and how large they are.

Values are grouped by octaves of their size, so that a score in [0, 1] counts as much as a box in [0, 640]; channels that went through
other operations after their layers are never in one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, fx

from rewriter.damage.fidelity import SQUARED, TINY, Fidelity, Group
from rewriter.damage.meaning import Declared, Meaning, Part, Purpose, meanings, output_names
from rewriter.damage.provenance import Origin
from rewriter.graph import facts
from rewriter.graph.interpret import walk
from rewriter.graph.lookup import outputs

# Values of channels whose root mean squares lie within this factor of each other form one group.
FACTOR = 8.0
# A group's mean square counts as at least this share of the largest one's: errors of a dead channel are no damage, those of
# scores beside boxes in pixels are.
SILENT = 1e-9
# Inputs whose outputs settle the sizes of the groups.
INPUTS = 256


@dataclass
class _Moments:
    """Sums over inputs of each number of one output, of its square, and of its score behind a sigmoid."""

    total: Tensor | float = 0.0
    square: Tensor | float = 0.0
    score: Tensor | float = 0.0
    count: int = 0

    def add(self, x: Tensor) -> None:
        rows = x.detach().double().cpu()
        self.total = self.total + rows.sum(0)
        self.square = self.square + rows.square().sum(0)
        self.score = self.score + rows.sigmoid().square().sum(0)
        self.count += len(rows)

    def power(self) -> Tensor:
        """(...) mean square of each number."""
        return cast(Tensor, self.square) / self.count

    def variance(self) -> Tensor:
        """(...) of each number about its own mean over inputs."""
        mean = cast(Tensor, self.total) / self.count
        return (self.power() - mean.square()).clamp_min(0.0)

    def scores(self) -> Tensor:
        """(...) mean square of each number behind a sigmoid."""
        return cast(Tensor, self.score) / self.count


def measure_fidelity(
    gm: fx.GraphModule,
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    said: Declared | None = None,
    purpose: Purpose = "unknown",
) -> Fidelity:
    """The damage of a network's outputs, with groups and sizes fixed by the float network on some inputs.

    Args:
        gm: canonical graph; it is not changed.
        batches: calibration inputs (N, ...), or a tuple with one tensor for each input.
        said: what the user says of the outputs.
        purpose: what the task says of them.

    Raises:
        MeaningError: what was said does not fit the outputs.
    """
    known = meanings(gm, said, purpose)
    moments = [_Moments() for _ in known]
    if any(_sized(m) for m, _ in known):
        _run(gm, batches, moments)
    groups: list[Group] = []
    about: list[str] = []
    ends, names = outputs(gm), output_names(gm)
    for i, ((meaning, origin), node, name) in enumerate(zip(known, ends, names, strict=True)):
        dtype = facts.DTYPE.get(node, torch.float32)
        mine = _groups(i, meaning, origin, moments[i], dtype.is_floating_point)
        groups += mine
        shape = ", ".join(map(str, facts.SHAPE.get(node, ())[1:]))
        about.append(f"{name} (N, {shape}): {_in_words(meaning, mine)}")
    assumed, ranks = any(m.assumed for m, _ in known), purpose in ("decoded", "scores")
    return Fidelity(tuple(groups), tuple(about), assumed, ranks)


def _sized(meaning: Meaning) -> bool:
    return any(p.kind in SQUARED for p in meaning.parts)


def _run(
    gm: fx.GraphModule,
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    moments: Sequence[_Moments],
) -> None:
    ends, left = outputs(gm), INPUTS
    with torch.no_grad():
        for batch in batches:
            whole = batch if isinstance(batch, tuple) else (batch,)
            some = tuple(x[:left] for x in whole)
            left -= len(some[0])
            values = {n: v for n, v in walk(gm, some) if n in ends}
            for node, sums in zip(ends, moments, strict=True):
                sums.add(values[node].expand(len(some[0]), *values[node].shape[1:]))
            if left <= 0:
                break


def _groups(
    number: int, meaning: Meaning, origin: Origin, seen: _Moments, real: bool
) -> list[Group]:
    """The groups of one output; those that are always zero are left out."""
    axis = meaning.axis or 0
    found: list[Group] = []
    for part in meaning.parts:
        if part.kind == "ignored":
            continue
        if not real:
            found.append(Group(number, "labels", axis, part.channels))
        elif part.kind not in SQUARED:
            found.append(Group(number, part.kind, axis, part.channels))
        else:
            divided = meaning.split and part.kind == "values" and axis == origin.axis and axis > 0
            sets = _by_size(part, axis, origin, seen.power()) if divided else [part.channels]
            found += [_with_size(Group(number, part.kind, axis, s), seen) for s in sets]
    most = max((g.size for g in found if g.kind == "values"), default=0.0)
    return [
        replace(g, size=max(g.size, most * SILENT)) if g.kind == "values" else g
        for g in found
        if g.size > TINY or (g.kind == "values" and most > TINY)
    ]


def _with_size(group: Group, seen: _Moments) -> Group:
    # moments lack the axis of inputs
    def mean(x: Tensor) -> float:
        return float(group.take(x.unsqueeze(0)).mean())

    size = mean(seen.scores() if group.kind == "sigmoid_logits" else seen.power())
    if group.kind == "coordinates":
        spread = mean(seen.variance())
        if spread <= 1e-12 * size:  # one input, or the same answer to all: how far they lie apart
            centres = group.take((cast(Tensor, seen.total) / seen.count).unsqueeze(0))
            spread = float(centres.var(correction=0))
        size = spread if spread > 1e-12 * size else size
    return replace(group, size=size)


def _by_size(part: Part, axis: int, origin: Origin, power: Tensor) -> list[tuple[int, ...]]:
    """Channels of a part, by octaves of their root mean square; silent ones count as 1e-3 of the loudest."""
    rest = [d for d in range(power.ndim) if d != axis - 1]
    each = power.mean(rest) if rest else power
    channels = part.channels or tuple(range(len(each)))
    by_channel: dict[int, list[int]] = {}
    for c in channels:
        by_channel.setdefault(origin.channel[c], []).append(c)
    mean = torch.stack([each[some].mean() for some in by_channel.values()])
    level = mean.clamp_min(float(mean.max()) * 1e-6 + TINY).log() / 2
    bins = ((level - level.min()) / torch.log(torch.tensor(FACTOR))).floor().long().tolist()
    sets: dict[int, list[int]] = {}
    for number, some in zip(bins, by_channel.values(), strict=True):
        sets.setdefault(number, []).extend(some)
    if len(sets) == 1:
        return [part.channels]
    return [tuple(sorted(sets[b])) for b in sorted(sets)]


def _in_words(meaning: Meaning, groups: Sequence[Group]) -> str:
    kinds = list(dict.fromkeys(str(g.kind) for g in groups)) or ["ignored"]
    many = f" in {len(groups)} groups along axis {meaning.axis}" if len(groups) > 1 else ""
    return " and ".join(kinds) + many + (" (assumed)" if meaning.assumed else "")


def fidelity_of(
    gm: fx.GraphModule, batches: Iterable[Tensor | tuple[Tensor, ...]] = ()
) -> Fidelity:
    """The damage that was fixed for a graph and all that is rewritten from it; else one is fixed now, by assumption.

    Args:
        gm: canonical graph; what is fixed now is kept in it.
        batches: calibration inputs, read where there is none yet.
    """
    known = facts.FIDELITY.get(gm)
    if known is None:
        known = measure_fidelity(gm, batches)
        facts.FIDELITY.put(gm, known)
    return known
