"""AIMET's QuantAnalyzer: one layer's quantizers enabled at a time. Runs in an environment of its own.

python aimet_enable_one.py DATA.npz OUT.json '{"factory": "mcunet", "threads": 1, "per_channel": true}'
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zoo  # type: ignore[import-not-found]
from aimet_torch.common import quantsim_config  # type: ignore[import-not-found]
from aimet_torch.common.defs import CallbackFunc, QuantScheme  # type: ignore[import-not-found]
from aimet_torch.quant_analyzer import QuantAnalyzer  # type: ignore[import-not-found]


def main(data: str, out: str, options: dict) -> None:
    torch.set_num_threads(options["threads"])
    arrays = np.load(data)
    calibration = torch.from_numpy(arrays["calibration"])
    images = torch.from_numpy(arrays["images"])
    model = getattr(zoo, options["factory"])().eval()
    with torch.no_grad():
        reference = torch.cat([model(x) for x in images.split(50)]).double().log_softmax(1)

    def calibrate(model: torch.nn.Module, _: object) -> None:
        with torch.no_grad():
            for x in calibration.split(50):
                model(x)

    def evaluate(model: torch.nn.Module, _: object) -> float:
        with torch.no_grad():
            found = torch.cat([model(x) for x in images.split(50)]).double().log_softmax(1)
        return -float((reference.exp() * (reference - found)).sum(1).mean())

    config = None
    if options["per_channel"]:
        folder = Path(quantsim_config.__file__).parent
        config = str(next(folder.rglob("default_config_per_channel.json")))
    cpu, wall = time.process_time(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        analyzer = QuantAnalyzer(
            model, images[:1], CallbackFunc(calibrate), CallbackFunc(evaluate)
        )
        # what analyze() does, without the analyses that we have no counterpart for
        sim = analyzer._create_quantsim_and_encodings(QuantScheme.post_training_tf, 8, 8, config)
        scores = analyzer.perform_per_layer_analysis_by_enabling_quant_wrappers(sim, folder)
    seconds = time.process_time() - cpu, time.perf_counter() - wall
    result = {
        "name": "AIMET QuantAnalyzer, enable one",
        "cpu": seconds[0],
        "wall": seconds[1],
        "damage": {name: -score for name, score in scores.items()},
    }
    with open(out, "w", encoding="utf-8") as file:
        json.dump(result, file)


main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
