"""What each remedy gives back of a detector's int8 loss: one line for each plan.

    python benchmarks/detection.py ../shared/assets/yolo_fastest.yaml --out runs/detection
    python benchmarks/detection.py CONFIG --out DIR --plan "split_head_3@a split_range_3@b" ...

Scores are kept in DIR, so that the command goes on where it stopped. Images, engine and target are
those of the config; the interval is 95 %, paired with the float network on the same images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rewriter import Plan, find_sites, rewrite
from rewriter.fitting.fit import fit
from rewriter.int8.simulate import quantize
from rewriter.rules import Site
from search.config.schema import load_config
from search.job import Job, open_job
from search.run_dir.scores import Score

REMEDIES = ("refine_ranges", "equalize", "correct_bias", "round_weights")
EVEN = "split_range_3"


def plans(job: Job) -> Iterator[tuple[str, str]]:
    """Names and texts of the plans, from plain int8 to all remedies together."""
    sites = [s for s in find_sites(job.gm) if not s.blocked]
    heads = list(dict.fromkeys(s.anchor for s in sites if s.rule == "split_head_auto"))
    block = _first(sites, "replace_block")
    split = f"{EVEN}@{_first(sites, EVEN).anchor}"
    yield "plain int8", ""
    yield "heads left in float", " ".join(f"keep_float@{h}" for h in heads)
    for k in ("2", "3", "4", "auto"):
        yield f"heads split ({k})", " ".join(f"split_head_{k}@{h}" for h in heads)
    base = " ".join(f"split_head_4@{h}" for h in heads)
    replaced = f"{base} replace_block@{block.anchor}"
    for words in (("refine_ranges",), ("equalize",), ("refine_ranges", "equalize")):
        yield f"+ {', '.join(words)}", f"{base} {_on_model(words)}"
    yield "+ first block replaced", replaced
    for words in (("refine_ranges",), ("equalize",), ("refine_ranges", "equalize")):
        yield f"  + {', '.join(words)}", f"{replaced} {_on_model(words)}"
    yield "  + all free", f"{replaced} {_on_model(REMEDIES)}"
    yield "+ split by range", f"{base} {split}"
    for i in range(1, len(REMEDIES) + 1):
        yield f"  + {REMEDIES[i - 1]}", f"{base} {split} {_on_model(REMEDIES[:i])}"
    # the replaced block has no activation left to split: its last two layers merged leave it
    merged = next(s for s in sites if s.rule == "merge_separable" and s.nodes[-1] in block.nodes)
    yield "both: split, then merged", f"{base} {split} merge_separable@{merged.anchor}"
    yield "  + all free", f"{base} {split} merge_separable@{merged.anchor} {_on_model(REMEDIES)}"
    yield "free remedies alone", _on_model(REMEDIES)


def _on_model(words: Sequence[str]) -> str:
    return " ".join(f"{w}@model" for w in words)


def closed_form(job: Job, plan: Plan) -> Score:
    """The score of a plan whose fits stop at the closed form."""
    e = job.evaluator
    fits = fit(e.gm, plan, e.calibration, e.scheme, e.store, e.seed, distilled=False)
    made = rewrite(e.gm, plan, fits.weights)
    quantized = quantize(made, e.scheme, e.calibration, made.meta.get("calibration", "minmax"))
    run = e.runner(quantized)
    found = [run(x) for x in e.samples.batches()]
    outputs = [torch.cat(parts) for parts in zip(*found, strict=True)]
    return replace(e.measured.compare(outputs, (0, e.samples.count))[0], plan=str(plan))


def line(name: str, score: Score, level: float) -> str:
    if score.error is not None or score.metric is None or score.damage is None:
        return f"{name:28} {score.error}"
    low, high = score.interval or (score.metric, score.metric)
    return (
        f"{name:28} {score.macs_ratio:6.3f} {score.metric:6.4f} [{low:.4f}, {high:.4f}] "
        f"{score.metric / level:6.1%} {score.damage:8.5f} {score.float_layers:3d} "
        f"{score.seconds:6.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", action="append", help="score these instead; may be repeated")
    given = parser.parse_args()
    torch.set_num_threads(1)
    job = open_job(load_config(given.config), given.out, threads=1)
    e = job.evaluator
    level = e.baseline().float or float("nan")
    print(f"{e.samples.count} images, {e.engine}, target {job.cfg.target}; float {level:.4f}")
    print(f"{'plan':28} {'MACs':>6} {'int8':>6} {'95 %':16} {'/float':>6} {'damage':>8} flt  sec")
    chosen = plans(job) if given.plan is None else ((p, p) for p in given.plan)
    for name, text in chosen:
        plan = Plan.parse(text)
        print(line(name, e.score(plan, "whole"), level), flush=True)
        if ("replace_block" in text or "merge_" in text) and "@model" not in text:
            print(line("  the same, closed form", closed_form(job, plan), level), flush=True)


def _first(sites: list[Site], rule: str) -> Site:
    return next(s for s in sites if s.rule == rule)


if __name__ == "__main__":
    main()
