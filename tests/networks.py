"""Small random networks for property tests, and what every traced graph must satisfy."""

from __future__ import annotations

import copy
import operator
import random
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rewriter.graph.lookup import module_of
from rewriter.tracing.trace import trace

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish)
ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv)
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
SIZE = (3, 19, 17)  # odd and not square

M = TypeVar("M", bound=nn.Module)

seeds = st.integers(0, 10_000)
"""Hypothesis strategy: seeds for ``network``."""


def randomise(model: M, seed: int = 0) -> M:
    """Random, non-symmetric parameters and batch-norm statistics, in place; eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: Any, low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.copy_(uniform(module.running_mean.shape, -0.4, 0.6))
                module.running_var.copy_(uniform(module.running_var.shape, 0.3, 1.7))
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.uniform_(module.bias, -0.3, 0.5, generator=generator)
        elif isinstance(module, LAYERS) and module.bias is not None:
            nn.init.uniform_(module.bias, -0.3, 0.4, generator=generator)
    return model.eval()


class Affine(nn.Module):
    """Convolution, batch norm and, if given, an activation."""

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d, act: type[nn.Module] | None) -> None:
        super().__init__()
        self.conv = conv
        transposed = isinstance(conv, nn.ConvTranspose2d)
        self.bn = nn.BatchNorm2d(conv.out_channels, eps=1e-3 if transposed else 1e-5)
        self.act = act() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, hard: bool) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, max(2, channels // 4), 1)
        self.expand = nn.Conv2d(max(2, channels // 4), channels, 1)
        self.act, self.gate = nn.ReLU(), nn.Hardsigmoid() if hard else nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.expand(self.act(self.reduce(s))))


class Residual(nn.Module):
    def __init__(self, block: nn.Module, act: type[nn.Module] | None) -> None:
        super().__init__()
        self.block, self.act = block, act() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.block(x))


class Branches(nn.Module):
    """Two branches joined by cat."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 1)


class Halves(nn.Module):
    """Half the channels pass by, as in ShuffleNet; then the channels are shuffled by hand."""

    def __init__(self, channels: int, act: type[nn.Module]) -> None:
        super().__init__()
        half = channels // 2
        self.rest = channels - half
        self.block = Affine(nn.Conv2d(half, half, 3, padding=1, groups=half), act)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split([self.rest, x.shape[1] - self.rest], dim=1)
        y = torch.cat((a, self.block(b)), dim=1)
        n, c, h, w = y.size()
        if c % 2:
            return y
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class UpDown(nn.Module):
    """Coarse features added to fine ones, as in a feature pyramid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        return x + nn.functional.interpolate(y, size=x.shape[2:], mode="nearest")


class Network(nn.Module):
    """A stem, blocks, and a head: "class", "maps" (a dict) or "boxes" (decoded, one cat)."""

    def __init__(self, blocks: list[nn.Module], channels: int, head: str) -> None:
        super().__init__()
        self.blocks, self.kind = nn.Sequential(*blocks), head
        if head == "class":
            self.head = nn.Linear(channels, 10)
        else:
            self.box, self.score = nn.Conv2d(channels, 4, 1), nn.Conv2d(channels, 6, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.blocks(x)
        if self.kind == "class":
            return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        box, score = self.box(x), self.score(x)
        if self.kind == "maps":
            return {"box": box, "scores": [score.sigmoid(), score]}
        box = box.view(box.size(0), 4, -1).permute(0, 2, 1)
        score = score.flatten(2).transpose(1, 2)[..., :3]
        return torch.cat((box * 3.5, score.sigmoid()), dim=-1)


def network(seed: int) -> Network:
    """A random small convolutional network for inputs (N, 3, 19, 17), in eval mode."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    act = rng.choice(ACTIVATIONS)
    channels = rng.choice((6, 8, 9, 12))
    kernel = rng.choice((3, (3, 5), 5))
    blocks: list[nn.Module] = [Affine(nn.Conv2d(3, channels, kernel, 2, 1, bias=False), act)]
    for _ in range(rng.randint(1, 4)):
        block, channels = _block(rng, channels, act)
        blocks.append(block)
    return randomise(Network(blocks, channels, rng.choice(("class", "maps", "boxes"))), seed)


def _block(rng: random.Random, c: int, act: type[nn.Module]) -> tuple[nn.Module, int]:
    out = rng.choice((6, 8, 10))
    bias, stride = rng.random() < 0.5, rng.choice((1, 1, 2))

    def depthwise() -> nn.Module:
        dilation = rng.choice((1, 1, 2))
        return Affine(nn.Conv2d(c, c, 3, stride, dilation, dilation, c, bias), act)

    def pointwise() -> nn.Module:
        return Affine(nn.Conv2d(c, out, 1, bias=bias), rng.choice((act, None)))

    kind = rng.choice(
        ("separable", "residual", "pool", "se", "branches", "halves", "pyramid", "up")
    )
    if kind == "separable":
        return nn.Sequential(depthwise(), pointwise()), out
    if kind == "residual":
        stride = 1
        inner = nn.Sequential(depthwise(), Affine(nn.Conv2d(c, c, 1, bias=bias), None))
        return Residual(inner, rng.choice((None, act))), c
    if kind == "pool":
        pool = rng.choice((nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(2, 1)))
        return nn.Sequential(pool, nn.Dropout(0.2), pointwise()), out
    if kind == "se":
        return SqueezeExcite(c, rng.random() < 0.5), c
    if kind == "branches":
        dense = Affine(nn.Conv2d(c, out, 3, padding=1, bias=bias), act)
        return Branches(dense, rng.choice((nn.Identity(), nn.MaxPool2d(3, 1, 1)))), out + c
    if kind == "halves":
        return Halves(c, act), c
    if kind == "pyramid":
        return UpDown(c), c
    up = nn.ConvTranspose2d(c, out, 3, 2, 1, bias=bias)
    return Affine(up, act), out


