from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from rewriter.errors import TraceError
from rewriter.graph.interpret import walk
from rewriter.graph.lookup import find, kind_of, layer_name, layers, module_of, outputs, unflatten
from rewriter.tracing.trace import trace
from tests.networks import SIZE, kinds, network, randomise, relative_error, seeds, traced

F = nn.functional

IMAGE = (3, 11, 9)
Pair = namedtuple("Pair", ["first", "second"])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Gate(nn.Module):
    """Control flow on values: cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:  # the line that the reason names
            return self.conv(x)
        return x


LINE_OF_GATE = Gate.forward.__code__.co_firstlineno + 1


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_random_networks_keep_their_function(seed: int) -> None:
    traced(network(seed), SIZE)


@pytest.mark.parametrize("training", [True, False])
def test_source_is_left_as_it_was(training: bool) -> None:
    model = randomise(Plain()).train(training)
    model.bn.eval()
    model.conv.weight.requires_grad_(False)
    traced(model, IMAGE)  # compares parameters, buffers, modes, types and requires_grad
    model.train(training)
    x = torch.randn(2, *IMAGE)
    model.conv.weight.requires_grad_(True)
    model(x).sum().backward()  # still a network that trains
    assert model.conv.weight.grad is not None


def test_source_of_a_parametrized_model_keeps_its_class() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    traced(randomise(model), IMAGE)
    assert nn.utils.parametrize.is_parametrized(model[0], "weight")
    assert model[0].weight.shape == (4, 3, 3, 3)


def test_no_state_of_torch_is_left_patched() -> None:
    before = torch.zeros, Tensor.expand, Tensor.view, nn.Module.__call__
    with pytest.raises(TraceError):
        trace(Gate(), torch.randn(2, 4, 5, 5))
    trace(randomise(Plain()), torch.randn(1, *IMAGE))
    assert before == (torch.zeros, Tensor.expand, Tensor.view, nn.Module.__call__)
    assert "expand" not in vars(Tensor)


# ------------------------------------------------------------------- arguments and outputs


class Defaults(Plain):
    def forward(
        self, x, targets: Any = None, *, scale: float = 2.0, flags: tuple = (True, "a"), **rest
    ):
        y = super().forward(x)
        if targets is not None or not flags[0] or rest:
            wanted: Any = targets
            return F.cross_entropy(y, wanted)
        return y * scale


class Variadic(Plain):
    def forward(self, *images):
        return sum(super(Variadic, self).forward(x) for x in images)


class Two(Plain):
    def forward(self, left, right):
        y = super().forward(left)
        return y + super().forward(right.flip(-1)), y


class Nested(Plain):
    def forward(self, x):
        y = super().forward(x)
        return {"maps": [y, (y.sigmoid(), None)], "same": y, "size": 4, "pair": Pair(y * 2, y + 1)}


def test_arguments_with_defaults() -> None:
    gm = traced(randomise(Defaults()), IMAGE)
    assert len(gm.graph.find_nodes(op="placeholder")) == 1
    assert kinds(gm) == ["Conv2d", "ReLU"]  # the product is folded


def test_variadic_and_several_inputs() -> None:
    gm = traced(randomise(Variadic()), IMAGE, IMAGE)
    assert len(gm.graph.find_nodes(op="placeholder")) == 2
    gm = traced(randomise(Two()), IMAGE, (3, 11, 9))
    assert gm.meta["example"] == (IMAGE, IMAGE)
    assert [n.name for n in gm.graph.find_nodes(op="placeholder")] == ["left", "right"]


def test_too_many_inputs_are_an_error() -> None:
    with pytest.raises(TraceError, match="fails by itself"):
        trace(randomise(Plain()), (torch.randn(1, *IMAGE), torch.randn(1, *IMAGE)))


def test_nested_outputs_are_put_back() -> None:
    model = randomise(Nested())
    gm = traced(model, IMAGE)
    assert len(outputs(gm)) == 5
    x = torch.randn(2, *IMAGE)
    with torch.no_grad():
        values = {n: v.clone() for n, v in walk(gm, (x,)) if isinstance(v, Tensor)}
        again = unflatten(gm, [values[n] for n in outputs(gm)])
        expected = model(x)
    assert again["size"] == 4
    assert again["maps"][1][1] is None
    assert isinstance(again["pair"], Pair)
    assert relative_error(expected, again) < 1e-5


def test_root_that_is_a_single_layer() -> None:
    for layer in (nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(3, 4, 3))):
        gm = traced(randomise(layer), IMAGE)
        assert kinds(gm) == ["Conv2d"]


# ------------------------------------------------------------------------- opaque sub-modules


def test_control_flow_makes_a_leaf_with_reason_and_line() -> None:
    model = nn.Sequential(Plain(), nn.Sequential(Gate(), nn.ReLU()), nn.Conv2d(4, 5, 1))
    gm = traced(randomise(model), IMAGE)
    (opaque,) = gm.meta["opaque"]
    assert (opaque.name, opaque.kind) == ("1.0", "Gate")
    assert "condition depends on values" in opaque.reason
    assert opaque.line.endswith(f"test_trace.py:{LINE_OF_GATE}")
    assert [layer_name(n) for n in layers(gm)] == ["0.conv", "2"]
    assert "ReLU" in kinds(gm)


def test_control_flow_at_the_root_is_refused_with_line_and_advice() -> None:
    with pytest.raises(TraceError, match="condition depends on values") as caught:
        trace(Gate(), torch.randn(2, 4, 5, 5))
    assert f"test_trace.py:{LINE_OF_GATE}" in str(caught.value)
    assert "sub-module" in str(caught.value)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x if x.sum().item() > -1e9 else -x, "condition depends on values"),
        (lambda x: x * 2 if bool((x > 1e9).any()) else x, "condition depends on values"),
        (lambda x: x if len(x.nonzero()) < 0 else x + 1, "len"),
        (lambda x: torch.stack([row * 2 for row in x]), "len"),
        (lambda x: sum(x[i] for i in range(x.shape[0])), "plain number"),
        (lambda x: x * 2 if x.shape[0] == 2 else x, "depends on the batch size"),
        (lambda x: x * float(x.max()), "plain number"),
    ],
)
def test_what_depends_on_values_or_batch_is_not_baked_in(function, reason: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    with pytest.raises(TraceError, match=reason):
        trace(Odd(), torch.randn(2, 3, 4))
    with pytest.raises(TraceError, match=r"test_trace\.py:\d+"):
        trace(Odd(), torch.randn(2, 3, 4))


class Recurrent(nn.Module):
    """Frames (N, T, C, H, W): a convolutional trunk, then a recurrent layer over time."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.trunk, self.head = Plain(), nn.Linear(10, 2)
        self.rnn = kind(4, 5, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        y = self.trunk(x.flatten(0, 1)).mean((2, 3)).view(b, t, 4)
        h = torch.zeros(4, b, 5)
        y, _ = self.rnn(y, (h, h) if isinstance(self.rnn, nn.LSTM) else h)
        return self.head(y).squeeze(-1)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent_layers_are_opaque_and_the_rest_is_not(kind: type[nn.Module]) -> None:
    gm = traced(randomise(Recurrent(kind)), 4, 3, 8, 7)
    (opaque,) = gm.meta["opaque"]
    assert opaque.name == "rnn"
    assert opaque.reason.startswith("recurrent")
    assert [layer_name(n) for n in layers(gm)] == ["trunk.conv", "head"]
    assert "BatchNorm2d" not in kinds(gm)


def test_unknown_modules_of_torch_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.LogSoftmax(1))
    gm = traced(randomise(model), IMAGE)
    assert [(o.name, o.kind) for o in gm.meta["opaque"]] == [
        ("1", "GroupNorm"),
        ("2", "LogSoftmax"),
    ]


