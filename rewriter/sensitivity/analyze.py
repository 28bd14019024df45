"""The whole ranking for the cost of a few passes, and the reason for each layer.

Every layer is screened (``screen``), on as many samples as make the ranking steady; the first
``top`` of that order are measured (``exact``), and more of them while a layer from the edge of what
was measured turns out to belong among the most harmful. They race in blocks of samples: a layer
stops when it is sure which side of the places that matter it is on (``steady``). ``exact=True``
measures every layer, and stops with those that are clearly harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.damage.fidelity import Fidelity
from rewriter.damage.grouping import fidelity_of
from rewriter.errors import QuantizeError
from rewriter.graph import facts
from rewriter.graph.cost import cost, layer_macs
from rewriter.graph.lookup import layer_name, layers
from rewriter.graph.ops import RECURRENT_TYPES
from rewriter.int8.annotate import annotation
from rewriter.int8.scheme import QuantScheme
from rewriter.int8.simulate import Quantized, quantize
from rewriter.sensitivity.error_terms import parts_of
from rewriter.sensitivity.exact import Metric, Tally, batch_size, measure
from rewriter.sensitivity.journal import Journal, journal_key
from rewriter.sensitivity.ranking_confidence import undecided
from rewriter.sensitivity.results import Analysis
from rewriter.sensitivity.screen import (
    Candidate,
    Screener,
    Screening,
)
from rewriter.sensitivity.shared_prefix import Forks, Variant, int8_variant, keeping, only
from rewriter.sensitivity.summary import Measured, summarize

OnProgress = Callable[[float, float], None]
# Among how many layers the measured order has to be right before widening stops, and by how many
# it widens.
LEADERS = 5
STEP = 4
# No decision is made on fewer samples.
MIN_SAMPLES = 24
# Screening ends when its order is expected to correlate so with that by endless samples.
STEADY = 0.985
# Screening costs about this many forward passes; only the progress bar depends on it.
SCREEN_PASSES = 5.0
# Racing: a layer stops when it is sure (by so many standard errors of paired differences) whether
# it is the first, and whether it is one of the leaders; the order within these is left to chance.
APART = 2.0
# With all layers, one stops when it is surely (this many standard errors) below this share of the
# last of the top.
SURE = 3.0
HARMLESS = 0.1
# Projections for each part of the error that make the ranking steady.
PROJECTIONS = 64
CURVE = (0, 1, 2, 3, 5, 8)


def analyze(
    gm: fx.GraphModule,
    scheme: QuantScheme,
    calibration_batches: Iterable[Tensor | tuple[Tensor, ...]],
    evaluation_inputs: Tensor,
    *,
    targets: Sequence[Any] | Tensor | None = None,
    metric: Metric | None = None,
    metric_name: str = "",
    higher_is_better: bool = True,
    fidelity: Fidelity | None = None,
    exact: bool = False,
    race: bool = True,
    interaction: int | None = None,
    top: int = 8,
    seed: int = 0,
    journal: Path | None = None,
    progress: OnProgress | None = None,
    candidates: Sequence[Candidate] = (),
) -> Analysis:
    """Rank the layers of a network by the damage that int8 does to each, and say why.

    Args:
        gm: canonical graph; it is annotated for ``scheme``, nothing else in it changes.
        scheme: the target.
        calibration_batches: unlabeled inputs, each (N, ...).
        evaluation_inputs: (n, ...) inputs on which damage is measured; no labels are needed.
        targets: n targets, for ``metric``.
        metric: (flat outputs, targets) -> (N,) contribution of each sample; the metric is their
            mean.
        metric_name: what the metric is called.
        higher_is_better: which way of it is good.
        fidelity: the damage; None: that of ``gm``, or one by assumption from the calibration inputs.
        exact: measure every layer rather than the ``top`` of the screening.
        race: stop early with layers whose place is sure, or that are clearly harmless.
        interaction: for how many of the first layers all-but-one and the cumulative curve are
            measured and not predicted; None: ``top`` with ``exact``, else none.
        top: how many layers are measured at least, and explained.
        seed: of the random projections; the same seed gives the same result.
        journal: a file that makes a killed analysis go on where it was.
        progress: called with work done and total work, in forward passes over the inputs.
        candidates: rewrites to be priced along the way (``Analysis.screening``).

    Raises:
        QuantizeError: there is no layer, no input, or the inputs are unusable.
    """
    if len(evaluation_inputs) == 0:
        raise QuantizeError("sensitivity: evaluation inputs: none was given")
    calibration_batches = list(calibration_batches)
    fidelity = fidelity or fidelity_of(gm, calibration_batches)
    method: Any = facts.CALIBRATION.get(gm, "minmax")
    quantized = quantize(gm, scheme, calibration_batches, method)
    names = {n.name: n for n in layers(gm) if annotation(n).weight is not None}
    if not names:
        raise QuantizeError("sensitivity: the graph: no layer is quantized on this target")
    forks = Forks(quantized)
    size = batch_size(forks)
    settings = (seed, size, fidelity.digest, metric_name, [c.name for c in candidates])
    key = journal_key(quantized, evaluation_inputs, targets, *settings) if journal else ""
    with Journal(journal, key) as record:
        run = _Run(quantized, forks, evaluation_inputs, size, seed, record, progress, fidelity)
        run.targets, run.metric = targets, metric
        screening = run.screen(candidates)
        estimate = screening.layer_damage()
        order = sorted(names, key=lambda n: (-estimate[n], n))
        measured = run.confirm(names, order, top, exact, race)
        ranked = sorted(order, key=lambda n: (-run.best(n, measured, estimate), n))
        count = (top if exact else 0) if interaction is None else interaction
        without, curve = run.interactions(scheme, names, ranked, count)
    return summarize(
        quantized,
        screening,
        Measured(run.tallies, without, curve),
        ranked,
        inputs=evaluation_inputs[: min(3 * size, 16)],
        metric_name=metric_name or ("metric" if metric is not None else ""),
        higher_is_better=higher_is_better,
        macs=layer_macs(gm),
        total_macs=_network_macs(gm),
        top=top,
    )


def float_gains(quantized: Quantized, inputs: Tensor, *, seed: int = 0) -> dict[str, float]:
    """What leaving one layer in float takes off the damage of a network as it is quantized.

    Screened, not measured: in a network that is repaired already other layers hurt than before, and
    which ones is known for the cost of a few passes.

    Args:
        quantized: annotated and calibrated graph; it is not changed.
        inputs: (n, ...) inputs on which damage is measured, all of them.
        seed: of the random projections.

    Returns:
        The share of the damage, at most 1, by the name of the layer; the parts of a layer that was
        split count together. Negative where a layer makes up for the error of others.
    """
    forks = Forks(quantized)
    size = batch_size(forks)
    with Journal(None, "") as record:
        run = _Run(
            quantized, forks, inputs, size, seed, record, None, fidelity_of(quantized.gm, [inputs])
        )
        screening = run.screen((), steady=float("inf"))
    parts: dict[str, list[str]] = {}
    for node in layers(quantized.gm):
        if node.name in screening.parts.inputs:
            parts.setdefault(layer_name(node), []).append(node.name)
    whole = screening.predict()
    if whole <= 0:
        return dict.fromkeys(parts, 0.0)
    return {name: 1 - screening.predict(nodes) / whole for name, nodes in parts.items()}


def _network_macs(gm: fx.GraphModule) -> int:
    """``cost(gm).macs``; a plain network does without torch's counter, which loads for seconds."""
    products = ("matmul", "mm", "einsum", "attention", "linear", "conv")
    other = facts.OPAQUE.get(gm) or any(
        word in str(n.target).lower()
        for n in gm.graph.nodes
        if n.op in ("call_function", "call_method")
        for word in products
    )
    recurrent = any(isinstance(m, RECURRENT_TYPES) for m in gm.modules())
    return cost(gm).macs if other or recurrent else sum(layer_macs(gm).values())


