"""Calibration and better ranges, found again by plans whose float network is the same.

What calibration sees depends on the float network and the inputs alone; the ranges of least damage on these and on which values
exist in int8. The rungs of the ladder that correct biases and round weights share both with the rung below, and a layer kept
in float changes the second only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, fx

from rewriter.damage.grouping import fidelity_of
from rewriter.graph import facts
from rewriter.graph.channel_ranges import has_ranges_of
from rewriter.int8.annotate import annotate, annotation
from rewriter.int8.calibrate import Calibration, Method, ValueStats, from_stats, is_observed
from rewriter.int8.scheme import QuantScheme
from rewriter.int8.simulate import Quantized, quantize
from rewriter.repair.activation_ranges import least_damage_ranges
from rewriter.repair.alike import Alike
from rewriter.storage.cache import Store, load, save_to
from rewriter.storage.digest import data_digest, graph_digest, key

Batches = Sequence[Tensor | tuple[Tensor, ...]]
# Raised when calibration or the choice of ranges comes out differently, so that stored results are not reused.
VERSION = 1


def calibrated(
    gm: fx.GraphModule,
    scheme: QuantScheme,
    batches: Batches,
    method: Method = "minmax",
    store: Store | None = None,
) -> Quantized:
    """``rewriter.int8.simulate.quantize``, or what it gave of the same network before; edits the annotations.

    Args:
        gm: canonical graph.
        scheme: the target.
        batches: calibration inputs.
        method: how a range follows from what was seen; only what "minmax" needs is kept.
        store: where it is kept; None: nowhere.

    Raises:
        QuantizeError: there is no sample, or a value is NaN or infinite.
        OSError: the store cannot be written.
    """
    if method == "minmax":
        annotate(gm, scheme)
        given = _profiled(gm, batches)
        if given is not None:
            return Quantized(gm, given, scheme)
    if store is None or method != "minmax":
        return quantize(gm, scheme, batches, method)
    name = key(["calibrated", str(VERSION), graph_digest(gm), data_digest(batches)])
    wanted = [n.name for n in gm.graph.nodes if is_observed(gm, n)]
    found = load(store, name)
    if found is not None and all(f"low.{n}" in found[0] for n in wanted):
        stats = {n: _stats(found[0][f"low.{n}"], found[0][f"high.{n}"]) for n in wanted}
        return Quantized(gm, from_stats(gm, stats, found[1]["samples"], method), scheme)
    quantized = quantize(gm, scheme, batches, method)
    seen = quantized.calibration
    tensors = {f"low.{k}": s.channel_low for k, s in seen.stats.items()}
    tensors |= {f"high.{k}": s.channel_high for k, s in seen.stats.items()}
    save_to(store, name, tensors, {"samples": seen.samples})
    return quantized


def _profiled(gm: fx.GraphModule, batches: Batches) -> Calibration | None:
    """What calibration would see, where the nodes know it: the same inputs ran through this network before it was scaled."""
    if not has_ranges_of(gm, batches):
        return None
    stats: dict[str, ValueStats] = {}
    for node in gm.graph.nodes:
        if is_observed(gm, node):
            known = facts.CHANNEL_RANGE.get(node)
            if known is None or not all(bool(end.isfinite().all()) for end in known):
                return None
            stats[node.name] = _stats(*known)
    first = [b[0] if isinstance(b, tuple) else b for b in batches]
    return from_stats(gm, stats, sum(len(x) for x in first))


def _stats(low: Tensor, high: Tensor) -> ValueStats:
    return ValueStats(float(low.min()), float(high.max()), low, high)


def refined(
    quantized: Quantized,
    batches: Batches,
    store: Store | None = None,
    alike: Alike | None = None,
) -> Quantized:
    """``least_damage_ranges``, or what it gave before of the same network with the same values in int8.

    Args:
        quantized: annotated graph with min-max ranges.
        batches: calibration inputs.
        store: where the ranges are kept; None: nowhere.
        alike: a repaired network that has the same values but for a few; their ranges are taken over.

    Raises:
        OSError: the store cannot be written.
    """
    given = None if alike is None else alike.ranges_for(quantized)
    if store is None:
        return least_damage_ranges(quantized, batches, given=given)
    gm, values = quantized.gm, quantized.calibration.values
    parts = [
        "refined",
        str(VERSION),
        graph_digest(gm),
        data_digest(batches),
        quantized.scheme.identity,
        fidelity_of(gm, batches).digest,
        repr([(n.name, annotation(n)) for n in gm.graph.nodes]),
        repr(sorted(values.items())),
        repr(None if given is None else sorted(given.items())),
    ]
    found = load(store, key(parts))
    if found is None:
        result = least_damage_ranges(quantized, batches, given=given)
        chosen = result.calibration.values
        save_to(store, key(parts), {}, {"ranges": {k: list(r) for k, r in chosen.items()}})
        return result
    ranges = {k: (low, high) for k, (low, high) in found[1]["ranges"].items()}
    return replace(quantized, calibration=replace(quantized.calibration, values=ranges))
