"""The tables of a run: rows of text for the page, and rich tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from search.pareto.plan_summary import short
from search.results import Results
from search.run_dir.scores import Score
from search.sensitivity.run import Sensitivity

ANSWERS = 3


def finetuned_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """A row for each plan and one for its control."""
    names = ["plan", "MACs", "int8", "trained", "95 % interval", "float", "trained", "damage"]
    names += ["trained", "steps"]
    rows: list[list[str]] = []
    for found in results.finetuned.values():
        for row, name in ((found, ""), (found.control, "control: ")):
            if row is None:
                continue
            a, b = row.before, row.after
            cells = [name + (a.plan or "(as it is)"), f"{a.macs_ratio - 1:+.1%}"]
            cells += [percent(a.metric), b.error or percent(b.metric)]
            cells += ["" if b.interval is None else f"{b.interval[0]:.2%} to {b.interval[1]:.2%}"]
            cells += [percent(a.metric_float), percent(b.metric_float)]
            cells += ["" if s.damage is None else f"{s.damage:.4g}" for s in (a, b)]
            rows.append(
                [*cells, f"{row.trained.get('kept', '')} of {row.trained.get('steps', '')}"]
            )
    return names, rows


def front_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    names, rows = score_rows(results.front.all())
    if results.is_confirmed:
        _add_parts(results, names, rows)
    best, knee = (results.best().plan, results.knee().plan) if results.front.points else ("", "")
    ties = {s.plan for s in results.front.ties}
    for row, score in zip(rows, results.front.all(), strict=True):
        marks = [
            ("best", score.plan == best),
            ("knee", score.plan == knee),
            ("tie", score.plan in ties),
        ]
        row.append(" ".join(word for word, holds in marks if holds))
    return [*names, ""], rows


def _add_parts(results: Results, names: list[str], rows: list[list[str]]) -> None:
    """Edit the rows: what each plan is where it was chosen, and on the images held back."""
    names += ["chosen on", "held back"]
    for row, score in zip(rows, results.front.all(), strict=True):
        known = results.confirmed[score.plan]
        row += [_against_float(results, part) for part in (known.selection, known.held)]


def _against_float(results: Results, score: Score) -> str:
    """The drop against float on the same images, or the damage where there are no labels."""
    lost = results.drop(score)
    return f"{score.damage:.4g}" if lost is None else f"{round(-lost, 2) + 0.0:+.2f}"


def score_rows(scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    names = ["plan", "MACs", "int8", "95 % interval", "float", "damage", "in int8", "float layers"]
    names += ["engine"]
    rows = [
        [
            short(s.plan) or "(as it is)",
            f"{s.macs / 1e6:.1f} M {s.macs_ratio - 1:+.1%}",
            percent(s.metric),
            "" if s.interval is None else f"{s.interval[0]:.2%} to {s.interval[1]:.2%}",
            percent(s.metric_float),
            "" if s.damage is None else f"{s.damage:.4g}",
            "" if s.int8_share is None else f"{s.int8_share:.1%}",
            str(s.float_layers),
            s.engine,
        ]
        for s in scores
    ]
    return names, rows


def ladder(results: Results) -> list[tuple[str, Score, bool]]:
    """The free remedies in the order tried: name, score of all kept so far with it, whether it is kept."""
    known = {s.plan: s for s in results.scores if s.error is None}
    rungs = results.facts.get("ladder") or ()
    return [(str(n), known[p], bool(kept)) for n, p, kept in rungs if p in known]


def ladder_said(results: Results) -> str:
    """What the rungs are, and on how many samples they were measured: with some held back, fewer than the front."""
    counts = {score.samples for _, score, _ in ladder(results)}
    on = f": {max(counts)} samples, {results.facts['engine']}" if counts else ""
    return f"Free remedies, each on top of those kept{on}" + (
        ", those that choose" if results.held_back else ""
    )


def ladder_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """A row for each rung, in the order in which they were tried."""
    names = ["remedy", "int8", "95 % interval", "damage", "kept", "adds"]
    rows: list[list[str]] = []
    below: set[str] = set()
    for name, score, kept in ladder(results):
        steps = score.plan.split()
        row = score_rows([score])[1][0]
        added = " ".join(s for s in steps if s not in below)
        rows.append([name, row[2], row[3], row[5], "yes" if kept else "no", added])
        below |= set(steps) if kept else set()
    return names, rows


def layer_rows(sensitivity: Sensitivity, count: int) -> tuple[list[str], list[list[str]]]:
    names = ["layer", "kind", "MACs", "damage", "95 % interval", "samples", "drop", "SQNR"]
    names += ["causes", "answers"]
    rows = [
        [
            d.layer,
            d.kind,
            f"{d.macs / 1e6:.2f} M",
            f"{d.damage:.3g}",
            "" if d.interval is None else f"{d.interval[0]:.2g} to {d.interval[1]:.2g}",
            str(d.samples or "screened"),
            "" if d.drop is None else f"{100 * d.drop:.2f}",
            "" if d.sqnr_db is None else f"{d.sqnr_db:.1f} dB",
            ", ".join(d.causes),
            _answers(d.answers),
        ]
        for d in sensitivity.layers[:count]
    ]
    return names, rows


def _answers(steps: Sequence[str]) -> str:
    """The first rules that act at this very layer; each is listed by ``quantfix sites``."""
    rules = [rule for rule, _, anchor in (s.partition("@") for s in steps) if anchor != "model"]
    rules = [rule for rule in rules if rule != "keep_float"] or rules
    more = f" and {len(rules) - ANSWERS} more" if len(rules) > ANSWERS else ""
    return ", ".join(rules[:ANSWERS]) + more


def quality_lines(results: Results, score: Score) -> list[str]:
    """What a plan is worth, and what that was measured on."""
    lines: list[str] = []
    if score.metric is not None:
        low, high = score.interval or (score.metric, score.metric)
        lines.append(
            f"int8 {results.metric} {score.metric:.2%} [{low:.2%}, {high:.2%}], "
            f"in float {percent(score.metric_float)}"
        )
    lines.append(f"damage {score.damage:.4g}; {score.engine}, {score.samples} samples")
    return lines


def loss_said(results: Results, score: Score) -> str:
    """What a plan loses (the damage where there are no labels), and what it costs."""
    lost = results.drop(score)
    if lost is None:
        said = "damage infinite" if score.damage is None else f"damage {score.damage:.3g}"
    else:
        said = f"{lost:.2f} points lost"
    return f"{said}, {score.macs_ratio:.3f} x MACs"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
