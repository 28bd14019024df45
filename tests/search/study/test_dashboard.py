"""A run is readable while it runs, by Optuna and by what is built on it."""

from __future__ import annotations

import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
import pytest

from search.study.storage import journal
from search.study.study import SHOWN
from tests.search.cli.test_main import write_config
from tests.search.test_faults import attempt, needs_fork

WANTED = {"plan", "metric", "macs", "engine", "interval", "damage"}


@pytest.mark.slow
@needs_fork
def test_a_running_search_shows_what_each_plan_is_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"trials": 500, "max_macs": 3.0, "max_float_layers": 2}
    config, out = write_config(tmp_path, search=search), tmp_path / "out"
    monkeypatch.syspath_prepend(str(tmp_path))
    child = attempt(config, out)
    try:
        while not (out / "scores.jsonl").exists() or _lines(out) < 6:
            assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            time.sleep(0.02)
        # read as any other program would: with Optuna's own class
        storage = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(out / "journal.log"))
        )
        (summary,) = optuna.get_all_study_summaries(storage)
        study = optuna.load_study(study_name=summary.study_name, storage=storage)
        ended = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
        running = [t for t in study.trials if not t.state.is_finished()]
        assert len(ended) >= 3
        assert study.metric_names == ["macs", "metric"]
        for trial in ended:
            assert trial.user_attrs.keys() >= WANTED
            assert trial.values == [trial.user_attrs["macs"], trial.user_attrs["metric"]]
            low, high = trial.user_attrs["interval"]
            assert low <= trial.user_attrs["metric"] <= high
        # while a plan is being scored, its trial says which; between two plans there is none
        assert all("plan" in t.user_attrs for t in running if t.params)
        assert {t.user_attrs["engine"] for t in ended} == {"onnxruntime"}
        if find_spec("optuna_dashboard") is not None:
            _check_dashboard(out, len(ended))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert set(SHOWN) >= WANTED - {"plan"}


def _lines(folder: Path) -> int:
    return (folder / "scores.jsonl").read_bytes().count(b"\n")


def _check_dashboard(folder: Path, least: int) -> None:
    """The pages' own data source answers with the trials and what they show of each."""
    import io
    import json
    import sys

    from optuna_dashboard import wsgi  # pyright: ignore[reportMissingImports]

    app: Any = wsgi(journal(folder / "journal.log"))

    def get(path: str) -> dict[str, object]:
        said: list[str] = []
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": path,
            "QUERY_STRING": "after=0",
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": sys.stderr,
        }
        body = b"".join(app(environ, lambda status, headers, info=None: said.append(status)))
        assert said == ["200 OK"], (said, body)
        return json.loads(body)

    (summary,) = get("/api/studies")["study_summaries"]  # type: ignore[misc]
    detail = get(f"/api/studies/{summary['study_id']}")
    trials = [t for t in detail["trials"] if t["state"] == "Complete"]  # type: ignore[attr-defined]
    assert len(trials) >= least
    for trial in trials:
        assert {a["key"] for a in trial["user_attrs"]} >= WANTED
