"""NVIDIA ModelOpt's gradient scores (auto_quantize). Runs in an environment of its own.

python modelopt_gradient.py DATA.npz OUT.json '{"factory": "mcunet", "threads": 1, "per_channel": true}'
"""

from __future__ import annotations

import json
import sys
import time

import modelopt.torch.quantization as mtq  # type: ignore[import-not-found]
import numpy as np
import torch
import zoo  # type: ignore[import-not-found]


def main(data: str, out: str, options: dict) -> None:
    torch.set_num_threads(options["threads"])
    arrays = np.load(data)
    images = torch.from_numpy(arrays["images"])
    model = getattr(zoo, options["factory"])().eval()
    batches = [{"x": x} for x in images.split(10)]

    def loss(output: torch.Tensor, _: object) -> torch.Tensor:
        # the labels of the float network: no others are given
        return torch.nn.functional.cross_entropy(output, output.argmax(1))

    config = mtq.INT8_DEFAULT_CFG
    cpu, wall = time.process_time(), time.perf_counter()
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": 12.0},
        quantization_formats=[config],
        data_loader=batches,
        forward_step=lambda model, batch: model(batch["x"]),
        loss_func=loss,
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        verbose=False,
    )
    seconds = time.process_time() - cpu, time.perf_counter() - wall
    damage: dict[str, float] = {}
    for name, stats in state["candidate_stats"].items():
        # formats and scores are ordered alike; the last format is "not quantized"
        damage[name.removesuffix(".quant_recipe")] = max(map(float, stats["scores"]))
    result = {
        "name": "ModelOpt auto_quantize, gradient",
        "cpu": seconds[0],
        "wall": seconds[1],
        "damage": damage,
    }
    with open(out, "w", encoding="utf-8") as file:
        json.dump(result, file)


main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
