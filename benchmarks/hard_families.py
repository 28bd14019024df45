"""Small networks of the families that int8 breaks: plain int8, the free ladder, and a plan with given steps.

    python -m benchmarks.hard_families ../shared/assets/cifar10_jpeg.npz silu --weights folder
    python -m benchmarks.hard_families ../shared/assets/cifar10_jpeg.npz vit --plan "scale_norm_50@model"

Each is trained for a few epochs on CIFAR-10. Convolutional networks start with batch norms whose scales are spread over the
channels and whose values are rare and large (a small share of each channel's values fills its range), and training
leaves them so; those with layer norms are rescaled after training without changing their function, as large ones are by
themselves. All plans are scored by ONNX Runtime's int8 kernels: top-1, KL divergence to the float network, share of the MACs
in int8, MACs against the network as it is, milliseconds for an image on this machine (one thread, median).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from benchmarks.uneven_stem import images, train
from rewriter import Plan, cost, find_sites, profile, target, trace
from rewriter.assemble import assemble
from rewriter.damage.fidelity import kl_divergence
from rewriter.graph.cost import layer_macs
from rewriter.int8.annotate import annotation
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.session import Session
from rewriter.ladder import best, climb, exact_splits
from rewriter.sensitivity.analyze import analyze
from rewriter.storage.cache import Store

CALIBRATION = 128


class Scores:
    """Plans of one network, scored on ONNX Runtime."""

    def __init__(
        self, gm: fx.GraphModule, on: str, calibration: Tensor, x: Tensor, y: Tensor, store: Path
    ) -> None:
        self.gm, self.scheme, self.calibration = gm, target(on), calibration
        self.x, self.y, self.store = x, y, Store(store)
        with torch.no_grad():
            self.reference = torch.cat([gm(part) for part in x.split(250)])
        self.float_level = self.level(self.reference)
        self.known: dict[Plan, Score] = {}

    def level(self, answers: Tensor) -> float:
        return float((answers.argmax(1) == self.y).double().mean())

    def __call__(self, plan: Plan) -> Score:
        if plan not in self.known:
            made = assemble(self.gm, plan, self.scheme, [self.calibration], self.store).quantized
            session = Session(to_onnx(made))
            parts = [torch.from_numpy(session.run(part)[0]) for part in self.x.split(250)]
            answers = torch.cat(parts)
            seconds: list[float] = []
            for one in self.x[:60].split(1):
                start = time.perf_counter()
                session.run(one)
                seconds.append(time.perf_counter() - start)
            macs = layer_macs(made.gm)
            int8 = sum(
                n
                for node in made.gm.graph.nodes
                if (n := macs.get(node.name, 0)) and annotation(node).weight is not None
            )
            self.known[plan] = Score(
                float(kl_divergence(answers, self.reference).mean()),
                self.level(answers),
                int8 / sum(macs.values()),
                cost(made.gm).macs / cost(self.gm).macs,
                1000 * sorted(seconds)[len(seconds) // 2],
            )
        return self.known[plan]


class Score:
    """What a plan comes to: damage, metric, share of the layers' MACs in int8, MACs, milliseconds."""

    def __init__(self, damage: float, metric: float, int8: float, macs: float, ms: float) -> None:
        self.damage, self.metric, self.int8, self.macs, self.ms = damage, metric, int8, macs, ms


# ------------------------------------------------------------------------------- the networks


def uneven(layers: list[nn.Module], seed: int, spread: float = 8.0) -> None:
    """Spread the scales of the batch norms, and make large values rare: in place."""
    generator = torch.Generator().manual_seed(seed)
    for m in layers:
        if isinstance(m, nn.BatchNorm2d):
            scale = torch.randn(m.num_features, generator=generator).mul(0.6).exp() * spread
            m.weight.data.copy_(scale)
            m.bias.data.copy_(-1.5 * scale)


def conv(i: int, o: int, k: int, stride: int, groups: int, act: type[nn.Module]) -> nn.Sequential:
    layer = nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(o), act())


class Gate(nn.Module):
    def __init__(self, channels: int, sigmoid: type[nn.Module]) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)
        self.sigmoid = sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(self.up(self.down(x.mean((2, 3), keepdim=True)).relu()))


class Block(nn.Module):
    """An inverted residual, with squeeze and excitation or not."""

    def __init__(
        self, i: int, o: int, stride: int, act: type[nn.Module], gate: type[nn.Module] | None
    ) -> None:
        super().__init__()
        self.expand = conv(i, 3 * i, 1, 1, 1, act)
        self.depth = conv(3 * i, 3 * i, 3, stride, 3 * i, act)
        self.gate = nn.Identity() if gate is None else Gate(3 * i, gate)
        self.project = conv(3 * i, o, 1, 1, 1, nn.Identity)
        self.skip = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.gate(self.depth(self.expand(x))))
        return x + y if self.skip else y


