"""The front as a picture: every scored plan, for mouse, keyboard and screen reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from search.report.rows import quality_lines
from search.results import Results
from search.run_dir.scores import Score

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 72, WIDTH - 20, 20, HEIGHT - 56
ORDER = ("other", "reference", "tie", "point")  # what matters is drawn last, on top

Scale = Callable[[float], float]


def front_svg(results: Results) -> str:
    """An SVG element: MACs to the right, the metric (or the damage) upwards."""
    # with some images held back, what the front shows was scored once more, on all of them
    chosen = {s.plan: s for s in (*results.references, *results.front.all())}
    scored = (chosen.get(s.plan, s) for s in results.scores if s.error is None and not s.stopped)
    shown = [s for s in scored if _value(results, s) is not None]
    if not shown:
        return "<p>No plan is scored yet.</p>"
    kinds = {s.plan: _kind(results, s) for s in shown}
    labeled = results.objective == "metric"
    level = results.baseline.float if labeled else None
    values = [_value(results, s) or 0.0 for s in shown]
    bars = [b for s in results.front.points if labeled for b in s.interval or ()]
    heights = [*values, *bars, *([] if level is None else [level])]
    x = _scale([s.macs_ratio for s in shown], LEFT, RIGHT)
    y = _scale(heights, BOTTOM, TOP)
    unit = "{:.1%}" if labeled else "{:.3g}"
    title = f"{results.metric}, int8" if labeled else "damage of int8, lower is better"
    drawn = [
        *_axes(x, y, [s.macs_ratio for s in shown], heights, unit),
        _text(WIDTH / 2, HEIGHT - 12, "MACs relative to the network as it is", "middle"),
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(title)}</text>",
    ]
    if level is not None:
        drawn.append(_line("level", LEFT, y(level), RIGHT, y(level)))
        drawn.append(_text(RIGHT, y(level) - 5, f"float {unit.format(level)}", "end"))
    corners = [(x(s.macs_ratio), y(_value(results, s) or 0.0)) for s in _outline(results)]
    if len(corners) > 1:
        steps = "".join(f"H{a:.1f}V{b:.1f}" for a, b in corners[1:])
        path = f"M{corners[0][0]:.1f} {corners[0][1]:.1f}{steps}"
        drawn.append(f'<path class="front" d="{path}"/>')
    for score in sorted(shown, key=lambda s: ORDER.index(kinds[s.plan])):
        drawn.append(_dot(results, score, kinds[score.plan], x, y))  # noqa: PERF401
    said = escape(f"{len(results.front.points)} plans on the front, {len(shown)} scored")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="group" aria-label="{said}">'
        + "".join(drawn)
        + "</svg>"
    )


def facts_of(results: Results, score: Score) -> str:
    """What is known about a plan, in lines."""
    lines = [
        score.plan.replace(" ", "\n") or "the network as it is",
        f"{score.macs / 1e6:.1f} M MACs ({score.macs_ratio - 1:+.1%}), "
        f"{score.float_layers} layers in float",
    ]
    lines += quality_lines(results, score)
    return "\n".join(lines)


def _outline(results: Results) -> list[Score]:
    """The points whose value is better than that of all cheaper ones: what a line may go through."""
    up = results.objective == "metric" and results.higher_is_better
    found: list[Score] = []
    for score in results.front.points:
        values = [_value(results, s) or 0.0 for s in (score, *found[-1:])]
        if not found or (values[0] > values[1]) is up:
            found.append(score)
    return found


def _kind(results: Results, score: Score) -> str:
    if score in results.front.points:
        return "point"
    if score in results.front.ties:
        return "tie"
    return "reference" if score in results.references else "other"


def _dot(results: Results, score: Score, kind: str, x: Scale, y: Scale) -> str:
    here, there = x(score.macs_ratio), y(_value(results, score) or 0.0)
    bar = ""
    if kind == "point" and score.interval is not None and results.objective == "metric":
        low, high = (y(bound) for bound in score.interval)
        bar = _line("bar", here, low, here, high)
    label = escape(facts_of(results, score), quote=True)
    radius = 3.5 if kind == "other" else 6
    return (
        f'<g class="dot" tabindex="0" role="img" aria-label="{label}">{bar}'
        f'<circle class="{kind}" cx="{here:.1f}" cy="{there:.1f}" r="{radius}"/></g>'
    )


def _axes(
    x: Scale, y: Scale, across: Sequence[float], up: Sequence[float], unit: str
) -> list[str]:
    return [
        _line("axis", LEFT, BOTTOM, RIGHT, BOTTOM),
        _line("axis", LEFT, TOP, LEFT, BOTTOM),
        *[_text(x(v), BOTTOM + 18, f"{v:.3g}", "middle") for v in _ticks(across)],
        *[_text(LEFT - 8, y(v) + 4, unit.format(v), "end") for v in _ticks(up)],
    ]


def _scale(values: Sequence[float], start: float, end: float) -> Scale:
    """Maps the extent of the values, a little widened, to pixels."""
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    low, high = low - room, high + room
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [low + (high - low) * i / 4 for i in range(5)] if high > low else [low]


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _value(results: Results, score: Score) -> float | None:
    return score.damage if results.objective == "damage" else score.metric
