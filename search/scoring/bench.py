"""Run one plan: rewrite, fit, quantize, open it on the target's kernels, compare its outputs with the float network's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rewriter import Plan, Quantized, cost
from rewriter.assemble import Assembled, assemble
from rewriter.damage import fidelity_of
from rewriter.errors import RewriteError
from rewriter.graph import channels_last
from rewriter.int8 import QuantScheme
from rewriter.int8.onnx import ReadBack, float_onnx
from rewriter.plan import rule_named
from rewriter.storage import Store
from search.data.evaluation_set import SampleSet, Tick, check_outputs
from search.engines import OnnxRuntime, engine_named, open_and_read
from search.latency.price import price_of, price_of_plan
from search.latency.table import Table
from search.pareto.limits import size_of, with_file, with_price
from search.run_dir.scores import Records, Samples, Score
from search.scoring.failure import CandidateError, blamed, failed
from search.scoring.measure import Measure, Part, Runner, latency
from search.scoring.racing import Race
from search.tasks import Task

FEW = 2  # inputs whose ranges stand for the calibration where only the kernels matter


@dataclass
class Once:
    """What is computed of the float network once, for all benches that are made from one another.

    Attributes:
        of: The network and the samples that it is of; a bench with others computes it anew.
        reference: Flat float outputs.
        measure: What compares with them.
        plain_ms: What the file of plain int8 takes, by the table of kernels.
    """

    of: tuple[fx.GraphModule, SampleSet] | None = None
    reference: list[Tensor] | None = None
    measure: Measure | None = None
    plain_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Everything that a plan is run with; it never changes.

    Attributes:
        gm: Profiled canonical graph of the float network.
        scheme: The target.
        task: The metric; the damage is that of ``gm``.
        calibration: Unlabelled inputs, (n, ...) each.
        samples: What the plans are compared on.
        records: Where scores are kept; their folder keeps what went wrong too.
        engine: Name of what runs the int8 networks, one of ``search.engines.ENGINES``.
        device: Where torch runs; the kernels always run on the CPU.
        store: Where fitted weights are kept.
        seed: Of the fits.
        threads: Of engines that run on the CPU.
        timed: Whether a score carries the time that one input takes.
        table: Times of kernels, by which a score carries what its file takes; None: it does not.
        maker: Makes a plan's network; None: rewriting and fitting alone.
        tick: Told how many samples are run.
        once: What was computed of the float network already.
    """

    gm: fx.GraphModule
    scheme: QuantScheme
    task: Task
    calibration: Sequence[Tensor]
    samples: SampleSet
    records: Records
    engine: str = "onnxruntime"
    device: str = "cpu"
    store: Store | None = None
    seed: int = 0
    threads: int = 2
    timed: bool = False
    table: Table | None = None
    maker: Callable[[Plan], Assembled] | None = None
    tick: Tick = lambda done, total: None
    once: Once = field(default_factory=Once, repr=False, compare=False)

    @property
    def failures(self) -> Path | None:
        """Where tracebacks of plans that failed are kept; None: nowhere."""
        return None

    def assembled(self, plan: Plan) -> Assembled:
        """A plan's network, quantized.

        Raises:
            RewriteError: the plan cannot be carried out.
        """
        if self.maker is not None:
            return self.maker(plan)
        return assemble(
            self.gm, plan, self.scheme, self.calibration, self.store, self.seed, self.device
        )

    def measure(
        self, plan: Plan, parts: Sequence[Part], race: Race | None = None
    ) -> list[tuple[Score, Samples | None]]:
        """Scores of a plan on some parts of the samples, whether it is known or not; nothing is stored.

        With a race there is one part, which starts at 0, and a plan that is clearly not on the front
        is given up early.

        Raises:
            ConfigError: the user's data set or metric fails.
        """
        start = time.perf_counter()
        for part in parts:
            # what is wrong with the user's code is not the plan's fault
            self.measured.float_metric(part)
        macs = cost(self.gm).macs
        unscored = known = self.unscored(plan, macs)
        try:
            known, runner, gm = self._candidate(plan)
            known = replace(
                known,
                engine=unscored.engine,
                engine_version=unscored.engine_version,
                macs_ratio=known.macs / max(macs, 1),
            )
            outputs, stopped = self._raced(runner, known, parts[-1][1], race)
            if stopped is not None:
                return [_finished(*stopped, start)]
            in_float = self._in_float(plan, gm, parts[-1][1])
        except CandidateError as failure:
            lost = failed(known, failure.cause, parts, self.failures)
            return [_finished(s, None, start) for s in lost]
        found: list[tuple[Score, Samples | None]] = []
        for first, last in parts:
            score, samples = self.measured.compare([o[first:last] for o in outputs], (first, last))
            metric = self._metric_in_float(in_float, (first, last))
            score = replace(filled(score, known), metric_float=metric)
            found.append(_finished(score, samples, start))
        return found

    def reference(self) -> list[Tensor]:
        """Flat float outputs over all samples, each (n, ...); computed once."""
        once = self.once
        if once.of is None or once.of[0] is not self.gm or once.of[1] is not self.samples:
            found = [o.cpu() for o in self._run_torch(self.samples.batches())]
            check_outputs(found, self.samples.count)
            once.of, once.reference, once.measure = (self.gm, self.samples), found, None
        assert once.reference is not None
        return once.reference

    @property
    def measured(self) -> Measure:
        """What outputs are compared by."""
        known = self.once.measure
        if known is None or known.task is not self.task or known.samples is not self.samples:
            fidelity = fidelity_of(self.gm, self.calibration)
            known = self.once.measure = Measure(self.task, fidelity, self.samples, self.reference)
        return known

    def runner(self, quantized: Quantized) -> Runner:
        """What turns a batch of inputs into flat int8 outputs on this evaluator's engine."""
        return self.opened(engine_named(self.engine).emit(quantized))

    def opened(self, model: Any) -> Runner:
        """The same of what the engine has emitted."""
        return engine_named(self.engine).open(model, self.threads, self.device).run

    def opened_and_read(self, quantized: Quantized, model: Any) -> tuple[Runner, ReadBack]:
        """The same, and what of it runs in int8: a file is opened once for both."""
        engine = engine_named(self.engine)
        session, found = open_and_read(engine, quantized, model, self.threads, self.device)
        return session.run, found

    def unscored(self, plan: Plan, macs: int, limit_s: float | None = None) -> Score:
        """A plan of which nothing is known but what would run it."""
        version = engine_named(self.engine).version()
        return Score(str(plan), macs, engine=self.engine, engine_version=version, limit_s=limit_s)

    def _candidate(self, plan: Plan) -> tuple[Score, Runner, fx.GraphModule]:
        """What a plan costs, what runs it, and its float network.

        Raises:
            CandidateError: the plan cannot be carried out.
        """
        with blamed():
            quantized = self.assembled(plan).quantized
            engine = engine_named(self.engine)
            model = engine.emit(quantized)
            runner, found = self.opened_and_read(quantized, model)
            known = with_file(size_of(plan, quantized.gm), found)
        if self.table is not None and self.engine == OnnxRuntime.name:
            (x,) = self.samples.batches(1, 0, 1)
            with blamed():
                price = price_of(model, x, self.table)
            plain = self.plain_ms()
            known = with_price(known, price, plain or price.milliseconds)
        if self.timed:
            (x,) = self.samples.batches(1, 0, 1)
            with blamed():
                known = replace(known, latency_ms=latency(runner, x))
        return known, runner, quantized.gm

    def plain_ms(self) -> float | None:
        """What the file of plain int8 takes by the table; None without one, or where it cannot be made. Computed once."""
        if self.table is None or self.engine != OnnxRuntime.name:
            return None
        if self.once.plain_ms is None:
            few = self.calibration[0][:FEW]
            found = price_of_plan(self.gm, Plan(()), self.scheme, few, self.table)
            self.once.plain_ms = found.milliseconds
        return self.once.plain_ms

    def _raced(
        self, runner: Runner, known: Score, count: int, race: Race | None
    ) -> tuple[list[Tensor], tuple[Score, Samples] | None]:
        """Outputs over the first samples; where the plan is given up, its score so far too."""
        plan = Plan.parse(known.plan)
        looks = [count] if race is None else race.looks(plan, count)
        found: list[list[Tensor]] = []
        done = 0
        for look in looks:
            found.append(self._run(runner, done, look))
            done = look
            outputs = [torch.cat(parts) for parts in zip(*found, strict=True)]
            if not all(bool(torch.isfinite(o).all()) for o in outputs if o.is_floating_point()):
                raise CandidateError(
                    RewriteError("the int8 network's outputs are NaN or infinite")
                )
            if race is not None and look < count:
                score, samples = self.measured.compare(outputs, (0, look))
                score = replace(filled(score, known), stopped=True)
                if race.lost(score, samples, count):
                    return outputs, (score, samples)
            found = [outputs]
        return found[0], None

    def _run(self, runner: Runner, start: int, stop: int) -> list[Tensor]:
        """Outputs over some samples; what the candidate raises, not the data set, is marked."""
        found: list[list[Tensor]] = []
        done = start
        with torch.no_grad():
            for x in self.samples.batches(start=start, stop=stop):
                with blamed():
                    found.append([o.cpu() for o in runner(x)])
                done += len(x)
                self.tick(done, self.samples.count)
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _run_torch(self, inputs: Iterator[Tensor]) -> list[Tensor]:
        gm = self.gm.to(self.device)
        found: list[list[Tensor]] = []
        with torch.no_grad():
            for x in inputs:
                x = x.to(self.device)
                found.append([o.cpu() for o in _flat(gm(channels_last(x)))])
        gm.to("cpu")
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _in_float(self, plan: Plan, gm: fx.GraphModule, count: int) -> list[Tensor] | None:
        """Outputs of the rewritten network in float; None where no step changes what it computes."""
        if self.samples.targets is None:
            return None
        exact = all(rule_named(step.rule).contract != "approximate" for step in plan.steps)
        if exact and self.maker is None:
            return None
        if engine_named(self.engine).on_device:
            return self._run(lambda x: _flat(gm(x)), 0, count)
        with blamed():
            # the float network of every file: this runtime is always there, and fast
            session = OnnxRuntime().open(float_onnx(gm), self.threads, self.device)
        return self._run(session.run, 0, count)

    def _metric_in_float(self, outputs: list[Tensor] | None, part: Part) -> float | None:
        if outputs is None:
            return self.measured.float_metric(part)[0]
        return self.measured.metric([o[slice(*part)] for o in outputs], part)


def filled(measured: Score, known: Score) -> Score:
    """What was measured, of the plan whose costs are known."""
    return replace(
        known,
        metric=measured.metric,
        interval=measured.interval,
        original=measured.original,
        damage=measured.damage,
        samples=measured.samples,
    )


def _finished(score: Score, samples: Samples | None, start: float) -> tuple[Score, Samples | None]:
    return replace(score, seconds=round(time.perf_counter() - start, 3)), samples


def _flat(outputs: Any) -> list[Tensor]:
    return [o for o in pytree.tree_leaves(outputs) if isinstance(o, Tensor)]
