"""From a plan to its score: rewrite, fit, quantize, run on the target's kernels, compare.

The images are decoded once, the float outputs are computed once, and a plan is scored once:
scores live in the run directory under a fingerprint of all that they depend on. Plans are chosen
by their scores on the first samples; the others are held back, to confirm what was chosen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rewriter import Plan, Quantized, cost
from rewriter.assemble import Assembled, assemble, prepare
from rewriter.damage import fidelity_of
from rewriter.errors import RewriteError
from rewriter.graph import channels_last
from rewriter.int8 import QuantScheme
from rewriter.int8.onnx import float_onnx
from rewriter.plan import rule_named
from rewriter.storage import Store
from search.data.evaluation_set import SampleSet, Tick, check_outputs
from search.engines import OnnxRuntime, engine_named, read_back
from search.pareto.limits import size_of, with_file
from search.run_dir.scores import Baseline, Confirmations, Records, Samples, Score
from search.scoring.child_process import LateError, LostError, apart
from search.scoring.failure import CandidateError, blamed, failed, to_be_tried_again
from search.scoring.measure import Measure, Part, Runner, latency
from search.scoring.racing import Race
from search.tasks import Task

log = logging.getLogger(__name__)


@dataclass
class RewriteEvaluator:
    """Scores plans of one network; call it with a plan.

    Attributes:
        gm: Profiled canonical graph of the float network.
        scheme: The target.
        task: The metric; the damage is that of ``gm``.
        calibration: Unlabelled inputs, (n, ...) each.
        samples: What the plans are compared on.
        records: Where scores are kept.
        engine: Name of what runs the int8 networks, one of ``search.engines.ENGINES``.
        device: Where torch runs; the kernels always run on the CPU.
        store: Where fitted weights are kept.
        seed: Of the fits.
        threads: Of engines that run on the CPU.
        confirmations: Where scores of chosen plans on all samples are kept, and how many of the
            samples choose. None: all samples choose, and none confirm.
        race: When a plan is given up early; None: never.
        timed: Whether a score carries the time that one input takes.
        limit_s: Seconds after which a plan is given up as one that cannot be scored; it then runs
            in a process of its own. None: here, for as long as it takes.
        maker: Makes a plan's network; None: rewriting and fitting alone.
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
    confirmations: Confirmations | None = None
    race: Race | None = None
    timed: bool = False
    limit_s: float | None = None
    maker: Callable[[Plan], Assembled] | None = None
    tick: Tick = lambda done, total: None
    _reference: list[Tensor] | None = field(default=None, init=False)
    _measure: Measure | None = field(default=None, init=False)
    _plain: RewriteEvaluator | None = field(default=None, init=False)

    def __call__(self, plan: Plan, *, whole: bool = False) -> Score:
        """The score of a plan on the samples that choose, from the records where it is known.

        A plan that cannot be carried out or run is a score with an error, so that a search goes
        on without it.

        Args:
            plan: What to score.
            whole: Not to be given up early, and scored again where it was.

        Raises:
            ConfigError: the user's data set or metric fails.
            OSError: the disk is full.
        """
        known = self.records.get(str(plan))
        if known is not None and not (whole and known.stopped) and not self._lacking(known):
            return known
        self.reference()  # before another process is made, which then has it too
        race = not whole and self.race is not None
        score, samples = self._elsewhere("measure_racing" if race else "measure", plan)
        self.records.add(score, samples)
        if score.error is not None:
            log.warning("plan %r: %s", score.plan, score.error)
        return score

    def measure(self, plan: Plan) -> tuple[Score, Samples | None]:
        """Score a plan whether or not it is known; nothing is stored."""
        (found,) = self._measured(plan, [self.chosen_on], None)
        return found

    def measure_racing(self, plan: Plan) -> tuple[Score, Samples | None]:
        """The same, but a plan that is clearly not on the front may be given up early."""
        (found,) = self._measured(plan, [self.chosen_on], self.race)
        return found

    def measure_whole(self, plan: Plan) -> list[tuple[Score, Samples | None]]:
        """Scores on the samples that choose, on those held back, and on all of them."""
        count, (_, chosen) = self.samples.count, self.chosen_on
        return self._measured(plan, [(0, chosen), (chosen, count), (0, count)], None)

    def confirm(self, plan: Plan) -> Score:
        """The score of a plan on all samples; what it is on those held back is stored beside it.

        Where none are held back this is the plan's score.
        """
        kept = self.confirmations
        if kept is None:
            return self(plan, whole=True)
        known = kept.whole.get(str(plan))
        if known is not None and str(plan) in kept.held and not self._lacking(known):
            return known
        self.reference()
        chosen, held, whole = self._elsewhere("measure_whole", plan)
        if str(plan) not in self.records:
            self.records.add(*chosen)
        kept.held.add(*held)
        kept.whole.add(*whole)
        return whole[0]

    @property
    def chosen_on(self) -> Part:
        """The samples that choose among plans."""
        kept = self.confirmations
        return 0, self.samples.count if kept is None else kept.chosen_on

    def _elsewhere(self, method: str, plan: Plan) -> Any:
        """What a method says of a plan, in a process of its own where there is a time limit."""
        action = partial(getattr(self, method), plan)
        if self.limit_s is None:
            return action()
        self.measured.float_metric(self.chosen_on)  # once, and not in each child
        prepare(self.gm, self.calibration, self.store)
        try:
            return apart(action, self.limit_s)
        except LostError as cause:
            count, (_, chosen) = self.samples.count, self.chosen_on
            parts = [(0, chosen), (chosen, count), (0, count)]
            late = self.limit_s if isinstance(cause, LateError) else None
            macs = cost(self.gm).macs
            known = self._unscored(plan, macs, late)
            lost = [(score, None) for score in failed(known, cause, parts, self.records.folder)]
            return lost if method == "measure_whole" else lost[0]

    def _lacking(self, score: Score) -> bool:
        """Whether a score has no time where one is asked for, or failed for want of time that there is now."""
        untimed = self.timed and score.error is None and score.latency_ms is None
        return untimed or to_be_tried_again(score, self.limit_s)

    def _measured(
        self, plan: Plan, parts: list[Part], race: Race | None
    ) -> list[tuple[Score, Samples | None]]:
        """Scores of a plan on some parts of the samples; with a race, of one part that starts at 0."""
        start = time.perf_counter()
        for part in parts:
            # what is wrong with the user's code is not the plan's fault
            self.measured.float_metric(part)
        macs = cost(self.gm).macs
        unscored = known = self._unscored(plan, macs)
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
            return [
                _finished(s, None, start)
                for s in failed(known, failure.cause, parts, self.records.folder)
            ]
        found: list[tuple[Score, Samples | None]] = []
        for first, last in parts:
            score, samples = self.measured.compare([o[first:last] for o in outputs], (first, last))
            metric = self._metric_in_float(in_float, (first, last))
            score = replace(_filled(score, known), metric_float=metric)
            found.append(_finished(score, samples, start))
        return found

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

    def made_by(self, maker: Callable[[Plan], Assembled], records: Records) -> RewriteEvaluator:
        """The same on all samples, for networks that are made otherwise and recorded elsewhere."""
        own = {"confirmations": None, "race": None, "limit_s": None}
        other = replace(self, maker=maker, records=records, **own)
        other._plain = self
        return other

    def _candidate(self, plan: Plan) -> tuple[Score, Runner, fx.GraphModule]:
        """What a plan costs, what runs it, and its float network.

        Raises:
            CandidateError: the plan cannot be carried out.
        """
        with blamed():
            quantized = self.assembled(plan).quantized
            engine = engine_named(self.engine)
            model = engine.emit(quantized)
            known = with_file(size_of(plan, quantized.gm), read_back(engine, quantized, model))
            runner = engine.open(model, self.threads, self.device).run
        if self.timed:
            (x,) = self.samples.batches(1, 0, 1)
            with blamed():
                known = replace(known, latency_ms=latency(runner, x))
        return known, runner, quantized.gm

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
                score = replace(_filled(score, known), stopped=True)
                if race.lost(score, samples, count):
                    return outputs, (score, samples)
            found = [outputs]
        return found[0], None

    def baseline(self) -> Baseline:
        """The network as it is, on all samples; the empty plan is scored where it is not yet.

        Raises:
            RewriteError: the network itself cannot be run in int8.
        """
        score = (self._plain or self).confirm(Plan(()))
        if score.error is not None:
            raise RewriteError(f"the network as it is cannot be scored: {score.error}")
        return Baseline(
            score.original,
            score.metric,
            score.macs,
            score.damage,
            score.interval,
            score.int8_share,
            score.float_ops,
        )

    def reference(self) -> list[Tensor]:
        """Flat float outputs over all samples, each (n, ...); computed once."""
        if self._reference is None:
            self._reference = [o.cpu() for o in self._run_torch(self.gm, self.samples.batches())]
            check_outputs(self._reference, self.samples.count)
        return self._reference

    @property
    def measured(self) -> Measure:
        """What outputs are compared by."""
        if self._measure is None or self._measure.task is not self.task:
            self._measure = Measure(
                self.task, fidelity_of(self.gm, self.calibration), self.samples, self.reference
            )
        return self._measure

    def runner(self, quantized: Quantized) -> Runner:
        """What turns a batch of inputs into flat int8 outputs on this evaluator's engine."""
        engine = engine_named(self.engine)
        return engine.open(engine.emit(quantized), self.threads, self.device).run

    def _unscored(self, plan: Plan, macs: int, limit_s: float | None = None) -> Score:
        version = engine_named(self.engine).version()
        return Score(str(plan), macs, engine=self.engine, engine_version=version, limit_s=limit_s)

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

    def _run_torch(self, gm: fx.GraphModule, inputs: Iterator[Tensor]) -> list[Tensor]:
        gm = gm.to(self.device)
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


def _filled(measured: Score, known: Score) -> Score:
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