def inverted(act: type[nn.Module], gate: type[nn.Module] | None, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = ((16, 24, 2), (24, 24, 1), (24, 40, 2), (40, 40, 1), (40, 40, 1))
    net = nn.Sequential(
        conv(3, 16, 3, 2, 1, act),
        *(Block(i, o, stride, act, gate) for i, o, stride in sizes),
        conv(40, 160, 1, 1, 1, act),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(160, 10),
    )
    uneven([net[0][1], *(m for b in net[1:4] for m in (b.expand[1], b.depth[1]))], seed)
    return net


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, count, _ = x.shape
        parts = self.qkv(x).reshape(n, count, 3, self.heads, self.width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * (self.width // self.heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, count, self.width))


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 4)
        self.mlp = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, seed: int, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.blocks = nn.Sequential(*(Encoder(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NextBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(width, width, 5, 1, 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.depth(x).permute(0, 2, 3, 1))) * self.scale
        return x + y.permute(0, 3, 1, 2)


def convnext(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 32, 2, 2),
        LayerNorm2d(32),
        *(NextBlock(32) for _ in range(2)),
        LayerNorm2d(32),
        nn.Conv2d(32, 64, 2, 2),
        *(NextBlock(64) for _ in range(2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.Linear(64, 10),
    )


def outliers(net: nn.Module, seed: int, spread: float = 1.6) -> None:
    """Rescale the channels of each layer norm before linear layers, in place: the function stays.

    A few channels of the layer norms of large transformers reach some hundred times what the others do.
    """
    generator = torch.Generator().manual_seed(seed)
    for m in net.modules():
        pairs: list[tuple[nn.LayerNorm, nn.Linear]] = []
        if isinstance(m, Encoder):
            first = m.mlp[0]
            assert isinstance(first, nn.Linear)
            pairs = [(m.norm1, m.attention.qkv), (m.norm2, first)]
        elif isinstance(m, NextBlock):
            first = m.mlp[0]
            assert isinstance(first, nn.Linear)
            pairs = [(m.norm, first)]
        for norm, linear in pairs:
            size = norm.weight.shape[0]
            scale = torch.randn(size, generator=generator).mul(spread).exp()
            norm.weight.data.mul_(scale)
            norm.bias.data.mul_(scale)
            linear.weight.data.div_(scale)


FAMILIES: dict[str, Callable[[int], nn.Module]] = {
    "silu": lambda seed: inverted(nn.SiLU, None, seed),
    "hardswish_se": lambda seed: inverted(nn.Hardswish, nn.Hardsigmoid, seed),
    "silu_se": lambda seed: inverted(nn.SiLU, nn.Sigmoid, seed),
    "vit": VisionTransformer,
    "convnext": convnext,
}


def trained(family: str, file: Path, weights: Path, given: argparse.Namespace) -> nn.Module:
    """The network of a family, from a file where it has been trained before."""
    net = FAMILIES[family](given.seed)
    kept = weights / f"{family}_{given.seed}_{given.epochs}_{given.training}.pt"
    if kept.is_file():
        net.load_state_dict(torch.load(kept, weights_only=True))
    else:
        x, y = images(file, "train", given.training)
        start = time.process_time()
        train(net, x, y, given.epochs)
        print(f"trained in {time.process_time() - start:.0f} s of one core", flush=True)
        weights.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), kept)
    net.eval()
    outliers(net, given.seed)
    return net


def plans(scores: Scores, given: argparse.Namespace) -> Iterator[tuple[str, Plan]]:
    """Names and plans, in the order in which they are scored."""
    gm = scores.gm
    yield "plain int8", Plan()
    if given.ladder:
        found = analyze(gm, scores.scheme, [scores.calibration])
        damage = {d.node: d.damage for d in found.layers}
        sites = [s for s in find_sites(gm) if given.new or s.rule not in given.without]
        rungs = climb(gm, scores, splits=exact_splits(gm, sites, damage))
        for rung in rungs:
            if given.verbose and not rung.note:
                yield f"  {rung.name}{'' if rung.kept else ' (not kept)'}", rung.plan
        yield "ladder", best(rungs).plan
        below = best(rungs).plan
        for text in given.plan:
            yield f"ladder + {text}"[:44], Plan.parse(f"{below} {text}")
    else:
        for text in given.plan:
            yield text[:44], Plan.parse(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--plan", action="append", default=[], help="steps to score as well")
    parser.add_argument("--ladder", action="store_true", help="climb the free ladder first")
    parser.add_argument("--new", action="store_true", help="with the rungs of newer rules")
    parser.add_argument("--without", nargs="*", default=[])
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--sites", default="", help="list the sites of rules that begin so")
    parser.add_argument("--weights", type=Path, default=Path("hard_families"))
    parser.add_argument("--training", type=int, default=10_000, help="images")
    parser.add_argument("--evaluation", type=int, default=1000, help="images")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    net = trained(given.family, given.data, given.weights, given)
    calibration, _ = images(given.data, "train", CALIBRATION)
    x, y = images(given.data, "test", given.evaluation)
    gm = trace(net, calibration[:2])
    gm.meta["scheme"] = target(given.target)
    profile(gm, [calibration])
    if given.sites:
        for site in find_sites(gm):
            if site.rule.startswith(given.sites):
                print(site.rule, site.anchor, site.blocked or f"ok, read by {site.readers}")
        return
    scores = Scores(gm, given.target, calibration, x, y, given.weights / "store")
    print(f"{given.family}, {given.target}, {len(x)} images; float {scores.float_level:.2%}")
    head = f"{'plan':44} {'top-1':>7} {'back':>7} {'KL':>9} {'KL back':>8} {'int8':>6} {'MACs':>6}"
    print(f"{head} {'ms':>6}")
    plain: Score | None = None
    for name, plan in plans(scores, given):
        score = scores(plan)
        plain = plain or score
        lost = scores.float_level - plain.metric
        back = (score.metric - plain.metric) / lost if lost > 0 else float("nan")
        less = 1 - score.damage / plain.damage
        row = f"{name:44} {score.metric:7.2%} {back:7.1%} {score.damage:9.5f} {less:8.1%}"
        print(f"{row} {score.int8:6.1%} {score.macs:6.3f} {score.ms:6.3f}", flush=True)


if __name__ == "__main__":
    main()
