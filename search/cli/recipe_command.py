"""The command ``quantfix recipe``: the plans of a finished run, for other weights of the same architecture."""

from __future__ import annotations

from pathlib import Path

from search.cli.console import say
from search.pareto.plan_summary import plan_summary
from search.results import Results, load_results
from search.run_dir.files import RunError
from search.strategy.recipe import Proven, Recipe, write_recipe


def recipe(folder: Path, file: Path | None, quiet: bool) -> None:
    """Write the best plan, the knee and the front of a run as a recipe."""
    results = load_results(folder)
    path = file or Path("recipes") / f"{Path(str(results.facts['config'])).stem}.yaml"
    write_recipe(path, recipe_of(results))
    if not quiet:
        say(f"written: {path}; another run tries its plans first with search: {{recipe: {path}}}")


def recipe_of(results: Results) -> Recipe:
    """The plans of a front that are not plain int8, the best first.

    Raises:
        RunError: there is none, or a version wrote the run that did not note the architecture.
    """
    architecture = results.facts.get("architecture")
    if not isinstance(architecture, str):
        raise RunError(
            f"{results.folder}: written by a version that did not note the architecture: "
            f"quantfix run {results.facts['config']} --out {results.folder}"
        )
    best = results.best()
    ranked = [best, *(s for s in results.front.points if s.plan != best.plan)]
    plans = [
        Proven(
            plan=s.plan,
            summary=plan_summary(s.plan, results.places),
            macs_ratio=round(s.macs_ratio, 4),
            int8=s.metric,
            damage=s.damage,
        )
        for s in ranked
        if s.plan
    ]
    if not plans:
        raise RunError(f"{results.folder}: no plan of its front is better than plain int8")
    base = results.baseline
    return Recipe(
        format=1,
        network=Path(str(results.facts["config"])).stem,
        architecture=architecture,
        target=str(results.facts["target"]),
        metric=results.metric,
        samples=results.samples,
        float=base.float,  # pyright: ignore[reportCallIssue]
        int8=base.int8,
        damage=base.damage,
        plans=plans,
    )
