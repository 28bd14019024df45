"""How sure an order of layers is, and by that when enough was seen.

Layers are compared on the same samples, and samples differ far more than layers do: on a few
images everything hurts, and a mean over all would be a mean over those. So each sample counts by
how much it hurts on the whole: with damage = layer x sample, the best weight of a sample is one
over its share, and the plain mean has weight one. What is between them errs least, since neither
is the truth: on MCUNet, MobileNetV2 and YOLO-Fastest a screening with ``EVEN`` = 0.75 needed half
the images for the same rank correlation with the measured damage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# 0: a plain mean; 1: every sample counts the same share of a layer's damage.
EVEN = 0.75
# A sample on which next to nothing hurts must not count without bound.
MIN_SAMPLE_SHARE = 1e-3
# Ways of cutting the samples into halves, over which the agreement of the halves is averaged.
HALVINGS = 8


def sample_weights(damages: Tensor) -> Tensor:
    """(N,) weights of the samples, of (L, N) damages, such that a damage is its mean times weight.

    Damages of layers that are in proportion on all samples keep their mean.
    """
    mean = damages.mean(1)
    known = (mean > 0) & mean.isfinite()
    weights = torch.ones(damages.shape[1], dtype=torch.float64)
    for _ in range(3 if known.any() else 0):
        share = (damages[known] / mean[known, None]).mean(0)
        weights = share.clamp_min(MIN_SAMPLE_SHARE).pow(-EVEN)
        weights = weights * share.mean() / (weights * share).mean()
        mean = (damages * weights).mean(1).clamp_min(1e-300)
    return weights


def reliability(damages: Tensor) -> float:
    """Expected rank correlation of the order by (L, N) damages with that by endless samples.

    The two halves of the samples rank the layers apart from each other; by the formula of
    Spearman and Brown (1910) their correlation tells that of the whole with another whole, whose
    root is that with the truth.
    """
    count = damages.shape[1]
    if len(damages) < 2 or count < 2:
        return 1.0 if len(damages) < 2 else 0.0
    found: list[float] = []
    for k in range(HALVINGS):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(k))
        a, b = damages[:, order[: count // 2]].sum(1), damages[:, order[count // 2 :]].sum(1)
        found.append(rank_correlation(a, b))
    half = max(math.fsum(found) / len(found), 0.0)
    return math.sqrt(2 * half / (1 + half))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two (L,) lists without regard to ties."""
    x, y = (v.argsort(stable=True).argsort().double() for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.norm() * y.norm()).clamp_min(1e-300))


def surely_apart(a: Sequence[float], b: Sequence[float], errors: float) -> bool:
    """Whether one of two layers hurts more than the other, by so many standard errors.

    Args:
        a: damage on each of some samples.
        b: damage of the other layer on the same samples.
        errors: how many standard errors of the difference make it sure.
    """
    x, y = torch.tensor([a, b], dtype=torch.float64)
    if len(x) < 2 or not bool((x + y).isfinite().all()):
        return False
    size = x + y
    size = size.clamp_min(MIN_SAMPLE_SHARE * float(size.mean())).clamp_min(1e-300)
    difference = (x - y) * size.pow(-EVEN)
    error = float(difference.std()) / math.sqrt(len(x))
    return bool(abs(float(difference.mean())) > errors * error) or bool((x == y).all())


def undecided(
    damages: Mapping[str, Mapping[int, Sequence[float]]], places: Sequence[int], errors: float
) -> set[str]:
    """The layers of which it is not sure on which side of a place in the order they belong.

    Args:
        damages: for each layer, by block of samples, its damage on each of them.
        places: numbers of layers before each place that matters; order between places does not.
        errors: how many standard errors of a difference make it sure.
    """
    mean = {
        name: math.fsum(v for b in blocks.values() for v in b) / sum(map(len, blocks.values()))
        for name, blocks in damages.items()
    }
    order = sorted(damages, key=lambda n: (-mean[n], n))
    found: set[str] = set()
    for i, first in enumerate(order):
        for j in range(i + 1, len(order)):
            second = order[j]
            if not any(i < place <= j for place in places):
                continue
            shared = [b for b in sorted(damages[first]) if b in damages[second]]
            a, b = ([v for s in shared for v in damages[n][s]] for n in (first, second))
            if not surely_apart(a, b, errors):
                found |= {first, second}
    return found
