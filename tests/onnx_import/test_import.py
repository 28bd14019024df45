"""ONNX files read back as torch networks; the oracle is ONNX Runtime on the file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from rewriter import quantize, target, trace
from rewriter.errors import TraceError
from rewriter.graph.lookup import is_call
from rewriter.int8.onnx import Session, to_onnx
from rewriter.onnx_import import OnnxNetwork, import_onnx, importer

RANDOM = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray[Any, Any]:
    return RANDOM.standard_normal(shape).astype(np.float32)


def file(
    folder: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray[Any, Any]],
    shape: list[Any],
    opset: int = 17,
) -> Path:
    """A file with the input ``x`` and the output ``y``."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path = folder / "net.onnx"
    onnx.save(model, str(path))
    return path


def same_as_the_runtime(path: Path, sizes: list[int] | None = None, batch: int = 1) -> OnnxNetwork:
    net = import_onnx(path, sizes)
    x = torch.randn(batch, *net.input_sizes[0])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    found = net(x)
    for a, b in zip(wanted, found if isinstance(found, tuple) else (found,), strict=True):
        torch.testing.assert_close(b, torch.from_numpy(np.asarray(a)), rtol=1e-4, atol=1e-5)
    trace(net, torch.randn(2, *net.input_sizes[0]))
    return net


