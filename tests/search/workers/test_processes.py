"""The processes of one search share the threads that it may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from search.workers import processes as workers


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("count", "share"), [(1, 4), (2, 2), (3, 1), (8, 1)])
def test_each_worker_has_its_share_of_the_threads(
    four_threads: None, monkeypatch: pytest.MonkeyPatch, count: int, share: int
) -> None:
    given: list[int] = []

    class Process:
        def __init__(self, args: tuple[Any, ...], **more: Any) -> None:
            given.append(args[-1])

        def start(self) -> None: ...
        def join(self) -> None: ...
        def is_alive(self) -> bool:
            return False

    context = SimpleNamespace(Process=Process)
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda kind: context)
    options = SimpleNamespace(workers=count, model_dump=dict)
    job: Any = SimpleNamespace(
        cfg=SimpleNamespace(path=Path("c.yaml"), search=options),
        folder=Path("run"),
    )
    with workers.helpers(job, None) as own:
        assert given == [share] * (count - 1)
        assert torch.get_num_threads() == own == share
    assert torch.get_num_threads() == 4
