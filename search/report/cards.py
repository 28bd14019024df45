"""The first screen: what to ship with its numbers beside float and plain int8, and a card for each plan of the front."""

from __future__ import annotations

from html import escape

from search.pareto.plan_summary import step_summary
from search.pareto.step_effects import StepEffect, step_effects
from search.report.page import listed, table
from search.report.rows import InWords, milliseconds, numbered, percent
from search.report.verdict import certainty, cost_said, words, worth
from search.results import Results
from search.run_dir.scores import Score


def verdict_card(results: Results) -> str:
    """What to ship, three numbers large, the rest as a table, and how sure it is."""
    best = results.best()
    head = (
        "Ship the network as it is"
        if not best.plan
        else f"Ship plan {results.front.all().index(best) + 1}"
    )
    told = (
        "No rewrite within the limits beats plain int8."
        if not best.plan
        else f"{_capital(words(results, best))}."
    )
    return (
        f'<p class="verdict"><strong>{escape(head)}</strong> {escape(told)}</p>'
        f"{_large(results, best)}{table(*_numbers(results, best))}"
        f"{listed([*worth(results), *certainty(results)])}"
    )


def _large(results: Results, best: Score) -> str:
    """Quality, the change against plain int8, and compute, each with its name below."""
    empty = results.empty()
    cells: list[tuple[str, str]] = []
    drop = results.drop(best)
    if best.metric is not None and results.objective == "metric":
        cells.append((f"{best.metric:.1%}", f"{results.metric} in int8"))
        if drop is not None:
            cells.append((f"{round(-drop, 2) + 0.0:+.2f}", "points against float"))
        if empty is not None and empty.metric is not None and best.plan:
            gain = 100 * (best.metric - empty.metric)
            cells.append((f"{gain:+.1f}", "points against plain int8"))
    elif best.damage is not None:
        cells.append((f"{best.damage:.3g}", "damage"))
        if best.plan and empty is not None and empty.damage:
            cells.append((f"{best.damage / empty.damage:.1%}", "of plain int8's damage"))
    cells.append((f"{best.macs_ratio:.1%}", "of the MACs"))
    return (
        '<dl class="large">'
        + "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for v, n in cells)
        + "</dl>"
    )


def _numbers(results: Results, best: Score) -> tuple[list[str], list[list[str]]]:
    """Float, plain int8 and the plan side by side; rows of which nothing is known are left out."""
    empty, base = results.empty(), results.baseline
    sides = [s for s in (empty, best) if s is not None]
    first = f"{results.samples} samples"
    names = [first, "float", *(["plain int8"] if empty is not None else []), "this plan"]
    if not best.plan:
        sides, names = [best], [first, "float", "plain int8"]
    rows = [
        [results.metric, percent(base.float), *(percent(s.metric) for s in sides)],
        ["95 %", "", *(_interval(s) for s in sides)],
        ["damage", "0", *("" if s.damage is None else f"{s.damage:.3g}" for s in sides)],
        ["MACs", f"{base.macs / 1e6:.4g} M", *(f"{s.macs / 1e6:.4g} M" for s in sides)],
        ["ms, one input", _milliseconds(results), *(_ms(s) for s in sides)],
        ["weights", _size(4 * sides[0].params), *(_size(s.weight_bytes) for s in sides)],
        ["file", "", *(_size(int((s.price or {}).get("bytes") or 0)) for s in sides)],
        ["MACs in int8", "", *("" if s.int8_share is None else f"{s.int8_share:.0%}" for s in sides)],
        ["layers in float", "", *(str(s.float_layers) for s in sides)],
    ]  # fmt: skip
    return names, [row for row in rows if any(row[2:])]


def _interval(score: Score) -> str:
    if score.interval is None:
        return ""
    return f"{100 * score.interval[0]:.1f} to {100 * score.interval[1]:.1f}"


def _ms(score: Score) -> str:
    ms = milliseconds(score)
    ratio = "" if score.latency_ratio is None else f" ({score.latency_ratio:.2f}x)"
    return "" if ms is None else f"{ms:.3g}{ratio}"


def _milliseconds(results: Results) -> str:
    known = getattr(results.baseline, "float_latency_ms", None)
    return "" if known is None else f"{known:.3g}"


def _size(count: int) -> str:
    if not count:
        return ""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def plan_cards(results: Results) -> str:
    """A card for each plan of the front, of which the page shows the one that is chosen: words, numbers, steps, exact text."""
    best = results.best()
    return "".join(
        _card(results, mark, score, shown=score.plan == best.plan)
        for mark, score in numbered(results)
    )


def _card(results: Results, mark: str, score: Score, shown: bool) -> str:
    number = mark.split()[0]
    low = "" if score.interval is None else f" [{_interval(score)}]"
    facts = [
        *([f"{results.metric} {score.metric:.2%}{low}"] if score.metric is not None else []),
        f"damage {'infinite' if score.damage is None else f'{score.damage:.4g}'}",
        cost_said(score),
        *([f"{ms:.3g} ms"] if (ms := milliseconds(score)) is not None else []),
        *([f"{score.float_layers} in float"] if score.float_layers else []),
    ]
    hidden = "" if shown else " hidden"
    effects = step_effects(score.plan, results.scores)
    exact = (
        f"<details><summary>The exact plan</summary><pre><code>quantfix export {escape(str(results.folder))} "
        f'--pick "{escape(score.plan or "plain")}"</code></pre></details>'
    )
    return (
        f'<article class="plan" id="plan-{number}"{hidden}><h3>Plan {escape(mark)}: '
        f"{escape(words(results, score))}</h3><p>{escape(', '.join(facts))}</p>"
        f"{_steps(results, effects)}{exact}</article>"
    )


def _steps(results: Results, effects: list[StepEffect]) -> str:
    if not effects:
        return ""
    names, rows = effect_rows(results, effects)
    return (
        f"<details><summary>What its {len(effects)} steps cost and gain</summary>"
        f"{table(names, rows, EFFECTS)}</details>"
    )


EFFECTS = "Each row compares two plans that were scored, of which one has this step more; several rows need not add up."


def effect_rows(results: Results, effects: list[StepEffect]) -> tuple[list[str], list[list[str]]]:
    """What steps cost and gain, a row for each."""
    names = ["step", "MACs", "damage", f"int8 {results.metric}", "measured"]
    rows: list[list[str]] = []
    for e in effects:
        told = InWords(step_summary(e.step, results.places), e.step)
        if e.beside is None:
            rows.append([told, "", "", "", e.on])
            continue
        points = "" if e.metric is None else f"{100 * e.metric:+.2f} points"
        added = f"{e.macs / 1e6:+.2f} M" if e.macs else "0"
        rows.append([told, added, f"{e.damage:+.3g}", points, e.on])
    return names, rows
