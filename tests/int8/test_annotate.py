"""Where int8 values exist, by hand: ``node <- what it reads in int8 -> owner of its range``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewriter.graph.lookup import find, is_call, layers
from rewriter.int8.annotate import (
    annotate,
    annotation,
    quantized_outputs,
)
from rewriter.int8.scheme import target
from rewriter.tracing.trace import trace
from tests.networks import randomise

F = nn.functional


class Net(nn.Module):
    """Convolutions a, b, c (4 channels), a linear layer, and the given forward of (self, x)."""

    def __init__(self, forward, channels: int = 4) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(channels, 4, 3, padding=1)
        self.c, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        self.norm, self.rnn = nn.BatchNorm2d(4), nn.GRU(4, 4, batch_first=True)
        self.run = forward

    def forward(self, x: Tensor):
        return self.run(self, x)


def golden(
    forward, name: str = "onnxruntime", keep: tuple[str, ...] = (), channels: int = 4
) -> str:
    gm = trace(randomise(Net(forward, channels)), torch.randn(2, 3, 7, 6))
    for kept in keep:
        find(gm, kept).meta["keep_float"] = True
    annotate(gm, target(name))
    lines = []
    for node in gm.graph.nodes:
        note = annotation(node)
        text = node.name + (f" <- {' '.join(note.reads)}" if note.reads else "")
        text += f" -> {note.range_of}" if note.output is not None else ""
        text += " [w]" if note.weight is not None else ""
        lines.append(text)
    return "\n".join(lines)


def lines(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


CASES = {
    "activations are computed inside the convolution": (
        lambda s, x: s.b(F.relu6(s.a(x))),
        """x -> x
           a <- x [w]
           act -> act
           b <- act -> b [w]
           output <- b""",
    ),
    "an activation of a value that others read too is an operation of its own": (
        lambda s, x: (lambda y: F.relu(y) + y)(s.a(x)),
        """x -> x
           a <- x -> a [w]
           act <- a -> act
           add <- act a -> add
           output <- add""",
    ),
    "inputs of add, each with its range": (
        lambda s, x: F.relu(s.a(x) + s.b(F.relu6(s.a(x)))),
        """x -> x
           a <- x -> a [w]
           a_1 <- x [w]
           act -> act
           b <- act -> b [w]
           add <- a b
           act_1 -> act_1
           output <- act_1""",
    ),
    "inputs of cat keep their own range": (
        lambda s, x: s.c(torch.cat([s.a(x), F.relu(s.a(x))], 1)[:, 2:6]),
        """x -> x
           a <- x -> a [w]
           a_1 <- x [w]
           act -> act
           cat <- a act -> cat
           getitem <- cat -> cat
           c <- getitem -> c [w]
           output <- c""",
    ),
    "moves keep the range, pools of maxima too": (
        lambda s, x: s.fc(F.max_pool2d(F.pad(s.a(x), (1, 0)), 2).flatten(2).transpose(1, 2)),
        """x -> x
           a <- x -> a [w]
           pad_1 <- a -> a
           pool <- pad_1 -> a
           flatten <- pool -> a
           transpose <- flatten -> a
           fc <- transpose -> fc [w]
           output <- fc""",
    ),
    "a move before the first layer": (
        lambda s, x: s.a(x.flip(1)[:, :, 1:].reshape(x.shape[0], 3, 6, 6)),
        """x
           flip -> flip
           getitem <- flip -> flip
           reshape <- getitem -> flip
           a <- reshape -> a [w]
           output <- a""",
    ),
    "average pool and mean have a range of their own": (
        lambda s, x: s.fc(F.avg_pool2d(F.relu(s.a(x)), 3).mean((2, 3))),
        """x -> x
           a <- x [w]
           act -> act
           pool <- act -> pool
           mean <- pool -> mean
           fc <- mean -> fc [w]
           output <- fc""",
    ),
    "squeeze and excitation": (
        lambda s, x: (lambda y: s.b(y * s.c(F.adaptive_avg_pool2d(y, 1)).sigmoid()))(s.a(x)),
        """x -> x
           a <- x -> a [w]
           pool <- a -> pool
           c <- pool -> c [w]
           act <- c -> act
           mul <- a act -> mul
           b <- mul -> b [w]
           output <- b""",
    ),
    "a product with a number is an int8 operation between layers, and arithmetic behind them": (
        lambda s, x: (lambda y: s.b(y * 0.5 + y) * 3.0 + 1.0)(F.max_pool2d(s.a(x).relu(), 2)),
        """x -> x
           a <- x [w]
           act -> act
           pool <- act -> act
           mul <- pool -> mul
           add <- mul pool -> add
           b <- add -> b [w]
           output <- b""",
    ),
    "what has no int8 kernel computes in float": (
        lambda s, x: s.c((s.a(x) * 0.7 - s.b(s.a(x))).exp()),
        """x -> x
           a <- x -> a [w]
           a_1 <- x -> a_1 [w]
           b <- a_1 -> b [w]
           sub <- a b
           exp -> exp
           c <- exp -> c [w]
           output <- c""",
    ),
    "a lone batch norm is a depthwise convolution": (
        lambda s, x: s.c(F.relu(s.norm(F.relu(s.a(x))))),
        """x -> x
           a <- x [w]
           act -> act
           norm <- act [w]
           act_1 -> act_1
           c <- act_1 -> c [w]
           output <- c""",
    ),
    "several outputs, one of them inside": (
        lambda s, x: (lambda y: {"y": y, "z": [s.b(y), y.softmax(1)]})(F.relu(s.a(x))),
        """x -> x
           a <- x [w]
           act -> act
           b <- act -> b [w]
           act_1 <- act
           output <- act b""",
    ),
    "an output that the int8 part did not make": (
        lambda s, x: s.a(x).softmax(1),
        """x -> x
           a <- x -> a [w]
           act <- a
           output""",
    ),
    "a decoded head: all that cat joins gets one range in the end": (
        lambda s, x: torch.cat(
            [s.b(s.a(x)).flatten(2) * 8.0, s.c(s.a(x)).flatten(2).sigmoid()], 1
        ),
        """x -> x
           a <- x -> a [w]
           b <- a -> b [w]
           flatten <- b -> b
           mul <- flatten -> mul
           a_1 <- x -> a_1 [w]
           c <- a_1 -> c [w]
           flatten_1 <- c -> c
           act <- flatten_1 -> act
           cat <- mul act -> cat
           output <- cat""",
    ),
    "recurrent parts are float, and their slices have ranges of their own": (
        lambda s, x: s.fc(s.rnn(s.a(x).mean(3).transpose(1, 2))[0]),
        """x -> x
           a <- x -> a [w]
           mean <- a -> mean
           transpose <- mean -> mean
           rnn <- transpose
           getitem -> getitem
           fc <- getitem -> fc [w]
           output <- fc""",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime(case: str) -> None:
    forward, expected = CASES[case]
    assert golden(forward) == lines(expected)


def chain(s: Net, x: Tensor) -> Tensor:
    return s.fc(F.relu(s.b(F.relu(s.a(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (
            ("a",),
            """x
               a
               act -> act
               b <- act [w]
               act_1 -> act_1
               mean <- act_1 -> mean
               fc <- mean -> fc [w]
               output <- fc""",
        ),
        (
            ("b",),
            """x -> x
               a <- x [w]
               act
               b
               act_1 -> act_1
               mean <- act_1 -> mean
               fc <- mean -> fc [w]
               output <- fc""",
        ),
        (
            ("fc",),
            """x -> x
               a <- x [w]
               act -> act
               b <- act [w]
               act_1 -> act_1
               mean <- act_1
               fc
               output""",
        ),
        (("a", "b", "fc"), "x\na\nact\nb\nact_1 -> act_1\nmean <- act_1\nfc\noutput"),
    ],
)
def test_keep_float(keep: tuple[str, ...], expected: str) -> None:
    assert golden(chain, keep=keep) == lines(expected)


def test_value_read_by_a_float_and_an_int8_layer() -> None:
    def fork(s: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(s.a(x))
        return s.b(y), s.c(y)

    expected = """x -> x
        a <- x [w]
        act -> act
        b
        c <- act -> c [w]
        output <- c"""
    assert golden(fork, keep=("b",)) == lines(expected)


def test_float_layer_behind_moves_reads_floats() -> None:
    """What only float layers read is not rounded on the way, however it is moved."""

    def moved(s: Net, x: Tensor) -> Tensor:
        return s.fc(F.relu(s.a(x)).flatten(2).transpose(1, 2))

    assert golden(moved, keep=("fc",)) == lines(
        """x -> x
           a <- x [w]
           act
           flatten
           transpose
           fc
           output"""
    )


def test_moved_value_read_by_a_float_and_an_int8_layer_exists_in_int8_only() -> None:
    def fork(s: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.max_pool2d(F.relu(s.a(x)), 2)
        return s.b(y), s.c(y)

    assert golden(fork, keep=("b",)) == lines(
        """x -> x
           a <- x [w]
           act -> act
           pool <- act -> act
           b <- pool
           c <- pool -> c [w]
           output <- c"""
    )


def test_activation_kept_in_float_is_not_fused() -> None:
    found = golden(lambda s, x: s.b(F.relu(s.a(x))), keep=("act",))
    assert found == "x -> x\na <- x -> a [w]\nact <- a -> act\nb <- act -> b [w]\noutput <- b"


def test_cat_kept_in_float_reads_what_int8_layers_made() -> None:
    def head(s: Net, x: Tensor) -> Tensor:
        y = F.relu(s.a(x))
        return torch.cat([s.b(y), s.c(y)], 1).flatten(2)

    assert golden(head, keep=("cat", "flatten")) == lines(
        """x -> x
           a <- x [w]
           act -> act
           b <- act -> b [w]
           c <- act -> c [w]
           cat <- b c
           flatten
           output"""
    )


def test_tflite_shares_ranges_at_cat_and_pool() -> None:
    def joined(s: Net, x: Tensor) -> Tensor:
        y = F.relu(s.a(x))
        z = F.avg_pool2d(y, 3, 1, 1)
        return s.b(torch.cat([s.c(y), z], 1))

    expected = """x -> x
        a <- x [w]
        act -> act
        pool <- act -> act
        c <- act -> act [w]
        cat <- c pool -> act
        b <- cat -> b [w]
        output <- b"""
    assert golden(joined, "tflite", channels=8) == lines(expected)


@pytest.mark.parametrize("name", ["onnxruntime", "per_tensor", "tensorrt", "tflite"])
def test_which_activations_a_kernel_computes(name: str) -> None:
    apart = "x -> x\na <- x -> a [w]\nact <- a -> act\nb <- act -> b [w]\noutput <- b"
    fused = "x -> x\na <- x [w]\nact -> act\nb <- act -> b [w]\noutput <- b"
    assert golden(lambda s, x: s.b(F.relu6(s.a(x))), name) == fused
    silu = golden(lambda s, x: s.b(F.silu(s.a(x))), name)
    assert silu == (fused if name == "tensorrt" else apart)


def test_specs_of_the_target_are_written() -> None:
    gm = trace(randomise(Net(chain)), torch.randn(2, 3, 7, 6))
    for name in ("onnxruntime", "per_tensor", "tensorrt", "tflite"):
        scheme = target(name)
        annotate(gm, scheme)
        for node in layers(gm):
            linear = is_call(gm, node, nn.Linear)
            expected = scheme.linear_weights if linear else scheme.weights
            assert annotation(node).weight == expected
        assert annotation(find(gm, "x")).output == scheme.activations
    assert [n.name for n in quantized_outputs(gm)] == ["fc"]
