"""Video: one score for each frame, area under the ROC curve over all frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, fx

from rewriter.damage import Purpose
from rewriter.export import first_output_only
from search.config.schema import Config, ConfigError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ranked:
    """All labeled frames in the order of their scores.

    Attributes:
        sequence: (frames,) number of each frame's sequence.
        positive: (frames,) whether its label is 1.
        tie: (frames,) number of its distinct score, lowest first.
    """

    sequence: NDArray[np.intp]
    positive: NDArray[np.bool_]
    tie: NDArray[np.intp]


class Video:
    """AUC of the frames' scores; the network's first output is the scores, (n, T) or (n, T, 1).

    Targets are (T,) vectors of 0 and 1; a frame whose label is negative (-1) is left out. A score may be a logit or a
    probability: only the order counts. Intervals resample whole sequences, since frames of one are alike.
    """

    name = "video"
    metric = "auc"
    higher_is_better = True
    purpose: Purpose = "scores"  # the T scores of a sequence are no distribution over T classes

    def per_sample(self, outputs: Sequence[Tensor], targets: Any) -> Tensor | None:
        """AUC is no mean over sequences: there is no value for each of them."""
        del outputs, targets

    def matches(self, outputs: Sequence[Tensor], targets: Any) -> Ranked:
        """What intervals are resampled from (``resampled``)."""
        scores, labels = scores_of(outputs), labels_of(outputs, targets)
        sequence, frame = np.nonzero(labels >= 0)
        values = scores[sequence, frame]
        order = np.argsort(values, kind="stable")
        tie = np.cumsum(np.diff(values[order], prepend=values[order][:1]) > 0)
        positive = labels[sequence, frame] == 1
        return Ranked(sequence[order], positive[order], tie.astype(np.intp))

    def resampled(self, matches: Ranked, weights: Floats) -> Floats:
        """AUC (B,) for each row of sequence weights (B, sequences); NaN where a label is missing.

        The share of pairs of a positive and a negative frame in which the positive one scores higher, ties half
        (Mann and Whitney, 1947, doi:10.1214/aoms/1177730491).
        """
        count = int(matches.tie[-1]) + 1 if len(matches.tie) else 0
        found = np.empty(len(weights))
        for i, row in enumerate(weights):
            frame = row[matches.sequence]
            up = np.bincount(matches.tie, frame * matches.positive, count)
            down = np.bincount(matches.tie, frame * ~matches.positive, count)
            pairs = up.sum() * down.sum()
            below = np.cumsum(down) - down / 2
            found[i] = float(up @ below) / pairs if pairs else np.nan
        return found

    def score(
        self, outputs: Sequence[Tensor], targets: Any, index: Sequence[int] | None = None
    ) -> float:
        """AUC in [0, 1] over all frames, or those of the sequences in ``index``; NaN where a label is missing."""
        scores, labels = scores_of(outputs), labels_of(outputs, targets)
        if index is not None:
            rows = np.asarray(index)
            scores, labels = scores[rows], labels[rows]
        used = labels >= 0
        if len(np.unique(labels[used])) < 2 or not np.isfinite(scores[used]).all():
            return float("nan")
        return float(roc_auc_score(labels[used], scores[used]))

    def training_loss(self, outputs: Sequence[Tensor], targets: Any) -> Tensor:
        """Mean binary cross-entropy of the labeled frames' scores, differentiable.

        Scores that all lie in [0, 1] are taken for probabilities, others for logits.
        """
        scores = outputs[0].float().flatten(1)
        labels = torch.as_tensor(labels_of(outputs, targets)).to(scores)
        used = labels >= 0
        if not bool(used.any()):
            return scores.sum() * 0.0
        scores, labels = scores[used], labels[used]
        if bool(((scores >= 0) & (scores <= 1)).all()):
            return F.binary_cross_entropy(scores.clamp(1e-6, 1 - 1e-6), labels)
        return F.binary_cross_entropy_with_logits(scores, labels)

    def attach(self, gm: fx.GraphModule) -> None:
        """Edit gm: its outputs are scores, and states are not among them."""
        first_output_only(gm)


def make(cfg: Config) -> Video:
    """The task; a config says nothing more of it."""
    del cfg
    return Video()


def scores_of(outputs: Sequence[Tensor]) -> Floats:
    """The scores (n, T).

    Raises:
        ConfigError: the first output has another shape.
    """
    shapes = [tuple(o.shape) for o in outputs]
    if not outputs or len(shapes[0]) not in (2, 3) or (len(shapes[0]) == 3 and shapes[0][2] != 1):
        raise ConfigError(f"model: video needs one score per frame, (n, T) or (n, T, 1): {shapes}")
    return outputs[0].detach().flatten(1).double().cpu().numpy()


def labels_of(outputs: Sequence[Tensor], targets: Any) -> NDArray[np.int64]:
    """The labels (n, T).

    Raises:
        ConfigError: there is not one label, 0, 1 or negative, for each score.
    """
    rows = [t.cpu().numpy() if isinstance(t, Tensor) else np.asarray(t) for t in targets]
    wanted = tuple(outputs[0].flatten(1).shape)
    lengths = sorted({r.shape for r in rows})
    if len(rows) != wanted[0] or lengths != [wanted[1:]]:
        given = f"{len(rows)} of shape {' and '.join(map(str, lengths))}"
        raise ConfigError(f"data: targets: expected {wanted[0]} of shape {wanted[1:]}: {given}")
    labels = np.stack(rows)
    if not np.isin(labels, (0, 1)).all() and not (np.isin(labels, (0, 1)) | (labels < 0)).all():
        wrong = labels[~np.isin(labels, (0, 1)) & (labels >= 0)][0]
        raise ConfigError(f"data: targets: a frame's label must be 0, 1 or -1 (left out): {wrong}")
    return labels.astype(np.int64)
