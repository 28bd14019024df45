"""Runs in directories of their own that share fits and scores, in a folder or behind a URL."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import optuna
import pytest

from rewriter.storage.files import Place, inside, names, write
from search.config.schema import ConfigError, load_config
from search.job import place_of
from search.run_dir import shared_scores as exchange
from search.run_dir.scores import Confirmations, Records, Samples, Score
from search.study.storage import recover, working
from tests.search.cli.test_main import load, quantfix, write_config


@pytest.fixture(params=["folder", "memory"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Place:
    monkeypatch.setattr(exchange, "LOOK_S", 0.0)
    url = f"memory://{uuid.uuid4().hex}"
    return tmp_path / "shared" if request.param == "folder" else url


def score(plan: str, damage: float = 0.1, **more: object) -> Score:
    return Score(plan=plan, macs=10, metric=0.5, interval=(0.4, 0.6), damage=damage, **more)  # type: ignore[arg-type]


def test_a_score_is_known_in_the_other_directory_with_its_samples(
    tmp_path: Path, place: Place
) -> None:
    here, there = (Records(tmp_path / n, "f", place) for n in ("here", "there"))
    samples = Samples(np.linspace(0, 1, 5), metric=np.array([0.0, 1, 1, 0, 1]))
    here.add(score("a@b"), samples)
    assert there.get("a@b") is None
    there.refresh()
    assert there.scores() == [score("a@b")]
    found = there.samples("a@b")
    assert found is not None
    assert found.metric is not None
    assert samples.metric is not None
    assert np.array_equal(found.damage, samples.damage)
    assert np.array_equal(found.metric, samples.metric)
    there.add(score("c@d"))
    for records in (here, there, here):
        records.refresh()
    assert [s.plan for s in here.scores()] == [s.plan for s in there.scores()] == ["a@b", "c@d"]
    for name in ("here", "there"):  # on its own disk, each once
        assert len((tmp_path / name / "scores.jsonl").read_text().splitlines()) == 2
        assert [s.plan for s in Records(tmp_path / name, "f").scores()] == ["a@b", "c@d"]


def test_a_fuller_score_takes_the_place_of_one_that_was_given_up(
    tmp_path: Path, place: Place
) -> None:
    here, there = (Records(tmp_path / n, "f", place) for n in ("here", "there"))
    here.add(score("a@b", 0.3, stopped=True))
    there.refresh()
    here.add(score("a@b", 0.2))
    there.refresh()
    assert there.scores() == [score("a@b", 0.2)]
    late = Records(tmp_path / "late", "f", place)
    assert late.scores() == [score("a@b", 0.2)]


def test_scores_of_another_fingerprint_and_of_another_part_stay_apart(
    tmp_path: Path, place: Place
) -> None:
    kept = Confirmations.of(Records(tmp_path / "here", "f", place), 3)
    kept.whole.add(score("a@b", 0.2))
    Records(tmp_path / "here", "g", place).add(score("a@b", 0.4))
    there = Confirmations.of(Records(tmp_path / "there", "f", place), 3)
    assert there.whole.scores() == [score("a@b", 0.2)]
    assert there.held.scores() == []
    assert Records(tmp_path / "there", "f", place).scores() == []


def test_what_was_scored_before_is_shared_when_the_run_opens_again(
    tmp_path: Path, place: Place
) -> None:
    Records(tmp_path / "here", "f").add(score("a@b"), Samples(np.ones(3)))
    Records(tmp_path / "here", "f", place)
    count = len(names(inside(inside(place, "scores"), "f")))
    there = Records(tmp_path / "there", "f", place)
    assert there.scores() == [score("a@b")]
    assert there.samples("a@b") is not None
    Records(tmp_path / "here", "f", place)
    assert len(names(inside(inside(place, "scores"), "f"))) == count == 2


def test_a_damaged_file_is_left_out_with_a_warning(
    tmp_path: Path, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    scores = inside(inside(place, "scores"), "f")
    write(scores, "x-y.json", b'{"fingerprint": "f", "sco')
    write(scores, "x-z.npz", b"whatever")
    records = Records(tmp_path / "here", "f", place)
    assert records.scores() == []
    assert "unreadable" in caplog.text


def test_a_place_is_a_url_or_a_folder_beside_the_config(tmp_path: Path) -> None:
    for where, expected in (
        ("memory://x", "memory://x"),
        ("fits", tmp_path / "fits"),
        (None, None),
    ):
        config = write_config(tmp_path, search={"store": where} if where else {})
        assert place_of(load_config(config)) == expected
    config = write_config(tmp_path, search={"store": "nosuch://x"})
    with pytest.raises(ConfigError, match=r"search\.store: nosuch://x: cannot be opened"):
        place_of(load_config(config))


def test_a_trial_of_a_worker_elsewhere_is_left_to_it_for_as_long_as_a_plan_may_take(
    tmp_path: Path,
) -> None:
    study = optuna.create_study(direction="minimize")
    with working(tmp_path / "workers") as me:
        study.enqueue_trial({}, user_attrs={"worker": "other-1"})
        study.ask()
        recover(study, tmp_path / "workers", me, 3600)
        assert [t.state.name for t in study.trials] == ["RUNNING"]
        recover(study, tmp_path / "workers", me, 0.0)
        assert [t.state.name for t in study.trials] == ["FAIL"]


@pytest.mark.slow
def test_a_second_run_elsewhere_goes_on_with_what_the_first_has_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = (tmp_path / "shared").as_uri()
    config = write_config(tmp_path, search={"trials": 8, "max_macs": 3.0, "store": url})
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    words = ("run", config, "--storage", storage, "-q")
    assert quantfix(monkeypatch, *words, "--out", tmp_path / "here") == 0
    first = load(tmp_path / "here" / "front.json")
    from search.scoring.evaluator import RewriteEvaluator

    def fail(*words: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(RewriteEvaluator, "_candidate", fail)
    assert quantfix(monkeypatch, *words, "--out", tmp_path / "there") == 0
    second = load(tmp_path / "there" / "front.json")
    assert second["points"] == first["points"]
    assert second["plans_scored"] == first["plans_scored"] >= 8
    assert names(f"{url}/fits")
