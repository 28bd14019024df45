"""AUC of frames against torchmetrics, resampling of whole sequences, damage, losses, data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from search.config.schema import ConfigError, load_config
from search.data.datasets import load_data
from search.tasks import task
from search.tasks.video import Video
from tests.damage.given import fidelity

N, T = 9, 7


def outputs(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, T, generator=generator).mul(3).round() / 2]  # with ties


def labels(seed: int = 1) -> Tensor:
    return torch.randint(0, 2, (N, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_that_of_torchmetrics(seed: int) -> None:
    scores, y = outputs(seed), labels(seed + 9)
    expected = float(binary_auroc(scores[0].sigmoid().flatten(), y.flatten()))
    assert Video().score(scores, y) == pytest.approx(expected, abs=1e-6)
    assert Video().score([scores[0][..., None]], list(y)) == pytest.approx(expected, abs=1e-6)
    index = [3, 3, 0, 8]
    expected = float(binary_auroc(scores[0][index].sigmoid().flatten(), y[index].flatten()))
    assert Video().score(scores, y, index) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_resample_is_the_auc_of_its_sequences(seed: int) -> None:
    scores, y = outputs(seed), labels(seed + 9)
    y[0, :3] = -1
    random = np.random.default_rng(seed)
    index = random.integers(0, N, (20, N))
    weights = np.stack([np.bincount(row, minlength=N) for row in index]).astype(float)
    goal = Video()
    found = goal.resampled(goal.matches(scores, y), weights)
    for row, value in zip(index, found, strict=True):
        assert value == pytest.approx(goal.score(scores, y, row), abs=1e-12)


def test_frames_without_a_label_do_not_count() -> None:
    scores, y = outputs(), labels()
    y[2:4] = -1
    kept = [0, 1, 4, 5, 6, 7, 8]
    assert Video().score(scores, y) == pytest.approx(Video().score([scores[0][kept]], y[kept]))
    assert np.isnan(Video().score(scores, torch.ones(N, T, dtype=torch.long)))


def test_damage_is_no_divergence_over_frames() -> None:
    scores = [torch.randn(N, T) + 1]
    shifted = [scores[0] + 0.5]  # a softmax over frames would not see it
    judge = fidelity(scores, purpose=Video().purpose)
    damage = judge.damage(shifted, scores)
    assert damage.shape == (N,)
    expected = 0.25 / float(scores[0].double().square().mean())
    assert float(damage.mean()) == pytest.approx(expected, rel=1e-5)
    assert float(judge.damage(scores, scores).max()) == 0


def test_losses() -> None:
    y = labels()
    logits = torch.randn(N, T, requires_grad=True)
    plain = -(torch.where(y == 1, logits, -logits).sigmoid().log()).mean()
    found = Video().training_loss([logits], y)
    assert float(found.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    probabilities = [logits.detach().sigmoid()[..., None]]
    assert float(Video().training_loss(probabilities, y)) == pytest.approx(
        float(plain.detach()), rel=1e-4
    )
    found.backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (torch.randn(2, 3, 4), torch.zeros(2, 3), "one score per frame"),
        (torch.randn(2, 3), torch.zeros(2, 4), "expected 2 of shape"),
        (torch.randn(2, 3), torch.full((2, 3), 7), "must be 0, 1 or -1"),
    ],
)
def test_unusable_outputs_and_targets(scores: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Video().score([scores], targets)


def write_frames(folder: Path, sequences: int = 6, frames: int = 5) -> list[str]:
    rows = ["file,label"]
    for s in range(sequences):
        (folder / f"s{s}").mkdir(parents=True)
        for t in range(frames):
            pixels = np.full((8, 8, 3), 10 * s + t, np.uint8)
            Image.fromarray(pixels).save(folder / f"s{s}" / f"{t}.png")
            rows.append(f"s{s}/{t}.png,{'' if t == 0 else (s + t) % 2}")
    return rows


def config(folder: Path, data: str) -> Any:
    path = folder / "c.yaml"
    path.write_text(f'task: video\nmodel: {{factory: "m:n"}}\ndata: {{{data}}}\n')
    return load_config(path)


IMAGES = "size: 8, mean: [0, 0, 0], std: [1, 1, 1], crop: 1.0, calibration: 2"


def test_a_table_of_frames(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("\n".join(write_frames(tmp_path / "f")))
    cfg = config(tmp_path, f"csv: t.csv, images: f, frames: 2, {IMAGES}")
    data = load_data(cfg)
    assert isinstance(task(cfg), Video)
    assert len(data.calibration) == 4 and len(data.evaluation) == 8  # 2 clips of 5 frames
    seen = set()
    for i in range(8):
        x, y = data.evaluation[i]
        assert x.shape == (2, 3, 8, 8) and y.shape == (2,)
        value = (x[:, 0, 0, 0] * 255).round().long()
        s, t = int(value[0]) // 10, int(value[0]) % 10
        seen.add(s)
        assert int(value[1]) == 10 * s + t + 1
        assert y.tolist() == [-1 if k == 0 else (s + k) % 2 for k in (t, t + 1)]
    calibrated = {int((data.calibration[i][0, 0, 0, 0] * 255).round()) // 10 for i in range(4)}
    assert len(seen) == 4 and not seen & calibrated


def test_arrays_of_sequences(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    y = random.integers(0, 2, (8, 4))
    np.savez(tmp_path / "f.npz", x=random.normal(size=(8, 4, 3, 6, 5)), y=y)
    data = load_data(config(tmp_path, "npz: f.npz, calibration: 2, frames: 3"))
    x, target = data.evaluation[0]
    assert x.shape == (3, 3, 6, 5) and target.shape == (3,) and x.dtype == torch.float32
    np.savez(tmp_path / "u.npz", x=random.integers(0, 255, (8, 4, 8, 8, 3)).astype(np.uint8))
    data = load_data(config(tmp_path, f"npz: u.npz, {IMAGES}"))
    assert data.evaluation[0].shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("imagefolder: f", "task video reads data from one of factory, csv, npz"),
        (f"csv: t.csv, images: f, frames: 9, {IMAGES}", "too long, the longest sequence has 5"),
        (f"csv: b.csv, images: f, {IMAGES}", "b.csv:2: label is not 0, 1 or empty: '3'"),
        (f"csv: g.csv, images: f, {IMAGES}", "1 frames are missing"),
    ],
)
def test_faults_of_data(tmp_path: Path, data: str, message: str) -> None:
    rows = write_frames(tmp_path / "f")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    (tmp_path / "b.csv").write_text("file,label\ns0/0.png,3")
    (tmp_path / "g.csv").write_text("\n".join([*rows, "s9/0.png,1"]))
    with pytest.raises(ConfigError, match=message):
        load_data(config(tmp_path, data))
