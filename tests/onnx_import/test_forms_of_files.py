"""What exporters and converters make of a network beyond its operators; the oracle is ONNX Runtime, or torch itself."""

from __future__ import annotations

import logging
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
from rewriter.int8.onnx import Session, to_onnx
from rewriter.onnx_import import against_runtime, import_onnx

N = helper.make_node
RANDOM = np.random.default_rng(1)
ints = lambda *v: np.array(v, np.int64)  # noqa: E731


def file(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, Any],
    shape: list[Any],
    kind: int = TensorProto.FLOAT,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        str(path),
    )
    return path


def check(path: Path, batch: int = 3) -> nn.Module:
    net = import_onnx(path)
    x = torch.randn(batch, *net.input_sizes[0])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(net(x), torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)
    trace(net, x[:2])
    return net


def test_a_view_with_strides_takes_the_same_places_of_each_sample(tmp_path: Path) -> None:
    # as torch's exporter writes as_strided: places in the flat value, those of sample n behind n * 12
    places = np.arange(12).reshape(1, 3, 4).transpose(0, 2, 1)
    nodes = [
        N("Reshape", ["x", "flat"], ["a"]), N("Shape", ["x"], ["s"]), N("Gather", ["s", "zero"], ["n"]),
        N("Range", ["zero", "n", "one"], ["r"]), N("Mul", ["r", "step"], ["starts"]),
        N("Unsqueeze", ["starts", "axes"], ["rows"]), N("Add", ["rows", "places"], ["index"]),
        N("Gather", ["a", "index"], ["y"]),
    ]  # fmt: skip
    constants = {
        "flat": ints(-1), "zero": np.array(0), "one": np.array(1), "step": np.array(12), "axes": ints(1, 2),
        "places": places,
    }  # fmt: skip
    net = check(file(tmp_path / "net.onnx", nodes, constants, ["n", 3, 4]))
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(net(x), x.transpose(1, 2))
    with pytest.raises(TraceError, match="mix samples"):
        import_onnx(
            file(tmp_path / "mixed.onnx", nodes, {**constants, "places": places - 1}, ["n", 3, 4])
        )


def test_gather_nd_along_leading_axes_and_what_is_static_needs_no_form(tmp_path: Path) -> None:
    nodes = [
        N("GatherND", ["table", "where"], ["offset"]),  # of constants alone
        N("Det", ["square"], ["d"]),  # an operator that has no form here
        N("Transpose", ["x"], ["t"], perm=[1, 2, 0, 3]),
        N("GatherND", ["t", "index"], ["g"]),
        N("Add", ["g", "offset"], ["a"]), N("Mul", ["a", "d"], ["y"]),
    ]  # fmt: skip
    constants = {
        "table": RANDOM.standard_normal((4, 5)).astype(np.float32), "where": ints([1], [3], [0])[:, None, :][0:1],
        "square": np.array([[2, 1], [1, 3]], np.float32), "index": np.array([[0, 1], [2, 0], [1, 1]]),
    }  # fmt: skip
    net = check(file(tmp_path / "net.onnx", nodes, constants, ["n", 3, 2, 5]))
    assert "Det" not in str(net)
    rows = file(
        tmp_path / "rows.onnx", [N("GatherND", ["x", "i"], ["y"])], {"i": ints([0, 1])}, ["n", 3]
    )
    with pytest.raises(TraceError, match="choose among samples"):
        import_onnx(rows)


def test_half_precision_is_read_as_float32_with_the_same_weights(tmp_path: Path) -> None:
    weight = RANDOM.standard_normal((4, 3, 3, 3)).astype(np.float16)
    nodes = [N("Conv", ["x", "w"], ["c"]), N("Relu", ["c"], ["y"])]
    whole = file(tmp_path / "half.onnx", nodes, {"w": weight}, ["n", 3, 8, 8], TensorProto.FLOAT16)
    cast = [
        N("Cast", ["w"], ["v"], to=TensorProto.FLOAT),
        N("Conv", ["x", "v"], ["c"]),
        N("Relu", ["c"], ["y"]),
    ]
    stored = file(tmp_path / "stored.onnx", cast, {"w": weight}, ["n", 3, 8, 8])
    x = torch.randn(2, 3, 8, 8)
    wanted = nn.functional.conv2d(x, torch.from_numpy(weight).float()).relu()
    for path in (whole, stored):
        net = import_onnx(path)
        torch.testing.assert_close(net(x), wanted)
        assert [n.target for n in net.graph.nodes if n.op == "call_module"] == ["c", "y"]


def test_weights_beside_the_file(tmp_path: Path) -> None:
    weight = RANDOM.standard_normal((64, 3, 3, 3)).astype(np.float32)
    path = file(
        tmp_path / "net.onnx", [N("Conv", ["x", "w"], ["y"])], {"w": weight}, ["n", 3, 8, 8]
    )
    onnx.save(
        onnx.load(str(path)),
        str(path),
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    assert (tmp_path / "weights.bin").is_file()
    check(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(TraceError, match=r"net\.onnx: not readable .*weights\.bin"):
        import_onnx(path)


def test_a_network_that_amplifies_rounding_is_compared_by_its_own_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the difference of two large sums of the same terms in another order is rounding alone
    order = RANDOM.permutation(4096)
    weight = (RANDOM.standard_normal((4096, 4)) * 1e3).astype(np.float32)
    nodes = [
        N("MatMul", ["x", "w"], ["a"]), N("Gather", ["x", "order"], ["z"], axis=1), N("MatMul", ["z", "v"], ["b"]),
        N("Sub", ["a", "b"], ["y"]),
    ]  # fmt: skip
    constants = {"w": weight, "v": weight[order], "order": order}
    path = file(tmp_path / "net.onnx", nodes, constants, ["n", 4096])
    import_onnx(path)
    monkeypatch.setattr(against_runtime, "ROUNDING", 0.0)
    with pytest.raises(TraceError, match="differs from ONNX Runtime's"):
        import_onnx(path)


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish())
        self.gate, self.point = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        y = self.stem(image)
        y = nn.functional.gelu(self.point(y) * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())
        n, c, h, w = y.shape
        y = y.view(n, c, h * w).transpose(1, 2)
        return self.head(self.norm(y)).softmax(-1).mean(1)


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [False, True])
def test_torchs_new_exporter_to_an_int8_file_with_its_names(fixed: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    net, x = _Small().eval(), torch.randn(8, 3, 24, 20)
    shapes: Any = None if fixed else ({0: torch.export.Dim("batch")},)
    path = tmp_path / "net.onnx"
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                net, (x[: 1 if fixed else 2],), str(path), dynamo=True, dynamic_shapes=shapes, verbose=False,
                input_names=["picture"], output_names=["share"], external_data=False,
            )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    back = import_onnx(path)
    torch.testing.assert_close(back(x), net(x), rtol=1e-4, atol=1e-5)
    gm = trace(back, x[:2])
    assert any(isinstance(m, nn.GELU) for m in gm.modules())
    session = Session(to_onnx(quantize(gm, target("onnxruntime"), [x])))
    assert (session.inputs, session.outputs) == (["picture"], ["share"])
