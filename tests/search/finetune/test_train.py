"""Training: it lowers what it is judged by, never makes it worse, and survives a kill to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from rewriter import Quantized, profile, quantize, target, trace
from rewriter.int8.qat import learnable
from search.config.schema import ConfigError, FinetuneConfig, load_config
from search.data.images import Data, Inputs
from search.finetune.data import Kept, Pool, pool_of
from search.finetune.train import Training
from search.tasks.classification import Classification
from search.tasks.detection import Detection
from tests.damage.given import fidelity
from tests.search import small

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PARTS = np.arange(16), np.arange(16, 24)


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    gm = trace(small.small(spread=30.0), IMAGES[:2])
    profile(gm, [IMAGES])
    return quantize(gm, target("per_tensor"), [IMAGES])


def options(**changes: Any) -> FinetuneConfig:
    given = {"steps": 12, "check": 4, "batch": 8, "rate": 3e-3, "ema": 0.5} | changes
    return FinetuneConfig.model_validate(given)


def training(quantized: Quantized, checkpoint: Path | None = None, **changes: Any) -> Training:
    gm = trace(small.small(spread=30.0), IMAGES[:2])
    pool = Pool(small.Unlabeled(IMAGES), *PARTS, "images")
    student = learnable(quantized).gm
    return Training(student, gm, Classification(), pool, options(**changes), "cpu", checkpoint)


def weights(made: Training) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in made.student.named_parameters()}


def killed_at(step: int) -> Any:
    def tick(done: int, total: int) -> None:
        if done == step:
            raise StoppedError

    return tick


@pytest.mark.parametrize("views", ["plain", "mixed"])
def test_a_killed_training_ends_as_one_that_was_not(
    quantized: Quantized, tmp_path: Path, views: str
) -> None:
    whole = training(quantized, views=views)
    expected = whole.run()
    for step in (6, 9):
        with pytest.raises(StoppedError):
            training(quantized, tmp_path / "state.pt", views=views).run(killed_at(step))
    begun: list[int] = []
    resumed = training(quantized, tmp_path / "state.pt", views=views)
    found = resumed.run(lambda done, total: begun.append(done))
    assert begun[0] == 8, "it did not go on at the last checkpoint"
    assert found == expected
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_the_loss_falls_on_inputs_that_do_not_train(quantized: Quantized) -> None:
    made = training(quantized, steps=60, check=10, ema=0.9)
    before = weights(made)
    trained = made.run()
    assert trained.first == pytest.approx(training(quantized).loss(learnable(quantized).gm))
    assert trained.best < 0.7 * trained.first
    assert made.loss(made.student) == pytest.approx(trained.best, rel=1e-5)
    assert any(not torch.equal(before[n], w) for n, w in weights(made).items())


def test_a_training_that_spoils_the_network_is_dropped(quantized: Quantized) -> None:
    made = training(quantized, rate=1.0)
    before = weights(made)
    trained = made.run()
    assert trained.kept == 0 and trained.best == trained.first
    assert all(torch.equal(before[n], w) for n, w in weights(made).items())


def test_it_stops_after_judgments_without_an_improvement(quantized: Quantized) -> None:
    trained = training(quantized, rate=1.0, steps=100, check=1, patience=3).run()
    assert trained.steps == 3


def test_a_damaged_checkpoint_is_not_used(
    quantized: Quantized, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state.pt").write_bytes(b"half a file")
    found = training(quantized, tmp_path / "state.pt").run()
    assert "unreadable, training again" in caplog.text
    assert found == training(quantized).run()


def test_frozen_ranges_do_not_move(quantized: Quantized) -> None:
    learned = learnable(quantized, ranges=False)
    made = training(quantized, steps=8)
    made.student = learned.gm
    made.run()
    assert all(float(p.detach().abs().max()) == 0 for p in learned.values.values())
    assert all(float(p.detach().abs().max()) == 0 for p in learned.weights.values())


def config(folder: Path, **changes: Any) -> Any:
    given = "".join(f"  {k}: {v}\n" for k, v in changes.items())
    path = folder / "c.yaml"
    text = 'task: classification\nmodel: {factory: "small:small"}\ndata: {factory: "small:data"}\n'
    path.write_text(text + f"finetune:\n  seed: 0\n{given}")
    (folder / "small.py").write_text((Path(small.__file__)).read_text())
    return load_config(path)


def test_what_trains_does_not_judge(tmp_path: Path) -> None:
    labeled = TensorDataset(IMAGES, torch.arange(24))
    data = Data(Inputs(labeled), labeled, labeled)
    pool = pool_of(config(tmp_path, validation=0.25), data)
    assert len(pool.validation) == 6
    assert sorted([*pool.training, *pool.validation]) == list(range(24))
    judges = torch.cat([y for _, y in pool.judges(4)])
    seen = {int(i) for s in range(30) for i in pool.batch(np.random.default_rng(s), 5)[1]}
    assert seen == set(pool.training.tolist())
    assert not seen & set(judges.tolist())
    other = pool_of(config(tmp_path, validation=0.25, steps=7), data)
    assert other.digest != pool.digest
    assert pool_of(config(tmp_path, validation=0.25, plans="best"), data).digest == pool.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "labels"}, "finetune.loss: labels: data.calibration has none"),
        ({"inputs": '{factory: "small:small"}'}, "finetune.inputs: no map-style data set"),
        ({"inputs": '{factory: "small:smal"}'}, "did you mean small?"),
    ],
)
def test_unusable_inputs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    data = Data(small.Unlabeled(IMAGES), small.Unlabeled(IMAGES))
    with pytest.raises(ConfigError, match=message):
        pool_of(config(tmp_path, **changes), data)


def test_too_few_inputs_and_another_shape(tmp_path: Path) -> None:
    few, other = small.Unlabeled(IMAGES[:3]), small.Unlabeled(IMAGES[..., :8])
    with pytest.raises(ConfigError, match=r"data.calibration: at least 4 inputs .*: 3"):
        pool_of(config(tmp_path), Data(few, few))
    labeled = TensorDataset(other.x, torch.arange(24))
    with pytest.raises(ConfigError, match=r"data.training: inputs must have .*\(3, 16, 16\)"):
        pool_of(config(tmp_path), Data(small.Unlabeled(IMAGES), labeled, labeled))


def test_samples_are_read_once_as_far_as_memory_allows() -> None:
    read: list[int] = []

    class Counted(small.Unlabeled):
        def __getitem__(self, index: int) -> Tensor:
            read.append(index)
            return super().__getitem__(index)

    kept = Kept(Counted(IMAGES), limit=2 * IMAGES[0].numel() * 4)
    for _ in range(3):
        assert all(torch.equal(kept[i], IMAGES[i]) for i in range(3))
    assert [read.count(i) for i in range(3)] == [1, 1, 3]


def test_a_data_set_that_augments_at_random_is_the_same_one_each_time(tmp_path: Path) -> None:
    class Random(small.Unlabeled):
        def __getitem__(self, index: int) -> Tensor:
            return super().__getitem__(index) + 0.1 * torch.rand(())

    data = Data(Random(IMAGES), small.Unlabeled(IMAGES))
    pools = [pool_of(config(tmp_path, validation=0.25), data) for _ in range(2)]
    assert pools[0].digest == pools[1].digest
    first, again = (next(pools[0].judges(6))[0] for _ in range(2))
    assert not torch.equal(first, again), "what is random was frozen"


def test_losses_are_the_damage_of_a_batch_and_have_gradients() -> None:
    generator = torch.Generator().manual_seed(2)
    wanted = 3 * torch.randn(6, 5, generator=generator)
    found = (wanted + torch.randn(6, 5, generator=generator)).requires_grad_()
    task = Classification()
    loss = fidelity([wanted], purpose=task.purpose).damage([found], [wanted]).mean()
    divergence = (wanted.softmax(1) * (wanted.log_softmax(1) - found.log_softmax(1))).sum(1)
    assert float(loss.detach()) == pytest.approx(float(divergence.mean().detach()))
    loss.backward()
    p, q = found.detach().softmax(1), wanted.softmax(1)
    assert found.grad is not None
    assert torch.allclose(found.grad, (p - q) / 6, atol=1e-6)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    expected = -found.detach().log_softmax(1)[torch.arange(6), labels].mean()
    assert float(task.training_loss([found.detach()], labels)) == pytest.approx(float(expected))

    boxes = torch.randn(6, 4, 3, generator=generator)
    moved = (boxes + 0.1).requires_grad_()
    detector = Detection(lambda outputs: [])
    loss = fidelity([boxes], purpose=detector.purpose).damage([moved], [boxes]).mean()
    assert float(loss.detach()) == pytest.approx(0.01 / float(boxes.square().mean()), rel=1e-4)
    loss.backward()
    assert moved.grad is not None and bool(moved.grad.any())
    with pytest.raises(ConfigError, match="a detector's loss is not known"):
        detector.training_loss([moved], [])
