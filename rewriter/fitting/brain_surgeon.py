"""Which inputs of a dense layer to take away, and the best weights for the others, in closed form.

With h the inputs (a constant appended for the bias) and t the wanted outputs, the squared error of
weights W is tr(W'A W) - 2 tr(W'B) + const, A = E[h h'] and B = E[h t'], least at W = A^-1 B.
Taking away the rows q of a channel costs tr(W_q' [(A^-1)_qq]^-1 W_q) at best; then W moves by
-(A^-1)_:q [(A^-1)_qq]^-1 W_q, and A^-1 loses these rows by one step of elimination.

Channels go one after another by that price. Int8 is in it: A holds the power of the rounding
errors of each input, and the price of a channel that alone sets the range of a value is less by
what all others' rounding errors shrink without it.
Source: Hassibi and Stork, 1993 (optimal brain surgeon); Frantar and Alistarh, 2022
(arXiv:2208.11580) for the updates of several rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Inputs are pulled towards the weights they had by this share of the mean power of an input.
RIDGE = 1e-5
# A channel that goes is the cheapest of so many times as many as go at once.
POOL = 4
# At most this share of the channels that are left goes at once.
AT_ONCE = 1 / 24
# Ranges that shrink by less do not change what the others' rounding errors cost.
SHRINKS = 0.9


@dataclass
class Moments:
    """Sums over rows of inputs and wanted outputs of a dense layer, float64.

    Attributes:
        xx: (K + 1, K + 1) of inputs with a constant as the last.
        xy: (K + 1, O) of inputs with outputs.
        rows: How many.
    """

    xx: Tensor
    xy: Tensor
    rows: int = 0

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device | None = None) -> Moments:
        return cls(
            torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device),
            torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device),
        )

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Take in rows (n, K) and what is wanted of them (n, O)."""
        x = torch.nn.functional.pad(x.double(), (0, 1), value=1.0)
        self.xx.addmm_(x.T, x)
        if y is not None:
            self.xy.addmm_(x.T, y.double())
        self.rows += len(x)


@dataclass(frozen=True)
class Rounding:
    """What int8 adds to a value that the inputs come from.

    Attributes:
        low: (C,) least of each channel.
        high: (C,) largest.
        gain: (C,) by which the power of an error is multiplied until the layer reads it.
        levels: Steps of the range.
    """

    low: Tensor
    high: Tensor
    gain: Tensor
    levels: int = 255

    def power(self, left: Tensor) -> float:
        """Of an error of one channel, where the channels marked in ``left`` (C,) set the range."""
        low = float(self.low[left].min().clamp(max=0.0))
        high = float(self.high[left].max().clamp(min=0.0))
        return ((high - low) / self.levels) ** 2 / 12

    def setters(self, left: Tensor) -> set[int]:
        """The one or two channels that set the range."""
        numbers = left.nonzero()[:, 0]
        ends = (self.low[left].argmin(), self.high[left].argmax())
        return {int(numbers[int(end)]) for end in ends}


