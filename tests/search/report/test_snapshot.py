"""What the report shows of a network: layers side by side, ranges of channels, boxes and scores."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from rewriter import Plan, profile, target, trace
from rewriter.assemble import assemble
from search.config.schema import load_config
from search.data.evaluation_set import load_samples
from search.job import open_job, silent
from search.report.finish import reported
from search.report.front import groups
from search.report.network import network_section, network_svg
from search.report.network_rows import Row, aligned, shortened
from search.report.outputs import outputs_section
from search.report.ranges import ranges_section, ranges_svg
from search.report.rows import ladder_rows
from search.report.snapshot import PLAIN, REWRITTEN, read_exhibits, write_exhibits
from search.report.snapshot_network import channel_ranges, layer_list, spread, trimmed
from search.report.snapshot_outputs import LEAST_SCORE, outputs_shown
from search.results import load_results
from search.run import note_run, run_search, sensitivity_of
from search.run_dir.scores import Records
from search.scoring.evaluator import RewriteEvaluator
from search.tasks.detection import Detection
from search.tasks.video import Video
from tests.search import small
from tests.search.cli.test_main import write_config

PLAN = "split_weights_2@stem_0"


@pytest.fixture(scope="module")
def network() -> Any:
    gm = trace(small.small(), torch.randn(2, 3, 16, 16))
    calibration = [torch.stack([small.data().calibration[i] for i in range(16)])]
    profile(gm, calibration)
    return gm, calibration


def quantized(network: Any, plan: str) -> Any:
    gm, calibration = network
    return assemble(gm, Plan.parse(plan), target("per_tensor"), calibration).quantized


def test_ranges_are_those_of_the_weights_and_of_the_values(network: Any) -> None:
    found = channel_ranges(quantized(network, ""), "dw_0", "dw.0")
    weight = small.small().dw[0].weight.detach().flatten(1)
    (said,) = found["weights"]
    np.testing.assert_allclose(said["high"], weight.amax(1), rtol=1e-3)
    np.testing.assert_allclose(said["low"], weight.amin(1), rtol=1e-3)
    low, high = said["limits"]
    assert high >= max(said["high"]) * 0.99
    assert low == -high
    x = network[1][0]
    net: Any = small.small()
    with torch.no_grad():
        reads = net.stem(x)
        writes = net.dw(reads)
    for key, value in (("reads", reads), ("writes", writes)):
        (said,) = found[key]
        np.testing.assert_allclose(said["high"], value.amax((0, 2, 3)), rtol=2e-3)
    assert (spread(found["weights"]) or 0) > 50  # one channel is 300 times the others


def test_a_split_layer_has_its_parts_with_less_spread(network: Any) -> None:
    before = channel_ranges(quantized(network, ""), "dw_0", "dw.0")
    after = channel_ranges(quantized(network, PLAN), "dw_0", "dw.0")
    assert len(after["weights"]) == 2
    assert sum(len(t["low"]) for t in after["weights"]) == 8
    assert (spread(after["weights"]) or 0) < (spread(before["weights"]) or 0) / 5


def test_what_changed_is_marked_and_the_rest_is_left_out(network: Any) -> None:
    gm = quantized(network, "").gm
    rows = aligned(layer_list(gm), layer_list(gm))
    assert [r.changed for r in rows] == [""] * 4
    rows = aligned(layer_list(gm), layer_list(quantized(network, PLAN).gm))
    assert any("split_weights_2" in r.changed for r in rows)
    assert [r.changed.split(",")[0] for r in rows] == [
        "3 to 8",
        "new",
        "8 to 8",
        "new",
        "8 to 12",
        "new",
        "new",
        "",
    ]
    merged = aligned(layer_list(gm), layer_list(quantized(network, "merge_separable@dw_0").gm))
    assert [r.changed.split(",")[0] for r in merged] == ["", "replaced", "8 to 12", ""]
    kept = aligned(layer_list(gm), layer_list(quantized(network, "keep_float@pw").gm))
    assert [r.changed for r in kept] == ["", "", "left in float", ""]
    assert [r.left_out for r in shortened(kept)] == [1, 0, 0, 0]
    picture = network_svg(rows, "two of <four>")
    assert "two of &lt;four&gt;" in picture
    assert picture.count("<rect") == sum(
        (r.before is not None) + (r.after is not None) for r in rows
    )


def test_long_runs_of_unchanged_layers_are_counted() -> None:
    same = {
        "name": "a",
        "layer": "a",
        "kind": "conv",
        "size": "1 to 1",
        "made_by": "",
        "in_float": False,
    }
    rows = [Row({**same, "name": f"n{i}"}, {**same, "name": f"n{i}"}) for i in range(9)]
    rows[4] = replace(rows[4], after={**same, "in_float": True})
    assert [r.left_out for r in shortened(rows)] == [3, 0, 0, 0, 3]


def test_channels_beyond_what_fits_keep_the_widest(network: Any) -> None:
    tensor = {"name": "t", "low": [0.0] * 1000, "high": [1.0] * 999 + [9.0], "limits": [0, 9]}
    kept = trimmed(tensor, 40)
    assert kept["count"] == 1000
    assert len(kept["channels"]) == 40
    assert kept["channels"][0] == 999
    assert kept["high"][0] == 9.0
    picture = ranges_svg([kept], "said")
    assert picture.count("M") == 40 + 2  # a bar for each, and the two limits


@pytest.mark.parametrize("widest", [1.0, 40.0, 1e6])
def test_the_narrow_channels_are_seen_beside_a_wide_one(widest: float) -> None:
    tensor = {
        "name": "t",
        "low": [-widest] + [-0.5] * 9,
        "high": [widest] + [0.5] * 9,
        "limits": [-widest, widest],
    }
    picture = ranges_svg([trimmed(tensor, 96)], "said")
    (path,) = re.findall(r'class="range" d="([^"]*)"', picture)
    bars = [(float(a), float(b)) for a, b in re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", path)]
    tall = [low - high for high, low in bars]
    assert len(tall) == 10
    assert tall[0] == max(tall)
    assert min(tall) > 8, tall


@pytest.mark.slow
def test_an_interrupted_run_has_pictures_too(tmp_path: Path) -> None:
    job = open_job(load_config(write_config(tmp_path)), tmp_path / "run")
    sensitivity = sensitivity_of(job)
    note_run(job)
    told = 0

    def stop(score: object, count: int) -> None:
        nonlocal told
        told = count
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), reported(job, silent):
        run_search(job, sensitivity, on_score=stop)
    assert told == 3
    stored = read_exhibits(job.folder, job.records.fingerprint)
    assert stored is not None and stored["plan"] == load_results(job.folder).best().plan
    assert "The network before and after" in (job.folder / "report.html").read_text()
    # the whole run notes its ladder, whose rungs the report lists
    with reported(job, silent):
        run_search(job, sensitivity)
    results = load_results(job.folder)
    names, rows = ladder_rows(results)
    assert [row[0] for row in rows][:2] == ["plain int8", "channels split by range"]
    assert all(row[names.index("adds")] for row in rows[1:])
    assert "Free remedies, each" in (job.folder / "report.html").read_text()
    assert len(groups(results)["free remedies"]) == len(rows)


def test_a_run_stores_what_a_later_report_shows(tmp_path: Path) -> None:
    # a split of this tiny network costs time, which is not what this is about
    options = {"trials": 8, "max_macs": 3.0, "seed": 0, "max_latency_ratio": 100}
    job = open_job(load_config(write_config(tmp_path, search=options)), tmp_path / "run")
    sensitivity_of(job)
    note_run(job)
    job.evaluator(Plan.parse(PLAN))
    results = load_results(job.folder)
    assert results.best().plan == PLAN
    write_exhibits(job, results)
    stored = read_exhibits(job.folder, job.records.fingerprint)
    assert stored is not None
    assert stored["plan"] == PLAN
    assert {"before", "after"} <= stored["ranges"][0].keys()
    assert read_exhibits(job.folder, "another") is None
    (job.folder / "exhibits.json").write_text("{")
    assert read_exhibits(job.folder, job.records.fingerprint) is None
    page = network_section(stored).body + ranges_section(stored).body
    assert "split_weights_2" in page
    assert "dw.0" in page
    assert outputs_section(stored).body == ""


class Boxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)
        self.head = nn.Conv2d(6, 6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu()).flatten(1)


def decode(outputs: Tensor) -> list[dict[str, Tensor]]:
    return [
        {
            "boxes": torch.tensor([[1.0, 2, 9, 12], [3, 3, 5, 5]]) + row[:4].abs().clamp(max=1),
            "scores": torch.tensor([0.9, LEAST_SCORE / 2]),
            "labels": torch.tensor([1, 2]),
        }
        for row in outputs
    ]


def evaluator(model: nn.Module, task: Any, data: Any, x: Tensor, folder: Path) -> RewriteEvaluator:
    gm = trace(model.eval(), x[:2])
    profile(gm, [x])
    return RewriteEvaluator(
        gm=gm, scheme=target("onnxruntime"), task=task, calibration=[x], threads=1,
        samples=load_samples(data), records=Records(folder, "f"),
    )  # fmt: skip


def test_boxes_of_float_and_int8_are_drawn_on_the_same_image(tmp_path: Path) -> None:
    x = torch.rand(8, 3, 16, 16)
    truth = {"boxes": torch.tensor([[1.0, 2, 9, 12]]), "labels": torch.tensor([1])}
    made = evaluator(Boxes(), Detection(decode), [(v, truth) for v in x], x, tmp_path)
    made.baseline()
    given = made.gm, Plan(), made.scheme, made.calibration
    plain = assemble(*given).quantized
    found = outputs_shown(made, {PLAIN: plain, REWRITTEN: plain})
    assert found is not None
    damage = made.records.samples("").damage  # pyright: ignore[reportOptionalMemberAccess]
    assert found["images"][0]["sample"] == int(made.samples.order[int(damage.argmax())])
    for image in found["images"]:
        picture = Image.open(io.BytesIO(base64.b64decode(image["jpeg"])))
        assert picture.size == (16, 16)
        wanted = x[image["sample"]].mul(255).permute(1, 2, 0).numpy()
        assert np.abs(np.asarray(picture).mean() - wanted.mean()) < 8
        assert [len(image["boxes"][n]) for n in ("float", PLAIN, REWRITTEN)] == [1, 1, 1]
        assert image["boxes"][PLAIN] == image["boxes"][REWRITTEN]
    page = outputs_section({"outputs": found}).body
    assert page.count("data:image/jpeg;base64,") == 3  # the pixels of each sample once
    assert page.count("<use ") == 6
    assert "1: 0.90" in page
    names = {1: "cat <b>", 7: "not seen"}
    named = outputs_shown(made, {PLAIN: plain}, names=names)
    assert named is not None and named["names"] == {"1": "cat <b>"}
    page = outputs_section({"outputs": named}).body
    assert "cat &lt;b&gt;: 0.90" in page and "cat <b>" not in page
    assert f"Sample {found['images'][0]['sample']} with 1 box of" in page


class Frames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x).squeeze(2)


def test_scores_over_time_are_those_of_each_network(tmp_path: Path) -> None:
    x, y = torch.randn(6, 5, 4), torch.randint(0, 2, (6, 5))
    made = evaluator(Frames(), Video(), list(zip(x, y, strict=True)), x, tmp_path)
    made.baseline()
    plain = assemble(made.gm, Plan(), made.scheme, made.calibration).quantized
    found = outputs_shown(made, {PLAIN: plain})
    assert found is not None
    for sequence in found["sequences"]:
        row = sequence["sample"]
        with torch.no_grad():
            wanted = Frames()(x[row : row + 1])[0]
        np.testing.assert_allclose(sequence["scores"]["float"], wanted, rtol=1e-3, atol=1e-5)
        assert sequence["truth"] == y[row].tolist()
        assert sequence["scores"][PLAIN] != sequence["scores"]["float"]
    page = outputs_section({"outputs": found}).body
    assert page.count("<polyline") == 2 * len(found["sequences"])
    assert "Away from float: plain int8 up to" in page
