"""Every command in the documents is one that exists; the tutorials are carried out, with tiny inputs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import typer
import yaml
from PIL import Image
from safetensors.torch import save_file
from typer.core import TyperGroup

from rewriter.rules import RULES
from search.cli.main import app
from search.config.schema import Config, load_config
from tests.rules import check

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRIED = ("tutorial-timm.md", "tutorial-own-model.md", "detector.md")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
names = [pytest.param(path, id=path.name) for path in DOCUMENTS]


@dataclass(frozen=True)
class Block:
    """A fenced block; ``name`` is the file that its first line names, ``# name``."""

    language: str
    text: str

    @property
    def name(self) -> str:
        found = re.match(r"# ([\w-]+\.\w+)\n", self.text)
        return found.group(1) if found else ""


def blocks(path: Path) -> list[Block]:
    found: list[Block] = []
    for indent, language, text in FENCE.findall(path.read_text()):
        lines = [line.removeprefix(indent) for line in text.splitlines()]
        found.append(Block(language, "\n".join(lines) + "\n"))
    return found


def commands(path: Path) -> list[list[str]]:
    """Every line of every shell block, in words; continued lines are joined."""
    found: list[list[str]] = []
    for block in blocks(path):
        if block.language in ("sh", "bash", "shell", "console"):
            text = block.text.replace("\\\n", " ")
            found += [w for line in text.splitlines() if (w := shlex.split(line, comments=True))]
    return found


def parse(words: list[str]) -> None:
    """Let the command line read its words without carrying them out."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    context = group.make_context("quantfix", words[1:2], resilient_parsing=True)
    command = group.get_command(context, words[1])
    assert command is not None, f"no command {words[1]}"
    command.make_context(words[1], words[2:], parent=context)


@pytest.mark.parametrize("path", names)
def test_every_command_exists_and_its_options_too(path: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for words in commands(path):
        if words[0] == "quantfix":
            parse(words)
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets), words
        elif "pip" in words and "install" in words:
            for extras in re.findall(r"quantfix\[([\w,]+)\]", " ".join(words)):
                assert set(extras.split(",")) <= set(project["optional-dependencies"]), words


def test_a_command_that_does_not_exist_is_noticed() -> None:
    parse(["quantfix", "run", "a.yaml", "--trials", "3"])
    for words in (["quantfix", "walk", "a.yaml"], ["quantfix", "run", "a.yaml", "--speed", "3"]):
        with pytest.raises(Exception, match=r"no command walk|No such option.*--speed"):
            parse(words)


@pytest.mark.parametrize("path", names)
def test_every_config_is_valid(path: Path, tmp_path: Path) -> None:
    for block in blocks(path):
        if block.language != "yaml" or "task:" not in block.text:
            continue
        file = tmp_path / (block.name or "config.yaml")
        file.write_text(block.text)
        assert load_config(file).task == yaml.safe_load(block.text)["task"]


@pytest.mark.parametrize("path", names)
def test_every_link_leads_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_every_key_of_a_config_that_is_named_exists() -> None:
    text = " ".join(path.read_text() for path in DOCUMENTS)
    for section, key in re.findall(r"`(search|finetune)\.(?!py`)(\w+)`", text):
        kind = Config.model_fields[section].annotation
        assert key in kind.model_fields, f"{section}.{key}"  # pyright: ignore[reportOptionalMemberAccess]


def photographs(folder: Path, count: int, labels: int) -> None:
    random = np.random.default_rng(0)
    for i in range(count):
        place = folder / f"n{i % labels:08}" if labels else folder
        place.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(coarse).resize((72, 72), Image.Resampling.BICUBIC).save(place / f"{i}.png")


def for_timm(folder: Path) -> None:
    photographs(folder / "images", 20, 5)
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_050", num_classes=5)
    save_file(model.state_dict(), folder / "mobilenetv2_100.safetensors")


def for_detector(folder: Path) -> None:
    photographs(folder / "images", 40, 0)
    random = np.random.default_rng(1)
    low, size = random.uniform(0, 40, (40, 2)), random.uniform(8, 30, (40, 2))
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 72, "height": 72} for i in range(40)
        ],
        "annotations": [
            {"image_id": i, "category_id": i % 3, "bbox": [*low[i].tolist(), *size[i].tolist()]}
            for i in range(40)
        ],
        "categories": [{"id": c} for c in range(3)],
    }
    (folder / "annotations.json").write_text(json.dumps(content))


PREPARED: dict[str, Callable[[Path], None]] = {
    "tutorial-timm.md": for_timm,
    "tutorial-own-model.md": lambda folder: None,
    "detector.md": for_detector,
}


def smaller(text: str) -> str:
    """The same config for a test: fewer trials and images, a smaller network."""
    text = re.sub(r"trials: \d+", "trials: 3", text)
    text = text.replace("timm: mobilenetv2_100", "timm: mobilenetv2_050, args: {num_classes: 5}")
    return text.replace("imagefolder: images", "imagefolder: images, calibration: 10, size: 64")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a dozen commands, each of which starts anew
@pytest.mark.parametrize("name", TRIED)
def test_a_tutorial_can_be_followed(name: str, tmp_path: Path) -> None:
    path = ROOT / "docs" / name
    PREPARED[name](tmp_path)
    for block in blocks(path):
        if block.name:
            (tmp_path / block.name).write_text(smaller(block.text))
    for words in commands(path):
        if words[0] == "quantfix" and words[2].startswith("configs/"):
            continue  # shipped examples have tests of their own
        program = {"quantfix": ["-m", "search.cli"], "python": []}[words[0]]
        found = subprocess.run(
            [sys.executable, *program, *words[1:]],
            cwd=tmp_path, capture_output=True, text=True, timeout=800,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        allowed = (0, 1) if words[1] == "fix" else (0,)  # 1: no plan met the goal
        assert found.returncode in allowed, f"{words}\n{found.stdout}\n{found.stderr}"
        assert "Traceback" not in found.stderr
    (run,) = (tmp_path / "runs").iterdir()
    for file in (
        "report.html",
        "report.md",
        "front.json",
        "exhibits.json",
        "export/model_int8.onnx",
    ):
        assert (run / file).stat().st_size > 0, file


def test_the_example_of_a_rule_is_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, test = (b for b in blocks(ROOT / "docs" / "rules.md") if b.language == "python")
    (tmp_path / rule.name).write_text(rule.text)
    spec = importlib.util.spec_from_file_location("double_negate", tmp_path / rule.name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("rewriter.plan.RULES", (*RULES, module.DoubleNegate()))  # the one line
    space = {"DoubleNegate": module.DoubleNegate, "__name__": "test_double_negate"}
    exec(compile(test.text, test.name, "exec"), space)
    ran = 0
    for name, function in list(space.items()):
        if name.startswith("test_"):
            settings = [{}]
            for mark in getattr(function, "pytestmark", ()):
                key, values = mark.args
                settings = [{**s, key: v} for s in settings for v in values]
            for setting in settings:
                function(**setting)  # pyright: ignore[reportCallIssue]
                ran += 1
    assert ran == 6
    assert (
        check.layer_count(
            check.rewrites(module.DoubleNegate(), torch.nn.Conv2d(3, 4, 3), (3, 9, 7))
        )
        == 1
    )