def relative_error(expected: Any, found: Any) -> float:
    """Largest difference over all outputs, each relative to its own largest value."""
    a, b = pytree.tree_leaves(expected), pytree.tree_leaves(found)
    assert len(a) == len(b)
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not isinstance(x, Tensor):
            assert x == y
            continue
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp_min(1e-12)))
    return worst


def state(model: nn.Module) -> dict[str, Any]:
    """All that tracing must leave as it was."""
    return {
        "tensors": {k: v.detach().clone() for k, v in model.state_dict(keep_vars=True).items()},
        "grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "training": {k: m.training for k, m in model.named_modules()},
        "inplace": {k: getattr(m, "inplace", None) for k, m in model.named_modules()},
        "types": {k: type(m) for k, m in model.named_modules()},
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("grad", "training", "inplace", "types"):
        assert before[key] == after[key], key
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        torch.testing.assert_close(after["tensors"][name], tensor, rtol=0, atol=0, equal_nan=True)


def traced(
    model: nn.Module,
    *shape_or_inputs: Any,
    tolerance: float = 1e-5,
    sizes: tuple[int, ...] = (1, 4),
) -> fx.GraphModule:
    """Trace, and check all that it promises: function, normal form, source untouched."""
    if isinstance(shape_or_inputs[0], Tensor):
        inputs = shape_or_inputs
    else:
        generator = torch.Generator().manual_seed(7)
        shapes = shape_or_inputs if isinstance(shape_or_inputs[0], tuple) else (shape_or_inputs,)
        inputs = tuple(torch.randn(2, *s, generator=generator) for s in shapes)
    before, code = state(model), copy.deepcopy(inputs)
    gm = trace(model, inputs[0] if len(inputs) == 1 else inputs)
    assert_same_state(before, state(model))
    for a, b in zip(inputs, code, strict=True):
        assert torch.equal(a, b)
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    for size in sizes:
        batch = [torch.cat([x.flip(-1), x * 0.3])[:size] for x in inputs]
        with torch.no_grad():
            expected = model(*[b.clone() for b in batch])
            found = gm(*[b.clone() for b in batch])
        assert relative_error(expected, found) < tolerance
    for module, mode in modes:
        module.training = mode
    assert_normal_form(gm)
    return gm


def assert_normal_form(gm: fx.GraphModule) -> None:
    opaque = {o.name for o in gm.meta["opaque"]}
    called: list[str] = []
    gm.graph.lint()
    for node in gm.graph.nodes:
        assert "nothing" not in node.name
        if node.op == "call_module":
            target, module = str(node.target), module_of(gm, node)
            called.append(target)
            assert not module.training, target
            if target in opaque:
                continue
            assert type(module).__module__.startswith("torch.nn.modules"), target
            assert not getattr(module, "inplace", False), target
            assert not isinstance(module, (nn.Identity, nn.Dropout, nn.Flatten)), target
            assert len(node.args) == 1, target
            assert not node.kwargs, target
            assert node.meta["layer"]
            assert isinstance(node.meta["shape"], tuple)
        elif node.op == "call_method":
            assert node.target not in (
                "view",
                "contiguous",
                "clone",
                "add",
                "mul",
                "mean",
                "flatten",
            )
            assert not str(node.target).endswith("_"), node.target
            if node.target == "reshape":
                assert all(isinstance(s, int) for s in node.args[1:])
        elif node.op == "call_function":
            assert not str(getattr(node.target, "__name__", "")).endswith("_")
    exact = [t for t in called if t not in opaque]
    assert len(exact) == len(set(exact)), "a module is called twice"
    assert all(not p.requires_grad for p in gm.parameters())


def kinds(gm: fx.GraphModule) -> list[str]:
    """What runs, in order: class names of modules, names of functions and methods."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            found.append(type(module_of(gm, node)).__name__)
        elif node.op in ("call_function", "call_method"):
            found.append(getattr(node.target, "__name__", str(node.target)))
    return found


def made(model: nn.Module, *shape: Any) -> list[str]:
    """``kinds`` of a traced network with random weights."""
    return kinds(traced(randomise(model), *(shape or (3, 11, 9))))


class Forward(nn.Module):
    """A network whose forward is the given function of (self, x), with the given sub-modules."""

    if TYPE_CHECKING:  # the sub-modules, whatever they are

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, function, **parts: object) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor):
        return self.function(self, x)


def conv(i: int = 3, o: int = 4, k: object = 3, **settings: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **settings)  # type: ignore[arg-type]