def test_modules_made_or_kept_outside_the_tree() -> None:
    class Outside(Plain):
        def forward(self, x):
            return nn.Softmax(dim=1)(nn.Flatten(2)(super().forward(x)))

    assert kinds(traced(randomise(Outside()), IMAGE))[-2:] == ["flatten", "Softmax"]

    class InList(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [nn.Conv2d(3, 4, 1)]

        def forward(self, x):
            return self.hidden[0](x)

    with pytest.raises(TraceError, match=r"not installed as a submodule.*test_trace\.py"):
        trace(InList(), torch.randn(1, *IMAGE))


def test_a_model_that_remembers() -> None:
    """Writes to attributes in forward are no state of the result."""

    class Remembers(Plain):
        def forward(self, x):
            self.seen = super().forward(x)
            self.calls = getattr(self, "calls", 0) + 1
            return self.seen * 2

    model = randomise(Remembers())
    model(torch.randn(1, *IMAGE))  # leaves a tensor with a gradient behind, which deepcopy refuses
    traced(model, IMAGE)

    class Counts(Plain):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x):
            self.mean.mul_(0.9).add_(x.mean() * 0.1)
            return super().forward(x) - self.mean

    with pytest.raises(TraceError, match="changes a parameter or buffer"):
        trace(randomise(Counts()), torch.randn(1, *IMAGE))