class _Run:
    """One analysis under way: what is measured so far, and how much is left."""

    targets: Sequence[Any] | Tensor | None = None
    metric: Metric | None = None

    def __init__(
        self,
        quantized: Quantized,
        forks: Forks,
        inputs: Tensor,
        size: int,
        seed: int,
        record: Journal,
        progress: OnProgress | None,
        fidelity: Fidelity,
    ) -> None:
        self.quantized, self.forks, self.gm = quantized, forks, quantized.gm
        # each block is spread over all samples, which may be sorted
        count = -(-len(inputs) // size)
        self.blocks = [slice(b, None, count) for b in range(count)]
        self.inputs, self.seed, self.record, self.progress = inputs, seed, record, progress
        self.fidelity = fidelity
        self.size, self.parts = size, parts_of(self.gm)
        # few samples leave the estimate noisy: then each gets more directions
        self.directions = max(1, min(4, -(-PROJECTIONS // len(inputs))))
        self.tallies: dict[str, Tally] = {}
        self.done, self.total = 0.0, SCREEN_PASSES

    # ------------------------------------------------------------------------------- phases

    def screen(self, candidates: Sequence[Candidate], steady: float = STEADY) -> Screening:
        """Projections over samples, until the order of the layers is steady; infinity: over all."""
        screener = Screener(self.quantized, self.fidelity, candidates, self.directions)
        screening = Screening(screener.parts)
        ready = self.done
        for piece in self._halves():
            key = f"screen {piece.start}"
            if key not in self.record:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + piece.start)
                self.record.add(key, screener.batch(self.inputs[piece], generator))
            screening.extend(self.record[key])
            done = screening.samples
            self._advance(ready + SCREEN_PASSES * done / len(self.inputs) - self.done)
            if done >= MIN_SAMPLES and screening.reliability() >= steady:
                break
        self.total -= SCREEN_PASSES - (self.done - ready)
        return screening

    def _halves(self) -> Iterator[slice]:
        """The blocks in pieces: a pass that keeps everything for the way back needs more memory."""
        count, size = len(self.blocks), len(range(len(self.inputs))[self.blocks[0]])
        pieces = -(-size // max(1, self.size // 2))
        for start in range(count * pieces):
            start = start // pieces + count * (start % pieces)
            if start < len(self.inputs):
                yield slice(start, None, count * pieces)

    def confirm(
        self,
        names: dict[str, fx.Node],
        order: list[str],
        top: int,
        exact: bool,
        race: bool,
    ) -> set[str]:
        """Measure all layers, or the first of ``order``; more while the orders disagree."""
        whole: dict[str, Variant] = {"float": {}, "*": int8_variant(self.gm)}
        if exact:
            self.total += 3.0
            self._measure({}, whole, self.blocks)
            self._race(names, top, race)
            return set(names)
        count = min(top, len(order))
        while True:
            leading = order[:count]
            self._race_leaders({n: only(self.parts, names[n]) for n in leading}, whole, race)
            if count == len(order) or not self._edge_disagrees(leading):
                return set(leading)
            count = min(count + STEP, len(order))

    def _race_leaders(
        self, variants: dict[str, Variant], whole: dict[str, Variant], race: bool
    ) -> None:
        """Measure some layers block by block, each until its place among them is sure."""
        share = {n: self.forks.share({}, v) for n, v in (variants | whole).items()}
        share = {n: s for n, s in share.items() if f"{n} @0" not in self.record}
        ready, passes = self.done, sum(share.values()) + 1
        self.total += passes
        alive, seen = dict(variants), 0
        for block in self.blocks:
            # the network as a whole is not in the race: it is measured while the first are
            self._measure({}, alive | (whole if seen < MIN_SAMPLES or not race else {}), [block])
            seen += len(range(len(self.inputs))[block])
            if race and seen >= MIN_SAMPLES:
                damages = {n: self.tallies[n].by_block("damage") for n in variants}
                unsure = undecided(damages, (1, LEADERS), APART)
                alive = {n: v for n, v in alive.items() if n in unsure}
                if not alive:
                    break
        self.total -= max(passes - (self.done - ready), 0.0)

    def _edge_disagrees(self, measured: list[str]) -> bool:
        """Whether a layer from the last few that were measured is among the most harmful."""
        exact = sorted(measured, key=lambda n: -self.tallies[n].damage)
        edge = measured[max(LEADERS, len(measured) - 3) :]
        return bool(set(exact[:LEADERS]) & set(edge))

    def _race(self, names: dict[str, fx.Node], top: int, race: bool) -> None:
        """All layers block by block; from the third on without those that are clearly harmless."""
        alive = dict(names)
        share = {n: self.forks.share({}, only(self.parts, node)) for n, node in names.items()}
        passes = sum(share.values()) + 1
        self.total += passes
        for b, block in enumerate(self.blocks):
            before = self.done
            self._measure({}, {n: only(self.parts, node) for n, node in alive.items()}, [block])
            self.done = before
            self._advance(passes / len(self.blocks))
            if race and b >= 2 and b + 1 < len(self.blocks) and len(alive) > top:
                last = sorted((self.tallies[n].damage for n in alive), reverse=True)[top - 1]
                alive = {
                    n: node
                    for n, node in alive.items()
                    if self.tallies[n].upper(SURE) >= HARMLESS * last
                }

    def interactions(
        self, scheme: QuantScheme, names: dict[str, fx.Node], ranked: list[str], count: int
    ) -> tuple[dict[str, str], dict[int, str]]:
        """Measure all-but-one of the first ``count`` layers and the curve.

        Returns:
            The keys of what was measured: by layer, and by number of float layers.
        """
        count = min(count, len(ranked))
        if not count:
            return {}, {}
        without = {n: f"-{n}" for n in ranked[:count]}
        # the names are part of the key: a resumed run must not take another ranking's point
        curve = {k: "".join(f"-{n}" for n in ranked[:k]) for k in CURVE if 0 < k <= count}
        kept = {key: [n] for n, key in without.items()}
        kept |= {key: ranked[:k] for k, key in curve.items()}
        variants = {
            key: keeping(self.gm, scheme, [names[n] for n in some]) for key, some in kept.items()
        }
        base = int8_variant(self.gm)
        self.total += sum(self.forks.share(base, v) for v in variants.values()) + 1
        self._measure(base, variants, self.blocks)
        return without, curve

    # ---------------------------------------------------------------------------- machinery

    def _measure(
        self, base: Variant, variants: Mapping[str, Variant], blocks: list[slice]
    ) -> None:
        """Measure what the journal does not know, and add it to the tallies."""
        share = {n: self.forks.share(base, v) for n, v in variants.items()}
        for block in blocks:
            keys = {n: f"{n} @{block.start}" for n in variants}
            missing = {n: v for n, v in variants.items() if keys[n] not in self.record}
            targets = None if self.targets is None else self.targets[block]
            if missing:
                results = measure(
                    self.forks,
                    self.fidelity,
                    self.inputs[block],
                    base,
                    missing,
                    targets,
                    self.metric,
                )
                for n, result in results:
                    self.record.add(keys[n], result)
                    self._advance(share[n] / len(self.blocks))
            for n, key in keys.items():
                self.tallies.setdefault(n, Tally()).blocks[block.start] = self.record[key]
            self._advance(1 / len(self.blocks))

    def best(self, name: str, measured: set[str], estimate: dict[str, float]) -> float:
        """Damage of a layer: measured, or else screened."""
        return self.tallies[name].damage if name in measured else estimate[name]

    def _advance(self, passes: float) -> None:
        self.done += passes
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)
