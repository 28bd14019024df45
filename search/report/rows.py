"""The tables of a run as rows of text, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from search.pareto.plan_summary import plan_summary, step_summary
from search.results import Results
from search.run_dir.scores import Score
from search.sensitivity.run import Sensitivity

ANSWERS = 3


class InWords(str):
    """A plan in words, which knows its exact text."""

    exact: str

    def __new__(cls, words: str, exact: str) -> InWords:
        made = super().__new__(cls, words)
        made.exact = exact
        return made


def in_words(results: Results, plan: str, before: str = "") -> InWords:
    """A plan in words, behind some more of them."""
    return InWords(before + plan_summary(plan, results.places), plan)


def numbered(results: Results) -> list[tuple[str, Score]]:
    """The front and its ties, cheapest first, each with its number and what it is: ``2 knee``, ``3 tie``."""
    shown, points = results.front.all(), results.front.points
    best, knee = (results.best().plan, results.knee().plan) if points else (None, None)
    ties = {s.plan for s in results.front.ties}
    return [
        (
            " ".join(
                [
                    str(number),
                    *(["best"] if score.plan == best else []),
                    *(["knee"] if score.plan == knee else []),
                    *(["tie"] if score.plan in ties else []),
                ]
            ),
            score,
        )
        for number, score in enumerate(shown, 1)
    ]


def in_all(results: Results) -> list[str]:
    """Steps for the whole network that every plan of the front has, where there are several."""
    plans = [s.plan.split() for s in results.front.all() if s.plan]
    first = plans[0] if len(plans) > 1 else []
    return [s for s in first if s.endswith("@model") and all(s in plan for plan in plans)]


def apart(results: Results, plan: str) -> InWords:
    """A plan of the front in words, without what all of them have."""
    shared = in_all(results)
    left = [s for s in plan.split() if s not in shared]
    if plan and not left:
        return InWords("nothing more", plan)
    return InWords(plan_summary(" ".join(left), results.places), plan)


def chosen_few(results: Results, most: int) -> list[tuple[str, Score]]:
    """At most so many of `numbered`: the first, the last, what is best and the knee, and others evenly between them."""
    found = numbered(results)
    if len(found) <= most:
        return found
    marked = {i for i, (mark, _) in enumerate(found) if "best" in mark or "knee" in mark}
    wanted = marked | {0, len(found) - 1}
    free = [i for i, (mark, _) in enumerate(found) if i not in wanted and "tie" not in mark]
    room = max(most - len(wanted), 0)
    if len(free) > room:
        free = [free[(2 * k + 1) * len(free) // (2 * room)] for k in range(room)]
    return [found[i] for i in sorted(wanted | set(free))]


def short_rows(
    results: Results, shown: Sequence[tuple[str, Score]] | None = None
) -> tuple[list[str], list[list[str]]]:
    """The front, or some of its plans, in five columns."""
    shown = numbered(results) if shown is None else shown
    names = ["plan", "MACs", _quality_name(results), "damage", "what it does"]
    rows = [
        [
            mark,
            f"{s.macs / 1e6:.4g} M {s.macs_ratio - 1:+.1%}",
            _with_interval(s),
            "" if s.damage is None else f"{s.damage:.4g}",
            apart(results, s.plan),
        ]
        for mark, s in shown
    ]
    if any(milliseconds(s) is not None for _, s in shown):
        names[1] = "MACs, ms"
        for row, (_, s) in zip(rows, shown, strict=True):
            ms = milliseconds(s)
            row[1] += "" if ms is None else f", {ms:.3g} ms"
    return names, rows


def milliseconds(score: Score) -> float | None:
    """For one input: measured where that was asked for, else by the table of kernels."""
    return score.predicted_ms if score.latency_ms is None else score.latency_ms


def _quality_name(results: Results) -> str:
    return "int8" if results.metric == "none" else f"int8 {results.metric} [95 %]"


def _with_interval(score: Score) -> str:
    if score.metric is None:
        return ""
    if score.interval is None:
        return f"{score.metric:.2%}"
    low, high = score.interval
    return f"{score.metric:.2%} [{100 * low:.2f}, {100 * high:.2f}]"


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
            cells: list[str] = [in_words(results, a.plan, name), f"{a.macs_ratio - 1:+.1%}"]
            cells += [percent(a.metric), b.error or percent(b.metric)]
            cells += ["" if b.interval is None else f"{b.interval[0]:.2%} to {b.interval[1]:.2%}"]
            cells += [percent(a.metric_float), percent(b.metric_float)]
            cells += ["" if s.damage is None else f"{s.damage:.4g}" for s in (a, b)]
            rows.append(
                [*cells, f"{row.trained.get('kept', '')} of {row.trained.get('steps', '')}"]
            )
    return names, rows


def front_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """The front with all that is known, a row for each plan."""
    names, rows = score_rows(results, results.front.all())
    if results.is_confirmed:
        _add_parts(results, names, rows)
    marked = zip(rows, numbered(results), strict=True)
    return ["", *names], [[mark, *row] for row, (mark, _) in marked]


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


def score_rows(results: Results, scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """Some plans, a row for each."""
    names = ["plan", "MACs", "int8", "95 % interval", "float", "damage", "in int8", "float layers"]
    names += ["engine"]
    rows = [
        [
            in_words(results, s.plan),
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
    names = ["remedy", _quality_name(results), "damage", "kept", "adds"]
    rows: list[list[str]] = []
    below: list[str] = []
    for name, score, kept in ladder(results):
        steps = score.plan.split()
        added = " ".join(s for s in steps if s not in below)
        taken = " ".join(s for s in below if s not in steps)
        told = InWords(plan_summary(added, results.places), added) if added else ""
        if taken and not added:
            told = InWords(f"leaves out: {plan_summary(taken, results.places)}", taken)
        damage = "" if score.damage is None else f"{score.damage:.4g}"
        rows.append([name, _with_interval(score), damage, "yes" if kept else "no", told])
        below = steps if kept else below
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
            answers_said(d.answers),
        ]
        for d in sensitivity.layers[:count]
    ]
    return names, rows


def answers_said(steps: Sequence[str]) -> str:
    """The first rules that act at this very layer; each is listed by ``quantfix sites``."""
    rules = [rule for rule, _, anchor in (s.partition("@") for s in steps) if anchor != "model"]
    rules = [rule for rule in rules if rule != "keep_float"] or rules
    more = f" and {len(rules) - ANSWERS} more" if len(rules) > ANSWERS else ""
    return ", ".join(rules[:ANSWERS]) + more


def short_layer_rows(sensitivity: Sensitivity, count: int) -> tuple[list[str], list[list[str]]]:
    """The most harmful layers in five columns."""
    rows = [
        [
            d.layer,
            f"{d.damage:.3g}",
            "" if d.drop is None else f"{100 * d.drop:.2f}",
            ", ".join(d.causes),
            answers_said(d.answers),
        ]
        for d in sensitivity.layers[:count]
    ]
    return ["layer", "damage", "drop", "causes", "answers"], rows


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


def long_form(results: Results) -> list[str]:
    """The front with all that is known, some lines for each plan: the last is its exact text."""
    names, rows = score_rows(results, results.front.all())
    if results.is_confirmed:
        _add_parts(results, names, rows)
    lines: list[str] = []
    for row, (mark, score) in zip(rows, numbered(results), strict=True):
        known = [f"{n} {v}" for n, v in zip(names[1:], row[1:], strict=True) if v]
        half = (len(known) + 1) // 2
        lines += [f"{mark}: {step_summary(score.plan, results.places)}"]
        lines += [f"    {', '.join(part)}" for part in (known[:half], known[half:]) if part]
        lines += [f"    {score.plan}"] if score.plan else []
    return lines


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
