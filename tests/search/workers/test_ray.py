"""A run on a Ray cluster of two local nodes, one of which dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.search.cli.test_main import quantfix, write_config
from tests.search.test_faults import check_whole, scores, trials

RAY = find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not RAY, reason="Ray is not installed: quantfix[ray]")
# Ray leaves files open and uses what is deprecated
quiet = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that takes no work and two nodes of one core."""
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.slow
@needs_ray
@quiet
def test_two_nodes_search_and_one_that_dies_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    search = {"trials": 40, "max_macs": 3.0, "max_float_layers": 2}
    config, out = write_config(tmp_path, search=search), tmp_path / "out"
    seen: list[int] = []

    def kill() -> None:
        while not seen:
            time.sleep(0.02)
            owners = (
                {w.name for w in (out / "workers").iterdir()} if (out / "workers").exists() else ()
            )
            if len(owners) == 2 and len((out / "scores.jsonl").read_text().splitlines()) >= 12:
                cluster.remove_node(nodes[1], allow_graceful=False)
                seen.append(1)
                cluster.add_node(num_cpus=1)

    killer = threading.Thread(target=kill)
    killer.start()
    words = ("run", config, "--out", out, "--ray", cluster.address, "--workers", 2, "-q")
    try:
        assert quantfix(monkeypatch, *words) == 0
    finally:
        died, _ = bool(seen), seen.append(0)
        killer.join()
    assert died
    check_whole(out, len(scores(out)))
    owners = {t.user_attrs["worker"] for t in trials(out) if "counts" in t.user_attrs}
    assert len(owners) >= 2


@needs_ray
@quiet
def test_a_cluster_that_is_not_there_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = write_config(tmp_path)
    assert (
        quantfix(monkeypatch, "run", config, "--out", tmp_path / "o", "--ray", "auto", "-q") == 2
    )
    assert "--ray auto: no cluster: " in capsys.readouterr().err


@pytest.mark.skipif(RAY, reason="Ray is installed")
def test_without_ray_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    assert (
        quantfix(monkeypatch, "run", config, "--out", tmp_path / "o", "--ray", "auto", "-q") == 2
    )
    assert "pip install 'quantfix[ray]'" in capsys.readouterr().err
