"""Two commands that share nothing but a run directory and a PostgreSQL that the test starts itself."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import optuna
import pytest

from search.run_dir.files import RunError, read_json
from search.study.storage import storage_at
from tests.conftest import ROOT
from tests.search.cli.test_main import quantfix, write_config


def program(name: str) -> str:
    """A program of PostgreSQL; Debian keeps them out of the path."""
    places = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
    found = shutil.which(name, path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"PostgreSQL is not installed: no {name}")
    return found


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """URL of a database in a temporary directory, reached through a socket in it."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: quantfix[postgres]")
    initdb, pg_ctl = program("initdb"), program("pg_ctl")
    folder = Path(tempfile.mkdtemp(prefix="quantfix-pg-"))
    user: list[str] = []
    if os.getuid() == 0:  # PostgreSQL refuses to be run by root
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("PostgreSQL cannot be run by root, and there is no setpriv")
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        user = [setpriv, f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
    data = folder / "data"

    def call(*words: str) -> None:
        log = folder / "call.log"
        with log.open("w") as file:
            done = subprocess.run(
                [*user, *words], stdout=file, stderr=file, cwd=folder, timeout=120, check=False
            )
        assert done.returncode == 0, log.read_text()

    try:
        call(initdb, "-D", str(data), "-U", "quantfix", "--auth=trust", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        call(pg_ctl, "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield f"postgresql://quantfix@/postgres?host={folder}"
        finally:
            call(pg_ctl, "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def command(*words: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "search.cli", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists() or "options" not in read_json(path):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_elsewhere_joins_a_run_over_postgresql(tmp_path: Path, database: str) -> None:
    search = {"trials": 70, "max_macs": 3.0, "max_float_layers": 2}
    config, out = write_config(tmp_path, search=search), tmp_path / "out"
    first = command("run", config, "--out", out, "--storage", database, "-q")
    wait_for(out / "run.json", first)
    second = command("worker", out)  # the run directory says where the storage is
    said = [p.communicate(timeout=300)[0] for p in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert not (out / "journal.log").exists()
    storage = storage_at(database)
    (summary,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=summary.study_name, storage=storage).trials
    storage.remove_session()
    storage._backend.engine.dispose()  # type: ignore[attr-defined]
    ended = [t for t in trials if "counts" in t.user_attrs]
    lines = [json.loads(x)["score"] for x in (out / "scores.jsonl").read_text().splitlines()]
    plans = [s["plan"] for s in lines]
    assert len(plans) == len(set(plans))
    assert sorted(t.user_attrs["plan"] for t in ended) == sorted(plans)
    assert all(t.state.is_finished() for t in trials)
    assert len({t.user_attrs["worker"] for t in ended}) == 2


def test_a_database_that_cannot_be_opened_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match=r"--storage nosuch://there/db: cannot be opened: "):
        storage_at("nosuch://me:secret@there/db")
    config = write_config(tmp_path)
    url = f"sqlite:///{tmp_path}/no/such/folder.db"
    assert (
        quantfix(monkeypatch, "run", config, "--out", tmp_path / "o", "--storage", url, "-q") == 2
    )
    assert "cannot be opened: " in capsys.readouterr().err


@pytest.mark.skipif(find_spec("psycopg") is not None, reason="psycopg is installed")
def test_without_psycopg_the_message_says_what_to_install() -> None:
    with pytest.raises(RunError, match=r"pip install 'quantfix\[postgres\]'"):
        storage_at("postgresql://me:secret@there/db")
