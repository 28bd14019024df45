from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from search.config.schema import load_config, shipped_config
from search.data import digits, digits_detection, digits_video
from search.data.datasets import batches, load_data
from search.data.model import load_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTFIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_the_images_are_scikit_learns() -> None:
    data = digits.digits(32)
    assert (len(data.calibration), len(data.evaluation)) == (128, 900)
    assert data.training is not None
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    x, label = data.evaluation[5]
    assert label == bunch.target[order[902]]
    at = (np.arange(32) + 0.5) / 4 - 0.5  # pixel centers of the enlarged image, in small pixels
    rows = np.stack([np.interp(at, range(8), row) for row in bunch.images[order[902]]])
    wanted = np.stack([np.interp(at, range(8), column) for column in rows.T], axis=1) / 16
    np.testing.assert_allclose((x[0] * digits.STD + digits.MEAN).numpy(), wanted, atol=1e-6)


def test_evaluation_images_are_never_trained_on_or_calibrated_with() -> None:
    data = digits.digits(8)
    assert data.training is not None
    seen = {data.training[i][0].numpy().tobytes() for i in range(len(data.training))}
    calibration = {data.calibration[i].numpy().tobytes() for i in range(128)}
    assert calibration <= seen
    assert not any(data.evaluation[i][0].numpy().tobytes() in seen for i in range(900))


def test_no_pixel_sits_on_a_rounding_tie_of_the_input() -> None:
    data = digits.digits(32)
    x = torch.stack([data.evaluation[i][0] for i in range(900)]).double().numpy()
    steps = x / ((1 - 0) / digits.STD / 255)
    distance = np.abs(steps - np.floor(steps) - 0.5)
    assert distance.min() > 2e-4  # of a step; float32 is a hundred times finer


@pytest.mark.slow
def test_training_is_fixed_by_its_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    nets = [digits.architecture() for _ in range(3)]
    start = torch.get_rng_state()
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        digits.train(net, seed, epochs=1)
        assert not net.training
    assert torch.equal(torch.get_rng_state(), start)
    assert not torch.equal(before, start)  # only building a network draws from it
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]))
    assert not torch.allclose(weights(nets[0]), weights(nets[2]))


def test_the_network_is_trained_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def train(net: nn.Module, seed: int) -> None:
        calls.append(seed)
        for p in net.parameters():
            nn.init.constant_(p, 0.5 + seed)

    monkeypatch.setattr(digits, "train", train)
    first = digits.network(seed=0)
    again = digits.network(seed=0)
    assert calls == [0]
    assert not again.training
    torch.testing.assert_close(weights(first), weights(again))

    digits.network(seed=2)
    assert calls == [0, 2]
    files = sorted(cache.iterdir())
    assert len(files) == 2
    assert {f.suffix for f in files} == {".safetensors"}

    for file in files:
        file.write_bytes(b"cut off")
    with caplog.at_level(logging.WARNING):
        digits.network(seed=0)
    assert calls == [0, 2, 0]
    assert "cannot be used, training again" in caplog.text
    digits.network(seed=0)
    assert calls == [0, 2, 0]


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QUANTFIX_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(digits, "train", lambda net, seed: None)
    digits.network(seed=0)
    assert "weights not cached" in caplog.text


def test_the_shipped_weights_are_loaded_and_nothing_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (digits, digits_detection, digits_video):
        monkeypatch.setattr(module, "train", None)
        a, b = module.network(), module.network()
        assert not a.training
        torch.testing.assert_close(weights(a), weights(b))
    assert sum(file.stat().st_size for file in digits.WEIGHTS.iterdir()) < 1_000_000


def test_the_example_is_accurate_in_float_and_loses_in_int8_per_tensor() -> None:
    config = load_config(shipped_config("digits.yaml"))
    net, data = load_model(config), load_data(config)
    x, y = next(iter(batches(data.evaluation, 900)))
    with torch.inference_mode():
        reference = net(x)
        float_top1 = top1(reference, y)
        per_tensor, per_channel = (rounded(net, axis)(x) for axis in (None, 0))
    assert float_top1 > 0.97
    assert top1(per_channel, y) > float_top1 - 0.01
    assert kl(reference, per_channel) < 0.01
    assert top1(per_tensor, y) < float_top1 - 0.05
    assert kl(reference, per_tensor) > 0.1


def top1(logits: Tensor, y: Tensor) -> float:
    return (logits.argmax(1) == y).double().mean().item()


def kl(p: Tensor, q: Tensor) -> float:
    p, q = p.double().log_softmax(1), q.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1).mean().item()


def rounded(net: nn.Module, axis: int | None) -> nn.Module:
    """The network with its folded weights rounded to int8: one scale, or one for each channel."""
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        if isinstance(module, nn.Sequential) and isinstance(module[0], nn.Conv2d):
            first, norm = module[0], module[1]
            assert isinstance(first, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            conv = fuse_conv_bn_eval(first, norm)
            module[0], module[1] = conv, nn.Identity()
            weight = conv.weight.data
            size = weight.abs().amax((1, 2, 3), keepdim=True) if axis == 0 else weight.abs().max()
            conv.weight.data = (weight / size * 127).round() * size / 127
    return net
