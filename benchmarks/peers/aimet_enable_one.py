"""AIMET's QuantAnalyzer: one layer's quantizers enabled at a time. Runs in an environment of its own.

python aimet_enable_one.py DATA.npz OUT.json '{"factory": "mcunet", "threads": 1, "per_channel": true}'
"""

from __future__ import annotations

import json
import sys
import tempfile
import time

import numpy as np
import torch
import zoo  # type: ignore[import-not-found]
from aimet_torch.quant_analyzer import CallbackFunc, QuantAnalyzer  # type: ignore[import-not-found]


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

    cpu, wall = time.process_time(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        analyzer = QuantAnalyzer(
            model, images[:1], CallbackFunc(calibrate, None), CallbackFunc(evaluate, None)
        )
        from aimet_torch.quantsim import QuantizationSimModel  # type: ignore[import-not-found]

        settings = {
            "quant_scheme": "post_training_tf",
            "default_param_bw": 8,
            "default_output_bw": 8,
        }
        create = (
            getattr(analyzer, "create_quantsim_and_encodings", None)
            or analyzer._create_quantsim_and_encodings
        )
        try:
            sim = create(
                quant_scheme="min_max", default_param_bw=8, default_output_bw=8, config_file=None
            )
        except Exception:  # the name of the scheme differs between versions
            sim = create(**settings, config_file=None)
        assert isinstance(sim, QuantizationSimModel)
        one = getattr(analyzer, "perform_per_layer_analysis_by_enabling_quantizers", None)
        one = one or analyzer.perform_per_layer_analysis_by_enabling_quant_wrappers
        scores = one(sim, folder)
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
