"""The front as an interactive figure: what each plan costs, keeps, and what its steps are worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rewriter.ladder import REMEDIES
from search.pareto.step_effects import StepEffect, effect_said, step_effects
from search.report.rows import ladder, quality_lines
from search.run_dir.scores import Score

if TYPE_CHECKING:
    from search.results import Results

BLUE, ORANGE, GREEN, RED, GRAY = "#2f81d6", "#d9791a", "#1a9e55", "#d6403a", "#8b949e"
MOST_STEPS = 8  # in a label, which has to fit on a screen
# Much of what is compared costs no MACs and would hide each other: drawn beside its cost, in steps of the plot's width.
ASIDE = {"harmful layers in float": -1, "free remedies": 1}


def front_figure(results: Results) -> Any:
    """A plotly Figure: MACs to the right, the metric (or the damage) upwards.

    Shown are the front with its 95 % intervals, ties, the rungs of the ladder of free remedies, plain int8, the most
    harmful layers left in float, the float network, and all other plans.
    """
    import plotly.graph_objects as go

    fig: Any = go.Figure()
    drawn = groups(results)
    across = [_percent_more(s) for scores in drawn.values() for s in scores] or [0.0]
    aside = 0.012 * max(max(across) - min(across), 0.8)
    styles: dict[str, dict[str, Any]] = {
        "other plans": {"mode": "markers", "marker": _marker(GRAY, 7, "circle", 0.55)},
        "harmful layers in float": {
            "mode": "lines+markers",
            "line": {"color": ORANGE, "dash": "dot", "width": 1.5},
            "marker": _marker(ORANGE, 9, "square"),
        },
        "free remedies": {
            "mode": "lines+markers",
            "line": {"color": GREEN, "dash": "dash", "width": 1.5},
            "marker": _marker(GREEN, 11, "diamond"),
        },
        "ties": {"mode": "markers", "marker": _marker(BLUE, 11, "circle-open")},
        "front": {
            "mode": "lines+markers",
            "line": {"color": BLUE, "shape": "hv", "width": 2},
            "marker": _marker(BLUE, 12, "circle"),
        },
        "plain int8": {"mode": "markers", "marker": _marker(RED, 14, "x")},
    }
    for name, style in styles.items():
        scores = drawn[name]
        if not scores:
            continue
        fig.add_trace(
            go.Scatter(
                name=name,
                x=[_percent_more(s) + aside * ASIDE.get(name, 0) for s in scores],
                y=[height(results, s) for s in scores],
                text=[hover(results, s) for s in scores],
                hovertemplate="%{text}<extra></extra>",
                **style,
                **(_bars(results, scores) if name in ("front", "plain int8") else {}),
            )
        )
    _add_float(fig, results)
    _lay_out(fig, results, [s for scores in drawn.values() for s in scores], drawn)
    return fig


def groups(results: Results) -> dict[str, list[Score]]:
    """Every scored plan in one group, or in two where it is a reference on the front."""
    usable = [s for s in results.scores if s.error is None and height(results, s) is not None]
    front, ties = list(results.front.points), list(results.front.ties)
    references = [s for s in results.references if s.plan]
    rungs = _ladder(results, usable)
    plain = [s for s in results.references if not s.plan] or [s for s in usable if not s.plan]
    taken = {s.plan for s in (*front, *ties, *references, *rungs, *plain)}
    return {
        "other plans": [s for s in usable if s.plan not in taken],
        "harmful layers in float": [*plain, *references] if references else [],
        "free remedies": [*plain, *rungs] if rungs else [],
        "ties": ties,
        "front": sorted(front, key=lambda s: s.macs),
        "plain int8": plain,
    }


def hover(results: Results, score: Score) -> str:
    """What is known about a plan, in words, as plotly's own small HTML."""
    effects = step_effects(score.plan, results.scores)
    lines = [_step_said(results, e) for e in effects[:MOST_STEPS]]
    if len(effects) > MOST_STEPS:
        lines.append(f"and {len(effects) - MOST_STEPS} more steps")
    lines = lines or ["<b>the network as it is</b>"]
    lines.append(
        f"{score.macs / 1e6:.2f} M MACs ({score.macs_ratio - 1:+.1%}), "
        f"{score.float_layers} layers in float"
    )
    lines += quality_lines(results, score)
    if score.stopped:
        lines.append("given up early: clearly not on the front")
    return "<br>".join(lines)


