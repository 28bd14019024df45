"""The front as a small plot of characters."""

from __future__ import annotations

from collections.abc import Sequence

from search.cli.tables import MOST_PLANS
from search.pareto.controls import controls
from search.report.rows import chosen_few, numbered
from search.results import Results

WIDTH, HEIGHT, LEFT = 64, 13, 9


def front_plot(results: Results) -> list[str]:
    """Compute to the right, int8 quality upwards: plans by their number, plain int8 as x, controls as o.

    Empty where all cost the same: one column of marks says no more than the table.
    """
    named = {s.plan for _, s in chosen_few(results, MOST_PLANS)}
    points = [
        (
            s.macs_ratio,
            _height(results, s.metric, s.damage),
            mark.split()[0] if s.plan in named else ".",
        )
        for mark, s in numbered(results)
    ]
    empty = results.empty()
    if empty is not None and all(s.plan for s in results.front.all()):
        points.append((1.0, _height(results, empty.metric, empty.damage), "x"))
    points += [
        (c["macs_ratio"], _height(results, c["int8"], c["damage"]), "o")
        for c in controls(results.scores)
    ]
    shown = [(x, y, mark) for x, y, mark in points if y is not None]
    if len({x for x, _, _ in shown}) < 2:
        return []
    level = results.baseline.float if results.objective == "metric" else None
    across = [x for x, _, _ in shown]
    lowest = min(y for _, y, mark in shown if mark != "o" or len(shown) == 1)
    heights = [max(y, lowest) for _, y, _ in shown] + ([] if level is None else [level])
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    if level is not None:
        grid[_row(level, heights)] = ["-"] * WIDTH
    # numbers last, over what they hide
    for x, y, mark in sorted(shown, key=lambda p: p[2].isdigit()):
        if y >= lowest:
            _put(grid, _row(y, heights), _column(x, across), mark)
    return _framed(results, grid, across, heights, level is not None)


def _height(results: Results, metric: float | None, damage: float | None) -> float | None:
    """Upwards is better; a damage counts downwards."""
    if results.objective == "damage":
        return None if damage is None else -damage
    if metric is None:
        return None
    return metric if results.higher_is_better else -metric


def _row(value: float, heights: Sequence[float]) -> int:
    extent = max(heights) - min(heights)
    return round((max(heights) - value) / extent * (HEIGHT - 1)) if extent else HEIGHT // 2


def _column(value: float, across: Sequence[float]) -> int:
    extent = max(across) - min(across)
    return round((value - min(across)) / extent * (WIDTH - 3))


def _put(grid: list[list[str]], row: int, column: int, mark: str) -> None:
    """Write a mark, a little aside where a number stands already."""
    for place in (column, column + 1, column + 2, column - 1, column - 2):
        cells = range(place, place + len(mark))
        near = range(max(place - 1, 0), min(place + len(mark) + 1, WIDTH))
        if place < 0 or place + len(mark) > WIDTH or any(grid[row][c].isdigit() for c in near):
            continue
        for cell, letter in zip(cells, mark, strict=True):
            grid[row][cell] = letter
        return


def _framed(
    results: Results,
    grid: Sequence[Sequence[str]],
    across: Sequence[float],
    heights: Sequence[float],
    has_level: bool,
) -> list[str]:
    top, bottom = max(heights), min(heights)
    at = {0: top, HEIGHT // 2: (top + bottom) / 2, HEIGHT - 1: bottom}
    said = {row: _tick(results, value) for row, value in at.items()}
    lines = [f"{said.get(i, ''):>{LEFT}} |{''.join(row)}".rstrip() for i, row in enumerate(grid)]
    low, high = (f"{100 * v:.0f} %" for v in (min(across), max(across)))
    middle = "of the MACs"
    room = WIDTH - len(low) - len(high)
    lines.append(f"{'':>{LEFT}} +{'-' * WIDTH}")
    lines.append(f"{'':>{LEFT}}  {low}{middle:^{room}}{high}")
    legend = ["numbers: plans of the table", "x: plain int8", "o: controls", "-: float"]
    letters = {cell for row in grid for cell in row}
    kept = [
        legend[0],
        *(legend[1:2] if "x" in letters else []),
        *(legend[2:3] if "o" in letters else []),
        *(legend[3:] if has_level else []),
    ]
    name = "damage" if results.objective == "damage" else results.metric
    return [f"int8 {name}; {'; '.join(kept)}", *lines]


def _tick(results: Results, value: float) -> str:
    if results.objective == "damage":
        return f"{-value:.3g}"
    return f"{100 * abs(value):.1f} %"
