"""Wrappers, hooks and masks are taken off; what hooks compute stays part of the network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from rewriter.graph.lookup import layer_name, layers, module_of
from rewriter.tracing.trace import trace
from tests.networks import kinds, randomise, relative_error, traced

IMAGE = (3, 11, 9)
PLAIN = ["Conv2d", "ReLU", "Conv2d", "mean"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(x)).mean((2, 3))


def net() -> Net:
    torch.manual_seed(0)
    model = randomise(Net())
    assert isinstance(model, Net)
    return model


def compiled_part(model: Net) -> nn.Module:
    model.block = torch.compile(model.block)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda m: torch.compile(nn.DataParallel(m)),
        compiled_part,
    ],
    ids=["compile", "data_parallel", "averaged", "both", "part"],
)
def test_wrappers_are_taken_off(wrap: Callable[[Net], nn.Module]) -> None:
    x = torch.randn(2, *IMAGE)
    gm = trace(wrap(net()).eval(), x)
    assert kinds(gm) == PLAIN
    assert [layer_name(n) for n in layers(gm)] == ["block.0", "last"]
    with torch.no_grad():
        assert relative_error(net()(x), gm(x)) < 1e-5


def test_a_users_own_class_of_that_name_is_none() -> None:
    class DataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x) + x

    assert kinds(traced(DataParallel(), *IMAGE)) == ["Conv2d", "add"]


@pytest.mark.parametrize("times", [1, 2])
def test_pruned(times: int) -> None:
    model = net()
    for _ in range(times):
        prune.l1_unstructured(model.block[0], "weight", 0.5)  # type: ignore[no-untyped-call]
        prune.ln_structured(model.last, "weight", 0.5, 2, 0)  # type: ignore[no-untyped-call]
    gm = traced(model, *IMAGE)
    assert kinds(gm) == PLAIN
    first, last = (module_of(gm, n).weight for n in layers(gm))
    assert int((first == 0).sum()) == (81 if times == 1 else 121)
    assert int((last.flatten(1).abs().sum(1) == 0).sum()) == (2 if times == 1 else 3)


def test_what_hooks_compute_is_part_of_the_graph() -> None:
    model = net()
    model.block[0].register_forward_hook(lambda module, given, made: made * 2)
    model.last.register_forward_pre_hook(lambda module, given: (given[0] - 1,))
    gm = traced(model, *IMAGE)
    assert kinds(gm) == ["Conv2d", "ReLU", "Conv2d", "mean"]
    assert [layer_name(n) for n in layers(gm)] == ["block.0", "last"]


def test_a_hook_that_only_looks_changes_nothing() -> None:
    seen: list[int] = []
    model = net()
    model.block[0].register_forward_hook(lambda m, given, made: seen.append(made.shape[1]))
    assert kinds(traced(model, *IMAGE)) == PLAIN
    assert set(seen) == {6}


def test_a_size_that_nobody_uses_is_no_reader() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            _, channels, _, _ = x.shape
            return self.bn(x).reshape(-1, channels, 63)

    assert kinds(traced(randomise(Asks()), *IMAGE)) == ["Conv2d", "reshape"]
