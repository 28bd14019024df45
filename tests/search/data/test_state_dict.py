"""Weights are found under whatever a training script put around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from search.data.state_dict import fitting_state

State = dict[str, Tensor]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(block, nn.Linear(4, 2))


def prefixed(prefix: str) -> Callable[[State], Any]:
    return lambda state: {prefix + k: v for k, v in state.items()}


def other() -> State:
    return net(1).state_dict()


@pytest.mark.parametrize(
    "saved",
    [
        lambda s: s,
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("model."),
        prefixed("module._orig_mod."),
        prefixed("model.backbone_"),
        lambda s: {k.replace("0.0.", "0._orig_mod.0."): v for k, v in s.items()},
        lambda s: {"epoch": 3, "state_dict": prefixed("module.")(s), "optimizer": {"lr": 1.0}},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {"model_state_dict": s, "loss": torch.tensor(2.0)},
        lambda s: {"params_ema": s, "params": other()},
        lambda s: {"state_dict": other(), "state_dict_ema": prefixed("module.")(s)},
        # Lightning: a second copy and a loss beside the network
        lambda s: {"state_dict": {**prefixed("model.")(s), "loss.weight": torch.ones(3)}},
        lambda s: {**prefixed("model.")(other()), **prefixed("model_ema.module.")(s)},
        lambda s: {"n_averaged": torch.tensor(9), **prefixed("module.")(s)},
    ],
)
def test_the_networks_weights_are_found(saved: Callable[[State], Any]) -> None:
    expected = net().state_dict()
    found = fitting_state(saved(dict(expected)), net(2))
    assert found is not None
    model = net(3)
    model.load_state_dict(found)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_masks_of_pruning_are_applied() -> None:
    pruned = net()
    prune.l1_unstructured(pruned[0][0], "weight", 0.5)  # type: ignore[index, no-untyped-call]
    found = fitting_state(pruned.state_dict(), net(1))
    assert found is not None
    assert found.keys() == net().state_dict().keys()
    assert torch.equal(found["0.0.weight"], pruned[0][0].weight)  # type: ignore[index]
    assert int((found["0.0.weight"] == 0).sum()) == 54


def test_a_network_with_such_a_name_of_its_own_keeps_it() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self._orig_mod = nn.Linear(2, 2)

    own = Own().state_dict()
    assert fitting_state(copy.deepcopy(own), Own()).keys() == own.keys()  # type: ignore[union-attr]


@pytest.mark.parametrize("saved", [{}, {"epoch": 3}, {"model": {"epoch": 3}}, [1], 3])
def test_what_holds_no_tensors_is_none(saved: Any) -> None:
    assert fitting_state(saved, net()) is None


def test_another_network_does_not_seem_to_fit() -> None:
    found = fitting_state(nn.Conv1d(2, 2, 1).state_dict(), net())
    assert found is not None
    assert not found.keys() & net().state_dict().keys()
