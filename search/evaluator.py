"""From a plan to its score: rewrite, fit, quantize, run on the target's kernels, compare.

The images are decoded once, the float outputs are computed once, and a plan is scored once:
scores live in the run directory under a fingerprint of all that they depend on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rewriter import Plan, Quantized, cost, simulate
from rewriter.assemble import assemble
from rewriter.errors import RewriteError
from rewriter.graph import layers
from rewriter.int8.onnx import float_onnx, to_onnx
from rewriter.int8.scheme import QuantScheme
from rewriter.int8.session import Session
from rewriter.plan import rewrite, rule_named
from search.data import batches
from search.fingerprint import Digest
from search.front import paired_interval, replicate_interval, resampled_indices
from search.images import Samples as Dataset
from search.records import Array, Baseline, Records, Samples, Score
from search.tasks import Task

log = logging.getLogger(__name__)

IN_MEMORY = 2 << 30  # bytes; more inputs than that are decoded again for each plan
BATCH = 32
REPLICATES = 500
Tick = Callable[[int, int], None]


@runtime_checkable
class Resampled(Protocol):
    """A task whose metric is no mean over samples, but can be resampled from stored matches."""

    def matches(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> Any: ...

    def resampled(self, matches: Any, weights: NDArray[np.float64]) -> NDArray[np.float64]: ...


@dataclass(frozen=True)
class SampleSet:
    """The evaluation samples, decoded once where they fit into memory.

    Attributes:
        count: Number of samples.
        inputs: (n, ...) all inputs, None where they are read again each time.
        targets: n targets, None without labels.
        digest: Hash of all inputs and targets.
    """

    dataset: Dataset
    count: int
    inputs: Tensor | None
    targets: Any
    digest: str

    def batches(self, size: int = BATCH) -> Iterator[Tensor]:
        """The inputs in order, (size, ...) each.

        Raises:
            ConfigError: the data set fails on a sample.
        """
        if self.inputs is not None:
            yield from self.inputs.split(size)
            return
        for batch in batches(self.dataset, size):
            yield batch[0] if isinstance(batch, tuple) else batch


def load_samples(
    dataset: Dataset, tick: Tick = lambda done, total: None, limit: int = IN_MEMORY
) -> SampleSet:
    """Read a data set once: inputs, or (input, target) pairs."""
    total = len(dataset)
    digest = Digest()
    inputs: list[Tensor] | None = []
    targets: list[Any] = []
    done = 0
    for batch in batches(dataset, BATCH):
        x, y = batch if isinstance(batch, tuple) else (batch, None)
        if done == 0 and total * x[0].numel() * x.element_size() > limit:
            inputs = None
        if inputs is not None:
            inputs.append(x)
        if y is not None:
            targets.append(y)
        digest.add((x, y))
        done += len(x)
        tick(done, total)
    joined = None if inputs is None else torch.cat(inputs)
    return SampleSet(dataset, total, joined, _join(targets), digest.hex())


@dataclass
class RewriteEvaluator:
    """Scores plans of one network; call it with a plan.

    Attributes:
        gm: Profiled canonical graph of the float network.
        scheme: The target.
        task: Metric and damage.
        calibration: Unlabelled inputs, (n, ...) each.
        samples: What the plans are compared on.
        records: Where scores are kept.
        engine: ``onnxruntime`` (the int8 kernels that ship) or ``simulate``.
        device: Where torch runs; the kernels always run on the CPU.
        store: Folder of fitted weights.
        seed: Of the fits.
        threads: Of ONNX Runtime.
    """

    gm: fx.GraphModule
    scheme: QuantScheme
    task: Task
    calibration: Sequence[Tensor]
    samples: SampleSet
    records: Records
    engine: str = "onnxruntime"
    device: str = "cpu"
    store: Path | None = None
    seed: int = 0
    threads: int = 2
    tick: Tick = lambda done, total: None
    _reference: list[Tensor] | None = field(default=None, init=False)
    _float: tuple[float | None, Samples | None] | None = field(default=None, init=False)

    def __call__(self, plan: Plan) -> Score:
        """The score of a plan, from the records where it is known.

        A plan that cannot be carried out or run is a score with an error, so that a search goes
        on without it.

        Raises:
            ConfigError: the user's data set or metric fails.
        """
        known = self.records.get(str(plan))
        if known is not None:
            return known
        score, samples = self.measure(plan)
        self.records.add(score, samples)
        if score.error is not None:
            log.warning("plan %r: %s", score.plan, score.error)
        return score

    def measure(self, plan: Plan) -> tuple[Score, Samples | None]:
        """Score a plan whether or not it is known; nothing is stored."""
        start = time.perf_counter()
        self.float_metric()  # what is wrong with the user's own code is not the plan's fault
        macs = cost(self.gm).macs
        try:
            assembled = assemble(
                self.gm, plan, self.scheme, self.calibration, self.store, self.seed
            )
            quantized = assembled.quantized
            spent = cost(quantized.gm)
            runner = self.runner(quantized)
        except Exception as cause:
            return self._failed(plan, macs, cause, start), None
        try:
            outputs = self._run(runner)
            metric_float = self._metric_in_float(plan, quantized.gm)
        except _CandidateError as failure:
            return self._failed(plan, spent.macs, failure.cause, start), None
        if not all(bool(torch.isfinite(o).all()) for o in outputs if o.is_floating_point()):
            fact = RewriteError("the int8 network's outputs are NaN or infinite")
            return self._failed(plan, spent.macs, fact, start), None
        measured, samples = self._compare(outputs)
        floats = sum(bool(n.meta.get("keep_float")) for n in layers(quantized.gm))
        score = replace(
            measured,
            plan=str(plan),
            macs=spent.macs,
            params=spent.params,
            weight_bytes=spent.weight_bytes,
            macs_ratio=spent.macs / macs,
            float_layers=floats,
            metric_float=metric_float,
            engine=self.engine,
            seconds=round(time.perf_counter() - start, 3),
        )
        return score, samples

    def score_outputs(self, plan: Plan, outputs: list[Tensor], engine: str) -> Score:
        """Score outputs computed elsewhere for a plan, such as by a file that is about to ship."""
        known = self(plan)
        measured, _ = self._compare(outputs)
        return replace(
            known,
            metric=measured.metric,
            interval=measured.interval,
            damage=measured.damage,
            engine=engine,
        )

    def baseline(self) -> Baseline:
        """The network as it is; the empty plan is scored where it is not yet.

        Raises:
            RewriteError: the network itself cannot be run in int8.
        """
        score = self(Plan(()))
        if score.error is not None:
            raise RewriteError(f"the network as it is cannot be scored: {score.error}")
        return Baseline(
            self.float_metric()[0], score.metric, score.macs, score.damage, score.interval
        )

    def reference(self) -> list[Tensor]:
        """Flat float outputs over all samples, each (n, ...); computed once."""
        if self._reference is None:
            self._reference = [o.cpu() for o in self._run_torch(self.gm, self.samples.batches())]
        return self._reference

    def float_metric(self) -> tuple[float | None, Samples | None]:
        """Metric of the float network and its per-sample values; None and None without labels."""
        if self._float is None:
            reference = self.reference()
            if self.samples.targets is None:
                self._float = None, None
            else:
                none = np.zeros(self.samples.count)
                self._float = self._metric(reference), self._per_sample(reference, none)
        return self._float

    def runner(self, quantized: Quantized) -> Callable[[Tensor], list[Tensor]]:
        """What turns a batch of inputs into flat int8 outputs on this evaluator's engine."""
        if self.engine == "onnxruntime":
            return _session_runner(Session(to_onnx(quantized), threads=self.threads))
        simulated = simulate(quantized, kernels=True).to(self.device)
        return lambda x: _flat(simulated(x.to(self.device)))

    def _run(self, runner: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """Outputs over all samples; what the candidate raises, not the data set, is marked."""
        found: list[list[Tensor]] = []
        done = 0
        with torch.no_grad():
            for x in self.samples.batches():
                try:
                    found.append([o.cpu() for o in runner(x)])
                except Exception as cause:
                    raise _CandidateError(cause) from cause
                done += len(x)
                self.tick(done, self.samples.count)
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _run_torch(self, gm: fx.GraphModule, inputs: Iterator[Tensor]) -> list[Tensor]:
        gm = gm.to(self.device)
        found: list[list[Tensor]] = []
        with torch.no_grad():
            for x in inputs:
                x = x.to(self.device)
                if x.ndim == 4:  # twice as fast on the CPU
                    x = x.contiguous(memory_format=torch.channels_last)
                found.append([o.cpu() for o in _flat(gm(x))])
        gm.to("cpu")
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _metric_in_float(self, plan: Plan, gm: fx.GraphModule) -> float | None:
        """Metric of the rewritten network in float: the original's where no step changes it."""
        if self.samples.targets is None:
            return None
        if all(rule_named(step.rule).contract != "approximate" for step in plan.steps):
            return self.float_metric()[0]
        if self.engine != "onnxruntime":
            return self._metric(self._run(lambda x: _flat(gm(x))))
        try:
            session = Session(float_onnx(gm), threads=self.threads)
        except Exception as cause:
            raise _CandidateError(cause) from cause
        return self._metric(self._run(_session_runner(session)))

    def _compare(self, outputs: list[Tensor]) -> tuple[Score, Samples]:
        """Metric, interval and damage of int8 outputs; the caller fills in the rest."""
        damage = self.task.damage(self.reference(), outputs).double().cpu().numpy()
        score = Score(plan="", macs=0, damage=float(damage.mean()), samples=self.samples.count)
        baseline, reference = self.float_metric()
        if baseline is None or reference is None:
            return score, Samples(damage)
        own = self._per_sample(outputs, damage)
        interval = None
        if own.metric is not None and reference.metric is not None:
            interval = paired_interval(own.metric, reference.metric, baseline)
        elif own.replicates is not None and reference.replicates is not None:
            interval = replicate_interval(own.replicates, reference.replicates, baseline)
        return replace(score, metric=self._metric(outputs), interval=interval), own

    def _metric(self, outputs: list[Tensor]) -> float | None:
        value = self.task.score(outputs, self.samples.targets)
        return value if math.isfinite(value) else None

    def _per_sample(self, outputs: list[Tensor], damage: Array) -> Samples:
        values = self.task.per_sample(outputs, self.samples.targets)
        if values is not None:
            return Samples(damage, metric=values.double().cpu().numpy())
        if not isinstance(self.task, Resampled):
            return Samples(damage)
        matches = self.task.matches(outputs, self.samples.targets)
        return Samples(
            damage, replicates=self.task.resampled(matches, _weights(self.samples.count))
        )

    def _failed(self, plan: Plan, macs: int, cause: BaseException, start: float) -> Score:
        text = " ".join(str(cause).split())[:500]
        kind = "" if isinstance(cause, RewriteError) else f"{type(cause).__name__}: "
        return Score(
            plan=str(plan),
            macs=macs,
            macs_ratio=macs / max(cost(self.gm).macs, 1),
            engine=self.engine,
            samples=self.samples.count,
            seconds=round(time.perf_counter() - start, 3),
            error=kind + text,
        )


def extra_macs(gm: fx.GraphModule, plans: Sequence[Plan]) -> dict[str, int]:
    """MACs that each plan adds, by its text; plans that do not apply are left out."""
    before = cost(gm).macs
    found: dict[str, int] = {}
    for plan in plans:
        if all(rule_named(step.rule).free for step in plan.steps):
            found[str(plan)] = 0
            continue
        try:
            found[str(plan)] = cost(rewrite(gm, plan)).macs - before
        except RewriteError as cause:
            log.warning("plan %r: %s", str(plan), cause)
    return found


class _CandidateError(Exception):
    """Marks an exception that a candidate raised, and not the user's data."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _session_runner(session: Session) -> Callable[[Tensor], list[Tensor]]:
    return lambda x: [torch.from_numpy(o) for o in session.run(x)]


def _flat(outputs: Any) -> list[Tensor]:
    return [o for o in pytree.tree_leaves(outputs) if isinstance(o, Tensor)]


def _weights(count: int) -> NDArray[np.float64]:
    """(REPLICATES, count) how often each sample is in each bootstrap sample."""
    index = resampled_indices(count, REPLICATES)
    return np.stack([np.bincount(row, minlength=count) for row in index]).astype(np.float64)


def _join(targets: list[Any]) -> Any:
    if not targets:
        return None
    if all(isinstance(t, Tensor) for t in targets):
        return torch.cat(targets)
    return [item for part in targets for item in part]
