"""The Pareto front of compute against int8 quality, with noise taken seriously.

On a few hundred images a metric moves by one or two points for nothing. Two plans are therefore
compared on the same samples: one is better in the metric only where the paired 95 % interval of
the difference excludes zero; otherwise the damage, which varies far less, decides, where it differs beyond its own paired interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from search.run_dir.scores import Array, Samples, Score

Cost = Literal["macs", "latency", "bytes"]

RESAMPLES = 2000
# A quarter more damage is one decibel of noise, which no metric shows.
HARDLY_MORE = 1.25
# Damages of which one is less than so many times the other are alike, however many samples say so.
ALIKE = 1.1
Z95 = 1.959964


@dataclass(frozen=True)
class Front:
    """The best plans.

    Attributes:
        points: Cheapest first. Each is better than every cheaper one: in the metric, or where its
            difference is within the noise, in the damage beyond its noise.
        ties: Plans that cost more than a point and can be told from it neither by the metric nor by
            the damage, although they measured less damage. Cheapest first.
    """

    points: tuple[Score, ...]
    ties: tuple[Score, ...] = ()

    cost: Cost = "macs"

    def all(self) -> list[Score]:
        price = cost_named(self.cost)
        return sorted((*self.points, *self.ties), key=lambda s: (price(s), _or_inf(s.damage)))


def cost_named(name: Cost) -> Callable[[Score], float]:
    """What a plan costs: its multiply-accumulates, the milliseconds that one input takes, or the bytes of its file."""
    if name == "latency":
        return lambda score: _or_inf(
            score.latency_ms if score.predicted_ms is None else score.predicted_ms
        )
    if name == "bytes":
        return lambda score: float((score.price or {}).get("bytes", score.weight_bytes))
    return lambda score: float(score.macs)


def pareto(macs: Array, value: Array) -> NDArray[np.intp]:
    """Indices of the points that no other beats in (macs down, value up), cheapest first.

    Of points equal in both the first given is kept.

    Args:
        macs: (k,) cost.
        value: (k,) quality, higher is better.
    """
    if len(macs) == 0:
        return np.empty(0, dtype=np.intp)
    order = np.lexsort((np.arange(len(macs)), -value, macs))
    best = np.maximum.accumulate(value[order])
    keep = np.concatenate(([True], value[order][1:] > best[:-1]))
    return order[keep]


def select_front(
    scores: Sequence[Score],
    samples: Callable[[str], Samples | None],
    *,
    objective: str = "metric",
    higher_is_better: bool = True,
    cost: Cost = "macs",
) -> Front:
    """The front of scored plans.

    Args:
        scores: Any plans; failed ones and those given up early are left out, repeated ones
            counted once.
        samples: Per-sample values by plan text; where they are missing the numbers are taken as
            exact.
        objective: ``metric``, or ``damage`` where there are no labels.
        higher_is_better: Direction of the metric.
        cost: What stands against quality.
    """
    unique = {
        score.plan: score
        for score in scores
        if score.error is None and not score.stopped and score.damage is not None
    }
    usable = [s for s in unique.values() if objective == "damage" or s.metric is not None]
    # Among equals the plan with the fewest float layers and steps comes first, and is the one
    # kept.
    usable.sort(key=lambda s: (s.float_layers, len(s.plan.split()), s.plan))
    if not usable:
        return Front((), cost=cost)
    macs = np.array([cost_named(cost)(s) for s in usable], dtype=np.float64)
    damage = np.array([_or_inf(s.damage) for s in usable])
    if objective == "damage":
        kept = _simpler(
            pareto(macs, -damage), usable, macs, damage, np.zeros((len(macs),) * 2) > 1
        )
        kept = [kept[i] for i in pareto(macs[kept], -damage[kept])]
        return Front(tuple(usable[i] for i in kept), cost=cost)

    sign = 1.0 if higher_is_better else -1.0
    metric = sign * np.array([_or_inf(s.metric) for s in usable])
    error = metric_error([samples(s.plan) for s in usable])
    better = compare(metric, damage, error)
    kept = undominated(macs, better, np.lexsort((damage, -metric, macs)))
    certain = metric[:, None] - metric[None, :] > Z95 * error
    kept = _simpler(kept, usable, macs, damage, certain)
    by_cost = sorted(kept, key=lambda i: (macs[i], metric[i]))
    told = told_apart([usable[i] for i in by_cost], [samples(usable[i].plan) for i in by_cost])
    told |= certain[np.ix_(by_cost, by_cost)]
    points: list[int] = []
    for row, i in enumerate(by_cost):
        if all(told[row, by_cost.index(k)] for k in points):
            points.append(i)
    return Front(
        points=tuple(usable[i] for i in by_cost if i in points),
        ties=tuple(usable[i] for i in by_cost if i not in points),
        cost=cost,
    )


def _simpler(
    kept: Iterable[int],
    usable: Sequence[Score],
    macs: Array,
    damage: Array,
    certain: NDArray[np.bool_],
) -> list[int]:
    """Each plan, or the one in its stead that leaves fewer layers in float for hardly more damage.

    Args:
        kept: Of the front.
        usable: All plans.
        macs: (k,) their cost.
        damage: (k,) lower is better.
        certain: (k, k) whether the metric of i is above that of j beyond chance.
    """
    kinds = np.array([s.float_layers for s in usable])
    found: list[int] = []
    for i in kept:
        near = (macs <= macs[i]) & (damage <= HARDLY_MORE * damage[i]) & ~certain[i]
        found.append(
            min(np.flatnonzero(near).tolist(), key=lambda j: (kinds[j], damage[j], j != i))
        )
    return list(dict.fromkeys(found))


def compare(metric: Array, damage: Array, error: Array) -> NDArray[np.int8]:
    """Which of two plans is better, for all pairs.

    Args:
        metric: (k,) higher is better.
        damage: (k,) lower is better.
        error: (k, k) standard error of ``metric[i] - metric[j]``.

    Returns:
        (k, k): 1 where i is better than j, -1 where it is worse, 0 where they are equal.
    """
    gain = metric[:, None] - metric[None, :]
    certain = np.abs(gain) > Z95 * error
    saved = damage[None, :] - damage[:, None]
    return np.where(certain, np.sign(gain), np.sign(saved)).astype(np.int8)


def told_apart(scores: Sequence[Score], samples: Sequence[Samples | None]) -> NDArray[np.bool_]:
    """(k, k): whether plan i does less damage than plan j beyond the noise.

    By more than a tenth, and where the values of each sample are known, outside the paired 95 %
    interval of the difference.
    """
    damage = np.array([_or_inf(s.damage) for s in scores])
    found = ALIKE * damage[:, None] < damage[None, :]
    for i, j in np.argwhere(found).tolist():
        a, b = samples[i], samples[j]
        if a is None or b is None or len(a.damage) != len(b.damage) or len(a.damage) < 2:
            continue
        saved = b.damage - a.damage
        if np.isfinite(saved).all():
            error = float(saved.std(ddof=1)) / math.sqrt(len(saved))
            found[i, j] = float(saved.mean()) > Z95 * error
    return found


def undominated(macs: Array, better: NDArray[np.int8], order: NDArray[np.intp]) -> list[int]:
    """Indices that none of the others kept beats in cost and quality.

    "Better" by paired tests is not transitive (a beats b beats c beats a can happen at equal
    cost); each point is therefore judged against those already kept, so that something is always
    left.

    Args:
        macs: (k,) cost.
        better: (k, k) from `compare`.
        order: (k,) the order in which points are judged, cheapest first.
    """
    kept: list[int] = []
    for i in order.tolist():
        if any(macs[k] <= macs[i] and better[k, i] >= 0 for k in kept):
            continue
        kept = [k for k in kept if not (macs[i] <= macs[k] and better[i, k] > 0)]
        kept.append(i)
    return kept


def metric_error(samples: Sequence[Samples | None]) -> Array:
    """(k, k) standard errors of paired metric differences; 0 without per-sample values.

    Where few samples differ, the plain variance is too small: four images more and none less
    would count as proof. One more image of disagreement is added, as for matched proportions.

    Source: Agresti and Min 2005, doi:10.1002/sim.1781.
    """
    k = len(samples)
    error = np.zeros((k, k))
    for kind in ("metric", "replicates"):
        have = [i for i, s in enumerate(samples) if s is not None and getattr(s, kind) is not None]
        if len(have) < 2:
            continue
        values = np.stack([getattr(samples[i], kind) for i in have]).astype(np.float64)
        covariance = np.atleast_2d(np.cov(values))
        spread = np.diag(covariance)
        variance = spread[:, None] + spread[None, :] - 2 * covariance
        if kind == "metric":  # replicates already vary as the metric does
            n = values.shape[1]
            variance = variance / n + (np.ptp(values) / n) ** 2
        error[np.ix_(have, have)] = np.sqrt(np.maximum(variance, 0.0))
    return error


@lru_cache(maxsize=4)
def resampled_indices(n: int, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.intp]:
    """(resamples, n) bootstrap samples; the same for every plan, which is what pairs them."""
    return np.random.default_rng(seed).integers(0, n, (resamples, n))


def resampled_means(values: Array, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """(resamples,) means of the (n,) values over bootstrap samples."""
    n = len(values)
    if n * resamples <= 8_000_000:
        return values[resampled_indices(n, resamples, seed)].mean(1)
    random = np.random.default_rng(seed)
    return np.array([values[random.integers(0, n, n)].mean() for _ in range(resamples)])


def paired_interval(
    int8: Array, reference: Array, baseline: float, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the int8 metric: that of (int8 - float), added to the float metric.

    Args:
        int8: (n,) contribution of each sample to the int8 metric.
        reference: (n,) the same for the float network.
        baseline: The float metric.
        resamples: Bootstrap samples.
        seed: Of their choice.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, percentile interval.
    """
    low, high = np.quantile(resampled_means(int8 - reference, resamples, seed), (0.025, 0.975))
    return float(baseline + low), float(baseline + high)


