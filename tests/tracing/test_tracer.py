"""In-place operations: whoever reads later reads what was written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewriter.errors import TraceError
from rewriter.graph.lookup import layer_name, layers
from rewriter.tracing.trace import trace
from tests.networks import Forward, conv, made, randomise, traced

F = nn.functional
IMAGE = (3, 11, 9)


def add_after_read(self, x):
    x = self.conv(x)
    y = self.other(x)
    y += x
    x += 1
    return y, x


def read_after_relu(self, x):
    y = self.conv(x)
    z = self.relu(y)
    return z - 2 * y  # y is relu(y) by now: -relu(y)


def functional_in_place(self, x):
    y = self.conv(x)
    z = F.relu(y, True)
    w = F.leaky_relu_(y + 1, 0.2)
    return z + y + w


def method_in_place(self, x):
    y = self.conv(x)
    y.mul_(2).sub_(0.5).clamp_(0, 6)
    return y.div_(3)


def normalize_input(self, x):
    x.sub_(0.5).div_(0.25)
    return self.conv(x)


def in_place_on_reshaped(self, x):
    y = self.conv(x)
    y = y.view(y.size(0), -1)
    return torch.relu_(y)


def same_seen_twice(self, x):
    y = self.conv(x)
    alias = y.view_as(y)
    y.add_(1.5)
    return alias * 2


def filled(self, x):
    y = self.conv(x)
    z = y * 2
    z.fill_(0.25)
    return y + z


@pytest.mark.parametrize(
    "function",
    [
        add_after_read,
        read_after_relu,
        functional_in_place,
        method_in_place,
        normalize_input,
        in_place_on_reshaped,
        same_seen_twice,
        filled,
    ],
)
def test_in_place_operations_become_plain_ones(function) -> None:
    made(Forward(function, conv=conv(), other=conv(4, 4, 1), relu=nn.ReLU(inplace=True)))


def test_in_place_fixture_matters() -> None:
    """Without in-place semantics the value would differ: the case is not vacuous."""
    model = randomise(Forward(read_after_relu, conv=conv(), relu=nn.ReLU(inplace=True)))
    x = torch.randn(2, *IMAGE)
    with torch.no_grad():
        y = model.conv(x)
        naive = F.relu(y) - 2 * y
        assert not torch.allclose(model(x), naive)


def test_in_place_on_a_part_is_refused_with_the_line() -> None:
    def part(self, x):
        y = self.conv(x)
        y[:, :2].mul_(2)
        return y

    with pytest.raises(TraceError, match=r"only a part or a view at .*test_tracer\.py:\d+"):
        trace(randomise(Forward(part, conv=conv())), torch.randn(2, *IMAGE))


def test_in_place_on_a_part_makes_a_submodule_opaque() -> None:
    def part(self, x):
        y = x * 2
        y[:, :2].mul_(2)
        return y

    model = Forward(lambda s, x: s.conv(s.inner(x)), inner=Forward(part), conv=conv())
    gm = traced(randomise(model), IMAGE)
    (opaque,) = gm.meta["opaque"]
    assert opaque.name == "inner"
    assert "test_tracer.py:" in opaque.line
    assert [layer_name(n) for n in layers(gm)] == ["conv"]


def test_forgotten_in_place_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.tracing.tracer._read_what_was_overwritten", lambda graph: None)
    model = Forward(read_after_relu, conv=conv(), relu=nn.ReLU(inplace=True))
    with pytest.raises(TraceError, match="differs"):
        trace(randomise(model), torch.randn(2, *IMAGE))


# -------------------------------------------------------------------- values that are no tensor


class Dictionary(nn.Module):
    """Untraceable, and returns a dictionary and a list."""

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        if float(x.sum()) > 1e9:
            return {}, []
        return {"a": x * 2, "b": x + 1}, [x, x.exp()]


def dictionary_is_walked(self, x):
    found, rest = self.odd(self.conv(x))
    assert len(found) == 2
    assert "a" in found
    total = sum(v * (1 if k == "a" else 3) for k, v in found.items())
    total = total + sum(found.values()) + sum(found[k] for k in found)
    first, *others = rest
    return total + first - others[0] * len(rest)


def returned_whole(self, x):
    return self.odd(self.conv(x))


def copied_into(self, x):
    y = self.conv(x)
    z = y * 2
    z.copy_(y.flip(1))
    return y - z


def attributes(self, x):
    y = self.conv(x)
    assert y.dtype is torch.float32
    assert y.device.type == "cpu"
    assert (y.ndim, y.dim(), len(y.shape), y.is_cuda, y.requires_grad) == (4, 4, 4, False, False)
    return y.mT.T if False else y.mT.reshape(-1, y[0].numel())


@pytest.mark.parametrize(
    "function", [dictionary_is_walked, returned_whole, copied_into, attributes]
)
def test_what_is_no_tensor(function) -> None:
    traced(randomise(Forward(function, conv=conv(), odd=Dictionary())), IMAGE)
