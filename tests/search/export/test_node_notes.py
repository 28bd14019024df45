"""Notes in the exported file: at the right nodes, and without any effect on what it computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from rewriter import Plan, profile, target, trace
from rewriter.assemble import assemble
from rewriter.int8.onnx import to_onnx
from search.export.node_notes import annotate, node_notes
from search.results import load_results
from tests.search import small
from tests.search.report.test_report import PLANS, make


def test_damage_cause_and_rule_stand_at_the_nodes_and_the_file_computes_the_same(
    tmp_path: Path,
) -> None:
    gm = trace(small.small(), torch.randn(2, 3, 16, 16))
    batch = torch.stack([small.data().calibration[i] for i in range(16)])
    profile(gm, [batch])
    plan = Plan.parse("keep_float@fc split_weights_2@stem_0")
    quantized = assemble(gm, plan, target("per_tensor"), [batch]).quantized
    file = tmp_path / "model_int8.onnx"
    file.write_bytes(to_onnx(quantized).SerializeToString())
    before = _run(file, batch)

    make(tmp_path / "run", PLANS)
    path = tmp_path / "run" / "sensitivity.json"
    content = json.loads(path.read_text())
    content["layers"][0] |= {"node": "stem_0", "layer": "stem.0"}
    path.write_text(json.dumps(content))
    sensitivity = load_results(tmp_path / "run").sensitivity
    data = annotate(file, node_notes(quantized.gm, sensitivity))
    model = onnx.load(str(file))
    onnx.checker.check_model(model)
    by_name = {n.name: {p.key: p.value for p in n.metadata_props} for n in model.graph.node}
    stem = by_name["stem_0.Conv"]
    assert stem["quantfix.damage"] == f"{content['layers'][0]['damage']:.4g}"
    assert stem["quantfix.cause"] == "weight_channel_spread"
    assert stem["quantfix.rule"] == "split_weights_2@stem_0"
    assert by_name["fc.Gemm"]["quantfix.float"] == "left in float"
    documented = {n.name: n.doc_string for n in model.graph.node if n.doc_string}
    assert "damage alone in int8" in documented["stem_0.Conv"]
    assert not any(by_name[n.name] for n in model.graph.node if n.op_type == "QuantizeLinear")
    np.testing.assert_array_equal(before, _run(file, batch))

    assert data is not None
    graphs = json.loads(data.read_text())
    (graph,) = graphs.values()
    assert graph["results"]["stem_0.Conv"]["value"] > 0
    outputs = {o for n in model.graph.node for o in n.output}
    assert set(graph["results"]) <= outputs


def test_a_file_of_another_form_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "model_int8.tflite"
    file.write_bytes(b"x")
    assert annotate(file, {}) is None
    assert file.read_bytes() == b"x"


def _run(file: Path, batch: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
