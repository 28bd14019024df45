"""Plans before and after fine-tuning, and the control: the same training without the rewrite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rewriter import Plan, Quantized, RewriteError, simulate
from rewriter.assemble import Assembled, record, repaired, restored, rewritten
from rewriter.graph import copy_graph
from rewriter.int8 import learnable
from rewriter.plan import rule_named
from rewriter.storage import key, load, save_to
from search.config.schema import FinetuneConfig
from search.data.evaluation_set import Tick
from search.finetune.data import Pool, pool_of
from search.finetune.train import Trained, Training
from search.job import Job, Progress, silent
from search.run_dir.files import read_json
from search.run_dir.scores import Records, Score, note
from search.scoring.evaluator import RewriteEvaluator

VERSION = 1  # raised when the result of a training changes


@dataclass
class Finetuner:
    """Trains plans of a run by one recipe, and scores them on the run's own evaluation images.

    Attributes:
        job: The run.
        options: The recipe.
    """

    job: Job
    options: FinetuneConfig
    pool: Pool = field(init=False)
    evaluator: RewriteEvaluator = field(init=False)
    _made: dict[Plan, tuple[Assembled, Trained]] = field(
        default_factory=dict[Plan, tuple[Assembled, Trained]], init=False
    )

    def __post_init__(self) -> None:
        cfg = self.job.cfg
        configured = cfg.model_copy(update={"finetune": self.options}).read_from(cfg.path)
        self.pool = pool_of(configured, self.job.data)
        self.job.evaluator.reference()  # computed once for both
        records = Records(self.job.folder, trained_records(self.job.records, self.pool.digest))
        self.evaluator = self.job.evaluator.made_by(lambda plan: self.network(plan)[0], records)

    def score(self, plan: Plan, progress: Progress = silent) -> tuple[Score, Trained]:
        """What a plan reaches after training, and how the training went; from the records where it is known.

        Raises:
            ConfigError: the user's data set fails.
            RewriteError: the plan cannot be carried out.
        """
        with progress(f"training {str(plan) or 'the network as it is'}"[:60]) as tick:
            trained = self.network(plan, tick)[1]  # what fails here is no property of the plan
        return self.evaluator(plan), trained

    def network(
        self, plan: Plan, tick: Tick = lambda done, total: None
    ) -> tuple[Assembled, Trained]:
        """A plan's network, trained; resumes interrupted training."""
        if plan in self._made:
            return self._made[plan]
        job, store = self.job, self.job.folder / "fits"
        name = key([job.records.fingerprint, self.pool.digest, str(plan), str(VERSION)])
        start = job.evaluator.assembled(plan)
        found = load(store, name)
        if found is None:
            checkpoint = job.folder / "finetune" / f"{name[:32]}.pt"
            quantized, trained = self._train(plan, start.quantized, checkpoint, tick)
            tensors, facts = record(quantized)
            save_to(store, name, tensors, {**facts, "trained": asdict(trained)})
            checkpoint.unlink(missing_ok=True)
            found = tensors, {**facts, "trained": asdict(trained)}
        trained = Trained(**found[1]["trained"])
        gm = copy_graph(start.quantized.gm)
        made = Assembled(restored(gm, found, start.quantized.scheme), start.fits)
        self._made[plan] = made, trained
        return made, trained

    def _train(
        self, plan: Plan, start: Quantized, checkpoint: Path, tick: Tick
    ) -> tuple[Quantized, Trained]:
        """Train, then keep what does best in the simulation: trained ranges, ranges calibrated again, or nothing trained."""
        own = self.job.evaluator
        learned = None
        if self.options.quantization == "float":
            given = own.scheme, own.calibration, own.store, own.seed, own.device
            gm = rewritten(own.gm, plan, *given)
            for parameter in gm.parameters():
                parameter.requires_grad_(True)
        else:
            learned = learnable(start, ranges=self.options.quantization == "learned")
            gm = learned.gm
        training = Training(
            gm,
            copy_graph(own.gm),
            own.task,
            self.pool,
            self.options,
            own.device,
            checkpoint,
        )
        trained = training.run(tick)
        candidates = [start]
        if learned is not None:
            candidates.append(learned.quantized())
            gm = copy_graph(candidates[-1].gm)
        for parameter in gm.parameters():
            parameter.requires_grad_(False)
        candidates.append(repaired(gm, own.scheme, own.calibration))
        losses = [
            training.loss(simulate(c, kernels=True).to(own.device).eval()) for c in candidates
        ]
        best = min(range(len(candidates)), key=losses.__getitem__)
        if not losses[best] < float("inf"):
            raise RewriteError(f"plan {plan}: fine-tuned: the loss is not finite in int8")
        return candidates[best], trained


