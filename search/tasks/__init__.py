"""What a network is for: how good its outputs are, and how far they are from the float model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from search.config.schema import ConfigError
from search.data.user_code import call_factory
from search.tasks.classification import Classification
from search.tasks.detection import Detection
from search.tasks.video import Video

if TYPE_CHECKING:
    from torch import Tensor

    from rewriter.damage import Purpose
    from search.config.schema import Config


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
        """The loss on labelled data, differentiable."""
        ...


def task(cfg: Config) -> Task:
    """The task that a config names.

    Raises:
        ConfigError: detection has no usable postprocess.
    """
    if cfg.task == "classification":
        return Classification()
    if cfg.task == "detection":
        if cfg.postprocess is None:
            raise ConfigError(f"{cfg.path.name}: task detection: missing postprocess: factory")
        made = call_factory(cfg, "postprocess", cfg.postprocess.factory, cfg.postprocess.args)
        if not hasattr(made, "__call__"):  # noqa: B004 - callable() would lose the type Any
            kind = type(made).__name__
            raise ConfigError(f"postprocess: factory returned nothing that can be called: {kind}")
        return Detection(made)
    return Video()
