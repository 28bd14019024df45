"""What to do now: which plan to ship, what it costs and keeps, and how sure that is."""

from __future__ import annotations

from search.pareto.plan_summary import plan_summary
from search.results import Results
from search.run_dir.scores import Score

WORTH = 1.15  # times as fast as float, below which int8 is said to gain little


def advice(results: Results) -> str:
    """What to do now, in one sentence."""
    best, empty = results.best(), results.empty()
    facts = results.facts
    on = f"on {results.samples} samples ({facts['engine']}, target {facts['target']})"
    if not best.plan:
        return (
            "Ship the network as it is: no rewrite within the limits beats plain int8, "
            f"{quality_said(results, best)} {on}."
        )
    many = "s" if best.float_layers > 1 else ""
    kept = f" and {best.float_layers} layer{many} in float" if best.float_layers else ""
    plain = "was not scored" if empty is None else f"has {quality_said(results, empty)}"
    level = results.baseline.float
    floats = "" if level is None else f" and float {level:.2%}"
    number = results.front.all().index(best) + 1
    return (
        f"Ship plan {number} ({words(results, best)}): {quality_said(results, best)} with {cost_said(best)}{kept}, "
        f"where plain int8 {plain}{floats}, {on}."
    )


def words(results: Results, score: Score) -> str:
    """A plan in words."""
    return plan_summary(score.plan, results.places)


def cost_said(score: Score) -> str:
    """What a plan adds or saves."""
    change = score.macs_ratio - 1
    if abs(change) < 5e-4:
        return "no more compute"
    return f"{abs(change):.1%} {'more' if change > 0 else 'fewer'} MACs"


def quality_said(results: Results, score: Score) -> str:
    """The metric with its interval; the damage where that is what plans are chosen by."""
    if score.metric is None or results.objective == "damage":
        # JSON has no infinity, which a damage may be
        return "damage " + ("infinite" if score.damage is None else f"{score.damage:.4g}")
    low, high = score.interval or (score.metric, score.metric)
    return f"{results.metric} {score.metric:.2%} [{low:.2%}, {high:.2%}]"


def certainty(results: Results) -> list[str]:
    """How sure the choice is, a sentence each."""
    best, empty = results.best(), results.empty()
    said: list[str] = []
    if best.plan and empty is not None:
        said.append(_against_plain(results, best, empty))
    held_back = luck(results)
    if held_back:
        said.append(held_back)
    count = len(results.front.points)
    if count > 1:
        said.append(
            f"{results.separable} of {count} points of the front differ from the one before beyond the noise."
        )
    return said


def _against_plain(results: Results, best: Score, empty: Score) -> str:
    factor = (
        ""
        if not best.damage or empty.damage is None
        else f" Its damage is {_times(empty.damage / best.damage)} times smaller."
    )
    if results.objective == "damage" or best.interval is None or empty.interval is None:
        return f"Chosen by its damage, which needs no labels.{factor}"
    up = results.higher_is_better
    better, worse = (best, empty) if up else (empty, best)
    assert better.interval is not None
    assert worse.interval is not None
    if better.interval[0] > worse.interval[1]:
        return f"The gain over plain int8 is beyond chance: the 95 % intervals do not overlap.{factor}"
    return (
        "In the metric it cannot be told from plain int8 on these samples (the 95 % intervals overlap); "
        f"the damage decides.{factor}"
    )


def _times(factor: float) -> str:
    return f"{factor:.3g}" if factor < 100 else f"{factor:.0f}"


def luck(results: Results) -> str:
    """What the images held back say of the chosen plan, in one sentence; "" without any."""
    if not results.is_confirmed:
        return ""
    known = results.confirmed[results.best().plan]
    parts = (known.selection, known.held)
    drops = [results.drop(s) for s in parts]
    if results.objective == "damage" or None in drops:
        said = [f"damage {s.damage:.4g}" for s in parts]
    else:
        said = [
            f"{d:+.2f} points against float" for d in (round(-(x or 0.0), 2) + 0.0 for x in drops)
        ]
    return (
        f"The best plan was chosen on {parts[0].samples} images, where it has {said[0]}; on the "
        f"{parts[1].samples} images held back it has {said[1]}."
    )


def worth(results: Results) -> list[str]:
    """Whether int8 is worth it on this machine, where its time was measured."""
    best, level = results.best(), getattr(results.baseline, "float_latency_ms", None)
    if best.latency_ms is None or not level:
        return []
    factor = level / best.latency_ms
    if factor >= WORTH:
        return [
            f"Int8 is worth it on this machine: {best.latency_ms:.3g} ms for one input, float "
            f"{level:.3g} ms, {factor:.2f} times as fast."
        ]
    return [
        f"Int8 gains little time on this machine: {best.latency_ms:.3g} ms for one input, float "
        f"{level:.3g} ms; it is worth it for the size of the file, or on another device."
    ]
