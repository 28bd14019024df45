from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rewriter import Plan, quantize, target, trace
from rewriter.graph.channel_ranges import profile
from rewriter.graph.cost import cost
from rewriter.int8.onnx import Kernel, Profile, float_onnx, profiled, to_onnx
from search.latency.price import price_of, price_of_plan
from search.latency.table import (
    Table,
    about_of,
    cache_folder,
    read_table,
    tables,
    this_machine,
    user_table,
)
from search.run_dir.files import RunError


def kernel(name: str, macs: int = 1000, moved: int = 100) -> Kernel:
    return Kernel("node", name.split(" ", 1)[0], name, macs, moved, in_float=False)


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Hardswish(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
    )
    return model.eval(), torch.randn(4, 3, 20, 20)


def test_kernels_of_a_file_and_their_work() -> None:
    model, x = network()
    gm = trace(model, x[:2])
    file = to_onnx(quantize(gm, target("onnxruntime"), [x]))
    found = profiled(file, x[:1])
    assert found.int8_macs == cost(gm).macs
    assert found.float_macs == 0
    floats = profiled(float_onnx(gm), x[:1])
    assert (floats.int8_macs, floats.float_macs) == (0, cost(gm).macs)
    assert found.reorders == {"Transpose": 2}
    assert found.milliseconds == ()
    convolutions = [k for k in found.kernels if k.operator == "QLinearConv"]
    assert [k.macs for k in convolutions] == [400 * 16 * 27, 400 * 16 * 9, 400 * 16 * 16]
    # bytes: input and output of 400 places, weights, an int32 bias, a float scale and a zero point for each channel
    assert convolutions[2].bytes == 400 * (16 + 16) + 16 * 16 + (4 + 4 + 1) * 16 + 2 * (4 + 1)
    again = profiled(file, x[:1], runs=3)
    assert again.kernels == found.kernels
    assert len(again.milliseconds) == len(found.kernels)
    assert again.whole > 0


def test_what_is_known_is_not_measured_again(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv", about={"processor": "p"})
    first = Profile((kernel("A x"), kernel("B y"), kernel("A x")), (1.0, 3.0, 2.0), whole=12.0)
    assert [k.signature for k in table.missing(first.kernels)] == ["A x", "B y", "A x"]
    table.add(first)  # as long as the file: twice what the profile says
    assert table.predict(first.kernels) == pytest.approx(12.0)
    assert not table.missing(first.kernels)
    # the same kernels on a machine that is twice as busy now: the new one is brought to the table's conditions
    later = Profile((kernel("A x"), kernel("B y"), kernel("C z")), (6.0, 12.0, 10.0), whole=1e9)
    table.add(later)
    assert table.predict([kernel("C z")]) == pytest.approx(5.0)
    assert table.predict(first.kernels) == pytest.approx(12.0)
    assert about_of(table.path) == {"processor": "p"}
    again = Table(tmp_path / "t.csv")
    assert again.predict([kernel("C z"), kernel("A x")]) == pytest.approx(8.0)


def test_what_another_process_adds_is_seen(tmp_path: Path) -> None:
    one, other = Table(tmp_path / "t.csv"), Table(tmp_path / "t.csv")
    one.add(Profile((kernel("A x"),), (1.0,), whole=1.0))
    assert not other.missing([kernel("A x")])
    other.add(Profile((kernel("A x"), kernel("B y")), (1.0, 2.0), whole=3.0))
    assert one.predict([kernel("B y")]) == pytest.approx(2.0)


def test_a_folder_that_cannot_be_written_costs_only_the_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    table = Table(tmp_path / "file" / "t.csv")
    with pytest.raises(RunError, match="no kernel"):
        table.predict([kernel("A x")])
    table.add(Profile((kernel("A x"),), (1.0,), whole=1.0))
    assert "not kept" in caplog.text
    assert table.predict([kernel("A x")]) == pytest.approx(1.0)


def test_a_kernel_that_a_users_table_lacks_is_taken_after_one_like_it(tmp_path: Path) -> None:
    path = tmp_path / "phone.csv"
    path.write_text(
        "# device: a phone\nkernel,milliseconds,macs,bytes\n"
        "QLinearConv a,2.0,1000,100\nQLinearConv b,9.0,9000,900\nSoftmax c,100,2000,200\n"
    )
    table = user_table(path)
    assert not table.measures
    assert table.predict([kernel("QLinearConv new", 2001, 201)]) == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n", "columns"),
        ("kernel,milliseconds,macs,bytes\n", "no kernel"),
        ("kernel,milliseconds,macs,bytes\nA,fast,1,1\n", "row"),
        ("kernel,milliseconds,macs,bytes\nA,-1,1,1\n", "expected > 0"),
        ("kernel,milliseconds,macs,bytes\nA,1\n", "row"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(RunError, match=said):
        user_table(path)
    with pytest.raises(RunError, match="cannot be read"):
        user_table(tmp_path / "none.csv")


def test_this_machines_table_lies_in_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTFIX_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "latency"
    assert tables() == []
    model, x = network()
    table = this_machine()
    price_of(float_onnx(trace(model, x[:2])), x[:1], table)
    assert tables() == [table.path]
    assert about_of(table.path)["runtime"].startswith("onnxruntime ")
    monkeypatch.delenv("QUANTFIX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "quantfix" / "latency"


def test_a_plan_is_priced_before_it_is_emitted(tmp_path: Path) -> None:
    model, x = network()
    gm = trace(model, x[:2])
    profile(gm, [x])
    scheme, table = target("onnxruntime"), Table(tmp_path / "t.csv")
    plain = price_of_plan(gm, Plan(()), scheme, x, table)
    emitted = price_of(to_onnx(quantize(gm, scheme, [x])), x[:1], table)
    assert replace(emitted, size=plain.size) == plain  # but for the names in it
    kept = price_of_plan(gm, Plan.parse("keep_float@_2"), scheme, x, table)
    assert kept.float_macs == 400 * 16 * 9
    assert kept.int8_macs + kept.float_macs == plain.int8_macs
    assert kept.milliseconds != plain.milliseconds
    again = Table(tmp_path / "t.csv", measures=False)
    assert price_of_plan(gm, Plan.parse("keep_float@_2"), scheme, x, again) == kept


def test_every_row_of_a_written_table_can_be_read(tmp_path: Path) -> None:
    model, x = network()
    table = Table(tmp_path / "t.csv")
    price_of(float_onnx(trace(model, x[:2])), x[:1], table)
    rows = dict(read_table(table.path))
    assert rows
    assert all(e.milliseconds > 0 and e.bytes > 0 for e in rows.values())