@dataclass(frozen=True)
class Finetuned:
    """A plan before and after training, all on the same images.

    Attributes:
        before: As searched.
        after: Trained.
        recipe: Loss and quantization of the training.
        trained: How it went.
        control: The same training without the plan's rewrites that cost MACs; None where that is
            the plan itself.
    """

    before: Score
    after: Score
    recipe: Mapping[str, Any]
    trained: Mapping[str, Any]
    control: Finetuned | None = None

    def to_dict(self) -> dict[str, Any]:
        """``finetuned`` of a point in ``front.json``."""
        described = {key: self.recipe.get(key) for key in ("loss", "quantization")}
        control = None
        if self.control is not None:
            control = {"plan": self.control.after.plan, **self.control.to_dict()}
            control.pop("control")
        return {
            **_measured(self.after),
            **described,
            **self.trained,
            "before": _measured(self.before),
            "control": control,
        }


def _measured(score: Score) -> dict[str, Any]:
    return {
        "int8": score.metric,
        "int8_interval": None if score.interval is None else list(score.interval),
        "float": score.metric_float,
        "damage": score.damage,
        "samples": score.samples,
        "engine": score.engine,
        "error": score.error,
    }


def control_of(plan: Plan) -> Plan | None:
    """The free steps of a plan; nothing where all are free; None where there is no step to leave out."""
    free = Plan(tuple(s for s in plan.steps if rule_named(s.rule).free))
    if free != plan:
        return free
    return Plan(()) if plan.steps else None


def finetune(job: Job, plans: Sequence[Plan], progress: Progress = silent) -> None:
    """Train plans and their controls, score them, and note in ``run.json`` that they are.

    Raises:
        ConfigError: the data are too few, or the user's data set fails.
    """
    options = job.cfg.finetune
    tuner = Finetuner(job, options)
    known = read_json(job.folder / "run.json").get("finetune", {})
    if known.get("digest") != tuner.pool.digest:
        known = {"plans": {}, "trained": {}}  # of another recipe, whose scores stand elsewhere
    rows, trained = dict(known["plans"]), dict(known["trained"])
    for plan in plans:
        control = control_of(plan)
        for wanted in (plan, control):
            if wanted is not None:
                job.evaluator.score(wanted, "whole")
                trained[str(wanted)] = asdict(tuner.score(wanted, progress)[1])
        rows[str(plan)] = None if control is None else str(control)
        facts = {"digest": tuner.pool.digest, "options": options.model_dump(), "plans": rows}
        note(job.folder, finetune={**facts, "trained": trained})


def trained_records(records: Records, digest: str) -> str:
    """The fingerprint of the scores of plans trained by one recipe."""
    return f"{records.fingerprint}-finetuned-{digest[:16]}"


def read_finetuned(
    records: Records, facts: Mapping[str, Any], before: Mapping[str, Score]
) -> dict[str, Finetuned]:
    """What is fine-tuned in a run directory, by plan.

    Args:
        records: Of the run.
        facts: What ``run.json`` says.
        before: Scores of plans that were not trained, on all images.
    """
    noted: dict[str, Any] | None = facts.get("finetune")
    if noted is None:
        return {}
    kept = Records(records.folder, trained_records(records, noted["digest"]))

    def found(plan: str | None, control: Finetuned | None = None) -> Finetuned | None:
        score = None if plan is None else kept.get(plan)
        if plan is None or score is None or plan not in before:
            return None
        trained = noted["trained"].get(plan, {})
        return Finetuned(before[plan], score, noted["options"], trained, control)

    rows = {plan: found(plan, found(control)) for plan, control in noted["plans"].items()}
    return {plan: row for plan, row in rows.items() if row is not None}