# ------------------------------------------------------------------------------------ refusals


def test_half_precision_and_nan_are_refused_by_name() -> None:
    with pytest.raises(TraceError, match=r"conv\.weight: is torch\.float16"):
        trace(randomise(Plain()).half(), torch.randn(1, *IMAGE))
    model = randomise(Plain())
    model.conv.weight.data[0, 0, 0, :2] = float("nan")
    with pytest.raises(TraceError, match=r"conv\.weight: holds 2 values"):
        trace(model, torch.randn(1, *IMAGE))
    model = randomise(Plain())
    model.bn.running_var[1] = float("nan")
    with pytest.raises(TraceError, match=r"bn\.running_var: holds 1 values"):
        trace(model, torch.randn(1, *IMAGE))


def test_double_precision_is_lowered_and_infinite_masks_pass() -> None:
    class Masked(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((7, 7), float("-inf")).triu(1)[0])

        def forward(self, x):
            return (super().forward(x) + self.mask).softmax(-1)

    gm = trace(randomise(Masked()).double(), torch.randn(2, *IMAGE).double())
    assert gm(torch.randn(1, *IMAGE)).dtype is torch.float32


def test_random_model_is_called_random() -> None:
    class Noise(Plain):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5)

    with pytest.raises(TraceError, match="random"):
        trace(randomise(Noise()), torch.randn(1, *IMAGE))


def test_infinite_output_is_refused() -> None:
    class Overflow(Plain):
        def forward(self, x):
            return super().forward(x) / 0.0

    with pytest.raises(TraceError, match="output 0 of the float model holds NaN or infinite"):
        trace(randomise(Overflow()), torch.randn(1, *IMAGE))


def test_broken_model_and_wrong_input_are_told_apart_from_tracing() -> None:
    with pytest.raises(TraceError, match=r"fails by itself on an input of shape \(2, 5, 11, 9\)"):
        trace(randomise(Plain()), torch.randn(1, 5, 11, 9))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_script_module_and_odd_outputs_are_refused() -> None:
    scripted: Any = torch.jit.trace(randomise(Plain()), torch.randn(1, *IMAGE))
    with pytest.raises(TraceError, match="TorchScript"):
        trace(scripted, torch.randn(1, *IMAGE))

    class Odd(Plain):
        def forward(self, x):
            return super().forward(x).max(1)

    gm = traced(randomise(Odd()), IMAGE)  # a named tuple of torch
    assert len(outputs(gm)) == 2


# ------------------------------------------------------------------------------------ look-ups


def test_shapes_types_and_kinds() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 8, 1),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ConvTranspose2d(8, 4, 2),
        nn.Flatten(),
        nn.Linear(4 * 6 * 4, 5),
    )
    gm = traced(randomise(model), IMAGE)
    found = layers(gm)
    names = ["conv", "depthwise", "pointwise", "grouped", "transposed", "linear"]
    assert [kind_of(gm, n) for n in found] == names
    assert find(gm, found[1].name).meta["shape"] == (1, 4, 7, 5)
    assert found[-1].meta["dtype"] is torch.float32
    assert isinstance(module_of(gm, found[-1]), nn.Linear)
    with pytest.raises(KeyError):
        find(gm, "none")


@pytest.mark.parametrize("seed", range(5))
def test_walk_gives_every_value_and_forgets_it(seed: int) -> None:
    gm = trace(network(seed), torch.randn(2, *SIZE))
    x = torch.randn(3, *SIZE)
    with torch.no_grad():
        expected = gm(x)
        kept = dict(walk(gm, (x,)))
        found = unflatten(gm, [kept[n] for n in outputs(gm)])
    assert relative_error(expected, found) < 1e-5
    for node, value in kept.items():
        if isinstance(value, Tensor) and node.op != "get_attr":
            assert value.shape[1:] == node.meta["shape"][1:]


def test_a_name_that_torch_keeps_for_itself_is_named() -> None:
    model = nn.Module()
    model.add_module("code", nn.Conv2d(3, 4, 1))
    with pytest.raises(TraceError, match=r"model: code: torch\.fx keeps"):
        trace(model, torch.randn(2, *IMAGE))
