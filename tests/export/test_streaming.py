"""Chunks with the state carried over give the scores of the whole sequence, in float, in int8 and in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import Plan, profile, target, trace
from rewriter.assemble import assemble
from rewriter.damage import measure_fidelity
from rewriter.errors import RewriteError
from rewriter.export.streaming import run_stream, streaming, streaming_int8
from rewriter.graph.lookup import layers
from rewriter.int8.onnx.export import float_onnx, to_onnx
from rewriter.int8.onnx.session import Session
from rewriter.int8.simulate import simulate
from tests.networks import randomise
from tests.tracing.test_join_frame_loops import Video, by_cell, by_loop, by_lstm_cell, by_reshape

FRAMES, SHAPE = 6, (3, 12, 10)


class Stack(nn.Module):
    """Two recurrent layers, one with a trained start, on top of each other."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.conv, self.one = nn.Conv2d(3, 4, 3), kind(4, 5, 2, batch_first=True)
        self.two, self.head = nn.GRU(5, 3, batch_first=True), nn.Linear(3, 1)
        self.start = nn.Parameter(torch.randn(1, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.flatten(0, 1)).mean((2, 3)).unflatten(0, x.shape[:2])
        y = self.one(y)[0]
        return self.head(self.two(y, self.start.expand(-1, x.shape[0], -1).contiguous())[0])


MODELS = [
    *(lambda run=run: Video(run) for run in (by_reshape, by_loop, by_cell, by_lstm_cell)),
    *(lambda kind=kind: Stack(kind) for kind in (nn.LSTM, nn.GRU, nn.RNN)),
]


def sequences(count: int) -> Tensor:
    return torch.randn(count, FRAMES, *SHAPE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_give_the_scores_of_the_whole(make: Any, chunk: int) -> None:
    torch.manual_seed(0)
    model, x = randomise(make()), sequences(4)
    stream = streaming(trace(model, x[:2, :chunk]))
    with torch.no_grad():
        expected = model(x)
        found = run_stream(stream.gm, x, stream.states, chunk)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        session = Session(float_onnx(stream.gm), threads=1)
        found = run_stream(
            lambda *v: [torch.from_numpy(o) for o in session.run(*v)], x, stream.states, chunk
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    forgotten = run_stream(lambda f, *s: [stream.gm(f, *s)[0], *s], x, stream.states, chunk)
    assert (forgotten - expected).abs().max() > 1e-3  # the state matters


@pytest.mark.slow
@pytest.mark.parametrize("run", [by_reshape, by_loop, by_cell])
@pytest.mark.parametrize(
    "text", ["", "merge_separable@trunk_dw equalize@model correct_bias@model"]
)
def test_int8_chunks(run: Any, text: str) -> None:
    torch.manual_seed(0)
    model, x, plan = randomise(Video(run)), sequences(8), Plan.parse(text)
    gm = trace(model, x[:2])
    gm.meta["fidelity"] = measure_fidelity(gm, [x], purpose="scores")
    profile(gm, [x])
    quantized = assemble(gm, plan, target("per_tensor"), [x]).quantized
    stream = streaming_int8(quantized, plan, gm, trace(model, x[:2, :2]))
    assert stream.quantized is not None
    with torch.no_grad():
        expected = simulate(quantized)(x)
        found = run_stream(simulate(stream.quantized), x, stream.states, 2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (expected - model(x)).abs().max() > 1e-4
    whole, step = (Session(to_onnx(q), threads=1) for q in (quantized, stream.quantized))
    expected = torch.from_numpy(whole.run(x)[0])
    found = run_stream(lambda *v: [torch.from_numpy(o) for o in step.run(*v)], x, stream.states, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_stream_says_why() -> None:
    both = Video(by_reshape)
    both.rnn, both.head = nn.GRU(5, 4, batch_first=True, bidirectional=True), nn.Linear(8, 1)
    with pytest.raises(RewriteError, match="rnn: runs backwards"):
        streaming(trace(randomise(both), sequences(2)))
    with pytest.raises(RewriteError, match="no recurrent layer"):
        streaming(trace(nn.Linear(3, 4), torch.randn(2, 3, 3)))
    gm = trace(randomise(Video(by_reshape)), sequences(2))
    assert len(layers(gm)) == 5
    with pytest.raises(RewriteError, match="not a multiple"):
        run_stream(gm, sequences(1), (), 4)
