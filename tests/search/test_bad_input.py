"""The table of bad inputs: config, network and data. See `test_bad_files` and `test_bad_run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.search.refused import Bad, answer, check, model, splits, write_config

KEYS = [
    Bad(
        "unknown key",
        ("bad.yaml:9: search.trails: unknown key; did you mean trials?",),
        {"search": {"trails": 3}},
    ),
    Bad(
        "key of another section",
        ("trials: unknown key; did you mean search.trials?",),
        {"trials": 3},
    ),
    Bad("unknown section", ("serach: unknown key; did you mean search?",), {"serach": {}}),
    Bad(
        "word for a number",
        ("search.trials: should be a valid integer", "'many'"),
        {"search": {"trials": "many"}},
    ),
    Bad(
        "negative number",
        ("search.trials: should be greater than or equal to 1", "-5"),
        {"search": {"trials": -5}},
    ),
    Bad(
        "yes for a number",
        ("search.trials: is true; this key takes neither true nor false",),
        {"search": {"trials": True}},
    ),
    Bad("not finite", ("search.max_macs: should be",), {"search": {"max_macs": float("nan")}}),
    Bad("seed beyond 64 bits", ("search.seed: should be less than",), {"search": {"seed": 2**70}}),
    Bad("list for a section", ("model: must hold keys", "[1]"), {"model": [1]}),
    Bad("missing data", ("data: needs one of factory, imagefolder",), {"data": {}}),
    Bad(
        "two sources",
        ("data: needs one of", "found npz and digits"),
        {"data": {"npz": "x.npz", "digits": 8}},
    ),
    Bad(
        "unknown meaning",
        ("outputs: unknown: 'boxes'; known: logits,",),
        {"outputs": "boxes"},
    ),
    Bad(
        "meanings of outputs that are not there",
        ("outputs: 2 listed, but the network returns 1",),
        {"outputs": ["logits", "values"]},
    ),
    Bad("unknown task", ("task: should be", "did you mean detection?"), {"task": "detektion"}),
    Bad(
        "unknown target",
        ("target: unknown: 'tensort'; did you mean 'tensorrt'",),
        {"target": "tensort"},
    ),
    Bad(
        "unknown engine",
        ("engine: unknown: 'ort' (known: litert, onnxruntime, ",),
        {"engine": "ort"},
    ),
    Bad(
        "no such device",
        ("bad.yaml: device: cuda:77: torch sees",),
        {"device": "cuda:77"},
        words=("analyze", "CONFIG", "-q", "--out", "RUN"),
    ),
    Bad(
        "words for a device",
        ("device: must be auto, cpu, cuda or cuda:N; is 'gpu'",),
        {"device": "gpu"},
    ),
    Bad(
        "postprocess of no detector",
        (
            "postprocess goes with task detection, segmentation, keypoints, regression, ocr, "
            "not classification",
        ),
        {"postprocess": {"factory": "wrong:Decode"}},
    ),
    Bad(
        "detector without postprocess",
        ("task detection: missing postprocess",),
        {"task": "detection"},
    ),
    Bad(
        "video from a folder",
        ("task video reads data from one of factory, csv, npz",),
        {"task": "video", "data": {"imagefolder": "x"}},
    ),
    Bad(
        "metric without labels",
        ("search.objective: metric: the evaluation data have no labels",),
        {
            "data": {"factory": "small:data", "args": {"labels": False}},
            "search": {"objective": "metric"},
        },
        words=("run", "CONFIG", "-q", "--out", "RUN"),
    ),
    Bad(
        "drop without labels",
        ("fix: the evaluation data have no labels", "give --max-damage"),
        {"data": {"factory": "small:data", "args": {"labels": False}}},
        words=("fix", "CONFIG", "-q", "--max-drop", "1", "--out", "RUN"),
    ),
]

MODELS = [
    Bad(
        "no such module",
        ("model: factory nomod:x: no module nomod, neither in",),
        {"model": {"factory": "nomod:x"}},
    ),
    Bad(
        "no such function",
        ("wrong has no callable netwrok; did you mean network?",),
        {"model": {"factory": "wrong:netwrok"}},
    ),
    Bad(
        "arguments that do not fit",
        ("model: factory small:small: args do not fit", "'width'"),
        {"model": {"factory": "small:small", "args": {"width": 2}}},
    ),
    Bad(
        "no module:callable",
        ("model.factory: must be \"module:callable\"; is 'small'",),
        {"model": {"factory": "small"}},
    ),
    Bad(
        "syntax error",
        ("model: factory synt:x: SyntaxError at synt.py:2:",),
        {"model": {"factory": "synt:x"}},
        lambda d: (d / "synt.py").write_text("\ndef x(:\n"),
    ),
    Bad(
        "import that is missing",
        ("imp:x: ModuleNotFoundError at imp.py:1: No module named 'nolib'",),
        {"model": {"factory": "imp:x"}},
        lambda d: (d / "imp.py").write_text("import nolib\n"),
    ),
    Bad(
        "module that exits",
        ("leaves:x: SystemExit at leaves.py:1: 3",),
        {"model": {"factory": "leaves:x"}},
        lambda d: (d / "leaves.py").write_text("raise SystemExit(3)"),
    ),
    Bad(
        "name of our own package",
        ("search.py: the name search is quantfix's own",),
        {"model": {"factory": "search:x"}},
        lambda d: (d / "search.py").write_text(""),
    ),
    Bad(
        "factory raises",
        (
            'in network raise ValueError("no weights today")',
            "model: factory wrong:network: ValueError at wrong.py:",
            "no weights today",
        ),
        model("raises"),
    ),
    Bad(
        "factory exits",
        ("model: factory wrong:network: SystemExit at wrong.py:", "bye"),
        model("exits"),
    ),
    Bad("returns None", ("returned no nn.Module: NoneType",), model("none")),
    Bad("returns the class", ("returned no nn.Module: type",), model("class")),
    Bad("returns the weights", ("returned no nn.Module: OrderedDict",), model("state")),
    Bad("weights without values", ("model: stem.0.weight: on the device meta",), model("meta")),
    Bad("NaN in weights", ("model: pw.weight: holds 1 values that are NaN",), model("nan")),
    Bad(
        "NaN in outputs", ("output 0 of the float model holds NaN",), model("log", "wrong:around")
    ),
    Bad(
        "forward raises",
        ('in forward raise RuntimeError("not today")', "fails by itself on an input", "not today"),
        model("raises", "wrong:around"),
    ),
    Bad(
        "condition on values",
        ("a condition depends on values of the input at",),
        model("branches", "wrong:around"),
    ),
    Bad(
        "size that depends on values",
        ("model: does not fit task classification: output 0: axis 1: the shape is (N, )",),
        model("chosen", "wrong:around"),
    ),
    Bad(
        "one row for all inputs",
        ("model: output 0 has no row for each input",),
        model("pooled", "wrong:around"),
    ),
    Bad("no logits", ("classification needs logits (n, classes)",), model("maps", "wrong:around")),
    Bad(
        "nothing to quantize",
        ("model: no convolution, linear layer or matrix product",),
        model("layerless"),
    ),
    Bad(
        "channels of the input",
        ("fails by itself on an input of shape (2, 3, 16, 16)", "to have 1 channels, but got 3"),
        model("gray"),
    ),
    Bad(
        "fewer classes than labels",
        ("target outside the network's 2 classes, 0 to 1: 4",),
        model("two"),
    ),
    Bad(
        "unknown timm model",
        ("model.timm: unknown to timm", "mobilenetv2_100"),
        {"model": {"timm": "mobilnetv2_100"}},
    ),
    Bad(
        "unknown torchvision model",
        ("model.torchvision: unknown to torchvision", "mobilenet_v2"),
        {"model": {"torchvision": "mobilnet_v2"}},
    ),
]

DATA = [
    Bad(
        "factory of data raises",
        ("data: factory wrong:splits: KeyError at wrong.py:",),
        splits("raises"),
    ),
    Bad("no evaluation", ("result has no evaluation: Half",), splits("no evaluation")),
    Bad("empty evaluation", ("data.evaluation: empty",), splits("empty")),
    Bad("empty calibration", ("data.calibration: empty",), splits("no calibration")),
    Bad(
        "bytes",
        ("inputs must be float32 tensors (C, H, W): tensor of torch.uint8",),
        splits("bytes"),
    ),
    Bad("numpy", ("inputs must be float32 tensors (C, H, W): ndarray",), splits("numpy")),
    Bad("iterator", ("data.calibration: no map-style data set",), splits("iterator")),
    Bad(
        "sample of another kind",
        ("data: sample 5: the input is no tensor: str 'a path'",),
        splits("mixed"),
    ),
    Bad(
        "NaN to calibrate",
        ("data: sample 3: 1 values of the input are NaN",),
        splits("nan calibration"),
    ),
    Bad(
        "infinite to evaluate",
        ("data: sample 30: 768 values of the input are NaN or infinite",),
        splits("nan evaluation"),
    ),
    Bad(
        "another size",
        ("data.evaluation: inputs have the shape (3, 16, 8), those of calibration",),
        splits("narrow"),
    ),
    Bad(
        "one of another size",
        ("data: inputs differ in shape: (3, 8, 16) and (3, 16, 16)",),
        splits("one narrow"),
    ),
    Bad(
        "label too high",
        ("target outside the network's 5 classes, 0 to 4: 77",),
        splits("label high"),
    ),
    Bad(
        "label negative",
        ("target outside the network's 5 classes, 0 to 4: -1",),
        splits("label negative"),
    ),
    Bad(
        "fractions for labels",
        ("targets must be class indices: torch.float32",),
        splits("float labels"),
    ),
    Bad("words for labels", ("targets must be class indices: str 'cat'",), splits("words")),
    Bad(
        "None for labels",
        ("a target is no number", "without labels, yield inputs alone"),
        splits("none labels"),
    ),
    Bad("one-hot labels", ("48 outputs for 240 targets",), splits("one hot")),
    Bad(
        "data set raises",
        ("raise ZeroDivisionError", "data: sample 7: ZeroDivisionError at small.py"),
        {"data": {"factory": "small:data", "args": {"broken": True}}},
    ),
]


def detector(kind: str) -> dict[str, Any]:
    return {
        "task": "detection",
        "data": {"factory": "wrong:boxes"},
        "postprocess": {"factory": "wrong:Decode", "args": {"kind": kind}},
    }


POSTPROCESS = [
    Bad(
        "postprocess raises",
        ('raise ValueError("in the postprocess")', "postprocess: ValueError at wrong.py:"),
        detector("raises"),
    ),
    Bad(
        "postprocess returns numbers",
        ("postprocess: image 0: must be a dict of boxes, scores",),
        detector("numbers"),
    ),
    Bad(
        "postprocess loses images",
        ("postprocess: must return a list of 32, one for each image: 0",),
        detector("short"),
    ),
    Bad(
        "postprocess without scores",
        ("postprocess: image 0: scores is no tensor",),
        detector("no scores"),
    ),
    Bad(
        "postprocess of other lengths",
        ("postprocess: image 0: not (n, 4), (n,) and (n,)",),
        detector("lengths"),
    ),
    Bad(
        "nothing to call",
        ("postprocess: factory returned nothing that can be called",),
        detector("") | {"postprocess": {"factory": "small:data"}},
    ),
]


def test_the_table_is_large_and_no_case_is_there_twice() -> None:
    names = [bad.name for bad in (*KEYS, *MODELS, *DATA, *POSTPROCESS)]
    assert len(names) == len(set(names)) >= 60


@pytest.mark.parametrize("bad", [*KEYS, *MODELS, *DATA, *POSTPROCESS], ids=lambda bad: bad.name)
def test_it_is_refused_in_words(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (splits("overlap"), "data: 10 of 48 evaluation inputs are calibration inputs too"),
        (model("half"), "model: has torch.float16 values: converted to float32"),
    ],
)
def test_what_can_be_used_all_the_same_is_a_warning(
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    code, _ = answer(["check", str(write_config(tmp_path, **changes)), "-q"], monkeypatch, capsys)
    assert code == 0
    assert said in caplog.text
