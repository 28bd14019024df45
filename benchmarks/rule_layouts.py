"""Exact rules on published layouts with random weights: sites, near misses, and by how much the outputs differ.

    python -m benchmarks.rule_layouts scale_norm unmerge_rep --networks vit_tiny_patch16_224 convnext_atto

One step of each rule at each of its sites (at most ``--most``), all of one rule together, in float64;
the difference is relative to the largest output. Re-parameterized networks are merged. Weights are
random, batch norms settled on random images.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import fx

from benchmarks.sweep_networks import settle
from rewriter import RULES, Plan, PlanError, Step, profile, rewrite, target, trace

NETWORKS = (
    *("mobilenetv3_small_050", "efficientnet_b0", "vit_tiny_patch16_224", "convnext_atto"),
    *("repvgg_a0", "swin_tiny_patch4_window7_224", "mobilevitv2_050", "levit_128s"),
)


def together(gm: fx.GraphModule, steps: list[Step]) -> list[Step]:
    """Those of some steps that go with the ones before them."""
    if _applies(gm, steps):
        return steps
    if len(steps) <= 1:
        return []
    half = together(gm, steps[: len(steps) // 2])
    for step in steps[len(steps) // 2 :]:
        if _applies(gm, [*half, step]):
            half = [*half, step]
    return half


def _applies(gm: fx.GraphModule, steps: list[Step]) -> bool:
    try:
        rewrite(gm, Plan(tuple(steps)))
    except PlanError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "rules", nargs="*", help="beginnings of names; all exact ones where none is given"
    )
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--most", type=int, default=1000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rules = [
        r
        for r in RULES
        if r.contract == "exact"
        and (not given.rules or any(r.name.startswith(word) for word in given.rules))
    ]
    for name in given.networks:
        start = time.process_time()
        model: Any = timm.create_model(name, pretrained=False)
        size = model.default_cfg["input_size"]
        x = torch.rand(2, *size)
        settle(model, x)
        model = reparameterize_model(model)
        gm = trace(model.eval(), x)
        gm.meta["scheme"] = target(given.target)
        profile(gm, [x])
        gm = gm.double()
        with torch.no_grad():
            wanted = gm(x.double())
        for rule in rules:
            found = list(rule.match(gm))
            free = [s for s in found if not s.blocked][: given.most]
            kept = together(gm, [Step.at(s) for s in free])
            difference = 0.0
            if kept:
                with torch.no_grad():
                    made = rewrite(gm, Plan(tuple(kept)))(x.double())
                difference = float((made - wanted).abs().max() / wanted.abs().max())
            row = f"{name:32} {rule.name:24} {len(free):4} sites {len(found) - len(free):4} near misses"
            print(f"{row}  {len(kept):4} together, differ by {difference:.1e}", flush=True)
        print(f"{name}: {time.process_time() - start:.0f} s of one core", flush=True)


if __name__ == "__main__":
    main()
