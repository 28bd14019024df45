"""What a network is for: how good its outputs are, and how far they are from the float model's.

A new task is a file here, called as the task, with ``make(cfg) -> Task``, its name in `search.config.schema.Config`, and a test.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from search.config import schema

if TYPE_CHECKING:
    from torch import Tensor, fx

    from rewriter.damage import Purpose
    from search.config.schema import Config

__all__ = ["TASKS", "Task", "task"]

TASKS: Mapping[str, str] = {name: f"{__name__}.{name}" for name in schema.TASKS}
"""Name of a task to the module that makes it."""


class Task(Protocol):
    """Metric of one kind of network, and what its outputs mean.

    `outputs` is the list of flat output tensors over the whole set, each (n, ...); `targets` holds
    n targets in the form that the data yields them.
    """

    @property
    def name(self) -> str:
        """What `task:` in a config says."""
        ...

    @property
    def metric(self) -> str:
        """Short name of the metric, a fraction in [0, 1]."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Direction of the metric."""
        ...

    @property
    def purpose(self) -> Purpose:
        """What the outputs mean where the user does not say it; the damage follows from it."""
        ...

    def per_sample(self, outputs: Sequence[Tensor], targets: Any) -> Tensor | None:
        """(n,) contribution of each sample, whose mean is the metric; None where it is no mean."""
        ...

    def score(
        self,
        outputs: Sequence[Tensor],
        targets: Any,
        index: Any = None,
    ) -> float:
        """The metric on all samples, or on those (repeats allowed) that `index` lists."""
        ...

    def training_loss(self, outputs: Sequence[Tensor], targets: Any) -> Tensor:
        """The loss on labeled data, differentiable."""
        ...

    def attach(self, gm: fx.GraphModule) -> None:
        """Edit the traced network, whose outputs the task reads, before it is used; note how they are nested."""
        ...


def task(cfg: Config) -> Task:
    """The task that a config names.

    Raises:
        ConfigError: it lacks something, such as detection a usable postprocess.
    """
    make: Callable[[Config], Task] = importlib.import_module(TASKS[cfg.task]).make
    return make(cfg)
