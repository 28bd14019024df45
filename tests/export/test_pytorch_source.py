from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from rewriter import Plan, profile, rewrite, trace
from rewriter.export.pytorch_source import construct, source_of
from tests.search.small import Small


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2), bias=False)
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, output_padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.slope = nn.PReLU(6)
        self.fc = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = functional.leaky_relu(self.a(x), 0.2)
        x = functional.hardswish(self.b(x)) + x
        y = functional.relu(self.norm(self.up(x))) * self.scale
        y = self.slope(y[:, :, 1:])
        z = torch.cat([y, -y], 1)[:, 2:8]
        pooled = z.mean((2, 3))
        return {"logits": self.fc(pooled), "maps": (z, functional.max_pool2d(z, 2))}


def load(source: Any) -> nn.Module:
    namespace: dict[str, Any] = {}
    exec(source.text, namespace)
    model = namespace[source.class_name]()
    model.load_state_dict(dict(source.state))
    return model.eval()


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) * 0.5 + 0.1
    return model.eval()


@pytest.mark.parametrize(
    ("model", "shape"), [(Everything(), (2, 3, 17, 12)), (Small(), (2, 3, 16, 16))]
)
def test_the_source_computes_what_the_graph_computes(
    model: nn.Module, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    gm = trace(randomised(model), x)
    source = source_of(gm, "My net")
    found, expected = load(source)(x), gm(x)
    torch.testing.assert_close(
        torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)
    )
    assert source.class_name == "My_net"
    assert "rewriter" not in source.text
    assert "torch.fx" not in source.text


def test_a_rewritten_network_names_the_steps_in_its_source() -> None:
    x = torch.randn(4, 3, 16, 16)
    gm = trace(randomised(Small()), x)
    profile(gm, [x])
    rewritten = rewrite(gm, Plan.parse("merge_separable@dw_0"))
    source = source_of(rewritten, "Small")
    torch.testing.assert_close(load(source)(x), rewritten(x))
    assert "# merge_separable@dw_0" in source.text


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, (3, 1), (1, 2), (1, 0), (2, 1), 2, False, "circular"),
        nn.Conv1d(4, 6, 3, bias=False),
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2),
        nn.Linear(4, 5, bias=False),
        nn.BatchNorm2d(5, eps=1e-3),
        nn.LayerNorm([4, 5]),
        nn.ReLU6(),
        nn.Hardtanh(-2.0, 3.0),
        nn.LeakyReLU(0.3),
        nn.PReLU(4),
        nn.GELU("tanh"),
        nn.Softmax(dim=1),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(2, count_include_pad=False),
        nn.AdaptiveAvgPool2d((1, 2)),
        nn.ZeroPad2d((1, 2, 3, 4)),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        nn.PixelShuffle(2),
        nn.ChannelShuffle(2),
        nn.GRU(4, 8, 2, batch_first=True, bidirectional=True),
        nn.LSTM(4, 8, bias=False),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_module_is_built_again_with_equal_settings(module: nn.Module) -> None:
    text = construct(module)
    assert text is not None
    again = eval(text, {"nn": nn})
    assert again.extra_repr() == module.extra_repr()
    again.load_state_dict(module.state_dict())


def test_a_class_of_somebody_else_is_passed_in() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh()

    assert construct(Own()) is None
    assert construct(nn.Sequential(nn.ReLU())) is None
    root = nn.Module()
    root.own = Own()
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(operator.add, (graph.call_module("own", (x,)), 1.5)))
    gm = fx.GraphModule(root, graph)
    gm.meta["example"] = ((3,),)
    source = source_of(gm, "Net")
    assert source.opaque == ("own",)
    namespace: dict[str, Any] = {}
    exec(source.text, namespace)
    model = namespace["Net"]({"own": Own()})
    values = torch.randn(2, 3)
    torch.testing.assert_close(model(values), values.tanh() + 1.5)
