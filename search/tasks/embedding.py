"""Embeddings: verification (area under the ROC curve, true accepts at a false accept rate) or retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from rewriter.damage import Purpose
from search.config.schema import Config, ConfigError
from search.tasks.custom import Custom
from search.tasks.keypoints import option

MEASURES = ("auc", "tar", "retrieval")
FALSE_ACCEPTS = 0.01


class Embedding(Custom):
    """A vector for each sample, compared by cosine; targets are identities (class indices).

    Args:
        measure: ``auc``: of the cosine of all pairs, same identity against different; ``tar``: share of same pairs above the
            cosine that 1 % of the different pairs exceed; ``retrieval``: share of samples whose nearest other has their identity.
    """

    name = "embedding"
    purpose: Purpose = "vectors"

    def __init__(self, measure: str = "auc") -> None:
        super().__init__(partial(measured, measure=measure))
        self.metric = measure

    def score(self, outputs: Sequence[Tensor], targets: Any, index: Any = None) -> float:
        """The measure of all samples, or of those that `index` lists; a sample is no pair with its own repeat."""
        rows = torch.arange(len(targets)) if index is None else torch.as_tensor(index)
        nested = self.unflatten([o[rows] for o in outputs] if index is not None else list(outputs))
        try:
            identity = torch.as_tensor(targets)[rows]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"data: targets must be identities: {targets!r:.60}") from error
        return measured(nested, identity, self.metric, rows)


def measured(outputs: Any, targets: Any, measure: str, rows: Tensor | None = None) -> float:
    """The measure of all samples, as a fraction; equal `rows` are one sample, and no pair.

    Raises:
        ConfigError: the outputs are no vectors, or not as many as targets.
    """
    first = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    if not isinstance(first, Tensor) or first.ndim < 2:
        raise ConfigError(
            f"task embedding: the first output must be (n, D): {tuple(getattr(first, 'shape', ()))}"
        )
    identity = torch.as_tensor(targets).reshape(-1)
    if len(identity) != len(first):
        raise ConfigError(f"data: {len(first)} outputs for {len(identity)} targets")
    vectors = torch.nn.functional.normalize(first.flatten(1).double(), dim=1).nan_to_num(0.0)
    cosine = (vectors @ vectors.T).cpu()
    same = identity[:, None] == identity[None]
    rows = torch.arange(len(identity)) if rows is None else rows
    other = rows[:, None] != rows[None]
    pairs = other.triu(1)
    labels, scores = same[pairs].numpy(), cosine[pairs].numpy()
    if labels.all() or not labels.any():
        return float("nan")
    if measure == "auc":
        return float(roc_auc_score(labels, scores))
    if measure == "tar":
        limit = np.quantile(scores[~labels], 1 - FALSE_ACCEPTS)
        return float((scores[labels] > limit).mean())
    nearest = cosine.masked_fill(~other, -2).argmax(1)
    return float((identity[nearest] == identity).double().mean())


def make(cfg: Config) -> Embedding:
    """The task that a config asks for."""
    return Embedding(option(cfg, "measure", MEASURES))