@dataclass(frozen=True)
class Problem:
    """A dense layer of which channels are to be taken away.

    Attributes:
        moments: What it reads and what it should make.
        start: (K + 1, O) its weights, the bias last.
        first: Row of the first of the channels that may go; K rows are channels in order.
        channels: How many may go, or units of them.
        block: Rows of one of them.
        weight: (O,) what a squared error in each output counts.
        roundings: Of the values that the inputs come from, by channel (or unit).
    """

    moments: Moments
    start: Tensor
    first: int
    channels: int
    block: int
    weight: Tensor
    roundings: Sequence[Rounding] = ()

    def power(self, left: Tensor) -> Tensor:
        """(channels,) power of the rounding errors in each row of a channel."""
        total = torch.zeros(self.channels, dtype=torch.float64)
        for r in self.roundings:
            total += r.power(left) * r.gain
        return total

    def system(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """A and B, with the ridge and the rounding errors of the channels that are left."""
        xx, xy = self.moments.xx.clone(), self.moments.xy.clone()
        ridge = RIDGE * float(xx.diagonal()[:-1].mean().clamp_min(1e-30))
        more = torch.full_like(xx.diagonal(), ridge)
        more[-1] = 0.0
        xy += more[:, None] * self.start
        noise = (self.power(left) * self.moments.rows).repeat_interleave(self.block)
        more[self.first : self.first + len(noise)] += noise.to(more)
        xx.diagonal().add_(more)
        return xx, xy


def remove(problem: Problem, counts: Sequence[int]) -> dict[int, Tensor]:
    """Which channels (or units) stay when so many are left, ascending, by count.

    Args:
        problem: The layer.
        counts: How many are to be left; each at least 1.
    """
    left = torch.ones(problem.channels, dtype=torch.bool)
    found: dict[int, Tensor] = {}
    state = _State(problem, left)
    for count in sorted(set(counts), reverse=True):
        while (now := int(left.sum())) > count:
            gone = state.cheapest(min(now - count, max(1, int(now * AT_ONCE))))
            left[gone] = False
            state.without(gone, left)
        found[count] = left.nonzero()[:, 0].clone()
    return found


def solve(problem: Problem, left: Tensor) -> Tensor:
    """(K' + 1, O) best weights of the rows that stay with the channels numbered in ``left``."""
    mask = torch.zeros(problem.channels, dtype=torch.bool)
    mask[left.cpu()] = True
    xx, xy = problem.system(mask)
    rows = torch.ones(len(xx), dtype=torch.bool)
    rows[problem.first : problem.first + problem.channels * problem.block] = (
        mask.repeat_interleave(problem.block)
    )
    rows = rows.to(xx.device)
    return torch.cholesky_solve(xy[rows], _cholesky(xx[rows][:, rows]))


def _cholesky(a: Tensor) -> Tensor:
    """Of a matrix that may lack a rank: where rounding makes it indefinite, with more on its diagonal."""
    more = 1e-12 * float(a.diagonal().mean())
    while True:
        factor, failed = torch.linalg.cholesky_ex(a)
        if not int(failed):
            return factor
        a = a + torch.eye(len(a), dtype=a.dtype, device=a.device) * more
        more *= 10


class _State:
    """The inverse and the weights as channels go; their rows are those that are left."""

    def __init__(self, problem: Problem, left: Tensor) -> None:
        self.problem = problem
        self.power = problem.power(left)
        self._start(left)

    def _start(self, left: Tensor) -> None:
        p = self.problem
        xx, xy = p.system(left)
        ends = p.first + p.channels * p.block
        numbers = left.nonzero()[:, 0]
        rows = (p.first + numbers[:, None] * p.block + torch.arange(p.block)).flatten()
        others = torch.cat([torch.arange(p.first), torch.arange(ends, len(xx))])
        rows = torch.cat([rows, others]).to(xx.device)
        factor = _cholesky(xx[rows][:, rows])
        self.inverse = torch.cholesky_inverse(factor)
        # outputs enter by what their errors count
        self.w = torch.cholesky_solve(xy[rows], factor) * p.weight.sqrt().to(xx)
        self.numbers = numbers
        self.ranged = left.clone()

    def cheapest(self, count: int) -> list[int]:
        """Numbers of the channels to take away next: ``count``, or one that sets a range."""
        price = self._prices(self.inverse, self.w, len(self.numbers))
        lone = self._relief(price)
        best = int(lone.argmin())
        if lone[best] < price[best] and lone[best] <= price.min():
            return [int(self.numbers[best])]
        pool = price.argsort()[: max(count * POOL, 8)].sort().values
        rows = self._rows(pool)
        inverse, w = self.inverse[rows][:, rows], self.w[rows]
        picked: list[int] = []
        for _ in range(count):
            q = int(self._prices(inverse, w, len(pool)).argmin())
            picked.append(int(self.numbers[pool[q]]))
            inverse, w = _without(inverse, w, self._block(torch.tensor([q])))
            pool = torch.cat([pool[:q], pool[q + 1 :]])
        return picked

    def _relief(self, price: Tensor) -> Tensor:
        """Prices less what others' rounding errors shrink without a channel that sets a range."""
        p = self.problem
        lone = price.clone()
        squares = self._squares()
        at = {int(n): i for i, n in enumerate(self.numbers)}
        for r in p.roundings:
            gain = r.gain[self.numbers]
            before = r.power(self.ranged)
            for n in r.setters(self.ranged):
                rest = self.ranged.clone()
                rest[n] = False
                if n in at and bool(rest.any()):
                    less = before - r.power(rest)
                    total = float((gain * squares).sum() - gain[at[n]] * squares[at[n]])
                    lone[at[n]] -= less * total * p.moments.rows
        return lone

    def _squares(self) -> Tensor:
        """(n,) sum of the squared weights on each channel, outputs by what they count."""
        rows = len(self.numbers) * self.problem.block
        return self.w[:rows].square().sum(1).view(-1, self.problem.block).sum(1).cpu()

    def _prices(self, inverse: Tensor, w: Tensor, channels: int) -> Tensor:
        block = self.problem.block
        rows = channels * block
        if block == 1:
            return (w[:rows].square().sum(1) / inverse.diagonal()[:rows]).cpu()
        at = torch.arange(channels, device=w.device)
        own = inverse[:rows, :rows].view(channels, block, channels, block)[at, :, at, :]
        parts = w[:rows].view(channels, block, -1)
        return (parts * torch.linalg.solve(own, parts)).sum((1, 2)).cpu()

    def _block(self, at: Tensor) -> Tensor:
        block = self.problem.block
        return (at[:, None] * block + torch.arange(block)).flatten().to(self.w.device)

    def _rows(self, at: Tensor) -> Tensor:
        return self._block(at)

    def without(self, gone: list[int], left: Tensor) -> None:
        """Take channels away; ``left``: those that are left."""
        mask = torch.isin(self.numbers, torch.tensor(gone))
        shrunk = any(
            r.power(left) < SHRINKS * r.power(self.ranged) for r in self.problem.roundings
        )
        if shrunk:  # every input's rounding error is another
            self._start(left)
            return
        self.inverse, self.w = _without(self.inverse, self.w, self._block(mask.nonzero()[:, 0]))
        self.numbers = self.numbers[~mask]
        self.ranged = self.ranged & left


def _without(inverse: Tensor, w: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse and the weights after elimination of some rows."""
    stay = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    stay[rows] = False
    across = inverse[stay][:, rows]
    step = torch.linalg.solve(inverse[rows][:, rows], across.T).T  # (stay, rows)
    return inverse[stay][:, stay] - step @ across.T, w[stay] - step @ w[rows]


def channel_roundings(roundings: Mapping[str, Rounding], unit: int) -> list[Rounding]:
    """Roundings by units of neighboring channels: the widest range, the mean gain."""
    return [
        Rounding(
            r.low.view(-1, unit).amin(1),
            r.high.view(-1, unit).amax(1),
            r.gain.view(-1, unit).mean(1),
            r.levels,
        )
        for r in roundings.values()
    ]
