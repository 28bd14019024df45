"""Ship a plan of a run: the export, and for a video network the file for one chunk of frames at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rewriter import Plan, RewriteError
from search.export.export import Exported, export
from search.export.node_notes import annotate, node_notes
from search.export.streaming import export_stream
from search.job import Job
from search.pareto.plan_summary import places_of
from search.run_dir.scores import Score
from search.sensitivity.run import read_sensitivity


@dataclass(frozen=True)
class Shipped:
    """What was written; `refusal` says why there is no streaming file where one was wanted."""

    exported: Exported
    files: tuple[Path, ...]
    refusal: str = ""


def ship(job: Job, score: Score, folder: Path, compared: bool = False) -> Shipped:
    """Write a plan's network into a folder; arguments and errors as for `search.export.export.export`."""
    plan = Plan.parse(score.plan)
    exported = export(job.evaluator, plan, folder, score, compared)
    files, refusal = exported.files, ""
    if exported.quantized is not None:
        sensitivity = read_sensitivity(job.folder, job.records.fingerprint)
        notes = node_notes(exported.quantized.gm, sensitivity, places_of(job.gm))
        data = annotate(files[0], notes)
        files += () if data is None else (data,)
    if job.cfg.task == "video" and exported.quantized is not None:
        try:
            files += export_stream(job, plan, exported.quantized, folder)
        except RewriteError as fact:  # the file for whole sequences is written all the same
            refusal = str(fact)
    return Shipped(exported, files, refusal)
