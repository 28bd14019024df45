"""What the report says int8 loses: by class, on single images, and in the scores of a detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rewriter import Plan
from rewriter.assemble import assemble
from search.report.losses import losses_section
from search.report.snapshot import PLAIN, REWRITTEN
from search.report.snapshot_losses import losses_shown
from search.tasks.classification import Classification
from search.tasks.detection import Detection
from tests.search.report.test_snapshot import Boxes, decode, evaluator


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


def shown(made: Any, plans: dict[str, str], **more: Any) -> dict[str, Any]:
    made.baseline()
    given = made.scheme, made.calibration
    networks = {
        name: assemble(made.gm, Plan.parse(plan), *given).quantized for name, plan in plans.items()
    }
    found = losses_shown(made, networks, **more)
    assert found is not None
    return found


def test_classes_and_images_are_those_that_changed(tmp_path: Path) -> None:
    x = torch.rand(60, 3, 16, 16)
    with torch.no_grad():
        logits = Logits()(x)
    y = logits.argmax(1)  # float is right everywhere
    made = evaluator(
        Logits(), Classification(), list(zip(x, y.tolist(), strict=True)), x, tmp_path
    )
    found = shown(made, {PLAIN: ""}, names={int(c): f"<{c}>" for c in y.unique()})
    assert found["images"] == 60
    lost = sum(r["images"] - r["right"][PLAIN] for r in found["classes"])
    assert lost == found["changed"]
    assert all(r["images"] == r["right"]["float"] for r in found["classes"])
    first = found["worst"][0]
    assert found["changed"] == 0 or first["said"]["float"] != first["said"][PLAIN]
    wanted = logits[first["sample"]].argmax()
    assert first["said"]["float"] == first["label"] == int(wanted)
    page = losses_section({"losses": found}).body
    assert "60 images get another answer" in page
    assert "<0>" not in page


def test_the_scores_of_a_detector_do_not_shift_against_themselves(tmp_path: Path) -> None:
    x = torch.rand(8, 3, 16, 16)
    truth = {"boxes": torch.tensor([[1.0, 2, 9, 12]]), "labels": torch.tensor([1])}
    made = evaluator(Boxes(), Detection(decode), [(v, truth) for v in x], x, tmp_path)
    found = shown(made, {PLAIN: "", REWRITTEN: "keep_float@conv keep_float@head"})
    assert found["kind"] == "shift"
    same = found["networks"][REWRITTEN]
    assert abs(same["median"]) < 1e-6
    assert same["lost"] == 0
    assert np.isfinite(found["networks"][PLAIN]["median"])
    page = losses_section({"losses": found}).body
    assert "same recall at" in page


def test_other_tasks_and_old_pictures_have_no_such_section() -> None:
    assert losses_section(None).body == ""
    assert losses_section({"plan": ""}).body == ""
