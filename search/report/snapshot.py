"""What a report shows that needs the network: computed once at the end of a run, and read again without it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rewriter import Plan, Quantized, cost
from rewriter.assemble import assemble
from rewriter.errors import RewriteError
from search.data.evaluation_set import Tick
from search.job import Job
from search.report.snapshot_losses import losses_shown
from search.report.snapshot_network import channel_ranges, layer_list, spread, trimmed
from search.report.snapshot_outputs import outputs_shown
from search.results import Results
from search.run_dir.files import RunError, read_json, write_json

log = logging.getLogger(__name__)

FORMAT = 2
HARMFUL = 4  # layers whose ranges are shown at once
MOST_LAYERS = 120  # those of the others can be asked for
CHANNELS = 96, 28  # of a tensor that are kept: of the most harmful layers, and of others
PLAIN, REWRITTEN = "plain int8", "rewritten int8"


def write_exhibits(job: Job, results: Results, tick: Tick = lambda done, total: None) -> None:
    """Write ``exhibits.json``: the best plan's network beside the one as it is.

    A file of the same plan is kept. A plan that can be scored can be shown; should that fail all the same, the report
    is made without these parts, since a finished run must not be lost to a picture.
    """
    if not results.front.points:
        return
    plan = results.best().plan
    known = read_exhibits(job.folder, job.records.fingerprint)
    if known is not None and known["plan"] == plan:
        tick(1, 1)
        return
    tick(0, 1)
    try:
        content = _exhibits(job, results, plan)
    except RewriteError as cause:
        log.warning("report: without pictures of the network: %s", cause)
        return
    write_json(job.folder / "exhibits.json", content)
    tick(1, 1)


def read_exhibits(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """What `write_exhibits` stored; None where there is nothing, or it is of something else."""
    path = folder / "exhibits.json"
    if not path.exists():
        return None
    try:
        stored = read_json(path)
    except RunError as cause:
        log.warning("%s; the report is made without it", cause)
        return None
    if stored.get("format") != FORMAT or stored.get("fingerprint") != fingerprint:
        return None
    return stored


def _exhibits(job: Job, results: Results, plan: str) -> dict[str, Any]:
    evaluator = job.evaluator
    given = (
        evaluator.scheme,
        evaluator.calibration,
        evaluator.store,
        evaluator.seed,
        evaluator.device,
    )
    plain = assemble(evaluator.gm, Plan(), *given).quantized
    rewritten = assemble(evaluator.gm, Plan.parse(plan), *given).quantized if plan else plain
    shown = _shown(results)
    rest = [names for names in _others(results) if names not in shown]
    after = rewritten if plan else None
    ranges = [_ranges(plain, after, *names, CHANNELS[0]) for names in shown]
    ranges += [_ranges(plain, after, *names, CHANNELS[1]) for names in rest]
    networks = {PLAIN: plain} | ({REWRITTEN: rewritten} if plan else {})
    data = job.cfg.data
    return {
        "format": FORMAT,
        "fingerprint": job.records.fingerprint,
        "plan": plan,
        "before": layer_list(plain.gm),
        "after": layer_list(rewritten.gm),
        "macs": [cost(plain.gm).macs, cost(rewritten.gm).macs],
        "calibration_samples": plain.calibration.samples,
        "ranges": ranges,
        "ranges_shown": len(shown),
        "outputs": outputs_shown(evaluator, networks, data.mean, data.std, job.data.names),
        "losses": losses_shown(evaluator, networks, data.mean, data.std, job.data.names),
    }


def _shown(results: Results) -> list[tuple[str, str]]:
    """Node and name of the layers whose ranges are shown, after the values that hurt and are charged to none."""
    found = results.sensitivity
    if found is None:
        return []
    # channels of a value that no layer made (boxes beside scores) say nothing of what it holds
    ends = [(v.value, v.value) for v in found.uncharged() if v.layer][: HARMFUL // 2]
    worst = [d for d in found.layers[:HARMFUL] if found.counts(d.damage)]
    return ends + [(d.node, d.layer) for d in worst]


def _others(results: Results) -> list[tuple[str, str]]:
    """Node and name of further layers, the most harmful first."""
    found = results.sensitivity
    return [] if found is None else [(d.node, d.layer) for d in found.layers[:MOST_LAYERS]]


def _ranges(
    plain: Quantized, rewritten: Quantized | None, node: str, layer: str, most: int
) -> dict[str, Any]:
    sides = {"before": channel_ranges(plain, node, layer)}
    if rewritten is not None:
        sides["after"] = channel_ranges(rewritten, node, layer)
    spreads = {
        side: {key: spread(tensors) for key, tensors in values.items()}
        for side, values in sides.items()
    }
    kept = {
        side: {key: [trimmed(t, most) for t in tensors] for key, tensors in values.items()}
        for side, values in sides.items()
    }
    return {"layer": layer, "node": node, **kept, "spread": spreads}
