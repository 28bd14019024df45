"""Assignment to a part of a tensor, and what else real detectors do besides computing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewriter.errors import TraceError
from rewriter.graph.lookup import layers
from rewriter.tracing.assignment import assign_, spans
from rewriter.tracing.trace import trace
from tests.networks import Forward, conv, randomise, traced

IMAGE = (3, 11, 9)


def decoded_in_place(self, x):
    y = self.conv(x).sigmoid()
    y[:, 0:2] = (y[:, 0:2] * 2 - 0.5 + self.shift) * 8
    y[:, 2:3] = torch.exp(y[:, 2:3])
    return y


def last_dimension(self, x):
    y = self.conv(x).flatten(start_dim=2).permute(0, 2, 1)
    y[..., :2] = (y[..., :2] + 3) * 2
    y[..., -1] = y[..., 0] - y[..., 1]
    return y


def block_of_two_dimensions(self, x):
    y = self.conv(x)
    y[:, 1:, 2:4] = y[:, :3, 0:2] * 5
    y[:, 0, -1, 1:] = 0.5
    y[:, 1] = torch.arange(y.shape[-1]).float()
    return y + 1


def changed_and_assigned(self, x):
    y = self.conv(x) * 2
    y[:, :2] += 3
    y[:, 1] *= y[:, 2]
    return y


def whole(self, x):
    y = self.conv(x) * 2
    y[:] = y.flip(1)
    y[..., 1:1] = 9.0
    return y


@pytest.mark.parametrize(
    "function",
    [decoded_in_place, last_dimension, block_of_two_dimensions, changed_and_assigned, whole],
)
def test_assignment_becomes_slices_side_by_side(function) -> None:
    model = Forward(function, conv=conv())
    model.register_buffer("shift", torch.rand(1, 2, 1, 1))
    gm = traced(randomise(model), IMAGE)
    assert not [n for n in gm.graph.nodes if n.target is assign_]


def test_views_seen_before_the_assignment_are_refused() -> None:
    def stale(self, x):
        y = self.conv(x)
        view = y[:, :2]
        y[:, 1:3] = 1.0
        return y, view

    with pytest.raises(TraceError, match="only a part or a view"):
        trace(randomise(Forward(stale, conv=conv())), torch.randn(2, *IMAGE))


def strided(self, x):
    y = x * 2
    y[..., ::2] = 0.0
    return y


def masked(self, x):
    y = x * 2
    y[x > 0] = 0.0
    return y


def part_of_the_batch(self, x):
    y = x * 2
    y[:1] = 0.0
    return y


@pytest.mark.parametrize("function", [strided, masked, part_of_the_batch])
def test_other_assignments_make_their_module_opaque(function) -> None:
    model = Forward(lambda s, x: s.conv(s.inner(x)), inner=Forward(function), conv=conv())
    (opaque,) = traced(randomise(model), IMAGE).meta["opaque"]
    assert opaque.name == "inner"
    assert "assignment to other than a block" in opaque.reason


def test_spans() -> None:
    assert spans((2, 6, 4), (..., slice(1, 3))) == ([(0, 2), (0, 6), (1, 3)], [])
    assert spans((2, 6, 4), (slice(None), -2)) == ([(0, 2), (4, 5), (0, 4)], [1])
    assert spans((2, 6, 4), (slice(None), 6)) is None
    assert spans((2, 6), (slice(None), slice(None), 0)) is None
    assert spans((2, 6), (..., None)) is None


# ----------------------------------------------------------------------- autograd and leftovers


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)


def test_autograd_functions_are_their_forward() -> None:
    gm = traced(
        randomise(Forward(lambda s, x: Doubled.apply(Swish.apply(s.conv(x))), conv=conv())), IMAGE
    )
    assert [type(m) for m in gm.modules() if isinstance(m, nn.SiLU)] == [nn.SiLU]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_what_they_run(reentrant: bool) -> None:
    def forward(self, x):
        return checkpoint(self.block, self.conv(x), use_reentrant=reentrant)

    gm = traced(
        randomise(Forward(forward, conv=conv(), block=nn.Sequential(conv(4, 4), nn.ReLU()))), IMAGE
    )
    assert len(layers(gm)) == 2
    x = torch.randn(2, requires_grad=True)
    (Swish.apply(x).sum() + 0 * Doubled.apply(x.detach()).sum()).detach()  # theirs again


class Remembering(nn.Module):
    """Keeps what belongs to the shape that it saw last, as detectors keep their grids."""

    shape = None

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grids = conv(), [torch.empty(0)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.shape != y.shape:
            self.shape = y.shape
            self.grids[0] = torch.arange(y.shape[-1]).float()
        return y + self.grids[0]


# a remembered batch of 2 or 3, as tracing itself uses, cannot be told from a condition on the batch size
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_what_a_forward_remembers_is_no_obstacle(batch: int) -> None:
    model = randomise(Remembering())
    if batch:
        model(torch.randn(batch, *IMAGE))
    traced(model, IMAGE)
    model(torch.randn(2, *IMAGE))


def test_type_as_text_is_a_constant() -> None:
    def forward(self, x):
        return self.conv(x) + torch.arange(7).type(x.type())

    traced(randomise(Forward(forward, conv=conv())), IMAGE)
