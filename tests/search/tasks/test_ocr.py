from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from search.config.schema import Config, ConfigError, load_config
from search.tasks.ocr import Ocr, make

# class 0 is the blank: "aab", "ab", and "abc"
STEPS = torch.tensor([[1, 1, 0, 1, 2, 2], [0, 1, 2, 0, 0, 0], [1, 2, 2, 3, 3, 0]])
SCORES = torch.nn.functional.one_hot(STEPS, 4).float()


def test_repeats_and_blanks_are_dropped() -> None:
    task = Ocr("abc")
    assert task.texts(SCORES) == ["aab", "ab", "abc"]
    assert task.score([SCORES], ["aab", "ab", "abc"]) == 1.0


def test_words_and_characters_that_are_wrong() -> None:
    wanted = ["aab", "abcc", "xyzw"]  # 0 of 3, 2 of 4, 4 of 4 characters wrong
    found = Ocr("abc").per_sample([SCORES], wanted)
    assert found is not None and found.tolist() == [1, 0, 0]
    found = Ocr("abc", "characters").per_sample([SCORES], wanted)
    assert found is not None and found.tolist() == pytest.approx([1, 0.5, 0])


def test_more_errors_than_characters_and_empty_texts_count_as_nothing_right() -> None:
    found = Ocr("abc", "characters").per_sample([SCORES], ["c", "", "abc"])
    assert found is not None and found.tolist() == [0, 0, 1]
    blank = torch.zeros(1, 3, 4)
    blank[..., 0] = 1
    assert Ocr("abc", "characters").score([blank], [""]) == 1.0


def test_classes_are_targets_too_with_padding_and_without_an_alphabet() -> None:
    targets = torch.tensor([[1, 1, 2], [1, 2, 0], [1, 2, -1]])
    for task in (Ocr(), Ocr("abc")):
        found = task.per_sample([SCORES], targets)
        assert found is not None and found.tolist() == [1, 1, 0]


def test_a_postprocess_may_return_texts() -> None:
    task = Ocr(postprocess=lambda outputs: ["ab"] * len(outputs[0]))
    assert task.score([SCORES], ["ab", "ab", "b"]) == pytest.approx(2 / 3)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Config]:
    def write(alphabet: str) -> Config:
        file = tmp_path / "run.yaml"
        file.write_text(
            f"task: ocr\ntask_args: {{alphabet: {alphabet}}}\nmodel: {{timm: resnet18}}\ndata: {{npz: a.npz}}\n",
            encoding="utf-8",
        )
        return load_config(file)

    return write


@pytest.mark.parametrize("text", ["abc", "~nobody", "0123456789/:.", "é" * 200, "a" * 3000])
def test_an_alphabet_is_a_text(written: Callable[[str], Config], text: str) -> None:
    assert make(written(f'"{text}"')).alphabet == text


def test_or_a_file_with_a_character_in_each_line(
    written: Callable[[str], Config], tmp_path: Path
) -> None:
    (tmp_path / "chars.txt").write_text("a\nb\n\né\n", encoding="utf-8")
    assert make(written("chars.txt")).alphabet == "ab é"


def test_another_alphabet_is_refused(written: Callable[[str], Config]) -> None:
    with pytest.raises(ConfigError, match=r"task_args\.alphabet: must be a text or a file"):
        make(written("[a, b]"))


@pytest.mark.parametrize(
    ("found", "targets", "message"),
    [
        (SCORES[0], ["a"] * 6, r"scores must be \(n, T, classes\): \(6, 4\)"),
        (SCORES, ["a"], "3 outputs for 1 targets"),
        (SCORES, ["a", "b", "c"], "task_args.alphabet: missing"),
        (SCORES, [None, None, None], "a target must be a text or class indices"),
    ],
)
def test_what_does_not_fit_is_refused(found: torch.Tensor, targets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ocr().score([found], targets)
