"""Recurrent layers and cells as ONNX Runtime runs them, against torch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rewriter import QuantizeError, trace
from rewriter.int8.onnx import recurrent as onnx_recurrent
from rewriter.int8.onnx.export import float_onnx
from rewriter.int8.onnx.session import Session
from tests.int8.onnx.test_operators import Call, check

STEPS, WIDTH, HIDDEN = 7, 6, 5


class Layer(nn.Module):
    """A recurrent layer with the batch first outside, whatever it wants inside."""

    def __init__(self, rnn: Any, started: bool = False) -> None:
        super().__init__()
        self.rnn, self.started = rnn, started
        rows = rnn.num_layers * (2 if rnn.bidirectional else 1)
        self.start = nn.Parameter(torch.zeros(rows, 1, rnn.hidden_size))

    def forward(self, x: Tensor) -> Any:
        m: Any = self.rnn
        x = x if m.batch_first else x.transpose(0, 1)
        h = self.start.expand(-1, x.shape[0 if m.batch_first else 1], -1).contiguous()
        given = (h, h * 2) if isinstance(m, nn.LSTM) else h
        y, state = m(x, given) if self.started else m(x)
        states = (state[0], state[1]) if isinstance(m, nn.LSTM) else (state,)
        y = y if m.batch_first else y.transpose(0, 1)
        return (y, *(s.transpose(0, 1) for s in states))


LAYERS = [
    (kind, layers, both, first)
    for kind, layers, both, first in itertools.product(
        (nn.RNN, nn.GRU, nn.LSTM), (1, 2), (False, True), (True, False)
    )
    if first or (layers == 2) == both
]


@pytest.mark.parametrize(("kind", "layers", "both", "first"), LAYERS)
@pytest.mark.parametrize("started", [False, True])
def test_layers(kind: Any, layers: int, both: bool, first: bool, started: bool) -> None:
    rnn = kind(WIDTH, HIDDEN, layers, batch_first=first, bidirectional=both)
    check(Layer(rnn, started), (STEPS, WIDTH))


def test_settings() -> None:
    check(Layer(nn.RNN(WIDTH, HIDDEN, nonlinearity="relu", batch_first=True)), (STEPS, WIDTH))
    check(Layer(nn.GRU(WIDTH, HIDDEN, bias=False, batch_first=True)), (STEPS, WIDTH))
    check(Layer(nn.LSTM(WIDTH, HIDDEN, 2, dropout=0.5, batch_first=True)), (STEPS, WIDTH))


class Cells(nn.Module):
    def __init__(self, cell: nn.Module, started: bool) -> None:
        super().__init__()
        self.cell, self.started = cell, started
        self.start = nn.Parameter(torch.zeros(1, HIDDEN))

    def forward(self, x: Tensor) -> Any:
        h = self.start.expand(x.shape[0], -1)
        double = isinstance(self.cell, nn.LSTMCell)
        state: Any = ((h, h * 2) if double else h) if self.started else None
        seen = []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            seen.append(state[1] if double else state)
        return torch.stack(seen, 1)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("started", [False, True])
def test_cells(kind: Any, started: bool) -> None:
    check(Cells(kind(WIDTH, HIDDEN), started), (3, WIDTH))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projected_state_is_left_to_the_exporter_of_torch_which_refuses() -> None:
    rnn = Layer(nn.LSTM(WIDTH, HIDDEN, batch_first=True, proj_size=3))
    gm = trace(rnn.eval(), torch.randn(2, STEPS, WIDTH))
    with pytest.raises(QuantizeError, match="a projected hidden state, and torch's exporter"):
        float_onnx(gm)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_gates_in_the_order_of_torch_are_noticed(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, count = kind.__name__, 3 if kind is nn.GRU else 4
    monkeypatch.setitem(onnx_recurrent._GATES, name, tuple(range(count)))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(Layer(kind(WIDTH, HIDDEN, batch_first=True)), (STEPS, WIDTH))


def test_the_number_of_steps_stays_free() -> None:
    torch.manual_seed(0)
    rnn = nn.GRU(WIDTH, HIDDEN, 2, batch_first=True, bidirectional=True)
    model = Layer(rnn).eval()
    emitted = float_onnx(trace(model, torch.randn(2, STEPS, WIDTH)))
    for value in (emitted.graph.input[0], emitted.graph.output[0]):
        value.type.tensor_type.shape.dim[1].dim_param = f"{value.name}_steps"
    x = torch.randn(2, STEPS + 4, WIDTH)
    found = Session(emitted, threads=1).run(x)[0]
    np.testing.assert_allclose(found, model(x)[0].detach().numpy(), rtol=1e-4, atol=1e-5)


FILLED = [
    lambda m, x: x + torch.zeros(x.shape[0], 3, 2) + 1,
    lambda m, x: x + torch.ones((x.shape[0], 1, 2), dtype=torch.float64).float(),
    lambda m, x: x * torch.full((x.shape[0], 3, 1), 0.25),
    lambda m, x: x - x.new_full((x.shape[0], 1, 1), -1.5) + x.new_zeros(x.shape[0], 1, 1),
]


@pytest.mark.parametrize("run", FILLED)
def test_constants_as_large_as_the_batch(run: Any) -> None:
    check(Call(run), (3, 2))