def _step_said(results: Results, effect: StepEffect) -> str:
    if effect.beside is None:
        return f"<b>{escape(effect.step)}</b>"
    said = effect_said(effect, results.metric).removeprefix(f"{effect.step}: ")
    return f"<b>{escape(effect.step)}</b>: <i>{escape(said)}</i>"


def _ladder(results: Results, usable: Sequence[Score]) -> list[Score]:
    """The rungs in the order in which they were climbed; before all are scored, what is known of them."""
    climbed = ladder(results)
    if climbed:
        drawn = {s.plan for s in usable}
        return [s for _, s, _ in climbed if s.plan and s.plan in drawn]
    rules = set(dict(REMEDIES).values())
    known = [
        s
        for s in usable
        if s.plan and all(step.partition("@")[0] in rules for step in s.plan.split())
    ]
    return sorted(known, key=lambda s: (len(s.plan.split()), -(s.damage or 0.0)))


def height(results: Results, score: Score) -> float | None:
    """Where a plan is drawn; one that was run on the choosing images alone by its drop against float on those."""
    if results.objective == "damage":
        return score.damage
    level, original = results.baseline.float, score.original
    partial = results.is_confirmed and score.samples < results.samples
    if not partial or None in (score.metric, level, original):
        return score.metric
    return (level or 0.0) + (score.metric or 0.0) - (original or 0.0)


def _percent_more(score: Score) -> float:
    return 100 * (score.macs_ratio - 1)


def _bars(results: Results, scores: Sequence[Score]) -> dict[str, Any]:
    if results.objective == "damage":
        return {}
    pairs = [(s.metric or 0.0, s.interval or (s.metric or 0.0,) * 2) for s in scores]
    return {
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [high - value for value, (_, high) in pairs],
            "arrayminus": [value - low for value, (low, _) in pairs],
            "thickness": 1,
            "width": 4,
        }
    }


def _add_float(fig: Any, results: Results) -> None:
    level = results.baseline.float
    if results.objective == "damage" or level is None:
        return
    fig.add_hline(y=level, line={"color": GRAY, "dash": "dash", "width": 1})
    fig.add_scatter(
        name="float",
        x=[0.0],
        y=[level],
        mode="markers",
        marker=_marker(GRAY, 14, "star"),
        text=[f"<b>float, as it is</b><br>{escape(results.metric)} {level:.2%}"],
        hovertemplate="%{text}<extra></extra>",
    )


def _lay_out(
    fig: Any, results: Results, shown: Sequence[Score], drawn: Mapping[str, Sequence[Score]]
) -> None:
    metric = results.objective != "damage"
    title = f"int8 {results.metric}" if metric else "damage of int8, lower is better"
    across = [_percent_more(s) for s in shown] or [0.0]
    room = max(0.06 * (max(across) - min(across)), 0.4)
    y: dict[str, Any] = {"title": title, "range": _extent(results, drawn)}
    if metric:
        y["tickformat"] = ".1%"
    elif all((s.damage or 0) > 0 for s in shown):
        y = {"title": title, "type": "log"}
    fig.update_layout(
        template="none",
        height=470,
        margin={"l": 80, "r": 20, "t": 20, "b": 60},
        font={"family": "system-ui, sans-serif", "size": 13},
        hovermode="closest",
        hoverlabel={"align": "left", "namelength": -1},
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
        xaxis={
            "title": "compute added, % of MACs",
            "range": [min(across) - room, max(across) + room],
            "ticksuffix": " %",
        },
        yaxis=y,
    )


def _extent(results: Results, drawn: Mapping[str, Sequence[Score]]) -> list[float] | None:
    """Heights from a little below plain int8 to the top: a plan that is far worse would flatten all others."""
    if results.objective == "damage":
        return None
    wanted = ("front", "ties", "plain int8", "free remedies", "harmful layers in float")
    known: Iterable[Score] = (s for name in wanted for s in drawn[name])
    values = [
        v for s in known for v in (height(results, s), *_bounds(results, s)) if v is not None
    ]
    if results.baseline.float is not None:
        values.append(results.baseline.float)
    if not values:
        return None
    room = 0.07 * (max(values) - min(values)) or 0.01
    return [min(values) - room, max(values) + room]


def _bounds(results: Results, score: Score) -> tuple[float, ...]:
    """The interval, where the plan is drawn at its own metric."""
    return score.interval or () if height(results, score) == score.metric else ()


def _marker(color: str, size: int, symbol: str, opacity: float = 1.0) -> dict[str, Any]:
    return {"color": color, "size": size, "symbol": symbol, "opacity": opacity}
