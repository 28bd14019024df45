"""The front as a picture for the page and for a notebook: large, with few marks that never hide each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

from search.pareto.controls import controls
from search.report.front import groups, height
from search.report.rows import apart, milliseconds, numbered, quality_lines
from search.report.verdict import cost_said, words
from search.results import Results
from search.run_dir.scores import Score

LEFT, TOP, BOTTOM = 58, 18, 46
GAP = 2.0  # pixels between marks
RADIUS = {"chosen": 8.0, "point": 6.0, "plain": 7.0, "control": 4.5, "tie": 4.5, "other": 3.0}
SMALLEST = 2.2
LETTER, LINE = 6.6, 15.0  # of a label's letter, in pixels
LONGEST = 34
# What lies further below the front than this many times its extent would flatten it: drawn at the lower edge.
FAR_BELOW = 1.5
FEW = 3  # points, which nothing can flatten

Scale = Callable[[float], float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mark:
    """One plan of the picture."""

    kind: str
    x: float
    y: float
    score: Score
    number: str = ""
    below: bool = False  # it lies below the picture, and is drawn at its edge
    radius: float = 0.0

    def box(self) -> Box:
        r = self.radius
        return self.x - r, self.y - r, self.x + r, self.y + r


def front_picture(results: Results, width: int = 820, height_px: int = 430) -> str:
    """An SVG element: MACs to the right, int8 quality upwards.

    Plans on the front come first, then plain int8, the controls (their curve is dashed), ties, and as small dots all
    others. Of these, what would hide an earlier one is left out.

    Args:
        results: Of the run.
        width: Of the picture in pixels, at which nothing overlaps.
        height_px: Of the picture.
    """
    by_kind = _by_kind(results)
    shown = [s for _, scores in by_kind for s in scores]
    if not shown:
        return "<p>No plan is scored yet.</p>"
    right, floor = width - 16, height_px - BOTTOM
    low, high, log = _extent(results, by_kind)
    across = _widened(
        [s.macs_ratio for kind, scores in by_kind for s in scores if kind != "other"]
    )
    x = _scale(*across, LEFT, right)
    y = _scale(*_raised(low, high, log), floor, TOP)

    def place(score: Score) -> tuple[float, bool]:
        value = _upwards(results, height(results, score) or 0.0, log)
        return y(max(value, _raised(low, high, log)[0])), value < _raised(low, high, log)[0]

    marks = _apart_marks(results, by_kind, x, place, across)
    drawn = [
        *_axes(results, x, y, across, (low, high, log), right, floor),
        *_level(results, y, right, (low, high, log)),
        *_control_lines(results, by_kind, x, place),
        _front_line([m for m in marks if m.kind in ("chosen", "point")]),
        *[_drawn(results, m, y, log) for m in reversed(marks)],
        *_labels(results, marks, right),
    ]
    said = escape(
        f"{len(results.front.points)} plans on the front, {len(shown)} scored; the table has their numbers"
    )
    return (
        f'<svg class="front-picture" viewBox="0 0 {width} {height_px}" width="{width}" role="group" aria-label="{said}">'
        + "".join(drawn)
        + "</svg>"
    )


def facts_of(results: Results, score: Score) -> str:
    """What is known about a plan, in lines, the first in words."""
    many = "" if score.float_layers == 1 else "s"
    lines = [
        words(results, score),
        f"{score.macs / 1e6:.4g} M MACs, {cost_said(score)}; {score.float_layers} layer{many} in float",
    ]
    ms = milliseconds(score)
    if ms is not None:
        lines.append(f"{ms:.3g} ms for one input")
    lines += quality_lines(results, score)
    if score.stopped:
        lines.append("given up early: clearly not on the front")
    return "\n".join(lines)


def _by_kind(results: Results) -> list[tuple[str, list[Score]]]:
    """Plans by what they are, those that matter most first; each once."""
    drawn = groups(results)
    # with some images held back, what the front shows was scored once more, on all of them
    again = {s.plan: s for s in (*results.references, *results.front.all())}
    front = list(results.front.points)
    best = {results.best().plan, results.knee().plan} if front else set[str]()
    saving = {c["plan"] for c in controls(results.scores)}
    wanted = [
        ("chosen", [s for s in results.front.all() if s.plan in best]),
        ("point", front),
        ("plain", drawn["plain int8"]),
        ("control", [s for s in results.scores if s.plan in saving]),
        ("tie", list(results.front.ties)),
        ("other", [s for s in results.scores if s.error is None and not s.stopped]),
    ]
    found: list[tuple[str, list[Score]]] = []
    taken: set[str] = set()
    for kind, scores in wanted:
        kept = [again.get(s.plan, s) for s in scores if s.plan not in taken]
        kept = [s for s in kept if height(results, s) is not None]
        taken |= {s.plan for s in kept}
        found.append((kind, kept))
    return found


def _extent(
    results: Results, by_kind: Sequence[tuple[str, Sequence[Score]]]
) -> tuple[float, float, bool]:
    """Lowest and highest value that is drawn, and whether upwards is a logarithm (of a damage)."""
    kinds = dict(by_kind)
    if results.objective == "damage":
        values = [s.damage for k in kinds if k != "other" for s in kinds[k] if s.damage]
        if not values:
            return 1.0, 0.1, True
        return max(values) * 1.15, min(values) / 1.15, True
    sign = 1.0 if results.higher_is_better else -1.0
    main = [sign * (height(results, s) or 0.0) for k in ("chosen", "point") for s in kinds[k]]
    bounds = [sign * b for k in ("chosen",) for s in kinds[k] for b in s.interval or ()]
    level = [] if results.baseline.float is None else [sign * results.baseline.float]
    top = max([*main, *bounds, *level])
    bottom = min([*main, *bounds])
    rest = [sign * (height(results, s) or 0.0) for k in ("plain", "control") for s in kinds[k]]
    few = len(main) < FEW
    near = [v for v in rest if few or v >= bottom - FAR_BELOW * max(top - bottom, 0.02)]
    bottom = min([bottom, *near])
    room = 0.07 * (top - bottom) or 0.01
    return bottom - room, top + room, False


def _upwards(results: Results, value: float, log: bool) -> float:
    if log:
        return -math.log10(max(value, 1e-12))
    return value if results.higher_is_better else -value


def _raised(low: float, high: float, log: bool) -> tuple[float, float]:
    return (-math.log10(low), -math.log10(high)) if log else (low, high)


def _apart_marks(
    results: Results,
    by_kind: Sequence[tuple[str, Sequence[Score]]],
    x: Scale,
    place: Callable[[Score], tuple[float, bool]],
    across: tuple[float, float],
) -> list[Mark]:
    """Marks that do not touch, those that matter most first; of the front every one, smaller where it is dense."""
    numbers = {s.plan: mark for mark, s in numbered(results)}
    kept: list[Mark] = []
    for kind, scores in by_kind:
        for score in scores:
            y, below = place(score)
            number = numbers.get(score.plan, "")
            mark = Mark(kind, x(score.macs_ratio), y, score, number, below, RADIUS[kind])
            outside = below or not LEFT <= mark.x <= x(across[1])
            if kind == "other" and outside:
                continue
            always = kind in ("chosen", "point", "plain")
            if always or all(_distance(mark, m) >= mark.radius + m.radius + GAP for m in kept):
                kept.append(mark)
    return [replace(m, radius=_fitting(m, kept)) for m in kept]


def _distance(a: Mark, b: Mark) -> float:
    return math.dist((a.x, a.y), (b.x, b.y))


def _fitting(mark: Mark, marks: Sequence[Mark]) -> float:
    """The radius of a mark, or less where the front is dense: half of the way to the nearest other."""
    near = min((_distance(mark, m) for m in marks if m is not mark), default=math.inf)
    return max(min(mark.radius, near / 2 - 0.5), SMALLEST)


def _drawn(results: Results, mark: Mark, y: Scale, log: bool) -> str:
    label = escape(facts_of(results, mark.score), quote=True)
    name = f"Plan {mark.number}\n" if mark.number else ""
    radius = mark.radius
    bar = ""
    if mark.kind in ("chosen", "point") and mark.score.interval is not None and not log:
        ends = [y(_upwards(results, b, log)) for b in mark.score.interval]
        bar = f'<line class="bar" x1="{mark.x:.1f}" y1="{ends[0]:.1f}" x2="{mark.x:.1f}" y2="{ends[1]:.1f}"/>'
    if mark.kind == "plain":
        r = radius * 0.75
        shape = (
            f'<path class="plain" d="M{mark.x - r:.1f} {mark.y - r:.1f}l{2 * r:.1f} {2 * r:.1f}'
            f'm0 {-2 * r:.1f}l{-2 * r:.1f} {2 * r:.1f}"/>'
        )
    else:
        shape = (
            f'<circle class="{mark.kind}" cx="{mark.x:.1f}" cy="{mark.y:.1f}" r="{radius:.1f}"/>'
        )
    picked = f' data-plan="{mark.number.split()[0]}"' if mark.number else ""
    focus = ' tabindex="0"' if mark.number or mark.kind == "plain" else ""
    return f'<g class="dot"{focus}{picked} role="img" aria-label="{name}{label}">{bar}{shape}</g>'


def _front_line(marks: Sequence[Mark]) -> str:
    """Steps through the points above all cheaper ones: to the right at the height of the last.

    A point below a cheaper one is better by its damage alone.
    """
    corners: list[tuple[float, float]] = []
    for corner in sorted((m.x, m.y) for m in marks):
        if not corners or corner[1] < corners[-1][1]:
            corners.append(corner)
    if len(corners) < 2:
        return ""
    steps = "".join(f"H{a:.1f}V{b:.1f}" for a, b in corners[1:])
    return f'<path class="front" d="M{corners[0][0]:.1f} {corners[0][1]:.1f}{steps}"/>'


def _control_lines(
    results: Results,
    by_kind: Sequence[tuple[str, Sequence[Score]]],
    x: Scale,
    place: Callable[[Score], tuple[float, bool]],
) -> list[str]:
    """For each control a dashed curve through its plans, cheapest first."""
    known = {s.plan: s for _, scores in by_kind for s in scores}
    drawn: list[str] = []
    entries = [c for c in controls(results.scores) if c["plan"] in known]
    for how in dict.fromkeys(c["how"] for c in entries):
        scores = [known[c["plan"]] for c in entries if c["how"] == how]
        path = " ".join(f"{x(s.macs_ratio):.1f},{place(s)[0]:.1f}" for s in scores)
        at = x(scores[0].macs_ratio), place(scores[0])[0]
        if len(scores) > 1:
            drawn.append(f'<polyline class="control-line" points="{path}"/>')
        drawn.append(
            f'<text class="quiet" x="{at[0] + 8:.1f}" y="{at[1] + 16:.1f}">control: {escape(how)}</text>'
        )
    return drawn


def _labels(results: Results, marks: Sequence[Mark], right: float) -> list[str]:
    """Of the chosen plans in words, of the other points their numbers, as far as there is room."""
    taken = [m.box() for m in marks]
    drawn: list[str] = []
    for mark in marks:
        if mark.kind == "chosen":
            told = f"{mark.number}: {apart(results, mark.score.plan)}"
            texts = [told if len(told) <= LONGEST else told[: LONGEST - 1].rstrip(" ,") + "\u2026"]
            texts.append(mark.number)
        elif mark.kind == "plain":
            value = height(results, mark.score) or 0.0
            much = f"{value:.3g}" if results.objective == "damage" else f"{value:.1%}"
            texts = [f"plain int8 {much}" + (" \u2193" if mark.below else "")]
        elif mark.kind == "point":
            texts = [mark.number.split()[0]]
        else:
            continue
        own = mark.box()
        spots = [
            (text, box, point, end)
            for text in texts
            for box, point, end in _spots(mark, mark.radius, LETTER * len(text))
            if box[0] >= LEFT - 30 and box[2] <= right + 14 and box[1] >= 0
        ]
        free = [s for s in spots if not any(_overlap(s[1], b) for b in taken if b != own)]
        if free:
            text, box, (x, y), end = free[0]
            taken.append(box)
            strong = ' class="strong"' if mark.kind != "point" else ' class="quiet"'
            drawn.append(
                f'<text{strong} x="{x:.1f}" y="{y:.1f}" text-anchor="{end}">{escape(text)}</text>'
            )
    return drawn


def _spots(mark: Mark, radius: float, wide: float) -> list[tuple[Box, tuple[float, float], str]]:
    """Where a label may stand: above, below, right, left, and further off."""
    x, y = mark.x, mark.y
    found: list[tuple[Box, tuple[float, float], str]] = []
    for off in (4.0, 18.0, 32.0):
        for base in (y - radius - off, y + radius + off + LINE - 5):
            top = base - LINE + 4
            found += [
                ((x - wide / 2, top, x + wide / 2, base + 3), (x, base), "middle"),
                ((x - wide - 2, top, x - 2, base + 3), (x - 2, base), "end"),
                ((x + 2, top, x + wide + 2, base + 3), (x + 2, base), "start"),
            ]
        side = x + radius + off
        found.append(((side, y - 9, side + wide, y + 7), (side, y + 4), "start"))
        side = x - radius - off
        found.append(((side - wide, y - 9, side, y + 7), (side, y + 4), "end"))
    return found


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _level(
    results: Results, y: Scale, right: float, extent: tuple[float, float, bool]
) -> list[str]:
    level = results.baseline.float
    if level is None or extent[2]:
        return []
    at = y(_upwards(results, level, False))
    return [
        f'<line class="level" x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>',
        f'<text class="quiet" x="{LEFT + 6}" y="{at - 5:.1f}">float {level:.2%}</text>',
    ]


def _axes(
    results: Results,
    x: Scale,
    y: Scale,
    across: tuple[float, float],
    extent: tuple[float, float, bool],
    right: float,
    floor: float,
) -> list[str]:
    low, high, log = extent
    drawn = [f'<line class="axis" x1="{LEFT}" y1="{floor}" x2="{right}" y2="{floor}"/>']
    for value in _ticks(*(100 * v for v in across), most=max(3, int(right / 110))):
        at = x(value / 100)
        drawn.append(
            f'<text class="quiet" x="{at:.1f}" y="{floor + 18}" text-anchor="middle">{value:g} %</text>'
        )
    up = _decades(high, low) if log else [v / 100 for v in _ticks(100 * low, 100 * high)]
    for value in up:
        at = y(-math.log10(value) if log else value)
        said = f"{value:g}" if log else f"{100 * abs(value):g} %"
        drawn.append(
            f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>'
            f'<text class="quiet" x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{said}</text>'
        )
    name = "damage of int8, lower is better" if log else f"int8 {results.metric}"
    drawn.append(
        f'<text class="quiet" x="{(LEFT + right) / 2:.0f}" y="{floor + 38}" text-anchor="middle">'
        "MACs, % of the network as it is</text>"
    )
    drawn.append(f'<text class="quiet" x="4" y="12">{escape(name)}</text>')
    return drawn


def _widened(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max(0.05 * (high - low), 0.01)
    return low - room, high + room


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    extent = high - low or 1.0
    return lambda value: start + (value - low) / extent * (end - start)


def _ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers between two values, at most so many."""
    raw = (high - low) / most or 1.0
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    first = math.ceil(low / step)
    return [round(step * i, 9) for i in range(first, math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two values."""
    found = [
        m * 10.0**e
        for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for m in (1, 2, 5)
    ]
    return [float(f"{v:.3g}") for v in found if low <= v <= high]