def replicate_interval(int8: Array, reference: Array, baseline: float) -> tuple[float, float]:
    """`paired_interval` where the metric is no mean, from (r,) metrics on shared resamples."""
    low, high = np.quantile(int8 - reference, (0.025, 0.975))
    return float(baseline + low), float(baseline + high)


def hypervolume(macs: Array, value: Array, reference: tuple[float, float]) -> float:
    """Area that the points dominate, up to the reference point.

    Args:
        macs: (k,) cost, lower is better.
        value: (k,) quality, higher is better.
        reference: (macs, value) of a point worse than all that count; what lies beyond it adds
            nothing.

    Source: Zitzler and Thiele 1998, doi:10.1007/BFb0056872.
    """
    inside = (macs < reference[0]) & (value > reference[1])
    macs, value = macs[inside], value[inside]
    front = pareto(macs, value)
    widths = np.append(macs[front][1:], reference[0]) - macs[front]
    return float((widths * (value[front] - reference[1])).sum())


def knee(macs: Array, value: Array, extent: tuple[float, float] | None = None) -> int:
    """Index of the point after which more compute buys little.

    It lies farthest above a rising diagonal, with both axes scaled; of equals the cheapest.

    Args:
        macs: (k,) cost.
        value: (k,) quality, higher is better.
        extent: What counts as much on either axis: so many MACs as so much quality. By default the
            extent of the points, which says nothing where there are only two.

    Source: Das 1999, On characterizing the knee of the Pareto curve, doi:10.1007/BF01195985.
    """
    order = np.argsort(macs, kind="stable")
    width, height = extent or (float(np.ptp(macs)), float(np.ptp(value)))
    if not (width > 0 and height > 0):
        return int(order[0])
    gain = (value[order] - value[order[0]]) / height - (macs[order] - macs[order[0]]) / width
    return int(order[np.argmax(gain.round(9))])


def best(front: Front, *, objective: str = "metric", higher_is_better: bool = True) -> Score:
    """The plan to ship where compute within the limits costs nothing.

    It is among those that no one can tell from the one with the highest metric, whose interval reaches it (without
    labels: among all), and does the least damage of them. Of those that do hardly more the one with the fewest
    layers in float is taken, since each costs two conversions on the device.
    """
    reach = list(front.all())
    if objective != "damage":
        sign = 1.0 if higher_is_better else -1.0
        top = max(sign * _or_inf(s.metric) for s in reach)
        reach = [s for s in reach if _reaches(s, top, sign)]
    least = min(_or_inf(s.damage) for s in reach)
    near = [s for s in reach if _or_inf(s.damage) <= HARDLY_MORE * least]
    return min(near, key=lambda s: (s.float_layers, _or_inf(s.damage), s.macs))


def _reaches(score: Score, top: float, sign: float) -> bool:
    if score.interval is None:
        return sign * _or_inf(score.metric) >= top
    return max(sign * bound for bound in (*score.interval, _or_inf(score.metric))) >= top


def _or_inf(value: float | None) -> float:
    return float("inf") if value is None else float(value)