N = helper.make_node
IMAGE = ["n", 4, 9, 11]
TWICE = {"s": np.array([1, 1, 2, 2], np.float32)}
FLOOR = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
UPWARDS: dict[str, Any] = {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}
STATISTICS = {"s": array(4), "b": array(4), "m": array(4), "v": np.abs(array(4)) + 0.5}
ints = lambda *v: np.array(v, np.int64)  # noqa: E731
CASES: list[tuple[str, list[onnx.NodeProto], dict[str, Any], int]] = [
    ("conv same upper", [N("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])], {"w": array(5, 4, 4, 3)}, 17),
    ("conv same lower", [N("Conv", ["x", "w"], ["y"], auto_pad="SAME_LOWER", strides=[2, 2])], {"w": array(5, 4, 4, 3)}, 17),
    ("conv uneven pads", [N("Conv", ["x", "w"], ["y"], pads=[0, 1, 2, 0])], {"w": array(5, 4, 3, 3)}, 17),
    ("grouped dilated", [N("Conv", ["x", "w", "b"], ["y"], group=2, dilations=[2, 1])], {"w": array(6, 2, 3, 3), "b": array(6)}, 17),
    ("transposed", [N("ConvTranspose", ["x", "w"], ["y"], **UPWARDS)], {"w": array(4, 3, 3, 3)}, 17),
    ("transposed same", [N("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], auto_pad="SAME_UPPER")], {"w": array(4, 3, 3, 3)}, 17),
    ("transposed uneven", [N("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], pads=[0, 1, 1, 0])], {"w": array(4, 3, 3, 3)}, 17),
    ("bias apart", [N("Conv", ["x", "w"], ["a"]), N("Add", ["a", "b"], ["y"])], {"w": array(5, 4, 1, 1), "b": array(1, 5, 1, 1)}, 17),
    ("batch norm", [N("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"])], STATISTICS, 15),
    ("max pool ceil", [N("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)], {}, 17),
    ("max pool uneven", [N("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER")], {}, 17),
    ("average uneven", [N("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])], {}, 17),
    ("average counted", [N("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)], {}, 17),
    ("clip 0 6", [N("Clip", ["x", "lo", "hi"], ["y"])], {"lo": np.float32(0), "hi": np.float32(6)}, 13),
    ("clip attributes", [N("Clip", ["x"], ["y"], min=-1.0, max=0.5)], {}, 9),
    ("hard sigmoid", [N("HardSigmoid", ["x"], ["y"], alpha=0.2, beta=0.5)], {}, 17),
    ("prelu", [N("PRelu", ["x", "s"], ["y"])], {"s": array(4, 1, 1)}, 17),
    ("selu", [N("Selu", ["x"], ["y"])], {}, 17),
    ("softmax of old", [N("Softmax", ["x"], ["y"], axis=1)], {}, 11),
    ("softmax", [N("Softmax", ["x"], ["y"], axis=1)], {}, 13),
    ("reduce attribute", [N("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)], {}, 13),
    ("reduce input", [N("ReduceMean", ["x", "a"], ["y"], keepdims=1)], {"a": ints(-1)}, 18),
    ("reduce l2", [N("ReduceL2", ["x"], ["y"], axes=[1])], {}, 13),
    ("instance norm", [N("InstanceNormalization", ["x", "s", "b"], ["y"])], {"s": array(4), "b": array(4)}, 17),
    ("slice",
     [N("Slice", ["x", "a", "b", "c", "d"], ["y"])], {"a": ints(1, 0), "b": ints(4, 99), "c": ints(1, 3), "d": ints(1, 2)}, 17),
    ("slice attributes", [N("Slice", ["x"], ["y"], starts=[-3], ends=[-1], axes=[1])], {}, 9),
    ("split",
     [N("Split", ["x", "s"], ["a", "b"], axis=1), N("Mul", ["b", "b"], ["c"]),
      N("Concat", ["c", "a"], ["y"], axis=1)], {"s": ints(1, 3)}, 17),
    ("gather one", [N("Gather", ["x", "i"], ["y"], axis=1)], {"i": np.array(2)}, 17),
    ("gather many", [N("Gather", ["x", "i"], ["y"], axis=1)], {"i": ints(3, 0, 1)}, 17),
    ("transpose", [N("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1])], {}, 17),
    ("pad", [N("Pad", ["x", "p"], ["y"])], {"p": ints(0, 0, 1, 2, 0, 0, 3, 0)}, 17),
    ("pad reflect", [N("Pad", ["x", "p"], ["y"], mode="reflect")], {"p": ints(0, 0, 1, 2, 0, 0, 3, 0)}, 17),
    ("nearest", [N("Resize", ["x", "", "s"], ["y"], mode="nearest", **FLOOR)], TWICE, 17),
    ("bilinear sizes", [N("Resize", ["x", "", "", "s"], ["y"], mode="linear")], {"s": ints(1, 4, 13, 20)}, 17),
    ("bilinear corners",
     [N("Resize", ["x", "", "s"], ["y"], mode="linear", coordinate_transformation_mode="align_corners")], TWICE, 17),
    ("upsample", [N("Upsample", ["x", "s"], ["y"], mode="nearest")], TWICE, 9),
    ("power of a sum", [N("Add", ["x", "c"], ["a"]), N("Pow", ["a", "two"], ["y"])], {"c": np.float32(0.5), "two": np.float32(2)}, 17),
]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "constants", "opset"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_operators(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], opset: int, tmp_path: Path
) -> None:
    shape: list[Any] = (
        [1, *IMAGE[1:]] if nodes[0].op_type == "Resize" and nodes[0].input[2] == "" else IMAGE
    )
    path = file(tmp_path, nodes, constants, shape, opset)
    same_as_the_runtime(path, batch=1 if shape[0] == 1 else 3)


def test_depth_to_space_in_both_orders_and_back(tmp_path: Path) -> None:
    for mode in ("DCR", "CRD"):
        nodes = [
            N("DepthToSpace", ["x"], ["a"], blocksize=2, mode=mode),
            N("SpaceToDepth", ["a"], ["y"], blocksize=2),
        ]
        same_as_the_runtime(file(tmp_path, nodes, {}, ["n", 8, 3, 5]), batch=2)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent_layers_with_the_gates_in_torchs_order(
    kind: str, direction: str, tmp_path: Path
) -> None:
    gates, ways, hidden = {"LSTM": 4, "GRU": 3}[kind], 1 + (direction == "bidirectional"), 5
    more: dict[str, Any] = {"linear_before_reset": 1} if kind == "GRU" else {}
    nodes = [
        N("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        N(kind, ["t", "w", "r", "b"], ["h"], hidden_size=hidden, direction=direction, **more),
        N("Transpose", ["h"], ["y"], perm=[2, 0, 1, 3]),
    ]
    constants = {
        "w": array(ways, gates * hidden, 6),
        "r": array(ways, gates * hidden, hidden),
        "b": array(ways, 2 * gates * hidden),
    }
    same_as_the_runtime(file(tmp_path, nodes, constants, ["n", 7, 6]), batch=3)


def test_shape_arithmetic_is_folded_and_the_batch_stays_free(tmp_path: Path) -> None:
    nodes = [
        N("Shape", ["x"], ["shape"]),
        N("Gather", ["shape", "zero"], ["batch"], axis=0),
        N("Unsqueeze", ["batch", "axis"], ["head"]),
        N("Concat", ["head", "minus"], ["sizes"], axis=0),
        N("Reshape", ["x", "sizes"], ["y"]),
    ]
    constants = {"zero": np.array(0), "axis": ints(0), "minus": ints(-1)}
    net = same_as_the_runtime(file(tmp_path, nodes, constants, IMAGE), batch=3)
    assert not [n for n in net.graph.nodes if "shape" in str(n.target) and n.op != "call_method"]


def test_a_fixed_batch_of_one_is_freed_through_windows_and_sequences(tmp_path: Path) -> None:
    nodes = [
        N("Reshape", ["x", "windows"], ["a"]),  # (1, 4, 8, 6) -> (1, 4, 2, 4, 2, 3)
        N("Transpose", ["a"], ["b"], perm=[0, 2, 4, 3, 5, 1]),
        N("Reshape", ["b", "merged"], ["c"]),  # the batch merged with windows: (4, 12, 4)
        N("MatMul", ["c", "w"], ["d"]),
        N("Reshape", ["d", "apart"], ["e"]),  # (1, 4, 12, 5)
        N("Transpose", ["e"], ["f"], perm=[1, 2, 0, 3]),
        N("Reshape", ["f", "rows"], ["g"]),  # (48, 5): sequence first, then the batch
        N("MatMul", ["g", "v"], ["h"]),
        N("Reshape", ["h", "back"], ["i"]),  # (48, 1, 3)
        N("Transpose", ["i"], ["y"], perm=[1, 0, 2]),
    ]
    constants = {
        "windows": ints(1, 4, 2, 4, 2, 3), "merged": ints(4, 12, 4), "apart": ints(1, 4, 12, 5),
        "rows": ints(48, 5), "back": ints(48, 1, 3), "w": array(4, 5), "v": array(5, 3),
    }  # fmt: skip
    net = import_onnx(file(tmp_path, nodes, constants, [1, 4, 8, 6]))
    x = torch.randn(3, 4, 8, 6)
    torch.testing.assert_close(net(x), torch.cat([net(one[None]) for one in x]))
    trace(net, x[:2])


def test_names_of_inputs_and_outputs_and_layers_are_those_of_the_file(tmp_path: Path) -> None:
    nodes = [
        N("Conv", ["x", "w"], ["a"], name="/stem/Conv"),
        N("Relu", ["a"], ["y"], name="/stem/act"),
    ]
    net = import_onnx(file(tmp_path, nodes, {"w": array(2, 4, 1, 1)}, IMAGE))
    assert net.input_names == ("x",)
    assert net.output_names == ("y",)
    assert dict(net.named_modules()).keys() >= {"stem_Conv", "stem_act"}


def test_torchs_exporter_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    path = tmp_path / "net.onnx"
    x = torch.randn(1, 3, 20, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is being retired
        torch.onnx.export(net, (x,), str(path), dynamo=False, opset_version=14)
    back = import_onnx(path)
    many = torch.randn(4, 3, 20, 20)
    torch.testing.assert_close(back(many), net(many), rtol=1e-4, atol=1e-5)
    gm = trace(back, many[:2])
    for kind in (nn.Hardswish, nn.SiLU, nn.LayerNorm, nn.GELU, nn.Linear):
        assert [n for n in gm.graph.nodes if is_call(gm, n, kind)], kind


def test_refusals_name_the_subject_and_the_value(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no such file: .*absent\.onnx"):
        import_onnx(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(TraceError, match=r"text\.onnx: not readable"):
        import_onnx(tmp_path / "text.onnx")
    path = file(tmp_path, [N("Relu", ["x"], ["y"])], {}, ["n", 3, "height", "width"])
    with pytest.raises(TraceError, match=r"its size is open in the file .*height"):
        import_onnx(path)
    assert import_onnx(path, [3, 8, 8]).input_sizes == ((3, 8, 8),)
    with pytest.raises(TraceError, match="the file says 3, given is 4"):
        import_onnx(path, [4, 8, 8])
    with pytest.raises(TraceError, match=r"cannot be imported: Det \(1\), Hardmax \(1\)"):
        import_onnx(
            file(tmp_path, [N("Hardmax", ["x"], ["a"]), N("Det", ["a"], ["y"])], {}, ["n", 3, 3])
        )
    quantized = [N("QuantizeLinear", ["x", "s"], ["q"]), N("DequantizeLinear", ["q", "s"], ["y"])]
    with pytest.raises(TraceError, match="is quantized already"):
        import_onnx(file(tmp_path, quantized, {"s": np.array(1, np.float32)}, ["n", 3]))


def test_a_wrong_operator_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path, [N("Relu", ["x"], ["a"]), N("Neg", ["a"], ["y"])], {}, IMAGE)
    import_onnx(path)
    monkeypatch.setitem(
        importer.OPERATORS, "Neg", lambda im, node: im.call(torch.abs, im.value(node.input[0]))
    )
    with pytest.raises(TraceError, match="output 0 differs from ONNX Runtime's"):
        import_onnx(path)


def test_the_int8_file_has_the_names_of_the_file_it_came_from(tmp_path: Path) -> None:
    nodes = [
        N("Conv", ["x", "w"], ["conv"]),
        N("Relu", ["conv"], ["relu"]),
        N("Conv", ["relu", "v"], ["y"]),
    ]
    net = import_onnx(
        file(tmp_path, nodes, {"w": array(4, 4, 3, 3), "v": array(2, 4, 1, 1)}, IMAGE)
    )
    net.output_names = ("relu",)  # which another value of the emitted file may be called too
    x = torch.randn(4, *IMAGE[1:])
    gm = trace(net, x[:2])
    quantized = quantize(gm, target("onnxruntime"), [x])
    model = to_onnx(quantized)
    onnx.checker.check_model(model)
    session = Session(model)
    assert (session.inputs, session.outputs) == (["x"], ["relu"])
    wanted = net(x).numpy()
    assert np.abs(session.run(x)[0] - wanted).max() < 0.05 * np.abs(wanted).max()
