"""What the tasks whose metric is a mean over samples share: the prediction, its distance to the float network's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.damage import Purpose
from rewriter.graph import unflatten
from search.config.schema import Config, ConfigError
from search.data.user_code import blame, call_factory

Postprocess = Callable[[Any], Any]


class PredictionTask:
    """A network's outputs become a prediction, and each sample's prediction has a value.

    Args:
        postprocess: What makes the prediction of the outputs of a batch, nested as ``forward`` returns them;
            None: the first output is the prediction.
    """

    name = ""
    metric = ""
    higher_is_better = True
    means: Purpose = "numbers"

    def __init__(self, postprocess: Postprocess | None = None) -> None:
        self.postprocess = postprocess
        self.unflatten: Callable[[list[Tensor]], Any] | None = None

    @property
    def purpose(self) -> Purpose:
        """What the outputs mean; what a post-processing makes of them is not known."""
        return self.means if self.postprocess is None else "decoded"

    def values(self, prediction: Any, targets: Any) -> Tensor:
        """(n,) float64 value of each sample, NaN where its target says nothing."""
        raise NotImplementedError

    def per_sample(self, outputs: Sequence[Tensor], targets: Any) -> Tensor | None:
        """(n,) value of each sample, whose mean is the metric; a sample that says nothing counts as the mean."""
        found = self.values(self.prediction(outputs), targets).double()
        says = ~found.isnan()
        # not by nan_to_num, which makes a finite number of an infinite error too
        return torch.where(says, found, found[says].mean())

    def score(self, outputs: Sequence[Tensor], targets: Any, index: Any = None) -> float:
        """The mean value of all samples, or of those that `index` lists."""
        found = self.per_sample(outputs, targets)
        assert found is not None
        return float((found if index is None else found[torch.as_tensor(index)]).mean())

    def prediction(self, outputs: Sequence[Tensor]) -> Any:
        """What the network says of each sample.

        Raises:
            ConfigError: the user's post-processing fails.
        """
        if self.postprocess is None:
            return outputs[0]
        nested = list(outputs) if self.unflatten is None else self.unflatten(list(outputs))
        try:
            return self.postprocess(nested)
        except Exception as error:
            raise ConfigError(f"postprocess: {blame(error)}") from error

    def training_loss(self, outputs: Sequence[Tensor], targets: Any) -> Tensor:
        """There is none for this task.

        Raises:
            ConfigError: always.
        """
        del outputs, targets
        raise ConfigError(
            f"finetune.loss: labels: task {self.name} has no loss of its own; use distillation"
        )

    def attach(self, gm: fx.GraphModule) -> None:
        """The post-processing reads the outputs nested as the user's ``forward`` returns them."""
        self.unflatten = lambda flat: unflatten(gm, list(flat))


def postprocess_of(cfg: Config) -> Postprocess | None:
    """The post-processing that a config names, if any.

    Raises:
        ConfigError: its factory fails, or returns nothing that can be called.
    """
    if cfg.postprocess is None:
        return None
    made = call_factory(cfg, "postprocess", cfg.postprocess.factory, cfg.postprocess.args)
    if not callable(made):
        raise ConfigError(
            f"postprocess: factory returned nothing that can be called: {type(made).__name__}"
        )
    return made


def targets_as(targets: Any, count: int, what: str) -> list[Tensor]:
    """Each sample's target as a tensor.

    Raises:
        ConfigError: there are not as many as outputs, or one is no array of numbers.
    """
    if len(targets) != count:
        raise ConfigError(f"data: {count} outputs for {len(targets)} targets")
    found: list[Tensor] = []
    for i, target in enumerate(targets):
        try:
            found.append(torch.as_tensor(target))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"data: target {i} must be {what}: {target!r:.60}") from error
    return found
