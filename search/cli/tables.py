"""Results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from torch import fx

from rewriter import Plan, cost
from rewriter.rules import Site
from search.export.forms import Written
from search.latency.clock import Clocked
from search.pareto.plan_summary import plan_summary
from search.report.rows import (
    chosen_few,
    finetuned_rows,
    in_all,
    ladder_rows,
    ladder_said,
    layer_rows,
    percent,
    score_rows,
    short_layer_rows,
    short_rows,
)
from search.results import Results
from search.scoring.added_macs import extra_macs
from search.sensitivity.run import Sensitivity

NAME = 34  # columns that the first one may claim
MOST_PLANS = 12  # of a front; all are in the long form
TEXTS = ("engine", "kind", "causes", "answers", "kept", "adds", "what it does", "")


def front_table(results: Results) -> Table:
    """The front for the terminal, in five columns."""
    shared = plan_summary(" ".join(in_all(results)))
    title = f"Front on {results.facts['target']}: {_how(results)}"
    if in_all(results):
        title += f"; all plans with: {shared}"
    return _rich_table(title, *short_rows(results, chosen_few(results, MOST_PLANS)))


def reference_table(results: Results) -> Table:
    """Plain int8 and the keep-in-float curve for the terminal."""
    names, rows = score_rows(results, results.references)
    wanted = [names.index(n) for n in ("plan", "MACs", "int8", "damage", "float layers")]
    return _rich_table(
        "For comparison: the most harmful layers left in float",
        [names[i] for i in wanted],
        [[row[i] for i in wanted] for row in rows],
    )


def ladder_table(results: Results) -> Table:
    """The free remedies for the terminal."""
    return _rich_table(ladder_said(results), *ladder_rows(results))


def sensitivity_table(sensitivity: Sensitivity, rows: int = 15, full: bool = False) -> Table:
    """The most harmful layers for the terminal, in five columns or in full."""
    base = sensitivity.baseline
    title = (
        f"{sensitivity.metric} float {percent(base.float)}, int8 {percent(base.int8)} on "
        f"{sensitivity.target}; each layer alone in int8, at most {sensitivity.layer_samples} "
        f"samples, {sensitivity.engine}"
    )
    found = layer_rows(sensitivity, rows) if full else short_layer_rows(sensitivity, rows)
    return _rich_table(title, *found)


def finetuned_table(results: Results) -> Table:
    """The plans that were fine-tuned, before and after, each with its control."""
    found = next(iter(results.finetuned.values()))
    how = f"loss {found.recipe['loss']}, quantization {found.recipe['quantization']}"
    return _rich_table(f"Fine-tuned: {how}", *finetuned_rows(results))


def forms_table(written: Sequence[Written], metric: str) -> Table:
    """Int8 files in several forms for the terminal."""
    columns = ["file", "target", "run by", metric, "damage", "MB", "ms", "findings"]
    rows = [
        [
            w.file.name,
            w.target,
            f"{w.engine} {w.score.engine_version}",
            percent(w.score.metric),
            "" if w.score.damage is None else f"{w.score.damage:.4g}",
            f"{w.size / 1e6:.2f}",
            f"{w.latency_ms:.3g}",
            str(len(w.findings)),
        ]
        for w in written
    ]
    return _rich_table("Files for other runtimes, each run as written", columns, rows)


def clock_table(found: Clocked) -> Table:
    """Float, plain int8 and the chosen file on this machine, for the terminal."""
    names = ["file", "ms, one thread", f"ms, {found.threads} threads", "MB"]
    rows = [
        [name, f"{t.one_ms:.3g}", f"{t.all_ms:.3g}", f"{t.bytes / 1e6:.2f}"]
        for name, t in found.times.items()
    ]
    return _rich_table("One input on this machine, files in turns, medians", names, rows)


def _rich_table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(names):
        texts = i == 0 or name in TEXTS
        # what a row is about stays on one line, unless it is a whole sentence
        least = min(max((len(row[0]) for row in rows), default=0), NAME) if i == 0 else None
        side = "left" if texts else "right"
        table.add_column(name, justify=side, overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*row)
    return table


def _how(results: Results) -> str:
    facts = results.facts
    on = f"{results.samples} samples, {facts['engine']}, 95 % intervals paired with float"
    if results.held_back and not results.is_confirmed:
        return f"{on}; not confirmed yet"
    return on


def sites_table(gm: fx.GraphModule, sites: Sequence[Site]) -> Table:
    """Where rules may act and what that costs; near misses last, with the reason."""
    base = cost(gm).macs
    plans = [Plan.parse(f"{s.rule}@{s.nodes[0]}") for s in sites if not s.blocked]
    added = extra_macs(gm, plans, base)
    table = Table("step", "nodes", "MACs", "near miss, because")
    for site in sorted(sites, key=lambda s: bool(s.blocked)):
        step = f"{site.rule}@{site.nodes[0]}"
        more = f"{added[step] / base:+.1%}" if step in added else ""
        table.add_row(step, " ".join(site.nodes[1:]), more, site.blocked)
    return table
