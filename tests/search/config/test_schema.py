from __future__ import annotations

from pathlib import Path

import pytest

from search.config.inputs import MODEL_KEYS
from search.config.schema import TASKS, Config, ConfigError, load_config, shipped_config

GOOD = """\
task: classification
model: {factory: "zoo:net", args: {width: 2}}
data: {npz: digits.npz, calibration: 10}
target: per_tensor
search: {trials: 7, max_macs: 1.2}
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def fault(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(written(folder, text))
    return str(caught.value)


def test_reads_what_is_written_and_defaults_the_rest(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, GOOD))
    assert config.model.args == {"width": 2}
    assert config.data.calibration == 10
    assert (config.target, config.engine, config.device) == ("per_tensor", "auto", "auto")
    assert (config.search.trials, config.search.max_macs, config.search.seed) == (7, 1.2, 0)
    assert config.search.objective == "auto"
    assert config.search.max_drop is None
    assert config.calibration.method == "minmax"
    assert config.path == tmp_path / "run.yaml"


def test_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    config = load_config("run.yaml")
    assert config.resolve("a/b.npz") == tmp_path / "a" / "b.npz"
    assert config.resolve("../b.npz") == tmp_path.parent / "b.npz"
    assert config.resolve("/x/b.npz") == Path("/x/b.npz")
    assert config.resolve("~/b.npz") == Path.home() / "b.npz"


def test_the_config_cannot_be_changed(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, GOOD))
    with pytest.raises(ValueError, match="frozen"):
        config.target = "tflite"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("trials: 7", "trails: 7", "run.yaml:5: search.trails: unknown key; did you mean trials?"),
        (
            "target:",
            "trials: 3\ntarget:",
            "run.yaml:4: trials: unknown key; did you mean search.tr",
        ),
        ("search:", "\n\nserch:", "run.yaml:7: serch: unknown key; did you mean search?"),
        ("npz:", "zzz: 1, npz:", "run.yaml:3: data.zzz: unknown key; known here: factory, args"),
        ("trials: 7", "trials: many", "run.yaml:5: search.trials: should be a valid integer"),
        (
            "trials: 7",
            "trials: yes",
            "run.yaml:5: search.trials: is true; this key takes neither true",
        ),
        ("trials: 7", "trials: 0", "run.yaml:5: search.trials: should be greater than or equal"),
        ("trials: 7", "trials: 2.5", "run.yaml:5: search.trials: should be a valid integer"),
        ("1.2", ".nan", "run.yaml:5: search.max_macs: should be"),
        (
            "target:",
            "finetune: {step: 3}\ntarget:",
            "run.yaml:4: finetune.step: unknown key; did you mean steps?",
        ),
        (
            "target:",
            "finetune: {loss: label}\ntarget:",
            "run.yaml:4: finetune.loss: should be 'distillation' or 'labels'; is 'label'; did you",
        ),
        (
            "target:",
            "finetune: {rate: 0}\ntarget:",
            "run.yaml:4: finetune.rate: should be greater",
        ),
        ("1.2", "115", "run.yaml:5: search.max_macs: should be less than or equal to 100"),
        ("per_tensor", "per_tenser", "run.yaml:4: target: unknown: 'per_tenser'; did you mean"),
        (
            "classification",
            "clasification",
            f"run.yaml:1: task: should be {', '.join(map(repr, TASKS[:-1]))} or {TASKS[-1]!r}; "
            "is 'clasification'; did you mean classification?",
        ),
        ("zoo:net", "zoo.net", 'run.yaml:2: model.factory: must be "module:callable"; is'),
        (
            "factory:",
            "timm: x, factory:",
            f"model: needs one of {', '.join(MODEL_KEYS)}",
        ),
        ("factory:", "weights: x, factory:", "run.yaml:2: model: weights go with timm"),
        ("npz: digits.npz, ", "", "run.yaml:3: data: needs one of factory, imagefolder, csv"),
        ("npz:", "digits: 32, npz:", "digits; found npz and digits"),
        ("npz:", "images: x, npz:", "run.yaml:3: data: images (a folder) goes with csv"),
        ("npz: digits.npz", "csv: a.csv", "run.yaml:3: data: images (a folder) goes with csv"),
        ("npz: digits.npz", "digits: 32, size: 3", "run.yaml:3: data: size: not used with digits"),
        ("npz:", "args: {a: 1}, npz:", "run.yaml:3: data: args go with factory, not with npz"),
        ("npz:", "std: [1, 0], npz:", "run.yaml:3: data: std must be above 0: 0.0"),
        ("npz:", "mean: [1, 0], std: [1], npz:", "run.yaml:3: data: mean has 2 channels, std 1"),
        ("npz:", "mean: [1, a], npz:", "run.yaml:3: data.mean.1: should be a valid number"),
        ("target:", "device: gpu\ntarget:", "run.yaml:4: device: must be auto, cpu, cuda or cuda"),
        ("model:", "model: abc\n#", "run.yaml:2: model: must hold keys (keys: timm, torchvision"),
        ("target:", "postprocess: {factory: 'a:b'}\ntarget:", "postprocess goes with task detect"),
        ("target:", "task: video\ntarget:", "run.yaml:4: task: given twice, first in line 1"),
        ("target:", "? [a]\n: 1\ntarget:", "run.yaml:4: not YAML: found unhashable key"),
    ],
)
def test_names_the_key_the_line_and_the_right_one(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert message in fault(tmp_path, GOOD.replace(old, new, 1))


def test_every_fault_at_once_in_order_of_lines(tmp_path: Path) -> None:
    text = GOOD.replace("trials", "trails").replace("per_tensor", "no").replace("npz:", "npy:")
    lines = fault(tmp_path, text).splitlines()
    assert [line.split(":")[1] for line in lines] == ["3", "4", "5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold keys such as task and model, but is empty"),
        ("- 1\n- 2\n", "must hold keys such as task and model, but is a seq"),
        ("hello\n", "but is a str"),
        ("task: a\nmodel: [b\n", "run.yaml:3: not YAML: expected ',' or ']'"),
        ("task: 2026-99-99\n", "run.yaml: not YAML: month must be in 1..12"),
        ("task: \x00\n", "run.yaml: not YAML"),
        ("task: classification\n", "run.yaml:1: data: missing (keys: factory, args, imagefolder"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in fault(tmp_path, text)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(path)
    binary = tmp_path / "run.yaml"
    binary.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        load_config(binary)


@pytest.mark.parametrize("name", ["digits.yaml", "efficientnet_lite0.yaml"])
def test_shipped_configs_are_valid(name: str) -> None:
    config = load_config(shipped_config(name))
    assert isinstance(config, Config)
    assert config.target == "per_tensor"


def test_no_other_config_is_shipped() -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such shipped config"):
        shipped_config("none.yaml")


@pytest.mark.assets
def test_the_acceptance_configs_are_valid(assets: Path) -> None:
    files = sorted(assets.glob("*.yaml"))
    assert len(files) >= 3
    for file in files:
        assert load_config(file).path == file
