"""Reading a line of text with CTC: share of words right, or one minus the normalized edit distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.text import char_error_rate

from rewriter.damage import Purpose
from search.config.schema import Config, ConfigError
from search.tasks._prediction import Postprocess, PredictionTask, postprocess_of
from search.tasks.keypoints import option

MEASURES = ("words", "characters")


class Ocr(PredictionTask):
    """Scores of each character at each step; repeated characters and blanks are dropped (best path, Graves et al., 2006).

    Targets are texts, or sequences of class indices. The prediction is (n, T, classes), or texts where a post-processing
    decodes by itself.

    Args:
        alphabet: The character of each class after the blank, class 0.
        measure: ``words``: share of texts that are right to the last character; ``characters``: one minus the edit distance
            relative to the length, at least 0.
        postprocess: Outputs to scores (n, T, classes), or to a list of n texts.
    """

    name = "ocr"
    means: Purpose = "steps"

    def __init__(
        self, alphabet: str = "", measure: str = "words", postprocess: Postprocess | None = None
    ) -> None:
        super().__init__(postprocess)
        self.alphabet = alphabet
        self.metric = measure

    def values(self, prediction: Any, targets: Any) -> Tensor:
        texts = self.texts(prediction)
        if len(texts) != len(targets):
            raise ConfigError(f"data: {len(texts)} outputs for {len(targets)} targets")
        pairs = [(f, self._text(t)) for f, t in zip(texts, targets, strict=True)]
        if self.metric == "words":
            return torch.tensor([float(f == t) for f, t in pairs], dtype=torch.float64)
        errors = [float(char_error_rate([f], [t])) if t else float(bool(f)) for f, t in pairs]
        return (1 - torch.tensor(errors, dtype=torch.float64)).clamp_min(0)

    def texts(self, prediction: Any) -> list[str]:
        """What was read.

        Raises:
            ConfigError: the prediction is neither scores nor texts.
        """
        if isinstance(prediction, Sequence) and all(isinstance(p, str) for p in prediction):
            return list(prediction)
        if not isinstance(prediction, Tensor) or prediction.ndim != 3:
            shape = tuple(getattr(prediction, "shape", ())) or type(prediction).__name__
            raise ConfigError(
                f"task ocr: scores must be (n, T, classes): {shape}; see postprocess"
            )
        return [self._decoded(steps) for steps in prediction.argmax(2).tolist()]

    def _decoded(self, steps: list[int]) -> str:
        kept = [c for c, before in zip(steps, [0, *steps], strict=False) if c != before and c != 0]
        return "".join(self._character(c) for c in kept)

    def _character(self, index: int) -> str:
        if not self.alphabet:
            return chr(index)  # only equality counts
        return self.alphabet[index - 1] if index <= len(self.alphabet) else " "

    def _text(self, target: Any) -> str:
        if isinstance(target, str):
            if not self.alphabet and self.postprocess is None:
                raise ConfigError(
                    "task_args.alphabet: missing: targets are texts, and the classes' characters are not known"
                )
            return target
        try:
            numbers = [int(c) for c in torch.as_tensor(target).reshape(-1) if int(c) > 0]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"data: a target must be a text or class indices: {target!r:.60}"
            ) from error
        return "".join(self._character(c) for c in numbers)


def make(cfg: Config) -> Ocr:
    """The task that a config asks for; ``alphabet`` is a text, or a file with a character in each line."""
    alphabet = cfg.task_args.get("alphabet", "")
    if not isinstance(alphabet, str):
        raise ConfigError(f"task_args.alphabet: must be a text or a file: {alphabet!r:.40}")
    try:
        file = cfg.resolve(alphabet) if alphabet else None
        found = file is not None and file.is_file()
    except (OSError, RuntimeError, ValueError):  # too long for a name, or ~ and no user: a text
        file, found = None, False
    if file is not None and found:
        with file.open(encoding="utf-8") as lines:
            alphabet = "".join(line.rstrip("\n\r") or " " for line in lines)
    return Ocr(alphabet, option(cfg, "measure", MEASURES), postprocess_of(cfg))
