"""Put the numbers of an analysis together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from rewriter.graph.channel_ranges import width
from rewriter.graph.interpret import device_of
from rewriter.graph.lookup import find, kind_of, layer_name, layers
from rewriter.int8.annotate import annotation, is_layer
from rewriter.int8.simulate import Quantized
from rewriter.sensitivity.causes import find_causes
from rewriter.sensitivity.exact import Tally
from rewriter.sensitivity.remedies import find_answers
from rewriter.sensitivity.results import (
    Analysis,
    Baseline,
    CurvePoint,
    Interaction,
    LayerDamage,
    ValueDamage,
)
from rewriter.sensitivity.screen import Screening

# A channel sets the range of a value if it spans at least this share of it.
SETS_RANGE = 0.5
# Interactions of layers below this share of the whole damage are not worth a word.
NOTABLE = 0.05


@dataclass(frozen=True)
class Measured:
    """All that was measured; a layer's name alone is that layer alone in int8.

    Args:
        tallies: by key; "float" and "*" (all in int8) are always there.
        without: key of all-but-one, by layer node name.
        curve: key of the network with the first k layers in float, by k.
    """

    tallies: Mapping[str, Tally]
    without: Mapping[str, str]
    curve: Mapping[int, str]


def summarize(
    quantized: Quantized,
    screening: Screening,
    measured: Measured,
    ranked: Sequence[str],
    *,
    inputs: Tensor,
    metric_name: str,
    higher_is_better: bool,
    macs: Mapping[str, int],
    total_macs: int,
    top: int,
) -> Analysis:
    """The result of an analysis.

    Args:
        quantized: the network.
        screening: over all samples.
        measured: over all samples, or for layers that lost the race over some.
        ranked: node names of the layers, most harmful first.
        inputs: (N, ...) a few inputs, from which the causes are read.
        metric_name: of the metric.
        higher_is_better: which way of it is good.
        macs: by layer node name.
        total_macs: of the network.
        top: how many layers are explained.
    """
    gm, tallies = quantized.gm, measured.tallies
    float_, int8 = tallies["float"], tallies["*"]
    harmful = [find(gm, n) for n in ranked[:top]]
    causes = find_causes(quantized, screening, harmful, inputs)
    device = device_of(gm)
    gm.to("cpu")  # where rules rewrite
    answers = find_answers(quantized, harmful, causes)
    gm.to(device)
    weight, whole = screening.weight_damage(), screening.layer_damage()
    noise = _noise_per_damage([tallies[n] for n in ranked if n in tallies])
    found: list[LayerDamage] = []
    for name in ranked:
        node, tally = find(gm, name), tallies.get(name)
        best = tally.damage if tally else whole[name]
        ratio = tally.noise_ratio if tally else noise * best
        steps = answers.get(name, ())
        found.append(
            LayerDamage(
                layer=layer_name(node),
                node=name,
                kind=kind_of(gm, node),
                macs=macs[name],
                damage=best,
                screened=whole[name],
                exact=tally is not None,
                metric=tally.metric if tally else None,
                drop=tally.drop(float_, higher_is_better) if tally else None,
                sqnr_db=-10 * math.log10(ratio) if ratio > 0 else None,
                weight_damage=weight.get(name, 0.0),
                input_damage=screening.damage(screening.layer(name) - screening.weights[name]),
                samples=tally.samples if tally else 0,
                interval=_interval(
                    best, tally.error if tally else screening.error(screening.layer(name))
                ),
                causes=tuple(dict.fromkeys(c.name for c in causes.get(name, ()))),
                evidence=causes.get(name, ()),
                answers=tuple(step for step, _ in steps),
                answer_macs=tuple(added for _, added in steps),
            )
        )
    return Analysis(
        target=quantized.scheme.name,
        metric=metric_name or "damage",
        higher_is_better=higher_is_better if metric_name else False,
        samples=int8.samples,
        baseline=Baseline(float_.metric, int8.metric, total_macs, int8.damage),
        layers=found,
        values=_values(quantized, screening),
        interaction=_interaction(screening, measured, ranked[:top], gm),
        curve=_curve(screening, measured, ranked[:top], gm),
        screening=screening,
    )


def _interval(mean: float, error: float) -> tuple[float, float] | None:
    """95 % of a normal distribution; a damage is not negative."""
    return (max(mean - 1.96 * error, 0.0), mean + 1.96 * error) if math.isfinite(error) else None


def _noise_per_damage(tallies: Sequence[Tally]) -> float:
    """Relative output noise for a unit of damage: the geometric mean over what was measured."""
    pairs = [(t.noise_ratio, t.damage) for t in tallies if t.damage > 0 and t.noise_ratio > 0]
    if not pairs:
        return 1.0
    return math.exp(math.fsum(math.log(n / d) for n, d in pairs) / len(pairs))


def _values(quantized: Quantized, screening: Screening) -> list[ValueDamage]:
    gm = quantized.gm
    found: list[ValueDamage] = []
    nodes = {n.name: n for n in gm.graph.nodes}
    weighted = [(n.name, layer_name(n)) for n in layers(gm)]
    for name, damage in screening.value_damage().items():
        node = nodes[name]
        low, high = quantized.calibration.values[annotation(node).range_of]
        stats = quantized.calibration.stats.get(name)
        channels: tuple[int, ...] = ()
        spread = 1.0
        if stats is not None:
            wide = width(stats.channel_low, stats.channel_high)
            most = float(wide.max())
            order = wide.argsort(descending=True, stable=True).tolist()
            channels = tuple(c for c in order if float(wide[c]) >= SETS_RANGE * most)[:8]
            spread = most / max(float(wide.median()), 1e-30)
        readers = {reader for reader, _ in screening.parts.values[name]}
        feeds = tuple(layer for n, layer in weighted if n in readers)
        found.append(
            ValueDamage(name, _made_by(gm, node), low, high, channels, spread, feeds, damage)
        )
    return sorted(found, key=lambda v: (-v.damage, v.value))


def _made_by(gm: fx.GraphModule, node: fx.Node) -> str:
    """The layer that a value is the (activated) result of; "" for any other value."""
    while not is_layer(gm, node) and node.op == "call_module":
        (node, *others) = node.all_input_nodes
        if others:
            return ""
    return layer_name(node) if is_layer(gm, node) else ""


def _interaction(
    screening: Screening, measured: Measured, ranked: Sequence[str], gm: fx.GraphModule
) -> list[Interaction]:
    tallies, alone = measured.tallies, screening.layer_damage()
    everything = screening.predict()
    found: list[Interaction] = []
    for name in ranked:
        key = measured.without.get(name)
        if key is not None:
            whole = tallies["*"].damage
            one, gain = tallies[name].damage, whole - tallies[key].damage
        else:
            whole = everything
            one, gain = alone[name], everything - screening.predict([name])
        notable = max(one, gain) > NOTABLE * whole
        disagrees = notable and not (0.5 * one <= gain <= 2 * one)
        found.append(
            Interaction(layer_name(find(gm, name)), one, gain, key is not None, disagrees)
        )
    return found


def _curve(
    screening: Screening, measured: Measured, ranked: Sequence[str], gm: fx.GraphModule
) -> list[CurvePoint]:
    found: list[CurvePoint] = []
    # the prediction is only of second order: it is scaled to begin where the measurement does
    whole = screening.predict()
    scale = measured.tallies["*"].damage / whole if whole > 0 else 1.0
    for k in range(len(ranked) + 1):
        key = "*" if k == 0 else measured.curve.get(k)
        layer = layer_name(find(gm, ranked[k - 1])) if k else ""
        if key is not None:
            tally = measured.tallies[key]
            found.append(CurvePoint(k, layer, tally.damage, tally.metric, True))
        elif not measured.curve:
            predicted = scale * screening.predict(ranked[:k])
            found.append(CurvePoint(k, layer, predicted, None, False))
    return found
