"""The run directory: what is known about each plan, on disk, safe from a kill.

``run.json`` says of which model, data and target the directory speaks; ``scores.jsonl`` holds one
line per scored plan and is only ever appended to; ``samples/KEY.npz`` holds the per-sample values
behind a line, so that two plans can be compared sample by sample without scoring either of them
again.
"""

from __future__ import annotations

import io
import json
import logging
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.storage import Place, replacing, short
from search.run_dir.files import REMEDY, RunError, append, finite, mend, read_json, write_json
from search.run_dir.shared_scores import Exchange
from search.run_dir.validation import checked, fault_of_run

log = logging.getLogger(__name__)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """What one plan costs and keeps.

    Attributes:
        plan: Text of the plan; empty for the network as it is.
        macs: Multiply-accumulates per input; ``macs_ratio`` is relative to the network as it is.
        weight_bytes: Bytes of the stored weights under the target.
        float_layers: Weighted layers left in float, in ``float_islands`` connected groups.
        latency_ms: Median milliseconds for one input in ONNX Runtime on the machine that scored
            the plan; None where nobody asked for it.
        predicted_ms: The same on one thread, by the table of kernels (`search.latency`): equal files give equal
            numbers. None where the engine is another.
        latency_ratio: That, relative to the file of plain int8.
        price: What else the file costs: ``int8_macs``, ``float_macs``, ``bytes_moved``, ``operators``, ``reorders``
            (how many operators only change the layout of values) and ``bytes`` (of the file).
        metric: The task's metric of the int8 network, None without labels or where the plan
            failed.
        interval: 95 % interval of ``metric``, paired with the float network on the same samples.
        original: The metric of the network as it is, in float, on the same samples.
        metric_float: The metric of the rewritten network in float.
        damage: Fidelity damage to the float network, lower is better; see the task.
        engine: What computed the int8 outputs, such as ``onnxruntime`` or ``simulate``.
        engine_version: Version of that runtime.
        int8_share: Share of the MACs that the file computes on int8 kernels, in [0, 1]; None where a
            version scored the plan that did not look. So are the next two.
        float_ops: How many operators of each kind run in float in the file.
        float_reasons: Why layers with weights run in float in it, by name.
        samples: How many samples these numbers are of.
        stopped: Whether the plan was given up after so many samples, because it was clear that it
            is not on the front. Its numbers are no substitute for those on all of them.
        error: Why the plan could not be scored; all measured fields are then None.
        error_kind: The class of what went wrong, such as ``PlanError``.
        traceback: Where it went wrong: a file in the run directory.
        limit_s: Seconds after which it was given up, where it failed because it took longer.
    """

    plan: str
    macs: int
    params: int = 0
    weight_bytes: int = 0
    macs_ratio: float = 1.0
    float_layers: int = 0
    float_islands: int = 0
    latency_ms: float | None = None
    predicted_ms: float | None = None
    latency_ratio: float | None = None
    price: dict[str, int] | None = field(default=None, hash=False)
    metric: float | None = None
    interval: tuple[float, float] | None = None
    original: float | None = None
    metric_float: float | None = None
    damage: float | None = None
    engine: str = ""
    engine_version: str = ""
    int8_share: float | None = None
    # scores are keys of what is worked out from them
    float_ops: dict[str, int] | None = field(default=None, hash=False)
    float_reasons: dict[str, str] | None = field(default=None, hash=False)
    samples: int = 0
    seconds: float = 0.0
    stopped: bool = False
    error: str | None = None
    error_kind: str | None = None
    traceback: str | None = None
    limit_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a value that is not finite becomes None."""
        return {key: finite(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Score:
        """The score that `to_dict` gave; keys of a later version are ignored.

        Raises:
            ValueError: a value has another type.
        """
        known = {f.name for f in fields(cls)}
        kept = {key: value for key, value in values.items() if key in known}
        if kept.get("interval") is not None:
            low, high = kept["interval"]
            kept["interval"] = (low, high)
        return checked(cls, kept)


@dataclass(frozen=True)
class Samples:
    """Per-sample values of one scored plan.

    Attributes:
        damage: (n,) damage of each sample.
        metric: (n,) contribution of each sample; its mean is the metric. None where the metric is
            not a mean.
        replicates: (r,) metric on r shared bootstrap samples, where ``metric`` is None and there
            are labels.
    """

    damage: Array
    metric: Array | None = None
    replicates: Array | None = None

    def arrays(self) -> dict[str, Array]:
        named = {"damage": self.damage, "metric": self.metric, "replicates": self.replicates}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Baseline:
    """The network as it is: metric in float and in int8, cost, the damage that int8 does, and what its file does in int8."""

    float: float | None
    int8: float | None
    macs: int
    damage: float | None
    interval: tuple[float, float] | None = None
    int8_share: float | None = None
    float_ops: dict[str, int] | None = field(default=None, hash=False)

    @classmethod
    def of(cls, score: Score) -> Baseline:
        """What the score of the empty plan says."""
        return cls(
            score.original,
            score.metric,
            score.macs,
            score.damage,
            score.interval,
            score.int8_share,
            score.float_ops,
        )


@dataclass
class Records:
    """Scores by plan, kept in memory and in a run directory.

    Attributes:
        folder: The run directory; created when missing.
        fingerprint: Identity of everything that a score depends on except the plan; a line
            written under another fingerprint is left in the file and ignored.
        shared: Where scores are exchanged with other run directories; None: nowhere.
    """

    folder: Path
    fingerprint: str
    shared: Place | None = None
    _exchange: Exchange | None = field(default=None, init=False)
    _scores: dict[str, Score] = field(default_factory=dict[str, Score], init=False)
    _offset: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "samples").mkdir(exist_ok=True)
        mend(self.path)
        if self.shared is not None:
            self._exchange = Exchange.of(self.shared, self.fingerprint)
        self.refresh()
        if self._exchange is not None:  # what could not be shared when it was scored
            for score in self.scores():
                if not self._exchange.knows(score.plan, self._line(score)):
                    samples = self.samples(score.plan)
                    values = None if samples is None else _packed(samples)
                    self._exchange.put(score.plan, self._line(score), values)

    @property
    def path(self) -> Path:
        return self.folder / "scores.jsonl"

    def refresh(self) -> None:
        """Read what other processes have appended since the last look, and what others have shared."""
        self._read()
        for line, values in () if self._exchange is None else self._exchange.news():
            record = _record(line)
            if record is None or record["fingerprint"] != self.fingerprint:
                log.warning("%s: a shared score is unreadable, left out", self.shared)
                continue
            score = Score.from_dict(record["score"])
            known = self._scores.get(score.plan)
            if known is not None and _fuller(score) <= _fuller(known):
                continue
            if values is not None:
                with replacing(self._samples_path(score.plan), "wb") as file:
                    file.write(values)
            append(self.path, self._line(score), sync=True)
            self._take(score)

    def _read(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # still being written by another process
                    break
                self._offset += len(line)
                record = _record(line)
                if record is not None and record["fingerprint"] == self.fingerprint:
                    self._take(Score.from_dict(record["score"]))

    def get(self, plan: str) -> Score | None:
        return self._scores.get(plan)

    def samples(self, plan: str) -> Samples | None:
        """Per-sample values of a plan, None where it has none or its file is lost."""
        path = self._samples_path(plan)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                return Samples(**{name: stored[name] for name in stored.files})
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as damage:
            log.warning("%s: unreadable, left out: %s", path, str(damage).partition("\n")[0])
            return None

    def add(self, score: Score, samples: Samples | None = None) -> None:
        """Store a score for good: its samples, then its line, on disk before this returns."""
        values = None if samples is None else _packed(samples)
        if values is not None:
            with replacing(self._samples_path(score.plan), "wb") as file:
                file.write(values)
        append(self.path, self._line(score), sync=True)
        self._take(score)
        if self._exchange is not None:
            self._exchange.put(score.plan, self._line(score), values)

    def _line(self, score: Score) -> bytes:
        content = {"fingerprint": self.fingerprint, "score": score.to_dict()}
        return json.dumps(content).encode() + b"\n"

    def _take(self, score: Score) -> None:
        """Keep the first score of a plan, until one says more: after more time, on all samples, or with a time."""
        known = self._scores.get(score.plan)
        if known is None or _fuller(score) > _fuller(known):
            self._scores[score.plan] = score

    def scores(self) -> list[Score]:
        """All scores in the order in which they were stored."""
        return list(self._scores.values())

    def __contains__(self, plan: str) -> bool:
        return plan in self._scores

    def __len__(self) -> int:
        return len(self._scores)

    def _samples_path(self, plan: str) -> Path:
        key = short(f"{self.fingerprint}\n{plan}")
        return self.folder / "samples" / f"{key}.npz"


@dataclass(frozen=True)
class Confirmations:
    """Scores of the plans that were chosen, on samples that had no part in the choice.

    Attributes:
        chosen_on: Plans are chosen by the first so many samples.
        held: Scores on the others.
        whole: Scores on all of them.
    """

    chosen_on: int
    held: Records
    whole: Records

    @classmethod
    def of(cls, records: Records, chosen_on: int) -> Confirmations:
        """Kept in the files of `records`, under fingerprints of their own."""
        held, whole = (
            Records(records.folder, f"{records.fingerprint}-{part}", records.shared)
            for part in ("held", "whole")
        )
        return cls(chosen_on, held, whole)


def read_run(folder: Path) -> dict[str, Any]:
    """The content of ``run.json``.

    Raises:
        RunError: The file is missing, damaged, or has values that no run writes.
    """
    path = folder / "run.json"
    facts = read_json(path)
    fault = fault_of_run(facts)
    if fault:
        raise RunError(f"{path}: {fault}; {REMEDY}")
    return facts


def open_run(folder: Path, parts: Mapping[str, str], about: Mapping[str, Any]) -> tuple[str, ...]:
    """Claim a run directory for a model, data and target, or continue the one that is there.

    Args:
        folder: The run directory.
        parts: Hash of every ingredient of a score by name; those named ``model``,
            ``calibration``, ``evaluation`` and ``target`` say which run this is, the others
            (metric and rule code) may change between two runs.
        about: Facts to keep beside them, for people.

    Returns:
        The names of the ingredients that have changed since the last run, whose old scores do not
        count any more.

    Raises:
        RunError: The directory belongs to another model, data or target.
    """
    path = folder / "run.json"
    changed: tuple[str, ...] = ()
    if path.exists():
        before: dict[str, str] = read_run(folder).get("parts", {})
        changed = tuple(name for name in parts if before.get(name, parts[name]) != parts[name])
        other = [
            name for name in changed if name in ("model", "calibration", "evaluation", "target")
        ]
        if other:
            raise RunError(
                f"{folder}: holds a run of another {' and '.join(other)}: "
                "choose another directory with --out, or remove this one"
            )
    elif folder.exists() and any(folder.iterdir()) and not (folder / "scores.jsonl").exists():
        known = {"sensitivity.json", "fits", "config.yaml"}
        strange = sorted(
            p.name for p in folder.iterdir() if p.name not in known and not p.name.startswith(".")
        )
        if strange:
            raise RunError(
                f"{folder}: not empty and not a run directory: {strange[0]}: "
                "choose another with --out"
            )
    known = read_json(path) if path.exists() else {}
    write_json(path, {**known, "format": 1, **about, "parts": dict(parts)})
    return changed


def note(folder: Path, **facts: Any) -> None:
    """Add facts about a run to its ``run.json``."""
    path = folder / "run.json"
    write_json(path, {**read_json(path), **facts})


def fingerprint(parts: Mapping[str, str]) -> str:
    """One hash of all ingredients."""
    return short(json.dumps(dict(sorted(parts.items()))))


def _packed(samples: Samples) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **samples.arrays())
    return stream.getvalue()


def _fuller(score: Score) -> tuple[float, bool, bool]:
    waited = math.inf if score.limit_s is None else score.limit_s
    return waited, not score.stopped, score.latency_ms is not None


def _record(line: bytes) -> dict[str, Any] | None:
    """One line of ``scores.jsonl``; None where it is damaged (it is then scored again)."""
    try:
        record = json.loads(line)
        Score.from_dict(record["score"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if "fingerprint" in record else None
