"""Where channels and inputs lie, and that what follows from it holds for batches of any size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rewriter.assemble import assemble
from rewriter.damage.fisher import weigh
from rewriter.errors import TraceError
from rewriter.graph.axes import batch_axes, channel_axes
from rewriter.graph.channel_ranges import hull, profile, range_of
from rewriter.graph.interpret import walk
from rewriter.int8.scheme import target
from rewriter.plan import Plan, find_sites
from rewriter.tracing.trace import trace
from tests.networks import Forward, conv, network, randomise

IMAGE = (3, 12, 8)


def sequence_first(m: Forward, x: Tensor) -> Tensor:
    return m.head(m.conv(x).flatten(2).permute(2, 0, 1))


def sequence(m: Forward, x: Tensor) -> Tensor:
    return m.head(m.conv(x).flatten(2).transpose(1, 2))


def pixels_last(m: Forward, x: Tensor) -> Tensor:
    return m.head(torch.relu(m.norm(m.conv(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


def made(function: Callable[[Forward, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(3)
    parts = {"conv": conv(3, 6, 3), "norm": nn.LayerNorm(6), "head": nn.Linear(6, 5)}
    return randomise(Forward(function, **parts))


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


@pytest.mark.parametrize(
    ("function", "channels", "batch"),
    [
        (sequence_first, [1, 1, 1, 2, 2], [0, 0, 0, 1, 1]),
        (sequence, [1, 1, 1, 2, 2], [0, 0, 0, 0, 0]),
        (pixels_last, [1, 1, 3, 3, 3, 3, 1], [0] * 7),
    ],
)
def test_axes_follow_the_layers(
    function: Callable[[Forward, Tensor], Tensor], channels: list[int], batch: list[int]
) -> None:
    gm = trace(made(function), torch.randn(2, *IMAGE))
    nodes = [n for n in gm.graph.nodes if n.op != "output"]
    assert [channel_axes(gm)[n] for n in nodes] == channels
    assert [batch_axes(gm)[n] for n in nodes] == batch


@pytest.mark.parametrize("seed", range(12))
def test_the_batch_is_where_values_grow_with_it(seed: int) -> None:
    gm = trace(network(seed), torch.randn(2, 3, 19, 17))
    with torch.no_grad():
        two, five = (dict(walk(gm, (torch.randn(n, 3, 19, 17),))) for n in (2, 5))
    for node, axis in batch_axes(gm).items():
        if isinstance(two.get(node), Tensor) and two[node].shape != five[node].shape:
            pair = zip(two[node].shape, five[node].shape, strict=True)
            assert [i for i, (a, b) in enumerate(pair) if a != b] == [axis], node


@pytest.mark.parametrize("function", [sequence_first, sequence, pixels_last])
@pytest.mark.parametrize("sizes", [(1,), (5, 1), (32, 8)])
def test_any_number_of_images(
    function: Callable[[Forward, Tensor], Tensor], sizes: tuple[int, ...]
) -> None:
    last = Turn() if function is sequence_first else nn.Identity()  # outputs have inputs first
    gm = trace(nn.Sequential(made(function), last), torch.randn(2, *IMAGE))
    batches = [torch.randn(n, *IMAGE) for n in sizes]
    profile(gm, batches)
    weigh(gm, batches, inputs=sum(sizes))
    for node, axis in channel_axes(gm).items():
        if "channel_range" in node.meta:
            assert range_of(node, node.meta["shape"][axis]) is not None, node
            assert len(node.meta["influence"]) == node.meta["shape"][axis], node
    for text in ("", "refine_ranges@model correct_bias@model round_weights@model"):
        assemble(gm, Plan.parse(text), target("per_tensor"), batches)


def test_an_output_without_the_inputs_first_is_refused() -> None:
    gm = trace(made(sequence_first), torch.randn(2, *IMAGE))
    batches = [torch.randn(5, *IMAGE)]
    profile(gm, batches)
    with pytest.raises(TraceError, match=r"output 0: 5 inputs give .* first axis; .*transpose"):
        assemble(gm, Plan(()), target("per_tensor"), batches)


def test_layers_of_a_sequence_are_weighed_input_by_input() -> None:
    """The influence of a linear layer is the same whichever axis the batch is on."""
    x = torch.randn(7, *IMAGE)
    found: list[Tensor] = []
    for function, turn in ((sequence_first, True), (sequence, False)):
        model = nn.Sequential(made(function), Turn() if turn else nn.Identity())
        gm = trace(model, x[:2])
        weigh(gm, [x], inputs=7)
        head = next(n for n in gm.graph.nodes if n.name.endswith("head"))
        found.append(head.meta["weight_influence"])
    assert found[0].shape == found[1].shape == (5, 6)
    # both are estimates with random signs, which fall on other places
    assert float(found[0].mean() / found[1].mean()) == pytest.approx(1.0, rel=0.5)


def test_equalization_leaves_sequences_alone() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = conv(3, 6, 3), conv(6, 8, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(torch.relu(self.first(x)))
            return self.head(torch.relu(x.flatten(2).permute(2, 0, 1))).mean(0)

    model = randomise(Both())
    x = torch.randn(40, *IMAGE)
    gm = trace(model, x[:2])
    profile(gm, [x[:32], x[32:]])
    assert any(s.rule == "equalize" and not s.blocked for s in find_sites(gm))
    quantized = assemble(
        gm, Plan.parse("equalize@model"), target("per_tensor"), [x[:32], x[32:]]
    ).quantized
    with torch.no_grad():
        torch.testing.assert_close(quantized.gm(x), model(x), rtol=1e-4, atol=1e-4)


def test_ranges_of_batches_of_different_size_become_one() -> None:
    a, b = torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 3.0])
    low, high = hull((a, b), (torch.tensor([-5.0]), torch.tensor([2.0])))
    assert (low.tolist(), high.tolist()) == ([-5.0], [3.0])
