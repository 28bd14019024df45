from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewriter.errors import TraceError
from rewriter.graph.lookup import layer_name, layers, module_of
from rewriter.tracing.fold_affine import scaled_outputs
from rewriter.tracing.trace import trace
from tests.networks import Forward, conv, kinds, made, network, randomise, traced
from tests.tracing.test_functional_to_module import FunctionalConv

F = nn.functional
IMAGE = (3, 11, 9)


# ---------------------------------------------------------------------------------- batch norm


@pytest.mark.parametrize(
    ("layer", "bn", "shape"),
    [
        (conv(3, 4, (3, 2), stride=2, dilation=2, bias=False), nn.BatchNorm2d(4), (3, 15, 12)),
        (conv(4, 4, 3, groups=4), nn.BatchNorm2d(4, affine=False), (4, 9, 8)),
        (conv(4, 6, 3, groups=2, padding="same"), nn.BatchNorm2d(6), (4, 9, 8)),
        (conv(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), IMAGE),
        (nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), nn.BatchNorm2d(4), IMAGE),
        (nn.ConvTranspose2d(4, 6, (3, 2), 2, groups=2), nn.BatchNorm2d(6, 1e-2), (4, 5, 6)),
        (nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), (4, 5, 6)),
        (nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4), (3, 10)),
        (nn.Linear(7, 4, bias=False), nn.BatchNorm1d(4), (7,)),
    ],
)
def test_batch_norm_is_folded(layer: nn.Module, bn: nn.Module, shape: tuple[int, ...]) -> None:
    assert made(nn.Sequential(layer, bn), *shape) == [type(layer).__name__]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_folded_weights_by_numpy_order(groups: int) -> None:
    """The scale of output channel o multiplies exactly the weights that make channel o."""
    layer = nn.ConvTranspose2d(4, 8, 3, groups=groups)
    bn = randomise(nn.BatchNorm2d(8), 3)
    s = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach()
    new = scaled_outputs(layer, s.double(), torch.zeros(8).double())
    for i in range(4):
        for j in range(8 // groups):
            out = (i // (4 // groups)) * (8 // groups) + j
            torch.testing.assert_close(new.weight[i, j], layer.weight[i, j] * s[out])


@pytest.mark.parametrize(
    ("function", "norms"),
    [
        (lambda s, x: s.conv(s.first(x)), 0),  # folded into the convolution behind it
        (lambda s, x: s.conv3(F.relu(s.bn(F.relu(s.conv(x))))), 0),  # a depthwise convolution
        (lambda s, x: s.bn(torch.cat([s.conv(x), s.conv2(x)], 1)[:, :4]), 1),
        (lambda s, x: s.bn(F.relu(s.conv(x))), 1),
        (lambda s, x: (lambda y: s.bn(y) + y)(s.conv(x)), 1),  # the convolution feeds two
    ],
)
def test_lone_batch_norm_stays_behind_the_last_layer_alone(function, norms: int) -> None:
    model = Forward(
        function,
        conv=conv(),
        conv2=conv(),
        conv3=conv(4, 4, 1),
        bn=nn.BatchNorm2d(4),
        first=nn.BatchNorm2d(3),
    )
    assert made(model).count("BatchNorm2d") == norms


def test_batch_norm_over_tokens_is_not_folded_into_linear() -> None:
    """(N, L, C): the batch norm's channels are L."""
    assert made(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), 5, 6) == [
        "Linear",
        "BatchNorm1d",
    ]


def test_batch_norm_without_statistics_is_left_alone() -> None:
    bn = nn.BatchNorm2d(4, track_running_stats=False)
    model = randomise(nn.Sequential(conv(), bn))
    gm = trace(model, torch.randn(2, *IMAGE))
    assert kinds(gm) == ["Conv2d", "BatchNorm2d"]


def test_shared_convolution_with_two_batch_norms() -> None:
    """A head shared by levels with a batch norm for each: torch's own fuse corrupts this."""

    def heads(self, x):
        return self.bn_a(self.conv(x)), self.bn_b(self.conv(F.max_pool2d(x, 2)))

    model = Forward(heads, conv=conv(), bn_a=nn.BatchNorm2d(4), bn_b=nn.BatchNorm2d(4))
    gm = traced(randomise(model), IMAGE)
    assert kinds(gm).count("Conv2d") == 2
    assert "BatchNorm2d" not in kinds(gm)
    assert [layer_name(n) for n in layers(gm)] == ["conv", "conv"]


# ------------------------------------------------------------------------------ shared modules


def test_modules_called_twice_are_copied() -> None:
    def twice(self, x):
        return self.act(self.conv(self.act(self.conv(x))))

    gm = traced(randomise(Forward(twice, conv=conv(3, 3, 3, padding=1), act=nn.ReLU())), IMAGE)
    a, b = (module_of(gm, n) for n in layers(gm))
    assert a is not b
    assert a.weight.data_ptr() != b.weight.data_ptr()
    assert torch.equal(a.weight, b.weight)


def test_one_module_under_two_names() -> None:
    shared = conv(3, 3, 3, padding=1)
    gm = traced(randomise(nn.Sequential(shared, nn.ReLU(), shared)), IMAGE)
    assert len(layers(gm)) == 2


def test_tied_weights() -> None:
    a, b = conv(3, 3, 3, padding=1), conv(3, 3, 3, padding=1)
    b.weight = a.weight
    gm = traced(randomise(nn.Sequential(a, nn.BatchNorm2d(3), nn.ReLU(), b)), IMAGE)
    first, second = (module_of(gm, n) for n in layers(gm))
    assert not torch.equal(first.weight, second.weight)  # folding must not reach the other


def test_dropout_shared_and_identity() -> None:
    def function(self, x):
        return self.drop(self.conv(self.drop(self.none(x))))

    model = Forward(function, conv=conv(), drop=nn.Dropout(0.5), none=nn.Identity())
    assert made(model) == ["Conv2d"]
    training = Forward(lambda s, x: F.dropout(s.conv(x), 0.5, s.training), conv=conv())
    assert made(training) == ["Conv2d"]


# -------------------------------------------------------------------------------------- shapes


def shuffle(self, x):
    x = self.conv(x)
    n, c, h, w = x.shape
    assert c % self.groups == 0
    x = x.view(n, self.groups, c // self.groups, h, w)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(n, -1, h, w)


def frames(self, x):
    b, t, c, h, w = x.shape
    y = self.conv(x.view(b * t, c, h, w))
    y = F.adaptive_avg_pool2d(y, 1).flatten(1)
    y = y.view(b, t, -1)
    return [y[:, i] for i in range(t)], y.mean(1)


def loop_over_time(self, x):
    outs = []
    for i in range(x.size(1)):
        outs += [self.conv(x[:, i])]
    return torch.stack(outs, dim=1)


def parts(self, x):
    a, b = self.conv(x).chunk(2, 1)
    c, d, e = torch.split(a + b, [1, 0, 1], dim=-3)
    f = torch.unbind(self.conv(x), 1)
    return torch.cat([c, d, e, f[-1][:, None], f[0].unsqueeze(1)], 1)


def tokens(self, x):
    y = self.conv(x).flatten(2).transpose(1, 2)
    cls = self.token.expand(y.shape[0], -1, -1)
    y = torch.cat((cls, y), dim=1)
    b, n, c = y.shape
    return y.reshape(b, n, 2, c // 2).permute(2, 0, 1, 3).reshape(2, b, -1)


def with_checks(self, x):
    assert isinstance(x, Tensor)
    assert x.ndim == 4, "four dimensions"
    assert x.shape[0] > 0
    torch._assert(x.shape[1] == 3, "three channels")
    if x.size(2) > 5 and x.dtype == torch.float32 and not x.is_cuda and len(x.shape) == 4:
        x = self.conv(x)
    if hasattr(x, "no_such_attribute") or not torch.is_floating_point(x):
        x = x * 100
    return x.reshape(len(x), -1) if False else x.view((x.size(0), -1))


def made_by_size(self, x):
    b = x.size(0)
    zeros = torch.zeros(b, 4, 1, 1, device=x.device)
    y = self.conv(x) + zeros + torch.full((b, 4, 1, 1), 0.5)
    grid = torch.arange(y.shape[-1], dtype=y.dtype, device=y.device)
    return y + grid + y.new_ones(b, 1, 1, 1)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (shuffle, IMAGE),
        (frames, (5, 3, 8, 7)),
        (loop_over_time, (4, 3, 8, 7)),
        (parts, IMAGE),
        (tokens, IMAGE),
        (with_checks, IMAGE),
        (made_by_size, IMAGE),
        (lambda s, x: s.conv(x).view(x.size(0), 4, -1), IMAGE),
        (lambda s, x: s.conv(x).view(x.shape[0], -1, 2)[..., 0], IMAGE),
        (lambda s, x: s.conv(x).reshape(-1, 4 * 9 * 7), IMAGE),
        (lambda s, x: torch.reshape(s.conv(x), (x.shape[0], -1)), IMAGE),
        (lambda s, x: s.conv(x).unflatten(1, (2, 2)).sum(2), IMAGE),
        (lambda s, x: s.conv(x)[:, :2].unsqueeze(-1).squeeze(-1), IMAGE),
        (lambda s, x: nn.Flatten(2)(s.conv(x)).max(-1)[0], IMAGE),
        (lambda s, x: torch.max(s.conv(x), dim=1, keepdim=True).values, IMAGE),
    ],
)
def test_shapes(function, shape) -> None:
    model = Forward(function, conv=conv(), groups=2, token=nn.Parameter(torch.randn(1, 1, 4)))
    gm = traced(randomise(model), *shape)
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target == "reshape":
            assert sum(s == -1 for s in node.args[1:]) == 1


def test_sizes_leave_the_graph() -> None:
    gm = traced(randomise(Forward(shuffle, conv=conv(), groups=2)), IMAGE)
    assert kinds(gm) == ["Conv2d", "reshape", "transpose", "reshape"]
    gm = traced(randomise(Forward(frames, conv=conv())), 5, 3, 8, 7)
    assert "size" not in kinds(gm)


def test_squeeze_keeps_the_batch() -> None:
    model = Forward(lambda s, x: F.adaptive_avg_pool2d(s.conv(x), 1).squeeze(), conv=conv())
    gm = traced(randomise(model), IMAGE, sizes=(3,))
    assert gm(torch.randn(1, *IMAGE)).shape == (1, 4)


def test_transposed_convolution_with_output_size() -> None:
    def function(self, x):
        return self.up(self.down(x), output_size=x.size()[2:])

    model = Forward(
        function, down=conv(3, 4, 3, stride=2, padding=1), up=nn.ConvTranspose2d(4, 3, 3, 2, 1)
    )
    gm = traced(randomise(model), 3, 12, 9)
    assert module_of(gm, layers(gm)[1]).output_padding == (1, 0)


# -------------------------------------------------------------------------- classes and names


class OwnConv(nn.Conv2d):
    """Padding computed from the input's size, as TensorFlow has it."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        ph, pw = (max((-(-s // 2) - 1) * 2 + 3 - s, 0) for s in (h, w))
        x = F.pad(x, [pw // 2, pw - pw // 2, ph // 2, ph - ph // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride)


class OwnReLU(nn.ReLU):
    pass


def test_subclasses_become_the_plain_class() -> None:
    model = nn.Sequential(OwnConv(3, 4, 3, 2), nn.BatchNorm2d(4), OwnReLU(), nn.Hardtanh(0, 6))
    gm = traced(randomise(model), IMAGE)
    assert kinds(gm) == ["ZeroPad2d", "Conv2d", "ReLU", "ReLU6"]
    assert [layer_name(n) for n in layers(gm)] == ["0"]
    up = nn.Sequential(conv(), nn.UpsamplingBilinear2d(scale_factor=2), nn.UpsamplingNearest2d(20))
    assert made(up) == ["Conv2d", "Upsample", "Upsample"]


def test_names_of_functional_layers_and_what_follows_them() -> None:
    """An activation inside a functional layer is no part of the layer, which rules replace."""

    class Fused(FunctionalConv):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(F.pad(x, (1, 1, 1, 1))))

    gm = traced(randomise(nn.Sequential(Fused(3, 4, 3), Fused(4, 4, 3))), IMAGE)
    assert [n.name for n in layers(gm)] == ["_0", "_1"]
    assert all(not list(module_of(gm, n).children()) for n in layers(gm))
    gm = traced(randomise(nn.Sequential(OwnConv(3, 4, 3, 2))), IMAGE)
    assert [n.name for n in layers(gm)] == ["_0"]


def test_names_are_the_users_own() -> None:
    gm = traced(network(10), 3, 19, 17)
    found = {layer_name(n): n.name for n in layers(gm)}
    for name, node in found.items():
        assert name in dict(network(10).named_modules())
        assert node == name.replace(".", "_")


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_normalization(old: bool) -> None:
    apply = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    model = nn.Sequential(apply(conv()), nn.BatchNorm2d(4), nn.ReLU())
    gm = traced(randomise(model), IMAGE)
    assert kinds(gm) == ["Conv2d", "ReLU"]
    assert not gm.meta["opaque"]


def test_spectral_normalization() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(conv()), nn.ReLU())
    assert made(model) == ["Conv2d", "ReLU"]


# ------------------------------------------------------------------------------ planted faults


def test_a_wrong_folding_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(layer, scale, shift):
        new = scaled_outputs(layer, scale, shift)
        new.bias = nn.Parameter(torch.roll(new.bias.data, 1), requires_grad=False)
        return new

    monkeypatch.setattr("rewriter.tracing.fold_affine.scaled_outputs", careless)
    with pytest.raises(TraceError, match="output 0 of the traced graph differs"):
        trace(randomise(nn.Sequential(conv(), nn.BatchNorm2d(4))), torch.randn(2, *IMAGE))


def test_a_layer_may_be_called_what_a_method_is() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze, self.mean, self.reshape = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.reshape(self.mean(self.squeeze(x)))

    gm = trace(Named(), torch.randn(2, 3, 4, 4))
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == [
        "squeeze",
        "mean",
        "reshape",
    ]
